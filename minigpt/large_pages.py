"""Copies of weights in memory of large pages, side by side.

    pages = LargePages()          # one for all weights of a model
    weight = pages.copied(tensor)

A decoding step reads every weight once. In pages of 4 KiB the processor looks up an address every 64 lines
of its cache; in pages of 2 MiB hardly ever, and a new copy is made of fewer pages, too. Linux gives them
where it is asked before the memory is first written (madvise(2)); elsewhere, and where it has none left, the
copy is an ordinary one. Few matrices are a whole number of such pages long: so they share blocks of them.
"""

import ctypes
import functools
import sys
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["LargePages"]

_LARGE = 2**21  # bytes
_BLOCK = 8 * _LARGE  # lives as long as a tensor in it
_ALIGNED = 256  # bytes that a tensor begins at a multiple of
_MADV_HUGEPAGE = 14  # of Linux' <sys/mman.h>

_Bytes = npt.NDArray[np.uint8]


class LargePages:
    """Memory for copies; several threads may ask. No tensor's storage has its neighbours in it."""

    def __init__(self) -> None:
        self._rests: list[_Bytes] = []  # what is free of each block
        self._lock = threading.Lock()

    def copied(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous copy on the same device, of another dtype where one is given."""
        dtype = dtype or tensor.dtype
        if tensor.device.type != "cpu":
            return tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
        room = torch.from_numpy(self._room(tensor.numel() * dtype.itemsize))
        return room.view(dtype).view(tensor.shape).copy_(tensor)

    def _room(self, size: int) -> _Bytes:
        taken = -(-size // _ALIGNED) * _ALIGNED
        with self._lock:
            for place, rest in enumerate(self._rests):
                if rest.nbytes >= taken:
                    self._rests[place] = rest[taken:]
                    return rest[:size]
            block = _block(max(taken, _BLOCK))
            self._rests.append(block[taken:])
            return block[:size]


def _block(size: int) -> _Bytes:
    """New memory of whole large pages, at least `size` bytes."""
    size = -(-size // _LARGE) * _LARGE
    memory: _Bytes = np.empty(size + _LARGE, np.uint8)
    begin = -memory.ctypes.data % _LARGE
    block = memory[begin : begin + size]
    if madvise := _madvise():
        madvise(ctypes.c_void_p(block.ctypes.data), ctypes.c_size_t(size), _MADV_HUGEPAGE)  # it may refuse
    return block


@functools.cache
def _madvise() -> Any:
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
