"""Reading questions and answers: one {"question": ..., "answer": ...} object a line, UTF-8.

    pairs, report = read_pairs("data/data.jsonl")
    report.print_summary()  # the lines that were skipped, if any, on stderr

Bad lines are skipped, counted and named; `strict` makes the first one an error. What is wrong with the file
as a whole (it is missing, empty, a JSON array, GBK, ...) is one clear error that says what to do. Nothing is
repaired silently, except that a byte order mark and the CR of CRLF are not part of the text.

The file is read line by line, once; a pipe will do.
"""

import hashlib
import io
import json
import os
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from minigpt.command_line import InputError
from minigpt.terminal import ProgressLine, warn

__all__ = ["Pair", "ReadReport", "read_pairs"]

EXAMPLE = '{"question": "...", "answer": "..."}'
_SHOWN = 5  # lines that a summary names for each reason
_HEAD = 1 << 20  # bytes that are enough to tell what a file is
_BOM = b"\xef\xbb\xbf"
_NOT_UTF8 = "not UTF-8"
_SPREAD = "has its objects spread over many lines, not one a line"
_ONLY_CR = "several lines, ended by CR instead of LF"
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of characters from "\ud800" escapes

_ENCODINGS = {  # what a file starts with -> iconv's name; the longer marks first
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_FORMATS = {  # what a file starts with -> what it is, the program that makes text of it
    b"\x1f\x8b": ("compressed (gzip)", "gzip -dc"),
    b"\xfd7zXZ\0": ("compressed (xz)", "xz -dc"),
    b"\x28\xb5\x2f\xfd": ("compressed (zstd)", "zstd -dc"),
    b"BZh": ("compressed (bzip2)", "bzip2 -dc"),
    b"PK\x03\x04": ("a zip or Excel file", ""),
    b"PAR1": ("a Parquet file", ""),
    b"SQLite format 3\0": ("an SQLite database", ""),
    b"%PDF": ("a PDF file", ""),
}


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


class _BadLine(Exception):  # noqa: N818
    """A line that is skipped. `reason` groups such lines, `detail` is the line's own."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def read_pairs(path: Path | str, strict: bool = False) -> tuple[list[Pair], ReadReport]:
    """Read a JSONL file of questions and answers.

    Args:
        path: the file; lines end with LF or CRLF, blank ones do not count.
        strict: make the first bad line an error instead of skipping it.

    Raises:
        InputError: for a file that cannot be read, has another format or encoding, or holds no good pair.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _read(file, path, strict)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist (looked for it from {Path.cwd()})") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a directory; give a JSONL file, one {EXAMPLE} a line") from None


def _read(file: io.BufferedReader, path: Path, strict: bool) -> tuple[list[Pair], ReadReport]:
    head = file.peek(4096)[:4096]  # looks ahead without moving on: a pipe cannot go back
    _refuse_other_formats(head, path)
    report, pairs, digest = ReadReport(path), [], hashlib.sha256()
    size, done = os.fstat(file.fileno()).st_size, 0
    with ProgressLine("reading, MB", size // 1_000_000, patience=2.0) as progress:
        # bytes, because text files split at more than LF: U+2028 may stand inside an answer
        for number, line in enumerate(file, 1):
            digest.update(line)
            done += len(line)
            progress.update(done // 1_000_000)
            line = line.removesuffix(b"\n").removesuffix(b"\r").removeprefix(_BOM)
            if not line.strip():
                continue
            report.lines += 1
            try:
                pairs.append(_pair(line, number))
            except _BadLine as bad:
                if report.lines == 1:
                    _refuse_other_json(line, path)
                if bad.reason == _NOT_UTF8 and bad.reason not in report.details:
                    _refuse_gb18030(file, path)
                if strict:
                    raise InputError(f"{path}:{number}: {bad}") from None
                report.skipped.append((number, bad.reason))
                report.details.setdefault(bad.reason, bad.detail)
    report.pairs, report.sha256 = len(pairs), digest.hexdigest()
    if not pairs:
        raise _nothing_good(file, report)
    return pairs, report


def _pair(line: bytes, number: int) -> Pair:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        raise _BadLine(_NOT_UTF8, where) from None
    try:
        item = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        if "\r" in text and error.msg == "Extra data":
            raise _BadLine(_ONLY_CR) from None
        raise _BadLine("broken JSON", f"{error.msg} at column {error.pos + 1}") from None
    except (RecursionError, ValueError):  # nested too deeply; a number of thousands of digits
        raise _BadLine("broken JSON", "a value that cannot be read") from None
    if not isinstance(item, dict):
        raise _BadLine("not an object", f"it is {_kind(item)}")
    return Pair(_text(item, "question"), _text(item, "answer"), number, text)


def _unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        keys = [key for key, _ in items]
        for key in ("question", "answer"):
            if keys.count(key) > 1:  # which one is meant?
                raise _BadLine(f"`{key}` stands there more than once")
    return found


def _no_constant(name: str) -> Any:
    raise _BadLine("broken JSON", f"{name} is no JSON value")


def _text(item: dict[str, Any], key: str) -> str:
    if key not in item:
        keys = ", ".join(map(repr, list(item)[:8])) or "no keys at all"
        raise _BadLine(f"`{key}` is missing", f"it has {keys}")
    value = item[key]
    if not isinstance(value, str):
        raise _BadLine(f"`{key}` is {_kind(value)}, not text")
    if not value.strip():
        raise _BadLine(f"`{key}` is empty")
    if found := _NO_TEXT.search(value):
        what = "NUL" if found[0] == "\0" else "half a character (a lone surrogate)"
        raise _BadLine(f"`{key}` holds {what}", f"at character {found.start() + 1}")
    return value


def _kind(value: object) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else "null")


def _refuse_other_formats(head: bytes, path: Path) -> None:
    """What the first bytes tell."""
    if not head:
        raise InputError(f"{path} is empty; it needs one {EXAMPLE} a line")
    encoding = next((name for mark, name in _ENCODINGS.items() if head.startswith(mark)), None)
    for code in (
        "UTF-16LE",
        "UTF-16BE",
    ):  # without a mark: the keys are there, with a zero in every character
        for key in ("question", "answer"):
            if head.find(f'"{key}"'.encode(code)) % 2 == 0:  # at an odd place, it is the other code's text
                encoding = encoding or code
    if encoding:
        raise _to_convert(path, f"is {encoding[:6]}, not UTF-8", f"iconv -f {encoding} -t UTF-8")
    for mark, (what, program) in _FORMATS.items():
        if head.startswith(mark):
            if program:
                raise _to_convert(path, f"is {what}", program)
            raise InputError(f"{path} is {what}; export it as text, one {EXAMPLE} a line")


def _to_convert(path: Path, what: str, program: str) -> InputError:
    return InputError(f"{path} {what}; convert it: {program} {shlex.quote(str(path))} > new.jsonl")


def _refuse_other_json(line: bytes, path: Path) -> None:
    """What the first line that is not blank tells, when it is no good pair."""
    start = line.strip()
    if start == b"{":
        raise _to_convert(path, _SPREAD, "jq -c .")
    if start.startswith(b"["):
        try:
            content = json.loads(start)
        except (ValueError, RecursionError):  # the array goes on in the next line
            content = [{}]
        if content and isinstance(content[0], dict):
            raise _to_convert(path, "is a JSON array, not one object a line", "jq -c '.[]'")


def _refuse_gb18030(file: BinaryIO, path: Path) -> None:
    """Tell a Chinese file in another encoding from a UTF-8 file with damaged lines: which has more lines?

    No byte of a GB18030 character is LF, so that lines can be judged one by one.
    """
    if not file.seekable():
        return
    here = file.tell()
    file.seek(0)
    utf8 = gb18030 = 0
    for line in file:
        if line.isascii():
            continue
        if _decodes(line, "utf-8"):
            utf8 += 1
        elif _decodes(line, "gb18030"):
            gb18030 += 1
        else:
            gb18030 = 0
            break
    file.seek(here)
    if gb18030 > utf8:
        raise _to_convert(path, "looks like GBK/GB18030, not UTF-8", "iconv -f GB18030 -t UTF-8")


def _decodes(line: bytes, encoding: str) -> bool:
    try:
        line.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _nothing_good(file: BinaryIO, report: ReadReport) -> InputError:
    path = report.path
    if not report.lines:
        return InputError(f"{path} has only blank lines; it needs one {EXAMPLE} a line")
    reasons = report.by_reason()
    if _ONLY_CR in reasons:
        return _to_convert(path, "has lines that end with CR, not LF", r"tr '\r' '\n' <")
    if file.seekable():
        file.seek(0)
        start = file.read(_HEAD).removeprefix(_BOM)
        if _spreads_an_object(start):
            return _to_convert(path, _SPREAD, "jq -c .")
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
