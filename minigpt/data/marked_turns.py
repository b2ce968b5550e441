"""Finds the turns of a conversation that is one text with marks such as "Human:", as in the data set BELLE.

    "Human: 你好\\n\\nAssistant: 你好！\\n\\nHuman: 几点了？\\n\\nAssistant:"

A text is such a conversation only if it begins with a user's mark and also has an assistant's mark.
"""

import re
from collections.abc import Sequence

from minigpt.data.conversation import Role, Turn

__all__ = ["answer_turns", "marked_turns"]

_MARKS = re.compile(
    r"(?:^|\n)[ \t]*(?:#+[ \t]*)?"
    r"(?:(?P<user>human|user|用户|人类)|(?P<assistant>assistant|bot|助手))[ \t]*[:：]",
    re.IGNORECASE,
)
Marked = tuple[str, Turn]  # (mark, turn)


def marked_turns(text: str) -> list[Marked]:
    """Return the turns of a text with their marks; [] for a text without such marks.

    >>> [turn for _, turn in marked_turns("Human: a\\n\\nAssistant: b\\n\\nHuman: c\\n\\nAssistant:")]
    [Turn(role='user', content='a'), Turn(role='assistant', content='b'), Turn(role='user', content='c')]
    """
    text = text.strip()
    first = _MARKS.match(text)
    marks = list(_MARKS.finditer(text)) if first and first["user"] else []
    if not any(mark["assistant"] for mark in marks):
        return []
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    found: list[Marked] = []
    for mark, end in zip(marks, ends):
        role: Role = "user" if mark["user"] else "assistant"
        if said := text[mark.end() : end].strip():  # a last "Assistant:" has no text: the answer is missing
            found.append((mark[0].strip().lower(), Turn(role, said)))
    return found


def answer_turns(answer: str, question: Sequence[Marked]) -> list[Turn]:
    """Return the turns of an answer to a question with marks. The answer may hold marks of more turns.

    Returns: [] if the question has no marks.
    """
    if not question:
        return []
    first = _MARKS.match(answer.strip())
    said = answer.strip()[first.end() :].strip() if first and first["assistant"] else answer.strip()
    more = marked_turns(f"Human: -\nAssistant: {said}")[1:]
    if len(more) > 1 and {mark for mark, turn in more if turn.role == "user"} <= {
        mark for mark, _ in question
    }:
        return [turn for _, turn in more]
    return [Turn("assistant", said)] if said else []
