"""How well a model predicts: exact sums of negative log-likelihood over all tokens, and over answers alone.

    report = evaluate_loss(model, encoded.in_order(128))
    print(report.answer.loss, report.answer.perplexity, report.all.bits_per_character)

The sums are taken in double precision over each token once, so that the result depends neither on how rows
are batched nor on padding. Which tokens count is decided by the batches (minigpt.data.batches); nothing is
generated here (see minigpt.evaluation.answers for that).

Letters in shapes: B rows, T tokens, C channels, V entries of the vocabulary, P counted positions.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch.nn import functional as F

from minigpt.data.batches import Batch
from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel

__all__ = ["LossReport", "LossSum", "Report", "evaluate_loss"]

_CHUNK = 2**24  # logits held at a time: 64 MiB in float32


@dataclass
class LossSum:
    """A sum over tokens and what follows from it."""

    nll: float = 0.0  # negative log-likelihood in nats, summed
    count: int = 0  # tokens

    @property
    def loss(self) -> float:
        """Nats per token; nan if there are none."""
        return self.nll / self.count if self.count else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss): between how many tokens the model hesitates, as it were."""
        return math.exp(self.loss) if self.loss < 709 else math.inf  # exp(710) is beyond a double

    @property
    def bits_per_character(self) -> float:
        """Loss in bits. A token is a character here; a closing <sep> counts as one."""
        return self.loss / math.log(2)

    def as_dict(self) -> dict[str, float | int | None]:
        """JSON-ready; what is not finite is None."""
        values = {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_character": self.bits_per_character,
        }
        return {**{k: v if math.isfinite(v) else None for k, v in values.items()}, "tokens": self.count}


class Report(Protocol):
    """The result of an evaluation, as sums: several processes add up theirs."""

    @property
    def loss(self) -> float:
        """The checkpoint with the lowest one is the best."""

    def sums(self) -> list[float]:
        """The sums of this process."""

    def set_sums(self, sums: Sequence[float]) -> None:
        """Put the sums of all processes in their place."""

    def metrics(self) -> dict[str, float]:
        """The numbers for metrics.jsonl, by their names there; `val_loss` is `loss`."""

    def shown(self) -> str:
        """One of them in words, for the line that says the loss."""


@dataclass
class LossReport:
    """Loss over all tokens that have one before them, and over the answers' characters and closing <sep>."""

    all: LossSum = field(default_factory=LossSum)
    answer: LossSum = field(default_factory=LossSum)
    loss_on: Literal["answer", "all"] = "all"

    @property
    def counted(self) -> LossSum:
        """The one of the two that `loss_on` names."""
        return self.answer if self.loss_on == "answer" else self.all

    @property
    def loss(self) -> float:
        """Nats per token that counts."""
        return self.counted.loss

    def sums(self) -> list[float]:
        """See `Report`."""
        return [self.all.nll, self.all.count, self.answer.nll, self.answer.count]

    def set_sums(self, sums: Sequence[float]) -> None:
        """See `Report`."""
        self.all, self.answer = LossSum(sums[0], int(sums[1])), LossSum(sums[2], int(sums[3]))

    def metrics(self) -> dict[str, float]:
        """See `Report`."""
        return {
            "val_loss": self.loss,
            "val_answer_loss": self.answer.loss,
            "val_all_loss": self.all.loss,
        }

    def shown(self) -> str:
        """See `Report`."""
        return f"perplexity {self.counted.perplexity:.2f}"


@torch.inference_mode()
def evaluate_loss(
    model: LanguageModel,
    batches: Iterable[Batch],
    device: torch.device | str = "cpu",
    finish: Callable[[LossReport], None] | None = None,
    loss_on: Literal["answer", "all"] = "all",
) -> LossReport:
    """Measure a model on batches. Dropout is off meanwhile; the model is left in the mode that it was in.

    lm_head, the largest product of a small model, is computed only at positions that count, in pieces, so
    that the memory stays bounded whatever the vocabulary.

    Args:
        finish: called with the sums: where each of several processes has some of the batches, it adds up.
        loss_on: the part that the report's own `loss` is about.

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
    hidden = model.base_model(batch.input_ids)[batch.token_mask]  # (B, T, C) -> (P, C)
    targets = batch.targets[batch.token_mask]  # (P,)
    answers = batch.answer_mask[batch.token_mask].cpu()  # (P,)
    rows = max(1, _CHUNK // model.config.vocab_size)
    pieces = []
    for some, goal in zip(torch.split(hidden, rows), torch.split(targets, rows)):
        logits = model.lm_head(some)  # (rows, V)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        pieces.append(F.cross_entropy(logits, goal, reduction="none").cpu())
    nll = torch.cat(pieces).double()  # (P,)
    report.all.nll += float(nll.sum())
    report.all.count += len(nll)
    report.answer.nll += float(nll[answers].sum())
    report.answer.count += int(answers.sum())
