"""Reading questions and answers: one {"question": ..., "answer": ...} object a line, UTF-8.

Bad lines are skipped, counted and named; `strict` makes the first one an error. What is wrong with the whole
file (it is missing, empty, a JSON array, GBK, ...) is one clear error. Nothing is repaired silently, except
that a byte order mark and the CR of CRLF are not part of the text.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from minigpt.command_line import InputError
from minigpt.terminal import warn

__all__ = ["Pair", "ReadReport", "read_pairs"]


class Pair(NamedTuple):
    """A question and its answer, with the line (from 1) that they stand in and that line's text."""

    question: str
    answer: str
    line: int
    raw: str


@dataclass
class ReadReport:
    """What was read and what was not."""

    path: Path
    lines: int = 0
    pairs: int = 0
    skipped: list[tuple[int, str]] = field(default_factory=list)  # line, reason

    def print_summary(self) -> None:
        """Warn about skipped lines, if there are any: each reason once, with its first lines."""
        if not self.skipped:
            return
        for reason, count in Counter(reason for _, reason in self.skipped).most_common():
            where = [str(line) for line, why in self.skipped if why == reason]
            dots = ", ..." if count > 5 else ""
            warn(f"{self.path}: skipped {count}: {reason} (line {', '.join(where[:5])}{dots})")
        warn(f"{self.path}: {len(self.skipped)} of {self.lines} lines were skipped")

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        reasons = Counter(reason for _, reason in self.skipped)
        return {
            "lines": self.lines,
            "pairs": self.pairs,
            "skipped": len(self.skipped),
            "reasons": dict(reasons),
        }


class _BadLine(Exception):  # noqa: N818
    pass


def read_pairs(path: Path | str, strict: bool = False) -> tuple[list[Pair], ReadReport]:
    """Read a JSONL file of questions and answers.

    Args:
        path: the file; lines end with LF or CRLF, blank ones do not count.
        strict: make the first bad line an error instead of skipping it.

    Raises:
        InputError: for a file that cannot be read, has another format or encoding, or holds no good pair.
    """
    path = Path(path)
    content = _content(path)
    report, pairs = ReadReport(path), []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        report.lines += 1
        try:
            pairs.append(_pair(line.removesuffix(b"\r"), number))
        except _BadLine as bad:
            if strict:
                raise InputError(f"{path}:{number}: {bad}") from None
            report.skipped.append((number, str(bad)))
    report.pairs = len(pairs)
    if not pairs:
        raise InputError(_nothing_good(path, content, report))
    return pairs, report


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise InputError(
            f'{path} is a directory; give a JSONL file, one {{"question", "answer"}} a line'
        ) from None
    content = content.removeprefix(b"\xef\xbb\xbf")
    head = content[:4096]
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or _looks_like_utf16(head):
        raise InputError(
            f"{path} is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 {path} > new.jsonl"
        )
    if head.startswith(b"\x1f\x8b"):
        raise InputError(f"{path} is compressed; unpack it first: gzip -dc {path} > new.jsonl")
    if not content.strip():
        raise InputError(f'{path} is empty; it needs one {{"question", "answer"}} object a line')
    return content


def _looks_like_utf16(head: bytes) -> bool:
    """Without a mark: in JSON every second byte of the quotes, braces and colons is then zero."""
    if len(head) < 4:
        return False
    return b'{\x00"\x00' in head[:64] or b'\x00{\x00"' in head[:64]


def _pair(line: bytes, number: int) -> Pair:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _BadLine(f"not UTF-8 (byte 0x{line[error.start]:02x})") from None
    try:
        item = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise _BadLine(f"broken JSON: {error.msg}") from None
    except (RecursionError, ValueError):
        raise _BadLine("broken JSON: a value that cannot be read") from None
    if not isinstance(item, dict):
        raise _BadLine(f"not an object but {_kind(item)}")
    return Pair(_field(item, "question"), _field(item, "answer"), number, text)


def _unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = Counter(key for key, _ in items)
    for key in ("question", "answer"):
        if keys[key] > 1:
            raise _BadLine(f"`{key}` stands there {keys[key]} times")
    return dict(items)


def _no_constant(name: str) -> Any:
    raise _BadLine(f"broken JSON: {name} is no JSON value")


def _field(item: dict[str, Any], key: str) -> str:
    if key not in item:
        raise _BadLine(f"`{key}` is missing")
    value = item[key]
    if not isinstance(value, str):
        raise _BadLine(f"`{key}` is {_kind(value)}, not text")
    if not value.strip():
        raise _BadLine(f"`{key}` is empty")
    if "\0" in value:
        raise _BadLine(f"`{key}` holds a NUL character")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise _BadLine(f"`{key}` holds half a character (a lone surrogate)")
    return value


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text"}
    return {**names, list: "a list", dict: "an object"}[type(value)]


def _nothing_good(path: Path, content: bytes, report: ReadReport) -> str:
    start = content.lstrip()[:1]
    if start == b"[":
        return f"{path} is a JSON array, not one object a line; convert it: jq -c '.[]' {path} > new.jsonl"
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        try:
            content.decode("gb18030")
        except UnicodeDecodeError:
            return f"{path} is not UTF-8 text; convert it to UTF-8, one object a line"
        return f"{path} looks like GBK/GB18030, not UTF-8; convert it: iconv -f GB18030 -t UTF-8 {path} > new.jsonl"
    if start == b"{":
        try:
            json.loads(content)
        except ValueError:
            pass
        else:
            if b"\n" in content.strip():
                return f"{path} is one object over many lines; write one object a line: jq -c . {path} > new.jsonl"
    reasons = Counter(reason for _, reason in report.skipped).most_common(3)
    listed = "; ".join(f"{reason} ({count})" for reason, count in reasons)
    return f"{path} holds no good pair in {report.lines} lines: {listed}"
