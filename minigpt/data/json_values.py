"""Reads JSON: one value in a file, or one value per line. A broken record becomes a `BadLine`.

    looks_like_json(text)                      # False for a text that only begins with a bracket
    kind, records = json_records(text)         # records: Record(line, value, raw)

If an object has a key twice, the key gets the value `REPEATED`, because either value could be meant.
"""

import ast
import itertools
import json
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Literal, NamedTuple

from minigpt.data.conversation import ROLES, SPEAKER_KEYS, TEXT_KEYS
from minigpt.data.text_encoding import BAD_BYTES

__all__ = [
    "NESTED", "NOT_TEXT", "REPEATED", "BadLine", "Record",
    "as_json", "is_turn", "json_object", "json_records", "looks_like_json", "parse_line", "parse_list",
    "parse_value", "shown_before", "structure_in",
]  # fmt: skip

NOT_TEXT = "bytes that are no character"
# A record with one of these keys may hold several conversations or questions, if the key's value has the type
# on the right.
NESTED: dict[str, type] = {
    **dict.fromkeys(("mapping", "evidences", "chat", "prompt"), dict),
    **dict.fromkeys(("chat_messages", "paragraphs", "qas", "patterns"), list),
    **dict.fromkeys(("plain_text", "textbox_question"), str),
}
_FEWEST = 3  # an object {question: answer, ...} with fewer questions is not taken for data
_DEEPEST = 64  # deepest nesting of a JSON value; conversations need three or four levels


class BadLine(Exception):  # noqa: N818 -- always caught by minigpt; users never see this exception
    """The error of a record that is skipped.

    `reason` is a general text, such as "not an object": the records that were skipped for the same reason are
    counted together. `detail` describes only this record.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class Record(NamedTuple):
    """One record of a file."""

    line: int  # line on which the record begins, from 1; in Parquet and Excel the row, from 1
    value: Any  # a JSON value: dictionary, list, text, ...; or a BadLine
    raw: str  # the record as one line of JSON; "": not kept


class _Repeated:
    """The type of REPEATED, the value that a key gets if an object has the key twice."""


REPEATED = _Repeated()


def json_object(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dictionary. A key that occurs more than once gets the value REPEATED."""
    found: dict[str, Any] = {}
    for key, value in items:
        found[key] = REPEATED if key in found else value
    return found


def as_json(value: Any) -> str:
    """Return a value as one line of JSON.

    REPEATED becomes null. A value of a type that JSON does not have, such as a date, becomes text.
    """
    text = json.dumps(value, ensure_ascii=False, default=lambda part: None if part is REPEATED else str(part))
    return text.encode("utf-8", "backslashreplace").decode()  # a lone surrogate becomes an escape sequence


# -- one JSON value ------------------------------------------------------------------------------------------

_DECODER = json.JSONDecoder(object_pairs_hook=json_object)
_BLANK = re.compile(r"[ \t\r\n\ufeff]*")


def parse_value(text: str) -> Any:
    """Parse a text that is one JSON value.

    Raises:
        BadLine: if the text is not exactly one JSON value.
    """
    value, end = _value(text, _end_of_blank(text, 0))
    if _end_of_blank(text, end) < len(text):
        raise BadLine("broken JSON", f"something follows the value at column {end + 1}")
    return value


def parse_list(text: str) -> list[Any]:
    """Parse a list in a table's cell: JSON or Python's notation. Raise BadLine for anything else."""
    found = structure_in(text)
    if not isinstance(found, list):
        raise BadLine("it is text, not a list")
    return found


def structure_in(text: str) -> Any:
    """Parse a list or an object in a table's cell: JSON, or Python's notation, which pandas writes.

    Returns: a list or a dictionary, or the text itself if it is neither.

    >>> structure_in("{'a': 1}"), structure_in("{{1}: 2}")  # a set cannot be a key
    ({'a': 1}, '{{1}: 2}')
    """
    if not text.lstrip().startswith(("[", "{")):
        return text
    try:
        found = parse_value(text)
    except BadLine:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python would warn about an unknown escape such as \d
                found = ast.literal_eval(text.strip())
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return text
    return found if isinstance(found, list | dict) else text


def parse_line(line: bytes) -> Any:
    """Parse one line of JSON Lines.

    Raises:
        BadLine: if the line is not UTF-8, or not exactly one JSON value.
    """
    text = line.decode("utf-8", "surrogateescape")
    if found := BAD_BYTES.search(text):
        raise _not_text(text, found.start())
    return parse_value(text)


def _value(text: str, begin: int) -> tuple[Any, int]:
    """Return the JSON value at position `begin`, and the position after it. Broken JSON raises BadLine."""
    try:
        value, end = _DECODER.raw_decode(text, begin)
    except json.JSONDecodeError as error:
        raise BadLine("broken JSON", f"{error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError):  # nested too deeply, or a number with thousands of digits
        raise BadLine("broken JSON", "a value that cannot be read") from None
    if _depth(value) > _DEEPEST:
        raise BadLine("broken JSON", f"nested more than {_DEEPEST} levels deep")
    return value, end


def _depth(value: Any) -> int:
    level, values = 0, [value]
    while values and level <= _DEEPEST:
        level += 1
        inner: list[Any] = []
        for each in values:
            if isinstance(each, dict):
                inner += each.values()
            elif isinstance(each, list):
                inner += each
        values = inner
    return level


def _end_of_blank(text: str, begin: int) -> int:
    found = _BLANK.match(text, begin)
    return found.end() if found else begin


def shown_before(line: str, place: int) -> str:
    """Return the characters in front of a place in a line, for an error message.

    >>> shown_before("床前明月光", 3)
    "'床前明' (character 4)"
    """
    return f"{line[max(0, place - 8) : place]!r} (character {place + 1})"


def _not_text(line: str, place: int) -> BadLine:
    byte = ord(line[place]) - 0xDC00
    return BadLine(NOT_TEXT, f"byte 0x{byte:02x} behind {shown_before(line, place)}")


# -- JSON, or a text that begins with a bracket --------------------------------------------------------------

_BEGINNING = 1 << 20  # number of characters at the beginning that `looks_like_json` examines
_FIRST_LINES = 20
# The beginning of JSON that cannot be parsed: an object with a key in quotes of any kind or without quotes,
# an array that begins with a string, or only brackets.
_BROKEN = re.compile(
    r"""(?:\[\s*)*+ (?: \{\s*(?: ["'“”‘’] | \w+\s*:\s*["'“\d\[{] | \Z ) | \Z )"""
    r"""| (?:\[\s*)++ "[^"\\]*(?:\\.[^"\\]*)* (?: "\s*[,\]] | \Z )""",
    re.DOTALL | re.VERBOSE,
)


def looks_like_json(text: str) -> bool:
    """Return True if a text is JSON, even broken JSON, and not prose. Only its beginning is examined.

    >>> looks_like_json('{"question": "a", "ans'), looks_like_json("[Verse 1] La la")
    (True, False)
    """
    if json_in_json(text) is not None:
        return True
    text = text[:_BEGINNING]
    begin = _end_of_blank(text, 0)
    if text.startswith(("[", "{"), begin):
        try:
            value, end = _value(text, begin)
            rest = text[end:].lstrip(" \t\r\ufeff")
            if not rest.strip() or (_holds_an_object(value) and rest[0] in "\n[{,"):
                return True
        except BadLine:
            if _BROKEN.match(text, begin):
                return True
    lines = _first_lines(text)
    return 2 * sum(_is_value(line) or bool(_BROKEN.match(line)) for line in lines) > len(lines)


_STRING_OF_JSON = re.compile(r'[\ufeff\s]*"[\[{]')  # beginning of a JSON string that contains JSON


def json_in_json(text: str) -> str | None:
    """Return the text inside a JSON string, if that text is JSON: '"{...}"' gives '{...}'; else None."""
    if not _STRING_OF_JSON.match(text):
        return None
    try:
        inner = parse_value(text)
    except BadLine:
        return None
    return inner if isinstance(inner, str) and inner.lstrip().startswith(("{", "[")) else None


def _first_lines(text: str) -> list[str]:
    """Return the first lines that are not blank."""
    found = itertools.islice(re.finditer(r"[^\n]*\S[^\n]*", text), _FIRST_LINES)
    return [line[0].strip() for line in found]


def _is_value(line: str) -> bool:
    """Return True if a line is exactly one object or array, possibly inside a JSON string."""
    try:
        value = parse_value(line)
        if isinstance(value, str) and value.startswith(("{", "[")):
            value = parse_value(value)
        return isinstance(value, dict | list)
    except BadLine:
        return False


def _holds_an_object(value: Any) -> bool:
    return bool(value) and (
        isinstance(value, dict) or (isinstance(value, list) and any(map(_holds_an_object, value)))
    )


# -- records -------------------------------------------------------------------------------------------------


def json_records(
    text: str, is_head: Callable[[Collection[str]], bool] = lambda keys: False
) -> tuple[Literal["jsonl", "json"], Iterable[Record]]:
    """Read the records of a JSON text, which has one value per line or one value for all records.

    Args:
        is_head: a function that gets the keys of an object in lower case, and returns True if the object is
            a record.
    """
    inner = json_in_json(text)
    if inner is not None:
        return json_records(inner, is_head)
    begin = _end_of_blank(text, 0)
    line_end = text.find("\n", begin)
    first_line = text[begin : len(text) if line_end < 0 else line_end]
    try:
        _, end = _value(first_line, 0)
        if _end_of_blank(text, begin + end) < len(text):
            return "jsonl", _lines(text)
    except BadLine:
        pass  # no error: the first line may be only the beginning of a value of several lines
    try:
        value, end = _value(text, begin)
    except BadLine:
        in_lines = first_line.strip("[ \t\r") and _in_lines(text)
        if text[begin] == "[" and not in_lines:
            return "json", _values(text, _end_of_blank(text, begin + 1), in_array=True)
        return "jsonl", _lines(text)
    if _end_of_blank(text, end) < len(text):
        return "json", _values(text, begin)
    if isinstance(value, list):
        if value and all(isinstance(item, dict) and is_turn(item) for item in value):
            return "json", [Record(1, value, as_json(value))]  # an array of turns is one conversation
        return "json", _values(text, _end_of_blank(text, begin + 1), in_array=True)
    inside = _inside(value, is_head)
    if inside is not None:
        return "json", [Record(number, item, as_json(item)) for number, item in enumerate(inside, 1)]
    raw = text[begin:end]
    line = text.count("\n", 0, begin) + 1
    return "jsonl", [Record(line, value, raw if "\n" not in raw else as_json(value))]


def _in_lines(text: str) -> bool:
    lines = _first_lines(text)
    return 2 * sum(map(_is_value, lines)) > len(lines)


def is_turn(item: dict[str, Any]) -> bool:
    """Return True if an object is a turn of a conversation: it has a role and a text."""
    if ("role" in item and "content" in item) or ("from" in item and "value" in item):
        return True
    speaker = next((item[key] for key in SPEAKER_KEYS if key in item), None)
    return str(speaker).strip().lower() in ROLES and any(key in item for key in TEXT_KEYS)


def _is_nested(value: dict[str, Any]) -> bool:
    return any(isinstance(value.get(key), kind) for key, kind in NESTED.items())


def _inside(value: dict[str, Any], is_head: Callable[[Collection[str]], bool]) -> list[Any] | None:
    """Return the records inside an object, for example in a list; None: the object itself is a record."""
    lists = {key: item for key, item in value.items() if isinstance(item, list)}
    if lists and len(lists) == len(value) and len({len(item) for item in lists.values()}) == 1:
        count = len(next(iter(lists.values())))
        if len(lists) > 1 and not any(
            isinstance(item, dict | list) for row in lists.values() for item in row
        ):
            return [{key: lists[key][i] for key in lists} for i in range(count)]
    if _is_nested(value):
        return None
    records = [item for item in lists.values() if item and all(isinstance(row, dict) for row in item)]
    if len(records) == 1 and not all(is_turn(row) for row in records[0]):
        rows = records[0]
        others = [str(key).strip().lower() for key, item in value.items() if item is not rows]
        own = next(str(key).strip().lower() for key, item in value.items() if item is rows)
        if _is_nested(rows[0]):
            return rows
        if is_head([*others, own]) and not is_head([own, ""]) and not is_head([*others, ""]):
            return None  # the object is one record with a list: {"question": ..., "answer": [...]}
        if len(others) > 1 and is_head(others):  # the object is one record; one of its values is a list
            return None
        if all(is_head([str(key).strip().lower() for key in row]) for row in rows):
            return rows
        return None if is_head([*others, own]) or (others and is_head([*others, ""])) else rows
    if len(records) > 1 and all(
        is_head([str(key).strip().lower() for key in row]) for rows in records for row in rows
    ):
        return list(itertools.chain(*records))  # the records of both lists of {"train": [...], "test": [...]}
    inner = [item for item in value.values() if isinstance(item, dict)]
    if len(inner) == 1 and not is_head([str(key).strip().lower() for key in value]):
        return _inside(inner[0], is_head)  # the records are in the inner object: {"code": 0, "data": {...}}
    inner_lists = [item for item in lists.values() if item and all(isinstance(row, list) for row in item)]
    if len(inner_lists) == 1 and not is_head([str(key).strip().lower() for key in value]):
        return inner_lists[0]  # the list inside {"pairs": [[question, answer], ...]}
    by_index = list(value.values())
    if by_index and all(isinstance(item, dict) for item in by_index):
        keys = [list(item) for item in by_index]
        if all(key.isdigit() for item in keys for key in item) and len(set(map(tuple, keys))) == 1:
            # pandas' to_json() writes columns: {"question": {"0": ..., "1": ...}, "answer": {...}}
            return [{name: column[key] for name, column in value.items()} for key in keys[0]]
        names = [{str(key).strip().lower() for key in item} for item in by_index]
        if len(names) > 1 and (all(map(is_head, names)) or all("evidences" in each for each in names)):
            return by_index  # the records of {"id 1": {...}, "id 2": {...}}
    asked = sum(str(key).strip().endswith(("?", "？")) for key in value)
    if all(isinstance(item, str) for item in by_index) and 2 * asked > len(value) >= _FEWEST:
        return [{"question": key, "answer": item} for key, item in value.items()]
    return None


def _lines(text: str) -> Iterator[Record]:
    """Yield the values of JSON Lines. A line may hold several values, one after another."""
    # splitlines() would also split at U+2028, which may be inside an answer
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r").removeprefix("\ufeff")
        if not line.strip():
            continue
        if found := BAD_BYTES.search(line):
            yield Record(number, _not_text(line, found.start()), line)
            continue
        begin, several = _end_of_blank(line, 0), []
        try:
            while begin < len(line):
                value, end = _value(line, begin)
                several.append(Record(number, value, line[begin:end]))
                begin = _end_of_blank(line, end)
                if line[begin:].rstrip() == ",":  # the file is an array with one element in each line
                    break
        except BadLine as bad:
            several.append(Record(number, bad, line[begin:]))
        if len(several) == 1:
            yield several[0]._replace(raw=line)
        else:
            yield from several


def _values(text: str, begin: int, in_array: bool = False) -> Iterator[Record]:
    """Yield consecutive values, or the elements of an array. A value may take several lines."""
    line, counted = 1, 0
    while begin < len(text) and not (in_array and text[begin] == "]"):
        line, counted = line + text.count("\n", counted, begin), begin
        try:
            value, end = _value(text, begin)
        except BadLine as bad:
            where = " in the array" if in_array else ""
            yield Record(
                line, BadLine(f"{bad.reason}, and all that follows it{where} is lost", bad.detail), ""
            )
            return
        yield Record(line, value, as_json(value))
        begin = _end_of_blank(text, end)
        if in_array and text[begin : begin + 1] == ",":
            begin = _end_of_blank(text, begin + 1)
    if in_array and begin == len(text):
        yield Record(line, BadLine("broken JSON", "the array has no end: the file is cut short"), "")
    elif in_array and _end_of_blank(text, begin + 1) < len(text):
        yield Record(line, BadLine("broken JSON", "more follows behind the array"), "")
