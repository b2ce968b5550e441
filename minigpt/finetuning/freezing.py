"""Freezes a model's parameters, except those of one kind of layer, of the last blocks, or with given names.

train_only(model, "last:2")         # train the last two blocks, the last norm and the head
train_only(model, "attention")      # train the attention layers of all blocks
train_only(model, r"model\\.layers\\.[01]\\.mlp\\..*")     # a regular expression for Hugging Face's names
"""

import re
from collections.abc import Callable

from torch import nn

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel, weight_names
from minigpt.finetuning.layers import pattern_of

__all__ = ["PARTS", "hugging_face_names", "train_only"]

# Part of a model -> regular expression. A parameter belongs to the part if the expression matches one word
# between the dots of its Hugging Face name, such as "attn" in transformer.h.0.attn.c_attn.weight.
PARTS = {
    "head": r"lm_head|score",
    "attention": r"\w*attn",
    "mlp": r"mlp",
    "norms": r"ln_\w+|\w*norm",
    "embeddings": r"wte|wpe|embed_tokens",
}


def hugging_face_names(model: LanguageModel) -> dict[str, nn.Parameter]:
    """Return a dict: Hugging Face's name -> parameter.

    If lm_head is tied to the embedding, the dict has this parameter under both names.
    """
    table = weight_names(model)
    own = dict(model.named_parameters(remove_duplicate=False))
    named = {theirs: own[ours] for ours, (theirs, _) in table.items() if ours in own}
    # A parameter that the table lacks keeps minigpt's name.
    return named | {name: own[name] for name in own if name not in table}


def train_only(model: LanguageModel, which: str) -> None:
    """Freeze all parameters except those that `which` selects, in place.

    A tied head and embedding are one tensor: which="head" and which="embeddings" both train this tensor.

    Args:
        which: selects the parameters to train, in one of three ways: a key of PARTS; `last:N` for the last N
            blocks, the last norm and the head; a regular expression that matches whole Hugging Face names.

    Raises:
        InputError: if `which` matches no parameter, or is not a valid regular expression.
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
    pattern = pattern_of(which, "train_only")
    return lambda name: pattern.fullmatch(name) is not None
