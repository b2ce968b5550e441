"""What a record means: a conversation in one of many shapes, or a text.

    {"question": ..., "answer": ...}                       and prompt/completion, query/response, ...
    {"instruction": ..., "input": ..., "output": ...}      Alpaca; with "system" and "history" as
    LLaMA-Factory has it {"messages": [{"role": ..., "content": ...}, ...]}     OpenAI's; also under
    "conversations", "dialogue", ... {"conversations": [{"from": ..., "value": ...}, ...]}  ShareGPT's
    [{"role": ..., "content": ...}, ...]                   a list of turns, or of texts said in turn {"text":
    ...}                                          a text to read, for --text

Names are compared without case, in English and Chinese (`FIELDS`). Options name other fields.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from minigpt.data.conversation import Conversation, Role, Turn
from minigpt.data.file_formats import NOT_TEXT, BadLine
from minigpt.data.text_encoding import BAD_BYTES
from minigpt.errors import InputError

__all__ = [
    "FIELDS", "KNOWN_SHAPES", "DataOptions", "FieldNames", "Text",
    "head_test", "is_head", "meaning_of", "text_of",
]  # fmt: skip

FIELDS: dict[str, tuple[str, ...]] = {  # part -> names that a file may have for it, the usual ones first
    "question": (
        *("question", "prompt", "instruction", "query", "q", "user", "human", "ask", "source"),
        *("问题", "提问", "指令", "问", "用户", "问句"),
        *("frage", "pregunta", "pergunta", "domanda", "вопрос", "質問", "질문"),
    ),
    "answer": (
        *("answer", "completion", "output", "response", "a", "assistant", "reply", "bot", "gpt", "target"),
        *("答案", "回答", "输出", "回复", "答", "助手", "答复"),
        *("antwort", "réponse", "respuesta", "resposta", "risposta", "ответ", "답변"),
    ),
    "input": ("input", "context", "输入"),
    "system": ("system", "system_prompt", "系统", "系统提示"),
    "history": ("history", "历史"),
    "turns": (
        "messages",
        "conversations",
        "conversation",
        "dialogue",
        "dialog",
        "turns",
        "chat",
        "对话",
        "消息",
    ),
    "text": ("text", "content", "内容", "文本", "正文", "body", "passage", "document", "article"),
    "tools": ("tools",),
    "weight": ("weight",),
}
KNOWN_SHAPES = (
    "question/answer, prompt/completion, query/response, instruction/input/output, messages, conversations"
)
_ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer", "系统"), "system"),
    **dict.fromkeys(("user", "human", "customer", "usr", "用户", "问", "客户", "user_a"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "bot", "model", "chatbot", "ai", "sys", "助手", "答", "客服"), "assistant"
    ),
    **dict.fromkeys(("tool", "observation", "function", "ipython", "environment"), "tool"),
    "function_call": "assistant",
}
_SPEAKERS = ("role", "from", "speaker", "角色")
_WORDS = ("content", "value", "text", "utterance", "内容")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of characters from "\ud800" escapes


class Text(str):
    """A record that is a text to read, no conversation."""

    __slots__ = ()


@dataclass(frozen=True)
class FieldNames:
    """Fields that the user names; empty: the usual names."""

    question: str = ""
    answer: str = ""
    text: str = ""

    def __post_init__(self) -> None:
        if bool(self.question) != bool(self.answer):
            raise InputError("--question_field and --answer_field go together: give both")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How a data file is to be read."""

    # How the data is read
    encoding: str = ""
    """encoding of the data file, such as gb18030 or big5; left out: found out"""
    question_field: str = ""
    """name of the question's field or column; left out: the usual names are known"""
    answer_field: str = ""
    """name of the answer's field or column"""
    strict: bool = False
    """stop at the first bad record instead of skipping it"""

    @property
    def field_names(self) -> FieldNames:
        """The named fields."""
        return FieldNames(self.question_field, self.answer_field)


_LONGEST_NAME = 30  # characters of a column's name: a longer cell is a text


def is_head(cells: Collection[str]) -> bool:
    """Are these cells, in small letters, the column names of a table of conversations or texts?

    >>> is_head(["id", "question", "answer"]), is_head(["label", "text"]), is_head(["hello", "text and more"])
    (True, True, False)
    """
    found = {part for part, names in FIELDS.items() if set(names) & set(cells)}
    if len(cells) == 1:
        return bool(found)
    known = {"question", "answer"} <= found or {"input", "answer"} <= found or bool(found & {"turns", "text"})
    return known and all(len(cell) <= _LONGEST_NAME for cell in cells)


def head_test(names: FieldNames) -> Callable[[Collection[str]], bool]:
    """As `is_head`, for fields that the user may have named."""
    own = {name.strip().lower() for name in (names.question, names.answer, names.text) if name}
    return (lambda cells: bool(own & set(cells))) if own else is_head


def meaning_of(value: Any, names: FieldNames, line: int = 0, raw: str = "") -> Conversation | Text:
    """A record's conversation or text.

    Raises:
        BadLine: if it is neither, or a part is missing, empty or no text.
    """
    if isinstance(value, str):
        return Text(_checked(value, "the text"))
    if isinstance(value, list):
        return _conversation(_turns(value, "the list"), line, raw)
    if not isinstance(value, Mapping):
        raise BadLine("not an object", f"it is {_kind(value)}")
    item = {str(key).strip().lower(): part for key, part in value.items()}
    if names.question:
        turns = [
            Turn("user", text_of(item, names.question.strip().lower())),
            Turn("assistant", text_of(item, names.answer.strip().lower())),
        ]
        return _conversation(turns, line, "", item)  # written anew, it has the usual names
    if names.text:
        return Text(text_of(item, names.text.strip().lower()))
    found = {part: _first(item, part) for part in FIELDS}
    if found["turns"] and isinstance(item[found["turns"]], list | str):
        turns = _turns(item[found["turns"]], f"`{found['turns']}`")
        if found["system"] and not any(turn.role == "system" for turn in turns):
            turns[:0] = _system(item, found["system"])
        return _conversation(turns, line, raw, item)
    if found["question"] and found["answer"]:
        return _conversation(_pair(item, found), line, raw, item)
    if found["input"] and found["answer"]:  # {"input": ..., "output": ...}
        return _conversation(
            _pair(item, {**found, "question": found["input"], "input": None}), line, raw, item
        )
    if list(item)[:2] == ["0", "1"]:  # a table without a head
        return _conversation(
            [Turn("user", text_of(item, "0")), Turn("assistant", text_of(item, "1"))], line, ""
        )
    if found["text"]:
        return Text(text_of(item, found["text"]))
    for part, other in (("question", "answer"), ("answer", "question")):
        if found[part]:
            if null := next((name for name in FIELDS[other] if name in item), None):
                raise BadLine(f"`{null}` is null, not text")
            raise BadLine(f"`{FIELDS[other][0]}` is missing", _keys(item))
    raise BadLine("no field that is known", _keys(item))


def _first(item: Mapping[str, Any], part: str) -> str | None:
    return next((name for name in FIELDS[part] if item.get(name) is not None), None)


def _keys(item: Mapping[str, Any]) -> str:
    return f"it has {', '.join(repr(str(key)[:40]) for key in list(item)[:8]) or 'no keys at all'}"


def _pair(item: Mapping[str, Any], found: Mapping[str, str | None]) -> list[Turn]:
    question_key, answer_key = found["question"], found["answer"]
    assert question_key is not None
    assert answer_key is not None
    if isinstance(item[question_key], list):  # a prompt that is itself a list of turns
        turns = _turns(item[question_key], f"`{question_key}`", needs_answer=False)
    else:
        question = text_of(item, question_key)
        more = found["input"]
        if more and more != question_key and item[more] not in (None, "", "nan"):
            question = f"{question}\n{text_of(item, more)}"
        turns = [Turn("user", question)]
    answer = item[answer_key]
    if isinstance(answer, list) and answer and isinstance(answer[0], dict):
        turns += _turns(answer, f"`{answer_key}`")
    elif isinstance(answer, list) and answer and all(isinstance(each, str) for each in answer):
        turns.append(
            Turn("assistant", _checked(answer[0], f"`{answer_key}`"))
        )  # of several right answers one
    else:
        turns.append(Turn("assistant", text_of(item, answer_key)))
    before = item.get(found["history"] or "") or []
    for each in before if isinstance(before, list) else []:
        if not (isinstance(each, list | tuple) and len(each) == 2):
            raise BadLine("`history` is no list of [question, answer]")
    if before:
        turns[:0] = [
            turn
            for said, answered in before
            for turn in (
                Turn("user", _checked(said, "`history`")),
                Turn("assistant", _checked(answered, "`history`")),
            )
        ]
    if found["system"]:
        turns[:0] = _system(item, found["system"])
    return turns


def _system(item: Mapping[str, Any], key: str) -> list[Turn]:
    value = item[key]
    return [Turn("system", _checked(value, f"`{key}`"))] if isinstance(value, str) and value.strip() else []


def _turns(value: Any, where: str, needs_answer: bool = True) -> list[Turn]:
    if isinstance(value, str):  # JSON inside a cell of a table
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadLine(f"{where} is text, not a list of turns") from None
    if not isinstance(value, list):
        raise BadLine(f"{where} is {_kind(value)}, not a list of turns")
    if value and all(isinstance(each, str) for each in value):  # said in turn, a user first
        return [Turn("assistant" if i % 2 else "user", _checked(text, where)) for i, text in enumerate(value)]
    turns = []
    for number, each in enumerate(value, 1):
        if not isinstance(each, dict):
            raise BadLine("a turn is no object", f"turn {number} is {_kind(each)}")
        turns.append(_turn({str(key).lower(): part for key, part in each.items()}, number))
    if needs_answer and not any(turn.role == "assistant" for turn in turns):
        raise BadLine("no turn is an assistant's: there is no answer")
    return turns


def _turn(item: dict[str, Any], number: int) -> Turn:
    speaker = next((key for key in _SPEAKERS if key in item), None)
    if speaker is None:
        raise BadLine("a turn has no `role`", f"turn {number}: {_keys(item)}")
    role = _ROLES.get(str(item[speaker]).strip().lower())
    if role is None:
        raise BadLine(
            f"a `{speaker}` is none of system, user, assistant, tool",
            f"turn {number}: {str(item[speaker])[:40]!r}",
        )
    words = next((key for key in _WORDS if item.get(key) not in (None, "")), None)
    calls = item.get("tool_calls") or item.get("function_call")
    if words is None and calls:
        return Turn(role, json.dumps(calls, ensure_ascii=False))
    if words is None:
        raise BadLine("a turn is empty", f"turn {number}")
    content = item[words]
    if isinstance(content, list):  # OpenAI's parts
        content = "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return Turn(role, _checked(content, f"`{words}`"))


def _conversation(
    turns: list[Turn], line: int, raw: str, item: Mapping[str, Any] | None = None
) -> Conversation:
    tools, weight = (item or {}).get("tools"), (item or {}).get("weight", 1.0)
    if weight in (None, ""):
        weight = 1.0
    try:
        number = float(weight)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise BadLine("`weight` is no finite number of at least 0", str(weight)[:40])
    described = tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False) if tools else ""
    return Conversation(tuple(turns), line, raw, described, number)


def text_of(item: Mapping[str, Any], key: str) -> str:
    """The text under a key.

    Raises:
        BadLine: if it is missing, no text, empty, or holds what no text has.
    """
    if key not in item:
        raise BadLine(f"`{key}` is missing", _keys(item))
    return _checked(item[key], f"`{key}`")


def _checked(value: Any, where: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)  # an answer such as 42, which a spreadsheet or pandas made a number
    if not isinstance(value, str):
        if isinstance(value, type):
            raise BadLine(f"{where} stands there more than once")
        raise BadLine(f"{where} is {_kind(value)}, not text")
    if not value.strip():
        raise BadLine(f"{where} is empty")
    if found := _NO_TEXT.search(value):
        if BAD_BYTES.match(found[0]):
            raise BadLine(NOT_TEXT, where)
        what = "NUL" if found[0] == "\0" else "half a character (a lone surrogate)"
        raise BadLine(f"{where} holds {what}", f"at character {found.start() + 1}")
    return value


def _kind(value: object) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    if isinstance(value, float) and math.isnan(value):
        return "missing (NaN)"
    return names.get(type(value), "an object" if isinstance(value, dict) else "null")
