"""LoRA: low-rank adapters beside frozen weights (https://arxiv.org/abs/2106.09685), as PEFT has them.

    apply_lora(model, LoraConfig(r=8, lora_alpha=16))     # only the adapters require gradients now
    ...                                                   # train
    merge_and_unload(model)                               # a plain model with the adapters inside its weights

A linear layer W becomes W + scaling * B A with A (r, in), drawn at random, and B (out, r), zeros: at the
start the model says what it said. `scaling` is alpha / r, or alpha / sqrt(r) with rsLoRA
(https://arxiv.org/abs/2312.03732). DoRA (https://arxiv.org/abs/2402.09353) learns the length of each row of W
+ scaling * B A as well.

Letters in shapes: N outputs, K inputs, r the rank.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt.errors import InputError, unknown_name
from minigpt.families.registry import LanguageModel, family_of

__all__ = ["LoraConfig", "LoraLinear", "apply_lora", "lora_layers", "merge_and_unload", "module_names"]


@dataclass(frozen=True)
class LoraConfig:
    """Names and defaults are PEFT's.

    Raises:
        InputError: for a rank below 1, or a dropout outside of [0, 1).
    """

    r: int = 8
    """rank of the adapters"""
    lora_alpha: float = 8
    """the adapters' product is multiplied by lora_alpha / r"""
    lora_dropout: float = 0.0
    """share of an adapter's inputs zeroed in training"""
    target_modules: str | tuple[str, ...] = "all-linear"
    """all-linear (all but lm_head), Hugging Face's names (c_attn, q_proj, ...), or a regular expression"""
    layers_to_transform: tuple[int, ...] = ()
    """numbers of the blocks that get adapters; empty: all of them"""
    use_rslora: bool = False
    """divide lora_alpha by sqrt(r) instead of r: larger ranks keep learning"""
    use_dora: bool = False
    """learn the length of each row of a weight apart from its direction"""
    init_lora_weights: Literal["default", "gaussian"] = "default"
    """how A is drawn: uniformly as linear layers are, or from a normal distribution of deviation 1 / r"""
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
        """What the product of B and A is multiplied by."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class LoraLinear(nn.Module):
    """A linear layer with an adapter; the layer itself is frozen.

    Args:
        base: the layer. It is used as it is, not copied.
        config: rank, scaling, dropout.
    """

    def __init__(self, base: nn.Linear, config: LoraConfig) -> None:
        super().__init__()
        self.base_layer = base
        self.scaling, self.use_dora = config.scaling, config.use_dora
        N, K, like = base.out_features, base.in_features, base.weight
        self.lora_A = nn.Parameter(torch.empty(config.r, K, dtype=like.dtype, device=like.device))  # (r, K)
        self.lora_B = nn.Parameter(torch.zeros(N, config.r, dtype=like.dtype, device=like.device))  # (N, r)
        self.lora_dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / config.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if config.use_dora:
            self.lora_magnitude_vector = nn.Parameter(base.weight.detach().norm(dim=1))  # (N,)

    @property
    def weight(self) -> Tensor:
        """(N, K): the layer's own weight, without the adapter."""
        return self.base_layer.weight

    @property
    def in_features(self) -> int:
        """K."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """N."""
        return self.base_layer.out_features

    def delta(self) -> Tensor:
        """(N, K): what the adapter adds to the weight, without DoRA's lengths."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def merged_weight(self) -> Tensor:
        """(N, K): the weight with the adapter inside it."""
        total = self.base_layer.weight + self.delta()
        if self.use_dora:
            total = total * (self.lora_magnitude_vector / total.norm(dim=1))[:, None]
        return total

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        dropped = self.lora_dropout(x)
        low = F.linear(F.linear(dropped, self.lora_A), self.lora_B) * self.scaling
        if not self.use_dora:
            out: Tensor = self.base_layer(x) + low
            return out
        # the length counts as a constant in the gradient, as in the paper (4.3) and in PEFT
        length = (self.base_layer.weight + self.delta()).norm(dim=1).detach()  # (N,)
        ratio = self.lora_magnitude_vector / length
        bias = self.base_layer.bias
        out = F.linear(dropped, self.base_layer.weight) * ratio + low * ratio
        if dropped is x:
            return out if bias is None else out + bias
        plain = F.linear(x, self.base_layer.weight)  # with dropout PEFT adds the difference only
        out = plain + (ratio - 1) * F.linear(dropped, self.base_layer.weight) + low * ratio
        return out if bias is None else out + bias


def module_names(model: LanguageModel) -> dict[str, str]:
    """The linear layers of the blocks, and lm_head: our name -> Hugging Face's.

    >>> from minigpt import GPTConfig, GPTLMHeadModel
    >>> list(module_names(GPTLMHeadModel(GPTConfig(n_layer=1))).items())[0]
    ('transformer.blocks.0.attn.qkv_proj', 'transformer.h.0.attn.c_attn')
    """
    theirs = {ours: name for ours, (name, _) in family_of(model.config).weight_names(model.config).items()}
    return {
        name: theirs[f"{name}.weight"].removesuffix(".weight")
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in theirs
    }


def _chosen(model: LanguageModel, config: LoraConfig) -> list[str]:
    """Our names of the layers that get an adapter.

    Raises:
        InputError: for a name that no layer has, or if none is left.
    """
    names, target = module_names(model), config.target_modules
    layers = {ours: theirs for ours, theirs in names.items() if ours != "lm_head"}
    if target == "all-linear":
        found = list(layers)
    elif isinstance(target, str):
        try:
            found = [ours for ours, theirs in names.items() if re.fullmatch(target, theirs)]
        except re.error as error:
            raise InputError(f"target_modules={target!r} is no regular expression: {error}") from None
    else:
        known = sorted({part for theirs in names.values() for part in (theirs, theirs.rpartition(".")[2])})
        for name in target:
            if name not in known:
                short = sorted({theirs.rpartition(".")[2] for theirs in names.values()})
                raise InputError(unknown_name("module in target_modules", name, short))
        found = [
            ours
            for ours, theirs in names.items()
            if theirs in target or any(theirs.endswith(f".{name}") for name in target)
        ]
    if config.layers_to_transform:
        count = model.config.num_hidden_layers
        for number in config.layers_to_transform:
            if not 0 <= number < count:
                raise InputError(f"layers_to_transform names block {number}: the model has 0 to {count - 1}")
        wanted = {f".{number}." for number in config.layers_to_transform}
        found = [ours for ours in found if any(number in ours for number in wanted)]
    if not found:
        raise InputError(f"target_modules={target!r} chooses no layer of this model")
    return found


def apply_lora(model: LanguageModel, config: LoraConfig) -> None:
    """Freeze a model and put adapters beside some of its linear layers, in place.

    Raises:
        InputError: if `target_modules`, `layers_to_transform` or `modules_to_save` choose what is not there.
    """
    chosen = _chosen(model, config)
    modules = dict(model.named_modules())
    saved = _modules_to_save(model, config.modules_to_save)
    model.requires_grad_(False)
    for name in chosen:
        parent, _, last = name.rpartition(".")
        setattr(modules[parent], last, LoraLinear(modules[name], config))
    for module in saved:
        module.requires_grad_(True)


def _modules_to_save(model: LanguageModel, names: Sequence[str]) -> list[nn.Module]:
    found = []
    for name in names:
        matches = [
            module for full, module in model.named_modules() if full == name or full.endswith(f".{name}")
        ]
        if not matches:
            known = sorted({full.rpartition(".")[2] for full, _ in model.named_modules()} - {""})
            raise InputError(unknown_name("module in modules_to_save", name, known))
        found += matches
    return found


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """The layers with adapters, with our names."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


@torch.no_grad()
def merge_and_unload(model: LanguageModel) -> LanguageModel:
    """Add each adapter to its weight and remove it, in place; returns the model, which is a plain one then.

    Raises:
        InputError: if a merged weight is not finite.
    """
    modules = dict(model.named_modules())
    for name, layer in list(lora_layers(model)):
        merged = layer.merged_weight()
        if not merged.isfinite().all():
            raise InputError(f"{name}: the weight with its adapter is not finite")
        layer.base_layer.weight.copy_(merged)
        parent, _, last = name.rpartition(".")
        setattr(modules[parent], last, layer.base_layer)
    return model.requires_grad_(True)
