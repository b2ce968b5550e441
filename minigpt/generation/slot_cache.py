"""Keys and values of rows that come and go, each of its own length: the memory of minigpt.generation.engine.

A `SlotCache` is taken once. A row gets a slot, writes into it from column 0 on, and gives it back. What the
model reads through is one of two views, which have what `past_key_values` must have: `row(slot)`, one row as
if it were alone, without any copy; and `rows(slots)`, several rows of unlike lengths with one new token each,
for which the shorter ones are copied next to the new token and masked. (`NativeStep.ragged` needs neither: C
is told the column of each token.)

Letters in shapes: L layers, n rows, H heads, S columns, T tokens now added, D channels of one head.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from minigpt.errors import InputError
from minigpt.families.registry import ModelConfig
from minigpt.generation.cache import cache_bytes, check_memory

__all__ = ["Place", "SlotCache"]

Place: TypeAlias = tuple[slice | Tensor, slice, slice | Tensor]  # in (slots, H, S_max)


class SlotCache:
    """Preallocated keys and values, slot by slot.

    Args:
        config: the model's sizes.
        slots: rows at once, at most.
        max_length: tokens of a row that there is room for.
        max_cache_mib: refuse to take more; None: no limit.

    Raises:
        InputError: if the memory is more than max_cache_mib.
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_cache_mib: float | None = None,
    ) -> None:
        what = f"a cache of {slots} rows of {max_length} tokens"
        check_memory(self._bytes(config, slots, max_length, dtype), max_cache_mib, what)
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads, max_length, config.head_dim)
        self._keys = torch.empty(shape, device=device, dtype=dtype)  # (L, slots, H, S_max, D)
        self._values = torch.empty(shape, device=device, dtype=dtype)
        self._tensors: tuple[Tensor, ...] = (self._keys, self._values)
        self._lengths = [0] * slots
        self._free = list(range(slots))

    @staticmethod
    def _bytes(config: ModelConfig, slots: int, max_length: int, dtype: torch.dtype) -> int:
        return cache_bytes(config, slots, max_length, dtype)

    @property
    def max_length(self) -> int:
        """Tokens of a row that there is room for."""
        return self._keys.shape[3]

    @property
    def slots(self) -> int:
        """Rows that there is room for."""
        return len(self._lengths)

    @property
    def free(self) -> int:
        """Slots that nobody has."""
        return len(self._free)

    @property
    def bytes(self) -> int:
        """Memory taken, whether it is in use yet or not."""
        return sum(tensor.nbytes for tensor in self._tensors)

    def take(self) -> int:
        """A free slot, empty: the lowest, since a static step computes all up to the last one in use."""
        slot = min(self._free)
        self._free.remove(slot)
        self.empty(slot)
        return slot

    def empty(self, slot: int) -> None:
        """Forget a slot's tokens: what comes next is written over them."""
        self._lengths[slot] = 0

    def give_back(self, slot: int) -> None:
        """The row has ended."""
        assert slot not in self._free, "a slot is given back once"
        self._free.append(slot)

    def length(self, slot: int) -> int:
        """Tokens that a slot holds."""
        return self._lengths[slot]

    def claim(self, slot: int, tokens: int) -> int:
        """The column at which this many tokens will begin.

        Raises:
            InputError: if there is no room for them.
        """
        start = self._lengths[slot]
        if start + tokens > self.max_length:
            raise InputError(
                f"the cache has room for {self.max_length} tokens: got {start} + {tokens} = {start + tokens}"
            )
        return start

    def advance(self, slot: int, tokens: int) -> None:
        """All layers of a slot were written: its tokens count from now on."""
        self._lengths[slot] += tokens

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """The whole memory of a layer's keys and of its values, (slots, H, S_max, D) each, used or not."""
        return self._keys[layer], self._values[layer]

    def columns(self, slot: int, start: int, end: int) -> tuple[Tensor, ...]:
        """Some columns of a slot, of all layers, as views, (L, H, end - start, ...): keys, values, scales."""
        return tuple(tensor[:, slot, :, start:end] for tensor in self._tensors)

    def put(self, layer: int, where: Place, k: Tensor, v: Tensor) -> None:
        """Write keys and values to a place in (slots, H, S_max)."""
        self._keys[layer][where], self._values[layer][where] = k, v

    def get(self, layer: int, where: Place) -> tuple[Tensor, Tensor]:
        """Keys and values of a place in (slots, H, S_max); a view, where it is made of slices."""
        return self._keys[layer][where], self._values[layer][where]

    def row(self, slot: int) -> "_Row":
        """One row, as the model's past_key_values: nothing is padded, masked or copied."""
        return _Row(self, slot)

    def rows(self, slots: Sequence[int]) -> "_Rows":
        """Several rows of unlike lengths, as the model's past_key_values for one new token each."""
        return _Rows(self, slots)


class _Row:
    def __init__(self, cache: SlotCache, slot: int) -> None:
        self._cache, self._slot = cache, slot

    @property
    def length(self) -> int:
        return self._cache.length(self._slot)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        assert len(k) == 1, "one row"
        start = self._cache.claim(self._slot, k.shape[2])
        end, row = start + k.shape[2], slice(self._slot, self._slot + 1)
        self._cache.put(layer, (row, slice(None), slice(start, end)), k, v)
        return self._cache.get(layer, (row, slice(None), slice(end)))  # (1, H, S + T, D)

    def advance(self, tokens: int) -> None:
        self._cache.advance(self._slot, tokens)


class _Rows:
    """Each row's tokens come first, then what it lacks to the longest, masked, then the new token."""

    def __init__(self, cache: SlotCache, slots: Sequence[int]) -> None:
        self._cache, self._slots = cache, slots
        device = cache.layer(0)[0].device
        lengths = [cache.claim(slot, 1) for slot in slots]
        self.length = max(lengths)
        self.positions = torch.tensor(lengths, device=device)[:, None]  # (n, 1)
        self._places = torch.tensor(slots, device=device)  # (n,)
        held = torch.arange(self.length, device=device) < self.positions  # (n, S)
        self.mask: Tensor | None = None  # (n, S + 1)  None: all rows are equally long
        if min(lengths) < self.length:
            self.mask = torch.cat([held, torch.ones_like(self.positions, dtype=torch.bool)], dim=1)
        self._lacking = ~held[:, None, :, None]  # (n, 1, S, 1)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        assert k.shape[2] == 1, "one token of each row"
        now = (self._places, slice(None), self.positions[:, 0])
        self._cache.put(layer, now, k[:, :, 0], v[:, :, 0])
        found = []
        before = self._cache.get(layer, (self._places, slice(None), slice(self.length)))
        for held, new in zip(before, self._cache.get(layer, now)):  # (n, H, S, D) and (n, H, D): copies
            if self.mask is not None:  # weight 0 does not hide what memory may hold there: 0 * NaN is NaN
                held.masked_fill_(self._lacking, 0)
            found.append(torch.cat([held, new[:, :, None]], dim=2))  # (n, H, S + 1, D)
        return found[0], found[1]

    def advance(self, tokens: int) -> None:
        assert tokens == 1, "one token of each row"
        for slot in self._slots:
            self._cache.advance(slot, 1)
