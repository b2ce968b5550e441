"""Records the activations of a model by name, and replaces them: ablation and patching.

    seen = record(model, ids, ["blocks.*.attn", "logits"])
    seen["blocks.3.attn"]                                        # (B, T, C), what the layer adds
    record(model, ids, ["logits"], {"blocks.3.attn": torch.zeros_like})          # without this layer
    record(model, ids, ["logits"], switched_off(model, layer=3, head=2))         # without this head
    other = record(model, other_ids)             # another text, with as many tokens as `ids`
    record(model, ids, ["logits"], {"blocks.3": other["blocks.3"]})              # patched: taken from `other`

The names are the same for both model families, for any precision, and with adapters:

    embeddings                       (B, T, C)     the input of the first block
    blocks.3.norm_1, norm_2          (B, T, C)     the inputs of attention and MLP
    blocks.3.attn.heads              (B, T, H, D)  for each head, the weighted mean of the values
    blocks.3.attn.probabilities      (B, H, T, T)  the attention weights; each row sums to 1
    blocks.3.attn, blocks.3.mlp      (B, T, C)     what attention and MLP add to the residual stream
    blocks.3                         (B, T, C)     the residual stream after the block
    norm                             (B, T, C)     the input of lm_head
    logits                           (B, T, V)

Forward hooks record the activations, so the models need no code for recording. PyTorch's fused attention does
not return the attention probabilities. To record or replace the probabilities, the model computes attention
step by step. No module returns the probabilities, so to replace them, the call of softmax is intercepted.

Letters in shapes: B rows, T tokens, C channels, H heads, D channels of a head, V entries of the vocabulary.
"""

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minigpt.errors import InputError, unknown_name
from minigpt.families.registry import LanguageModel, family_of

__all__ = ["Change", "activation_names", "read_logits", "record", "require_head", "switched_off"]

Change: TypeAlias = Tensor | Callable[[Tensor], Tensor]  # the new activation, or a function old -> new
_PROBABILITIES = "attn.probabilities"


def activation_names(model: LanguageModel) -> list[str]:
    """Return the names of all activations, in the order in which the model computes them."""
    parts = ("norm_1", _PROBABILITIES, "attn.heads", "attn", "norm_2", "mlp")
    blocks = range(model.config.num_hidden_layers)
    inside = [f"blocks.{layer}{end}" for layer in blocks for end in (*(f".{part}" for part in parts), "")]
    return ["embeddings", *inside, "norm", "logits"]


@torch.inference_mode()
def record(
    model: LanguageModel,
    input_ids: Tensor,
    names: Iterable[str] = ("*",),
    changes: Mapping[str, Change] | None = None,
) -> dict[str, Tensor]:
    """Run the model once, in eval mode, and return activations by name.

    Args:
        model: the model. Afterwards, the added hooks are removed, and its mode (train or eval) is restored.
        input_ids: (B, T).
        names: names, or patterns such as "blocks.*.mlp".
        changes: name -> a tensor that replaces the activation, or a function old -> new. Later parts of the
            model compute with the new activation. If it is recorded, `record` returns the new activation.

    Raises:
        InputError: if the model has no activation of a name, or a new activation has another shape.
    """
    every, changes = activation_names(model), changes or {}
    wanted = {name for pattern in names for name in _matching(pattern, every)}
    for name in changes:
        if name not in every:
            raise InputError(unknown_name("activation", name, every))
    found: dict[str, Tensor] = {}
    used = wanted | changes.keys()
    attentions: list[Tensor] | None = [] if any(one.endswith(_PROBABILITIES) for one in used) else None
    with _hooked(model, used, changes, found):
        hidden = model.base_model(input_ids, attentions=attentions)  # (B, T, C)
        model.lm_head(hidden)
    for layer, weights in enumerate(attentions or ()):
        found[f"blocks.{layer}.{_PROBABILITIES}"] = weights  # (B, H, T, T)
    return {name: found[name] for name in every if name in wanted}


def read_logits(
    model: LanguageModel, ids: Iterable[int], changes: Mapping[str, Change] | None = None
) -> Tensor:
    """Return the logits of one text in float32 on the CPU, ids (T) -> (T, V)."""
    return record(model, as_row(model, ids), ["logits"], changes)["logits"][0].float().cpu()


def as_row(model: LanguageModel, ids: Iterable[int]) -> Tensor:
    """Return ids as a batch of one row on the model's device, (1, T).

    Raises:
        InputError: if the text is empty, or longer than the model can read.
    """
    row, limit = list(ids), model.config.max_position_embeddings
    if not row:
        raise InputError("the text has no tokens: there is nothing to look at")
    if len(row) > limit:
        raise InputError(
            f"the text has {len(row):,} tokens, but the model reads at most {limit:,}: shorten it"
        )
    return torch.tensor([row], device=next(model.parameters()).device)


def switched_off(model: LanguageModel, layer: int, head: int | None = None) -> dict[str, Change]:
    """Return the changes that switch off a head or a whole layer, for the argument `changes` of `record`.

    The output of the head, or of the layer's attention and MLP, becomes 0.

    Raises:
        InputError: if there is no such layer or head.
    """
    require_head(model, layer, head)
    if head is None:
        return {f"blocks.{layer}.attn": torch.zeros_like, f"blocks.{layer}.mlp": torch.zeros_like}

    def without(heads: Tensor) -> Tensor:
        heads = heads.clone()
        heads[:, :, head] = 0
        return heads

    return {f"blocks.{layer}.attn.heads": without}


def require_head(model: LanguageModel, layer: int | None, head: int | None = None) -> None:
    """Raise InputError if a layer or a head does not exist. Layers and heads count from 0."""
    sizes = (
        ("layer", layer, model.config.num_hidden_layers),
        ("head", head, model.config.num_attention_heads),
    )
    for name, number, count in sizes:
        if number is not None and not 0 <= number < count:
            raise InputError(f"{name} {number} does not exist: the model has {name}s 0 to {count - 1}")


def _matching(pattern: str, every: list[str]) -> list[str]:
    found = fnmatch.filter(every, pattern)
    if not found:
        raise InputError(unknown_name("activation", pattern, every))
    return found


@contextmanager
def _hooked(
    model: LanguageModel, names: Iterable[str], changes: Mapping[str, Change], found: dict[str, Tensor]
) -> Iterator[None]:
    """Install hooks on the model for a `with` block. The hooks apply `changes` and write into `found`."""
    was_training = model.training
    with ExitStack() as hooks:
        for name in names:
            if name.endswith(_PROBABILITIES):
                if name in changes:
                    module, _ = _place(model, name.removesuffix(".probabilities"))
                    replaced = _ReplacedSoftmax(name, changes[name])
                    hooks.callback(module.register_forward_pre_hook(replaced.begin).remove)
                    hooks.callback(module.register_forward_hook(replaced.end, always_call=True).remove)
                continue
            module, is_input = _place(model, name)
            hook = _hook(name, changes.get(name), found, model.config.num_attention_heads, is_input)
            add: Any = module.register_forward_pre_hook if is_input else module.register_forward_hook
            hooks.callback(add(hook).remove)
        model.eval()
        try:
            yield
        finally:
            model.train(was_training)


class _ReplacedSoftmax(TorchFunctionMode):
    """Changes the attention probabilities of one layer by changing the results of softmax.

    This TorchFunctionMode is active only while the layer's attention runs. So it changes no other softmax.
    """

    def __init__(self, name: str, change: Change) -> None:
        self._name, self._change = name, change

    def begin(self, *_: Any) -> None:
        self.__enter__()  # type: ignore[no-untyped-call]

    def end(self, *_: Any) -> None:
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return (
            _changed(self._name, result, self._change)
            if getattr(func, "__name__", "") == "softmax"
            else result
        )


def _changed(name: str, value: Tensor, change: Change) -> Tensor:
    new = change(value) if callable(change) else change.to(value)
    if new.shape != value.shape:
        raise InputError(f"{name} has the shape {(*value.shape,)}: got {(*new.shape,)}")
    return new


def _place(model: LanguageModel, name: str) -> tuple[nn.Module, bool]:
    """Return the module of an activation, and True if the activation is the module's input, else False."""
    family = family_of(model.config)
    if name == "embeddings":
        return model.blocks[0], True
    if name == "norm":
        return model.get_submodule(family.final_norm), False
    if name == "logits":
        return model.lm_head, False
    _, layer, *part = name.split(".", 2)
    block = model.blocks[int(layer)]
    if not part:
        return block, False
    return block.get_submodule(family.block_parts[part[0]]), part[0] == "attn.heads"


def _hook(
    name: str, change: Change | None, found: dict[str, Tensor], heads: int, is_input: bool
) -> Callable[..., Any]:
    """Return a hook that records an activation. If `change` is given, the hook also changes the activation.

    With is_input=True, the hook is a forward pre-hook, for the module's input; otherwise a forward hook.
    """

    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any = None) -> Any:
        value: Tensor = inputs[0] if is_input else output
        shape = value.shape
        if name.endswith(".heads"):
            value = value.view(*shape[:-1], heads, -1)  # (B, T, H * D) -> (B, T, H, D)
        if change is not None:
            value = _changed(name, value, change)
        found[name] = value
        if change is None:
            return None
        value = value.reshape(shape)
        return (value, *inputs[1:]) if is_input else value

    return hook
