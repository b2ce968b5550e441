"""Losses for pairs of answers, such as DPO: the chosen answer becomes more probable than the rejected one.

The loss compares the model with a reference: the model before the first step. The reference's
log-probabilities of all answers are computed once. They are not saved: a resumed run computes them again from
the weights with which the run first began, and gets the same bits. A new adapter does not change the model's
output, so a run that trains an adapter has the base model as its reference.

Letters in shapes: B pairs, T tokens, C channels, P tokens of answers. A batch has 2 B rows: first the chosen
answers, then the rejected answers.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minigpt.console.terminal import ProgressLine
from minigpt.data.preferences import EncodedPreferences, PairBatch
from minigpt.errors import Message
from minigpt.families.registry import LanguageModel
from minigpt.finetuning.preferences import PER_TOKEN, WITHOUT_REFERENCE, LossType, preference_loss
from minigpt.training.loss import (
    Finish,
    Objective,
    logits_limit,
    token_cross_entropy,
    vocabulary_multiple,
)  # fmt: skip

__all__ = ["PairLossBatch", "PreferenceLoss", "PreferenceOptions", "PreferenceReport"]

_ROWS = 128  # number of rows per batch when the log-probabilities of the reference are computed


class PairLossBatch(NamedTuple):
    """The tensors of a batch of B pairs that the loss needs. P: number of tokens of all answers."""

    input_ids: Tensor  # (2 B, T) int64: rows of the chosen answers, then of the rejected answers
    targets: Tensor  # (P,) int64: ids of the answer tokens
    rows: Tensor  # (P,) int64: row of each answer token
    reference: Tensor  # (2, B) float32: the reference's log-probabilities of the answers: chosen, rejected
    positions: Tensor  # (P,) int64: index of each answer token in the flat 2 B * T targets


class PreferenceOptions(NamedTuple):
    """Options of `minigpt.finetuning.preferences.preference_loss`."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    loss_type: LossType = "sigmoid"
    simpo_gamma: float = 0.5


@dataclass
class PreferenceReport:
    """The result of an evaluation, as sums over pairs. The metrics have TRL's names."""

    pairs: float = 0.0
    total_loss: float = 0.0
    rewards: list[float] = field(default_factory=lambda: [0.0, 0.0])  # sums: chosen, rejected
    correct: float = 0.0  # number of pairs whose chosen answer has the higher reward
    # sums of log-probabilities: chosen, rejected
    logps: list[float] = field(default_factory=lambda: [0.0, 0.0])
    chosen_tokens: float = 0.0

    @property
    def loss(self) -> float:
        """Return the mean loss of a pair."""
        return self.total_loss / self.pairs

    def sums(self) -> list[float]:
        """Return the sums as a list, so that the processes can add them."""
        return [
            self.pairs, self.total_loss, *self.rewards, self.correct, *self.logps, self.chosen_tokens,
        ]  # fmt: skip

    def set_sums(self, sums: Sequence[float]) -> None:
        """Replace the sums of this process by the sums over all processes."""
        self.pairs, self.total_loss, *rest = sums
        self.rewards, self.correct, self.logps, self.chosen_tokens = rest[:2], rest[2], rest[3:5], rest[5]

    def metrics(self) -> dict[str, float]:
        """Return the metrics as a dictionary: name of the metric -> value.

        A reward is beta times the difference between the answer's log-probabilities in the model and in the
        reference. For a loss without reference, it is beta times the mean log-probability of the answer's
        tokens. `val_chosen_loss` is the mean cross-entropy of the chosen answers' tokens, so it can be
        compared with the loss of a run with --task sft.
        """
        n, (chosen, rejected) = self.pairs, self.rewards
        return {
            "val_loss": self.loss,
            "rewards/chosen": chosen / n,
            "rewards/rejected": rejected / n,
            "rewards/margins": (chosen - rejected) / n,
            "rewards/accuracies": self.correct / n,
            "logps/chosen": self.logps[0] / n,
            "logps/rejected": self.logps[1] / n,
            "val_chosen_loss": -self.logps[0] / self.chosen_tokens,
        }

    def shown(self) -> str:
        """Return the most important numbers as text, for the line that is printed at an evaluation."""
        found = self.metrics()
        values = {"accuracy": found["rewards/accuracies"], "margin": found["rewards/margins"]}
        return Message("accuracy {accuracy:.1%}  margin {margin:.3f}", **values)


class PreferenceLoss(Objective):
    """The loss of pairs of answers, such as DPO's. Only tokens of the answers count.

    Args:
        model: the model on its device, before the first step (with its adapter, if there is one). In this
            state it is also the reference.
        options: options of the loss.
        train: training pairs.
        val: validation pairs.
        device: device of the model.
        autocast: returns the context manager for a forward pass in training. It is used for the reference's
            log-probabilities of the training pairs, too.
        dry: True (--dry_run): nothing will be trained, so the reference is not computed.
    """

    def __init__(
        self,
        model: LanguageModel,
        options: PreferenceOptions,
        train: EncodedPreferences,
        val: EncodedPreferences,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        dry: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.options = model, options
        self._limit, self._multiple = logits_limit(device), vocabulary_multiple(device)
        self._reference = self._val_reference = torch.empty(0)
        if options.loss_type in WITHOUT_REFERENCE or dry:
            self._reference, self._val_reference = (torch.zeros(2, len(part)) for part in (train, val))
            return
        with ProgressLine("reference, pairs", len(train) + len(val), patience=2.0) as progress:
            with autocast():
                self._reference = self._read(train, device, lambda done: progress.update(done))
            self._val_reference = self._read(val, device, lambda done: progress.update(len(train) + done))

    @torch.no_grad()
    def _read(self, pairs: EncodedPreferences, device: torch.device, show: Callable[[int], None]) -> Tensor:
        """Compute the log-probabilities of all answers with the current weights: (2, N) float64, N pairs.

        Row 0 has the chosen answers, row 1 the rejected ones. `show` is called with the number of finished
        pairs.
        """
        found, done, was_training = torch.zeros((2, len(pairs)), dtype=torch.float64), 0, self.model.training
        self.model.eval()
        for batch in pairs.in_order(_ROWS):
            found[:, batch.rows], _ = self._measure(self.model, batch, device)
            done += len(batch.rows)
            show(done)
        self.model.train(was_training)
        return found

    def _measure(self, model: LanguageModel, batch: PairBatch, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return each answer's log-probability and number of tokens, (2, B) float64 each, on the CPU."""
        targets, rows, positions = _answers(batch)
        hidden = model.base_model(batch.input_ids.to(device)).flatten(0, 1)  # (2 B * T, C)
        hidden = hidden.index_select(0, positions.to(device))  # (P, C): P answer tokens
        losses = token_cross_entropy(model.lm_head, hidden, targets.to(device), self._limit).cpu().double()
        both = torch.stack([-losses, torch.ones_like(losses)])  # (2, P)
        sums = both.new_zeros(2, len(batch.input_ids)).index_add(1, rows, both).view(2, 2, -1)
        # Without pairs in this process, batch.rows is empty, and the batch has one placeholder pair:
        # leave it out.
        logps, counts = sums[:, :, : len(batch.rows)]
        return logps, counts

    def count(self, batch: PairBatch) -> int:
        """Return the number of pairs."""
        return len(batch.rows)

    def select(self, batch: PairBatch) -> PairLossBatch:
        """Return the arguments of `forward`: the answers' tokens, and the reference's log-probabilities."""
        targets, rows, positions = _answers(batch)
        reference = self._reference[:, batch.rows].float()
        return PairLossBatch(batch.input_ids, targets, rows, reference, positions)

    def example(self, device: torch.device) -> PairLossBatch:
        """Return a batch of the smallest possible size: one pair with one token per answer."""
        two = torch.arange(2, device=device)
        return PairLossBatch(two[:, None] * 0, two * 0, two, torch.zeros((2, 1), device=device), two)

    def evaluate(
        self,
        model: LanguageModel,
        batches: Iterable[PairBatch],
        device: torch.device,
        finish: Finish | None = None,
    ) -> PreferenceReport:
        """Measure the loss and the rewards on the validation data."""
        report, was_training = PreferenceReport(), model.training
        model.eval()
        try:
            with torch.inference_mode():
                for batch in batches:
                    logps, counts = self._measure(model, batch, device)
                    self._add(report, logps, self._val_reference[:, batch.rows], counts)
        finally:
            model.train(was_training)
        if finish is not None:
            finish(report)
        return report

    def _add(self, report: PreferenceReport, logps: Tensor, reference: Tensor, counts: Tensor) -> None:
        report.pairs += logps.shape[1]
        report.logps = [a + b for a, b in zip(report.logps, logps.sum(1).tolist())]
        report.chosen_tokens += float(counts[0].sum())
        means = (logps / counts, reference / counts)
        given = means if self.options.loss_type in PER_TOKEN else (logps, reference)
        report.total_loss += float(preference_loss(*given[0], *given[1], **self.options._asdict()).sum())
        gain = means[0] if self.options.loss_type in WITHOUT_REFERENCE else logps - reference
        rewards = self.options.beta * gain  # (2, B)
        report.rewards = [a + b for a, b in zip(report.rewards, rewards.sum(1).tolist())]
        report.correct += float((rewards[0] > rewards[1]).sum())

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        rows: Tensor | None = None,
        reference: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Return the summed loss of a batch of pairs, (). Without targets: the hidden states, (2 B, T, C)."""
        hidden: Tensor = self.model.base_model(input_ids)  # (2 B, T, C)
        if targets is None:
            return hidden
        assert rows is not None
        assert reference is not None
        assert positions is not None
        hidden = hidden.flatten(0, 1).index_select(0, positions)  # (P, C): P answer tokens
        losses = token_cross_entropy(self.model.lm_head, hidden, targets, self._limit, self._multiple)  # (P,)
        nothing = losses.new_zeros(len(input_ids))  # (2 B,)
        B = reference.shape[1]  # 0 if this process has no pair; then sum and gradient are 0
        logps = nothing.index_add(0, rows, -losses).view(2, -1)[:, :B]  # (2, B): chosen, rejected
        if self.options.loss_type in PER_TOKEN:
            counts = nothing.index_add(0, rows, torch.ones_like(losses)).view(2, -1)[:, :B]
            logps, reference = logps / counts, reference / counts
        return preference_loss(*logps, *reference, **self.options._asdict()).sum()


def _answers(batch: PairBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return three tensors (P,) on the CPU, for the P tokens of all answers in a batch.

    They are the tokens' ids, their rows, and their indices in the flat 2 B * T targets.
    """
    positions = batch.answer_mask.flatten().nonzero().flatten()
    return batch.targets.flatten()[positions], positions // batch.input_ids.shape[1], positions
