"""Defines `Conversation`, a list of turns with roles. Questions and answers are always read as conversations.

A question with its answer is a conversation of two turns. Without a chat template, a model reads a
conversation in the plain form:

    question <sep> answer <sep> question <sep> answer <sep> ...

A system text and a newline may stand before the first question. An `Exchange` is one answer with all turns
since the previous answer. The loss counts the tokens of each answer, and the <sep> after it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

__all__ = [
    "ROLES", "SPEAKER_KEYS", "TEXT_KEYS", "Conversation", "Exchange", "Role", "Turn", "conversation_of_pair",
]  # fmt: skip

Role = Literal["system", "user", "assistant", "tool"]
ROLES: dict[str, Role] = {  # name of a speaker in a file, such as "human" or "gpt" -> role
    **dict.fromkeys(("system", "developer", "系统", "系統"), "system"),
    **dict.fromkeys(
        ("user", "human", "customer", "usr", "用户", "问", "客户", "用戶", "問", "客戶", "user_a"), "user"
    ),
    **dict.fromkeys(
        ("assistant", "gpt", "bot", "model", "chatbot", "ai", "sys", "助手", "答", "客服"), "assistant"
    ),
    **dict.fromkeys(("tool", "observation", "function", "ipython", "environment"), "tool"),
    "function_call": "assistant",
}
SPEAKER_KEYS = ("role", "from", "speaker", "sender", "角色")  # keys of a turn that name the speaker
TEXT_KEYS = (
    "content",
    "value",
    "text",
    "utterance",
    "内容",
    "內容",
    "parts",
)  # keys of a turn that hold the text


class Turn(NamedTuple):
    """The text of one speaker."""

    role: Role
    content: str


class Exchange(NamedTuple):
    """One answer, with all turns since the previous answer."""

    question: str  # the turns before the answer, joined by newlines
    answer: str


@dataclass(frozen=True)
class Conversation:
    """One training example."""

    turns: tuple[Turn, ...]
    line: int = 0  # number of the line in the data file, from 1
    raw: str = ""  # the record as one line of JSON; "": not kept
    tools: str = ""  # JSON of the functions that the assistant may call, for the chat template
    weight: float = 1.0  # how much the example counts in the loss of training

    @cached_property
    def exchanges(self) -> tuple[Exchange, ...]:
        """Return the exchanges. Turns after the last answer are left out, because they have no answer."""
        found: list[Exchange] = []
        said: list[str] = []
        for turn in self.turns:
            if turn.role != "assistant":
                said.append(turn.content)
            elif found and not said:  # the turn before is an answer, too: join both
                found[-1] = Exchange(found[-1].question, f"{found[-1].answer}\n{turn.content}")
            else:
                found.append(Exchange("\n".join(said), turn.content))
                said = []
        return tuple(found)

    @property
    def question(self) -> str:
        """Return the last question."""
        return self.exchanges[-1].question

    @property
    def answer(self) -> str:
        """Return the last answer."""
        return self.exchanges[-1].answer

    def texts(self) -> Iterable[str]:
        """Yield every question and every answer. The turns of a question are joined by newlines."""
        return (text for exchange in self.exchanges for text in exchange)

    def messages(self) -> list[dict[str, str]]:
        """Return the turns as the list of dictionaries that chat templates expect."""
        return [{"role": turn.role, "content": turn.content} for turn in self.turns]


def conversation_of_pair(question: str, answer: str, line: int = 0, raw: str = "") -> Conversation:
    """Build a conversation of one question and its answer.

    >>> conversation_of_pair("一加一等于几？", "等于二。").exchanges
    (Exchange(question='一加一等于几？', answer='等于二。'),)
    """
    return Conversation((Turn("user", question), Turn("assistant", answer)), line, raw)
