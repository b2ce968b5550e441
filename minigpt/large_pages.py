"""Copies of weights in memory of large pages.

A decoding step reads every weight once. In pages of 4 KiB the processor looks up an address every 64 lines
of its cache; in pages of 2 MiB hardly ever, and a new copy is made of fewer pages, too. Linux gives them
where it is asked before the memory is first written (madvise(2)); elsewhere, and where it has none left, the
copy is an ordinary one.
"""

import ctypes
import functools
import sys
from typing import Any

import torch
from torch import Tensor

__all__ = ["copied"]

_LARGE = 2**21  # bytes
_MADV_HUGEPAGE = 14  # of Linux' <sys/mman.h>


def copied(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous copy on the same device, of another dtype where one is given."""
    copy = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=tensor.device)
    if copy.device.type == "cpu" and copy.nbytes >= 2 * _LARGE and (madvise := _madvise()):
        begin = -(-copy.data_ptr() // _LARGE) * _LARGE  # whole large pages alone
        length = (copy.data_ptr() + copy.nbytes - begin) // _LARGE * _LARGE
        madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), _MADV_HUGEPAGE)  # it may refuse
    return copy.copy_(tensor)


@functools.cache
def _madvise() -> Any:
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
