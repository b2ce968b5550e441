"""Reading questions and answers: one {"question": ..., "answer": ...} object a line, UTF-8.

    pairs, report = read_pairs("data/data.jsonl")
    report.print_summary()  # the lines that were skipped, if any, on stderr

Other usual field names are recognised: minigpt/data/records.py lists them. The first line that has some
decides for the whole file.

Bad lines are skipped, counted and named; `strict` makes the first one an error. What is wrong with the file
as a whole (it is missing, empty, a JSON array, GBK, ...) is one clear error that says what to do. Nothing is
repaired silently, except that a byte order mark and the CR of CRLF are not part of the text.

The file is read line by line, once; a pipe will do.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from minigpt.console.terminal import ProgressLine, warn
from minigpt.data.formats import BOM, refuse_gb18030, refuse_other_formats, to_convert
from minigpt.data.parquet import parquet_rows
from minigpt.data.records import NOT_UTF8, ONLY_CR, BadLine, Shape, pairs_of, parse_line, shape_of
from minigpt.errors import InputError

__all__ = ["Pair", "ReadReport", "read_pairs"]

EXAMPLE = '{"question": "...", "answer": "..."}'
_SHOWN = 5  # lines that a summary names for each reason
_HEAD = 1 << 20  # bytes that are enough to tell what a file is
_SPREAD = "has its objects spread over many lines, not one a line"


class Pair(NamedTuple):
    """A question and its answer, with the line (from 1) that they stand in and that line's text."""

    question: str
    answer: str
    line: int
    raw: str  # without the line's end and without a byte order mark


@dataclass
class ReadReport:
    """What was read and what was not."""

    path: Path
    lines: int = 0  # that are not blank
    pairs: int = 0
    skipped: list[tuple[int, str]] = field(default_factory=list)  # line, reason
    details: dict[str, str] = field(default_factory=dict)  # reason -> what its first line had
    sha256: str = ""  # of the file's bytes

    def print_summary(self) -> None:
        """Warn about skipped lines, if there are any: each reason once, with its first lines."""
        if not self.skipped:
            return
        for reason, lines in self.by_reason().items():
            numbers = ", ".join(map(str, lines[:_SHOWN])) + (", ..." if len(lines) > _SHOWN else "")
            first = "" if len(lines) == 1 else f"; line {lines[0]}"
            detail = f"{first}: {self.details[reason]}" if self.details.get(reason) else ""
            warn(f"{self.path}: skipped {len(lines):,}: {reason} (line {numbers}{detail})")
        warn(
            f"{self.path}: skipped {len(self.skipped):,} of {self.lines:,} lines in all; --strict stops there"
        )

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
            "pairs": self.pairs,
            "skipped": len(self.skipped),
            "reasons": {reason: len(lines) for reason, lines in self.by_reason().items()},
        }


def read_pairs(
    path: Path | str | Iterable[Mapping[str, Any]], strict: bool = False, every_turn: bool = False
) -> tuple[list[Pair], ReadReport]:
    """Read questions and answers from a JSONL file, a .parquet file, or rows in memory (a datasets.Dataset).

    Args:
        path: the file; lines end with LF or CRLF, blank ones do not count. Rows count as lines, from 1.
        strict: make the first bad line an error instead of skipping it.
        every_turn: of a conversation, one pair for each thing that the assistant says, all with the same
            line; False: the last only, which holds the whole conversation, so that a line is one pair.

    Raises:
        InputError: for a file that cannot be read, has another format or encoding, or holds no good pair.
    """
    if not isinstance(path, Path | str):
        return _read_rows(path, Path("the data set"), strict, every_turn)
    path = Path(path)
    if path.suffix == ".parquet" and path.is_file():
        return _read_rows(parquet_rows(path), path, strict, every_turn)
    try:
        with path.open("rb") as file:
            return _read(file, path, strict, every_turn)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist (looked for it from {Path.cwd()})") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a directory; give a JSONL file, one {EXAMPLE} a line") from None


def _read_rows(
    rows: Iterable[Mapping[str, Any]], path: Path, strict: bool, every_turn: bool
) -> tuple[list[Pair], ReadReport]:
    """As `_read`, with one object after the other; each is written out as the line that it would be."""
    lines = (
        json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass") for row in rows
    )
    report, digest = ReadReport(path), hashlib.sha256()
    pairs: list[Pair] = []
    taking = _Taking(path, every_turn)
    for number, line in enumerate(lines, 1):
        digest.update(line + b"\n")
        report.lines += 1
        try:
            pairs += taking.pairs(line, number)
        except BadLine as bad:
            if strict:
                raise InputError(f"{path}:{number}: {bad}") from None
            report.skipped.append((number, bad.reason))
            report.details.setdefault(bad.reason, bad.detail)
    report.pairs, report.sha256 = len(pairs), digest.hexdigest()
    if not pairs:
        why = "; ".join(f"{reason} ({len(rows)} rows)" for reason, rows in report.by_reason().items())
        raise InputError(
            f"{path} holds no good pair; a row needs a question and an answer: {why or 'no rows'}"
        )
    return pairs, report


class _Taking:
    """Takes pairs out of lines; the first line whose fields are known decides for all."""

    def __init__(self, path: Path, every_turn: bool) -> None:
        self.path, self.every_turn = path, every_turn
        self.shape: Shape | None = None

    def pairs(self, line: bytes, number: int) -> list[Pair]:
        """The pairs of one line. Raises BadLine, or InputError if the file holds texts."""
        text, item = parse_line(line)
        if self.shape is None and (shape := shape_of(item)):
            if shape == "text":
                raise InputError(
                    f"{self.path}:{number} holds a text, no question and answer; to learn from texts: "
                    f"minigpt train --text {self.path}"
                )
            self.shape = shape
        found = pairs_of(item, self.shape or "question")
        return [Pair(*pair, number, text) for pair in (found if self.every_turn else found[-1:])]


def _read(
    file: io.BufferedReader, path: Path, strict: bool, every_turn: bool
) -> tuple[list[Pair], ReadReport]:
    head = file.peek(4096)[:4096]  # looks ahead without moving on: a pipe cannot go back
    if not head:
        raise InputError(f"{path} is empty; it needs one {EXAMPLE} a line")
    refuse_other_formats(head, path, f"one {EXAMPLE} a line", "new.jsonl", ("question", "answer"))
    report, digest = ReadReport(path), hashlib.sha256()
    pairs: list[Pair] = []
    taking = _Taking(path, every_turn)
    size, done = os.fstat(file.fileno()).st_size, 0
    with ProgressLine("reading, MB", size // 1_000_000, patience=2.0) as progress:
        # bytes, because text files split at more than LF: U+2028 may stand inside an answer
        for number, line in enumerate(file, 1):
            digest.update(line)
            done += len(line)
            progress.update(done // 1_000_000)
            line = line.removesuffix(b"\n").removesuffix(b"\r").removeprefix(BOM)
            if not line.strip():
                continue
            report.lines += 1
            try:
                pairs += taking.pairs(line, number)
            except BadLine as bad:
                if report.lines == 1:
                    _refuse_other_json(line, path)
                if bad.reason == NOT_UTF8 and bad.reason not in report.details:
                    refuse_gb18030(file, path)
                if strict:
                    raise InputError(f"{path}:{number}: {bad}") from None
                report.skipped.append((number, bad.reason))
                report.details.setdefault(bad.reason, bad.detail)
    report.pairs, report.sha256 = len(pairs), digest.hexdigest()
    if not pairs:
        raise _nothing_good(file, report)
    return pairs, report


def _refuse_other_json(line: bytes, path: Path) -> None:
    """What the first line that is not blank tells, when it is no good pair."""
    start = line.strip()
    if start == b"{":
        raise to_convert(path, _SPREAD, "jq -c .")
    if start.startswith(b"["):
        try:
            content = json.loads(start)
        except (ValueError, RecursionError):  # the array goes on in the next line
            content = [{}]
        if content and isinstance(content[0], dict):
            raise to_convert(path, "is a JSON array, not one object a line", "jq -c '.[]'")


def _nothing_good(file: BinaryIO, report: ReadReport) -> InputError:
    path = report.path
    if not report.lines:
        return InputError(f"{path} has only blank lines; it needs one {EXAMPLE} a line")
    reasons = report.by_reason()
    if ONLY_CR in reasons:
        return to_convert(path, "has lines that end with CR, not LF", r"tr '\r' '\n' <")
    if file.seekable():
        file.seek(0)
        start = file.read(_HEAD).removeprefix(BOM)
        if _spreads_an_object(start):
            return to_convert(path, _SPREAD, "jq -c .")
        if b"\0" in start and not start.lstrip().startswith(b"{"):
            return InputError(f"{path} is no text file; it needs one {EXAMPLE} a line, in UTF-8")
    listed = [
        f"{reason}{f': {report.details[reason]}' if report.details[reason] else ''} "
        f"({len(lines)} {'line' if len(lines) == 1 else 'lines'}, first: {lines[0]})"
        for reason, lines in list(reasons.items())[:3]
    ]
    return InputError(f"{path} holds no good pair; it needs one {EXAMPLE} a line, but: {'; '.join(listed)}")


def _spreads_an_object(start: bytes) -> bool:
    text = start.decode("utf-8", "replace").strip()
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return text.startswith("{") and "\n" in text[:end]
