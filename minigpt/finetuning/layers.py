"""Functions for all kinds of adapters: add adapters to a model, switch them on and off, merge them.

    add_adapter(model, config)            # config: a LoraConfig, a BottleneckConfig or an IA3Config
    set_adapter(model, ["zh", "en"])      # both adapters are active, and their effects are summed
    with disable_adapter(model):          # the model without its adapters
        ...
    with adapters_by_row(model, [["zh"], ["en"], []]):    # a batch of three rows; row 3 has no adapter
        ...

An adapter puts a wrapper, an AdaptedLayer, around some linear layers. It may also replace whole modules by
trainable copies (`modules_to_save`). A model may have several adapters with different names. A linear layer
with two adapters has two wrappers, one around the other.

Letters in shapes: N outputs, K inputs of a linear layer.
"""

import copy
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from minigpt.errors import InputError, shown, unknown_name
from minigpt.families.registry import LanguageModel, family_of, weight_names

__all__ = [
    "AdaptedLayer", "AdapterConfig", "active_adapters", "adapted_layers", "adapter_names", "adapters_by_row",
    "add_adapter", "check_adapters", "disable_adapter", "is_called", "is_mergeable", "merge_and_unload",
    "module_names", "pattern_of", "set_adapter", "targeted", "whole_modules",
]  # fmt: skip


class AdaptedLayer(nn.Module):
    """A frozen linear layer with an adapter. Subclasses have the adapter's parameters.

    Args:
        base: an nn.Linear, a quantised layer, or an AdaptedLayer; used directly, not copied.
        adapter: name of the adapter.
    """

    is_linear = True  # True: the adapter is a linear function, so it can be merged into the layer's weight

    def __init__(self, base: Any, adapter: str) -> None:
        super().__init__()
        self.base_layer, self.adapter, self.is_active = base, adapter, True
        self.rows: Tensor | None = None  # (n,)  indices of the batch rows with this adapter; None: all rows

    def new_parameter(self, *shape: int) -> nn.Parameter:
        """Return an uninitialised parameter in float32, or in float64 if the layer's weight is in float64."""
        weight = self.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return nn.Parameter(torch.empty(shape, dtype=dtype, device=weight.device))

    @property
    def linear(self) -> Any:
        """Return the innermost layer: the linear layer itself, without the adapters around it."""
        return self.base_layer.linear if isinstance(self.base_layer, AdaptedLayer) else self.base_layer

    @property
    def weight(self) -> Tensor:
        """Return the linear layer's weight without adapters, (N, K). It may be quantised."""
        weight: Tensor = self.linear.weight
        return weight

    @property
    def in_features(self) -> int:
        """Return the number of inputs, K."""
        return int(self.linear.in_features)

    @property
    def out_features(self) -> int:
        """Return the number of outputs, N."""
        return int(self.linear.out_features)

    @property
    def actives(self) -> "list[AdaptedLayer]":
        """Return the active AdaptedLayers around the linear layer, up to this one, the innermost first."""
        inner = self.base_layer.actives if isinstance(self.base_layer, AdaptedLayer) else []
        return [*inner, self] if self.is_active else inner

    def float_weight(self) -> Tensor:
        """Return the linear layer's weight without adapters, (N, K), in the dtype of the adapter."""
        linear = self.linear
        # Quantised layers have a method `dequantized`. In int4, its result has columns of padding, which the
        # slice removes.
        is_rounded = hasattr(linear, "dequantized")
        weight: Tensor = linear.dequantized()[:, : self.in_features] if is_rounded else linear.weight
        return weight.to(next(self.parameters(recurse=False)).dtype)

    @property
    def cannot_be_added(self) -> str:
        """Return "" if this adapter's effect can be added to the effects of other adapters.

        Otherwise return the name of this kind of adapter, for an error message.
        """
        return ""

    def tensors(self) -> dict[str, nn.Parameter]:
        """Return a dict: end of a parameter's name in an adapter file -> the adapter's parameter."""
        raise NotImplementedError

    def entering(self, x: Tensor) -> Tensor:
        """Return what the linear layer reads instead of its inputs x (..., K). By default, return x."""
        return x

    def leaving(self, out: Tensor, x: Tensor) -> Tensor:
        """Return what replaces the linear layer's outputs `out` (..., N). By default, return `out`.

        x (..., K): the inputs, before `entering` changed them.
        """
        return out

    def merged_with(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return `weight` (N, K) and `bias` (N,) with this adapter merged into them."""
        raise NotImplementedError

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """Return weight (N, K) and bias (N,) with all active adapters merged, in the adapter's dtype."""
        weight, bias = self.float_weight(), self.linear.bias
        for layer in self.actives:
            weight, bias = layer.merged_with(weight, bias)
        return weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """Compute the output, (..., K) -> (..., N)."""
        if not self.is_active:
            out: Tensor = self.base_layer(x)
        elif self.rows is None:
            out = self.leaving(self.base_layer(self.entering(x)), x)
        else:
            own = x[self.rows]
            entered = self.entering(own)
            out = self.base_layer(x if entered is own else x.index_copy(0, self.rows, entered))
            out = out.index_copy(0, self.rows, self.leaving(out[self.rows], own))
        return out


class AdapterConfig(ABC):
    """The base class of the configurations of all kinds of adapters."""

    modules_to_save: tuple[str, ...]  # names of modules that the adapter replaces by trainable copies

    def of_family(self, model: LanguageModel) -> Self:
        """Return this configuration, completed with the defaults of the model's family, if there are any."""
        return self

    @abstractmethod
    def chosen_layers(self, model: LanguageModel) -> dict[str, str]:
        """Return the layers that get an adapter: minigpt's name -> Hugging Face's name."""

    @abstractmethod
    def new_layer(self, base: Any, theirs: str, adapter: str, draw: bool) -> AdaptedLayer:
        """Return the layer `base` with an adapter around it. `theirs` is the layer's Hugging Face name.

        draw=False: do not initialise the parameters, because their values will be set later.
        """

    def check_base(self, layers: Sequence[Any]) -> None:
        """Raise InputError if an adapter of this kind cannot be added to these layers."""
        del layers  # not used here: most kinds of adapters can be added to any linear layer


# -- which layers ------------------------------------------------------------------------------------------


def _names(model: LanguageModel) -> dict[str, str]:
    """Return a dict of modules that contain weights: minigpt's name -> Hugging Face's name."""
    found: dict[str, str] = {}
    for ours, (theirs, _) in weight_names(model).items():
        parts, their_parts = ours.split("."), theirs.split(".")
        for end in range(1, len(parts)):
            found[".".join(parts[:end])] = ".".join(their_parts[:end])
    return found


def module_names(model: LanguageModel) -> dict[str, str]:
    """Return the linear layers of the blocks, and lm_head: minigpt's name -> Hugging Face's name.

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
    """Return True if `name` is the full Hugging Face name `theirs`, or its last parts (c_attn, mlp.c_fc)."""
    return f".{theirs}".endswith(f".{name}")


def _is_in(name: str, modules: Collection[str]) -> bool:
    """Return True if a module is in the list `modules`, or inside a module of the list."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


_MOST_TRIES = 10**7
_LONG = 30  # number of characters that `_tries` assumes for a module's name
_PART = re.compile(r"\((?:\?(?:P?<\w+>|<?[=!:>])?)?|[*+]\??|\?\??|\{\d*,?\d*\}\??|.", re.DOTALL)
_LITERAL = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)


def pattern_of(text: str, key: str) -> re.Pattern[str]:
    """Compile a regular expression for modules' names. It may come from a stranger's adapter file.

    Args:
        key: name of the option that holds the expression, for the error message.

    Raises:
        InputError: if the expression is not valid, or if matching a name could take hours.
    """
    try:
        pattern = re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"{key}={shown(text)} is no regular expression: {error}") from None
    if _tries(text) > _MOST_TRIES:
        raise InputError(
            f"{key}={shown(text)} could match a name in too many ways: use fewer repeats, none within another"
        )
    return pattern


def _tries(text: str) -> float:
    """Estimate the number of ways in which `re` may try to match an expression with a module's name."""
    # A stack with an entry for the whole expression, and one for each "(" that is still open. An entry is:
    # (ways to match the alternatives before the newest "|", ways to match what follows this "|").
    groups = [(0.0, 1.0)]
    # repeats: number of "*", "+" and "{}" so far; last: ways to match the newest item (a character, a group)
    repeats, last = 0, 1.0
    for part in _PART.findall(_LITERAL.sub("x", text)):
        earlier, ways = groups[-1]
        if part[0] == "(":
            groups.append((0.0, 1.0))
        elif part == ")":
            if len(groups) == 1:
                return math.inf  # a ")" without an open group
            groups.pop()
            last = earlier + ways
            groups[-1] = (groups[-1][0], groups[-1][1] * last)
        elif part == "|":
            groups[-1] = (earlier + ways, 1.0)
        elif part[0] == "?":
            groups[-1], last = (earlier, ways * 2), last * 2
        elif part[0] in "*+{" and part not in ("{", "{}"):
            repeats += 1
            # There are about n**k / k! ways to divide n characters (_LONG) of a name among k repeats. So
            # repeat number k multiplies the ways by n / k. If the repeated item itself can match in several
            # ways, as in (a+)+, matching can take hours: inf.
            more = math.inf if last > 1 else max(2.0, _LONG / repeats)
            groups[-1], last = (earlier, ways * more), more
        else:
            last = 1.0
    return sum(groups[0])


def targeted(
    model: LanguageModel,
    target: str | tuple[str, ...],
    layers_to_transform: Sequence[int] = (),
    modules_to_save: Sequence[str] = (),
) -> dict[str, str]:
    """Return the linear layers that `target` selects: minigpt's name -> Hugging Face's name.

    Args:
        target: target_modules of an adapter's configuration: "all-linear" (all but lm_head), a tuple of
            layers' names, or a regular expression for Hugging Face's names.
        layers_to_transform: indices (from 0) of the blocks in which layers are chosen; empty: all blocks.
        modules_to_save: modules in which no layer is chosen.

    Raises:
        InputError: if no layer has a given name, or no layer is chosen.
    """
    whole = _modules_to_save(model, modules_to_save)
    names = {ours: theirs for ours, theirs in module_names(model).items() if not _is_in(ours, whole)}
    if target == "all-linear":
        found = {ours: theirs for ours, theirs in names.items() if ours != "lm_head"}
    elif isinstance(target, str):
        pattern = pattern_of(target, "target_modules")
        found = {ours: theirs for ours, theirs in names.items() if pattern.fullmatch(theirs)}
    else:
        for name in target:
            if not any(is_called(theirs, name) for theirs in names.values()):
                short = sorted({theirs.rpartition(".")[2] for theirs in names.values()})
                raise InputError(unknown_name("module in target_modules", name, short))
        found = {
            ours: theirs for ours, theirs in names.items() if any(is_called(theirs, name) for name in target)
        }
    if layers_to_transform:
        count = model.config.num_hidden_layers
        for number in layers_to_transform:
            if not 0 <= number < count:
                raise InputError(f"layers_to_transform names block {number}: the model has 0 to {count - 1}")
        wanted = {f".{number}." for number in layers_to_transform}
        found = {ours: theirs for ours, theirs in found.items() if any(number in ours for number in wanted)}
    if not found:
        raise InputError(f"target_modules={target!r} chooses no layer of this model")
    return found


def _modules_to_save(model: LanguageModel, names: Sequence[str]) -> list[str]:
    """Return minigpt's names of the modules whose Hugging Face names end with a name in `names`, as in PEFT.

    A module inside another module of the list is left out.
    """
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


# -- add -----------------------------------------------------------------------------------------------------


def add_adapter(
    model: LanguageModel, config: AdapterConfig, adapter: str = "default", *, draw: bool = True
) -> None:
    """Freeze a model, and add an adapter to some of its linear layers, in place. Deactivate other adapters.

    Modules in `modules_to_save` are copied, and the copies are trained. If one of them is lm_head or the
    embedding, lm_head and the embedding are no longer tied, as in PEFT.

    Args:
        adapter: a name that no other adapter of the model has.
        draw: False: do not initialise the adapter's parameters, because their values will be set later.

    Raises:
        InputError: if the configuration does not fit the model: for example, it chooses no layer, or a
            quantised module for modules_to_save. The model stays unchanged.
    """
    if adapter in adapter_names(model):
        raise InputError(f"the model has an adapter {adapter!r} already: give this one another name")
    chosen, saved = config.chosen_layers(model), _modules_to_save(model, config.modules_to_save)
    modules, replaced = dict(model.named_modules()), whole_modules(model)
    others = [*(name for name, _ in adapted_layers(model)), *(name for name in replaced if name not in saved)]
    clash = [one for one in saved if _is_in(one, others) or any(_is_in(other, [one]) for other in others)]
    if clash := [*clash, *(one for one in chosen if _is_in(one, replaced))]:
        raise InputError(f"{clash[0]}: two adapters change it, and one of them replaces it (modules_to_save)")
    for name in saved:
        if not any(True for _ in modules[name].parameters()):
            raise InputError(f"modules_to_save: {name} is quantised: take the model's unquantised folder")
    config = config.of_family(model)
    config.check_base([modules[name] for name in chosen])
    model.requires_grad_(False)
    for name, theirs in chosen.items():
        parent, _, last = name.rpartition(".")
        layer = config.new_layer(modules[name], theirs, adapter, draw)
        # A new module is in train mode. Give it the mode (train or eval) of the layer that it replaces.
        setattr(modules[parent], last, layer.train(modules[name].training))
    for name in saved:
        parent, _, last = name.rpartition(".")
        whole = replaced.setdefault(name, WholeModule(modules[parent], last, modules[name], {}))
        whole.copies[adapter] = copy.deepcopy(whole.original)
    set_adapter(model, adapter)


@dataclass
class WholeModule:
    """A module that is in `modules_to_save` of one or more adapters, and each adapter's own copy of it."""

    parent: nn.Module
    attribute: str  # name of the parent's attribute that holds the module
    original: nn.Module
    copies: dict[str, nn.Module]  # adapter -> its copy of the module

    def of(self, adapters: Sequence[str]) -> nn.Module:
        """Return the copy of the first adapter in `adapters` that has a copy, or else the original module."""
        present = next(getattr(self.parent, self.attribute).parameters())
        found = next((self.copies[name] for name in adapters if name in self.copies), self.original)
        return found.to(present.device)

    def use(self, adapters: Sequence[str]) -> None:
        """Put the module that `of` returns into the model."""
        setattr(self.parent, self.attribute, self.of(adapters))


def whole_modules(model: LanguageModel) -> dict[str, WholeModule]:
    """Return the modules that adapters have copied (modules_to_save): minigpt's name -> WholeModule.

    The result is the model's own dictionary, not a copy.
    """
    found: dict[str, WholeModule] = vars(model).setdefault("_whole_modules", {})
    return found


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Yield (minigpt's name of a linear layer, its AdaptedLayer); two pairs for a layer with two adapters."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLayer):
            yield name.replace(".base_layer", ""), module


# -- several adapters --------------------------------------------------------------------------------------


def adapter_names(model: LanguageModel) -> dict[str, bool]:
    """Return a dict: name of each adapter of a model -> True if the adapter is active."""
    return {layer.adapter: layer.is_active for _, layer in adapted_layers(model)}


def active_adapters(model: LanguageModel) -> list[str]:
    """Return the names of the active adapters."""
    return [name for name, is_active in adapter_names(model).items() if is_active]


def check_adapters(model: LanguageModel, names: Sequence[str]) -> None:
    """Raise InputError if one of these adapters does not exist, or if they cannot be active together."""
    known = adapter_names(model)
    for name in names:
        if name not in known:
            raise InputError(unknown_name("adapter", name, known))
    if len(names) > 1:
        for _, layer in adapted_layers(model):
            if layer.adapter in names and (problem := layer.cannot_be_added):
                raise InputError(f"{problem} cannot be added: take one of {', '.join(names)}")
    for name, whole in whole_modules(model).items():
        if len(both := [one for one in names if one in whole.copies]) > 1:
            raise InputError(f"the adapters {' and '.join(both)} both replace {name}: take one of them")


def set_adapter(model: LanguageModel, adapter: str | Sequence[str]) -> None:
    """Activate only these adapters. Only their parameters then require gradients.

    Raises:
        InputError: if an adapter does not exist, or if the effects of several adapters cannot be summed.
    """
    names = [adapter] if isinstance(adapter, str) else list(adapter)
    check_adapters(model, names)
    _activate(model, names)
    model.requires_grad_(False)
    for _, layer in adapted_layers(model):
        if layer.adapter in names:
            for parameter in layer.parameters(recurse=False):
                parameter.requires_grad_(True)
    for whole in whole_modules(model).values():
        for name in whole.copies.keys() & set(names):
            whole.copies[name].requires_grad_(True)


def _activate(model: LanguageModel, names: Sequence[str]) -> None:
    for _, layer in adapted_layers(model):
        layer.is_active = layer.adapter in names
    for whole in whole_modules(model).values():
        whole.use(names)


@contextmanager
def disable_adapter(model: LanguageModel) -> Iterator[None]:
    """Deactivate all adapters in a with block."""
    active = active_adapters(model)
    _activate(model, [])
    try:
        yield
    finally:
        _activate(model, active)


@contextmanager
def adapters_by_row(model: LanguageModel, names: Sequence[Sequence[str]]) -> Iterator[None]:
    """Give each row of a batch its own adapters, in a with block.

    The frozen weights are applied to all rows together. Each adapter is applied to its own rows only.

    Args:
        names: for each row, the names of its adapters; an empty list: none.
    """
    device, rows_of = next(model.parameters()).device, dict[str, list[int]]()
    for row, each in enumerate(names):
        for name in each:
            rows_of.setdefault(name, []).append(row)
    rows = {
        name: None if len(some) == len(names) else torch.tensor(some, device=device)
        for name, some in rows_of.items()
    }
    layers = [layer for _, layer in adapted_layers(model)]  # searched only once, because this takes time
    before = [layer.is_active for layer in layers]
    active = [layer.adapter for layer in layers if layer.is_active]
    try:
        for layer in layers:
            layer.is_active, layer.rows = layer.adapter in rows, rows.get(layer.adapter)
        for whole in whole_modules(model).values():
            whole.use([name for name, some in rows.items() if some is None])
            partly = [(some, whole.copies[name]) for name, some in rows.items() if name in whole.copies]
            if partly and all(some is not None for some, _ in partly):
                setattr(whole.parent, whole.attribute, _ByRow(whole.of([]), partly))
        yield
    finally:
        for layer, is_active in zip(layers, before):
            layer.is_active, layer.rows = is_active, None
        for whole in whole_modules(model).values():
            whole.use(active)


class _ByRow(nn.Module):
    """Takes a module's place: copies of it compute some rows of a batch, the module itself the other rows."""

    def __init__(self, original: nn.Module, copies: Sequence[tuple[Any, nn.Module]]) -> None:
        super().__init__()
        self.original = original
        self._copies = copies  # pairs: (indices of rows (n,), the copy that computes these rows)

    @property
    def weight(self) -> Any:
        """Return the weight of the original module."""
        return self.original.weight

    def forward(self, x: Tensor) -> Tensor:
        """Compute a row with the copy that is listed for it, or else with the original module."""
        out: Tensor = self.original(x)
        for rows, module in self._copies:
            out = out.index_copy(0, rows, module(x[rows]))
        return out


# -- merge -------------------------------------------------------------------------------------------------


def is_mergeable(model: LanguageModel) -> bool:
    """Return True if `merge_and_unload` can merge the active adapters."""
    layers = [layer for _, layer in adapted_layers(model)]
    return all(isinstance(layer.linear, nn.Linear) for layer in layers) and all(
        layer.is_linear for layer in layers if layer.is_active
    )


@torch.no_grad()
def merge_and_unload(model: LanguageModel) -> LanguageModel:
    """Merge the active adapters into the weights, and remove all adapters, in place. Return the model.

    The logits stay the same, up to rounding. If lm_head is tied to the embedding and has an adapter, lm_head
    gets a weight of its own, because merging must not change the embedding.

    Raises:
        InputError: if weights are quantised or an adapter is not linear: the model then stays unchanged. If
            a merged weight is not finite: other layers may then be merged already.
    """
    modules = dict(model.named_modules())
    outer = {
        name: module
        for name, module in modules.items()
        if isinstance(module, AdaptedLayer) and not name.endswith(".base_layer")
    }
    if not all(isinstance(layer.linear, nn.Linear) for layer in outer.values()):
        raise InputError(
            "quantised weights cannot take up an adapter: leave it beside them, or merge it into the model "
            "that was quantised"
        )
    if not all(one.is_linear for layer in outer.values() for one in layer.actives):
        raise InputError(
            "bottlenecks are not linear, so weights cannot take them up: leave the adapter beside the model"
        )
    table = modules[family_of(model.config).embedding.removesuffix(".weight")].weight
    for name, layer in outer.items():
        parent, _, last = name.rpartition(".")
        setattr(modules[parent], last, layer.linear)
        if not layer.actives:
            continue
        weight, bias = layer.merged()
        merged = weight.to(layer.weight.dtype)
        if not merged.isfinite().all():
            raise InputError(f"{name}: the weight with its adapter is not finite")
        if layer.weight is table:
            layer.linear.weight = nn.Parameter(merged)
        else:
            layer.weight.copy_(merged)
        if bias is not None:
            layer.linear.bias.copy_(bias)
    vars(model).pop("_whole_modules", None)
    config: Any = model.config
    if config.tie_word_embeddings and model.lm_head.weight is not table:
        model.config = replace(config, tie_word_embeddings=False)
    return model.requires_grad_(True)
