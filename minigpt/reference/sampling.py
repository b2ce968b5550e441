"""From scores to the next token: functions on the logits (V,) of one position.

`filtered` applies temperature, then top_k, then top_p, with Hugging Face's meanings; what is left out becomes
-inf. Then `greedy` or `sample` chooses. The random number comes from outside, so nothing here keeps a state:
`numpy.random.Generator.random()` gives one, as does `jax.random.uniform(key)`.

Under jax.jit, top_k and top_p must be fixed when it compiles; the temperature may be traced.
"""

import math
from typing import Any

import numpy

from minigpt.reference.attention import Array, softmax

__all__ = ["check", "filtered", "greedy", "sample"]


def greedy(logits: Array, np: Any = numpy) -> Array:
    """The most likely token, (V,) -> (); of equals, the first."""
    return np.argmax(logits)


def filtered(
    logits: Array, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, np: Any = numpy
) -> Array:
    """(V,) -> (V,): temperature (1: off), the top_k most likely (0: all), those that sum to top_p (1: all).

    https://arxiv.org/abs/1904.09751 (nucleus sampling), section 3.1, is top_p.
    """
    logits = logits / temperature
    if top_k and top_k < logits.shape[0]:
        kth = np.sort(logits)[-top_k]  # ties with it stay: none is broken by chance
        logits = np.where(logits < kth, -math.inf, logits)
    if top_p < 1:
        order = np.argsort(logits)  # (V,)  the most likely last
        # Summed from the unlikely end: what stays below 1 - top_p in sum is the tail to be dropped.
        tail = np.cumsum(softmax(logits[order], np)) <= 1 - top_p  # (V,)
        tail = tail & (np.arange(order.shape[0]) < order.shape[0] - 1)  # but never the most likely
        logits = np.where(tail[np.argsort(order)], -math.inf, logits)
    return logits


def sample(logits: Array, uniform: Array, np: Any = numpy) -> Array:
    """Draw from softmax(logits), (V,) -> (), by a number 0 <= uniform < 1.

    It is the first token at which the cumulative sum exceeds that number. A token of probability 0 adds
    nothing to the sum, and so is never the first.
    """
    cumulative = np.cumsum(softmax(logits, np))  # (V,)
    return np.argmax(cumulative > uniform * cumulative[-1])  # of a row of False and True: the first True


def check(temperature: float, top_k: int, top_p: float) -> None:
    """Raise ValueError where one of them makes no sense."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be above 0 and finite: got temperature={temperature!r}")
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0 (0: all): got top_k={top_k!r}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1: got top_p={top_p!r}")
