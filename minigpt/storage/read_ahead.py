"""Where a model directory's weights lie, and their bytes, read ahead while something else is done.

    ahead = ReadAhead(Path("output/best"))
    import torch  # which keeps one core busy for a second
    model, tokenizer = load_model_and_tokenizer("output/best", ahead=ahead)

Most of what reading a model costs is the first touch of new memory. Nothing is raised here: what makes no
sense is left to `minigpt.storage.safetensors_files`, which reads it anew and says what is wrong with it.
"""

import contextlib
import ctypes
import json
import mmap
import os
import threading
from itertools import accumulate, pairwise
from operator import index
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "HEADER_LIMIT",
    "INDEX",
    "KEPT",
    "WEIGHTS",
    "ReadAhead",
    "folder_of_weights",
    "has_weights",
    "large_block",
]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEADER_LIMIT = 100_000_000  # bytes; the format's own
KEPT = 2**18  # bytes: a smaller tensor is better copied than to keep its neighbours in memory

_LARGE = 2**21  # bytes of a large page
_BLOCK = 8 * _LARGE  # are read in one go at most, or one tensor that is larger
_MOST = 2**31  # bytes: more cannot be read while something is imported
_PIECE = 2**30  # bytes of one read: systems have limits near twice as many
_LINE = 64  # bytes: what does not begin on a line of the processor's cache is left out


def has_weights(folder: Path) -> bool:
    """Do weights of the names used here lie in a directory? Says nothing about what they hold."""
    return (folder / WEIGHTS).exists() or (folder / INDEX).exists()


def folder_of_weights(folder: Path) -> Path:
    """The directory itself, or of a run's folder its `best`, or else its `last`, if it has no weights."""
    if not has_weights(folder):
        for name in ("best", "last"):  # a run that was stopped before it was ever measured has no `best`
            if (folder / name).is_dir():
                return (folder / name).resolve()  # at once: training may point it elsewhere meanwhile
    return folder


class ReadAhead:
    """The bytes of a directory's tensors, in memory of their own; a thread reads them from now on.

    Args:
        folder: as `folder_of_weights` takes it. Where it has no weights in safetensors, nothing is read; of
            large ones the first two GiB.
    """

    def __init__(self, folder: Path) -> None:
        self._states: dict[Path, os.stat_result] = {}
        self._blocks: dict[tuple[Path, str], _Block] = {}
        self._contents: dict[tuple[Path, str], memoryview] = {}
        with contextlib.suppress(OSError, RuntimeError):  # of names and permissions; of too many threads
            if hasattr(os, "preadv"):  # Windows has none
                folder = folder_of_weights(folder)
                pattern = WEIGHTS if (folder / WEIGHTS).exists() else "model-*-of-*.safetensors"
                blocks = [block for path in sorted(folder.glob(pattern)) for block in self._planned(path)]
                read = accumulate(block.size for block in blocks)
                blocks = [block for block, end in zip(blocks, read) if end <= _MOST]
                threading.Thread(target=self._read, args=(blocks,), daemon=True).start()
                self._blocks = {(one.path, place.name): one for one in blocks for place in one.places}

    def take(self, path: Path, name: str) -> memoryview | None:
        """A tensor's bytes, once, that nobody else has; None if there are none, or the file has changed.

        Waits until they are there. They keep what lies beside them in memory.
        """
        if (path, name) not in self._blocks:
            return None
        self._blocks[path, name].done.wait()
        content = self._contents.pop((path, name), None)
        with contextlib.suppress(OSError):
            return content if _version(path.stat()) == _version(self._states[path]) else None
        return None

    def _planned(self, path: Path) -> "list[_Block]":
        """What to read in one go; nothing of a file that is none."""
        blocks: list[_Block] = []
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError):
            self._states[path] = path.stat()
            for place in _places(path):
                if not blocks or place.end - blocks[-1].places[0].begin > _BLOCK:
                    blocks.append(_Block(path, [], threading.Event()))
                blocks[-1].places.append(place)
        return blocks

    def _read(self, blocks: "list[_Block]") -> None:
        for block in blocks:
            # Whatever goes wrong: who takes a tensor must not wait for ever, reads it himself, and is told.
            with contextlib.suppress(Exception):
                first = block.places[0].begin
                content = _bytes_of(block.path, first, block.size)
                for begin, end, name in block.places:
                    if begin < end and (begin - first) % _LINE == 0:
                        self._contents[block.path, name] = content[begin - first : end - first]
            block.done.set()


class _Place(NamedTuple):
    """Where in its file a tensor lies, in bytes."""

    begin: int
    end: int
    name: str


class _Block(NamedTuple):
    """Tensors side by side in a file."""

    path: Path
    places: list[_Place]
    done: threading.Event

    @property
    def size(self) -> int:
        """Bytes."""
        return self.places[-1].end - self.places[0].begin


def _places(path: Path) -> list[_Place]:
    """Of a safetensors file, in their order there: side by side, from the header's end on."""
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > HEADER_LIMIT:
            raise ValueError(f"{path} has a header of {start} bytes")
        header = json.loads(file.read(start - 8))
    entries = [(entry["data_offsets"], name) for name, entry in header.items() if name != "__metadata__"]
    places = sorted(_Place(start + index(begin), start + index(end), name) for (begin, end), name in entries)
    size = path.stat().st_size
    around = [_Place(start, start, ""), *places, _Place(size, size, "")]
    if any(before.end != after.begin or before.begin > before.end for before, after in pairwise(around)):
        raise ValueError(f"{path} has gaps, or tensors that overlap")
    return places


def _bytes_of(path: Path, begin: int, size: int) -> memoryview:
    """Read into ordinary pages: filling new large ones takes longer where a host has to find them first."""
    memory, content = _memory(size)
    filled = 0
    with path.open("rb", buffering=0) as file:
        while filled < size:
            count = os.preadv(file.fileno(), [content[filled : filled + _PIECE]], begin + filled)
            if not count:
                raise EOFError(f"{path} ends early")
            filled += count
    _ask_for_large_pages(memory)  # Linux may merge the small ones, some each minute
    return content


def large_block(size: int) -> memoryview:
    """New memory for `size` bytes, in large pages where the system has them; given back with its last user.

    Linux gives them where it is asked before the memory is first written (madvise(2)).
    """
    memory, content = _memory(size)
    _ask_for_large_pages(memory)
    return content


def _memory(size: int) -> tuple[mmap.mmap, memoryview]:
    """New memory, and `size` bytes of it that begin where a large page may."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, -(-size // _LARGE) * _LARGE + _LARGE, **private)
    begin = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % _LARGE
    return memory, memoryview(memory)[begin : begin + size]


def _ask_for_large_pages(memory: mmap.mmap) -> None:
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)


def _version(state: os.stat_result) -> tuple[int, ...]:
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns
