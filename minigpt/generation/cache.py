"""Keys and values of the tokens read so far, so that each new token costs one position, not all of them.

One `KeyValueCache` serves one batch. Its memory is taken once, for the longest sequence that the batch can
reach; rows that have finished are dropped with `select`, so that the batch shrinks. It computes nothing: the
model's attention (minigpt.model) writes into it and reads the result.

Letters in shapes: L layers, B rows, H heads, S tokens held, T tokens now added, D channels of one head.
"""

import torch
from torch import Tensor

from minigpt.errors import InputError
from minigpt.families.registry import ModelConfig

__all__ = ["KeyValueCache", "cache_bytes", "check_memory"]

MIB = 2**20


def cache_bytes(config: ModelConfig, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> int:
    """Memory that keys and values of rows * columns tokens take, in bytes."""
    numbers = config.num_hidden_layers * rows * config.num_key_value_heads * columns * config.head_dim
    return 2 * numbers * dtype.itemsize


def check_memory(needed: int, max_cache_mib: float | None, what: str) -> None:
    """Refuse a cache that is larger than the caller allows, before anything is taken.

    Args:
        needed: bytes.
        max_cache_mib: MiB (2**20 bytes); None: no limit.
        what: names the cache's sizes, for the message.

    Raises:
        InputError: with both numbers.
    """
    if max_cache_mib is not None and needed > max_cache_mib * MIB:
        raise InputError(
            f"max_cache_mib={max_cache_mib:g} is too little: {what} takes {needed / MIB:.2f} MiB of keys and "
            "values; allow more, or fewer rows or tokens"
        )


class KeyValueCache:
    """Preallocated keys and values of a batch: what `past_key_values` of the model asks for.

    Args:
        config: the model's sizes.
        batch_size: rows.
        max_length: tokens of a row, padding included, that there is room for.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        heads, channels = config.num_key_value_heads, config.head_dim
        shape = (config.num_hidden_layers, batch_size, heads, max_length, channels)  # (L, B, H, T_max, D)
        # Not zeroed: what was not written is never read, and the system gives memory only where it is used.
        self._keys = torch.empty(shape, device=device, dtype=dtype)
        self._values = torch.empty(shape, device=device, dtype=dtype)
        self._tensors: tuple[Tensor, ...] = (self._keys, self._values)
        self._rows, self._max_length = batch_size, max_length
        self._length = 0

    @property
    def length(self) -> int:
        """Tokens held, the same number in each row."""
        return self._length

    @property
    def rows(self) -> int:
        """Rows that are still in the batch."""
        return self._rows

    @property
    def max_length(self) -> int:
        """Tokens of a row that there is room for."""
        return self._max_length

    @property
    def bytes(self) -> int:
        """Memory taken, whether it is in use yet or not."""
        return sum(tensor.nbytes for tensor in self._tensors)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, H, T, D) to a layer; returns views of all that it holds, (B, H, S + T, D) each.

        Raises:
            InputError: if the rows are not the cache's, or there is no room for T more tokens.
        """
        S, T = self._length, k.shape[2]
        if k.shape[0] != self._rows:
            raise InputError(f"the cache holds {self._rows} rows: got keys of {k.shape[0]}")
        if self.max_length < S + T:
            raise InputError(f"the cache has room for {self.max_length} tokens: got {S} + {T} = {S + T}")
        self._keys[layer, : self._rows, :, S : S + T] = k
        self._values[layer, : self._rows, :, S : S + T] = v
        return self._keys[layer, : self._rows, :, : S + T], self._values[layer, : self._rows, :, : S + T]

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """The whole memory of a layer's keys and of its values, (B, H, T_max, D) each, used or not."""
        return self._keys[layer], self._values[layer]

    def advance(self, tokens: int) -> None:
        """All layers were updated with `tokens` more: they count from now on."""
        self._length += tokens

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first `length`, in each row: what comes next is written over them."""
        if not 0 <= length <= self._length:
            raise InputError(f"the cache holds {self._length} tokens: cannot keep {length}")
        self._length = length

    def select(self, rows: Tensor) -> None:
        """Keep these rows (n,), in this order; the others' place is free, but not given back.

        Only rows that change their place are copied: who fills the holes from the end, as generation does,
        moves as many rows as were dropped, however many stay.
        """
        places = torch.arange(len(rows), device=rows.device)
        moved = rows != places
        to, source, S = places[moved], rows[moved], self._length
        for tensor in self._tensors:  # the right side is a copy: rows may also change places
            tensor[:, to, :, :S] = tensor[:, source, :, :S]
        self._rows = len(rows)
