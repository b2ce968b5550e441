"""Copies of weights in memory of large pages, side by side.

    pages = LargePages()          # one for all weights of a model
    weight = pages.copied(tensor)

A decoding step reads every weight once. In pages of 4 KiB the processor looks up an address every 64 lines
of its cache; in pages of 2 MiB hardly ever, and a new copy is made of fewer pages, too. Where the system has
none, the copy is an ordinary one. Few matrices are a whole number of such pages long: so they share blocks.
"""

import threading

import torch
from torch import Tensor

from minigpt.storage.read_ahead import large_block

__all__ = ["LargePages"]

_BLOCK = 2**24  # bytes; lives as long as a tensor in it
_ALIGNED = 256  # bytes that a tensor begins at a multiple of


class LargePages:
    """Memory for copies; several threads may ask. No tensor's storage has its neighbours in it."""

    def __init__(self) -> None:
        self._rests: list[memoryview] = []  # what is free of each block
        self._lock = threading.Lock()

    def copied(self, tensor: Tensor, dtype: torch.dtype | None = None, *, own: bool = False) -> Tensor:
        """A contiguous copy on the same device, of another dtype where one is given.

        Args:
            own: nobody else has the tensor's numbers: where the dtype stays, they are put in order in their
                place, whatever its pages are; which keeps the block that they lie in.
        """
        dtype = dtype or tensor.dtype
        if own and dtype == tensor.dtype:
            if tensor.is_contiguous():
                return tensor
            ordered = tensor.contiguous()
            return tensor.as_strided(tensor.shape, ordered.stride()).copy_(ordered)
        if tensor.device.type != "cpu":
            return tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
        room = self._room(tensor.numel() * dtype.itemsize)
        copy = torch.frombuffer(room, dtype=dtype) if room.nbytes else torch.empty(0, dtype=dtype)
        return copy.view(tensor.shape).copy_(tensor)

    def _room(self, size: int) -> memoryview:
        taken = -(-size // _ALIGNED) * _ALIGNED
        with self._lock:
            for place, rest in enumerate(self._rests):
                if rest.nbytes >= taken:
                    self._rests[place] = rest[taken:]
                    return rest[:size]
            block = large_block(max(taken, _BLOCK))
            self._rests.append(block[taken:])
            return block[:size]
