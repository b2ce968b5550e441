"""Reads conversations from files of all formats that file_formats.py knows.

    conversations, report = read_conversations("data/data.jsonl")
    report.print_summary()  # prints to stderr how the file was read, and how many records were skipped

Every command reads files through `read_conversations`, so all commands report the same counts. Bad records
are skipped, and a warning names their lines; with `strict`, the first bad record is an error. Records are
never repaired.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from minigpt.console.language import say, translated
from minigpt.console.terminal import ProgressLine, note, warn
from minigpt.data.chat_logs import message_columns, read_chat, read_messages
from minigpt.data.conversation import Conversation
from minigpt.data.field_names import FieldNames, head_test
from minigpt.data.file_formats import DataFile, advised, open_data
from minigpt.data.json_values import BadLine, Record
from minigpt.data.marked_turns import marked_turns, name_of_marks
from minigpt.data.nested_records import is_message_tree, message_trees, unfolded
from minigpt.data.records import KNOWN_SHAPES, NO_KNOWN_FIELD, Text, meaning_of
from minigpt.data.tables import rows_of
from minigpt.errors import InputError, Message

__all__ = ["ReadReport", "read_conversations", "read_records"]

_FIRST = 200  # number of records that are examined to recognise a chat log
_SHOWN = 5  # largest number of line numbers that a warning about bad or damaged records lists
# Traces of UTF-8 text that a program decoded as Windows-1252, Latin-1 or GBK: "Ã©" in place of "é"
_GARBLED = re.compile("[\x80-\x84\x86-\x9f]|â€|锟斤拷|[ÃÂ][\xa0-\xbf]")
_LOST = "\ufffd"  # replacement character: programs write it for bytes that they cannot decode
Found = TypeVar("Found")


@dataclass
class ReadReport:
    """What was found when a file was read: counts, and the records that were skipped, with the reasons."""

    path: Path
    lines: int = 0  # number of records, good and bad
    conversations: int = 0
    answers: int = 0  # number of answers in all conversations
    skipped: list[tuple[int, str]] = field(default_factory=list)  # (line, reason) of each record
    # Reason -> detail of the first record that was skipped for this reason.
    details: dict[str, str] = field(default_factory=dict)
    lost: list[int] = field(default_factory=list)  # lines with U+FFFD, which stands for a lost character
    garbled: list[int] = field(default_factory=list)  # lines with text that was decoded in a wrong encoding
    unweighted: list[int] = field(default_factory=list)  # lines whose `weight` is no number
    notes: tuple[str, ...] = ()
    sha256: str = ""  # SHA-256 of the file's bytes

    @property
    def counted(self) -> str:
        """Return the number of conversations and answers, in words.

        >>> ReadReport(Path("a"), conversations=29, answers=58).counted
        '29 conversations with 58 answers'
        """
        several = "" if self.conversations == 1 else "s"
        values = {"count": self.conversations, "several": several, "answers": self.answers}
        if self.answers == self.conversations:
            return Message("{count:,} pair{several}", **values)
        return Message("{count:,} conversation{several} with {answers:,} answers", **values)

    def print_summary(self) -> None:
        """Print notes and warnings. For each reason to skip records, print some line numbers."""
        for sentence in self.notes:
            note(sentence)
        if self.lost:
            warn(
                f"{self.path}: {len(self.lost):,} records hold U+FFFD (�): another program lost characters "
                f"there (line {_listed(self.lost)}); go back to the file before that"
            )
        if self.garbled:
            warn(
                f"{self.path}: {len(self.garbled):,} records look garbled, such as Ã© for é: another program "
                f"took UTF-8 for another encoding (line {_listed(self.garbled)}); go back to the file before "
                "that"
            )
        if self.unweighted:
            warn(
                f"{self.path}: the `weight` of {len(self.unweighted):,} records is no number, so they count "
                f"as 1 (line {_listed(self.unweighted)})"
            )
        if not self.skipped:
            return
        for reason, lines in self.by_reason().items():
            first = "" if len(lines) == 1 else say("; line {line}", line=lines[0])
            detail = f"{first}: {translated(self.details[reason])}" if self.details.get(reason) else ""
            text = "{path}: skipped {count:,}: {reason} (line {lines}{detail})"
            values = {"path": self.path, "count": len(lines), "lines": _listed(lines)}
            warn(Message(text, **values, reason=translated(reason), detail=detail))
        text = "{path}: skipped {count:,} of {total:,} records in all; --strict stops there"
        warn(Message(text, path=self.path, count=len(self.skipped), total=self.lines))

    def by_reason(self) -> dict[str, list[int]]:
        """Return a dict: reason -> numbers of the lines skipped for it. The most frequent reason is first."""
        groups: dict[str, list[int]] = {}
        for line, reason in self.skipped:
            groups.setdefault(reason, []).append(line)
        return dict(sorted(groups.items(), key=lambda item: -len(item[1])))

    def reasons(self) -> str:
        """Return the most frequent reasons in words, for the error message if a file has no good record."""
        listed = []
        for reason, lines in list(self.by_reason().items())[:3]:
            why = f"{reason}: {self.details[reason]}" if self.details[reason] else reason
            counted = f"{len(lines):,} {'record' if len(lines) == 1 else 'records'}"
            listed.append(f"{why} ({counted}, first: line {lines[0]})")
        return "; ".join(listed) or "it has no record"

    def as_dict(self) -> dict[str, Any]:
        """Return the counts for `--json`."""
        return {
            "lines": self.lines,
            "conversations": self.conversations,
            "pairs": self.answers,
            "skipped": len(self.skipped),
            "reasons": {reason: len(lines) for reason, lines in self.by_reason().items()},
            "lost_characters": len(self.lost),
        }


def _listed(lines: list[int]) -> str:
    return ", ".join(map(str, lines[:_SHOWN])) + (", ..." if len(lines) > _SHOWN else "")


def read_conversations(
    path: Path | str | Iterable[Mapping[str, Any]],
    strict: bool = False,
    encoding: str = "",
    names: FieldNames = FieldNames(),  # noqa: B008 -- this default is frozen, so it cannot change
    opened: DataFile | None = None,
) -> tuple[list[Conversation], ReadReport]:
    """Read conversations from a file, or from rows in memory (a datasets.Dataset).

    Args:
        path: the file, or the rows. Rows are numbered from 1, as lines are.
        strict: make the first bad record an error instead of skipping it.
        encoding: encoding of the file; "": detect it.
        names: names of fields, if they are unusual; for a chat log, the name of the speaker who answers.
        opened: the file, if the caller has opened it already to recognise its format.

    Raises:
        InputError: if a file cannot be read, holds only texts, or holds no good record.
    """
    if isinstance(path, Path | str):
        path = Path(path)
        data = opened or open_data(path, encoding, head_test(names))
    else:
        data = DataFile("json", "", rows_of(path), "")
        path = Path("the data set")
    data = _as_chat(data, path, encoding, names) if data.kind == "text" else _with_chat(data, path, names)
    if data.kind == "chat":
        names = replace(names, speaker="")  # roles have already replaced the names of a chat log's speakers
    report = ReadReport(path, notes=data.notes, sha256=data.sha256)
    if data.has_head is False and len(data.first_row) == 2:
        report.notes += (_without_head(path, data.first_row),)
    texts: list[int] = []
    marks: dict[str, int] = {}  # format of marks, such as "ChatML" -> number of texts with these marks

    def conversation_of(record: Record) -> Conversation:
        meaning = meaning_of(record.value, names, record.line, record.raw)
        if isinstance(meaning, Text) and (form := name_of_marks(meaning)):
            marks[form] = marks.get(form, 0) + 1
            meaning = Conversation(tuple(turn for _, turn in marked_turns(meaning)), record.line)
        if isinstance(meaning, Text):
            texts.append(record.line)
            raise BadLine("a text, no question and answer")
        if math.isnan(meaning.weight):
            if strict:
                raise BadLine("`weight` is no number")
            report.unweighted.append(record.line)
            meaning = replace(meaning, weight=1.0)
        return meaning

    found = read_records(
        data.records, report, conversation_of, lambda each: (turn.content for turn in each.turns), strict
    )
    if not report.sha256:
        turns = repr([each.turns for each in found])
        report.sha256 = hashlib.sha256(turns.encode("utf-8", "surrogatepass")).hexdigest()
    if marks:
        report.notes += (_with_marks(path, marks, encoding),)
    report.conversations = len(found)
    report.answers = sum(len(conversation.exchanges) for conversation in found)
    if not found:
        raise _nothing_good(report, len(texts), encoding)
    return found, report


def read_records(
    records: Iterable[Record],
    report: ReadReport,
    meaning: Callable[[Record], Found],
    texts: Callable[[Found], Iterable[str]],
    strict: bool,
) -> list[Found]:
    """Convert records, and return the results. Line numbers of bad records and damaged texts go to `report`.

    Args:
        meaning: a function that converts a record, for example to a Conversation, or raises BadLine.
        texts: a function that returns the texts of a converted record. These are searched for damaged text.
        strict: make the first bad record an error.

    Raises:
        InputError: for the first bad record, if `strict`; the message names file and line.
    """
    found: list[Found] = []
    with ProgressLine("reading, records", 0, patience=2.0) as progress:
        for record in records:
            report.lines += 1
            if report.lines % 1000 == 0:
                progress.update(report.lines)
            try:
                if isinstance(record.value, BadLine):
                    raise record.value
                one = meaning(record)
            except BadLine as bad:
                if strict:
                    raise InputError(f"{report.path}:{record.line}: {bad}") from None
                report.skipped.append((record.line, bad.reason))
                report.details.setdefault(bad.reason, bad.detail)
                continue
            if any(_LOST in text for text in texts(one)):
                report.lost.append(record.line)
            if any(map(_GARBLED.search, texts(one))):
                report.garbled.append(record.line)
            found.append(one)
    return found


def _without_head(path: Path, first_row: tuple[str, ...]) -> str:
    """Return a note for a table without known column names.

    The note shows the first row to the user, because it may hold column names that minigpt does not know.
    """
    shown = ", ".join(repr(cell[:20]) for cell in first_row)
    return (
        f"{path}: no line of column names: the first column is taken for the question, the second for the "
        f"answer, from the first line on ({shown}); if that line names the columns: --question_field NAME "
        "--answer_field NAME"
    )


def _with_marks(path: Path, marks: Mapping[str, int], encoding: str) -> str:
    """Return a note for the user: some texts are conversations with marks of speakers, such as ChatML's."""
    shown = ", ".join(f"{count:,} with {name} marks" for name, count in marks.items())
    is_file = path.is_file()
    as_text = f"; as plain texts: {advised('train --text', path, encoding)}" if is_file else ""
    return f"{path}: {shown}: the texts are read as conversations{as_text}"


def _as_chat(data: DataFile, path: Path, encoding: str, names: FieldNames) -> DataFile:
    """Read a text file as a chat log. Return it with one conversation in each record."""
    ((_, text, _),) = data.records
    chat = read_chat(text, path, names.speaker, encoding)
    if chat is None:
        raise InputError(f"{path} is plain text, no questions and answers; {_as_text(path, encoding)}")
    if not chat.records:
        raise InputError(
            f"{path} is like a chat log, but no message is an answer to another; {_as_text(path, encoding)}"
        )
    return replace(data, kind="chat", records=chat.records, notes=(*data.notes, chat.note))


def _with_chat(data: DataFile, path: Path, names: FieldNames) -> DataFile:
    """Return the data with one conversation in each record.

    Records that are single messages are joined; a record that holds several conversations is divided.
    """
    if names.question:
        return data
    records = iter(data.records)
    first = list(itertools.islice(records, _FIRST))
    values = [record.value for record in first]
    columns = message_columns(values, names)
    every = itertools.chain(first, records)
    if is_message_tree(values):
        return replace(data, records=message_trees(every))
    if columns is None:
        return replace(data, records=unfolded(every))
    chat = read_messages(every, columns, path, names.speaker)
    return replace(data, kind="chat", records=chat.records, notes=(*data.notes, chat.note), has_head=None)


def _as_text(path: Path, encoding: str) -> str:
    """Return advice for a user whose file holds texts: the command that trains on texts."""
    if path.exists() and not path.is_file():  # a pipe: no command can read it a second time
        return "write it into a file, and learn from it with `minigpt train --text FILE`"
    return f"to learn from it: {advised('train --text', path, encoding)}"


def _nothing_good(report: ReadReport, texts: int, encoding: str) -> InputError:
    path = report.path
    if texts:
        return InputError(f"{path} holds texts, no questions and answers; {_as_text(path, encoding)}")
    if not report.lines:
        return InputError(f"{path} holds no record")
    as_text = ""
    if path.is_file() and any(reason == NO_KNOWN_FIELD for _, reason in report.skipped):
        as_text = f"; as texts: {advised('train --text', path, encoding)}"
    return InputError(
        f"{path} holds no question with an answer: {report.reasons()}. Known are {KNOWN_SHAPES}; other "
        f"fields: --question_field NAME --answer_field NAME{as_text}"
    )
