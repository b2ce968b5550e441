"""Finds the weights of a model folder, and reads them in a thread while Python imports torch.

    ahead = ReadAhead(Path("output/best"))
    import torch  # keeps one core busy for a second
    model, tokenizer = load_model_and_tokenizer("output/best", ahead=ahead)

Loading a model is slow mainly because the operating system prepares each page of new memory at its first use.
The thread does this work on a second core during the import. This module raises no error for a damaged file:
`minigpt.storage.safetensors_files` reads that file again and raises the error.
"""

import contextlib
import os
import threading
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from minigpt.errors import InputError
from minigpt.storage.files import ManifestCheck
from minigpt.storage.large_pages import ask_for_large_pages, new_memory
from minigpt.storage.regular_files import open_regular, resolved
from minigpt.storage.safetensors_header import read_header

__all__ = ["INDEX", "KEPT", "WEIGHTS", "ReadAhead", "folder_of_weights", "has_weights"]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# `ReadAhead.take` returns a view, which keeps a whole block of tensors in memory. So the caller copies a
# tensor that has fewer bytes than KEPT, and drops the view.
KEPT = 2**18

_BLOCK = 2**24  # largest number of bytes of tensors that are read together; a larger tensor is read alone
_MOST = 2**31  # largest number of bytes that are read ahead; more would take longer than importing torch
_PIECE = 2**30  # largest number of bytes per system call; Linux allows nearly 2 GiB
# Bytes of a cache line. `ReadAhead.take` returns only tensors whose first byte is at a multiple of _LINE in
# memory. For any other tensor it returns None, and the caller reads the tensor from the file.
_LINE = 64


def has_weights(folder: Path) -> bool:
    """Return True if a folder has model.safetensors or an index of shards. The files are not opened."""
    return (folder / WEIGHTS).exists() or (folder / INDEX).exists()


def folder_of_weights(folder: Path) -> Path:
    """Return `folder` if it has weights, or else its subfolder `best`, or else its subfolder `last`."""
    if not has_weights(folder):
        for name in ("best", "last"):  # before its first evaluation, a run has `last` but no `best`
            if (folder / name).is_dir():
                return resolved(folder / name)  # resolve the link now, because training may move the link
    return folder


class ReadAhead:
    """Reads the tensors of a model folder into memory, in a thread that starts immediately.

    After the reading, the thread starts `check`, which compares the files with the hashes in manifest.json.

    Args:
        folder: the folder of a model or of a run. Only safetensors files are read, and at most 2 GiB.
    """

    def __init__(self, folder: Path) -> None:
        self.check: ManifestCheck | None = None
        self._states: dict[Path, os.stat_result] = {}
        self._blocks: dict[tuple[Path, str], _Block] = {}
        self._contents: dict[tuple[Path, str], memoryview] = {}
        # if a file cannot be opened, or no new thread can start, nothing is read ahead
        with contextlib.suppress(OSError, RuntimeError):
            if hasattr(os, "preadv"):  # os.preadv does not exist on Windows
                folder = folder_of_weights(folder)
                pattern = WEIGHTS if (folder / WEIGHTS).exists() else "model-*-of-*.safetensors"
                blocks = [block for path in sorted(folder.glob(pattern)) for block in self._planned(path)]
                read = accumulate(block.size for block in blocks)
                blocks = [block for block, end in zip(blocks, read) if end <= _MOST]
                self.check = ManifestCheck(folder)
                threading.Thread(target=self._read, args=(blocks, self.check), daemon=True).start()
                self._blocks = {(one.path, place.name): one for one in blocks for place in one.places}

    def take(self, path: Path, name: str) -> memoryview | None:
        """Wait until a tensor is read, and return its bytes.

        Return None if the tensor was not read ahead, if an earlier call has returned its bytes, or if the
        file has changed since it was read. The bytes are a view of a larger block, and keep the whole block
        in memory.
        """
        if (path, name) not in self._blocks:
            return None
        self._blocks[path, name].done.wait()
        content = self._contents.pop((path, name), None)
        with contextlib.suppress(OSError):
            return content if _version(path.stat()) == _version(self._states[path]) else None
        return None

    def _planned(self, path: Path) -> "list[_Block]":
        """Group the tensors of a file into blocks, which are read as a whole. A damaged file has none."""
        blocks: list[_Block] = []
        with contextlib.suppress(OSError, InputError):
            self._states[path] = path.stat()
            for name, entry in read_header(path).items():
                if not blocks or entry.end - blocks[-1].places[0].begin > _BLOCK:
                    blocks.append(_Block(path, [], threading.Event()))
                blocks[-1].places.append(_Place(entry.begin, entry.end, name))
        return blocks

    def _read(self, blocks: "list[_Block]", check: ManifestCheck) -> None:
        for block in blocks:
            # Ignore errors here. `take` then returns None, and its caller reads the file in the usual way.
            with contextlib.suppress(Exception):
                first = block.places[0].begin
                content = _bytes_of(block.path, first, block.size)
                for begin, end, name in block.places:
                    if begin < end and (begin - first) % _LINE == 0:
                        self._contents[block.path, name] = content[begin - first : end - first]
            block.done.set()
        check.start()  # not earlier: reading and the import of torch already keep two cores busy


class _Place(NamedTuple):
    """The place of a tensor in its file: the bytes `begin` ... `end` - 1."""

    begin: int
    end: int
    name: str


class _Block(NamedTuple):
    """Tensors that are neighbours in a file, and are read together."""

    path: Path
    places: list[_Place]
    done: threading.Event

    @property
    def size(self) -> int:
        """Number of bytes from the beginning of the first tensor to the end of the last tensor."""
        return self.places[-1].end - self.places[0].begin


def _bytes_of(path: Path, begin: int, size: int) -> memoryview:
    """Read `size` bytes of a file, from `begin` on, into ordinary pages of memory.

    Reading into large pages takes longer on some machines.
    """
    memory, content = new_memory(size)
    filled = 0
    with open_regular(path) as file:
        while filled < size:
            count = os.preadv(file.fileno(), [content[filled : filled + _PIECE]], begin + filled)
            if not count:
                raise EOFError(f"{path} ends early")
            filled += count
    ask_for_large_pages(memory)  # Linux may later merge small pages into large pages
    return content


def _version(state: os.stat_result) -> tuple[int, ...]:
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns
