"""How predictable data is before any model is trained: the loss of n-grams that are counted, not learned.

Interpolated n-grams after Witten and Bell (https://doi.org/10.1109/18.87000): a context seen c times with d
different followers says (count + d * shorter context's probability) / (c + d); the shortest says 1 / V. A
small GPT's loss is near that of the best order, whatever the language and the vocabulary; that makes it the
yardstick of `minigpt.training.sizing`. Counting takes about a second.

Legend: N tokens to count, M tokens to measure on, V entries of the vocabulary.
"""

import numpy as np
import numpy.typing as npt

__all__ = ["ngram_losses"]

Ids = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


def ngram_losses(
    train: npt.NDArray[np.integer],
    val: npt.NDArray[np.integer],
    vocab_size: int,
    counted: npt.NDArray[np.bool_] | None = None,
    orders: int = 5,
) -> list[float]:
    """Mean loss in nats a token of `val` under n-grams of order 1, 2, ..., counted in `train`.

    Ends with the first order that is worse than the one before: longer contexts are rarer still.

    Args:
        train: (N,) ids to count.
        val: (M,) ids to predict, each from those before it.
        vocab_size: V.
        counted: (M,) where the loss counts; everywhere, if it is not given.
        orders: the longest n.

    >>> a, b = np.array([0, 1] * 50), np.array([0, 1] * 5)
    >>> [round(loss, 2) for loss in ngram_losses(a, b, 2, orders=2)]  # a coin, then a certainty
    [0.69, 0.04]
    """
    chosen = np.ones(len(val), dtype=bool) if counted is None else counted
    probability = np.full(len(val), 1.0 / vocab_size)  # (M,)
    of_train, of_val = _Rolling(train), _Rolling(val)
    losses = []
    for _ in range(orders):
        context, gram = of_train.step()
        seen_context, seen_gram = of_val.step()
        grams, first, gram_counts = np.unique(gram, return_index=True, return_counts=True)
        contexts, counts = np.unique(context, return_counts=True)
        _, followers = np.unique(context[first], return_counts=True)  # of the same contexts, in their order
        count = _looked_up(grams, gram_counts, seen_gram)
        total = _looked_up(contexts, counts, seen_context)
        kinds = _looked_up(contexts, followers, seen_context)
        known = total > 0
        mixed = (count + kinds * probability) / np.maximum(total + kinds, 1)
        probability = np.where(known, mixed, probability)
        losses.append(float(-np.log(probability[chosen]).mean()))
        if len(losses) > 1 and losses[-1] > losses[-2]:
            break
    return losses


class _Rolling:
    """Hashes of the n - 1 tokens before each token and of all n, for n = 1, 2, ..."""

    def __init__(self, ids: npt.NDArray[np.integer]) -> None:
        self._ids = ids.astype(np.uint64) + np.uint64(1)
        self._n = 0
        self._context: Hashes = np.zeros(len(ids), dtype=np.uint64)

    def step(self) -> tuple[Hashes, Hashes]:
        if self._n:  # the token n - 1 places back joins the context; before the beginning there is 0
            joining = np.zeros_like(self._ids)
            joining[self._n :] = self._ids[: -self._n]
            self._context = _mixed(self._context ^ _mixed(joining + np.uint64(self._n << 40)))
        self._n += 1
        return self._context, _mixed(self._context ^ _mixed(self._ids))


def _mixed(values: Hashes) -> Hashes:
    """A round of SplitMix64's finaliser (https://doi.org/10.1145/2660193.2660195) and a constant."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    return values ^ values >> np.uint64(27)


def _looked_up(keys: Hashes, values: npt.NDArray[np.int64], wanted: Hashes) -> npt.NDArray[np.int64]:
    """The value of each wanted key; 0 where there is none. `keys` are sorted."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
