"""Weights in fewer bits for a GPU: bfloat16, int8 or int4, multiplied by activations that stay as they are.

    model = stored_as(model, "int4")     # in place; what a CPU has for itself is minigpt.weights.quantized's

At batch 1 a GPU, too, waits for memory: half the bytes, nearly half the time. But it has arithmetic to spare,
so the activations are not rounded to int8, as minigpt.weights.quantized does on a CPU: all else is bfloat16. int8's
whole numbers are the same in both; what comes out is not, quite.

int8: a scale for each output. PyTorch multiplies the weights out before each product, unless torch.compile
joins both (StaticStep's `compiled`): without it int8 saves memory, not time.
int4: a scale and an offset for each GROUP of neighbours; the head, which chooses the token, stays int8. On
CUDA torch's own kernel reads it (tinygemm); elsewhere it is multiplied out, which shows what it costs in
quality, at no speed.

None of this has been timed yet. torchao was looked at, and is not needed: its int4 kernels want a further
package, its int8 is the product that stands here.

Letters in shapes: N outputs, K inputs, G groups of a row.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel
from minigpt.weights.quantized import (
    Precision,
    QuantizedLinear,
    at_precision,
    precision_of,
    quantize,
    rounded_rows,
)

__all__ = [
    "ANY_PRECISION",
    "GROUP",
    "AnyPrecision",
    "Int4Linear",
    "Int8Linear",
    "rounded_to_int4",
    "stored_as",
    "stored_precision",
    "to_int4",
]

AnyPrecision = Literal["float32", "float16", "bfloat16", "int8", "int4"]
ANY_PRECISION: tuple[AnyPrecision, ...] = ("float32", "float16", "bfloat16", "int8", "int4")
_NARROW: dict[torch.dtype, Precision] = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
GROUP = 64  # neighbours of a row that share a scale and an offset; one that the kernel knows


class Int8Linear(nn.Module):
    """An nn.Linear with int8 weights (N, K) and one scale (N,) for each output."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.weight: Tensor
        self.scale: Tensor
        self.bias: Tensor | None

    @classmethod
    def of(cls, linear: nn.Linear | QuantizedLinear) -> "Int8Linear":
        """Round a linear layer, or take the whole numbers of one that is rounded."""
        if isinstance(linear, QuantizedLinear):
            assert linear.scale is not None, "float16 has no whole numbers"
            return cls(linear.weight, linear.scale, linear.bias)
        weight, scale = rounded_rows(linear.weight.detach().float())
        return cls(weight, scale, None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), in the dtype of x."""
        # Whole numbers up to 127 are exact in bfloat16; the scale comes last, on N numbers instead of N * K.
        out = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return (out if self.bias is None else out + self.bias).to(x.dtype)


def rounded_to_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float (N, K) -> whole numbers 0 to 15 as uint8 (N, K), and (G, N, 2) bfloat16: scale and offset.

    A weight is about (number - 8) * scale + offset. K is a multiple of GROUP.
    """
    N, K = weight.shape
    groups = weight.float().view(N, K // GROUP, GROUP)  # (N, G, GROUP)
    least, most = groups.amin(dim=-1), groups.amax(dim=-1)  # (N, G) each
    scale = ((most - least) / 15).clamp(min=torch.finfo(torch.float32).tiny).bfloat16().float()
    offset = (least + 8 * scale).bfloat16().float()
    numbers = ((groups - offset[..., None]) / scale[..., None]).round() + 8
    numbers = numbers.nan_to_num().clamp(0, 15).to(torch.uint8).view(N, K)
    return numbers, torch.stack([scale.t(), offset.t()], dim=-1).bfloat16().contiguous()


class Int4Linear(nn.Module):
    """An nn.Linear with weights of 4 bits, two in a byte.

    Args:
        numbers: (N, K) as from rounded_to_int4, K a multiple of GROUP.
        scales: (G, N, 2).
        bias: (N,) or None.
        in_features: what of K is no padding.
    """

    def __init__(self, numbers: Tensor, scales: Tensor, bias: Tensor | None, in_features: int) -> None:
        super().__init__()
        self.out_features, self.in_features = len(numbers), in_features
        self.register_buffer("weight", numbers[:, ::2] << 4 | numbers[:, 1::2])  # (N, K / 2)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)
        self.weight: Tensor
        self.scales: Tensor
        self.bias: Tensor | None
        self.uses_kernel = False
        self._order()

    def _order(self) -> None:
        """On CUDA, put the weights in the kernel's order, for good.

        It takes outputs by eights, and inputs by the 16 of a tile times 2, 4 or 8: any multiple of 64 is one
        of 4 tiles.
        """
        if self.weight.is_cuda and not self.uses_kernel and not self.out_features % 8:
            self.weight = torch._convert_weight_to_int4pack(self.weight, 4)
            self.uses_kernel = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int4Linear":
        # what `to` and `cuda` do with every module
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._order()
        return self

    @classmethod
    def of(cls, linear: nn.Linear) -> "Int4Linear":
        """Round a linear layer; its inputs are padded to whole groups."""
        weight = linear.weight.detach()
        numbers, scales = rounded_to_int4(F.pad(weight, (0, -weight.shape[1] % GROUP)))
        return cls(numbers, scales, None if linear.bias is None else linear.bias.detach(), weight.shape[1])

    def dequantized(self) -> Tensor:
        """The weights (N, K) that the stored ones stand for, bfloat16, padding included."""
        assert not self.uses_kernel, "in the kernel's order"
        numbers = torch.stack([self.weight >> 4, self.weight & 15], dim=-1)  # (N, K / 2, 2)
        groups = numbers.view(self.out_features, -1, GROUP).to(self.scales.dtype) - 8  # (N, G, GROUP)
        scale, offset = self.scales.permute(2, 1, 0)[..., None]  # (N, G, 1) each
        whole: Tensor = (groups * scale + offset).flatten(1)  # (N, K)
        return whole

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), in the dtype of x; bfloat16 where the kernel reads."""
        x = F.pad(x, (0, -self.in_features % GROUP))
        out: Tensor
        if self.uses_kernel:
            rows = x.reshape(-1, x.shape[-1])
            out = torch._weight_int4pack_mm(rows, self.weight, GROUP, self.scales)
            out = out.view(*x.shape[:-1], self.out_features)
        else:
            out = F.linear(x, self.dequantized().to(x.dtype))
        return out if self.bias is None else (out + self.bias).to(x.dtype)


def stored_as(model: LanguageModel, precision: AnyPrecision | None) -> LanguageModel:
    """The model with its weights stored so, in place, in eval mode. None: as they are.

    On a CPU all but int4 are minigpt.weights.quantized's: there 16 bits are what weights are stored in, and float32
    what is computed in. On CUDA an int8 model gets bfloat16 activations, whether it was stored in int8 or
    becomes so now.

    Raises:
        InputError: for an unknown precision; if the weights are rounded already, and otherwise.
    """
    if precision is not None and precision not in ANY_PRECISION:
        raise InputError(f"precision must be one of {', '.join(ANY_PRECISION)}: got {precision!r}")
    if any(isinstance(module, Int8Linear | Int4Linear) for module in model.modules()):
        already = stored_precision(model)
        if precision in (None, already):
            return model
        raise InputError(f"the model is stored in {already}: take its unquantised folder for {precision}")
    there, first = precision_of(model), next(model.parameters())
    on_cpu = first.device.type == "cpu"
    narrow = _NARROW.get(first.dtype)
    if narrow and (precision == "float32" or (on_cpu and precision != "int4")):
        return quantize(model, precision or narrow)
    is_rounded = (precision or there) == "int8" and first.device.type == "cuda"
    if not is_rounded and (precision in (None, "float32", "int8") or (precision != "int4" and on_cpu)):
        return at_precision(model, precision)
    if there not in ("float32", precision or there):
        raise InputError(f"the model is stored in {there}: take its unquantised folder for {precision}")
    if is_rounded:
        _replace(model, Int8Linear.of)
    elif precision == "int4":
        return to_int4(model)
    dtype = torch.float16 if precision == "float16" else torch.bfloat16
    return _rest_in(dtype, model)


def to_int4(model: LanguageModel) -> LanguageModel:
    """The model with int4 weights, in place, in eval mode. Works on "meta", too: shapes without values."""
    head = model.lm_head
    _replace(model, lambda layer: Int8Linear.of(layer) if layer is head else Int4Linear.of(layer))
    return _rest_in(torch.bfloat16, model)


def stored_precision(model: LanguageModel) -> AnyPrecision:
    """What the weights of a model's products are stored in, for a CPU or for a GPU."""
    kinds = {type(module) for module in model.modules()}
    return "int4" if Int4Linear in kinds else "int8" if Int8Linear in kinds else precision_of(model)


def _rest_in(dtype: torch.dtype, model: LanguageModel) -> LanguageModel:
    for parameter in model.parameters():  # not buffers: scales stay exact
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def _replace(model: LanguageModel, make: Callable[[Any], nn.Module]) -> None:
    """Put what `make` makes of a product in its place, everywhere."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear | QuantizedLinear):
                setattr(module, name, make(child))
