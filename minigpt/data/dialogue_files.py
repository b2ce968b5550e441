r"""Reads dialogues of chatbot projects: `.conv` files, and YAML in ChatterBot's form.

    E                     conversations:
    M 你好                - - 你好
    M 你好！              - - 你好！     (the first "-" begins a dialogue)

The left form is .conv: a line E begins a dialogue, and each line M is a text. The right form is YAML. In both
forms, user and assistant take turns. If the texts of a .conv file have a "/" between words, it is removed.

A list of questions and answers in YAML is read, too: `- question: 你好`, and below it `  answer: 你好！`.
"""

import re
import textwrap
from collections.abc import Iterable, Iterator

from minigpt.data.field_names import has_answers, is_head
from minigpt.data.json_values import BadLine, Record, parse_value

__all__ = ["dialogues_in"]

_CONV = re.compile(r"E\s*|M(?:\s.*)?")
_BEGIN = re.compile(r"-\s+-\s*(.*)")
_NEXT = re.compile(r"\s+-\s*(.*)")
# "- key: value" or "  key: value"
_ENTRY = re.compile(r"(- |  )([^\s:#'\"\-\[\]{}][^:#]{0,29}?)\s*:(?:\s+(.*))?")
_ABOVE = re.compile(r"(?:#.*|---|[\w ]{1,30}:)?")  # a line above the list: blank, comment, "---", or a key
_MOST = 200  # number of lines at the beginning that are examined to recognise the form
# Some .conv files separate words by "/". A line of at most 6 characters ("M " and four more) may be a single
# word, so it is not searched for "/".
_FEW = 6
# A text is a .conv file if at least this share of its first lines have the form of .conv. Its words are
# separated by "/" if at least this share of its lines have a "/".
_SHARE = 0.9


def dialogues_in(text: str) -> list[Record] | None:
    """Return one record for each dialogue or question of a .conv or YAML file; None for any other text."""
    if (pairs := _yaml_pairs(text)) is not None:
        return pairs
    lines = [(number, line.rstrip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    some = [line for _, line in lines[:_MOST]]
    marks = sum(bool(_CONV.fullmatch(line)) for line in some)
    if marks >= max(2, _SHARE * len(some)) and some[0] == "E" and any(line[1:] for line in some):
        return list(_conv(lines))
    begins = next((i for i, line in enumerate(some) if line.strip() == "conversations:"), None)
    if begins is None:
        return None
    below = some[begins + 1 :]
    fitting = sum(bool(_BEGIN.match(line.strip()) or _NEXT.match(line)) for line in below)
    if below and _BEGIN.match(below[0].strip()) and fitting >= 0.5 * len(below):
        return list(_yaml(lines[begins + 1 :]))
    return None


def _yaml_pairs(text: str) -> list[Record] | None:
    """Return the questions and answers of a list in YAML, or None for any other text."""
    start = re.search(r"^[ \t]*- ", text, re.MULTILINE)
    if start is None or not all(_ABOVE.fullmatch(line.strip()) for line in text[: start.start()].split("\n")):
        return None
    first = 1 + text.count("\n", 0, start.start())
    values: list[tuple[int, dict[str, list[str]]]] = []
    under: list[str] | None = None  # the lines of the value that is being read
    for number, raw in enumerate(textwrap.dedent(text[start.start() :]).split("\n"), first):
        line = raw.rstrip()
        if entry := _ENTRY.fullmatch(line):
            if entry[1] == "- ":
                values.append((number, {}))
            if not values or entry[2] in values[-1][1]:
                return None
            under = values[-1][1].setdefault(entry[2], [entry[3] or ""])
        elif under is not None and (not line or line.startswith("   ")):
            under.append(line)
        elif line and not line.startswith("#"):
            return None
    names = [[key.lower() for key in value] for _, value in values]
    if len(values) < 2 or not all(is_head(keys) and has_answers(keys) for keys in names):
        return None
    return [
        Record(number, {key: _value(lines) for key, lines in value.items()}, "") for number, value in values
    ]


def _value(lines: list[str]) -> str:
    """Return the text of a YAML value. The first of its lines is what stands behind the key."""
    head, below = lines[0].strip(), textwrap.dedent("\n".join(lines[1:])).strip("\n")
    if re.fullmatch(r"\|[+-]?\d?", head):
        return below
    # After ">", each line end in the text becomes a space, and each blank line becomes a line end.
    if re.fullmatch(r">[+-]?\d?", head):
        return re.sub(r"(?<!\n)\n(?!\n)", " ", below).replace("\n\n", "\n")
    return _scalar(" ".join([head, *(line.strip() for line in lines[1:] if line.strip())]))


def _conv(lines: Iterable[tuple[int, str]]) -> Iterator[Record]:
    first, said = 0, list[str]()
    for number, line in _without_marks(list(lines)):
        if line == "E":
            yield from _dialogue(first, said)
            first, said = number, []
        elif _CONV.fullmatch(line):
            said.append(line[1:].strip())
        elif said:  # the line continues the text of the line above
            said[-1] = f"{said[-1]}\n{line}"
    yield from _dialogue(first, said)


def _without_marks(lines: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Remove the "/" between words, if almost all texts have it, as in "M 今天/天气/真/好"."""
    texts = [line for _, line in lines if len(line) > _FEW]
    if sum("/" in line for line in texts) < _SHARE * max(1, len(texts)):
        return lines
    return [(number, line.replace("/", "")) for number, line in lines]


def _yaml(lines: Iterable[tuple[int, str]]) -> Iterator[Record]:
    first, said = 0, list[str]()
    for number, line in lines:
        if found := _BEGIN.match(line.strip()):
            yield from _dialogue(first, [_scalar(text) for text in said])
            first, said = number, [found[1]]
        elif found := _NEXT.match(line):
            said.append(found[1])
        elif line.startswith(" ") and said:  # an indented line continues the text above; join with a space
            said[-1] = f"{said[-1]} {line.strip()}"
        elif not line.startswith("#"):
            break
    yield from _dialogue(first, [_scalar(text) for text in said])


def _scalar(text: str) -> str:
    r"""Return the text that a YAML value stands for: without its quotation marks and escapes.

    >>> _scalar("'it''s'"), _scalar('"a\\n"'), _scalar("plain")
    ("it's", 'a\n', 'plain')
    """
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] == "'":
        return text[1:-1].replace("''", "'")
    if len(text) > 1 and text[0] == text[-1] == '"':
        try:
            return str(parse_value(text))
        except BadLine:
            return text[1:-1]
    return text


def _dialogue(line: int, said: list[str]) -> Iterable[Record]:
    """Return a list with the dialogue as a record of turns; an empty list for a dialogue without texts."""
    if not said:
        return []
    turns = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(said)]
    return [Record(line, {"messages": turns}, "")]
