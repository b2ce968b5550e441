"""LoRA: low-rank adapters beside frozen weights (https://arxiv.org/abs/2106.09685), as PEFT has them.

    apply_lora(model, LoraConfig(r=8, lora_alpha=16))     # only the adapter requires gradients now
    ...                                                   # train
    with disable_adapter(model):                          # the model without it
        ...
    merge_and_unload(model)                               # a plain model with the adapter inside its weights

A linear layer W becomes W + scaling * B A with A (r, in), drawn at random, and B (out, r), zeros: at the
start the model says what it said. `scaling` is alpha / r, or alpha / sqrt(r) with rsLoRA
(https://arxiv.org/abs/2312.03732). DoRA (https://arxiv.org/abs/2402.09353) learns the length of each row of W
+ scaling * B A as well.

An adapter has a name. A model may have several: a layer with two is a LoraLinear around a LoraLinear.
`set_adapter` says which of them count, `add_weighted_adapter` makes one of several.

Letters in shapes: N outputs, K inputs, r the rank.
"""

import copy
import math
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt.errors import InputError, unknown_name
from minigpt.families.registry import LanguageModel, family_of, weight_names

__all__ = [
    "LoraConfig", "LoraLinear", "adapter_names", "add_weighted_adapter", "apply_lora", "chosen_layers",
    "disable_adapter", "is_called", "lora_layers", "merge_and_unload", "module_names", "set_adapter",
    "whole_modules",
]  # fmt: skip


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

    The adapter is float32 beside weights of fewer bits, as in PEFT.

    Args:
        base: an nn.Linear, a quantised layer, or a LoraLinear. It is used as it is, not copied.
        config: rank, scaling, dropout.
        adapter: the adapter's name.
        draw: False: leave A and B as the memory was; their values are known.
    """

    def __init__(self, base: Any, config: LoraConfig, adapter: str = "default", draw: bool = True) -> None:
        super().__init__()
        self.base_layer, self.adapter, self.is_active = base, adapter, True
        self.scaling, self.use_dora = config.scaling, config.use_dora
        N, K, device = base.out_features, base.in_features, base.weight.device
        dtype = torch.float64 if base.weight.dtype == torch.float64 else torch.float32
        self.lora_A = nn.Parameter(torch.empty(config.r, K, dtype=dtype, device=device))  # (r, K)
        self.lora_B = nn.Parameter(torch.empty(N, config.r, dtype=dtype, device=device))  # (N, r)
        self.lora_dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        if draw:
            nn.init.zeros_(self.lora_B)
            if config.init_lora_weights == "gaussian":
                nn.init.normal_(self.lora_A, std=1 / config.r)
            else:
                nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if config.use_dora:
            self.lora_magnitude_vector = nn.Parameter(self.float_weight().detach().norm(dim=1))  # (N,)
        self.train(base.training)  # dropout

    @property
    def linear(self) -> Any:
        """The layer inside, without any adapter."""
        return self.base_layer.linear if isinstance(self.base_layer, LoraLinear) else self.base_layer

    @property
    def weight(self) -> Tensor:
        """(N, K): the layer's own weight, without adapters, as it is stored."""
        weight: Tensor = self.linear.weight
        return weight

    @property
    def in_features(self) -> int:
        """K."""
        return self.lora_A.shape[1]

    @property
    def out_features(self) -> int:
        """N."""
        return self.lora_B.shape[0]

    @property
    def has_active(self) -> bool:
        """Does this adapter count, or one of those around which it lies?"""
        return self.is_active or (isinstance(self.base_layer, LoraLinear) and self.base_layer.has_active)

    def float_weight(self) -> Tensor:
        """(N, K): the layer's own weight, as numbers of the adapter's type."""
        linear = self.linear
        is_rounded = hasattr(linear, "dequantized")  # int4: its inputs are padded
        weight: Tensor = linear.dequantized()[:, : self.in_features] if is_rounded else linear.weight
        return weight.to(self.lora_A.dtype)

    def delta(self) -> Tensor:
        """(N, K): what the adapter adds to the weight, without DoRA's lengths."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def merged_weight(self) -> Tensor:
        """(N, K): the weight with this adapter, and those around which it lies, inside; the active ones."""
        inner = self.base_layer
        total = inner.merged_weight() if isinstance(inner, LoraLinear) else self.float_weight()
        if self.is_active:
            total = total + self.delta()
            if self.use_dora:
                total = total * (self.lora_magnitude_vector / total.norm(dim=1))[:, None]
        return total

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        out: Tensor = self.base_layer(x)
        if not self.is_active:
            return out
        dropped = self.lora_dropout(x).to(self.lora_A.dtype)
        low = F.linear(F.linear(dropped, self.lora_A), self.lora_B) * self.scaling
        if self.use_dora:
            weight, bias = self.float_weight(), self.linear.bias
            # the length counts as a constant in the gradient, as in the paper (4.3) and in PEFT
            ratio = self.lora_magnitude_vector / (weight + self.delta()).norm(dim=1).detach()  # (N,)
            drops = self.training and not isinstance(self.lora_dropout, nn.Identity)
            plain = F.linear(dropped, weight) if drops else out if bias is None else out - bias
            low = (ratio - 1) * plain + ratio * low
        return (out + low).to(out.dtype)


# -- which layers ------------------------------------------------------------------------------------------


def _names(model: LanguageModel) -> dict[str, str]:
    """Every module with weights, or with such modules inside: our name -> Hugging Face's."""
    found: dict[str, str] = {}
    for ours, (theirs, _) in weight_names(model).items():
        parts, their_parts = ours.split("."), theirs.split(".")
        for end in range(1, len(parts)):
            found[".".join(parts[:end])] = ".".join(their_parts[:end])
    return found


def module_names(model: LanguageModel) -> dict[str, str]:
    """The linear layers of the blocks, and lm_head: our name -> Hugging Face's.

    >>> from minigpt import GPTConfig, GPTLMHeadModel
    >>> list(module_names(GPTLMHeadModel(GPTConfig(n_layer=1))).items())[0]
    ('transformer.blocks.0.attn.qkv_proj', 'transformer.h.0.attn.c_attn')
    """
    names = _names(model)
    return {
        name: names[name]
        for name, module in model.named_modules()
        if name in names and hasattr(module, "in_features")
    }


def is_called(theirs: str, name: str) -> bool:
    """Does a name of target_modules mean a layer with this name of Hugging Face's?"""
    return f".{theirs}".endswith(f".{name}")


def _is_in(name: str, modules: Collection[str]) -> bool:
    """Is a module one of these, or inside one?"""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def chosen_layers(model: LanguageModel, config: LoraConfig) -> dict[str, str]:
    """The layers that get an adapter: our name -> Hugging Face's.

    Raises:
        InputError: for a name that no layer has, or if none is left.
    """
    whole = _modules_to_save(model, config.modules_to_save)
    names = {ours: theirs for ours, theirs in module_names(model).items() if not _is_in(ours, whole)}
    target = config.target_modules
    if target == "all-linear":
        found = {ours: theirs for ours, theirs in names.items() if ours != "lm_head"}
    elif isinstance(target, str):
        try:
            found = {ours: theirs for ours, theirs in names.items() if re.fullmatch(target, theirs)}
        except re.error as error:
            raise InputError(f"target_modules={target!r} is no regular expression: {error}") from None
    else:
        for name in target:
            if not any(is_called(theirs, name) for theirs in names.values()):
                short = sorted({theirs.rpartition(".")[2] for theirs in names.values()})
                raise InputError(unknown_name("module in target_modules", name, short))
        found = {
            ours: theirs for ours, theirs in names.items() if any(is_called(theirs, name) for name in target)
        }
    if config.layers_to_transform:
        count = model.config.num_hidden_layers
        for number in config.layers_to_transform:
            if not 0 <= number < count:
                raise InputError(f"layers_to_transform names block {number}: the model has 0 to {count - 1}")
        wanted = {f".{number}." for number in config.layers_to_transform}
        found = {ours: theirs for ours, theirs in found.items() if any(number in ours for number in wanted)}
    if not found:
        raise InputError(f"target_modules={target!r} chooses no layer of this model")
    return found


def _modules_to_save(model: LanguageModel, names: Sequence[str]) -> list[str]:
    """Our names of the modules that are trained whole. As in PEFT, the end of a name is enough."""
    found, known = list[str](), _names(model)
    for name in names:
        matches = [ours for ours, theirs in known.items() if theirs.endswith(name)]
        if not matches:
            short = sorted({theirs.rpartition(".")[2] for theirs in known.values()})
            raise InputError(unknown_name("module in modules_to_save", name, short))
        found += matches
    return [
        one for one in dict.fromkeys(found) if not _is_in(one, [other for other in found if other != one])
    ]


# -- apply -------------------------------------------------------------------------------------------------


def apply_lora(
    model: LanguageModel, config: LoraConfig, adapter: str = "default", *, draw: bool = True
) -> None:
    """Freeze a model and put an adapter beside some of its linear layers, in place. It alone is active then.

    The modules of `modules_to_save` become copies: a tied lm_head gets a weight of its own, as in PEFT.

    Args:
        adapter: a name, which no other adapter of the model has.
        draw: see LoraLinear.

    Raises:
        InputError: if `target_modules`, `layers_to_transform` or `modules_to_save` choose what is not there,
            or what is quantised and cannot be trained so. The model is as it was.
    """
    if adapter in adapter_names(model):
        raise InputError(f"the model has an adapter {adapter!r} already: give this one another name")
    chosen, saved = chosen_layers(model, config), _modules_to_save(model, config.modules_to_save)
    modules, replaced = dict(model.named_modules()), whole_modules(model)
    others = [*(name for name, _ in lora_layers(model)), *(name for name in replaced if name not in saved)]
    clash = [one for one in saved if _is_in(one, others) or any(_is_in(other, [one]) for other in others)]
    if clash := [*clash, *(one for one in chosen if _is_in(one, replaced))]:
        raise InputError(f"{clash[0]}: two adapters change it, and one of them replaces it (modules_to_save)")
    for name in saved:
        if not any(True for _ in modules[name].parameters()):
            raise InputError(f"modules_to_save: {name} is quantised: take the model's unquantised folder")
    if config.use_dora and any(modules[name].weight.dtype == torch.uint8 for name in chosen):
        raise InputError("use_dora needs weights of more than 4 bits: take int8, or the unquantised folder")
    model.requires_grad_(False)
    for name in chosen:
        parent, _, last = name.rpartition(".")
        setattr(modules[parent], last, LoraLinear(modules[name], config, adapter, draw))
    for name in saved:
        parent, _, last = name.rpartition(".")
        whole = replaced.setdefault(name, WholeModule(modules[parent], last, modules[name], {}))
        whole.copies[adapter] = copy.deepcopy(whole.original)
    set_adapter(model, adapter)


@dataclass
class WholeModule:
    """A module that adapters replace by copies of their own."""

    parent: nn.Module
    attribute: str  # of the parent, where it is
    original: nn.Module
    copies: dict[str, nn.Module]  # adapter -> its module

    def use(self, adapters: Sequence[str]) -> None:
        """Put the copy of one of these adapters in its place, or else the original."""
        present = next(getattr(self.parent, self.attribute).parameters())
        chosen = next((self.copies[name] for name in adapters if name in self.copies), self.original)
        setattr(self.parent, self.attribute, chosen.to(present.device))


def whole_modules(model: LanguageModel) -> dict[str, WholeModule]:
    """The modules that adapters replace: our name -> the original and the copies."""
    found: dict[str, WholeModule] = vars(model).setdefault("_whole_modules", {})
    return found


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """The layers with adapters, with our names; several of one name where there are several adapters."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name.replace(".base_layer", ""), module


# -- several adapters --------------------------------------------------------------------------------------


def adapter_names(model: LanguageModel) -> dict[str, bool]:
    """The adapters of a model -> whether they are active."""
    return {layer.adapter: layer.is_active for _, layer in lora_layers(model)}


def set_adapter(model: LanguageModel, adapter: str | Sequence[str]) -> None:
    """Let these adapters of a model count, and no others; they alone require gradients. Several are added.

    Raises:
        InputError: for a name that no adapter has; for several that cannot be added.
    """
    names = [adapter] if isinstance(adapter, str) else list(adapter)
    layers = _layers_of(model, names)
    _activate(model, names)
    model.requires_grad_(False)
    for layer in layers:
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(True)
    for whole in whole_modules(model).values():
        for name in whole.copies.keys() & set(names):
            whole.copies[name].requires_grad_(True)


def _layers_of(model: LanguageModel, names: Sequence[str]) -> list[LoraLinear]:
    """The layers of these adapters, which can be added."""
    known = adapter_names(model)
    for name in names:
        if name not in known:
            raise InputError(unknown_name("adapter", name, known))
    layers = [layer for _, layer in lora_layers(model) if layer.adapter in names]
    if len(names) > 1 and any(layer.use_dora for layer in layers):
        raise InputError(f"adapters with use_dora cannot be added: take one of {', '.join(names)}")
    for name, whole in whole_modules(model).items():
        if len(both := [one for one in names if one in whole.copies]) > 1:
            raise InputError(f"the adapters {' and '.join(both)} both replace {name}: take one of them")
    return layers


def _activate(model: LanguageModel, names: Sequence[str]) -> None:
    for _, layer in lora_layers(model):
        layer.is_active = layer.adapter in names
    for whole in whole_modules(model).values():
        whole.use(names)


@contextmanager
def disable_adapter(model: LanguageModel) -> Iterator[None]:
    """Meanwhile the model says what it says without its adapters."""
    active = [name for name, is_active in adapter_names(model).items() if is_active]
    _activate(model, [])
    try:
        yield
    finally:
        _activate(model, active)


@torch.no_grad()
def add_weighted_adapter(
    model: LanguageModel, adapters: Sequence[str], weights: Sequence[float], adapter: str
) -> LoraConfig:
    """Make one adapter of several, as PEFT's combination "linear" does. It alone is active then.

    A and B of each adapter are multiplied by the root of weight * scaling and added up. That is exact for one
    adapter and rough for several; their exact sum is `set_adapter` with several names.

    Args:
        weights: one for each adapter.
        adapter: the new one's name.

    Returns: its configuration, for `save_adapter`.

    Raises:
        InputError: for a name that no adapter has, unlike ranks, use_dora or modules_to_save.
    """
    if len(adapters) != len(weights) or not adapters:
        raise InputError(f"each adapter needs a weight: got {len(adapters)} adapters, {len(weights)} weights")
    layers, names = _layers_of(model, adapters), module_names(model)
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


# -- merge -------------------------------------------------------------------------------------------------


@torch.no_grad()
def merge_and_unload(model: LanguageModel) -> LanguageModel:
    """Add the active adapters to the weights and remove all, in place; returns the model, a plain one then.

    The logits stay the same, up to rounding. So a tied lm_head with an adapter gets a weight of its own.

    Raises:
        InputError: for quantised weights, before anything is changed; if a merged weight is not finite.
    """
    modules = dict(model.named_modules())
    outer = {
        name: module
        for name, module in modules.items()
        if isinstance(module, LoraLinear) and not name.endswith(".base_layer")
    }
    if not all(isinstance(layer.linear, nn.Linear) for layer in outer.values()):
        raise InputError(
            "quantised weights cannot take up an adapter: leave it beside them, or merge it into the model "
            "that was quantised"
        )
    table = modules[family_of(model.config).embedding.removesuffix(".weight")].weight
    for name, layer in outer.items():
        parent, _, last = name.rpartition(".")
        setattr(modules[parent], last, layer.linear)
        if not layer.has_active:
            continue
        merged = layer.merged_weight().to(layer.weight.dtype)
        if not merged.isfinite().all():
            raise InputError(f"{name}: the weight with its adapter is not finite")
        if layer.weight is table:
            layer.linear.weight = nn.Parameter(merged)
        else:
            layer.weight.copy_(merged)
    vars(model).pop("_whole_modules", None)
    config: Any = model.config
    if config.tie_word_embeddings and model.lm_head.weight is not table:
        model.config = replace(config, tie_word_embeddings=False)
    return model.requires_grad_(True)
