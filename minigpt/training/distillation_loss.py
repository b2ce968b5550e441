"""Distillation (https://arxiv.org/abs/1503.02531): the model learns a teacher's probabilities, too.

The loss of each target that counts, with the options alpha and temperature (t):

    alpha t² KL(teacher at t || model at t) + (1 - alpha) cross-entropy of the target

A temperature above 1 makes both distributions flatter, so that unlikely tokens count more. The gradient
becomes smaller by a factor of about t², and the factor t² in the loss restores its size. An evaluation
measures the cross-entropy alone, as without a teacher.

Letters in shapes: B rows, T tokens, C channels, P positions that count, V entries of the vocabulary.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel
from minigpt.training.loss import NextTokenLoss
from minigpt.weights.pretrained import AnyTokenizer, load_model, load_tokenizer

__all__ = ["DistillationLoss", "distillation_loss", "load_teacher"]


def distillation_loss(
    logits: Tensor, teacher: Tensor, targets: Tensor, alpha: float, temperature: float
) -> Tensor:
    """Return the loss of distillation, summed over all positions: a tensor without dimensions.

    Args:
        logits: logits of the model, (P, V).
        teacher: logits of the teacher, (P, V). If the two V differ, the comparison with the teacher uses the
            entries that both have.
        targets: ids of the correct tokens, (P,) int64.
    """
    loss = (1 - alpha) * F.cross_entropy(logits, targets, reduction="sum")
    shared = min(logits.shape[1], teacher.shape[1])
    ours, theirs = ((one[:, :shared] / temperature).log_softmax(1) for one in (logits, teacher))
    kl = F.kl_div(ours, theirs, reduction="sum", log_target=True)
    return loss + alpha * temperature**2 * kl


def load_teacher(folder: Path, tokenizer: AnyTokenizer, length: int) -> LanguageModel:
    """Load the model that teaches.

    Args:
        tokenizer: tokenizer of the model that learns.
        length: largest number of tokens of a row.

    Raises:
        InputError: if the teacher cannot be read, has another tokenizer, or its context is shorter than
            `length`.
    """
    if folder.is_file():
        raise InputError(f"--teacher {folder} is a file: give the folder of a model")
    if load_tokenizer(folder).fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"--teacher {folder} has another tokenizer than the model that learns, and so other "
            "tokens: give a teacher with the same vocabulary"
        )
    teacher = load_model(folder)
    context = teacher.config.max_position_embeddings
    if context < length:
        raise InputError(
            f"--teacher {folder} reads {context} tokens, and rows have up to {length}: lower --max_length "
            "(with --text: --block_size)"
        )
    return teacher.eval().requires_grad_(False)


class DistillationLoss(NextTokenLoss):
    """The loss of next-token prediction with a teacher.

    Args:
        model: its parameters that require gradients are trained.
        teacher: a model with the same tokenizer, on the same device.
        loss_on: see `NextTokenLoss`.
        device: device of model and teacher.
        alpha: weight of the teacher's part of the loss.
        temperature: temperature of the model's and the teacher's probabilities.
    """

    def __init__(
        self,
        model: LanguageModel,
        teacher: LanguageModel,
        loss_on: Literal["answer", "all"],
        device: torch.device,
        alpha: float = 0.5,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(model, loss_on, device)
        self._teacher = (teacher,)  # in a tuple, so that nn.Module does not find the teacher's parameters
        self._alpha, self._temperature = alpha, temperature
        self.other_bytes = sum(one.nbytes for one in [*teacher.parameters(), *teacher.buffers()])

    def forward(
        self, input_ids: Tensor, targets: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Return the summed loss of `targets` (P,)."""
        assert targets is not None
        (teacher,) = self._teacher
        with torch.no_grad():
            theirs = _at(teacher.base_model(input_ids), positions)
        ours = _at(self.model.base_model(input_ids), positions)
        rows = max(1, self._limit // (2 * self.model.config.vocab_size))
        pieces = [*zip(*(torch.split(one, rows) for one in (ours, theirs, targets)))]
        # If the logits are computed in pieces, their memory is freed after each piece. The backward pass then
        # computes them again, as in `summed_cross_entropy`.
        again: Callable[..., Any] = checkpoint if len(pieces) > 1 else _called
        more: dict[str, Any] = (
            {"use_reentrant": False, "preserve_rng_state": False} if len(pieces) > 1 else {}
        )
        losses = [again(self._piece, *piece, **more) for piece in pieces]
        return torch.stack(losses).sum() if losses else ours.sum() * 0

    def _piece(self, ours: Tensor, theirs: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = self._teacher[0].lm_head(theirs).float()
        logits = self.model.lm_head(ours).float()
        return distillation_loss(logits, teacher, targets, self._alpha, self._temperature)


def _at(hidden: Tensor, positions: Tensor | None) -> Tensor:
    hidden = hidden.flatten(0, 1)  # (B * T, C)
    return hidden if positions is None else hidden.index_select(0, positions)  # (P, C)


def _called(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    return function(*arguments)
