"""Next-token prediction in which samples have weights.

A sample is a conversation, or with --text a window (block_size tokens). The loss of a sample is the mean over
its targets, times the sample's weight. The loss of a step is the mean over its samples. Evaluations do not
use weights.

The weight of a sample is its field `weight` in the data file, times a factor for its keywords. With
--keyword_weight "plt:3,pd:2", this factor is 1 + 3 * (number of plt) + 2 * (number of pd). The formula is
from Hugging Face's course (https://huggingface.co/learn/llm-course/chapter7/6). There, both keywords have
weight 1.

Letters in shapes: B rows, T tokens, P targets that the loss counts.
"""

import itertools
from collections.abc import Iterable
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minigpt.data.batches import Batch, EncodedExamples
from minigpt.data.sample_weights import parse_keyword_weights
from minigpt.data.windows import TextPart
from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel
from minigpt.training.loss import NextTokenLoss, token_cross_entropy

__all__ = ["KeywordWeights", "WeightedBatch", "WeightedTokenLoss", "keyword_lines"]

_SEARCHED = 1 << 22  # largest number of tokens that `keyword_lines` searches in a text, from its start


class _Encoder(Protocol):
    def encode_array(self, text: str, /) -> npt.NDArray[np.int32]: ...

    def unknown_characters(self, text: str, /) -> list[str]: ...


class KeywordWeights:
    """Computes the weight of each row of ids from the keywords in the row.

    A keyword is found as a sequence of tokens, with or without a space before it. So with a byte-level
    tokenizer, `pd` is not found in `update`, which has other tokens. With a character vocabulary, a keyword
    is found inside words, too.

    Args:
        text: keywords with their weights, such as "plt:3,pd:2".
        tokenizer: the tokenizer of the ids.

    Raises:
        InputError: if the text is not valid, or the vocabulary lacks a character of a keyword.
    """

    def __init__(self, text: str, tokenizer: _Encoder) -> None:
        # keyword -> (weight, ids of the keyword with and without a space before it)
        self._keywords: dict[str, tuple[float, set[tuple[int, ...]]]] = {}
        for keyword, weight in parse_keyword_weights(text).items():
            if unknown := tokenizer.unknown_characters(keyword):
                raise InputError(
                    f"keyword_weight: the vocabulary lacks {unknown[0]!r} of the keyword {keyword!r}"
                )
            forms = [keyword]
            if not tokenizer.unknown_characters(f" {keyword}"):
                forms.append(f" {keyword}")
            self._keywords[keyword] = (weight, {tuple(tokenizer.encode_array(one).tolist()) for one in forms})

    def of(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return the weight of each row of ids: (B, T) -> (B,). Padding must be -1, which no keyword has."""
        weights = np.ones(len(ids))
        for weight, forms in self._keywords.values():
            weights += weight * _ends(ids, forms).sum(axis=1)
        return weights

    def counts(self, rows: Iterable[npt.NDArray[np.int64]]) -> dict[str, tuple[int, int]]:
        """Count the keywords in rows of ids, (T,) each.

        Returns: keyword -> (number of occurrences, number of rows that contain it).
        """
        found = dict.fromkeys(self._keywords, (0, 0))
        for ids in rows:
            for keyword, (_, forms) in self._keywords.items():
                if times := int(_ends(ids[None], forms).sum()):
                    found[keyword] = (found[keyword][0] + times, found[keyword][1] + 1)
        return found


def _ends(ids: npt.NDArray[np.int64], forms: Iterable[tuple[int, ...]]) -> npt.NDArray[np.bool_]:
    """Return a mask (B, T), True at each position of ids (B, T) where a keyword ends.

    `forms` has the keyword's ids, with and without a space before it. If two forms end at the same position,
    this counts as one keyword.
    """
    ends = np.zeros(ids.shape, dtype=np.bool_)
    for form in forms:
        width = ids.shape[1] - len(form) + 1
        if width > 0:
            found = [ids[:, place : place + width] == token for place, token in enumerate(form)]
            ends[:, len(form) - 1 :] |= np.all(found, axis=0)
    return ends


def keyword_lines(keywords: KeywordWeights, part: EncodedExamples | TextPart) -> tuple[str, str]:
    """Count the keywords in the training data. Return a line with the counts, and a warning.

    The warning names the keywords that do not occur; it is "" if all occur.

    In a long text, only the first 4 million tokens are searched.
    """
    if isinstance(part, EncodedExamples):
        spans = itertools.pairwise(part.starts.tolist())
        rows: Iterable[npt.NDArray[np.int64]] = (part.ids[a:b].astype(np.int64) for a, b in spans)
        where = f"{len(part):,} samples"
    else:
        length = min(len(part), _SEARCHED)
        starts = range(0, length, part.block_size)
        rows = (
            part.tokens.read(part.first + at, min(part.block_size, length - at)).astype(np.int64)
            for at in starts
        )
        where = f"{len(starts):,} windows"
    counts = keywords.counts(rows)
    shown = ", ".join(f"{word} {times:,} times in {some:,}" for word, (times, some) in counts.items())
    missing = [repr(word) for word, (times, _) in counts.items() if not times]
    warning = f"no sample has the keyword {', '.join(missing)}: its weight changes nothing" if missing else ""
    return f"keywords in {where}: {shown}", warning


class WeightedBatch(NamedTuple):
    """The tensors of a batch that the loss needs. P is the number of targets that the loss counts."""

    input_ids: Tensor  # (B, T) int64
    targets: Tensor  # (P,) int64: ids of these targets
    factors: Tensor  # (P,) float32: weight of the target's sample / number of targets of this sample
    positions: Tensor  # (P,) int64: positions of the targets in the flat B * T tokens


class WeightedTokenLoss(NextTokenLoss):
    """The loss of next-token prediction with a weight for each sample.

    Args:
        model: see NextTokenLoss.
        loss_on: see NextTokenLoss.
        device: see NextTokenLoss.
        weights: (N,), the weight of each training sample; None: all weights are 1.
        keywords: computes a factor of each row's weight from the row's keywords; None: no keywords.
    """

    def __init__(
        self,
        model: LanguageModel,
        loss_on: Literal["answer", "all"],
        device: torch.device,
        weights: npt.NDArray[np.float64] | None,
        keywords: KeywordWeights | None,
    ) -> None:
        super().__init__(model, loss_on, device)
        self._weights, self._keywords = weights, keywords

    def count(self, batch: Batch) -> int:
        """Return the number of samples that have at least one target."""
        return int(self._mask(batch).any(dim=1).sum())

    def weights_of(self, batch: Batch) -> npt.NDArray[np.float64]:
        """Return the weight of each row, (B,)."""
        weights = np.ones(len(batch.input_ids))
        # in a process without data, the batch has one placeholder row, and batch.rows is empty
        if len(batch.rows) and self._weights is not None:
            weights *= self._weights[batch.rows]
        if self._keywords is not None:
            first, rest = batch.input_ids[:, :1], batch.targets.where(batch.token_mask, -1)
            weights *= self._keywords.of(torch.cat([first, rest], dim=1).numpy())
        return weights

    def select(self, batch: Batch) -> WeightedBatch:  # type: ignore[override]
        """Return the tensors that `forward` needs: ids, the targets that count, factors, positions."""
        mask = self._mask(batch)  # (B, T)
        factors = torch.from_numpy(self.weights_of(batch)) / mask.sum(1).clamp(min=1)  # (B,)
        positions = mask.flatten().nonzero().flatten()  # (P,): P targets that count
        each = factors.float()[positions // mask.shape[1]]
        return WeightedBatch(batch.input_ids, batch.targets.flatten()[positions], each, positions)

    def example(self, device: torch.device) -> WeightedBatch:  # type: ignore[override]
        """Return a batch of the smallest possible size: one token."""
        ids = torch.zeros((1, 1), dtype=torch.int64, device=device)
        return WeightedBatch(ids, ids[0], torch.ones(1, device=device), ids[0])

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        factors: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Return the sum over samples of weight * mean loss. Without targets: hidden states, (B, T, C)."""
        hidden: Tensor = self.model.base_model(input_ids)  # (B, T, C)
        if targets is None:
            return hidden
        assert factors is not None
        assert positions is not None
        hidden = hidden.flatten(0, 1).index_select(0, positions)  # (P, C): P targets that count
        losses = token_cross_entropy(self.model.lm_head, hidden, targets, self._limit, self._multiple)  # (P,)
        return (losses * factors).sum()
