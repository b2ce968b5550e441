r"""Reads dialogues of chatbot projects: `.conv` files, and YAML in ChatterBot's form.

    E                     conversations:
    M 你好                - - 你好
    M 你好！              - - 你好！     (the first "-" begins a dialogue)

In both, user and assistant take turns. A .conv file of texts cut into words has "/" between the words, which
is left out.
"""

import re
from collections.abc import Iterable, Iterator

from minigpt.data.json_values import BadLine, Record, parse_value

__all__ = ["dialogues_in"]

_CONV = re.compile(r"E\s*|M(?:\s.*)?")
_BEGIN = re.compile(r"-\s+-\s*(.*)")
_NEXT = re.compile(r"\s+-\s*(.*)")
_MOST = 200  # number of lines that decide
_FEW = 6  # "M " and a text of four characters, which may be one word
_SHARE = 0.9  # smallest share of these lines that must fit


def dialogues_in(text: str) -> list[Record] | None:
    """Return the dialogues, a list of texts each, or None if the text is in neither form."""
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


def _conv(lines: Iterable[tuple[int, str]]) -> Iterator[Record]:
    first, said = 0, list[str]()
    for number, line in _without_marks(list(lines)):
        if line == "E":
            yield from _dialogue(first, said)
            first, said = number, []
        elif _CONV.fullmatch(line):
            said.append(line[1:].strip())
        elif said:  # a text of several lines
            said[-1] = f"{said[-1]}\n{line}"
    yield from _dialogue(first, said)


def _without_marks(lines: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Return the lines without the "/" between words, if almost all texts have it: M 今天/天气/真/好."""
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
        elif line.startswith(" ") and said:  # a text of several lines is one line
            said[-1] = f"{said[-1]} {line.strip()}"
        elif not line.startswith("#"):
            break
    yield from _dialogue(first, [_scalar(text) for text in said])


def _scalar(text: str) -> str:
    r"""Return a text of YAML without quotation marks.

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
    """Return a dialogue as a record of turns."""
    if not said:
        return []
    turns = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(said)]
    return [Record(line, {"messages": turns}, "")]
