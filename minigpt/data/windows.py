"""From a long row of tokens to batches of windows; each batch is a pure function of its number.

Legend: N tokens of a part, T tokens of a window (block_size), W windows of an epoch, B rows of a batch.

A window is T tokens and the T that follow them by one. An epoch cuts the part into windows that do not
overlap, from an offset that is drawn anew, so that the borders fall elsewhere each time: a token is a target
exactly once an epoch, but for less than 2 T at both ends. The W windows come in a random order that takes no
memory, however large W: a Feistel network (https://doi.org/10.1137/0217022) turns a window's turn into its
place. (A permutation a * i + b modulo W would need as little, but keeps equal distances between neighbours,
so that all windows of a batch would stand in a regular row; shuffling shards, then windows within them, keeps
neighbouring texts together.)
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from minigpt.data.batches import Batch
from minigpt.data.memory_mapped import Tokens
from minigpt.errors import InputError

__all__ = ["TextPart", "WindowPlan", "permuted"]

_ROUNDS = 8
_MEASURED = 1 << 13  # tokens that are evaluated at once, at most: more take memory and are no faster


@dataclass(frozen=True)
class TextPart:
    """Tokens `first` to `last` of a corpus, as batches of windows. Everything in them counts.

    Raises:
        InputError: if there is not one token to predict.
    """

    tokens: Tokens
    first: int
    last: int
    block_size: int

    def __post_init__(self) -> None:
        if len(self) < 2:
            raise InputError(f"{self.tokens.folder}: a part of {len(self)} tokens has none to predict")

    def __len__(self) -> int:
        return self.last - self.first

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what training sees: the ids and where the part begins and ends."""
        return hashlib.sha256(f"{self.tokens.fingerprint} {self.first} {self.last}".encode()).hexdigest()

    def batch(self, rows: npt.NDArray[np.int64], pad_to: int = 0) -> Batch:
        """The windows that begin at `rows`, counted from the part's beginning; the last may be shorter.

        Args:
            pad_to: not used: windows are of one length. (EncodedExamples has it.)
        """
        T = self.block_size
        ids = np.zeros((len(rows), T + 1), dtype=np.int64)
        lengths = np.minimum(len(self) - rows, T + 1)  # (B,)
        for row, (start, length) in enumerate(zip(rows.tolist(), lengths.tolist())):
            ids[row, :length] = self.tokens.read(self.first + start, length)
        width = int(lengths.max())
        both = torch.from_numpy(ids[:, :width])  # (B, T + 1)
        mask = torch.from_numpy(np.arange(1, width) < lengths[:, None])  # (B, T)
        return Batch(both[:, :-1].contiguous(), both[:, 1:].contiguous(), mask, mask, rows)

    @property
    def rows(self) -> int:
        """Windows of an evaluation."""
        return -(-(len(self) - 1) // self.block_size)

    @property
    def answer_share(self) -> float:
        """Everything counts. (EncodedExamples has this and the next one, for estimates.)"""
        return 1.0

    @property
    def mean_targets(self) -> float:
        """Tokens to predict of a window of `in_order`, on average."""
        return (len(self) - 1) / self.rows

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Every token but the first as a target once, for evaluation."""
        size = max(1, min(batch_size, _MEASURED // self.block_size))
        starts = np.arange(0, len(self) - 1, self.block_size)
        for first in range(0, len(starts), size):
            yield self.batch(starts[first : first + size])


class WindowPlan:
    """Which windows stand in batch number m, for every m from 0 on, epoch after epoch.

    Args:
        part: what to learn from.
        batch_size: windows of a batch, at most; those of an epoch differ by one at most.
        tokens_per_batch: tokens of a batch, at most, but for a single window; 0: no limit.
        seed: with the part's fingerprint and the epoch it decides the order.
    """

    def __init__(self, part: TextPart, *, batch_size: int, tokens_per_batch: int = 0, seed: int = 0) -> None:
        T, N = part.block_size, len(part)
        if tokens_per_batch:
            batch_size = max(1, min(batch_size, tokens_per_batch // T))
        self._width = T
        self._offsets = T if N >= 2 * T else 1  # a text of a single window, or less, cannot be moved
        self.windows = (N - T) // T if N >= 2 * T else 1  # W: as many for every offset
        self._batches = -(-self.windows // batch_size)
        self._entropy = (seed, int(part.fingerprint[:16], 16))
        self._epoch = -1
        self._offset, self._keys = 0, np.empty(0, dtype=np.uint64)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self._batches

    def rows(self, number: int) -> npt.NDArray[np.int64]:
        """Where the windows of batch `number` begin, (B,)."""
        epoch, position = divmod(number, len(self))
        if epoch != self._epoch:  # kept for speed alone: the answer does not depend on it
            random = np.random.default_rng([*self._entropy, epoch])
            self._offset = int(random.integers(self._offsets))
            self._keys = random.integers(2**64, size=_ROUNDS, dtype=np.uint64)
            self._epoch = epoch
        first, last = (self.windows * p // len(self) for p in (position, position + 1))
        return self._offset + self._width * permuted(np.arange(first, last), self.windows, self._keys)

    def shapes(self, data: TextPart, pad_to: int = 0) -> list[tuple[int, int]]:
        """Rows and tokens (targets and one more) of typical batches, to estimate time and memory from."""
        rows = -(-self.windows // len(self))
        return [(rows, min(self._width + 1, len(data)))]


def permuted(items: npt.NDArray[np.int64], count: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Each of 0 ... count - 1 -> another one of them, one to one, at random as the keys decide.

    A Feistel network permutes the numbers of 2 h bits; who lands outside is sent through it again, until he
    is inside ("cycle walking"). 4^h is less than 4 times the count, so that this takes 4 rounds on average.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    numbers = items.astype(np.uint64)
    outside = np.ones(len(numbers), dtype=bool)
    while outside.any():
        left, right = numbers[outside] >> half, numbers[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        numbers[outside] = left << half | right
        outside = numbers >= np.uint64(count)
    return numbers.astype(np.int64)


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (https://doi.org/10.1145/2660193.2660195): every bit decides every bit."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
