"""Copies of weights in large pages of memory, which the processor reads faster.

    pages = LargePages()          # the same object for all weights of a model
    weight = pages.copied(tensor)

A decoding step reads every weight once. The processor must look up the physical address of each page. With
pages of 4 KiB this happens after every 64 cache lines; with pages of 2 MiB it is rare. With large pages,
GPT-2 with 124M parameters generates a fifth faster in float32, and two fifths faster in int8 (LOG.md).

A matrix rarely fills whole pages of 2 MiB, so several matrices share one block of memory. If the system has
no large pages, the memory has ordinary pages.
"""

import contextlib
import ctypes
import mmap
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["LargePages", "ask_for_large_pages", "new_memory"]

PAGE = 2**21  # bytes of a large page
_BLOCK = 2**24  # bytes of a block of memory, which holds several copies; a larger tensor has a larger block
_ALIGNED = 256  # the address of each copy is a multiple of this number


def new_memory(size: int) -> tuple[mmap.mmap, memoryview]:
    """Return new memory, and a view of `size` bytes in it. The view's address is a multiple of PAGE."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, -(-size // PAGE) * PAGE + PAGE, **private)
    begin = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % PAGE
    return memory, memoryview(memory)[begin : begin + size]


def ask_for_large_pages(memory: mmap.mmap) -> None:
    """Ask Linux for large pages (madvise). Later, Linux may also merge small pages in use into large ones."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # the kernel may not support large pages
            memory.madvise(mmap.MADV_HUGEPAGE)


class LargePages:
    """Copies tensors into large pages, several tensors into one block. Threads may share a LargePages."""

    def __init__(self) -> None:
        self._free: list[memoryview] = []  # the unused end of each block
        self._lock = threading.Lock()

    def copied(
        self, tensor: "torch.Tensor", dtype: "torch.dtype | None" = None, *, own: bool = False
    ) -> "torch.Tensor":
        """Return a contiguous copy of a tensor on its device. On the CPU, the copy is in large pages.

        Exception: with own=True and an unchanged dtype, nothing is copied to large pages: the result is a
        contiguous tensor in the memory of `tensor`.

        Args:
            tensor: the tensor.
            dtype: dtype of the copy. None: the dtype of the tensor.
            own: True: the caller does not need the tensor any more, so its memory may be reused.
        """
        import torch  # imported here, because read_ahead.py needs this module before torch is imported

        dtype = dtype or tensor.dtype
        if own and dtype == tensor.dtype:
            if tensor.is_contiguous():
                return tensor
            ordered = tensor.contiguous()
            return tensor.as_strided(tensor.shape, ordered.stride()).copy_(ordered)
        if tensor.device.type != "cpu":
            return tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
        memory = self._allocate(tensor.numel() * dtype.itemsize)
        copy = torch.frombuffer(memory, dtype=dtype) if memory.nbytes else torch.empty(0, dtype=dtype)
        return copy.view(tensor.shape).copy_(tensor)

    def _allocate(self, size: int) -> memoryview:
        rounded = -(-size // _ALIGNED) * _ALIGNED
        with self._lock:
            for place, free in enumerate(self._free):
                if free.nbytes >= rounded:
                    self._free[place] = free[rounded:]
                    return free[:size]
            memory, block = new_memory(max(rounded, _BLOCK))
            ask_for_large_pages(memory)
            self._free.append(block[rounded:])
            return block[:size]
