"""Encodes conversations once, and groups them into batches by length.

Legend: N examples; B rows in a batch; T: number of tokens of the longest row of the batch, minus one (because
targets are shifted by one).

The order of training depends only on the seed, the data and the number of the batch. So a run that is resumed
at batch m gets the same batches as an uninterrupted run. There are no DataLoader workers.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from minigpt.data.conversation import Conversation, Exchange
from minigpt.devices import move
from minigpt.errors import InputError

__all__ = [
    "Batch", "BatchPlan", "ChatTokenizer", "EncodedExamples",
    "encode_conversation", "encode_conversations", "encode_prompt",
]  # fmt: skip


class ChatTokenizer(Protocol):
    """The tokenizer interface for encoding conversations. Tokenizer and BpeTokenizer implement it."""

    @property
    def sep_token_id(self) -> int | None:
        """Return the id of <sep>, or None if the tokenizer has none."""

    @property
    def eos_token_id(self) -> int | None:
        """Return the id that ends a text, or None if the tokenizer has none."""

    def encode_array(self, text: str, /) -> npt.NDArray[np.int32]:
        """Encode a text without adding special tokens."""


class Batch(NamedTuple):
    """One batch. Rows are padded on the right with 0 to the length of the longest row."""

    input_ids: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64: for each input id, the id that follows
    token_mask: torch.Tensor  # (B, T) bool: True if the target is a real token, not padding
    answer_mask: torch.Tensor  # (B, T) bool: True if the target is in an answer, or is the <sep> after it
    rows: npt.NDArray[np.int64]  # (B,): for each row, the index of its example in the encoded data

    def to(self, device: torch.device) -> "Batch":
        """Copy the batch to another device. A copy to a CUDA device is asynchronous."""
        ids, targets, tokens, answers, rows = self
        return Batch(
            move(ids, device), move(targets, device), move(tokens, device), move(answers, device), rows
        )

    def some(self, which: slice) -> "Batch":
        """Return a batch that has only the rows in the slice `which`."""
        ids, targets, tokens, answers, rows = self
        return Batch(ids[which], targets[which], tokens[which], answers[which], rows[which])

    def blank(self) -> "Batch":
        """Return a batch of the first row, with both masks all False, so that it adds nothing to the loss.

        Several processes share the rows of a batch and do each step together. A process that gets no row
        uses this batch.
        """
        nothing = torch.zeros_like(self.token_mask[:1])
        return Batch(self.input_ids[:1], self.targets[:1], nothing, nothing, self.rows[:0])


@dataclass(frozen=True)
class EncodedExamples:
    """All examples as one long array of ids: question <sep> answer <sep>, question <sep> answer <sep>, ..."""

    ids: npt.NDArray[np.int32]  # all rows, one after another
    # For each id: True if it belongs to an answer, or is the <sep> after an answer.
    is_answer: npt.NDArray[np.bool_]
    starts: npt.NDArray[np.int64]  # (N + 1,): row i is ids[starts[i]:starts[i + 1]]
    lines: npt.NDArray[np.int64]  # (N,): for each row, the number of its line in the data file
    n_cut: int  # number of rows that max_length shortened
    n_without_answer: int  # number of conversations left out, because max_length cut all answers away
    weights: npt.NDArray[np.float64] | None = None  # (N,): factor of each row in the loss; None: 1 for all

    def __len__(self) -> int:
        return len(self.lines)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of tokens of each row, (N,)."""
        return np.diff(self.starts)

    @cached_property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the data that training uses: ids, starts of rows, answer mask, weights."""
        digest = hashlib.sha256()
        answer_starts = np.maximum.reduceat(self._places_of_questions, self.starts[:-1]) + 1
        arrays: list[npt.NDArray[np.generic]] = [self.ids, self.starts, answer_starts.astype(np.int64)]
        if not self._is_one_answer_a_row:
            arrays.append(self.is_answer)
        if self.weights is not None:
            arrays.append(self.weights)
        for array in arrays:
            digest.update(array.tobytes())
        return digest.hexdigest()

    @property
    def _places_of_questions(self) -> npt.NDArray[np.int64]:
        """Return the position of each id in its row, or -1 if the id belongs to an answer."""
        places = np.arange(len(self.ids)) - np.repeat(self.starts[:-1], self.lengths)
        return np.where(self.is_answer, -1, places)

    @property
    def _is_one_answer_a_row(self) -> bool:
        """Return True if each row has exactly one answer, at its end."""
        begins = self.is_answer & ~np.concatenate([[False], self.is_answer[:-1]])
        return int(begins.sum()) == len(self) and bool(self.is_answer[self.starts[1:] - 1].all())

    def batch(self, rows: npt.NDArray[np.int64], pad_to: int = 0) -> Batch:
        """Build a batch of some rows, padded to the longest row, or to `pad_to` tokens if that is more."""
        lengths = self.lengths[rows][:, None]  # (B, 1): number of tokens of each row
        width = max(pad_to, int(lengths.max()))
        column = np.arange(width)[None, :]  # (1, T + 1): index of each column
        real = column < lengths  # (B, T + 1): True for tokens, False for padding
        flat = np.where(real, self.starts[rows][:, None] + column, 0)
        ids = torch.from_numpy(np.where(real, self.ids[flat], 0).astype(np.int64))
        answer = real & self.is_answer[flat]
        return Batch(
            input_ids=ids[:, :-1].contiguous(),
            targets=ids[:, 1:].contiguous(),
            token_mask=torch.from_numpy(real[:, 1:].copy()),
            answer_mask=torch.from_numpy(answer[:, 1:].copy()),
            rows=rows,
        )

    @property
    def rows(self) -> int:
        """Return the number of rows that an evaluation uses: all rows."""
        return len(self)

    @property
    def answer_share(self) -> float:
        """Return the share of answer tokens among the targets. (A row's first token is no target.)"""
        return float(self.is_answer.sum() / (self.lengths - 1).sum())

    @property
    def mean_targets(self) -> float:
        """Return the mean number of targets of a row."""
        return float(self.lengths.mean()) - 1

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Yield batches for an evaluation: each row once, sorted by length."""
        order = np.argsort(self.lengths, kind="stable")
        for first in range(0, len(order), batch_size):
            yield self.batch(order[first : first + batch_size])


def _separator(tokenizer: ChatTokenizer) -> npt.NDArray[np.int32]:
    separator = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
    if separator is None:
        raise InputError("the tokenizer has neither <sep> nor an end-of-text token to put behind an answer")
    return np.array([separator], dtype=np.int32)


def encode_prompt(
    before: Sequence[Exchange], question: str, tokenizer: ChatTokenizer, max_length: int
) -> list[int]:
    """Encode a question and the pairs before it as question <sep> answer <sep> ... question <sep>.

    If the result has more than max_length ids, the oldest pairs of question and answer are left out. The last
    question is never cut, so the result may still have more than max_length ids if this question is long.
    """
    sep = _separator(tokenizer)
    ids: list[int] = np.concatenate([tokenizer.encode_array(question), sep]).tolist()
    for one in reversed(before):
        earlier = [tokenizer.encode_array(one.question), sep, tokenizer.encode_array(one.answer), sep]
        if sum(map(len, earlier)) + len(ids) > max_length:
            break
        ids = [*np.concatenate(earlier).tolist(), *ids]
    return ids


def encode_conversation(
    conversation: Conversation, tokenizer: ChatTokenizer, max_length: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_], bool]:
    """Encode one conversation as question <sep> answer <sep> ..., as at most max_length tokens.

    If a conversation is too long, its oldest questions with their answers are left out. If the last question
    with its answer is too long, its end is cut off.

    Returns: n ids (n,); a mask (n,), True for answers and the <sep> after each; True if something was cut.
    """
    sep = _separator(tokenizer)
    encoded = [
        (np.concatenate([tokenizer.encode_array(one.question), sep]), tokenizer.encode_array(one.answer))
        for one in conversation.exchanges
    ]
    lengths = [len(question) + len(answer) + 1 for question, answer in encoded]
    first = 0
    while first < len(lengths) - 1 and sum(lengths[first:]) > max_length:
        first += 1
    parts: list[npt.NDArray[np.int32]] = []
    marks: list[npt.NDArray[np.bool_]] = []
    for question, answer in encoded[first:]:
        parts += [question, answer, sep]
        marks += [np.zeros(len(question), dtype=np.bool_), np.ones(len(answer) + 1, dtype=np.bool_)]
    ids, is_answer = np.concatenate(parts), np.concatenate(marks)
    return ids[:max_length], is_answer[:max_length], bool(first) or len(ids) > max_length


# (conversation, tokenizer, max_length) -> n ids (n,), mask of answers (n,), True if something was cut
Encode: TypeAlias = Callable[
    [Conversation, Any, int], tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_], bool]
]


def encode_conversations(
    conversations: Sequence[Conversation],
    tokenizer: Any,
    max_length: int,
    encode: Encode = encode_conversation,
) -> EncodedExamples:
    """Encode each conversation. A conversation is left out if max_length cuts all of its answers away.

    Args:
        encode: a function that encodes one conversation: `encode_conversation` (with <sep>) or
            `encode_chat_conversation` (with a chat template).

    Raises:
        InputError: if no conversation is left.
    """
    pieces: list[npt.NDArray[np.int32]] = []
    marks: list[npt.NDArray[np.bool_]] = []
    lines: list[int] = []
    weights: list[float] = []
    n_cut = n_without_answer = 0
    for conversation in conversations:
        ids, is_answer, is_cut = encode(conversation, tokenizer, max_length)
        n_cut += is_cut
        if not is_answer.any():
            n_without_answer += 1
            continue
        pieces.append(ids)
        marks.append(is_answer)
        lines.append(conversation.line)
        weights.append(conversation.weight)
    if not pieces:
        raise InputError(f"no answer is left after cutting at max_length={max_length}; raise --max_length")
    return EncodedExamples(
        ids=np.concatenate(pieces),
        is_answer=np.concatenate(marks),
        starts=np.cumsum([0, *map(len, pieces)], dtype=np.int64),
        lines=np.array(lines, dtype=np.int64),
        n_cut=n_cut,
        n_without_answer=n_without_answer,
        weights=None if set(weights) == {1.0} else np.array(weights),
    )


class HasLengths(Protocol):
    """The interface of encoded data that `BatchPlan` needs: number of rows, their lengths, a fingerprint."""

    def __len__(self) -> int:
        """Return the number of rows."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of tokens of each row."""

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the data."""


class BatchPlan:
    """Decides which rows form batch number m, for every m from 0 on, epoch after epoch.

    With `by_length`, rows are sorted by length, so that a batch needs little padding. Rows of equal length
    get a new random order in each epoch. A batch is full when it has `batch_size` rows or `tokens_per_batch`
    tokens, padding included. Then the order of the batches is shuffled. Every epoch has the same sorted
    lengths, so every epoch has the same number of batches.

    Args:
        data: the encoded data.
        batch_size: largest number of rows of a batch.
        tokens_per_batch: largest number of tokens of a batch, padding included; 0: no limit.
        pad_to: rows are padded to at least this many tokens, as by `EncodedExamples.batch`; 0: no such limit.
        by_length: True: sort by length, as described above. False: only shuffle the rows.
        seed: decides the order, together with the data's fingerprint and the epoch.
    """

    def __init__(
        self,
        data: HasLengths,
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
        for i, width in enumerate(widths):  # widths are ascending, so `width` is the largest so far
            rows = i - cuts[-1] + 1
            if rows > batch_size or (tokens_per_batch and rows > 1 and rows * width > tokens_per_batch):
                cuts.append(i)
        self._cuts = np.array([*cuts, len(data)])
        self._epoch = -1
        self._order: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._shuffled: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return len(self._cuts) - 1

    def rows(self, number: int) -> npt.NDArray[np.int64]:
        """Return the indices of the rows of batch `number`, (B,). Epoch k begins with batch k * len(plan)."""
        epoch, position = divmod(number, len(self))
        if epoch != self._epoch:  # compute the order of an epoch only once, to save time
            random = np.random.default_rng([*self._entropy, epoch])
            shuffle = random.permutation(len(self._lengths))
            if self._by_length:
                shuffle = shuffle[np.argsort(self._lengths[shuffle], kind="stable")]
            self._order = shuffle
            self._shuffled = random.permutation(len(self))
            self._epoch = epoch
        first = self._shuffled[position]
        return self._order[self._cuts[first] : self._cuts[first + 1]]

    def shapes(self, data: HasLengths, pad_to: int = 0) -> list[tuple[int, int]]:
        """Return (number of rows, number of tokens of each padded row) for each batch of an epoch."""
        every = map(self.rows, range(len(self)))
        return [(len(rows), max(pad_to, int(data.lengths[rows].max()))) for rows in every]
