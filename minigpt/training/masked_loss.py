"""The loss of masked language modelling: the model predicts hidden tokens from the tokens on both sides.

A window is `block_size` tokens of the text. The run's seed and the window's start in the text decide which of
its tokens are hidden. In each epoch the windows start at other positions, so other tokens are hidden. Every
evaluation hides the same tokens.

Letters in shapes: B rows, T tokens, C channels, P hidden tokens.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minigpt.data.batches import Batch
from minigpt.data.words import WordFinder
from minigpt.evaluation.loss import LossReport, evaluate_loss
from minigpt.families.registry import LanguageModel
from minigpt.finetuning.masked_lm import both_ways, hidden_count, mask_tokens
from minigpt.training.loss import (
    Finish,
    Objective,
    logits_limit,
    summed_cross_entropy,
    vocabulary_multiple,
)  # fmt: skip

__all__ = ["MaskedBatch", "MaskedTokenLoss"]


class MaskedBatch(NamedTuple):
    """The tensors of a batch that the loss needs. P is the number of hidden tokens."""

    input_ids: Tensor  # (B, T) int64, with P tokens hidden
    targets: Tensor  # (P,) int64: the original ids of the hidden tokens
    positions: Tensor  # (P,) int64: index of each hidden token in input_ids.flatten()


class MaskedTokenLoss(Objective):
    """The loss of masked language modelling.

    Args:
        model: the model, used with attention to both sides.
        mask_id: id of [MASK], the last id of the vocabulary.
        probability: share of a window's tokens that are hidden.
        seed: together with a window's start in the text, it decides which tokens are hidden.
        device: device of the model.
        words: finds the words of a row, so that whole words are hidden; None: hide single tokens.
    """

    def __init__(
        self,
        model: LanguageModel,
        mask_id: int,
        probability: float,
        seed: int,
        device: torch.device,
        words: WordFinder | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self._mask_id, self._probability, self._seed = mask_id, probability, seed
        self._words = None if words is None else words.of
        self._limit, self._multiple = logits_limit(device), vocabulary_multiple(device)

    def hide(self, batch: Batch) -> Batch:
        """Return a batch with some tokens of each row hidden.

        Its targets are the original ids of all tokens. Both of its masks are True for the hidden tokens only.
        """
        # a process without data has a batch whose `rows` is empty: nothing is hidden there
        keys = [(self._seed, int(start)) for start in batch.rows]
        seen, chosen = mask_tokens(
            batch.input_ids, batch.token_mask, keys, self._mask_id, self._probability, self._words
        )
        return Batch(seen, batch.input_ids, chosen, chosen, batch.rows)

    def count(self, batch: Batch) -> int:
        """Return the number of hidden tokens."""
        if self._words is not None:  # the number of tokens depends on which words are hidden
            return int(self.hide(batch).token_mask.sum())
        lengths = batch.token_mask.sum(1).tolist()
        return sum(hidden_count(length, self._probability) for length in lengths)

    def select(self, batch: Batch) -> MaskedBatch:
        """Hide some tokens, and return the arguments of `forward`."""
        hidden = self.hide(batch)
        positions = hidden.token_mask.flatten().nonzero().flatten()
        return MaskedBatch(hidden.input_ids, hidden.targets.flatten()[positions], positions)

    def example(self, device: torch.device) -> MaskedBatch:
        """Return a batch of the smallest possible size: one hidden token."""
        ids = torch.zeros((1, 1), dtype=torch.int64, device=device)
        return MaskedBatch(ids, ids[0], ids[0])

    def evaluate(
        self,
        model: LanguageModel,
        batches: Iterable[Batch],
        device: torch.device,
        finish: Finish | None = None,
    ) -> LossReport:
        """Measure the loss over the hidden tokens of the validation windows."""
        both: Any = _BothWays(model)
        return evaluate_loss(both, map(self.hide, _unpadded(batches)), device, finish, "all")

    def forward(
        self, input_ids: Tensor, targets: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Return the summed cross-entropy of the hidden tokens."""
        assert targets is not None
        assert positions is not None
        hidden = self.model.base_model(input_ids, both_ways(input_ids)).flatten(0, 1)  # (B * T, C)
        hidden = hidden.index_select(0, positions)  # (P, C): only the hidden tokens
        return summed_cross_entropy(self.model.lm_head, hidden, targets, self._limit, self._multiple)


def _unpadded(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the rows of batches without padding, because attention to both sides would see the padding.

    A row that is shorter than the others becomes a batch of its own.
    """
    for batch in batches:
        lengths = batch.token_mask.sum(1)
        full = int((lengths == lengths.max()).sum())  # number of longest rows; shorter rows come last
        groups = [slice(0, full), *(slice(row, row + 1) for row in range(full, len(lengths)))]
        for group in groups:
            ids, targets, real, answers, rows = batch.some(group)
            T = max(1, int(real.sum(1).max()))
            yield Batch(ids[:, :T], targets[:, :T], real[:, :T], answers[:, :T], rows)


class _BothWays:
    """Wraps a model so that every token attends to all tokens. `evaluate_loss` calls it like a model."""

    def __init__(self, model: LanguageModel) -> None:
        self._model, self.config, self.lm_head = model, model.config, model.lm_head
        self.train, self.eval = model.train, model.eval

    training = property(lambda self: self._model.training)

    def base_model(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self._model.base_model(input_ids, both_ways(input_ids))
        return hidden
