"""From logits to the next token. The functions take the logits (V,) of one position.

`filtered` applies temperature, then top_k, then top_p, as in transformers, and gives excluded tokens the
score -inf. Then `greedy` or `sample` chooses a token. The functions keep no random state. Instead, the caller
passes a random number, from `numpy.random.Generator.random()` or `jax.random.uniform(key)`.

Under jax.jit, top_k and top_p must be Python constants. The temperature may be an array.
"""

import math
from typing import Any

import numpy

from minigpt.reference.attention import Array, softmax

__all__ = ["check", "filtered", "greedy", "sample"]


def greedy(logits: Array, np: Any = numpy) -> Array:
    """Return the most likely token, (V,) -> (); in a tie, the token with the lowest id."""
    return np.argmax(logits)


def filtered(
    logits: Array, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, np: Any = numpy
) -> Array:
    """(V,) -> (V,): apply temperature (1: off), top_k (0: off), top_p (1: off). Excluded tokens become -inf.

    top_k=k keeps the k most likely tokens. top_p=p keeps just enough of the most likely tokens for a total
    probability of p (nucleus sampling, https://arxiv.org/abs/1904.09751, section 3.1).
    """
    logits = logits / temperature
    if top_k and top_k < logits.shape[0]:
        kth = np.sort(logits)[-top_k]  # the k-th highest score; a token with an equal score stays, too
        logits = np.where(logits < kth, -math.inf, logits)
    if top_p < 1:
        order = np.argsort(logits)  # (V,): indices, the most likely token last
        # the cumulative sum begins with the least likely token; tokens are excluded while it is <= 1 - top_p
        tail = np.cumsum(softmax(logits[order], np)) <= 1 - top_p  # (V,)
        tail = tail & (np.arange(order.shape[0]) < order.shape[0] - 1)  # never exclude the most likely token
        logits = np.where(tail[np.argsort(order)], -math.inf, logits)
    return logits


def sample(logits: Array, uniform: Array, np: Any = numpy) -> Array:
    """Draw a token from softmax(logits), (V,) -> (), with a random number 0 <= uniform < 1.

    The drawn token is the first at which the cumulative sum of probabilities exceeds `uniform`. So a token
    of probability 0 is never drawn.
    """
    cumulative = np.cumsum(softmax(logits, np))  # (V,)
    return np.argmax(cumulative > uniform * cumulative[-1])  # argmax returns the index of the first True


def check(temperature: float, top_k: int, top_p: float) -> None:
    """Raise ValueError for a value outside its range."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be above 0 and finite: got temperature={temperature!r}")
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0 (0: all): got top_k={top_k!r}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1: got top_p={top_p!r}")
