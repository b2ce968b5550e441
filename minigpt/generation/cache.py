"""Keeps keys and values of the tokens that the model has read, so that a step computes new tokens only.

    cache = KeyValueCache(model.config, slots=8, max_length=256)
    slot = cache.allocate()
    model(ids, past_key_values=cache.view([slot]))      # ids (1, T); adds T tokens to the slot

A `KeyValueCache` allocates its memory once, for a fixed number of slots. Each sequence gets a slot, and gives
it back at the end. A slot has columns: the first column is for the keys and values of the first token, and so
on. The PyTorch model uses some slots through a `CacheView`, which is its `past_key_values`. The C code uses
the cache without a view: it gets the slot and the column of each token.

Letters in shapes: L layers, n rows, H heads, S columns, T tokens that are added, D channels of one head.
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
    """Return the size in bytes of the keys and values of `slots` sequences of `columns` tokens each.

    Args:
        layers: number of layers; 0: all layers of the model.
    """
    numbers = slots * config.num_key_value_heads * columns * config.head_dim
    return 2 * (layers or config.num_hidden_layers) * numbers * dtype.itemsize


class KeyValueCache:
    """Preallocated memory for keys and values, divided into slots, one for each sequence.

    Args:
        config: the model's configuration.
        slots: largest number of sequences at the same time.
        max_length: largest number of tokens of a sequence.
        max_cache_mib: largest number of MiB (2**20 bytes) that the cache may take; None: no limit.
        keeps: True: each layer has its own memory. False: all layers share the memory of one layer, which is
            enough if each step reads all tokens of a sequence again.

    Attributes:
        lengths: number of tokens that each slot holds.

    Raises:
        InputError: if the cache needs more than max_cache_mib; nothing is allocated then.
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
        """Number of tokens that a slot can hold."""
        return self._keys.shape[3]

    @property
    def slots(self) -> int:
        """Number of slots, allocated or not."""
        return len(self.lengths)

    @property
    def n_free(self) -> int:
        """Number of free slots."""
        return len(self._free)

    @property
    def bytes(self) -> int:
        """Size of the allocated memory in bytes."""
        return self._keys.nbytes + self._values.nbytes

    def allocate(self) -> int:
        """Take the free slot with the lowest index, and return this index. The slot then holds no tokens.

        Low indices are best, because a CUDA graph computes all slots up to the highest used index.
        """
        slot = min(self._free)
        self._free.remove(slot)
        self.lengths[slot] = 0
        return slot

    def free(self, slot: int) -> None:
        """Mark a slot as free, after its sequence has ended."""
        assert slot not in self._free, "a slot is freed once"
        self._free.append(slot)

    def clear(self, slot: int) -> None:
        """Set a slot's keys and values to 0.

        A NaN in the slot would harm the slot's next sequence: attention multiplies values of masked columns
        by 0, and 0 * NaN is NaN.
        """
        self._keys[:, slot] = self._values[:, slot] = 0

    def length(self, slot: int) -> int:
        """Return the number of tokens that a slot holds."""
        return self.lengths[slot]

    def reserve(self, slot: int, tokens: int) -> int:
        """Check that `tokens` more tokens fit into a slot, and return the first new token's column.

        Raises:
            InputError: if the tokens do not fit.
        """
        start = self.lengths[slot]
        if start + tokens > self.max_length:
            raise InputError(
                f"the cache has room for {self.max_length} tokens: got {start} + {tokens} = {start + tokens}"
            )
        return start

    def advance(self, slot: int, tokens: int) -> None:
        """Add `tokens` to a slot's number of tokens. Call this after all layers have written these tokens."""
        self.lengths[slot] += tokens

    def truncate(self, slot: int, length: int) -> None:
        """Keep only the first `length` tokens of a slot. New tokens overwrite the dropped tokens."""
        if not 0 <= length <= self.lengths[slot]:
            raise InputError(f"the slot holds {self.lengths[slot]} tokens: cannot keep {length}")
        self.lengths[slot] = length

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy the tokens of `sources` (n slots) to `targets` (n slots). A slot may be in both lists."""
        moved = [(a, b) for a, b in zip(sources, targets) if a != b]
        if not moved:
            return
        S = max(self.lengths[source] for source, _ in moved)
        places = torch.tensor(moved, device=self._keys.device).unbind(1)
        # indexing on the right side copies all sources before a target is written, so slots can be exchanged
        for tensor in (self._keys, self._values):
            tensor[:, places[1], :, :S] = tensor[:, places[0], :, :S]
        lengths = [self.lengths[source] for source, _ in moved]
        for (_, target), length in zip(moved, lengths):
            self.lengths[target] = length

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the whole memory of a layer, keys and values, (slots, H, S_max, D) each."""
        return self._keys[layer % self._layers], self._values[layer % self._layers]

    def columns(self, slot: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Return views of a slot's keys and values in columns start ... end - 1, (L, H, end - start, D)."""
        return self._keys[:, slot, :, start:end], self._values[:, slot, :, start:end]

    def view(self, slots: Sequence[int], counts: Sequence[int] | None = None) -> "CacheView":
        """Return a view for past_key_values. `counts`: number of new tokens per slot; None: 1 per slot."""
        return CacheView(self, slots, [1] * len(slots) if counts is None else counts)


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return memory full of zeros. Attention multiplies masked columns by 0, so they must not hold NaN."""
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    # np.zeros writes nothing: the operating system zeroes each page of new memory at its first use.
    # torch.zeros would write all memory now.
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return torch.from_numpy(memory[start : start + size]).view(dtype).view(shape)


class CacheView:
    """Shows some slots to the model as past_key_values. The model adds `counts[i]` tokens to `slots[i]`.

    There are two cases:

    - All slots hold equally many tokens. Then each slot may get several new tokens, padded on the right.
    - The slots hold different numbers of tokens. Then each slot gets exactly one new token, and `mask` hides
      the columns in which a shorter slot has no token. `update` writes each new token twice: to the slot's
      next free column, where it stays, and to the last column, where the model expects new tokens. `mask`
      hides the first of the two, so that attention sees the token only once.

    Adjacent slots are read in place, other slots are copied.

    Attributes:
        length: number of tokens S in the longest slot, before the new tokens.
        mask: (n, S + 1), True where attention may read. None if all slots hold equally many tokens.
        positions: (n, 1), position of each new token. None if all slots hold equally many tokens.
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
            # (2, n): slot and first new column of each row of the batch
            self._rows = torch.tensor([slots, starts], device=device)
            self.positions = self._rows[1][:, None]
            # (n, S + 1)  True: the column holds an earlier token of the row, or is the last column
            held = torch.arange(self.length + 1, device=device) < self.positions
            held[:, -1] = True
            self.mask = held

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add k and v (n, H, T, D) to a layer. Return the layer's keys and values, (n, H, S + T, D) each."""
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
        """Add counts[i] to the length of slots[i]. The model calls this after all layers.

        Args:
            tokens: number of new tokens with padding, which is the largest of `counts`.
        """
        assert tokens == max(self._counts), "as many as were reserved"
        for slot, count in zip(self._slots, self._counts):
            self._cache.advance(slot, count)
