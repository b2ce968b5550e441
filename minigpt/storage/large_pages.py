"""Memory in large pages, and copies of weights in it, side by side.

    pages = LargePages()          # one for all weights of a model
    weight = pages.copied(tensor)

A decoding step reads every weight once. In pages of 4 KiB the processor looks up an address every 64 cache
lines; in pages of 2 MiB hardly ever. GPT-2's 124M decodes a fifth faster in float32 from large pages, and two
fifths in int8 (LOG.md). Few matrices are a whole number of such pages long: so they share blocks. Where the
system has no large pages, the memory is ordinary.
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
_BLOCK = 2**24  # bytes; a block lives as long as a tensor in it
_ALIGNED = 256  # each copy begins at a multiple of this many bytes


def new_memory(size: int) -> tuple[mmap.mmap, memoryview]:
    """New memory, and `size` bytes of it that begin where a large page may; freed with its last user."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, -(-size // PAGE) * PAGE + PAGE, **private)
    begin = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % PAGE
    return memory, memoryview(memory)[begin : begin + size]


def ask_for_large_pages(memory: mmap.mmap) -> None:
    """Ask Linux for large pages, madvise(2): now if the memory is not written yet, else when it has time."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)


class LargePages:
    """Memory for copies. Several threads may use it; no tensor's storage contains its neighbours."""

    def __init__(self) -> None:
        self._free: list[memoryview] = []  # the end of each block
        self._lock = threading.Lock()

    def copied(
        self, tensor: "torch.Tensor", dtype: "torch.dtype | None" = None, *, own: bool = False
    ) -> "torch.Tensor":
        """A contiguous copy on the same device, of another dtype where one is given.

        Args:
            own: the caller alone has this tensor. Where the dtype stays, its values are put in order in
                their place and not copied.
        """
        import torch  # here: .read_ahead uses this module while torch is being imported

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
