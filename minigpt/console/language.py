"""The language of messages: English, or Chinese from minigpt/translations/zh.mo.

    set_language("zh")
    translated("The machine")                                        # "机器"
    say("{count:,} files in {path}", count=3, path="books")          # "books 里的 3 个文件"
    wrapped("一条命令做完全部", 8)                                      # ["一条命令", "做完全部"]

The English text is the key of a translation. A message with values is a `Message`: an English text that
remembers its template and its values. It is translated only where a command prints it for a user. Files, the
output of --json, and errors of the Python interface stay English.
"""

import errno
import os
import re
import string
import textwrap
import unicodedata
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from minigpt.errors import Message

if TYPE_CHECKING:
    from gettext import GNUTranslations

__all__ = [
    "SYSTEM_ERRORS", "Language", "chosen_language", "language", "language_of", "say", "set_language",
    "translated", "wrapped",
]  # fmt: skip

Language: TypeAlias = Literal["en", "zh"]
# Error numbers of the operating system whose messages the catalogue zh.mo translates.
SYSTEM_ERRORS = (
    errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOSPC, errno.EROFS,
)  # fmt: skip
_CATALOGUE = Path(__file__).parents[1] / "translations" / "zh.mo"
_NOT_FIRST = "，。；：、！？）】》”’…—,.;:!?)]}%"  # no line may begin with one of these characters
_NOT_LAST = "（【《“‘([{"  # no line may end with one of these characters
# Short catalogue entries (see `_templates`) that are used for parts of a message, too. Other short ones could
# match a user's text.
_INSIDE = {"a part of {}", "holds no {}", "`{}` is empty", "has id {}", "--size {}"}
_PLACE = re.compile(r"\S+:\d+")  # name of a file and number of a line, as in "a.jsonl:3: `answer` is empty"

_language: Language = "en"


def chosen_language(wanted: str) -> Language:
    """Return the language of messages. "auto": the first of LC_ALL, LC_MESSAGES, LANG that is set decides."""
    if wanted == "auto":
        names = (os.environ.get(name, "") for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
        wanted = next((name for name in names if name), "")
    return "zh" if wanted.lower().startswith("zh") else "en"


def language_of(argv: Sequence[str]) -> Language:
    """Return the language that the flag --language chooses. Called before the flags are parsed."""
    for word, following in zip(argv, [*argv[1:], "auto"]):
        name, equals, value = word.partition("=")
        if name == "--language":
            return chosen_language(value if equals else following)
    return chosen_language("auto")


def set_language(chosen: Language) -> None:
    """Choose the language of this process. Only commands call this; in a notebook, all stays English."""
    global _language
    _language = chosen


def language() -> Language:
    """Return the language of this process."""
    return _language


@cache
def _catalogue() -> "GNUTranslations":
    from gettext import GNUTranslations

    with _CATALOGUE.open("rb") as file:
        return GNUTranslations(file)


def translated(text: str) -> str:
    """Return a text in the language of this process, or the English text if it has no translation."""
    if _language == "en" or not text:
        return text
    if not isinstance(text, Message):
        return _recognised(str(text))
    values = {k: translated(v) if isinstance(v, Message) else v for k, v in text.values.items()}
    return _catalogue().gettext(text.template).format(**values)


@lru_cache(256)
def _recognised(text: str, depth: int = 7, is_inside: bool = False) -> str:
    """Translate a text that an f-string made: "a.txt is empty" has the catalogue entry "{0} is empty".

    The values in the text are translated in the same way. So are the texts before and after "; " and ": ".
    A value, or a text beside ": ", may be the user's own, such as a question. A short catalogue entry (see
    `_templates`), such as "{0} has no {1}", could match it by chance. So for a value or a text beside ": ", a
    short entry is used only if it is in `_INSIDE`, or if its values are numbers, as in "5 records".

    Args:
        depth: how often a part may be divided again.
        is_inside: True: the text may be the user's own, because it is a value or stands beside ": ". False:
            it is a message of minigpt: a whole text, or the text behind a place such as "a.jsonl:3: ".
    """
    if not text:  # do not look up "": it is the key of the catalogue's header
        return text
    known = _catalogue().gettext(text)
    if known != text or " " not in text or not depth:
        return known
    for is_short in (False, True):
        for fixed, chinese in _templates(is_short):
            values = _between(fixed, text)
            if values is None or any(map(_closes_too_much, values)):
                continue
            is_value = is_inside or any(": " in value for value in values)
            if is_short and is_value and not ("{}".join(fixed) in _INSIDE or _are_numbers(values)):
                continue
            return chinese.format(
                *(_recognised(value, depth - 1, True) if " " in value else value for value in values)
            )
        # Joined messages are divided before short entries are tried: a short entry such as "{0} has no {1}"
        # could match a text that begins in one message and ends in the next.
        for mark in ("; ", ": ") if not is_short else ():
            first, found, second = text.partition(mark)
            if found:
                behind_place = mark == ": " and _PLACE.fullmatch(first)
                parts = (
                    _recognised(first, depth - 1, is_inside or mark == ": "),
                    _recognised(second, depth - 1, is_inside or (mark == ": " and not behind_place)),
                )
                if parts != (first, second):
                    is_place = mark == ": " and parts[0] == first
                    return (mark if is_place else {"; ": "；", ": ": "："}[mark]).join(parts)
    return text


def _are_numbers(values: Sequence[str]) -> bool:
    """Return True if the values are numbers; the first one may be another word if a number follows.

    >>> _are_numbers(["1,234"]), _are_numbers(["cat", "3", "5"]), _are_numbers(["many cats"])
    (True, True, False)
    """
    is_number = [value.replace(",", "").replace(".", "").isdecimal() for value in values]
    return any(is_number) and all(is_number[1:]) and (is_number[0] or " " not in values[0])


def _closes_too_much(value: str) -> bool:
    """Return True if a value closes a bracket that it has not opened. It then mixes parts of two messages.

    >>> _closes_too_much("line 1); empty (line 2"), _closes_too_much("a (b)")
    (True, False)
    """
    depth = 0
    for one in value:
        depth += (one == "(") - (one == ")")
        if depth < 0:
            return True
    return False


def _between(fixed: Sequence[str], text: str) -> list[str] | None:
    """Return the parts of a text between the texts in `fixed`; None if `fixed` does not match the text.

    >>> _between(["", " is empty: ", ""], "a.txt is empty: no line")
    ['a.txt', 'no line']
    """
    first, *middle, last = fixed
    if not (text.startswith(first) and text.endswith(last) and len(text) >= len(first) + len(last)):
        return None
    rest, values = text[len(first) : len(text) - len(last)], []
    for part in middle:
        value, found, rest = rest.partition(part)
        if not found:
            return None
        values.append(value)
    return [*values, rest]


@cache
def _templates(is_short: bool) -> list[tuple[list[str], str]]:
    """Return (texts around the values, translation) of the short or of the long catalogue entries with {0}.

    is_short=True: only the short entries, in which the texts around the values have fewer than 12 characters
    together. is_short=False: only the other entries. The longest entry comes first. Exception: of the short
    entries, those with one value come before those with several, because "my dog has no tail.txt is empty" is
    a case of "{0} is empty", not of "{0} has no {1}".
    """
    found = []
    for text, chinese in _catalogue()._catalog.items():  # type: ignore[attr-defined]
        if "{0}" in text:
            pieces = [part for part, _, _, _ in string.Formatter().parse(text)]
            fixed = [*pieces, ""] if text.endswith("}") and not text.endswith("}}") else pieces
            # all(...): leave out entries such as "{0}{1}", because {0} could end anywhere
            if (sum(map(len, fixed)) < 12) == is_short and all(fixed[1:-1]):
                found.append((fixed, chinese))
    return sorted(found, key=lambda one: (is_short and len(one[0]) > 2, -sum(map(len, one[0]))))


def say(template: str, /, **values: object) -> str:
    """Return a message in the language of this process, with its values."""
    return translated(Message(template, **values))


def wrapped(text: str, width: int) -> list[str]:
    """Return the lines of a text, each of at most `width` columns. A Chinese character takes two columns.

    >>> wrapped("一个字一个词元，由 char 选择", 12)
    ['一个字一个词', '元，由 char', '选择']
    """
    if text.isascii():
        return textwrap.wrap(text, width)
    lines, line = [], ""
    for piece in _pieces(text):
        if line and columns(line + piece.rstrip()) > width:
            lines.append(line.rstrip())
            line = ""
        line += piece if line else piece.lstrip()
        while columns(line) > width and line.isascii():  # cut a word that is longer than a line
            lines.append(line[:width])
            line = line[width:]
    return [*lines, line.rstrip()] if line.strip() else lines


def columns(text: str) -> int:
    """Return the number of columns that a text takes on a terminal."""
    return sum(2 if unicodedata.east_asian_width(one) in "WF" else 1 for one in text)


def _pieces(text: str) -> list[str]:
    """Cut a text where a line may end: after a space, and before and after a wide character."""
    found: list[str] = []
    for one in text:
        joins = found and not (
            found[-1][-1] == " "
            or ((columns(one) == 2 or columns(found[-1][-1]) == 2) and one not in _NOT_FIRST + " ")
        )
        if joins or (found and found[-1][-1] in _NOT_LAST):
            found[-1] += one
        else:
            found.append(one)
    return found
