"""Reads and encodes prompts that a model answers during training with rewards.

A prompt is a conversation without its last answer. The model does not learn this answer; a reward function
may compare it with the answer that the model generates. Other reward functions do not need it, so a record
may have no answer: {"prompt": ...}.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from minigpt.data.batches import Encode, EncodedExamples
from minigpt.data.conversation import Conversation
from minigpt.data.field_names import FIELDS, FieldNames, head_test
from minigpt.data.file_formats import open_data
from minigpt.data.json_values import BadLine, Record, parse_value
from minigpt.data.reader import ReadReport, read_conversations, read_records
from minigpt.data.records import prompt_of
from minigpt.errors import InputError

__all__ = ["EncodedPrompts", "Prompt", "encode_prompts", "read_prompts"]


class Prompt(NamedTuple):
    """One prompt."""

    ids: list[int]  # token ids of the prompt
    question: str  # the last question as text
    answer: str  # the record's answer; "" if the record has none
    fields: Mapping[str, Any] = {}  # all fields of the record


@dataclass(frozen=True)
class EncodedPrompts(EncodedExamples):
    """Encoded prompts. A row holds a prompt and the record's answer, for which `is_answer` is True."""

    prompts: list[Prompt] = field(default_factory=list)  # one for each row

    @property
    def has_answers(self) -> bool:
        """Return True if the file has an answer to at least one prompt."""
        return any(one.answer for one in self.prompts)

    @property
    def fields(self) -> list[str]:
        """Return the names of all fields that occur in the records."""
        return [*dict.fromkeys(name for one in self.prompts for name in one.fields)]

    def last_tokens(self) -> set[int]:
        """Return the last id of every answer. Such an id tells that a generated answer is complete.

        Ids that a chat template puts after the end of the answer are not returned.
        """
        places = np.where(self.is_answer, np.arange(len(self.ids)), -1)
        return {*self.ids[np.maximum.reduceat(places, self.starts[:-1])].tolist()}


def read_prompts(
    path: Path,
    strict: bool = False,
    encoding: str = "",
    names: FieldNames = FieldNames(),  # noqa: B008 -- this default is frozen, so it cannot change
) -> tuple[list[Conversation], ReadReport]:
    """Read prompts from a file. A record without an answer becomes a conversation with an empty answer.

    The arguments are those of `read_conversations`: how to read the file, and the names of its fields.

    Raises:
        InputError: if the file cannot be read, or holds no prompt.
    """
    known = head_test(names)

    def is_head(cells: Collection[str]) -> bool:
        return known(cells) or bool({*FIELDS["question"], *FIELDS["turns"]} & {*cells})

    data = open_data(path, encoding, is_head)
    if data.kind in ("text", "chat"):
        return read_conversations(path, strict, encoding, names)
    report = ReadReport(path, notes=data.notes, sha256=data.sha256)

    def meaning(record: Record) -> Conversation:
        one = prompt_of(record.value, names, record.line)
        raw = json.dumps(record.value, ensure_ascii=False, default=str)
        return replace(one, raw=raw, weight=1.0 if math.isnan(one.weight) else one.weight)

    found = read_records(data.records, report, meaning, lambda one: (t.content for t in one.turns), strict)
    report.conversations = report.answers = len(found)
    if not found:
        raise InputError(f"{path} holds no prompt: {report.reasons()}. Known are prompt, question, messages")
    return found, report


def _fields_of(conversation: Conversation) -> Mapping[str, Any]:
    """Return all fields of the record that a conversation was read from; {} if the record is no object."""
    try:
        value = parse_value(conversation.raw)
    except BadLine:
        return {}
    return value if isinstance(value, dict) else {}


def encode_prompts(
    conversations: Sequence[Conversation], tokenizer: Any, max_length: int, encode: Encode
) -> EncodedPrompts:
    """Encode conversations as prompts with answers. Conversations longer than max_length tokens are left out.

    Args:
        encode: a function that encodes one conversation: `encode_conversation` (with <sep>) or
            `encode_chat_conversation` (with a chat template).

    Raises:
        InputError: if no conversation is left.
    """
    pieces: list[npt.NDArray[np.int32]] = []
    marks: list[npt.NDArray[np.bool_]] = []
    lines: list[int] = []
    prompts: list[Prompt] = []
    n_cut = 0
    for conversation in conversations:
        ids, is_answer, is_cut = encode(conversation, tokenizer, max_length)
        if is_cut or not is_answer.any():
            n_cut += 1
            continue
        begins = is_answer & ~np.concatenate([[False], is_answer[:-1]])
        start = int(begins.nonzero()[0][-1])
        is_answer = is_answer.copy()
        is_answer[:start] = False
        pieces.append(ids)
        marks.append(is_answer)
        lines.append(conversation.line)
        last = conversation.exchanges[-1]
        fields = _fields_of(conversation)
        prompts.append(Prompt(ids[:start].tolist(), last.question, last.answer, fields))
    if not pieces:
        raise InputError(f"every prompt is longer than max_length={max_length}; raise --max_length")
    return EncodedPrompts(
        ids=np.concatenate(pieces),
        is_answer=np.concatenate(marks),
        starts=np.cumsum([0, *map(len, pieces)], dtype=np.int64),
        lines=np.array(lines, dtype=np.int64),
        n_cut=n_cut,
        n_without_answer=n_cut,
        prompts=prompts,
    )
