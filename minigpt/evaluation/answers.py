"""Are the answers right? Exact match and character F1 of given answers against the expected ones.

    references = by_question(conversations)  # a question may have several right answers
    report = score_answers(given, list(references.values()))
    print(report.exact_match, report.character_f1, report.count)

Each distinct question counts once. When a file has several answers to one question, the given answer is
scored against each and the best score counts, as is usual for questions with several references.

Nothing is generated here (see minigpt.generation.api). Neither measure knows what a text means.
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
    """Means over questions."""

    exact_match: float  # share of questions answered exactly, 0 to 1
    character_f1: float  # mean over questions, 0 to 1
    count: int  # distinct questions

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def exact_match(given: str, expected: str) -> bool:
    """The same text, apart from white space at both ends.

    >>> exact_match("成都。 ", "成都。"), exact_match("成都", "成都。")
    (True, False)
    """
    return given.strip() == expected.strip()


def character_f1(given: str, expected: str) -> float:
    """How many characters two texts share, however often and in whatever order: 0 (none) to 1 (all).

    The harmonic mean of precision (shared / given) and recall (shared / expected), counting a character as
    often as both texts have it; SQuAD's F1 (https://arxiv.org/abs/1606.05250, section 6.1) over characters
    instead of words, for Chinese puts no spaces between words. White space does not count. Two empty texts
    agree (1), an empty one and another do not (0).

    >>> character_f1("是成都。", "成都市。")  # three of four shared, both ways
    0.75
    """
    ours, theirs = Counter("".join(given.split())), Counter("".join(expected.split()))
    if not ours and not theirs:
        return 1.0
    return 2 * (ours & theirs).total() / (ours.total() + theirs.total())


Row: TypeAlias = tuple[str, str, str, str]  # mark, question, expected, given


class Asked(NamedTuple):
    """A question, and the exchanges before it."""

    before: tuple[Exchange, ...]
    question: str


def by_question(conversations: Iterable[Conversation]) -> dict[Asked, list[str]]:
    """Each distinct question, with what was said before it, and its distinct answers, in file order."""
    answers: dict[Asked, list[str]] = {}
    for conversation in conversations:
        for number, exchange in enumerate(conversation.exchanges):
            known = answers.setdefault(Asked(conversation.exchanges[:number], exchange.question), [])
            if exchange.answer not in known:
                known.append(exchange.answer)
    return answers


def score_answers(given: Sequence[str], references: Sequence[Sequence[str]]) -> AnswerReport:
    """Score one given answer per question against the question's right answers; the best of them counts.

    Raises:
        InputError: if there are no questions, or not one given answer for each.
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
    """Rows of a table (mark, question, expected, given): `count` of the questions, evenly spread.

    Of several right answers the one is shown that the given answer comes nearest to.
    """
    count = min(count, len(questions))
    rows = []
    for index in (i * len(questions) // count for i in range(count)):
        answer, right = given[index], references[index]
        nearest = max(right, key=lambda one: (exact_match(answer, one), character_f1(answer, one)))
        mark = "✓" if exact_match(answer, nearest) else "✗"
        rows.append((mark, questions[index], nearest, answer))
    return rows
