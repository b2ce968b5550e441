r"""Reads tables that are drawn with characters, as in Markdown, org-mode, psql and mysql.

    | question | answer |        question | answer         +----------+--------+
    |----------|--------|       ----------+--------        | question | answer |
    | 1 + 1?   | 2      |        1 + 1?   | 2              +----------+--------+
                                                           | 1 + 1?   | 2      |

The line of dashes below the first row shows that this row has the column names. In a cell, `\|` is a bar and
`<br>` a newline. A text may have several tables; the lines around them are left out.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from minigpt.data.field_names import has_answers
from minigpt.data.json_values import Record
from minigpt.data.tables import IsHead, row_record

__all__ = ["DrawnTables", "drawn_tables"]

# `*+` is possessive: with `*`, the search in a line of n spaces would take n * n steps
_RULE = re.compile(r"[ \t]*+[|+]?[ \t]*+:?-+:?[ \t]*+(?:[|+][ \t]*+:?-+:?[ \t]*+)*[|+]?[ \t\r]*")
_BAR = re.compile(r"(?<!\\)\|")
_LINE_END = re.compile(r"<br\s*/?>", re.IGNORECASE)
_SHARE = 0.5  # smallest share of a text's lines that must be rows of tables


class DrawnTables(NamedTuple):
    """The rows of a text's tables."""

    records: list[Record]
    notes: tuple[str, ...]  # sentences for the user about lines that were left out


def drawn_tables(text: str, path: Path, is_head: IsHead, needs_head: bool = False) -> DrawnTables | None:
    """Read the tables of a text. Return None if too few lines of the text are rows (see `_SHARE`).

    Args:
        is_head: a function: gets the cells of a table's first row in lower case, returns True if they are
            column names that minigpt knows.
        needs_head: if True, return None unless at least one of the tables has known column names and a
            column of answers.
    """
    if "|" not in text or "--" not in text:
        return None
    lines = text.split("\n")
    records: list[Record] = []
    rows, is_known = 0, False
    for first, stop in _tables(lines):
        names = _cells(lines[first])
        lower = [name.lower() for name in names]
        is_known = is_known or (is_head(lower) and has_answers(lower))
        inside = [number for number in range(first + 1, stop) if not _RULE.fullmatch(lines[number])]
        rows += 1 + len(inside)
        records += [row_record(number + 1, names, _cells(lines[number])) for number in inside]
    others = sum(bool(line.strip()) and not _RULE.fullmatch(line) for line in lines) - rows
    if not records or rows * _SHARE < others * (1 - _SHARE) or (needs_head and not is_known):
        return None
    left = f"{path}: {others:,} line{'' if others == 1 else 's'} outside of the tables left out"
    return DrawnTables(records, (left,) if others else ())


def _tables(lines: list[str]) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) for each table: its lines are lines[start:stop]."""
    number = 1
    while number < len(lines):
        names = _cells(lines[number - 1])
        if len(names) > 1 and len(names) == _columns(lines[number]):
            first = number - 1
            while number < len(lines) and (_BAR.search(lines[number]) or _RULE.fullmatch(lines[number])):
                number += 1
            yield first, number
        number += 1


def _columns(line: str) -> int:
    """Return the number of columns of a line of dashes; 0 for any other line."""
    if not _RULE.fullmatch(line):
        return 0
    return len(re.split(r"[|+]", line.strip().strip("|+")))


def _cells(line: str) -> list[str]:
    r"""Return the cells of a row.

    >>> _cells(r"| a \| b | c<br>d |"), _cells(" a | b")
    (['a | b', 'c\nd'], ['a', 'b'])
    """
    row = line.strip().removeprefix("|")
    if row.endswith("|") and not row.endswith("\\|"):
        row = row[:-1]
    return [_LINE_END.sub("\n", cell.replace("\\|", "|")).strip() for cell in _BAR.split(row)]
