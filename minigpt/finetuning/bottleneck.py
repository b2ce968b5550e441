"""Bottleneck adapters (https://arxiv.org/abs/1902.00751): small modules after attention and after the MLP.

    add_adapter(model, BottleneckConfig(bottleneck_size=64))

The output h of attention and of the MLP becomes h + up(gelu(down(h))), before it is added to the residual
stream. `down` maps C channels to M = `bottleneck_size` channels, `up` maps them back to C. The weights of
`up` begin with zeros, so at first the model's output does not change. h is the output of a linear layer (the
last one in attention or MLP), and the adapter is a wrapper around this layer.

Because of the GELU, the adapter is no linear function. So it cannot be merged into a weight, and it costs
time in generation. PEFT has no adapters of this kind.

Letters in shapes: C channels, M the size of the bottleneck.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel, family_of, weight_names
from minigpt.finetuning.layers import AdaptedLayer, AdapterConfig, targeted

__all__ = ["BottleneckConfig", "BottleneckLayer"]


@dataclass(frozen=True)
class BottleneckConfig(AdapterConfig):
    """Options of bottleneck adapters.

    Raises:
        InputError: for a size below 1.
    """

    bottleneck_size: int = 64
    """number of channels in the middle of an adapter"""
    layers_to_transform: tuple[int, ...] = ()
    """numbers of the blocks that get adapters; empty: all of them"""
    modules_to_save: tuple[str, ...] = ()
    """names of modules that are trained whole, such as lm_head"""

    def __post_init__(self) -> None:
        if self.bottleneck_size < 1:
            raise InputError(f"bottleneck_size must be at least 1: got {self.bottleneck_size}")

    def chosen_layers(self, model: LanguageModel) -> dict[str, str]:
        """Return the last linear layer of each attention and MLP, as a dict: our name -> Hugging Face's."""
        ends = tuple(f".{name}" for name in family_of(model.config).residual_projections)
        table = weight_names(model).items()
        names = sorted(theirs.removesuffix(".weight") for ours, (theirs, _) in table if ours.endswith(ends))
        return targeted(model, tuple(names), self.layers_to_transform, self.modules_to_save)

    def new_layer(self, base: Any, theirs: str, adapter: str, draw: bool) -> AdaptedLayer:
        """Return the linear layer `base` with a bottleneck adapter around it."""
        return BottleneckLayer(base, self, adapter, draw)


class BottleneckLayer(AdaptedLayer):
    """A frozen linear layer with a bottleneck adapter after it.

    Args:
        base: an nn.Linear, a quantised layer, or a layer that has an adapter already.
        config: configuration, which has the size of the bottleneck.
        adapter: name of the adapter.
        draw: False: do not initialise the parameters, because their values will be set later.
    """

    is_linear = False

    def __init__(self, base: Any, config: BottleneckConfig, adapter: str, draw: bool = True) -> None:
        super().__init__(base, adapter)
        C, M = self.out_features, config.bottleneck_size
        # These are parameters, not nn.Linear layers, so that they are never quantised: set_precision can
        # replace each nn.Linear of the model by a quantised layer.
        self.down_weight, self.down_bias = self.new_parameter(M, C), self.new_parameter(M)
        self.up_weight, self.up_bias = self.new_parameter(C, M), self.new_parameter(C)
        if draw:
            nn.init.kaiming_uniform_(self.down_weight, a=math.sqrt(5))
            for parameter in (self.down_bias, self.up_weight, self.up_bias):
                nn.init.zeros_(parameter)

    @property
    def cannot_be_added(self) -> str:
        """The name of this kind of adapter, for the error message that such adapters cannot be summed."""
        return "bottleneck adapters"

    def tensors(self) -> dict[str, nn.Parameter]:
        """Return the adapter's parameters. A key is the last part of the parameter's name in a file."""
        return {
            "adapter_down.weight": self.down_weight,
            "adapter_down.bias": self.down_bias,
            "adapter_up.weight": self.up_weight,
            "adapter_up.bias": self.up_bias,
        }

    def leaving(self, out: Tensor, x: Tensor) -> Tensor:
        """Apply the adapter to the outputs of the linear layer, (..., C). `x` is not used."""
        h = out.to(self.down_weight.dtype)
        middle = F.gelu(F.linear(h, self.down_weight, self.down_bias))  # (..., M)
        changed: Tensor = out + F.linear(middle, self.up_weight, self.up_bias)  # (..., C)
        return changed.to(out.dtype)
