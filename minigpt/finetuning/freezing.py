"""Which parameters are trained: all, some parts, the last blocks, or what a regular expression names.

train_only(model, "last:2")         # the last two blocks, the last norm and the head
train_only(model, "attention")
train_only(model, r"model\\.layers\\.[01]\\.mlp\\..*")     # Hugging Face's names
"""

import re
from collections.abc import Callable

from torch import nn

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel, weight_names

__all__ = ["PARTS", "hugging_face_names", "train_only"]

# part -> one of the steps of a Hugging Face name (transformer.h.0.attn.c_attn.weight has six) matches
PARTS = {
    "head": r"lm_head|score",
    "attention": r"\w*attn",
    "mlp": r"mlp",
    "norms": r"ln_\w+|\w*norm",
    "embeddings": r"wte|wpe|embed_tokens",
}


def hugging_face_names(model: LanguageModel) -> dict[str, nn.Parameter]:
    """The model's parameters under Hugging Face's names; a tied head is named, too."""
    table = weight_names(model)
    own = dict(model.named_parameters(remove_duplicate=False))
    named = {theirs: own[ours] for ours, (theirs, _) in table.items() if ours in own}
    return named | {name: own[name] for name in own if name not in table}  # the head of a classifier


def train_only(model: LanguageModel, which: str) -> None:
    """Freeze all parameters but some, in place.

    A tied head and embedding are one tensor: `head` and `embeddings` both train it.

    Args:
        which: a name of PARTS; `last:N`, the last N blocks with the last norm and the head; or a regular
            expression that matches whole names of Hugging Face's.

    Raises:
        InputError: if it matches no parameter, or is no regular expression.
    """
    names = hugging_face_names(model)
    matches = _matcher(which, model.config.num_hidden_layers)
    chosen = [parameter for name, parameter in names.items() if matches(name)]
    if not chosen:
        raise InputError(
            f"train_only={which!r} matches no parameter: give one of {', '.join(PARTS)}, last:N, or a "
            f"regular expression for names such as {next(iter(names))}"
        )
    model.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)


def _has_step(name: str, pattern: str) -> bool:
    return any(re.fullmatch(pattern, step) for step in name.split("."))


def _matcher(which: str, blocks: int) -> Callable[[str], bool]:
    if which in PARTS:
        return lambda name: _has_step(name, PARTS[which])
    if last := re.fullmatch(r"last:(\d+)", which):
        count = int(last[1])
        if not 1 <= count <= blocks:
            raise InputError(f"train_only={which}: the model has {blocks} blocks")
        numbers = {str(number) for number in range(blocks - count, blocks)}

        def is_late(name: str) -> bool:
            if block := re.search(r"\.(?:h|layers)\.(\d+)\.", name):
                return block[1] in numbers
            return not _has_step(name, PARTS["embeddings"])

        return is_late
    try:
        pattern = re.compile(which)
    except re.error as error:
        raise InputError(f"train_only={which!r} is no regular expression: {error}") from None
    return lambda name: pattern.fullmatch(name) is not None
