"""From pairs to batches: encoded once, cut into batches by length, each batch a pure function of its number.

Legend: N pairs, B rows of a batch, T its longest row less one (inputs and targets are shifted by one).

The order of training depends on nothing but the seed, the data and the number of the batch: a run that is
resumed at batch m meets exactly the batches that it would have met. There are no workers and no hidden state.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from minigpt.data.reader import Pair
from minigpt.devices import move
from minigpt.errors import InputError
from minigpt.tokenizer import Tokenizer

__all__ = ["Batch", "BatchPlan", "EncodedPairs", "encode_pairs"]


class Batch(NamedTuple):
    """One batch, padded on the right with 0 to its own longest row."""

    input_ids: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64: input_ids shifted by one
    token_mask: torch.Tensor  # (B, T) bool: the target is a real token
    answer_mask: torch.Tensor  # (B, T) bool: the target belongs to the answer or is the <sep> that closes it
    rows: npt.NDArray[np.int64]  # (B,): which pairs these are

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device; to a CUDA device the copy overlaps with computing."""
        ids, targets, tokens, answers, rows = self
        return Batch(
            move(ids, device), move(targets, device), move(tokens, device), move(answers, device), rows
        )


@dataclass(frozen=True)
class EncodedPairs:
    """All pairs as one long array of ids: question <sep> answer <sep>, question <sep> answer <sep>, ..."""

    ids: npt.NDArray[np.int32]  # all rows, one behind the other
    starts: npt.NDArray[np.int64]  # (N + 1,): row i is ids[starts[i]:starts[i + 1]]
    answer_starts: npt.NDArray[np.int64]  # (N,): where in its row the answer begins
    lines: npt.NDArray[np.int64]  # (N,): the line of the file that a row comes from
    n_cut: int  # rows that max_length shortened
    n_without_answer: int  # pairs left out, because max_length cut the whole answer away

    def __len__(self) -> int:
        return len(self.lines)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row, (N,)."""
        return np.diff(self.starts)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what training sees: the ids, and where rows and answers begin."""
        digest = hashlib.sha256()
        for array in (self.ids, self.starts, self.answer_starts):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def batch(self, rows: npt.NDArray[np.int64], pad_to: int = 0) -> Batch:
        """Rows -> tensors. `pad_to`: a fixed row length instead of the longest row's."""
        lengths = self.lengths[rows][:, None]  # (B, 1)
        width = max(pad_to, int(lengths.max()))
        column = np.arange(width)[None, :]  # (1, T + 1)
        real = column < lengths  # (B, T + 1)
        flat = np.where(real, self.starts[rows][:, None] + column, 0)
        ids = torch.from_numpy(np.where(real, self.ids[flat], 0).astype(np.int64))
        answer = real & (column >= self.answer_starts[rows][:, None])
        return Batch(
            input_ids=ids[:, :-1].contiguous(),
            targets=ids[:, 1:].contiguous(),
            token_mask=torch.from_numpy(real[:, 1:].copy()),
            answer_mask=torch.from_numpy(answer[:, 1:].copy()),
            rows=rows,
        )

    @property
    def rows(self) -> int:
        """Rows of an evaluation."""
        return len(self)

    @property
    def answer_share(self) -> float:
        """Of the tokens that have one before them, those that belong to answers."""
        return float((self.lengths - self.answer_starts).sum() / (self.lengths - 1).sum())

    @property
    def mean_targets(self) -> float:
        """Tokens to predict of a row, on average."""
        return float(self.lengths.mean()) - 1

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Every row once, by length, for evaluation."""
        order = np.argsort(self.lengths, kind="stable")
        for first in range(0, len(order), batch_size):
            yield self.batch(order[first : first + batch_size])


def encode_pairs(pairs: Sequence[Pair], tokenizer: Tokenizer, max_length: int) -> EncodedPairs:
    """Encode each pair as question <sep> answer <sep>, cut at max_length.

    Raises:
        InputError: if nothing is left to learn from.
    """
    sep = np.array([tokenizer.sep_token_id], dtype=np.int32)
    pieces: list[npt.NDArray[np.int32]] = []
    lengths, answer_starts, lines = [], [], []
    n_cut = n_without_answer = 0
    for pair in pairs:
        question = tokenizer.encode_array(pair.question)
        row = np.concatenate([question, sep, tokenizer.encode_array(pair.answer), sep])
        n_cut += len(row) > max_length
        row = row[:max_length]
        if len(row) <= len(question) + 1:
            n_without_answer += 1
            continue
        pieces.append(row)
        lengths.append(len(row))
        answer_starts.append(len(question) + 1)
        lines.append(pair.line)
    if not pieces:
        raise InputError(
            f"no pair has an answer left after cutting at max_length={max_length}; raise --max_length"
        )
    return EncodedPairs(
        ids=np.concatenate(pieces),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        answer_starts=np.array(answer_starts, dtype=np.int64),
        lines=np.array(lines, dtype=np.int64),
        n_cut=n_cut,
        n_without_answer=n_without_answer,
    )


class BatchPlan:
    """Which rows stand in batch number m, for every m from 0 on, epoch after epoch.

    With `by_length`, rows are sorted by length (ties broken at random, anew each epoch) and cut wherever
    `batch_size` rows or `tokens_per_batch` padded tokens are full; then the batches are shuffled. Sorting
    leaves the same sequence of lengths in every epoch, so the cuts, and the number of batches, never change.

    Args:
        data: the encoded pairs.
        batch_size: rows of a batch, at most.
        tokens_per_batch: padded tokens of a batch, at most; 0: no limit.
        pad_to: the fixed row length that `EncodedPairs.batch` will be given; 0: the longest row's.
        by_length: False shuffles the rows only, as the textbook loop does.
        seed: with the data's fingerprint and the epoch it decides the order.
    """

    def __init__(
        self,
        data: EncodedPairs,
        *,
        batch_size: int,
        tokens_per_batch: int = 0,
        pad_to: int = 0,
        by_length: bool = True,
        seed: int = 0,
    ) -> None:
        self._lengths = data.lengths
        self._by_length = by_length
        self._entropy = (seed, int(data.fingerprint[:16], 16))
        widths = np.sort(self._lengths) if by_length else np.full(len(data), self._lengths.max())
        widths = np.maximum(widths, pad_to)
        cuts = [0]
        for i, width in enumerate(widths):  # sorted: the row that comes last is the longest
            rows = i - cuts[-1] + 1
            if rows > batch_size or (tokens_per_batch and rows > 1 and rows * width > tokens_per_batch):
                cuts.append(i)
        self._cuts = np.array([*cuts, len(data)])
        self._epoch = -1
        self._order: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._shuffled: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self._cuts) - 1

    def rows(self, number: int) -> npt.NDArray[np.int64]:
        """The rows of batch `number`; an epoch is batches k * len(plan) up to (k + 1) * len(plan)."""
        epoch, position = divmod(number, len(self))
        if epoch != self._epoch:  # kept for speed alone: the answer does not depend on it
            random = np.random.default_rng([*self._entropy, epoch])
            shuffle = random.permutation(len(self._lengths))
            if self._by_length:
                shuffle = shuffle[np.argsort(self._lengths[shuffle], kind="stable")]
            self._order = shuffle
            self._shuffled = random.permutation(len(self))
            self._epoch = epoch
        first = self._shuffled[position]
        return self._order[self._cuts[first] : self._cuts[first + 1]]

    def shapes(self, data: EncodedPairs, pad_to: int = 0) -> list[tuple[int, int]]:
        """Rows and tokens of the longest row, of all batches of an epoch."""
        every = map(self.rows, range(len(self)))
        return [(len(rows), max(pad_to, int(data.lengths[rows].max()))) for rows in every]
