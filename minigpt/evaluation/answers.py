"""Scores answers: exact match and character F1 of a model's answers against the expected answers.

    references = by_question(conversations)  # a question may have several right answers
    report = score_answers(given, list(references.values()))
    print(report.exact_match, report.character_f1, report.count)

Each distinct question counts once. If a file has several answers to a question, the model's answer is scored
against each, and the best score counts.

This module does not generate answers (minigpt.generation.api does). The scores compare text, not meaning.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeAlias

from minigpt.data.conversation import Conversation, Exchange
from minigpt.errors import InputError

__all__ = [
    "AnswerReport",
    "Asked",
    "Row",
    "answer_rows",
    "by_question",
    "character_f1",
    "exact_match",
    "score_answers",
]


@dataclass(frozen=True)
class AnswerReport:
    """Mean scores over questions."""

    exact_match: float  # share of questions with an exactly right answer, 0 to 1
    character_f1: float  # mean F1 over questions, 0 to 1
    count: int  # number of distinct questions

    def as_dict(self) -> dict[str, Any]:
        """Return the scores as a dict that JSON can hold."""
        return asdict(self)


def exact_match(given: str, expected: str) -> bool:
    """Return True if two texts are equal, apart from white space at both ends.

    >>> exact_match("成都。 ", "成都。"), exact_match("成都", "成都。")
    (True, False)
    """
    return given.strip() == expected.strip()


def character_f1(given: str, expected: str) -> float:
    """Return the F1 score of the characters that two texts share, in any order: 0 (none) to 1 (all).

    F1 is the harmonic mean of precision (shared / given) and recall (shared / expected). If a character
    occurs 3 times in one text and 2 times in the other, 2 are shared. This is SQuAD's F1
    (https://arxiv.org/abs/1606.05250, section 6.1) with characters instead of words, because Chinese has no
    spaces between words. White space does not count. The result is 1 if both texts are empty, and 0 if only
    one is empty.

    >>> character_f1("是成都。", "成都市。")  # three of four characters are shared
    0.75
    """
    ours, theirs = Counter("".join(given.split())), Counter("".join(expected.split()))
    if not ours and not theirs:
        return 1.0
    return 2 * (ours & theirs).total() / (ours.total() + theirs.total())


Row: TypeAlias = tuple[str, str, str, str]  # ✓ (right) or ✗ (wrong), question, expected answer, given answer


class Asked(NamedTuple):
    """A question, with the exchanges before it in the conversation."""

    before: tuple[Exchange, ...]
    question: str


def by_question(conversations: Iterable[Conversation]) -> dict[Asked, list[str]]:
    """Return a dict: question (with the exchanges before it) -> its distinct answers, in the given order."""
    answers: dict[Asked, list[str]] = {}
    for conversation in conversations:
        for number, exchange in enumerate(conversation.exchanges):
            known = answers.setdefault(Asked(conversation.exchanges[:number], exchange.question), [])
            if exchange.answer not in known:
                known.append(exchange.answer)
    return answers


def score_answers(given: Sequence[str], references: Sequence[Sequence[str]]) -> AnswerReport:
    """Score the model's answers, one per question. If several answers are right, the best score counts.

    Raises:
        InputError: if there are no questions, or the numbers of answers and questions differ.
    """
    if not given or len(given) != len(references):
        raise InputError(
            f"each question needs one answer: got {len(given)} answers, {len(references)} questions"
        )
    matches = sum(_is_right(answer, right) for answer, right in zip(given, references))
    f1 = sum(max(character_f1(answer, one) for one in right) for answer, right in zip(given, references))
    return AnswerReport(matches / len(given), f1 / len(given), len(given))


def _is_right(given: str, references: Sequence[str]) -> bool:
    return any(exact_match(given, one) for one in references)


def answer_rows(
    questions: Sequence[str], references: Sequence[Sequence[str]], given: Sequence[str], count: int
) -> list[Row]:
    """Return table rows for at most `count` of the questions, spread evenly over all questions.

    If a question has several right answers, its row has the one that is most similar to the model's answer.
    """
    count = min(count, len(questions))
    rows = []
    for index in (i * len(questions) // count for i in range(count)):
        answer, right = given[index], references[index]
        nearest = max(right, key=lambda one: (exact_match(answer, one), character_f1(answer, one)))
        mark = "✓" if exact_match(answer, nearest) else "✗"
        rows.append((mark, questions[index], nearest, answer))
    return rows
