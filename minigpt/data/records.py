"""What a line of JSONL may hold: a question and an answer in one of several field names, or a text.

    {"question": ..., "answer": ...}                     what `minigpt` itself writes
    {"prompt": ..., "completion": ...}
    {"instruction": ..., "input": ..., "output": ...}    Alpaca; `input` may be missing or empty
    {"messages": [{"role": ..., "content": ...}, ...]}   a conversation
    {"text": ...}                                        no pair: something to read, for `--text`

Loss counts on answer, completion, output and what an assistant says. A conversation gives one pair for each
thing that an assistant says: all that stands before it, a line each, is the question.
"""

import json
import re
from typing import Any, Literal

__all__ = ["NOT_UTF8", "ONLY_CR", "BadLine", "Shape", "pairs_of", "parse_line", "shape_of", "text_of"]

Shape = Literal["question", "prompt", "instruction", "messages", "text"]

_SHAPES: dict[Shape, tuple[str, ...]] = {  # the keys that an object needs to be recognised
    "question": ("question", "answer"),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "messages": ("messages",),
    "text": ("text",),
}
_KEYS = ("question", "answer", "prompt", "completion", "instruction", "input", "output", "messages", "text")
_ROLES = ("system", "user", "assistant")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of characters from "\ud800" escapes
NOT_UTF8 = "not UTF-8"
ONLY_CR = "several lines, ended by CR instead of LF"


class BadLine(Exception):  # noqa: N818 -- the reader's business, nobody else's error
    """A line that is skipped. `reason` groups such lines, `detail` is the line's own."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def parse_line(line: bytes) -> tuple[str, dict[str, Any]]:
    """The text of a line without its end, and the object in it.

    Raises:
        BadLine: if it is not UTF-8, no JSON, or no object.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        raise BadLine(NOT_UTF8, where) from None
    try:
        item = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        if "\r" in text and error.msg == "Extra data":
            raise BadLine(ONLY_CR) from None
        raise BadLine("broken JSON", f"{error.msg} at column {error.pos + 1}") from None
    except (RecursionError, ValueError):  # nested too deeply; a number of thousands of digits
        raise BadLine("broken JSON", "a value that cannot be read") from None
    if not isinstance(item, dict):
        raise BadLine("not an object", f"it is {_kind(item)}")
    return text, item


def _unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        keys = [key for key, _ in items]
        for key in _KEYS:
            if keys.count(key) > 1:  # which one is meant?
                raise BadLine(f"`{key}` stands there more than once")
    return found


def _no_constant(name: str) -> Any:
    raise BadLine("broken JSON", f"{name} is no JSON value")


def shape_of(item: dict[str, Any]) -> Shape | None:
    """Which of the shapes an object has, the first that fits; None: none of them.

    >>> shape_of({"text": "...", "prompt": "...", "completion": "..."})
    'prompt'
    """
    return next((shape for shape, keys in _SHAPES.items() if all(key in item for key in keys)), None)


def pairs_of(item: dict[str, Any], shape: Shape) -> list[tuple[str, str]]:
    """The questions and answers of an object; one, or of a conversation one for each assistant's turn.

    >>> pairs_of({"instruction": "Add.", "input": "1 1", "output": "2"}, "instruction")
    [('Add.\\n1 1', '2')]

    Raises:
        BadLine: if a part is missing, no text, or empty.
    """
    if shape == "messages":
        return _turns(item)
    question_key, answer_key = _SHAPES[shape]
    question = text_of(item, question_key)
    if shape == "instruction" and item.get("input") not in (None, ""):
        question = f"{question}\n{text_of(item, 'input')}"
    return [(question, text_of(item, answer_key))]


def _turns(item: dict[str, Any]) -> list[tuple[str, str]]:
    messages = item.get("messages", "")
    if "messages" not in item:
        text_of(item, "messages")
    if not isinstance(messages, list):
        raise BadLine(f"`messages` is {_kind(messages)}, not a list")
    said: list[str] = []
    pairs = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise BadLine(f"a message is {_kind(message)}, not an object", f"message {number}")
        role = message.get("role")
        if role not in _ROLES:
            raise BadLine(f"a `role` is none of {', '.join(_ROLES)}", f"message {number}: {role!r}")
        content = text_of(message, "content")
        if role == "assistant":
            if not said:
                raise BadLine("the assistant speaks first: there is no question")
            pairs.append(("\n".join(said), content))
        said.append(content)
    if not pairs:
        raise BadLine("no message is an assistant's: there is no answer")
    return pairs


def text_of(item: dict[str, Any], key: str) -> str:
    """The text under a key.

    Raises:
        BadLine: if it is missing, no text, empty, or holds what no text has.
    """
    if key not in item:
        keys = ", ".join(map(repr, list(item)[:8])) or "no keys at all"
        raise BadLine(f"`{key}` is missing", f"it has {keys}")
    value = item[key]
    if not isinstance(value, str):
        raise BadLine(f"`{key}` is {_kind(value)}, not text")
    if not value.strip():
        raise BadLine(f"`{key}` is empty")
    if found := _NO_TEXT.search(value):
        what = "NUL" if found[0] == "\0" else "half a character (a lone surrogate)"
        raise BadLine(f"`{key}` holds {what}", f"at character {found.start() + 1}")
    return value


def _kind(value: object) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else "null")
