"""Weights in fewer bits, for decoding on a CPU, which waits for memory: 16 or 8 instead of float32's 32.

    quantize(model, "int8")     # in place: the weights of every product; the embedding and norms stay

int8: each row of a matrix (one output channel) is stored as whole numbers from -127 to 127 times one scale.
The input is rounded in the same way, with a scale for each 128 neighbours of a token, so that one large value
costs only its neighbours precision, and no token depends on another. float16, bfloat16: rounded weights
alone, all else is float32; a model that was published so loses nothing.

Here this is arithmetic on floats, the slow twin; `minigpt.generation.native` multiplies the whole numbers.
Training a quantised model is not possible.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel
from minigpt.storage.large_pages import LargePages

__all__ = [
    "GROUP",
    "PRECISIONS",
    "NarrowEmbedding",
    "Precision",
    "QuantizedLinear",
    "at_precision",
    "precision_of",
    "quantize",
    "quantized_modules",
    "rounded_groups",
    "rounded_rows",
]

Precision = Literal["float32", "float16", "bfloat16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "bfloat16", "int8")
_DTYPES: dict[Precision, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
GROUP = 128  # neighbours of an input that share a scale; as in inference/products.h


def rounded_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 (N, K) and scales (N,) with weight about int8 * scale: off by at most half a scale.

    The largest value of a row becomes 127 or -127; -128 is not used, which keeps sums of two products within
    16 bits for the fastest instructions of older CPUs.
    """
    scale = weight.abs().amax(dim=1) / 127  # (N,)
    steps = weight / scale.clamp(min=torch.finfo(scale.dtype).tiny)[:, None]
    return steps.round().clamp(-127, 127).to(torch.int8), scale


def rounded_groups(x: Tensor) -> Tensor:
    """(..., K) -> the same shape: each GROUP of neighbours rounded to 255 steps from -max to max."""
    K = x.shape[-1]
    groups = F.pad(x, (0, -K % GROUP)).reshape(*x.shape[:-1], -1, GROUP)  # (..., K / GROUP, GROUP)
    largest = groups.abs().amax(dim=-1, keepdim=True)  # (..., K / GROUP, 1)
    steps = (groups * (127 / largest).nan_to_num(posinf=0.0)).round()  # all zeros stay zeros
    rounded: Tensor = (steps * (largest / 127)).flatten(-2)[..., :K]
    return rounded


class QuantizedLinear(nn.Module):
    """What stands for an nn.Linear: the same product, from weights in float16, bfloat16 or int8.

    Args:
        weight: (N, K).
        scale: (N,) float32 for int8, else None.
        bias: (N,) float32 or None.
    """

    def __init__(self, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        assert weight.dtype in _DTYPES.values()
        assert (weight.dtype == torch.int8) == (scale is not None), "int8 alone has scales"
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.weight: Tensor
        self.scale: Tensor | None
        self.bias: Tensor | None

    @classmethod
    def of(
        cls, linear: nn.Linear, precision: Precision, pages: LargePages | None = None
    ) -> "QuantizedLinear":
        """Quantise a linear layer. Weights that are stored so already are shared, not copied."""
        pages = pages or LargePages()
        weight, dtype = linear.weight.detach(), _DTYPES[precision]
        bias = None if linear.bias is None else linear.bias.detach().float()
        if precision != "int8":
            return cls(weight if weight.dtype == dtype else pages.copied(weight, dtype), None, bias)
        rounded, scale = rounded_rows(weight.float())
        return cls(pages.copied(rounded), scale, bias)

    def dequantized(self) -> Tensor:
        """The weights (N, K) that the stored ones stand for, float32."""
        weight = self.weight.float()
        return weight if self.scale is None else weight * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), in the dtype of x."""
        if self.scale is not None:
            x = rounded_groups(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dequantized().to(x.dtype), bias)


class NarrowEmbedding(nn.Module):
    """What stands for an nn.Embedding in float16 or bfloat16, (V, C): its rows, looked up as float32.

    Made float32 as a whole, Qwen3-0.6B's would take as much memory as half of the model.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.weight: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., C) float32."""
        return F.embedding(ids, self.weight).float()


def quantize(model: LanguageModel, precision: Precision) -> LanguageModel:
    """Replace every nn.Linear of a model, lm_head included, in place; returns the model, in eval mode.

    A tied lm_head gets weights of its own, where they are rounded: the embedding it was tied to is only
    looked up, and stays as it is. Norms and positions of 16 bits become float32.

    Raises:
        InputError: for an unknown precision, or a model that is quantised already.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}: got {precision!r}")
    if not isinstance(model.lm_head, nn.Linear):
        raise InputError("the model is quantised already: load it anew to choose another precision")
    if precision != "float32":
        quantized_modules(model, precision)
        name, table = next(item for item in model.named_modules() if isinstance(item[1], nn.Embedding))
        if table.weight.dtype in (torch.float16, torch.bfloat16):
            model.set_submodule(name, NarrowEmbedding(table.weight.detach()))
    pages = LargePages()
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = pages.copied(parameter.data, torch.float32)
    return model.eval()


def quantized_modules(model: LanguageModel, precision: Precision) -> None:
    """Put a QuantizedLinear in every nn.Linear's place. Works on "meta", too: shapes without values."""
    pages = LargePages()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, QuantizedLinear.of(child, precision, pages))


def precision_of(model: LanguageModel) -> Precision:
    """What the weights of a model's products are stored in; "float32" for any that is not quantised."""
    head = model.lm_head
    if not isinstance(head, QuantizedLinear):
        return "float32"
    return next(precision for precision, dtype in _DTYPES.items() if dtype == head.weight.dtype)


def at_precision(model: LanguageModel, precision: Precision | None) -> LanguageModel:
    """The model, quantised unless it is so already. None: as it is.

    Raises:
        InputError: if it is quantised in another way: what rounding took away does not come back.
    """
    there = precision_of(model)
    if precision is None or precision == there:
        return model
    if there != "float32":
        raise InputError(f"the model is stored in {there}: take its unquantised folder for {precision}")
    return quantize(model, precision)
