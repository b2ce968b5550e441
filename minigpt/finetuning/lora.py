"""LoRA: low-rank adapters beside frozen weights (https://arxiv.org/abs/2106.09685), compatible with PEFT.

    apply_lora(model, LoraConfig(r=8, lora_alpha=16))     # now only the adapter requires gradients
    ...                                                   # train
    with disable_adapter(model):                          # the model without its adapters
        ...
    merge_and_unload(model)                               # a model whose weights include the adapter

The weight W of a linear layer becomes W + scaling * B A. A (r, K) is random, B (N, r) is zero, so at first
the model's output does not change. `scaling` is lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA
(https://arxiv.org/abs/2312.03732). DoRA (https://arxiv.org/abs/2402.09353) also learns the norm of each row
of W + scaling * B A.

`set_adapter` chooses the active adapters. `add_weighted_adapter` combines several adapters into one.

Letters in shapes: N outputs, K inputs, r the rank.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel
from minigpt.finetuning.layers import (
    AdaptedLayer,
    AdapterConfig,
    adapted_layers,
    adapter_names,
    add_adapter,
    check_adapters,
    disable_adapter,
    merge_and_unload,
    module_names,
    set_adapter,
    targeted,
    whole_modules,
)

__all__ = [
    "LoraConfig", "LoraLinear", "adapter_names", "add_weighted_adapter", "apply_lora", "disable_adapter",
    "lora_layers", "merge_and_unload", "module_names", "set_adapter",
]  # fmt: skip


@dataclass(frozen=True)
class LoraConfig(AdapterConfig):
    """Options of a LoRA adapter. The names are PEFT's.

    Raises:
        InputError: for a rank below 1, or a dropout outside of [0, 1).
    """

    r: int = 8
    """rank of the adapters"""
    lora_alpha: float = 8
    """the product B A is multiplied by lora_alpha / r"""
    lora_dropout: float = 0.0
    """share of an adapter's inputs that are set to 0 in training"""
    target_modules: str | tuple[str, ...] = "all-linear"
    """all-linear (all but lm_head), Hugging Face's names (c_attn, q_proj, ...), or a regular expression"""
    layers_to_transform: tuple[int, ...] = ()
    """numbers of the blocks that get adapters; empty: all of them"""
    use_rslora: bool = False
    """divide lora_alpha by sqrt(r) instead of r, so that adapters of large rank learn well, too"""
    use_dora: bool = False
    """learn the length of each row of a weight apart from its direction"""
    init_lora_weights: Literal["default", "gaussian"] = "default"
    """how A is drawn: like the weight of nn.Linear, or from a normal distribution with deviation 1 / r"""
    modules_to_save: tuple[str, ...] = ()
    """names of modules that are trained whole, such as lm_head"""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise InputError(f"r must be at least 1: got r={self.r}")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(
                f"lora_dropout must be at least 0 and below 1: got lora_dropout={self.lora_dropout}"
            )

    @property
    def scaling(self) -> float:
        """Return the factor of the product B A."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def chosen_layers(self, model: LanguageModel) -> dict[str, str]:
        """Return the layers that get an adapter: minigpt's name -> Hugging Face's name."""
        return targeted(model, self.target_modules, self.layers_to_transform, self.modules_to_save)

    def new_layer(self, base: Any, theirs: str, adapter: str, draw: bool) -> AdaptedLayer:
        """Return the linear layer `base` with LoRA's matrices A and B."""
        return LoraLinear(base, self, adapter, draw)

    def check_base(self, layers: Sequence[Any]) -> None:
        """Raise InputError for DoRA on 4-bit layers, which minigpt does not support."""
        if self.use_dora and any(layer.weight.dtype == torch.uint8 for layer in layers):
            raise InputError(
                "use_dora needs weights of more than 4 bits: take int8, or the unquantised folder"
            )


class LoraLinear(AdaptedLayer):
    """A frozen linear layer with LoRA's matrices A and B.

    A and B are in float32, even if the layer's weight is in 16, 8 or 4 bits, as in PEFT.

    Args:
        base: an nn.Linear, a quantised layer, or an AdaptedLayer; used directly, not copied.
        config: configuration with rank, scaling and dropout.
        adapter: name of the adapter.
        draw: False: do not initialise A and B, because their values will be set later.
    """

    def __init__(self, base: Any, config: LoraConfig, adapter: str = "default", draw: bool = True) -> None:
        super().__init__(base, adapter)
        self.scaling, self.use_dora = config.scaling, config.use_dora
        self.lora_A = self.new_parameter(config.r, self.in_features)  # (r, K)
        self.lora_B = self.new_parameter(self.out_features, config.r)  # (N, r)
        self.lora_dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        if draw:
            nn.init.zeros_(self.lora_B)
            if config.init_lora_weights == "gaussian":
                nn.init.normal_(self.lora_A, std=1 / config.r)
            else:
                nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if config.use_dora:
            self.lora_magnitude_vector = nn.Parameter(self.float_weight().detach().norm(dim=1))  # (N,)

    @property
    def cannot_be_added(self) -> str:
        """Return "" for LoRA: its effect can be added to the effects of other adapters.

        For DoRA, whose effect cannot be added, return a name for the error message.
        """
        return "adapters with use_dora" if self.use_dora else ""

    def tensors(self) -> dict[str, nn.Parameter]:
        """Return a dict: end of a parameter's name in an adapter file -> the adapter's parameter."""
        found = {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}
        return {**found, "lora_magnitude_vector": self.lora_magnitude_vector} if self.use_dora else found

    def delta(self) -> Tensor:
        """Return scaling * B A, (N, K), which LoRA adds to the weight. (DoRA then scales each row.)"""
        return self.scaling * (self.lora_B @ self.lora_A)

    def merged_with(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return `weight` (N, K) and `bias` (N,) with this adapter merged into them."""
        total = weight + self.delta()
        if self.use_dora:
            total = total * (self.lora_magnitude_vector / total.norm(dim=1))[:, None]
        return total, bias

    def leaving(self, out: Tensor, x: Tensor) -> Tensor:
        """Return `out` (..., N), the layer's outputs for the inputs x (..., K), with the adapter applied."""
        dropped = self.lora_dropout(x).to(self.lora_A.dtype)
        low = F.linear(dropped, self.lora_A)  # (..., r)
        # addmm computes product, scaling and sum in one pass over the outputs. Three operations would need
        # three passes.
        if not self.use_dora:
            flat = out.to(low.dtype).flatten(0, -2)
            total: Tensor = torch.addmm(flat, low.flatten(0, -2), self.lora_B.T, alpha=self.scaling)
            return total.view(out.shape).to(out.dtype)
        weight, bias = self.float_weight(), self.linear.bias
        # No gradient flows through the norm, as in DoRA's paper (section 4.3) and in PEFT.
        ratio = self.lora_magnitude_vector / (weight + self.delta()).norm(dim=1).detach()  # (N,)
        drops = self.training and not isinstance(self.lora_dropout, nn.Identity)
        plain = F.linear(dropped, weight) if drops else out if bias is None else out - bias
        change = F.linear(low, self.lora_B) * self.scaling
        moved: Tensor = out + (ratio - 1) * plain + ratio * change
        return moved.to(out.dtype)


def apply_lora(
    model: LanguageModel, config: LoraConfig, adapter: str = "default", *, draw: bool = True
) -> None:
    """Freeze a model and add an adapter to some of its linear layers, in place; see `add_adapter`."""
    add_adapter(model, config, adapter, draw=draw)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Yield (minigpt's name of a linear layer, its LoraLinear); two pairs for a layer with two adapters."""
    for name, layer in adapted_layers(model):
        if isinstance(layer, LoraLinear):
            yield name, layer


@torch.no_grad()
def add_weighted_adapter(
    model: LanguageModel, adapters: Sequence[str], weights: Sequence[float], adapter: str
) -> LoraConfig:
    """Combine several adapters into a new one, which is then the only active one.

    The new A is the sum of the adapters' A, each multiplied by sqrt(weight * scaling). The new B is computed
    in the same way (PEFT's combination type "linear"). For one adapter this is exact, for several it is an
    approximation. To use the exact sum of several adapters, give their names to `set_adapter` instead.

    Args:
        weights: one factor per adapter.
        adapter: name of the new adapter.

    Returns: the configuration of the new adapter, for `save_adapter`.

    Raises:
        InputError: if an adapter does not exist or is not LoRA, ranks differ, or an adapter has use_dora or
            modules_to_save.
    """
    if len(adapters) != len(weights) or not adapters:
        raise InputError(f"each adapter needs a weight: got {len(adapters)} adapters, {len(weights)} weights")
    check_adapters(model, adapters)
    if any(
        layer.adapter in adapters and not isinstance(layer, LoraLinear) for _, layer in adapted_layers(model)
    ):
        raise InputError("only adapters of LoRA can be weighted")
    layers, names = [one for _, one in lora_layers(model) if one.adapter in adapters], module_names(model)
    if any(layer.use_dora for layer in layers) or any(
        whole.copies.keys() & set(adapters) for whole in whole_modules(model).values()
    ):
        raise InputError("adapters with use_dora or modules_to_save cannot be weighted")
    ranks = {layer.lora_A.shape[0] for layer in layers}
    if len(ranks) > 1:
        raise InputError(f"the adapters must have one rank: got {', '.join(map(str, sorted(ranks)))}")
    r, weight_of = ranks.pop(), dict(zip(adapters, weights))
    chosen = {name for name, layer in lora_layers(model) if layer.adapter in weight_of}
    config = LoraConfig(
        r, r, target_modules=tuple(theirs for ours, theirs in names.items() if ours in chosen)
    )
    apply_lora(model, config, adapter, draw=False)
    made = {name: layer for name, layer in lora_layers(model) if layer.adapter == adapter}
    for layer in made.values():
        layer.lora_A.zero_()
        layer.lora_B.zero_()
    for name, layer in lora_layers(model):
        if layer.adapter in weight_of:
            scale = weight_of[layer.adapter] * layer.scaling
            made[name].lora_A.add_(layer.lora_A, alpha=math.copysign(math.sqrt(abs(scale)), scale))
            made[name].lora_B.add_(layer.lora_B, alpha=math.sqrt(abs(scale)))
    return config
