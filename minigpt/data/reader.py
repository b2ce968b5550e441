"""Reads conversations from any file of file_formats.py.

    conversations, report = read_conversations("data/data.jsonl")
    report.print_summary()  # prints to stderr how the file was read, and what was skipped

Every command reads files through this function, so all commands report the same counts. Bad records are
skipped, counted and named; with `strict` the first bad record is an error. Records are never repaired.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minigpt.console.terminal import ProgressLine, note, warn
from minigpt.data.conversation import Conversation
from minigpt.data.file_formats import DataFile, advised, open_data
from minigpt.data.json_values import BadLine
from minigpt.data.records import KNOWN_SHAPES, FieldNames, Text, head_test, meaning_of
from minigpt.data.tables import rows_of
from minigpt.errors import InputError

__all__ = ["ReadReport", "read_conversations"]

_SHOWN = 5  # number of lines that a summary names for each reason
_LOST = "\ufffd"  # replacement character, written by programs that could not decode a character


@dataclass
class ReadReport:
    """Counts and reasons of the records that were read and skipped."""

    path: Path
    lines: int = 0  # number of records, good and bad
    conversations: int = 0
    answers: int = 0  # number of answers in all conversations
    skipped: list[tuple[int, str]] = field(default_factory=list)  # (line, reason)
    details: dict[str, str] = field(default_factory=dict)  # reason -> detail of its first record
    lost: list[int] = field(default_factory=list)  # lines that hold U+FFFD
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
        if self.answers == self.conversations:
            return f"{self.conversations:,} pair{several}"
        return f"{self.conversations:,} conversation{several} with {self.answers:,} answers"

    def print_summary(self) -> None:
        """Print how the file was read and what was skipped: each reason once, with its first lines."""
        for sentence in self.notes:
            note(sentence)
        if self.lost:
            warn(
                f"{self.path}: {len(self.lost):,} records hold U+FFFD (�): another program lost characters "
                f"there (line {_listed(self.lost)}); go back to the file before that"
            )
        if self.unweighted:
            warn(
                f"{self.path}: the `weight` of {len(self.unweighted):,} records is no number, so they count "
                f"as 1 (line {_listed(self.unweighted)})"
            )
        if not self.skipped:
            return
        for reason, lines in self.by_reason().items():
            first = "" if len(lines) == 1 else f"; line {lines[0]}"
            detail = f"{first}: {self.details[reason]}" if self.details.get(reason) else ""
            warn(f"{self.path}: skipped {len(lines):,}: {reason} (line {_listed(lines)}{detail})")
        skipped = f"{len(self.skipped):,} of {self.lines:,} records"
        warn(f"{self.path}: skipped {skipped} in all; --strict stops there")

    def by_reason(self) -> dict[str, list[int]]:
        """Return reason -> lines that were skipped for this reason. The most frequent reason comes first."""
        groups: dict[str, list[int]] = {}
        for line, reason in self.skipped:
            groups.setdefault(reason, []).append(line)
        return dict(sorted(groups.items(), key=lambda item: -len(item[1])))

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
    names: FieldNames = FieldNames(),  # noqa: B008 -- frozen
) -> tuple[list[Conversation], ReadReport]:
    """Read conversations from a file, or from rows in memory (a datasets.Dataset).

    Args:
        path: the file, or the rows. Rows are numbered from 1, as lines are.
        strict: make the first bad record an error instead of skipping it.
        encoding: encoding of the file; "": detect it.
        names: names of fields, if they are unusual.

    Raises:
        InputError: if a file cannot be read, holds only texts, or holds no good record.
    """
    if isinstance(path, Path | str):
        path = Path(path)
        data = open_data(path, encoding, head_test(names))
    else:
        data = DataFile("json", "", rows_of(path), "")
        path = Path("the data set")
    if data.kind == "text":
        raise InputError(f"{path} is plain text, no questions and answers; {_as_text(path, encoding)}")
    report = ReadReport(path, notes=data.notes, sha256=data.sha256)
    found: list[Conversation] = []
    texts = 0
    digest = hashlib.sha256()
    with ProgressLine("reading, records", 0, patience=2.0) as progress:
        for line, value, raw in data.records:
            report.lines += 1
            if report.lines % 1000 == 0:
                progress.update(report.lines)
            try:
                if isinstance(value, BadLine):
                    raise value
                meaning = meaning_of(value, names, line, raw)
                if isinstance(meaning, Text):
                    texts += 1
                    raise BadLine("a text, no question and answer")
                if math.isnan(meaning.weight):
                    if strict:
                        raise BadLine("`weight` is no number")
                    report.unweighted.append(line)
                    meaning = replace(meaning, weight=1.0)
            except BadLine as bad:
                if strict:
                    raise InputError(f"{path}:{line}: {bad}") from None
                report.skipped.append((line, bad.reason))
                report.details.setdefault(bad.reason, bad.detail)
                continue
            if any(_LOST in turn.content for turn in meaning.turns):
                report.lost.append(line)
            if not data.sha256:
                digest.update(repr(meaning.turns).encode("utf-8", "surrogatepass"))
            found.append(meaning)
    report.sha256 = data.sha256 or digest.hexdigest()
    report.conversations = len(found)
    report.answers = sum(len(conversation.exchanges) for conversation in found)
    if not found:
        raise _nothing_good(report, texts, encoding)
    return found, report


def _as_text(path: Path, encoding: str) -> str:
    """Return advice for a file of texts."""
    if path.exists() and not path.is_file():  # a pipe cannot be read twice
        return "write it into a file, and learn from it with `minigpt train --text FILE`"
    return f"to learn from it: {advised('train --text', path, encoding)}"


def _nothing_good(report: ReadReport, texts: int, encoding: str) -> InputError:
    path = report.path
    if texts:
        return InputError(f"{path} holds texts, no questions and answers; {_as_text(path, encoding)}")
    if not report.lines:
        return InputError(f"{path} holds no record")
    listed = [
        f"{reason}{f': {report.details[reason]}' if report.details[reason] else ''} "
        f"({len(lines):,} {'record' if len(lines) == 1 else 'records'}, first: line {lines[0]})"
        for reason, lines in list(report.by_reason().items())[:3]
    ]
    return InputError(
        f"{path} holds no question with an answer: {'; '.join(listed)}. Known are {KNOWN_SHAPES}; other "
        "fields: --question_field NAME --answer_field NAME"
    )
