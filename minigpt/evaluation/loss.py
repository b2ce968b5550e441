"""Measures the loss of a model twice: on all tokens, and on the tokens of answers only.

    report = evaluate_loss(model, encoded.in_order(128))        # encoded: an EncodedExamples
    print(report.answer.loss, report.answer.perplexity, report.all.bits_per_character)

Each token counts once, and the sums are in float64. So the result does not depend on the size of the batches
or on padding. Each batch has two masks, which say which tokens count (minigpt/data/batches.py).

Letters in shapes: B rows, T tokens, C channels, V entries of the vocabulary, P positions whose loss counts.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch.nn import functional as F

from minigpt.data.batches import Batch
from minigpt.errors import InputError, Message
from minigpt.families.registry import LanguageModel

__all__ = ["LossReport", "LossSum", "Report", "evaluate_loss"]

_CHUNK = 2**24  # largest number of logits in memory at a time: 64 MiB in float32


@dataclass
class LossSum:
    """A sum of losses over tokens, with mean loss and perplexity."""

    nll: float = 0.0  # sum of the negative log-likelihood, in nats
    count: int = 0  # number of tokens

    @property
    def loss(self) -> float:
        """Loss in nats per token; nan without tokens."""
        return self.nll / self.count if self.count else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss): the number of equally likely tokens that would give the same loss."""
        return math.exp(self.loss) if self.loss < 709 else math.inf  # math.exp(710) is an OverflowError

    @property
    def bits_per_character(self) -> float:
        """Loss in bits per token. With the character tokenizer, a token is a character, hence the name."""
        return self.loss / math.log(2)

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the numbers as a dict that JSON can hold; NaN and infinity become None."""
        values = {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_character": self.bits_per_character,
        }
        return {**{k: v if math.isfinite(v) else None for k, v in values.items()}, "tokens": self.count}


class Report(Protocol):
    """The result of an evaluation. It consists of sums, so that results of several processes can be added."""

    @property
    def loss(self) -> float:
        """The loss by which the best checkpoint is chosen: lower is better."""

    def sums(self) -> list[float]:
        """Return the sums over this process's part of the data, to be added up over all processes."""

    def set_sums(self, sums: Sequence[float]) -> None:
        """Replace the sums of this process by the sums over all processes."""

    def metrics(self) -> dict[str, float]:
        """Return the metrics for metrics.jsonl: name of the metric -> value. `val_loss` is `self.loss`."""

    def shown(self) -> str:
        """Return metrics other than the loss, such as the perplexity, as text to print beside the loss."""


@dataclass
class LossReport:
    """Two losses: `all` of all tokens, `answer` of the tokens of answers, with the <sep> after each answer.

    The first token of a row is never counted, because no token predicts it.
    """

    all: LossSum = field(default_factory=LossSum)
    answer: LossSum = field(default_factory=LossSum)
    loss_on: Literal["answer", "all"] = "all"

    @property
    def counted(self) -> LossSum:
        """The loss that `loss_on` chooses: `all` or `answer`."""
        return self.answer if self.loss_on == "answer" else self.all

    @property
    def loss(self) -> float:
        """The loss that `loss_on` chooses, in nats per token."""
        return self.counted.loss

    def sums(self) -> list[float]:
        """Return the sums of this process, to be added up over all processes."""
        return [self.all.nll, self.all.count, self.answer.nll, self.answer.count]

    def set_sums(self, sums: Sequence[float]) -> None:
        """Replace the sums of this process by the sums over all processes."""
        self.all, self.answer = LossSum(sums[0], int(sums[1])), LossSum(sums[2], int(sums[3]))

    def metrics(self) -> dict[str, float]:
        """Return the metrics for metrics.jsonl as a dict: name of the metric -> value."""
        return {
            "val_loss": self.loss,
            "val_answer_loss": self.answer.loss,
            "val_all_loss": self.all.loss,
        }

    def shown(self) -> str:
        """Return the perplexity as text, to be printed in the line of the loss."""
        return Message("perplexity {value:.2f}", value=self.counted.perplexity)


@torch.inference_mode()
def evaluate_loss(
    model: LanguageModel,
    batches: Iterable[Batch],
    device: torch.device | str = "cpu",
    finish: Callable[[LossReport], None] | None = None,
    loss_on: Literal["answer", "all"] = "all",
) -> LossReport:
    """Measure the loss of a model on batches, in eval mode. The model's mode (train or eval) is restored.

    In a small model, lm_head takes most of the time. So lm_head is computed only at positions whose loss
    counts. It computes a limited number of positions at a time, so that the memory for logits is limited.

    Args:
        model: the model.
        batches: the batches.
        device: device of the model.
        finish: a function that is called with the report at the end. With several processes, this
            function replaces the report's sums by the sums over all processes.
        loss_on: the tokens that count in the report's `loss`: all tokens, or only tokens of answers.

    Raises:
        InputError: if no token counts.
    """
    report, device, was_training = LossReport(loss_on=loss_on), torch.device(device), model.training
    model.eval()
    try:
        for batch in batches:
            _add(report, model, batch.to(device))
    finally:
        model.train(was_training)
    if finish is not None:
        finish(report)
    if not report.all.count:
        raise InputError("there is nothing to measure the loss on: the batches hold no token that counts")
    return report


def _add(report: LossReport, model: LanguageModel, batch: Batch) -> None:
    hidden = model.base_model(batch.input_ids)[batch.token_mask]  # (B, T, C) -> (P, C): P tokens count
    targets = batch.targets[batch.token_mask]  # (P,)
    answers = batch.answer_mask[batch.token_mask].cpu()  # (P,)
    rows = max(1, _CHUNK // model.config.vocab_size)
    pieces = []
    for some, goal in zip(torch.split(hidden, rows), torch.split(targets, rows)):
        logits = model.lm_head(some)  # (n, V) for n of the P positions
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        pieces.append(F.cross_entropy(logits, goal, reduction="none").cpu())
    nll = torch.cat(pieces).double()  # (P,)
    report.all.nll += float(nll.sum())
    report.all.count += len(nll)
    report.answer.nll += float(nll[answers].sum())
    report.answer.count += int(answers.sum())
