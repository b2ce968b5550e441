"""Keys and values in int8: about a quarter of float32's memory, for about two more digits of rounding.

    GenerationOptions(cache_implementation="quantized")

Each head's key of each token is stored as D whole numbers from -127 to 127 times one scale, and so is its
value. So one token's outlier costs no other token precision, and nothing need be known beforehand. What
attention reads is multiplied out, one layer at a time: this saves memory, not time. PyTorch only, not C.
`QuantizedSlotCache` is the same for the rows of an engine, which come and go.

Letters in shapes: L layers, B rows, H heads, S tokens held, T tokens now added, D channels of one head.
"""

import torch
from torch import Tensor

from minigpt.families.registry import ModelConfig
from minigpt.generation.cache import KeyValueCache, cache_bytes
from minigpt.generation.slot_cache import Place, SlotCache

__all__ = ["QuantizedCache", "QuantizedSlotCache", "quantized_bytes"]


def quantized_bytes(config: ModelConfig, rows: int, columns: int) -> int:
    """Memory that a QuantizedCache takes, in bytes: D numbers of one byte and a scale of four."""
    whole = cache_bytes(config, rows, columns, torch.int8)
    return whole + 4 * whole // config.head_dim


class QuantizedCache(KeyValueCache):
    """As KeyValueCache, with rounded contents. Each value is off by at most max|its head's vector| / 254."""

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(config, batch_size, max_length, device, torch.int8)
        shape = (*self._keys.shape[:-1], 1)  # (L, B, H, T_max, 1)
        self._dtype = dtype
        self._key_scales, self._value_scales = torch.empty((2, *shape), device=device).unbind(0)
        self._tensors = (*self._tensors, self._key_scales, self._value_scales)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, H, T, D) to a layer; returns all that it holds, multiplied out.

        Raises:
            InputError: as KeyValueCache.update.
        """
        whole_k, scale_k = _rounded(k)
        whole_v, scale_v = _rounded(v)
        held_k, held_v = super().update(layer, whole_k, whole_v)
        S, T = self._length, k.shape[2]
        found = []
        for held, scales, new in (
            (held_k, self._key_scales, scale_k), (held_v, self._value_scales, scale_v)
        ):  # fmt: skip
            scales[layer, : self._rows, :, S : S + T] = new
            found.append((held * scales[layer, : self._rows, :, : S + T]).to(self._dtype))
        return found[0], found[1]


class QuantizedSlotCache(SlotCache):
    """As SlotCache, with rounded contents."""

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_cache_mib: float | None = None,
    ) -> None:
        super().__init__(config, slots, max_length, device, torch.int8, max_cache_mib)
        shape = (*self._keys.shape[:-1], 1)  # (L, slots, H, S_max, 1)
        self._dtype = dtype
        self._key_scales, self._value_scales = torch.empty((2, *shape), device=device).unbind(0)
        self._tensors = (*self._tensors, self._key_scales, self._value_scales)

    @staticmethod
    def _bytes(config: ModelConfig, slots: int, max_length: int, dtype: torch.dtype) -> int:
        return quantized_bytes(config, slots, max_length)

    def put(self, layer: int, where: Place, k: Tensor, v: Tensor) -> None:
        """Write keys and values to a place, rounded."""
        self._keys[layer][where], self._key_scales[layer][where] = _rounded(k)
        self._values[layer][where], self._value_scales[layer][where] = _rounded(v)

    def get(self, layer: int, where: Place) -> tuple[Tensor, Tensor]:
        """Keys and values of a place, multiplied out."""
        keys = self._keys[layer][where] * self._key_scales[layer][where]
        values = self._values[layer][where] * self._value_scales[layer][where]
        return keys.to(self._dtype), values.to(self._dtype)


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., D) -> int8 (..., D) and scales (..., 1), float32, whose product it is about."""
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True) / 127  # NaN stays NaN here, and shows in what is read
    steps = x / scale.clamp(min=torch.finfo(torch.float32).tiny)
    return steps.nan_to_num().round().clamp(-127, 127).to(torch.int8), scale
