"""Reading data: any file of file_formats.py, as conversations.

    conversations, report = read_conversations("data/data.jsonl")
    report.print_summary()  # how the file was read, and what was skipped, on stderr

Every command reads a file through this function, and so counts the same things. Bad records are skipped,
counted and named; `strict` makes the first one an error. Nothing is repaired in silence.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
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

_SHOWN = 5  # lines that a summary names for each reason
_LOST = "\ufffd"  # stands where a program could not read a character


@dataclass
class ReadReport:
    """What was read and what was not."""

    path: Path
    lines: int = 0  # records, good and bad
    conversations: int = 0
    answers: int = 0  # of the conversations: the questions with their answers
    skipped: list[tuple[int, str]] = field(default_factory=list)  # line, reason
    details: dict[str, str] = field(default_factory=dict)  # reason -> what its first record had
    lost: list[int] = field(default_factory=list)  # lines that hold U+FFFD
    notes: tuple[str, ...] = ()
    sha256: str = ""  # of the file's bytes

    @property
    def counted(self) -> str:
        """How much was read, in words.

        >>> ReadReport(Path("a"), conversations=29, answers=58).counted
        '29 conversations with 58 answers'
        """
        several = "" if self.conversations == 1 else "s"
        if self.answers == self.conversations:
            return f"{self.conversations:,} pair{several}"
        return f"{self.conversations:,} conversation{several} with {self.answers:,} answers"

    def print_summary(self) -> None:
        """Say how the file was read and what was skipped: each reason once, with its first lines."""
        for sentence in self.notes:
            note(sentence)
        if self.lost:
            warn(
                f"{self.path}: {len(self.lost):,} records hold U+FFFD (�): another program lost characters "
                f"there (line {_listed(self.lost)}); go back to the file before that"
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
        """Reason -> the lines that were skipped for it, the most frequent reason first."""
        groups: dict[str, list[int]] = {}
        for line, reason in self.skipped:
            groups.setdefault(reason, []).append(line)
        return dict(sorted(groups.items(), key=lambda item: -len(item[1])))

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
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
        path: the file. Rows count as lines, from 1.
        strict: make the first bad record an error instead of skipping it.
        encoding: of the file; "": find out.
        names: fields that do not have a usual name.

    Raises:
        InputError: for a file that cannot be read, holds texts only, or holds no good record.
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
    """What to do with texts, in words."""
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
