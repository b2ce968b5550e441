"""The one form that all data takes: a conversation, a list of turns with roles.

A question with its answer is a conversation of two turns. What a model reads of it without a chat template is
the plain form, question by question:

    <system text, a line end,> question <sep> answer <sep> question <sep> answer <sep> ...

An `Exchange` is one answer with all that was said since the answer before. The loss counts on each answer and
on the <sep> behind it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

__all__ = ["Conversation", "Exchange", "Role", "Turn", "conversation_of_pair"]

Role = Literal["system", "user", "assistant", "tool"]


class Turn(NamedTuple):
    """What one of them said."""

    role: Role
    content: str


class Exchange(NamedTuple):
    """An answer, and what was said since the one before."""

    question: str  # of several turns in a row: a line each
    answer: str


@dataclass(frozen=True)
class Conversation:
    """One training example."""

    turns: tuple[Turn, ...]
    line: int = 0  # of the file, from 1
    raw: str = ""  # as it stands in the file, or as one line of JSON
    tools: str = ""  # JSON: the tools that a chat template may describe

    @cached_property
    def exchanges(self) -> tuple[Exchange, ...]:
        """Question by question. What follows the last answer is left out: nothing is learned from it."""
        found: list[Exchange] = []
        said: list[str] = []
        for turn in self.turns:
            if turn.role != "assistant":
                said.append(turn.content)
            elif found and not said:  # two answers in a row are one
                found[-1] = Exchange(found[-1].question, f"{found[-1].answer}\n{turn.content}")
            else:
                found.append(Exchange("\n".join(said), turn.content))
                said = []
        return tuple(found)

    @property
    def question(self) -> str:
        """The last question."""
        return self.exchanges[-1].question

    @property
    def answer(self) -> str:
        """The last answer."""
        return self.exchanges[-1].answer

    def texts(self) -> Iterable[str]:
        """What a model reads and writes: line ends between turns are part of a question."""
        return (text for exchange in self.exchanges for text in exchange)

    def messages(self) -> list[dict[str, str]]:
        """As chat templates want it."""
        return [{"role": turn.role, "content": turn.content} for turn in self.turns]


def conversation_of_pair(question: str, answer: str, line: int = 0, raw: str = "") -> Conversation:
    """A question and its answer.

    >>> conversation_of_pair("一加一等于几？", "等于二。").exchanges
    (Exchange(question='一加一等于几？', answer='等于二。'),)
    """
    return Conversation((Turn("user", question), Turn("assistant", answer)), line, raw)
