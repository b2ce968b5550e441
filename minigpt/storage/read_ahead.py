"""Where a model directory's weights are, and their bytes, read in a thread while Python imports torch.

    ahead = ReadAhead(Path("output/best"))
    import torch  # which keeps one core busy for a second
    model, tokenizer = load_model_and_tokenizer("output/best", ahead=ahead)

Most of what reading a model costs is the first use of new memory; it happens here beside the import. No error
is raised: `minigpt.storage.safetensors_files` reads a damaged file again, and says what is wrong with it.
"""

import contextlib
import os
import threading
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from minigpt.errors import InputError
from minigpt.storage.large_pages import ask_for_large_pages, new_memory
from minigpt.storage.safetensors_header import read_header

__all__ = ["INDEX", "KEPT", "WEIGHTS", "ReadAhead", "folder_of_weights", "has_weights"]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
KEPT = 2**18  # bytes: a smaller tensor is copied, so that it does not keep its neighbours in memory

_BLOCK = 2**24  # bytes that are read in one go at most, or one tensor that is larger
_MOST = 2**31  # bytes: more cannot be read during an import
_PIECE = 2**30  # bytes of one system call, which are limited to near twice as many
_LINE = 64  # bytes of a cache line: a tensor that begins between two lines is left out


def has_weights(folder: Path) -> bool:
    """Whether a directory has weights under the names used here. It does not look into them."""
    return (folder / WEIGHTS).exists() or (folder / INDEX).exists()


def folder_of_weights(folder: Path) -> Path:
    """The directory itself; for a run's folder, which has no weights, its `best`, or else its `last`."""
    if not has_weights(folder):
        for name in ("best", "last"):  # a run that was stopped before its first evaluation has no `best`
            if (folder / name).is_dir():
                return (folder / name).resolve()  # resolved now: training may move the link
    return folder


class ReadAhead:
    """The bytes of a directory's tensors, in memory of their own. A thread begins to read them at once.

    Args:
        folder: as `folder_of_weights` takes it. Without weights in safetensors nothing is read; of large ones
            the first two GiB.
    """

    def __init__(self, folder: Path) -> None:
        self._states: dict[Path, os.stat_result] = {}
        self._blocks: dict[tuple[Path, str], _Block] = {}
        self._contents: dict[tuple[Path, str], memoryview] = {}
        with contextlib.suppress(OSError, RuntimeError):  # about names and permissions; too many threads
            if hasattr(os, "preadv"):  # Windows has none
                folder = folder_of_weights(folder)
                pattern = WEIGHTS if (folder / WEIGHTS).exists() else "model-*-of-*.safetensors"
                blocks = [block for path in sorted(folder.glob(pattern)) for block in self._planned(path)]
                read = accumulate(block.size for block in blocks)
                blocks = [block for block, end in zip(blocks, read) if end <= _MOST]
                threading.Thread(target=self._read, args=(blocks,), daemon=True).start()
                self._blocks = {(one.path, place.name): one for one in blocks for place in one.places}

    def take(self, path: Path, name: str) -> memoryview | None:
        """A tensor's bytes, which nothing else uses; the second time None, or if the file has changed.

        Waits until they are read. They keep the block that was read with them in memory.
        """
        if (path, name) not in self._blocks:
            return None
        self._blocks[path, name].done.wait()
        content = self._contents.pop((path, name), None)
        with contextlib.suppress(OSError):
            return content if _version(path.stat()) == _version(self._states[path]) else None
        return None

    def _planned(self, path: Path) -> "list[_Block]":
        """What to read in one go; nothing of a file that is damaged."""
        blocks: list[_Block] = []
        with contextlib.suppress(OSError, InputError):
            self._states[path] = path.stat()
            for name, entry in read_header(path).items():
                if not blocks or entry.end - blocks[-1].places[0].begin > _BLOCK:
                    blocks.append(_Block(path, [], threading.Event()))
                blocks[-1].places.append(_Place(entry.begin, entry.end, name))
        return blocks

    def _read(self, blocks: "list[_Block]") -> None:
        for block in blocks:
            # On any error `take` must not wait for ever: its caller reads the file, and gets the error.
            with contextlib.suppress(Exception):
                first = block.places[0].begin
                content = _bytes_of(block.path, first, block.size)
                for begin, end, name in block.places:
                    if begin < end and (begin - first) % _LINE == 0:
                        self._contents[block.path, name] = content[begin - first : end - first]
            block.done.set()


class _Place(NamedTuple):
    """Where a tensor is in its file, in bytes."""

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


def _bytes_of(path: Path, begin: int, size: int) -> memoryview:
    """Read into ordinary pages: new large ones take longer to fill where a host has to find them first."""
    memory, content = new_memory(size)
    filled = 0
    with path.open("rb", buffering=0) as file:
        while filled < size:
            count = os.preadv(file.fileno(), [content[filled : filled + _PIECE]], begin + filled)
            if not count:
                raise EOFError(f"{path} ends early")
            filled += count
    ask_for_large_pages(memory)  # Linux may merge the small ones, some each minute
    return content


def _version(state: os.stat_result) -> tuple[int, ...]:
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns
