"""Interprets a record: it is a conversation in one of many formats, or a text.

    {"question": ..., "answer": ...}                       and prompt/completion, query/response, ...
    {"instruction": ..., "input": ..., "output": ...}      Alpaca; with "system" and "history": LLaMA-Factory
    {"messages": [{"role": ..., "content": ...}, ...]}     OpenAI's; also under "dialogue", ...
    {"conversations": [{"from": ..., "value": ...}, ...]}  ShareGPT's
    [{"role": ..., "content": ...}, ...]                   a list of turns, or of texts of user and assistant
    {"text": ...}                                          a text to read, for --text

A record may have a `weight`: how much it counts in the loss of training.

Field names are compared without case, in English and Chinese (`FIELDS`). Options can name other fields.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from minigpt.data.conversation import ROLES, SPEAKER_KEYS, TEXT_KEYS, Conversation, Turn
from minigpt.data.json_values import NOT_TEXT, REPEATED, BadLine, json_object, parse_value
from minigpt.data.text_encoding import BAD_BYTES, HALF_CHARACTER
from minigpt.errors import InputError

__all__ = [
    "FIELDS", "KNOWN_SHAPES", "MESSAGE_COLUMNS", "NO_KNOWN_FIELD",
    "DataOptions", "FieldNames", "ProblemType", "Text",
    "head_test", "is_head", "lower_keys", "meaning_of", "shown_keys", "text_of", "whole_text_of",
]  # fmt: skip

FIELDS: dict[str, tuple[str, ...]] = {  # part of a record -> field names, the most usual names first
    "question": (
        *("question", "prompt", "instruction", "query", "q", "user", "human", "ask", "source", "problem"),
        *("问题", "提问", "指令", "问", "用户", "问句"),
        *("frage", "pregunta", "pergunta", "domanda", "вопрос", "質問", "질문"),
    ),
    "answer": (
        *(
            "answer",
            "completion",
            "output",
            "response",
            "a",
            "assistant",
            "reply",
            "bot",
            "gpt",
            "target",
            "solution",
        ),
        *("答案", "回答", "输出", "回复", "答", "助手", "答复"),
        *("antwort", "réponse", "respuesta", "resposta", "risposta", "ответ", "答え", "답변"),
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
    "text": (
        "text",
        "content",
        "内容",
        "文本",
        "正文",
        "body",
        "passage",
        "document",
        "article",
        "paragraphs",
    ),
    "tools": ("tools",),
}
MESSAGE_COLUMNS: dict[str, tuple[str, ...]] = {  # columns of a chat log with one message per row
    "speaker": (
        *SPEAKER_KEYS,
        *("sender", "talker", "nickname", "from_name", "发送人", "发送者", "发言人", "说话人", "昵称"),
    ),
    "text": (*TEXT_KEYS, "message", "msg", "strcontent", "消息内容", "聊天内容", "消息"),
    "time": (
        *("time", "date", "timestamp", "datetime", "created_at", "createtime", "strtime"),
        *("时间", "发送时间", "日期"),
    ),
    "number": (
        *("conversation_id", "session_id", "dialog_id", "dialogue_id", "chat_id", "thread_id"),
        *("会话id", "对话id", "会话编号", "会话号"),
    ),
}
# Longer field names, such as 客户问题 and 标准回答, or user_question and answer_text. They are used if
# the record has no usual name for that part.
_NOTE = r"(?:\s*[（(\[【].{0,12}[）)\]】])?\s*[:：*]?"  # a note after the name, such as （必填）, and a colon
_ALIKE = {
    "question": re.compile(
        rf"\*?(?:.{{0,8}}(?:问题|提问|问句)(?:内容|描述|文本)?|(?:\w+[ _])?question(?:[ _]text)?){_NOTE}"
    ),
    "answer": re.compile(
        r"\*?(?:.{0,8}(?:答案|回答|答复|回复)(?:内容|文本)?|(?:\w+[ _])?(?:answer|response)(?:[ _]text)?)"
        + _NOTE
    ),
}
NO_KNOWN_FIELD = "no field that is known"  # the reason why a record is skipped
KNOWN_SHAPES = (
    "question/answer, prompt/completion, query/response, instruction/input/output, messages, conversations"
)
# Kinds of labels, with the names that transformers uses.
ProblemType: TypeAlias = Literal["single_label_classification", "multi_label_classification", "regression"]


class Text(str):
    """A text to read, as opposed to a conversation."""

    __slots__ = ()


@dataclass(frozen=True)
class FieldNames:
    """Field names given by the user. Empty: the usual names."""

    question: str = ""
    answer: str = ""
    speaker: str = ""  # for a chat log: the name of the speaker who answers

    def __post_init__(self) -> None:
        if bool(self.question) != bool(self.answer):
            raise InputError("--question_field and --answer_field go together: give both")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Options for reading a data file."""

    # How the data is read
    encoding: str = ""
    """encoding of the data file, such as gb18030 or big5; left out: found out"""
    question_field: str = ""
    """name of the question's field or column; left out: the usual names are known"""
    answer_field: str = ""
    """name of the answer's field or column"""
    speaker: str = ""
    """of a chat log: name of the speaker whose messages are the answers; left out: found out, or asked for"""
    strict: bool = False
    """stop at the first bad record instead of skipping it"""

    @property
    def field_names(self) -> FieldNames:
        """Return the field names given by the user."""
        return FieldNames(self.question_field, self.answer_field, self.speaker)


_LONGEST_NAME = 30  # largest number of characters of a column's name; a longer cell is a text


def is_head(cells: Collection[str]) -> bool:
    """Return True if cells in lower case are the column names of a table of conversations or texts.

    >>> is_head(["id", "question", "answer"]), is_head(["label", "text"]), is_head(["hello", "text and more"])
    (True, True, False)
    """
    found = {part for part, names in FIELDS.items() if set(names) & set(cells)}
    found |= {part for part, pattern in _ALIKE.items() if sum(map(bool, map(pattern.fullmatch, cells))) == 1}
    of_messages = {part for part, names in MESSAGE_COLUMNS.items() if set(names) & set(cells)}
    if len(cells) == 1:
        return bool(found | of_messages)
    known = {"speaker", "text"} <= of_messages
    known |= (
        {"question", "answer"} <= found or {"input", "answer"} <= found or bool(found & {"turns", "text"})
    )
    return known and all(len(cell) <= _LONGEST_NAME for cell in cells)


def head_test(names: FieldNames) -> Callable[[Collection[str]], bool]:
    """Return a function like `is_head` that also knows the field names given by the user."""
    own = {name.strip().lower() for name in (names.question, names.answer) if name}
    return (lambda cells: bool(own & set(cells))) if own else is_head


def meaning_of(value: Any, names: FieldNames, line: int = 0, raw: str = "") -> Conversation | Text:
    """Interpret a record as a conversation or a text.

    Raises:
        BadLine: if the record is neither, or a part of it is missing, empty or not text.
    """
    if isinstance(value, str):
        return Text(_checked(value, "the text"))
    if isinstance(value, list):
        return _conversation(_turns(value, "the list", names.speaker), line, "" if names.speaker else raw)
    if not isinstance(value, Mapping):
        raise BadLine("not an object", f"it is {_kind(value)}")
    item = lower_keys(value)
    if names.question:
        pair = [names.question.strip().lower(), names.answer.strip().lower()]
        return _conversation(_pair_of(item, *pair), line, "", item)  # no raw: `split` writes usual names
    found = {part: _first(item, part) for part in FIELDS}
    if found["turns"] and _are_turns(item[found["turns"]], found):
        turns = _turns(item[found["turns"]], f"`{found['turns']}`", names.speaker)
        if found["system"] and not any(turn.role == "system" for turn in turns):
            turns[:0] = _system(item, found["system"])
        return _conversation(turns, line, "" if names.speaker else raw, item)  # "": `split` writes roles
    if found["input"] and found["answer"] and not found["question"]:  # {"input": ..., "output": ...}
        found |= {"question": found["input"], "input": None}
    if found["question"] and found["answer"]:
        return _conversation(_question_and_answer(item, found), line, raw, item)
    if list(item) in (["0", "1"], ["0"]):  # a table without column names
        return _conversation(_pair_of(item, "0", "1"), line, "")
    if list(item)[:3] == ["0", "1", "2"]:
        raise BadLine(
            "a table of more than two columns without names",
            "name two by their numbers, such as --question_field 1 --answer_field 2",
        )
    if found["text"]:
        return Text(whole_text_of(item, found["text"]))
    for part, other in (("question", "answer"), ("answer", "question")):
        if found[part]:
            if null := next((name for name in FIELDS[other] if name in item), None):
                raise BadLine(f"`{null}` is null, not text")
            raise BadLine(f"`{FIELDS[other][0]}` is missing", shown_keys(item))
    raise BadLine(NO_KNOWN_FIELD, shown_keys(item))


def lower_keys(value: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a record with its keys in lower case. A key that then occurs twice gets the value REPEATED."""
    return json_object((str(key).strip().lower(), part) for key, part in value.items())


def _are_turns(value: Any, found: Mapping[str, str | None]) -> bool:
    """Return True if the value of a field for turns is a conversation, possibly as JSON in a table's cell."""
    if isinstance(value, str):
        has_others = found["text"] or (found["question"] and found["answer"])
        return value.lstrip().startswith("[") or not has_others
    return isinstance(value, list) or value is REPEATED


def _first(item: Mapping[str, Any], part: str) -> str | None:
    usual = next((name for name in FIELDS[part] if item.get(name) is not None), None)
    if usual is not None or part not in _ALIKE:
        return usual
    alike = [name for name in item if item[name] is not None and _ALIKE[part].fullmatch(name)]
    return alike[0] if len(alike) == 1 else None


def shown_keys(item: Mapping[str, Any]) -> str:
    """Return the keys of a record in words, for a message."""
    return f"it has {', '.join(repr(str(key)[:40]) for key in list(item)[:8]) or 'no keys at all'}"


def _pair_of(item: Mapping[str, Any], question: str, answer: str) -> list[Turn]:
    return [Turn("user", text_of(item, question)), Turn("assistant", text_of(item, answer))]


def _question_and_answer(item: Mapping[str, Any], found: Mapping[str, str | None]) -> list[Turn]:
    question_key, answer_key = found["question"], found["answer"]
    assert question_key is not None
    assert answer_key is not None
    if isinstance(item[question_key], list):  # the prompt is itself a list of turns
        turns = _turns(item[question_key], f"`{question_key}`")
    else:
        question = text_of(item, question_key)
        more = found["input"]
        if more and more != question_key and not _is_nothing(item[more]):
            question = f"{question}\n{text_of(item, more)}"
        turns = [Turn("user", question)]
    answer = item[answer_key]
    if isinstance(answer, list) and answer and isinstance(answer[0], dict):
        turns += _turns(answer, f"`{answer_key}`")
    elif isinstance(answer, list) and answer and all(isinstance(each, str) for each in answer):
        # the first of several right answers is used
        turns.append(Turn("assistant", _checked(answer[0], f"`{answer_key}`")))
    else:
        turns.append(Turn("assistant", text_of(item, answer_key)))
    if found["history"]:
        turns[:0] = _history(item[found["history"]])
    if found["system"]:
        turns[:0] = _system(item, found["system"])
    return turns


def _history(value: Any) -> list[Turn]:
    if isinstance(value, str) and value.strip().startswith("["):  # JSON in a cell of a table
        value = parse_value(value)
    if _is_nothing(value):
        return []
    if not isinstance(value, list | tuple):
        raise _not_a(value, "a list of [question, answer]", "`history`")
    turns: list[Turn] = []
    for each in value:
        if not (isinstance(each, list | tuple) and len(each) == 2):
            raise BadLine("`history` is no list of [question, answer]")
        said, answered = (_checked(part, "`history`") for part in each)
        turns += [Turn("user", said), Turn("assistant", answered)]
    return turns


def _system(item: Mapping[str, Any], key: str) -> list[Turn]:
    return [] if _is_nothing(item[key]) else [Turn("system", _checked(item[key], f"`{key}`"))]


def _is_nothing(value: Any) -> bool:
    """Return True if an optional part is empty. pandas writes NaN for an empty cell."""
    if isinstance(value, str):
        return value.strip() in ("", "nan")
    return value is None or (isinstance(value, float) and math.isnan(value))


def _turns(value: Any, where: str, speaker: str = "") -> list[Turn]:
    """Return the turns of a list. `speaker` is the name of the speaker who answers, if the user gave it."""
    if isinstance(value, str):  # JSON in a cell of a table
        try:
            value = parse_value(value)
        except BadLine:
            raise BadLine(f"{where} is text, not a list of turns") from None
    if not isinstance(value, list):
        raise _not_a(value, "a list of turns", where)
    if value and all(isinstance(each, str) for each in value):  # texts of user and assistant, alternating
        return [Turn("assistant" if i % 2 else "user", _checked(text, where)) for i, text in enumerate(value)]
    turns = []
    for number, each in enumerate(value, 1):
        if not isinstance(each, dict):
            raise BadLine("a turn is no object", f"turn {number} is {_kind(each)}")
        turns += _turns_in(lower_keys(each), number, speaker.strip().lower())
    return turns


def _turns_in(item: dict[str, Any], number: int, answering: str) -> list[Turn]:
    """Return the turn of an object; or the turns of {"human": ..., "assistant": ...} or {"human": ...}."""
    if not any(key in item for key in SPEAKER_KEYS):
        question, answer = _first(item, "question"), _first(item, "answer")
        if question and answer:
            return _pair_of(item, question, answer)
        if len(item) == 1 and (role := ROLES.get(next(iter(item)))):
            return [Turn(role, text_of(item, next(iter(item))))]
    return [_turn(item, number, answering)]


def _turn(item: dict[str, Any], number: int, answering: str) -> Turn:
    speaker = next((key for key in SPEAKER_KEYS if key in item), None)
    if speaker is None:
        raise BadLine("a turn has no `role`", f"turn {number}: {shown_keys(item)}")
    if item[speaker] is REPEATED:
        raise _not_a(REPEATED, "", f"`{speaker}`")
    name = str(item[speaker]).strip().lower()
    role = ROLES.get(name)
    if answering and role != "system":
        role = "assistant" if name == answering else "user"
    if role is None:
        raise BadLine(
            f"a `{speaker}` is none of system, user, assistant, tool (--speaker NAME says who answers)",
            f"turn {number}: {str(item[speaker])[:40]!r}",
        )
    words = next((key for key in TEXT_KEYS if item.get(key) not in (None, "", [])), None)
    said = [_words(item[words], f"`{words}`")] if words else []
    said += [_described(item[key], f"`{key}`") for key in ("tool_calls", "function_call") if item.get(key)]
    if not said:
        raise BadLine("a turn is empty", f"turn {number}")
    return Turn(role, "\n".join(said))


def _words(value: Any, where: str) -> str:
    if not isinstance(value, list):
        return _checked(value, where)
    texts = []
    for part in value:  # OpenAI's list of content parts
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise BadLine(f"a part of {where} is no text")
        texts.append(text)
    return _checked("".join(texts), where)


def _described(value: Any, where: str) -> str:
    """Return tools or tool calls as JSON text."""
    if _repeats(value):
        raise BadLine(f"{where} holds a key more than once")
    return _checked(
        value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str), where
    )


def _repeats(value: Any) -> bool:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return value is REPEATED or any(map(_repeats, inner))


def _conversation(
    turns: list[Turn], line: int, raw: str, item: Mapping[str, Any] | None = None
) -> Conversation:
    if not any(turn.role == "assistant" for turn in turns):
        raise BadLine("no turn is an assistant's: there is no answer")
    found = item or {}
    return Conversation(tuple(turns), line, raw, _tools(found.get("tools")), _weight(found))


def _weight(item: Mapping[str, Any]) -> float:
    """Return the weight of a record in the loss of training: the field `weight`, or 1.

    A text that is no number gives NaN: the field may be the weight of an object, such as "5 kg".
    """
    value = item.get("weight")
    if _is_nothing(value):
        return 1.0
    try:
        weight = -1.0 if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except ValueError:
        return math.nan
    except TypeError:
        weight = -1.0
    if not 0 <= weight < 1e6:
        raise BadLine("`weight` is no number from 0 to 1e6", f"it is {str(value)[:40]!r}")
    return weight


def _tools(value: Any) -> str:
    """Return a list of tools as JSON, or "" without tools. The value may be a list, or a text with JSON."""
    if isinstance(value, str) and value.strip():
        try:
            value = parse_value(value)
        except BadLine:
            raise BadLine("`tools` is text, not a list of tools") from None
    if not value or _is_nothing(value):
        return ""
    tools = [value] if isinstance(value, Mapping) else value
    if not (isinstance(tools, list | tuple) and all(isinstance(tool, Mapping) for tool in tools)):
        raise _not_a(value, "a list of tools", "`tools`")
    return _described(list(tools), "`tools`")


def text_of(item: Mapping[str, Any], key: str) -> str:
    """Return the text under a key.

    Raises:
        BadLine: if the value is missing, not text, empty, or holds NUL or a lone surrogate.
    """
    if key not in item:
        raise BadLine(f"`{key}` is missing", shown_keys(item))
    return _checked(item[key], f"`{key}`")


def whole_text_of(item: Mapping[str, Any], key: str) -> str:
    """Return a text as `text_of`; a list of texts, such as paragraphs, is joined by line ends."""
    value = item.get(key)
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        return _checked("\n".join(value), f"`{key}`")
    return text_of(item, key)


def _checked(value: Any, where: str) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and (isinstance(value, int) or math.isfinite(value)):
        value = str(value)  # spreadsheets and pandas turn an answer such as 42 into a number
    if not isinstance(value, str):
        raise _not_a(value, "text", where)
    if not value.strip():
        raise BadLine(f"{where} is empty")
    if "\0" in value:
        raise BadLine(f"{where} holds NUL", f"at character {value.index(chr(0)) + 1}")
    if found := HALF_CHARACTER.search(value):
        if BAD_BYTES.match(found[0]):
            raise BadLine(NOT_TEXT, where)
        what = "half a character (a lone surrogate)"
        raise BadLine(f"{where} holds {what}", f"at character {found.start() + 1}")
    return value


def _not_a(value: Any, wanted: str, where: str) -> BadLine:
    if value is REPEATED:
        return BadLine(f"{where} stands there more than once")
    return BadLine(f"{where} is {_kind(value)}, not {wanted}")


def _kind(value: object) -> str:
    if isinstance(value, float) and math.isnan(value):
        return "missing (NaN)"
    names: dict[type, str] = {bool: "true or false", int: "a number", float: "a number", str: "text"}
    names |= {list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), type(value).__name__)
