"""Linear layers with weights in fewer bits, and set_precision, which puts them into a model.

    set_precision(model, "int8")     # changes the model, which is then for inference or for training adapters
    precision_of(model)              # "int8"
    prepare_training(model)          # gradients pass through the model to its adapters

Generation spends most of its time on reading weights from memory, so half the bytes take nearly half the
time. The table is about the weights of linear layers, lm_head included. (For norms and embeddings, see
set_precision.) With int8 and int4, an lm_head that was tied to the embedding gets its own rounded weights.

    precision           stored                              computed on a CPU        on a GPU
    float16, bfloat16   rounded weights                     float32                  the same 16 bits
    int8                integers, one scale per row         float32, inputs rounded  bfloat16
                                                            to int8 in groups
    int4                4 bits, a scale and an offset       bfloat16, slow           bfloat16, torch's kernel
                        per 64 weights; lm_head int8                                 (tinygemm)

int8 on a CPU: a CPU multiplies integers fast, so the inputs are rounded to integers, too. Each group of 128
neighbours in a token's vector has a scale. A large value then costs precision only in its group, and tokens
do not influence each other. `minigpt.generation.native` computes with integers; the layers of this module
give the same result with floats, slowly.

int8 on a GPU: PyTorch converts the weights to bfloat16 before each product. Without torch.compile, this saves
memory but no time. Inputs are not rounded.

Adapters can be trained beside weights in int8 and int4 ("QLoRA", https://arxiv.org/abs/2305.14314). The
weights do not change and stay small: forward and backward pass convert them to floats, layer by layer, and
keep no copy. In training the inputs are not rounded, because rounding has no gradient.

torchao is not used: its int4 kernels need a further package, and its int8 product is the same as here.

Letters in shapes: N outputs, K inputs, G groups of neighbours.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel
from minigpt.families.strict_loading import cast, require_finite
from minigpt.storage.large_pages import LargePages

__all__ = [
    "INPUT_GROUP",
    "PRECISIONS",
    "WEIGHT_GROUP",
    "Int4Linear",
    "NarrowEmbedding",
    "Precision",
    "QuantizedLinear",
    "cast_parameters",
    "is_quantised",
    "precision_of",
    "prepare_training",
    "replace_linears",
    "rounded_groups",
    "rounded_rows",
    "rounded_to_int4",
    "set_precision",
]

Precision = Literal["float32", "float16", "bfloat16", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
_DTYPES: dict[str, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# int8: number of neighbouring inputs that share a scale; generation/products.h must have the same number
INPUT_GROUP = 128
# int4: number of neighbours in a row of the weight matrix that share a scale and an offset; torch's kernel
# supports 64
WEIGHT_GROUP = 64


# -- rounding ----------------------------------------------------------------------------------------------


def rounded_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix (N, K) to int8 (N, K) and scales (N,), so that weight is about int8 * scale.

    The error is at most half a scale. In each row, the value with the largest magnitude becomes 127 or -127.
    -128 is not used: without it, the sum of two products of int8 numbers fits into 16 bits, and the fastest
    instructions of older CPUs need this.
    """
    scale = weight.abs().amax(dim=1) / 127  # (N,)
    steps = weight / scale.clamp(min=torch.finfo(scale.dtype).tiny)[:, None]
    return steps.round().clamp(-127, 127).to(torch.int8), scale


def rounded_groups(x: Tensor) -> Tensor:
    """Round the inputs of a layer, (..., K), as minigpt's int8 products on a CPU do. The shape stays.

    Each group of INPUT_GROUP neighbours has its own scale m / 127, where m is the largest absolute value of
    the group. The values become multiples of this scale.
    """
    K = x.shape[-1]
    padded = F.pad(x, (0, -K % INPUT_GROUP))
    groups = padded.reshape(*x.shape[:-1], -1, INPUT_GROUP)  # (..., G, INPUT_GROUP)
    largest = groups.abs().amax(dim=-1, keepdim=True)  # (..., G, 1)
    # in a group of zeros, 127 / largest is infinite; nan_to_num makes it 0, so that the zeros stay zeros
    steps = (groups * (127 / largest).nan_to_num(posinf=0.0)).round()
    rounded: Tensor = (steps * (largest / 127)).flatten(-2)[..., :K]
    return rounded


def rounded_to_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a float matrix (N, K) to 4 bits. K must be a multiple of WEIGHT_GROUP.

    Each group of WEIGHT_GROUP neighbours in a row has its own scale and offset. A weight is about
    (integer - 8) * scale + offset.

    Returns: integers 0 to 15 as uint8 (N, K), and scales and offsets as bfloat16 (G, N, 2).
    """
    N, K = weight.shape
    groups = weight.float().view(N, K // WEIGHT_GROUP, WEIGHT_GROUP)  # (N, G, WEIGHT_GROUP)
    least, most = groups.amin(dim=-1), groups.amax(dim=-1)  # (N, G) each, per group
    scale = ((most - least) / 15).clamp(min=torch.finfo(torch.float32).tiny).bfloat16().float()
    offset = (least + 8 * scale).bfloat16().float()
    numbers = ((groups - offset[..., None]) / scale[..., None]).round() + 8
    numbers = numbers.nan_to_num().clamp(0, 15).to(torch.uint8).view(N, K)
    return numbers, torch.stack([scale.t(), offset.t()], dim=-1).bfloat16().contiguous()


# -- layers ------------------------------------------------------------------------------------------------


class _FrozenProduct(torch.autograd.Function):
    """The product of x (..., K) with a quantised layer's weights, with a gradient for x only.

    The forward pass converts the weights to floats and frees the floats again; so does the backward pass.
    F.linear would keep the floats of all layers until the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "QuantizedLinear | Int4Linear") -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return F.linear(x, layer.dequantized()[:, : layer.in_features].to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weight = ctx.layer.dequantized()[:, : ctx.layer.in_features].to(gradient.dtype)
        return (gradient @ weight).to(ctx.dtype), None


class QuantizedLinear(nn.Module):
    """Replaces an nn.Linear: its weights are float16, bfloat16 or int8 and are not trained.

    Args:
        weight: the weights, (N, K).
        scale: for int8: a scale for each row, (N,) float32; None for the other dtypes.
        bias: (N,) or None.
        rounds_inputs: for int8: also round the inputs, as minigpt's int8 products on a CPU do.
    """

    def __init__(
        self, weight: Tensor, scale: Tensor | None, bias: Tensor | None, rounds_inputs: bool = True
    ) -> None:
        super().__init__()
        assert weight.dtype in (torch.float16, torch.bfloat16, torch.int8)
        assert (weight.dtype == torch.int8) == (scale is not None), "int8 alone has scales"
        self.out_features, self.in_features = weight.shape
        self.rounds_inputs, self.trains_adapters = rounds_inputs, False
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.weight: Tensor
        self.scale: Tensor | None
        self.bias: Tensor | None

    @classmethod
    def of(
        cls,
        linear: nn.Linear,
        precision: Precision,
        *,
        rounds_inputs: bool = True,
        pages: LargePages | None = None,
        name: str = "the layer",
    ) -> "QuantizedLinear":
        """Make this layer from an nn.Linear. Weights that already have the right dtype are not copied.

        Raises:
            InputError: if a weight is too large for float16 or bfloat16; the message names the layer.
        """
        pages = pages or LargePages()
        weight = linear.weight.detach()
        bias = None if linear.bias is None else linear.bias.detach().float()
        if precision == "int8":
            rounded, scale = rounded_rows(weight.float())
            return cls(pages.copied(rounded), scale, bias, rounds_inputs)
        dtype = _DTYPES[precision]
        same = weight.dtype == dtype
        return cls(weight if same else cast(f"{name}.weight", weight, dtype, pages), None, bias)

    def dequantized(self) -> Tensor:
        """Return the weights (N, K) as float32."""
        weight = self.weight.float()
        return weight if self.scale is None else weight * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., K) -> (..., N), in the dtype of x."""
        if self.trains_adapters and x.requires_grad:
            product: Tensor = _FrozenProduct.apply(x, self)  # type: ignore[no-untyped-call]
            return product if self.bias is None else product + self.bias.to(product.dtype)
        if self.scale is None:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.weight.to(x.dtype), bias)
        if self.rounds_inputs:
            x = rounded_groups(x)
        # The integers are multiplied without their scales: up to 127, they are exact in bfloat16. Scaling the
        # N results is less work than scaling N * K weights.
        out = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return (out if self.bias is None else out + self.bias).to(x.dtype)


class Int4Linear(nn.Module):
    """Replaces an nn.Linear: its weights have 4 bits, two weights in a byte, and are not trained.

    Args:
        numbers: integers (N, K) from rounded_to_int4; K is a multiple of WEIGHT_GROUP.
        scales: scales and offsets (G, N, 2) from rounded_to_int4.
        bias: (N,) or None.
        in_features: number of inputs: K without padding.
    """

    def __init__(self, numbers: Tensor, scales: Tensor, bias: Tensor | None, in_features: int) -> None:
        super().__init__()
        self.out_features, self.in_features = len(numbers), in_features
        # (N, K / 2)  two weights in each byte
        self.register_buffer("weight", numbers[:, ::2] << 4 | numbers[:, 1::2])
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)
        self.weight: Tensor
        self.scales: Tensor
        self.bias: Tensor | None
        self.uses_kernel = self.trains_adapters = False
        self._pack()

    def _pack(self) -> None:
        """On CUDA, put the weights into the order that torch's int4 kernel needs. This cannot be undone.

        The kernel needs N to be a multiple of 8; other layers do not use it. K must be a multiple of 64,
        because the kernel packs 4 tiles of 16 columns together (the 4 in the call below). K is padded.
        """
        # torch's kernel has no backward pass, so adapters are trained without the kernel
        is_wanted = not self.uses_kernel and not self.trains_adapters
        if self.weight.is_cuda and is_wanted and not self.out_features % 8:
            self.weight = torch._convert_weight_to_int4pack(self.weight, 4)
            self.uses_kernel = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int4Linear":
        # torch calls _apply when `to` or `cuda` moves a module; _pack then packs weights that are on CUDA
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._pack()
        return self

    @classmethod
    def of(cls, linear: nn.Linear, name: str = "the layer") -> "Int4Linear":
        """Make this layer from an nn.Linear. K is padded with zeros to a multiple of WEIGHT_GROUP."""
        weight = linear.weight.detach()
        numbers, scales = rounded_to_int4(F.pad(weight, (0, -weight.shape[1] % WEIGHT_GROUP)))
        if not scales.is_meta:
            require_finite(f"{name}.scales", scales)
        return cls(numbers, scales, None if linear.bias is None else linear.bias.detach(), weight.shape[1])

    def dequantized(self) -> Tensor:
        """Return the weights (N, K) as bfloat16, padding included."""
        assert not self.uses_kernel, "in the kernel's order"
        numbers = torch.stack([self.weight >> 4, self.weight & 15], dim=-1)  # (N, K / 2, 2)
        # (N, G, WEIGHT_GROUP)  integers from -8 to 7
        groups = numbers.view(self.out_features, -1, WEIGHT_GROUP).to(self.scales.dtype) - 8
        scale, offset = self.scales.permute(2, 1, 0)[..., None]  # (N, G, 1) each
        whole: Tensor = (groups * scale + offset).flatten(1)  # (N, K)
        return whole

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., K) -> (..., N), in the dtype of x. torch's kernel needs x in bfloat16."""
        if self.trains_adapters and x.requires_grad:
            product: Tensor = _FrozenProduct.apply(x, self)  # type: ignore[no-untyped-call]
            return product if self.bias is None else product + self.bias.to(product.dtype)
        x = F.pad(x, (0, -self.in_features % WEIGHT_GROUP))
        out: Tensor
        if self.uses_kernel:
            rows = x.reshape(-1, x.shape[-1])
            out = torch._weight_int4pack_mm(rows, self.weight, WEIGHT_GROUP, self.scales)
            out = out.view(*x.shape[:-1], self.out_features)
        else:
            out = F.linear(x, self.dequantized().to(x.dtype))
        return out if self.bias is None else (out + self.bias).to(x.dtype)


class NarrowEmbedding(nn.Module):
    """Replaces an nn.Embedding (V, C): its weights stay in 16 bits, and a look-up converts rows to float32.

    A float32 copy of Qwen3-0.6B's embedding would take half as much memory as the whole model in 16 bits.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.weight: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        """Look up the rows of ids: (...) -> (..., C), in float32."""
        return F.embedding(ids, self.weight).float()


# -- models ------------------------------------------------------------------------------------------------


def set_precision(model: LanguageModel, precision: Precision | None) -> LanguageModel:
    """Store the weights of a model's linear layers in another precision. Returns the model, in eval mode.

    The model changes in place. Its norms and embeddings change, too:

    - float32: all parameters become float32.
    - float16 and bfloat16 on a GPU: all parameters get this dtype.
    - int4 on any device, and int8 on a GPU: norms and embeddings become bfloat16.
    - float16, bfloat16 and int8 on a CPU: norms and embeddings become float32. Exception: a token embedding
      that is already in 16 bits stays in 16 bits.

    Args:
        model: the model.
        precision: the new precision. None: keep the precision, but prepare the layers for the model's device.

    Raises:
        InputError: for an unknown precision; if the model is quantised and another precision is given,
            because rounding cannot be undone; if a weight is too large for 16 bits.
    """
    if precision is not None and precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}: got {precision!r}")
    current, on_gpu = precision_of(model), next(model.parameters()).is_cuda
    target = precision or current
    if not isinstance(model.lm_head, nn.Linear):
        if target != current:
            raise InputError(f"the model is stored in {current}: take its unquantised folder for {target}")
        if target != "int8" or not on_gpu:
            return model
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.rounds_inputs = False  # int8 layers round their inputs on a CPU, but not on a GPU
        return cast_parameters(model, torch.bfloat16)
    if target == "float32":
        return cast_parameters(model, torch.float32)
    if target == "int4" or (target == "int8" and on_gpu):
        replace_linears(model, target, rounds_inputs=False)
        return cast_parameters(model, torch.bfloat16)
    if target in _DTYPES and next(model.parameters()).device.type != "cpu":
        return cast_parameters(model, _DTYPES[target])
    replace_linears(model, target)
    name, table = next(item for item in model.named_modules() if isinstance(item[1], nn.Embedding))
    if table.weight.dtype in _DTYPES.values():
        model.set_submodule(name, NarrowEmbedding(table.weight.detach()))
    return cast_parameters(model, torch.float32)


def is_quantised(model: nn.Module) -> bool:
    """Return True if a model has a QuantizedLinear or an Int4Linear in place of an nn.Linear."""
    return any(isinstance(module, QuantizedLinear | Int4Linear) for module in model.modules())


def prepare_training(model: LanguageModel) -> None:
    """Prepare a quantised model on a CPU for training adapters beside its weights, in place.

    Norms and embeddings become float32. The model may be moved to a GPU afterwards.
    """
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.rounds_inputs, module.trains_adapters = False, True
        elif isinstance(module, Int4Linear):
            module.trains_adapters = True
    cast_parameters(model, torch.float32)


def precision_of(model: LanguageModel) -> Precision:
    """Return the precision in which the weights of a model's linear layers are stored."""
    if any(isinstance(module, Int4Linear) for module in model.modules()):
        return "int4"
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    return next((name for name in PRECISIONS if name == dtype), "float32")


def replace_linears(model: LanguageModel, precision: Precision, rounds_inputs: bool = True) -> None:
    """Replace each nn.Linear by a layer in the given precision (int4: lm_head becomes int8).

    Works for models on "meta", too.
    """
    pages, head = LargePages(), model.lm_head

    def quantized(name: str, linear: nn.Linear) -> nn.Module:
        if precision == "int4" and linear is not head:
            return Int4Linear.of(linear, name)
        stored = "int8" if precision == "int4" else precision
        return QuantizedLinear.of(linear, stored, rounds_inputs=rounds_inputs, pages=pages, name=name)

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, quantized(name, module))


def cast_parameters(model: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """Cast the parameters of a model to a dtype, and set eval mode.

    The scales of quantised layers are buffers. They do not change, because they must stay exact.
    """
    pages = LargePages()
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtype:
            parameter.data = (
                parameter.data.to(dtype) if parameter.is_meta else cast(name, parameter.data, dtype, pages)
            )
    return model.eval()
