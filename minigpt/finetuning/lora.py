"""LoRA: low-rank adapters beside frozen weights (https://arxiv.org/abs/2106.09685), compatible with PEFT.

    apply_lora(model, LoraConfig(r=8, lora_alpha=16))     # now only the adapter requires gradients
    ...                                                   # train
    with disable_adapter(model):                          # the model without its adapters
        ...
    merge_and_unload(model)                               # a model whose weights include the adapter

A linear layer W becomes W + scaling * B A. A (r, in) is drawn at random, and B (out, r) is zero, so at first
the model's output does not change. `scaling` is alpha / r, or alpha / sqrt(r) with rsLoRA
(https://arxiv.org/abs/2312.03732). DoRA (https://arxiv.org/abs/2402.09353) also learns the norm of each row
of W + scaling * B A.

Adapters have names, and a model may have several. A layer with two adapters is a LoraLinear around another
LoraLinear. `set_adapter` chooses the active adapters, `add_weighted_adapter` combines several into one.

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
    """Options of an adapter. Names and defaults are PEFT's.

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
        """Return the factor of the product of B and A."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class LoraLinear(nn.Module):
    """A frozen linear layer with an adapter.

    If the layer's weights have fewer bits, the adapter is float32, as in PEFT.

    Args:
        base: an nn.Linear, a quantised layer, or a LoraLinear. It is used directly, not copied.
        config: configuration with rank, scaling and dropout.
        adapter: name of the adapter.
        draw: False: do not initialise A and B, because their values will be set later.
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
        self.train(base.training)  # sets the mode of the dropout

    @property
    def linear(self) -> Any:
        """Return the inner layer without adapters."""
        return self.base_layer.linear if isinstance(self.base_layer, LoraLinear) else self.base_layer

    @property
    def weight(self) -> Tensor:
        """Return the layer's own weight without adapters, in its stored form, (N, K)."""
        weight: Tensor = self.linear.weight
        return weight

    @property
    def in_features(self) -> int:
        """Return the number of inputs, K."""
        return self.lora_A.shape[1]

    @property
    def out_features(self) -> int:
        """Return the number of outputs, N."""
        return self.lora_B.shape[0]

    @property
    def has_active(self) -> bool:
        """Return True if this adapter, or one inside it, is active."""
        return self.is_active or (isinstance(self.base_layer, LoraLinear) and self.base_layer.has_active)

    def float_weight(self) -> Tensor:
        """Return the layer's own weight in the dtype of the adapter, (N, K)."""
        linear = self.linear
        is_rounded = hasattr(linear, "dequantized")  # the inputs of int4 weights are padded
        weight: Tensor = linear.dequantized()[:, : self.in_features] if is_rounded else linear.weight
        return weight.to(self.lora_A.dtype)

    def delta(self) -> Tensor:
        """Return the adapter's change of the weight, (N, K), without the row norms of DoRA."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def merged_weight(self) -> Tensor:
        """Return the weight merged with this and the inner adapters, if they are active, (N, K)."""
        inner = self.base_layer
        total = inner.merged_weight() if isinstance(inner, LoraLinear) else self.float_weight()
        if self.is_active:
            total = total + self.delta()
            if self.use_dora:
                total = total * (self.lora_magnitude_vector / total.norm(dim=1))[:, None]
        return total

    def forward(self, x: Tensor) -> Tensor:
        """Compute the output, (..., K) -> (..., N)."""
        out: Tensor = self.base_layer(x)
        if not self.is_active:
            return out
        dropped = self.lora_dropout(x).to(self.lora_A.dtype)
        low = F.linear(F.linear(dropped, self.lora_A), self.lora_B) * self.scaling
        if self.use_dora:
            weight, bias = self.float_weight(), self.linear.bias
            # the norm is treated as a constant in the gradient, as in the paper (4.3) and in PEFT
            ratio = self.lora_magnitude_vector / (weight + self.delta()).norm(dim=1).detach()  # (N,)
            drops = self.training and not isinstance(self.lora_dropout, nn.Identity)
            plain = F.linear(dropped, weight) if drops else out if bias is None else out - bias
            low = (ratio - 1) * plain + ratio * low
        return (out + low).to(out.dtype)


# -- which layers ------------------------------------------------------------------------------------------


def _names(model: LanguageModel) -> dict[str, str]:
    """Map our names of all modules with weights, and of their parents, to Hugging Face's names."""
    found: dict[str, str] = {}
    for ours, (theirs, _) in weight_names(model).items():
        parts, their_parts = ours.split("."), theirs.split(".")
        for end in range(1, len(parts)):
            found[".".join(parts[:end])] = ".".join(their_parts[:end])
    return found


def module_names(model: LanguageModel) -> dict[str, str]:
    """Map our names of the linear layers (those of the blocks, and lm_head) to Hugging Face's names.

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
    """Return True if a name in target_modules means the layer with this name of Hugging Face's."""
    return f".{theirs}".endswith(f".{name}")


def _is_in(name: str, modules: Collection[str]) -> bool:
    """Return True if a module is one of `modules`, or inside one of them."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def chosen_layers(model: LanguageModel, config: LoraConfig) -> dict[str, str]:
    """Return the layers that get an adapter: our name -> Hugging Face's name.

    Raises:
        InputError: if no layer has a given name, or no layer is chosen.
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
    """Return our names of the modules that are trained whole. As in PEFT, the end of a name is enough."""
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
    """Freeze a model and add an adapter to some of its linear layers, in place. Only it is then active.

    Modules in `modules_to_save` are copied. As in PEFT, a tied lm_head then has its own weight.

    Args:
        adapter: a name that no other adapter of the model has.
        draw: see LoraLinear.

    Raises:
        InputError: if `target_modules`, `layers_to_transform` or `modules_to_save` choose nothing, or modules
            that cannot be trained because they are quantised. The model has not changed.
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
    """A module that adapters replace with copies."""

    parent: nn.Module
    attribute: str  # name of the module's attribute in the parent
    original: nn.Module
    copies: dict[str, nn.Module]  # adapter -> its copy

    def use(self, adapters: Sequence[str]) -> None:
        """Install the copy of one of these adapters, or the original if none has a copy."""
        present = next(getattr(self.parent, self.attribute).parameters())
        chosen = next((self.copies[name] for name in adapters if name in self.copies), self.original)
        setattr(self.parent, self.attribute, chosen.to(present.device))


def whole_modules(model: LanguageModel) -> dict[str, WholeModule]:
    """Return the modules that adapters replace: our name -> original and copies."""
    found: dict[str, WholeModule] = vars(model).setdefault("_whole_modules", {})
    return found


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Yield the layers with adapters, with our names. Layers of several adapters share a name."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name.replace(".base_layer", ""), module


# -- several adapters --------------------------------------------------------------------------------------


def adapter_names(model: LanguageModel) -> dict[str, bool]:
    """Return the names of a model's adapters -> True if the adapter is active."""
    return {layer.adapter: layer.is_active for _, layer in lora_layers(model)}


def set_adapter(model: LanguageModel, adapter: str | Sequence[str]) -> None:
    """Activate these adapters and no others. Only they require gradients. Several adapters are summed.

    Raises:
        InputError: if an adapter does not exist, or several cannot be summed.
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
    """Return the layers of these adapters. Raise InputError if the adapters cannot be summed."""
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
    """Deactivate all adapters in a with block."""
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
    """Combine several adapters into one, as PEFT's combination type "linear". Only it is then active.

    A and B of each adapter are multiplied by sqrt(weight * scaling) and summed. The result is exact for one
    adapter, and an approximation for several. `set_adapter` with several names gives the exact sum.

    Args:
        weights: one factor per adapter.
        adapter: name of the new adapter.

    Returns: the configuration of the new adapter, for `save_adapter`.

    Raises:
        InputError: if an adapter does not exist, ranks differ, or an adapter has use_dora or modules_to_save.
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
    """Add the active adapters to the weights, and remove all adapters, in place. Return the model.

    The logits stay the same, up to rounding. So a tied lm_head with an adapter gets its own weight.

    Raises:
        InputError: if weights are quantised (the model has not changed), or a merged weight is not finite.
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
