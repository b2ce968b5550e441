"""Confidence intervals of a metric, and tests of whether two models differ by more than chance.

    bootstrap(values)                         # (low, high) of the mean, 95 %
    bootstrap(nll, tokens)                    # (low, high) of sum(nll) / sum(tokens)
    paired(a, b)                              # a Difference: compares two models question by question
    mcnemar(only_a, only_b)                   # the p-value of McNemar's exact test

A model's score on other questions of the same kind would differ a little by chance. The interval says how
much. It is found by the bootstrap: the score is computed again for many random samples of the questions. The
seed of these samples is fixed, so the same values give the same interval.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from minigpt.errors import InputError

__all__ = ["Difference", "bootstrap", "mcnemar", "paired"]

Values = npt.NDArray[np.float64]
_SAMPLES = 2000
_AT_ONCE = 4_000_000  # largest number of random values that are in memory at the same time


def bootstrap(
    values: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    *,
    level: float = 0.95,
    samples: int = _SAMPLES,
    seed: int = 0,
    transform: Callable[[Values], Values] = lambda value: value,
) -> tuple[float, float]:
    """Return the bootstrap's confidence interval (by default 95 %) of sum(values) / sum(weights).

    Args:
        values: (N,), one value per question.
        weights: (N,), such as each question's number of tokens; None: all are 1, which gives the mean.
        transform: a function applied to the ratio, such as exp for perplexity.

    If all questions are right, or all wrong, every random sample gives the same number. The binomial
    distribution then gives the interval: with 30 of 30 right, it is from 0.884 to 1.
    """
    x = np.asarray(values, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    n, tail = len(x), (1 - level) / 2
    if not n:
        raise InputError("there is no question: nothing to compute an interval of")
    if weights is None and np.isin(x, (0.0, 1.0)).all() and x.min() == x.max():
        edge = tail ** (1 / n)
        return (edge, 1.0) if x[0] else (0.0, 1 - edge)
    if n == 1:
        return -math.inf, math.inf
    generator = np.random.default_rng(seed)
    rows = max(1, _AT_ONCE // n)
    found: list[Values] = []
    for start in range(0, samples, rows):
        drawn = generator.integers(0, n, (min(rows, samples - start), n), dtype=np.int32)
        found.append(x[drawn].sum(1) / w[drawn].sum(1))
    low, high = np.quantile(transform(np.concatenate(found)), [tail, 1 - tail])
    return float(low), float(high)


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p-value of McNemar's test.

    The p-value is the probability that two equally good models differ by at least as much as here.

    Args:
        only_a: number of questions that only the first model gets right.
        only_b: number of questions that only the second model gets right.

    >>> mcnemar(5, 5), mcnemar(0, 5)
    (1.0, 0.0625)
    """
    n, less = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, i) for i in range(less + 1))
    return float(min(1.0, 2 * tail / 2**n)) if n < 1000 else _of_logarithms(n, less)


def _of_logarithms(n: int, less: int) -> float:
    """Compute the p-value of `mcnemar` with logarithms, because 2**n is too large for a float if n is large.

    n: only_a + only_b; less: the smaller of only_a and only_b.
    """
    of = np.array([math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(less + 1)])
    return float(min(1.0, 2 * np.exp(of - n * math.log(2)).sum()))


@dataclass(frozen=True)
class Difference:
    """The difference of two models, measured question by question."""

    value: float  # mean score of the second model minus mean score of the first model
    low: float  # lower end of the 95 % interval
    high: float
    # p-value; the function `paired` says how it is computed
    p: float
    only_first: int  # number of questions on which the first model is better
    only_second: int
    count: int

    @property
    def is_clear(self) -> bool:
        """Return True if the difference is significant at 5 %."""
        return self.p < 0.05


def paired(first: npt.ArrayLike, second: npt.ArrayLike, seed: int = 0) -> Difference:
    """Compare two models on the same questions.

    Args:
        first, second: (N,), one score per question; higher is better.

    If all scores are 0 or 1, McNemar's test gives the p-value. Otherwise each of 10,000 trials gives random
    signs to the differences, because for equally good models, each difference could as well have the other
    sign. The p-value is the share of trials whose sum is at least as far from 0 as the real sum.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if len(a) != len(b) or not len(a):
        raise InputError(f"both models need the same questions: got {len(a)} and {len(b)}")
    differences = b - a
    only_first, only_second = int((differences < 0).sum()), int((differences > 0).sum())
    if np.isin(a, (0.0, 1.0)).all() and np.isin(b, (0.0, 1.0)).all():
        p = mcnemar(only_first, only_second)
    else:
        p = _by_signs(differences, seed)
    if not differences.any():
        low = high = 0.0
    else:
        low, high = bootstrap(differences, seed=seed) if not _is_degenerate(differences) else (
            (float(differences[0]),) * 2
        )  # fmt: skip
    return Difference(float(differences.mean()), low, high, p, only_first, only_second, len(a))


def _is_degenerate(differences: Values) -> bool:
    return bool((differences == differences[0]).all())


def _by_signs(differences: Values, seed: int, samples: int = 10_000) -> float:
    generator, seen = np.random.default_rng(seed), abs(differences.sum())
    rows, as_far = max(1, _AT_ONCE // len(differences)), 0
    for start in range(0, samples, rows):
        signs = (
            generator.integers(0, 2, (min(rows, samples - start), len(differences)), dtype=np.int8) * 2 - 1
        )
        as_far += int((abs(signs @ differences) >= seen - 1e-12).sum())
    return (as_far + 1) / (samples + 1)
