"""Cross-entropy without all logits at once: many are computed in pieces, and again for the gradient.

Letters in shapes: P positions, C channels, V entries of the vocabulary.
"""

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
) -> torch.Tensor:
    """The sum of -log p(target) over all positions, in float32 whatever the logits are in.

    Up to `limit` logits it is the plain computation. Beyond, each piece's logits are thrown away and computed
    again for the gradient: one more product with lm_head (a third of its cost) for memory that does not grow.

    Args:
        lm_head: hidden (P, C) -> logits (P, V), a linear layer.
        targets: (P,) int64.
    """
    vocab_size = int(lm_head.weight.shape[0])  # type: ignore[attr-defined]
    rows = max(1, limit // vocab_size)
    if len(hidden) <= rows:
        return _sum(lm_head, hidden, targets)
    pieces = zip(torch.split(hidden, rows), torch.split(targets, rows))
    # there is no dropout in here, hence no random state to keep
    again: Any = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.stack([checkpoint(_sum, lm_head, some, goal, **again) for some, goal in pieces]).sum()


def _sum(
    lm_head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    return F.cross_entropy(lm_head(hidden).float(), targets, reduction="sum")
