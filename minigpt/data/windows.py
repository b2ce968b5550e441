"""Turns a long sequence of tokens into batches of windows. A batch depends only on its number.

Legend: N tokens in a part (training or validation), T tokens in a window (block_size), W windows in an epoch,
B windows (rows) in a batch.

A window is T tokens. The target of each token is the token that follows. An epoch cuts the part into windows
that do not overlap. Each epoch starts at a new random offset, so the borders between windows change. Every
token is a target exactly once per epoch, except fewer than 2 T tokens at the two ends.

The W windows come in a random order. A list of W numbers could be too large for the memory. So a function
computes which window is the i-th one: a Feistel network (https://doi.org/10.1137/0217022). Two simpler ways
were rejected. With a * i + b modulo W, successive windows always have the same distance. Shuffling shards,
and then windows within each shard, leaves neighbouring texts close together.
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
_MEASURED = 1 << 13  # largest number of tokens of a batch in an evaluation; larger batches are not faster


@dataclass(frozen=True)
class TextPart:
    """Tokens `first` to `last` - 1 of a corpus, as batches of windows. The loss counts every target.

    Raises:
        InputError: if there is no token to predict.
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
        """Return the SHA-256 of the data that training uses: the ids, and the limits of the part."""
        return hashlib.sha256(f"{self.tokens.fingerprint} {self.first} {self.last}".encode()).hexdigest()

    def batch(self, rows: npt.NDArray[np.int64], pad_to: int = 0) -> Batch:
        """Build a batch of windows of block_size tokens. A window at the end of the part may be shorter.

        Args:
            rows: positions in the part at which the windows start, (B,) for B windows.
            pad_to: not used. Only data with examples of different lengths needs it.
        """
        T = self.block_size
        ids = np.zeros((len(rows), T + 1), dtype=np.int64)
        lengths = np.minimum(len(self) - rows, T + 1)  # (B,): number of ids to read for each window
        for row, (start, length) in enumerate(zip(rows.tolist(), lengths.tolist())):
            ids[row, :length] = self.tokens.read(self.first + start, length)
        width = int(lengths.max())
        both = torch.from_numpy(ids[:, :width])  # (B, T + 1): inputs [:, :-1], targets [:, 1:]
        mask = torch.from_numpy(np.arange(1, width) < lengths[:, None])  # (B, T): False for padding
        return Batch(both[:, :-1].contiguous(), both[:, 1:].contiguous(), mask, mask, rows)

    @property
    def rows(self) -> int:
        """Return the number of windows that an evaluation uses."""
        return -(-(len(self) - 1) // self.block_size)

    @property
    def answer_share(self) -> float:
        """Return the share of the targets that the loss counts: always 1.0 for a text."""
        return 1.0

    @property
    def mean_targets(self) -> float:
        """Return the mean number of targets per window, for the windows that `in_order` yields."""
        return (len(self) - 1) / self.rows

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Yield batches for an evaluation: every token except the first is a target once."""
        size = max(1, min(batch_size, _MEASURED // self.block_size))
        starts = np.arange(0, len(self) - 1, self.block_size)
        for first in range(0, len(starts), size):
            yield self.batch(starts[first : first + size])


class WindowPlan:
    """Decides which windows form batch number m, for every m from 0 on, epoch after epoch.

    Args:
        part: the tokens to train on.
        batch_size: largest number of windows of a batch. Sizes in one epoch differ by at most one window.
        tokens_per_batch: largest number of tokens of a batch; a single window may have more. 0: no limit.
        seed: decides the order, together with the part's fingerprint and the epoch.
    """

    def __init__(self, part: TextPart, *, batch_size: int, tokens_per_batch: int = 0, seed: int = 0) -> None:
        T, N = part.block_size, len(part)
        if tokens_per_batch:
            batch_size = max(1, min(batch_size, tokens_per_batch // T))
        self._width = T
        # Each epoch starts at a random offset below this number. If the part is shorter than two windows, the
        # offset is always 0.
        self._offsets = T if N >= 2 * T else 1
        # number of windows in an epoch; it does not depend on the offset
        self.windows = (N - T) // T if N >= 2 * T else 1
        self._batches = -(-self.windows // batch_size)
        self._entropy = (seed, int(part.fingerprint[:16], 16))
        self._epoch = -1
        self._offset, self._keys = 0, np.empty(0, dtype=np.uint64)

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return self._batches

    def rows(self, number: int) -> npt.NDArray[np.int64]:
        """Return the positions at which the windows of batch `number` start, (B,)."""
        epoch, position = divmod(number, len(self))
        if epoch != self._epoch:  # compute offset and keys of an epoch only once, to save time
            random = np.random.default_rng([*self._entropy, epoch])
            self._offset = int(random.integers(self._offsets))
            self._keys = random.integers(2**64, size=_ROUNDS, dtype=np.uint64)
            self._epoch = epoch
        first, last = (self.windows * p // len(self) for p in (position, position + 1))
        return self._offset + self._width * permuted(np.arange(first, last), self.windows, self._keys)

    def shapes(self, data: TextPart, pad_to: int = 0) -> list[tuple[int, int]]:
        """Return (number of rows, tokens of a row) of a typical batch, to estimate time and memory."""
        rows = -(-self.windows // len(self))
        return [(rows, min(self._width + 1, len(data)))]


def permuted(items: npt.NDArray[np.int64], count: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Return the numbers at the positions `items` of a random permutation of 0 to count - 1.

    The keys choose the permutation. A Feistel network permutes all numbers of 2 h bits, from 0 to 4^h - 1,
    where h is the smallest number for which 4^h is at least `count`. A result that is `count` or more goes
    through the network again until it is below `count` ("cycle walking"). As 4^h is at most 4 * count, a
    number goes through the network at most 4 times on average.
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
    """Hash 64-bit numbers: each bit of the input changes about half of the output's bits.

    This is the last step of SplitMix64 (https://doi.org/10.1145/2660193.2660195).
    """
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
