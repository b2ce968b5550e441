"""Keys and values of the tokens read so far, so that each new token costs one position, not all of them.

    cache = KeyValueCache(model.config, slots=8, max_length=256)
    slot = cache.allocate()
    model(ids, past_key_values=cache.view([slot]))      # (1, T): what it computes is added to the slot

A `KeyValueCache` takes its memory once. A sequence allocates a slot, fills it from column 0 on, and frees it.
The model reads and writes through a `CacheView` of some slots, which has what `past_key_values` must have.
(C needs no view: it gets the slot and the column of each token.)

Letters in shapes: L layers, n rows, H heads, S columns, T tokens now added, D channels of one head.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from minigpt.errors import InputError
from minigpt.families.registry import ModelConfig

__all__ = ["MIB", "CacheView", "KeyValueCache", "cache_bytes"]

MIB = 2**20


def cache_bytes(
    config: ModelConfig, slots: int, columns: int, dtype: torch.dtype = torch.float32, layers: int = 0
) -> int:
    """Memory that keys and values of slots * columns tokens take, in bytes; layers=0: of all layers."""
    numbers = slots * config.num_key_value_heads * columns * config.head_dim
    return 2 * (layers or config.num_hidden_layers) * numbers * dtype.itemsize


class KeyValueCache:
    """Preallocated keys and values, slot by slot.

    Args:
        config: the model's sizes.
        slots: sequences at once, at most.
        max_length: tokens of a sequence, at most.
        max_cache_mib: refuse to take more than that many MiB (2**20 bytes); None: no limit.
        keeps: False: the layers share one layer's memory, for sequences that are read anew for each token.

    Attributes:
        lengths: tokens that each slot holds.

    Raises:
        InputError: if the memory is more than max_cache_mib; before it is taken.
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_cache_mib: float | None = None,
        keeps: bool = True,
    ) -> None:
        self._layers = config.num_hidden_layers if keeps else 1
        needed = cache_bytes(config, slots, max_length, dtype, self._layers)
        if max_cache_mib is not None and needed > max_cache_mib * MIB:
            raise InputError(
                f"max_cache_mib={max_cache_mib:g} is too little: a cache of {slots} rows of {max_length} "
                f"tokens takes {needed / MIB:.2f} MiB of keys and values; allow more, or fewer rows or tokens"
            )
        shape = (self._layers, slots, config.num_key_value_heads, max_length, config.head_dim)
        self._keys = _zeros(shape, torch.device(device), dtype)  # (L, slots, H, S_max, D)
        self._values = _zeros(shape, torch.device(device), dtype)
        self.lengths = [0] * slots
        self._free = list(range(slots))

    @property
    def max_length(self) -> int:
        """Tokens that a slot can hold."""
        return self._keys.shape[3]

    @property
    def slots(self) -> int:
        """All slots, allocated or not."""
        return len(self.lengths)

    @property
    def n_free(self) -> int:
        """Slots that no sequence has."""
        return len(self._free)

    @property
    def bytes(self) -> int:
        """Memory taken, in use or not."""
        return self._keys.nbytes + self._values.nbytes

    def allocate(self) -> int:
        """A free slot, empty: the lowest, since a CUDA graph computes all up to the last one in use."""
        slot = min(self._free)
        self._free.remove(slot)
        self.lengths[slot] = 0
        return slot

    def free(self, slot: int) -> None:
        """The sequence of this slot has ended."""
        assert slot not in self._free, "a slot is freed once"
        self._free.append(slot)

    def clear(self, slot: int) -> None:
        """Forget a slot's values, too: a NaN that attention masks is a NaN in its sum all the same."""
        self._keys[:, slot] = self._values[:, slot] = 0

    def length(self, slot: int) -> int:
        """Tokens that a slot holds."""
        return self.lengths[slot]

    def reserve(self, slot: int, tokens: int) -> int:
        """The column at which this many tokens will begin.

        Raises:
            InputError: if they do not fit.
        """
        start = self.lengths[slot]
        if start + tokens > self.max_length:
            raise InputError(
                f"the cache has room for {self.max_length} tokens: got {start} + {tokens} = {start + tokens}"
            )
        return start

    def advance(self, slot: int, tokens: int) -> None:
        """All layers of a slot were written: its new tokens count from now on."""
        self.lengths[slot] += tokens

    def truncate(self, slot: int, length: int) -> None:
        """Forget all tokens of a slot but the first `length`: the next ones overwrite them."""
        if not 0 <= length <= self.lengths[slot]:
            raise InputError(f"the slot holds {self.lengths[slot]} tokens: cannot keep {length}")
        self.lengths[slot] = length

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy the tokens of slots (n,) to others, which may be among the sources."""
        moved = [(a, b) for a, b in zip(sources, targets) if a != b]
        if not moved:
            return
        S = max(self.lengths[source] for source, _ in moved)
        places = torch.tensor(moved, device=self._keys.device).unbind(1)
        for tensor in (self._keys, self._values):  # the right side is a copy: slots may change places
            tensor[:, places[1], :, :S] = tensor[:, places[0], :, :S]
        lengths = [self.lengths[source] for source, _ in moved]
        for (_, target), length in zip(moved, lengths):
            self.lengths[target] = length

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """The whole memory of a layer's keys and of its values, (slots, H, S_max, D) each, used or not."""
        return self._keys[layer % self._layers], self._values[layer % self._layers]

    def columns(self, slot: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Some columns of a slot, keys and values of all layers, as views, (L, H, end - start, D) each."""
        return self._keys[:, slot, :, start:end], self._values[:, slot, :, start:end]

    def view(self, slots: Sequence[int], counts: Sequence[int] | None = None) -> "CacheView":
        """These slots as the model's past_key_values; see CacheView."""
        return CacheView(self, slots, [1] * len(slots) if counts is None else counts)


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zeros: what is masked must be a number, as 0 * NaN is NaN."""
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    # The system zeroes a page of calloc's memory when it is first used; torch.zeros would write all at once.
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return torch.from_numpy(memory[start : start + size]).view(dtype).view(shape)


class CacheView:
    """Slots whose next tokens the model reads: `counts` tokens of each, padded on the right to the longest.

    Slots of unlike lengths take one token each. A shorter slot's columns up to the longest are masked. The
    model looks for the new token in the last column, so it is written there, too; the next tokens of the slot
    overwrite it. Slots side by side are read in place, others are copied.

    Attributes:
        length: tokens held, of the longest slot.
        mask: (n, S + 1), True: a token. None where all slots are equally long.
        positions: (n, 1), each new token's position. None as above.
    """

    def __init__(self, cache: KeyValueCache, slots: Sequence[int], counts: Sequence[int]) -> None:
        self._cache, self._slots, self._counts = cache, slots, counts
        starts = [cache.reserve(slot, count) for slot, count in zip(slots, counts)]
        self.length = max(starts)
        device = cache.layer(0)[0].device
        low, high = slots[0], slots[0] + len(slots)
        side_by_side = list(slots) == list(range(low, high))
        self._index: slice | Tensor = slice(low, high) if side_by_side else torch.tensor(slots, device=device)
        self.mask: Tensor | None = None
        self.positions: Tensor | None = None
        if min(starts) < self.length:
            assert max(counts) == 1, "slots of unlike lengths take one token each"
            self._rows = torch.tensor([slots, starts], device=device)  # (2, n)
            self.positions = self._rows[1][:, None]
            held = torch.arange(self.length + 1, device=device) < self.positions  # (n, S + 1)
            held[:, -1] = True
            self.mask = held

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add k and v (n, H, T, D) to a layer; returns all that it holds, (n, H, S + T, D) each."""
        S, T = self.length, k.shape[2]
        found = []
        for held, new in zip(self._cache.layer(layer), (k, v)):
            if self.mask is None:
                held[self._index, :, S : S + T] = new
                found.append(held[self._index, :, : S + T])
            else:
                held[self._rows[0], :, self._rows[1]] = new[:, :, 0]
                visible = held[self._index, :, : S + 1]
                visible[:, :, S] = new[:, :, 0]
                found.append(visible)
        return found[0], found[1]

    def advance(self, tokens: int) -> None:
        """All layers were updated: the new tokens count from now on."""
        assert tokens == max(self._counts), "as many as were reserved"
        for slot, count in zip(self._slots, self._counts):
            self._cache.advance(slot, count)
