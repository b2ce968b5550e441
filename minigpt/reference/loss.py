"""The loss of a language model."""

from typing import Any

import numpy

from minigpt.reference.attention import Array

__all__ = ["next_token_losses"]


def next_token_losses(logits: Array, targets: Array, np: Any = numpy) -> Array:
    """Return minus the log-probability of each target, in nats: logits (..., V), targets (...) -> (...).

    >>> next_token_losses(numpy.zeros((1, 4)), numpy.array([2])).round(4)  # four equally likely tokens: log 4
    array([1.3863])
    """
    shifted = logits - logits.max(axis=-1, keepdims=True)  # (..., V)
    score = np.take_along_axis(shifted, targets[..., None], axis=-1)[..., 0]  # (...)
    return np.log(np.exp(shifted).sum(axis=-1)) - score  # (...)
