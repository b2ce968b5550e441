"""Interprets a record: it is a conversation in one of many formats, or a text.

    {"question": ..., "answer": ...}                       and prompt/completion, query/response, ...
    {"instruction": ..., "input": ..., "output": ...}      Alpaca; with "system" and "history": LLaMA-Factory
    {"messages": [{"role": ..., "content": ...}, ...]}     OpenAI's; also under "dialogue", ...
    {"conversations": [{"from": ..., "value": ...}, ...]}  ShareGPT's
    [{"role": ..., "content": ...}, ...]                   turns, or texts of user, assistant, user, ...
    {"title": ..., "desc": ..., "answer": ...}             a question of a forum
    {"context": ..., "question": ..., "answers": {"text": [...]}}      SQuAD's, a row for each question
    {"text": ...}                                          a text, for `train --text`

A question or a text may hold a whole conversation: as JSON, or with marks of its speakers (marked_turns.py).
nested_records.py reads more shapes.

A record may have a `weight`: its factor in the training loss. Known field names (`FIELDS`) may be in upper or
lower case. Options can name other fields.
"""

import functools
import json
import math
import re
import string
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, TypeAlias

from minigpt.data.conversation import ROLES, SPEAKER_KEYS, TEXT_KEYS, Conversation, Turn
from minigpt.data.field_names import (
    ALIKE,
    DESCRIPTIONS,
    FIELDS,
    LAST,
    OPTION,
    OPTIONS,
    OTHER,
    PARTNERS,
    TITLES,
    FieldNames,
    is_doubtful,
)
from minigpt.data.json_values import (
    NOT_TEXT,
    REPEATED,
    BadLine,
    is_turn,
    json_object,
    parse_list,
    parse_value,
    structure_in,
)
from minigpt.data.marked_turns import answer_turns, marked_turns
from minigpt.data.text_encoding import BAD_BYTES, HALF_CHARACTER
from minigpt.errors import whole_number

__all__ = [
    "KNOWN_SHAPES", "NO_ANSWER", "NO_KNOWN_FIELD", "ProblemType", "Text",
    "lower_keys", "meaning_of", "parts_of", "prompt_of", "shown_keys", "text_of", "whole_text_of", "words_of",
]  # fmt: skip

NO_KNOWN_FIELD = "no field that is known"  # a reason to skip a record; `NO_ANSWER` is another one
NO_ANSWER = "the question has no answer"
# matches the name of a field that holds the right answer to a multiple-choice question
_RIGHT = re.compile(r"^answers?$|correct|right|答案|正确|正確")
# matches an answer that begins with the letters of options, such as B, ABD, (B), "B. text"
_LETTERS = re.compile(r"[(（]?(?:[A-H](?:[\s,，、]*[A-H])*|[a-h])(?:[)）.、:：].*)?", re.DOTALL)
# what programs write into the fields for input and system prompt if a record has none
_NOTHING = ("none", "null", "n/a", "无", "無", "<noinput>", "noinput")
KNOWN_SHAPES = (
    "question/answer, prompt/completion, query/response, instruction/input/output, messages, conversations, "
    "exports of ChatGPT, Claude and DeepSeek, SQuAD's paragraphs/qas"
)
# What a classifier predicts for a text: one label, several labels, or numbers. transformers has these names.
ProblemType: TypeAlias = Literal["single_label_classification", "multi_label_classification", "regression"]


class Text(str):
    """A text to train on as it is, as opposed to a conversation."""

    __slots__ = ()


_NO_ANSWER = "\ufdd0"  # stands for the missing answer of a prompt; no text contains this character


def meaning_of(value: Any, names: FieldNames, line: int = 0, raw: str = "") -> Conversation | Text:
    """Interpret a record as a conversation or a text.

    Raises:
        BadLine: if the record is neither, or a part of it is missing, empty or not text.
    """
    if isinstance(value, str):
        inner = _in_json(value)
        return Text(_checked(value, "the text")) if inner is None else meaning_of(inner, names, line)
    if isinstance(value, list):
        return _conversation(_turns(value, "the list", names.speaker), line, "" if names.speaker else raw)
    if not isinstance(value, Mapping):
        raise BadLine("not an object", f"it is {_kind(value)}")
    item = lower_keys(value)
    if names.question:
        pair = [names.question.strip().lower(), names.answer.strip().lower()]
        # The command `split` would copy `raw`, with the user's field names. Because `raw` is "" here, `split`
        # writes the usual field names.
        return _conversation(_pair_of(item, *pair), line, "", item)
    found = parts_of(item)
    if found["turns"] == "turns" and {"question_id", "category"} <= item.keys():
        raise BadLine("`turns` holds questions alone, as in MT-bench: there is no answer")
    if found["turns"] and _are_turns(item[found["turns"]], found):
        turns = _turns(item[found["turns"]], f"`{found['turns']}`", names.speaker)
        if found["system"] and not any(turn.role == "system" for turn in turns):
            turns[:0] = _system(item, found["system"])
        # With --speaker, `raw` is "", so that the command `split` writes roles in place of speakers' names.
        return _conversation(turns, line, "" if names.speaker else raw, item)
    if found["input"] and found["answer"] and not found["question"]:  # as in {"input": ..., "output": ...}
        found |= {"question": found["input"], "input": None}
    if not found["question"] and (found["answer"] or _is_forum(item)):
        found |= _of_forum(item, found["answer"])
    if found["question"] and found["answer"]:
        # KTO's records are {"prompt", "completion", "label"}; a table's cell holds the label as text
        if {"prompt", "completion"} <= item.keys() and str(item.get("label")).lower() == "false":
            raise BadLine("`label` is false: the answer is a bad one")
        return _conversation(_question_and_answer(item, found), line, raw, item)
    if list(item) in (["0", "1"], ["0"]):  # a table without column names: its columns are called "0" and "1"
        return _conversation(_pair_of(item, "0", "1"), line, "")
    if list(item)[:3] == ["0", "1", "2"]:
        raise BadLine(
            "a table of more than two columns without names",
            "name two by their numbers, such as --question_field 1 --answer_field 2",
        )
    if not found["question"] and not found["answer"]:  # one of the fields may hold a whole conversation
        inside = [one for one in map(_in_json, item.values()) if one is not None]
        if len(inside) == 1:
            return meaning_of(inside[0], names, line)
    if found["text"]:
        return Text(whole_text_of(item, found["text"]))
    if {"chosen", "rejected"} <= item.keys():
        raise BadLine("a better and a worse answer, which `minigpt finetune --task dpo` learns from")
    for part, other in (("question", "answer"), ("answer", "question")):
        if found[part]:
            if null := next((name for name in FIELDS[other] if item.get(name, "") is None), None):
                raise BadLine(f"`{null}` is null, not text")
            raise BadLine(f"`{FIELDS[other][0]}` is missing", shown_keys(item))
    raise BadLine(NO_KNOWN_FIELD, shown_keys(item))


def _in_json(value: Any) -> Any:
    """Return a field's value (JSON text is parsed) if it is a conversation, else None."""
    if isinstance(value, str):
        value = structure_in(value)
    if isinstance(value, list):
        turns = value and all(isinstance(each, dict) and is_turn(lower_keys(each)) for each in value)
        return value if turns else None
    if not isinstance(value, Mapping):
        return None
    item = lower_keys(value)
    of_turns = _first(item, "turns")
    is_pair = _first(item, "question") and _first(item, "answer")
    return value if is_pair or (of_turns and isinstance(item[of_turns], list)) else None


def _is_forum(item: Mapping[str, Any]) -> bool:
    """Return True for a forum's record: a question with `title` and `desc`, and its answer in `content`."""
    return {"title", "desc", "content"} <= item.keys()


def _of_forum(item: Mapping[str, Any], answer: str | None) -> dict[str, str | None]:
    """Return the names of the fields with question, details ("input") and answer; {} without a question."""
    title = next((name for name in TITLES if not _is_nothing(item.get(name))), None)
    description = next((name for name in DESCRIPTIONS if item.get(name) is not None), None)
    if title is None:
        return {}
    if description and item[description] == item[title]:
        description = None
    return {"question": title, "input": description, "answer": answer or "content"}


def prompt_of(value: Any, names: FieldNames, line: int = 0, raw: str = "") -> Conversation:
    """Return the conversation of a record. If the last answer is missing, an empty answer is added.

    Raises:
        BadLine: if the record has no question, or a part of it is not text.
    """
    if isinstance(value, list):
        value = {"messages": value}
    if not isinstance(value, Mapping):
        raise BadLine("not an object", f"it is {_kind(value)}")
    item = lower_keys(value)
    found = parts_of(item)
    key = found["turns"]
    if not names.question and key and _are_turns(item[key], found):
        turns = _turns(item[key], f"`{key}`", names.speaker)
        if turns and turns[-1].role != "assistant":
            item = {name: part for name, part in item.items() if name != key}
            item |= {"question": [turn._asdict() for turn in turns], "answer": _NO_ANSWER}
    else:
        answer = names.answer.strip().lower() or found["answer"] or "answer"
        if _is_nothing(item.get(answer)):
            item = {**item, answer: _NO_ANSWER}
    one = meaning_of(item, names, line, raw)
    if isinstance(one, Text):
        raise BadLine("a text, no prompt")
    if one.turns[-1].content == _NO_ANSWER:
        one = replace(one, turns=(*one.turns[:-1], Turn("assistant", "")))
    return one


def lower_keys(value: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a record with its keys in lower case. A key that then occurs twice gets the value REPEATED."""
    return json_object((str(key).strip().lower(), part) for key, part in value.items())


def _are_turns(value: Any, found: Mapping[str, str | None]) -> bool:
    """Return True if the value of a field such as "messages" is to be read as a list of turns."""
    if isinstance(value, str):
        has_others = found["text"] or (found["question"] and found["answer"])
        return value.lstrip().startswith("[") or not has_others
    return isinstance(value, list) or value is REPEATED


def parts_of(item: Mapping[str, Any]) -> dict[str, str | None]:
    """Return a dict: part, such as "question" -> name of the record's field that holds this part, or None."""
    return dict(_names_of(tuple(name for name, value in item.items() if value is not None)))


def _first(item: Mapping[str, Any], part: str) -> str | None:
    return parts_of(item)[part]


@functools.lru_cache(maxsize=256)  # most records of a file have the same fields
def _names_of(given: tuple[str, ...]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for part, names in FIELDS.items():
        last = LAST.get(part, ())
        found[part] = next((name for name in names if name in given and name not in last), None)
    alike: dict[str, str | None] = {}
    for part, pattern in ALIKE.items():
        like = [name for name in given if pattern.fullmatch(name) and not OTHER[part].search(name)]
        alike[part] = like[0] if len(like) == 1 else None
    if found["question"] == "q" and not found["answer"] and "a" in given and "b" not in given:
        found["answer"] = "a"
    pairs = ((one, other) for one, others in PARTNERS.items() for other in others)
    pair = next((both for both in pairs if {*both} <= {*given}), None)
    if pair and not found["question"] and not found["answer"] and None in alike.values():
        found["question"], found["answer"] = pair
    for part in FIELDS:
        found[part] = found[part] or alike.get(part)
        vague = [name for name in LAST.get(part, ()) if name in given and not (name == "a" and "b" in given)]
        found[part] = found[part] or next(iter(vague), None)
    if is_doubtful(found["question"], found["answer"], given):
        found["question"] = None
    return found


def shown_keys(item: Mapping[str, Any]) -> str:
    """Return a phrase for an error message that lists a record's keys: "it has 'id', 'name'"."""
    return f"it has {', '.join(repr(str(key)[:40]) for key in list(item)[:8]) or 'no keys at all'}"


def _pair_of(item: Mapping[str, Any], question: str, answer: str) -> list[Turn]:
    return [Turn("user", text_of(item, question)), Turn("assistant", text_of(item, answer))]


def _question_and_answer(item: Mapping[str, Any], found: Mapping[str, str | None]) -> list[Turn]:
    question_key, answer_key = found["question"], found["answer"]
    assert question_key is not None
    assert answer_key is not None
    inner = _in_json(item[question_key])
    marked: list[tuple[str, Turn]] = []
    options: dict[str, str] = {}
    letters = ""  # letters[i]: letter of the option with number i; empty options have a number, too
    if isinstance(item[question_key], list) or isinstance(inner, list):
        turns = _turns(item[question_key], f"`{question_key}`")  # the question is a list of turns
    else:
        question = text_of(item, question_key)
        more = found["input"]
        if more and more != question_key and not _is_no_input(item[more]):
            question = f"{question}\n{text_of(item, more)}"
        options, letters = _options(item, answer_key)
        question = "\n".join([question, *options.values()])
        marked = marked_turns(question)
        turns = [turn for _, turn in marked] or [Turn("user", question)]
    answer = item[answer_key]
    if answer_key == "answers" and isinstance(answer, str):  # in a table's cell, the list is a text
        answer = structure_in(answer)
    answer = _one_of(answer)
    is_text = isinstance(answer, str) and any(line == f"{a}. {answer}" for a, line in options.items())
    number = None if is_text or isinstance(answer, bool) else whole_number(str(answer))
    if number is not None and number < len(letters) and letters[number] in options:
        answer = letters[number]  # the answer is the number of an option, from 0
    if isinstance(answer, list) and answer and isinstance(answer[0], dict):
        turns += _turns(answer, f"`{answer_key}`")
    elif isinstance(answer, str):
        answer = _checked(answer, f"`{answer_key}`")
        turns += answer_turns(answer, marked) or [Turn("assistant", answer)]
    else:
        turns.append(Turn("assistant", text_of(item, answer_key)))
    if found["history"]:
        turns[:0] = _history(item[found["history"]])
    if found["system"]:
        turns[:0] = _system(item, found["system"])
    return turns


def _options(item: Mapping[str, Any], answer: str) -> tuple[dict[str, str], str]:
    """Return the options of a multiple-choice question (letter -> line, such as "A. ..."), and their letters.

    The lines become part of the question. In the record, each option has its own field, or one field holds
    all options: a list, an object, or a text. Such a text is returned as one option with the letter "".

    The letters are one string. An answer may be the number of an option, from 0: then it means the letter at
    this index. The string is "" if an answer cannot be such a number: if the options are one text, or a JSON
    object whose keys are not A, B, ...
    """
    apart = _apart(tuple(item), answer)
    letters = ""
    if apart and _is_choice(item, apart, answer):
        letters = "".join(letter.upper() for letter, _ in apart)
        given: Any = {letter.upper(): item[name] for letter, name in apart if not _is_nothing(item[name])}
    else:
        given = next((item[name] for name in OPTIONS if name in item), [])
        given = structure_in(given) if isinstance(given, str) else given
        if isinstance(given, str):
            return ({} if _is_nothing(given) else {"": given.strip()}), ""
        if isinstance(given, list) and given and all(isinstance(each, Mapping) for each in given):
            labelled = [tuple(one.get(key) for key in ("label", "text")) for one in map(lower_keys, given)]
            given = {str(label): text for label, text in labelled if label is not None}
        if isinstance(given, list):
            letters = string.ascii_uppercase[: len(given)]
            # the text "nan" is an option in a list; in a table's cell, it means that the cell is empty
            given = {a: text for a, text in zip(letters, given) if text == "nan" or not _is_nothing(text)}
        elif isinstance(given, Mapping):
            keys = "".join(str(letter).upper() for letter in given)
            letters = keys if string.ascii_uppercase.startswith(keys) else ""
            given = {str(letter).upper(): text for letter, text in given.items() if not _is_nothing(text)}
        else:
            return {}, ""
    if not all(isinstance(text, str | int | float) and len(letter) == 1 for letter, text in given.items()):
        return {}, ""
    return {letter: f"{letter}. {text}" for letter, text in given.items()}, letters


def _is_choice(item: Mapping[str, Any], apart: list[tuple[str, str]], answer: str) -> bool:
    """Return True if fields such as "a" or "option_a" hold the options of a multiple-choice question."""
    is_named = len(apart) > 2 or any(letter != name for letter, name in apart) or _RIGHT.search(answer)
    return bool(is_named or _LETTERS.fullmatch(str(item[answer]).strip()))


@functools.lru_cache(maxsize=256)
def _apart(given: tuple[str, ...], answer: str) -> list[tuple[str, str]]:
    """Return (letter, field name) for fields such as "option_a" or "a"; [] if a or b is missing."""
    found = sorted((match[1], name) for name in given if name != answer and (match := OPTION.fullmatch(name)))
    return found if {"a", "b"} <= {letter for letter, _ in found} else []


def _one_of(answer: Any) -> Any:
    """Return the first of several right answers. In SQuAD, they are {"text": ..., "answer_start": ...}."""
    if isinstance(answer, Mapping):
        answer = lower_keys(answer).get("text", answer)
    if not isinstance(answer, list):
        return answer
    if not answer:
        raise BadLine(NO_ANSWER)
    if len(answer) == 1 and isinstance(answer[0], list):  # the answer is [[text]]
        return _one_of(answer[0])
    if isinstance(answer[0], Mapping) and {"text"} <= answer[0].keys() <= {"text", "answer_start", "id"}:
        return answer[0]["text"]
    return answer[0] if all(isinstance(each, str) for each in answer) else answer


def _history(value: Any) -> list[Turn]:
    if isinstance(value, str) and value.strip().startswith("["):  # in a table's cell, the list is a JSON text
        value = parse_list(value)
    if _is_no_input(value):
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
    return [] if _is_no_input(item[key]) else [Turn("system", _checked(item[key], f"`{key}`"))]


def _is_nothing(value: Any) -> bool:
    """Return True if an optional field is empty. NaN counts, too: pandas writes it for an empty cell."""
    if isinstance(value, str):
        return value.strip() in ("", "nan")
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_no_input(value: Any) -> bool:
    """Return True if an input, a system prompt or a history is empty, or a text such as "none"."""
    return _is_nothing(value) or (isinstance(value, str) and value.strip().lower() in _NOTHING)


def _turns(value: Any, where: str, speaker: str = "") -> list[Turn]:
    """Convert a record's list to turns. speaker: value of --speaker: who answers; "": not given."""
    if isinstance(value, str):  # in a table's cell, the list is a JSON text
        try:
            value = parse_list(value)
        except BadLine:
            raise BadLine(f"{where} is text, not a list of turns") from None
    if not isinstance(value, list):
        raise _not_a(value, "a list of turns", where)
    texts = [_unnamed(each) for each in value]
    if texts and all(isinstance(text, str) for text in texts):  # texts of the user and the assistant in turn
        return [Turn("assistant" if i % 2 else "user", _checked(text, where)) for i, text in enumerate(texts)]
    turns = []
    for number, each in enumerate(value, 1):
        if not isinstance(each, dict):
            raise BadLine("a turn is no object", f"turn {number} is {_kind(each)}")
        turns += _turns_in(lower_keys(each), number, speaker.strip().lower())
    # In {"speaker": "SYSTEM"}, SYSTEM is a dialogue system, which answers. Only turn 1 may be a system text.
    if all("speaker" in lower_keys(each) for each in value) and not any(t.role == "assistant" for t in turns):
        turns[1:] = [t._replace(role="assistant") if t.role == "system" else t for t in turns[1:]]
    return turns


def _unnamed(turn: Any) -> Any:
    """Return the text in a turn without speaker, such as {"message": ...}. Return other values unchanged."""
    if isinstance(turn, dict) and len(turn.keys() - {"attrs"}) == 1:
        key = next(iter(turn.keys() - {"attrs"}))
        return turn[key] if key in ("message", "utterance", "sentence", *TEXT_KEYS) else turn
    return turn


def _turns_in(item: dict[str, Any], number: int, answering: str) -> list[Turn]:
    """Return the turns in one element of a list: two for {"human": ..., "assistant": ...}, usually one."""
    if not any(key in item for key in SPEAKER_KEYS):
        found = parts_of(item)
        question, answer = found["question"] or found["input"], found["answer"]
        if question and answer:
            system = _system(item, found["system"]) if found["system"] else []
            return [*system, *_pair_of({**item, answer: _one_of(item[answer])}, question, answer)]
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
    said = [words_of(item[words], f"`{words}`")] if words else []
    said += [_described(item[key], f"`{key}`") for key in ("tool_calls", "function_call") if item.get(key)]
    if not said:
        raise BadLine("a turn is empty", f"turn {number}")
    return Turn(role, "\n".join(said))


def words_of(value: Any, where: str) -> str:
    """Return the text of a turn. A list of parts is joined; a part is a text or an object with a `text`."""
    if not isinstance(value, list):
        return _checked(value, where)
    texts = []
    for part in value:  # OpenAI's API has lists of parts: [{"type": "text", "text": ...}, ...]
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
    # in data sets of task-oriented dialogues, such as MultiWOZ, the speaker SYSTEM gives the answers
    roles = [turn.role for turn in turns]
    if len(roles) > 3 and roles == [("user", "system")[number % 2] for number in range(len(roles))]:
        turns = [turn._replace(role="assistant") if turn.role == "system" else turn for turn in turns]
    if not any(turn.role == "assistant" for turn in turns):
        raise BadLine("no turn is an assistant's: there is no answer")
    found = item or {}
    return Conversation(tuple(turns), line, raw, _tools(found.get("tools")), _weight(found))


def _weight(item: Mapping[str, Any]) -> float:
    """Return a record's factor in the training loss: the field `weight`, or 1.

    A text that is no number, such as "5 kg", gives NaN: the field then means something else.
    """
    value = item.get("weight")
    if _is_nothing(value):
        return 1.0
    try:
        weight = -1.0 if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except ValueError:
        return math.nan
    except (TypeError, OverflowError):  # neither a number nor a text, or an integer too large for a float
        weight = -1.0
    if not 0 <= weight < 1e6:
        raise BadLine("`weight` is no number from 0 to 1e6", f"it is {str(value)[:40]!r}")
    return weight


def _tools(value: Any) -> str:
    """Return a list of tools as JSON text, or "" without tools. `value` may be a list or JSON text."""
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
    """Return the text under a key. A list of texts, such as paragraphs, is joined by newlines.

    If the texts already end in newlines, as the lines of a Jupyter notebook's cell do, none are added.

    Raises:
        BadLine: if the value is missing, empty, or neither text nor a list of texts.
    """
    value = item.get(key)
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        has_ends = len(value) > 1 and all(part.endswith("\n") for part in value[:-1])
        return _checked(("" if has_ends else "\n").join(value), f"`{key}`")
    return text_of(item, key)


def _checked(value: Any, where: str) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and (isinstance(value, int) or math.isfinite(value)):
        value = str(value)  # spreadsheets and pandas turn an answer such as 42 into a number
    if not isinstance(value, str):
        raise _not_a(value, "text", where)
    if not value.strip():
        raise BadLine(f"{where} is empty")
    if value.strip() in ("[deleted]", "[removed]"):  # what Reddit writes in place of a text
        raise BadLine(f"{where} was deleted")
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
