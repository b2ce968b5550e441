"""Finds the turns of a conversation that stands in one text, with marks before each turn.

    Human: ...  Assistant: ...                            BELLE, hh-rlhf
    ### Human: ... ### Assistant: ...                     guanaco
    USER: ... ASSISTANT: ...                              Vicuna
    ### Instruction: ... ### Response: ...                Alpaca; a text before it is the system text
    <|im_start|>user ... <|im_end|>                       ChatML
    <|start_header_id|>user<|end_header_id|> ...          Llama 3
    [INST] <<SYS>> ... <</SYS>> ... [/INST] ...           Llama 2, Mistral
    <start_of_turn>user ... <end_of_turn>                 Gemma
    <|user|> ... <|assistant|> ...                        Zephyr, Phi, GLM

A text is such a conversation only if it begins with a mark (in Alpaca, a system text may come first), and if
an assistant speaks in it, but not first.
"""

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from minigpt.data.conversation import ROLES, Turn

__all__ = ["answer_turns", "marked_turns", "name_of_marks"]


class _Marks(NamedTuple):
    name: str  # for notes and error messages
    pattern: re.Pattern[str]  # matches a mark; its one capture group is the speaker
    is_alone: bool = False  # True: no special tokens, such as </s>, stand around the turns


_USER, _ASSISTANT = "human|user|用户|人类", "assistant|bot|助手"
_ALL = (
    _Marks("ChatML", re.compile(r"<\|im_start\|>(\w+)\s*?\n")),
    _Marks("Llama 3", re.compile(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>")),
    _Marks("Llama 2", re.compile(r"(\[/?INST\]|<</?SYS>>)")),
    _Marks("Gemma", re.compile(r"<start_of_turn>(\w+)\s*?\n")),
    _Marks("Zephyr", re.compile(r"<\|(system|user|assistant|observation)\|>")),
    _Marks("Alpaca", re.compile(r"^#{2,3} *(Instruction|Input|Response|指令|输入|回答|回复) *[:：]", re.M)),
    _Marks("### Human: ### Assistant:", re.compile(r"###\s*(Human|User|Assistant)\s*:")),
    _Marks("USER: ASSISTANT:", re.compile(r"\b(USER|ASSISTANT):")),
    _Marks(
        "Human: Assistant:",
        re.compile(rf"(?:^|(?<=\n))[ \t]*(?:#+[ \t]*)?({_USER}|{_ASSISTANT})[ \t]*[:：]", re.IGNORECASE),
        is_alone=True,
    ),
)
_ROLES = ROLES | {
    **dict.fromkeys(("[inst]", "<</sys>>", "instruction", "input", "指令", "输入", "人类"), "user"),
    **dict.fromkeys(("[/inst]", "response", "回答", "回复"), "assistant"),
    "<<sys>>": "system",
}
_TOKEN = (
    r"<s>|</s>|<bos>|<eos>|<end_of_turn>|\[gMASK\]|<sop>"
    r"|<\|(?:im_end|endoftext|begin_of_text|end_of_text|eot_id|end|im_start)\|>"
)
# Matches the special tokens and spaces at the beginning and at the end of a turn. Without (?<!\s), a long row
# of spaces inside a turn would take much time: the search would begin again at each space of the row.
_EDGES = re.compile(rf"\A(?:\s|{_TOKEN})+|(?<!\s)(?:\s|{_TOKEN})+\Z")
_OPENING = re.compile(rf"(?:\s|{_TOKEN.replace('|im_start', '')})*")
Marked = tuple[str, Turn]  # (mark, turn)


def marked_turns(text: str) -> list[Marked]:
    """Return the turns of a text with their marks; [] for a text without marks.

    >>> [turn for _, turn in marked_turns("Human: a\\n\\nAssistant: b\\n\\nHuman: c\\n\\nAssistant:")]
    [Turn(role='user', content='a'), Turn(role='assistant', content='b'), Turn(role='user', content='c')]
    """
    return next((found for marks in _ALL if (found := _turns(text, marks))), [])


def name_of_marks(text: str) -> str:
    """Return the name of the marks in a text that holds a question and an answer; "" without such marks.

    >>> name_of_marks("<|im_start|>user\\na<|im_end|>\\n<|im_start|>assistant\\nb<|im_end|>")
    'ChatML'
    """
    for marks in _ALL:
        roles = [turn.role for _, turn in _turns(text, marks)]
        if "user" in roles and "assistant" in roles[roles.index("user") :]:
            return marks.name
    return ""


def _turns(text: str, marks: _Marks) -> list[Marked]:
    found = list(marks.pattern.finditer(text))
    roles = [_ROLES.get(mark[1].lower()) for mark in found]
    if "assistant" not in roles or None in roles or roles[0] == "assistant":
        return []
    start = found[0].start()
    above = text[:start].strip()
    if marks.name != "Alpaca" and (above if marks.is_alone else not _OPENING.fullmatch(text, 0, start)):
        return []
    turns: list[Marked] = [("", Turn("system", above))] if above and marks.name == "Alpaca" else []
    ends = [*(mark.start() for mark in found[1:]), len(text)]
    for mark, role, end in zip(found, roles, ends):
        said = text[mark.end() : end]
        said = said.strip() if marks.is_alone else _EDGES.sub("", said)
        if said and role:  # skip an empty turn, such as an answer still to be given
            turns.append((mark[0].strip(), Turn(role, said)))
    if marks.name == "Alpaca":  # Alpaca's instruction and input become one turn
        return [_joined(list(group)) for _, group in itertools.groupby(turns, key=lambda one: one[1].role)]
    return turns


def _joined(group: list[Marked]) -> Marked:
    return group[0][0], Turn(group[0][1].role, "\n".join(turn.content for _, turn in group))


def answer_turns(answer: str, question: Sequence[Marked]) -> list[Turn]:
    """Return the turns of an answer: several, if the question's marks, such as "User:", occur in the answer.

    Returns: [] if the question has no marks of speakers, or the answer is empty.
    """
    asked = next((mark for mark, turn in reversed(question) if turn.role == "user"), "")
    marks = next((one for one in _ALL if asked and one.pattern.match(asked + "\n")), None)
    if marks is None:
        return []
    first = marks.pattern.match(answer.strip())
    if first and _ROLES.get(first[1].lower()) == "assistant":
        answer = answer.strip()[first.end() :]
    answer = answer.strip() if marks.is_alone else _EDGES.sub("", answer)
    parts = list(marks.pattern.finditer(answer))
    own = {mark.lower() for mark, turn in question if turn.role == "user"}
    asks = [part for part in parts if _ROLES.get(part[1].lower()) == "user"]
    if asks and {part[0].strip().lower() for part in asks} <= own:
        more = [turn for _, turn in _turns(answer[asks[0].start() :], marks)]
        said = answer[: asks[0].start()]
        said = said.strip() if marks.is_alone else _EDGES.sub("", said)
        if more and said:
            return [Turn("assistant", said), *more]
    return [Turn("assistant", answer)] if answer else []
