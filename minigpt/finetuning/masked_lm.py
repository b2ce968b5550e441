"""Masked language modelling (https://arxiv.org/abs/1810.04805): some tokens are hidden, all others are seen.

Of the chosen tokens 80 % become [MASK], 10 % any other token and 10 % stay; the model is to name all of them.
(At [MASK] alone it would learn nothing about the tokens that it sees.)

In the vocabulary [MASK] is a character of Unicode's private area: an entry of a vocabulary of characters is
one character. So no text that a user types becomes [MASK], except where `with_masks` makes it so.

Letters in shapes: B rows, T tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel

__all__ = [
    "MASK",
    "Filling",
    "both_ways",
    "fill_masks",
    "hidden_count",
    "mask_token_id",
    "mask_tokens",
    "with_masks",
]

MASK = "\ue000"
SHOWN = "[MASK]"  # what a user writes for it


class _Encoder(Protocol):
    def encode_array(self, text: str, /) -> npt.NDArray[np.int32]: ...

    def unknown_characters(self, text: str, /) -> list[str]: ...


def mask_token_id(tokenizer: _Encoder) -> int | None:
    """The id of [MASK]; None: the vocabulary has none."""
    ids = tokenizer.encode_array(MASK).tolist()
    return None if len(ids) != 1 or tokenizer.unknown_characters(MASK) else int(ids[0])


def with_masks(text: str) -> str:
    """A text in which each [MASK] is the token's character."""
    return text.replace(SHOWN, MASK)


def both_ways(input_ids: Tensor) -> Tensor:
    """The attention mask with which each of the tokens (B, T) sees all T: (B, T, T)."""
    B, T = input_ids.shape
    return torch.ones((1, 1, 1), dtype=torch.bool, device=input_ids.device).expand(B, T, T)


def hidden_count(tokens: int, probability: float) -> int:
    """How many of a row's tokens are chosen: at least one, if there is any."""
    return min(tokens, max(1, round(probability * tokens)))


def mask_tokens(
    ids: Tensor, real: Tensor, keys: Sequence[Sequence[int]], mask_id: int, probability: float
) -> tuple[Tensor, Tensor]:
    """Hide some tokens of each row.

    Args:
        ids: (B, T) int64, on the CPU; they are not changed.
        real: (B, T) bool: the others are padding.
        keys: of each row: what decides the choice, as a seed.
        mask_id: of [MASK]; the tokens that replace others have lower ids.
        probability: share of a row's tokens that is chosen; see `hidden_count`.

    Returns: what the model sees (B, T), and which tokens were chosen (B, T) bool.
    """
    seen, chosen = ids.clone(), torch.zeros_like(real)
    for row, key in enumerate(keys):
        places = real[row].nonzero().flatten().numpy()  # (n,)
        count = hidden_count(len(places), probability)
        random = np.random.default_rng([*key])
        taken = np.sort(random.permutation(places)[:count])
        share, others = random.random(count), random.integers(mask_id, size=count)
        old = ids[row, taken].numpy()
        new = np.where(share < 0.8, mask_id, np.where(share < 0.9, others, old))
        seen[row, taken], chosen[row, taken] = torch.from_numpy(new), True
    return seen, chosen


class Filling(NamedTuple):
    """A candidate for one [MASK]."""

    token: int
    probability: float


@torch.inference_mode()
def fill_masks(model: LanguageModel, ids: Sequence[int], mask_id: int, top_k: int) -> list[list[Filling]]:
    """The best candidates for each [MASK], the most probable first, while the others stay hidden.

    Args:
        ids: of the text, [MASK] included; at most as many as the model reads.

    Raises:
        InputError: if there is no [MASK], or if the text is too long.
    """
    places = [place for place, token in enumerate(ids) if token == mask_id]
    if not places:
        raise InputError(f"there is no {SHOWN} in the text: write it where a token is missing")
    limit = model.config.max_position_embeddings
    if len(ids) > limit:
        raise InputError(f"the text has {len(ids)} tokens, and the model reads {limit}")
    device = model.lm_head.weight.device
    row = torch.tensor([[*ids]], device=device)
    was_training = model.training
    model.eval()
    hidden = model.base_model(row, both_ways(row))[0, places]  # (M, C)
    model.train(was_training)
    scores = model.lm_head(hidden).float()  # (M, V)
    scores[:, mask_id] = -torch.inf
    best = scores.softmax(-1).topk(min(top_k, scores.shape[1] - 1))
    pairs = zip(best.indices.tolist(), best.values.tolist())
    return [[Filling(*each) for each in zip(tokens, values)] for tokens, values in pairs]
