"""Masked language modelling (https://arxiv.org/abs/1810.04805): the model predicts hidden tokens of a text.

Some tokens are chosen at random. 80 % of them become [MASK], 10 % become a random token and 10 % do not
change. The model predicts all chosen tokens. If it predicted only tokens that became [MASK], it would learn
nothing about visible tokens.

In a character vocabulary, each token is one character. So the mask token is a character too: U+E000, which
occurs in no ordinary text. If a user types the six characters "[MASK]", `with_masks` replaces them by U+E000.

Letters in shapes: B rows, T tokens.
"""

from collections.abc import Callable, Sequence
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
SHOWN = "[MASK]"  # what a user types instead of MASK


class _Encoder(Protocol):
    def encode_array(self, text: str, /) -> npt.NDArray[np.int32]: ...

    def unknown_characters(self, text: str, /) -> list[str]: ...


def mask_token_id(tokenizer: _Encoder) -> int | None:
    """Return the id of [MASK], or None if the vocabulary has none."""
    if tokenizer.unknown_characters(MASK):  # the vocabulary was built without [MASK]
        return None
    ids = tokenizer.encode_array(MASK).tolist()
    return int(ids[0]) if len(ids) == 1 else None


def with_masks(text: str) -> str:
    """Replace each text "[MASK]" with MASK, the character of the mask token."""
    return text.replace(SHOWN, MASK)


def both_ways(input_ids: Tensor) -> Tensor:
    """Return an attention mask (B, T, T) that is all True, so that each token attends to all tokens."""
    B, T = input_ids.shape
    return torch.ones((1, 1, 1), dtype=torch.bool, device=input_ids.device).expand(B, T, T)


def hidden_count(tokens: int, probability: float) -> int:
    """Return how many tokens of a row are chosen: probability * tokens, but at least 1 if tokens > 0."""
    return min(tokens, max(1, round(probability * tokens)))


def mask_tokens(
    ids: Tensor,
    real: Tensor,
    keys: Sequence[Sequence[int]],
    mask_id: int,
    probability: float,
    words: Callable[[Sequence[int]], npt.NDArray[np.int64]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Hide some tokens of each row.

    Args:
        ids: (B, T) int64, on the CPU. They are not changed.
        real: (B, T) bool: False for padding.
        keys: for each row, a key that seeds its random choice.
        mask_id: id of [MASK]. Random tokens are drawn from the ids below it.
        probability: share of a row's tokens that is chosen; see `hidden_count`.
        words: None: single tokens are chosen. Otherwise whole words: at most `hidden_count` tokens, but at
            least one word. `words` is a function: ids of a row (n,) -> index of the word of each id (n,).

    Returns: the ids after hiding (B, T), and a bool tensor (B, T) that is True for the chosen tokens.
    """
    seen, chosen = ids.clone(), torch.zeros_like(real)
    for row, key in enumerate(keys):
        places = real[row].nonzero().flatten().numpy()  # (n,): positions of the row's real tokens
        count = hidden_count(len(places), probability)
        random = np.random.default_rng([*key])
        if words is None:
            taken = np.sort(random.permutation(places)[:count])
        else:
            taken = places[_some_words(words(ids[row, places].tolist()), count, random)]
            count = len(taken)
        share, others = random.random(count), random.integers(mask_id, size=count)
        old = ids[row, taken].numpy()
        new = np.where(share < 0.8, mask_id, np.where(share < 0.9, others, old))
        seen[row, taken], chosen[row, taken] = torch.from_numpy(new), True
    return seen, chosen


def _some_words(
    words: npt.NDArray[np.int64], count: int, random: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Choose words at random. Return the positions of their tokens.

    At most `count` tokens are chosen. Exception: if every word has more than `count` tokens, one word is
    chosen.

    Args:
        words: (n,), for each token the index of its word.
    """
    sizes = np.bincount(words)
    order = random.permutation(len(sizes))
    chosen, total = list[int](), 0
    for word in order.tolist():
        if total + sizes[word] <= count:
            chosen.append(word)
            total += sizes[word]
    return np.flatnonzero(np.isin(words, chosen or order[:1]))


class Filling(NamedTuple):
    """A token that the model proposes for one [MASK]."""

    token: int
    probability: float


@torch.inference_mode()
def fill_masks(model: LanguageModel, ids: Sequence[int], mask_id: int, top_k: int) -> list[list[Filling]]:
    """Return for each [MASK] the `top_k` most probable tokens. All [MASK]s are predicted in one forward pass.

    Args:
        ids: ids of the text, including [MASK]; at most max_position_embeddings ids.

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
    hidden = model.base_model(row, both_ways(row))[0, places]  # (M, C), M: number of [MASK]s
    model.train(was_training)
    scores = model.lm_head(hidden).float()  # (M, V)
    scores[:, mask_id] = -torch.inf
    best = scores.softmax(-1).topk(min(top_k, scores.shape[1] - 1))
    pairs = zip(best.indices.tolist(), best.values.tolist())
    return [[Filling(*each) for each in zip(tokens, values)] for tokens, values in pairs]
