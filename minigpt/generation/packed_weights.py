"""Faster float32 matrix products of many tokens on a CPU: oneDNN computes them with packed weights.

    packed = PackedWeights(model)
    with packed.in_use():
        model.base_model(ids)

PyTorch gives a float32 product to MKL, which copies the weights into another order at each call. oneDNN
makes such a copy only once (packed weights), and takes a tenth to a fifth less time (LOG.md). The packed
weights take memory in addition to the weights. So they exist only while many tokens are read, and not for
large models.
"""

import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from minigpt.families.registry import LanguageModel

__all__ = ["CAN_PACK", "PackedWeights"]

_TOKENS = 1024  # oneDNN packs weights in the way that is best for this number of tokens; others work, too
_SMALLEST = 2**12  # a layer with fewer weights is not packed: oneDNN's call costs more than it saves
_LIMIT = 2**30  # largest number of bytes of packed weights
# weights are packed only on x86: on other processors PyTorch uses other libraries, and the gain was not
# measured
CAN_PACK = (
    torch._C._has_mkldnn
    and platform.machine() in ("x86_64", "AMD64")
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # private operators, which a later torch may lack
    and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
)


class PackedWeights:
    """The packed weights of a model's linear layers. The weights must not change while this object exists.

    Args:
        model: the model. Layers that do not have float32 weights on the CPU stay as they are.
        limit: largest number of bytes of packed weights. Layers beyond the limit stay as they are.
    """

    def __init__(self, model: LanguageModel, limit: int = _LIMIT) -> None:
        self._layers: list[tuple[nn.Linear, Tensor]] = []
        if not CAN_PACK:
            return
        for layer in model.modules():
            if type(layer) is not nn.Linear or "forward" in vars(layer) or not _can_pack(layer.weight):
                continue
            limit -= layer.weight.nbytes
            if limit < 0:
                break
            packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _TOKENS)
            self._layers.append((layer, packed))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the model compute with the packed weights in a `with` block, without gradients."""
        for layer, packed in self._layers:
            # nn.Module.__call__ then calls this attribute instead of the method `forward` of nn.Linear
            layer.forward = functools.partial(_product, packed, layer.bias)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for layer, _ in self._layers:
                del layer.forward


def _product(packed: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product


def _can_pack(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.numel() >= _SMALLEST
        and type(weight.data) is Tensor  # no subclass: a DTensor has its own matrix multiplication
    )
