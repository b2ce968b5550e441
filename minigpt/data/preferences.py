"""Reads preferences: two answers to one prompt, a better and a worse answer.

    {"prompt": ..., "chosen": ..., "rejected": ...}            texts, or lists of messages
    {"instruction": ..., "input": ..., "chosen": ..., "rejected": ...}
    {"conversations": [...], "chosen": {...}, "rejected": {...}}         LLaMA-Factory's
    {"chosen": [...], "rejected": [...]}                       two conversations with the same beginning
    {"question": ..., "answers": [better, worse]}

The prompt with one of the answers is a conversation, so a record has two conversations. Both are read as in
`minigpt.data.records`, so the same field names are allowed.

Legend: N pairs; B pairs in a batch, which are 2 B rows; T: number of tokens of the longest row of the batch,
minus one.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from minigpt.data.batches import Batch, Encode, EncodedExamples
from minigpt.data.conversation import Conversation, Turn
from minigpt.data.field_names import FIELDS, FieldNames
from minigpt.data.file_formats import open_data
from minigpt.data.json_values import REPEATED, BadLine
from minigpt.data.reader import ReadReport, read_records
from minigpt.data.records import lower_keys, meaning_of, shown_keys
from minigpt.data.split import split_conversations
from minigpt.errors import InputError

__all__ = [
    "CHOSEN", "REJECTED", "EncodedPreferences", "PairBatch", "Preference",
    "encode_preferences", "preference_of", "read_preferences", "split_preferences",
]  # fmt: skip

CHOSEN = ("chosen", "preferred", "better", "chosen_response", "优选", "更好的回答", "更好", "好回答", "采纳")
REJECTED = (
    *("rejected", "dispreferred", "worse", "rejected_response"),
    *("劣选", "更差的回答", "更差", "差回答", "拒绝"),
)
# Fields that may hold a list of two answers, the better one first.
_TWO = ("answers", "responses", "completions", *FIELDS["answer"])
_SHAPES = "prompt/chosen/rejected, instruction/input/chosen/rejected, conversations/chosen/rejected"
_LONGEST_NAME = 30  # largest number of characters of a column's name; a longer cell is a text
_NO_LIMIT = 2**62
_SPEAKERS = re.compile(r"\n\n(Human|Assistant): ?")  # marks of the speakers in the data set HH-RLHF


class Preference(NamedTuple):
    """Two conversations with the same prompt: one ends with a better answer, one with a worse answer.

    The prompt is all turns before the first answer in which the two conversations differ.
    """

    chosen: Conversation
    rejected: Conversation
    prompt: int  # number of turns of the prompt

    @property
    def line(self) -> int:
        """Return the number of the pair's line in the data file, from 1."""
        return self.chosen.line


# -- reading -----------------------------------------------------------------------------------------------


def read_preferences(
    path: Path,
    strict: bool = False,
    encoding: str = "",
    names: FieldNames = FieldNames(),  # noqa: B008
) -> tuple[list[Preference], ReadReport]:
    """Read pairs of answers from a file.

    Args:
        strict: make the first bad record an error instead of skipping it.
        encoding: encoding of the file; "": detect it.
        names: field names given by the user: `question` for the prompt, `answer` for the chosen answer.

    Raises:
        InputError: if the file cannot be read, or holds no good pair.
    """
    data = open_data(path, encoding, _is_head(names))
    report = ReadReport(path, notes=data.notes, sha256=data.sha256)
    if data.kind == "text":
        raise InputError(f"{path} is plain text, no pairs of answers; known are {_SHAPES}")
    found = read_records(
        data.records,
        report,
        lambda record: preference_of(record.value, names, record.line, record.raw),
        lambda pair: (turn.content for one in (pair.chosen, pair.rejected) for turn in one.turns),
        strict,
    )
    report.conversations = report.answers = len(found)
    if not found:
        why = report.reasons()
        raise InputError(f"{path} holds no pair of a better and a worse answer: {why}. Known are {_SHAPES}")
    return found, report


def _is_head(names: FieldNames) -> Callable[[Collection[str]], bool]:
    chosen, rejected = {*CHOSEN, names.answer.strip().lower()}, {*REJECTED}
    known = {name for part in FIELDS.values() for name in part} | chosen | rejected | {*_TWO}
    known |= {names.question.strip().lower()}

    def test(cells: Collection[str]) -> bool:
        # For a Parquet file, `cells` has only one column's name. Return True if this column is to be read.
        if len(cells) == 1:
            return bool(known & set(cells))
        is_short = all(len(cell) <= _LONGEST_NAME for cell in cells)
        return is_short and bool(chosen & set(cells)) and bool(rejected & set(cells))

    return test


def preference_of(
    value: Any,
    names: FieldNames = FieldNames(),  # noqa: B008 -- frozen
    line: int = 0,
    raw: str = "",
) -> Preference:
    """Return the two conversations of a record.

    Raises:
        BadLine: if a part is missing, empty or not text, or if both answers are equal.
    """
    if not isinstance(value, Mapping):
        raise BadLine("not an object")
    item = lower_keys(value)
    if names.question:
        item = _named(item, names.question.strip().lower(), names.answer.strip().lower())
    keys = [_key(item, CHOSEN), _key(item, REJECTED)]
    if keys[1] is None:
        several = ("chosen",) if names.question else _TWO if keys[0] is None else ()
        two = next((key for key in several if isinstance(item.get(key), list) and len(item[key]) == 2), None)
        if two is not None and all(isinstance(each, str) for each in item[two]):
            keys = [f"{two}[0]", f"{two}[1]"]
            item.update(zip(keys, item.pop(two)))  # type: ignore[arg-type]
    for key, name in zip(keys, ("chosen", "rejected")):
        if key is None:
            raise BadLine(f"`{name}` is missing", shown_keys(value))
        if item[key] is REPEATED:
            raise BadLine(f"`{key}` stands there more than once")
    rest = {k: v for k, v in item.items() if k not in {*keys, *CHOSEN, *REJECTED}}
    chosen, rejected = (_whole(rest, item[str(key)], str(key), line, raw) for key in keys)
    same = 0
    for a, b in zip(chosen.turns, rejected.turns):
        if _stripped(a) != _stripped(b):
            break
        same += 1
    if same == len(chosen.turns) == len(rejected.turns):
        raise BadLine("chosen equals rejected")
    # Both answers may begin with the same assistant turns. These belong to the answers, not to the prompt.
    while same and chosen.turns[same - 1].role == "assistant":
        same -= 1
    for one, key in ((chosen, keys[0]), (rejected, keys[1])):
        if same >= len(one.turns) or one.turns[same].role != "assistant":
            raise BadLine(f"`{key}` does not answer the prompt")
    if not same:
        raise BadLine("the prompt is missing")
    return Preference(chosen, rejected, same)


def _named(item: Mapping[str, Any], prompt: str, chosen: str) -> dict[str, Any]:
    """Return a record in which the fields that the user named have the names "prompt" and "chosen".

    `prompt` and `chosen` are the user's names. The field of the worse answer is kept. All other fields are
    left out.
    """
    for key in (prompt, chosen):
        if key not in item:
            raise BadLine(f"`{key}` is missing", shown_keys(item))
    worse = {key: item[key] for key in REJECTED if key in item}
    return {"prompt": item[prompt], "chosen": item[chosen], **worse}


def _key(item: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if item.get(name) is not None), None)


def _stripped(turn: Turn) -> Turn:
    return Turn(turn.role, turn.content.strip())


def _whole(rest: Mapping[str, Any], answer: Any, key: str, line: int, raw: str) -> Conversation:
    """Read the prompt and one of the two answers as a conversation."""
    if isinstance(answer, str) and not answer.strip():
        raise BadLine(f"`{key}` is empty")
    if isinstance(answer, Mapping):
        answer = [answer]
    elif isinstance(answer, int | float) and not isinstance(answer, bool):  # a number in a table's cell
        answer = str(answer)
    if not isinstance(answer, str | list) or not answer:
        raise BadLine(f"`{key}` is neither text nor a list of turns")
    # In the data set HH-RLHF, an answer is a whole conversation in one text.
    if isinstance(answer, str) and answer.startswith("\n\nHuman:"):
        parts = _SPEAKERS.split(answer)[1:]
        answer = [{"role": who, "content": said.strip()} for who, said in zip(parts[::2], parts[1::2])]
    turns = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    read = meaning_of(turns, FieldNames())
    before = next((name for name in FIELDS["turns"] if isinstance(rest.get(name), list)), None)
    item: dict[str, Any]
    if isinstance(read, Conversation) and read.turns[0].role != "assistant":  # the answer includes the prompt
        item = {**{k: v for k, v in rest.items() if k in FIELDS["system"]}, "messages": turns}
    elif before is not None:
        item = {**rest, before: [*rest[before], *turns]}
    else:
        item = {**{k: v for k, v in rest.items() if k not in FIELDS["answer"]}, "answer": turns}
    meaning = meaning_of(item, FieldNames(), line, raw)
    if not isinstance(meaning, Conversation):
        raise BadLine("the prompt is missing")
    return meaning


# -- training part and validation part ---------------------------------------------------------------------


def split_preferences(
    pairs: Sequence[Preference], train_ratio: float, seed: int
) -> tuple[list[Preference], list[Preference]]:
    """Split pairs into a training part and a validation part. All pairs of one prompt go to one part.

    Raises:
        InputError: if a part would be empty.
    """
    prompts = [
        Conversation((*pair.chosen.turns[: pair.prompt], Turn("assistant", "")), number)
        for number, pair in enumerate(pairs)
    ]
    split = split_conversations(prompts, train_ratio, seed)
    is_val = {each.line: True for each in split.val}
    for again, first in split.dropped:
        is_val[again.line] = first.line in is_val
    return (
        [pair for number, pair in enumerate(pairs) if not is_val.get(number)],
        [pair for number, pair in enumerate(pairs) if is_val.get(number)],
    )


# -- encoding ----------------------------------------------------------------------------------------------


class PairBatch(Batch):
    """A batch of pairs: B chosen rows, then B rejected rows. `rows` (B,) has the indices of the pairs.

    `answer_mask` is True only for answers after the prompt. Answers inside the prompt are not learned.
    """

    __slots__ = ()

    def to(self, device: Any) -> "PairBatch":
        """Copy the batch to another device. A copy to a CUDA device is asynchronous."""
        return PairBatch(*super().to(device))

    def some(self, which: slice) -> "PairBatch":
        """Return a batch that has only the pairs in the slice `which`."""
        B = len(self.rows)
        places = np.arange(B)[which]
        both = np.concatenate([places, places + B])
        ids, targets, tokens, answers, rows = self
        return PairBatch(ids[both], targets[both], tokens[both], answers[both], rows[which])

    def blank(self) -> "PairBatch":
        """Return a batch of the first pair, with both masks all False, so that it adds nothing to the loss.

        Several processes share the pairs of a batch and do each step together. A process that gets no pair
        uses this batch.
        """
        first = self.some(slice(1))
        nothing = first.token_mask & False
        return PairBatch(first.input_ids, first.targets, nothing, nothing, self.rows[:0])


@dataclass(frozen=True)
class EncodedPreferences:
    """All pairs as one long array of ids: chosen, rejected, chosen, rejected, ..."""

    examples: EncodedExamples  # 2 N rows: chosen, rejected, chosen, rejected, ...
    n_cut: int  # number of pairs that max_length shortened
    n_without_answer: int  # number of pairs left out, because max_length cut away one of their answers

    def __len__(self) -> int:
        return len(self.lines)

    @cached_property
    def lines(self) -> npt.NDArray[np.int64]:
        """Return the number of each pair's line in the data file, (N,)."""
        return self.examples.lines[::2]

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of tokens of the longer row of each pair, (N,)."""
        return np.maximum(self.examples.lengths[::2], self.examples.lengths[1::2])

    @property
    def ids(self) -> npt.NDArray[np.int32]:
        """Return the ids of all rows, one after another."""
        return self.examples.ids

    @cached_property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the data that training uses."""
        return hashlib.sha256(f"pairs {self.examples.fingerprint}".encode()).hexdigest()

    @property
    def rows(self) -> int:
        """Return the number of rows that an evaluation uses."""
        return len(self.examples)

    @property
    def answer_share(self) -> float:
        """Return the share of answer tokens among the targets."""
        return self.examples.answer_share

    @property
    def mean_targets(self) -> float:
        """Return the mean number of targets of a row."""
        return self.examples.mean_targets

    def batch(self, rows: npt.NDArray[np.int64], pad_to: int = 0) -> PairBatch:
        """Build a batch of some pairs, padded to the longest row, or to `pad_to` tokens if that is more."""
        both = self.examples.batch(np.concatenate([2 * rows, 2 * rows + 1]), pad_to)
        return PairBatch(*both)._replace(rows=rows)

    def in_order(self, batch_size: int) -> Iterator[PairBatch]:
        """Yield batches of at most `batch_size` rows for an evaluation: each pair once, sorted by length."""
        order, pairs = np.argsort(self.lengths, kind="stable"), max(1, batch_size // 2)
        for first in range(0, len(order), pairs):
            yield self.batch(order[first : first + pairs])


def encode_preferences(
    pairs: Sequence[Preference], tokenizer: Any, max_length: int, encode: Encode
) -> EncodedPreferences:
    """Encode both conversations of each pair. If `max_length` cuts an answer away, the pair is left out.

    If one of the two conversations is too long, both lose the same oldest questions with their answers, so
    their prompts stay equal. The system text is kept. If a row is still too long, its end is cut off.

    Args:
        encode: a function that encodes one conversation: `encode_conversation` (with <sep>) or
            `encode_chat_conversation` (with a chat template).

    Raises:
        InputError: if no pair is left.
    """
    pieces: list[npt.NDArray[np.int32]] = []
    marks: list[npt.NDArray[np.bool_]] = []
    lines: list[int] = []
    n_cut = n_without_answer = 0
    for pair in pairs:
        both, is_cut = _encode_pair(pair, tokenizer, max_length, encode)
        n_cut += is_cut
        if not all(is_answer.any() for _, is_answer in both):
            n_without_answer += 1
            continue
        for ids, is_answer in both:
            pieces.append(ids)
            marks.append(is_answer)
            lines.append(pair.line)
    if not pieces:
        raise InputError(f"no pair is left after cutting at max_length={max_length}; raise --max_length")
    examples = EncodedExamples(
        ids=np.concatenate(pieces),
        is_answer=np.concatenate(marks),
        starts=np.cumsum([0, *map(len, pieces)], dtype=np.int64),
        lines=np.array(lines, dtype=np.int64),
        n_cut=0,
        n_without_answer=0,
    )
    return EncodedPreferences(examples, n_cut, n_without_answer)


_Encoded: TypeAlias = tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]


def _encode_pair(
    pair: Preference, tokenizer: Any, max_length: int, encode: Encode
) -> tuple[list[_Encoded], bool]:
    """Return (ids, answer mask) of the chosen and of the rejected conversation, and True if one was cut."""
    prompt = pair.chosen.turns[: pair.prompt]
    first = 1 if prompt[0].role == "system" else 0
    starts = [i for i in range(first, len(prompt)) if prompt[i].role == "user"] or [first]
    for start in starts:
        kept = prompt if start == starts[0] else (*prompt[:first], *prompt[start:])
        both: list[_Encoded] = []
        for one in (pair.chosen, pair.rejected):
            answer = one.turns[pair.prompt :]
            turns = dataclasses.replace(one, turns=(*kept, *answer))
            ids, said, _ = encode(turns, tokenizer, _NO_LIMIT)
            both.append((ids, _last_runs(said, _answers(answer))))
        if max(len(ids) for ids, _ in both) <= max_length:
            return both, start != starts[0]
    return [(ids[:max_length], said[:max_length]) for ids, said in both], True


def _answers(turns: Sequence[Turn]) -> int:
    """Count the answers. Consecutive turns of the assistant are one answer."""
    roles = ["", *(turn.role for turn in turns)]
    return sum(now == "assistant" != before for before, now in pairwise(roles))


def _last_runs(marks: npt.NDArray[np.bool_], count: int) -> npt.NDArray[np.bool_]:
    """Return a copy of the mask (T,) in which only the last `count` groups of adjacent True stay True."""
    begins = np.flatnonzero(marks & ~np.concatenate([[False], marks[:-1]]))
    kept = marks.copy()
    kept[: begins[-count] if len(begins) >= count else 0] = False
    return kept
