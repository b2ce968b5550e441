"""Cross-entropy without all logits at once: many are computed in pieces, and again for the gradient.

A vocabulary of 50,257 is odd, and a GPU's matrix units want rows that begin at multiples of 16 bytes. So the
matrix may be padded with rows of zeros for the product (with autocast its weights are copied anyway), and the
logits that nobody asked for are cut off before the softmax: the saved model knows nothing of it, the loss and
the gradient are the same. A kernel that never writes the logits at all would be a dependency on Triton.

Letters in shapes: P positions, C channels, V entries of the vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

__all__ = ["summed_cross_entropy"]

_LOGITS = 2**26  # held at a time: 256 MiB in float32, and as much again for their gradient


def summed_cross_entropy(
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    targets: torch.Tensor,
    limit: int = _LOGITS,
    multiple: int = 1,
) -> torch.Tensor:
    """The sum of -log p(target) over all positions, in float32 whatever the logits are in.

    Up to `limit` logits it is the plain computation. Beyond, each piece's logits are thrown away and computed
    again for the gradient: one more product with lm_head (a third of its cost) for memory that does not grow.

    Args:
        lm_head: hidden (P, C) -> logits (P, V), a linear layer.
        targets: (P,) int64.
        multiple: of this the product's V is made one. 1: nothing is padded.
    """
    weight: torch.Tensor = lm_head.weight  # type: ignore[attr-defined]
    vocab_size = weight.shape[0]
    if vocab_size % multiple:
        padded = F.pad(weight, (0, 0, 0, -vocab_size % multiple))  # (V', C)  once for all pieces
        lm_head = functools.partial(_cut_product, padded, vocab_size)
    rows = max(1, limit // vocab_size)
    if len(hidden) <= rows:
        return _sum(lm_head, hidden, targets)
    pieces = zip(torch.split(hidden, rows), torch.split(targets, rows))
    # there is no dropout in here, hence no random state to keep
    again: Any = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.stack([checkpoint(_sum, lm_head, some, goal, **again) for some, goal in pieces]).sum()


def _cut_product(padded: torch.Tensor, vocab_size: int, hidden: torch.Tensor) -> torch.Tensor:
    return F.linear(hidden, padded)[:, :vocab_size]  # (rows, V') -> (rows, V)


def _sum(
    lm_head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    return F.cross_entropy(lm_head(hidden).float(), targets, reduction="sum")
