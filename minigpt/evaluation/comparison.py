"""Compares two models on the same questions, and says in words whether the data shows which is better.

found = compare_results(result_a, result_b)
print(found.in_words("A", "B"))
"""

from dataclasses import asdict, dataclass
from typing import Any

from minigpt.errors import InputError
from minigpt.evaluation.intervals import Difference, paired
from minigpt.evaluation.task_results import Answered, TaskResult
from minigpt.evaluation.words import Say, speaker

__all__ = ["Comparison", "compare_results"]


@dataclass(frozen=True)
class Comparison:
    """The comparison of two models on one task."""

    name: str
    metric: str
    first: float
    second: float
    difference: Difference
    # The answers to the questions on which the first model is better (`only_first`) or the second model is
    # better (`only_second`). Each entry is about one question: (first model's answer, second model's answer).
    only_first: list[tuple[Answered, Answered]]
    only_second: list[tuple[Answered, Answered]]
    higher_is_better: bool

    @property
    def winner(self) -> int:
        """The number of the better model: 1 or 2; 0 if the difference is not significant."""
        if not self.difference.is_clear:
            return 0
        return 2 if self.difference.value > 0 else 1

    def in_words(self, a: str, b: str, say: Say = speaker()) -> str:  # noqa: B008
        """Return the result of the comparison in one or two sentences.

        Args:
            a, b: names of the models.
        """
        d, count = self.difference, f"{self.difference.count:,}"
        named = {"task": self.name, "metric": self.metric}
        if not d.only_first and not d.only_second:
            return say(
                "{task}: {a} and {b} give the same {metric} on each of {count} questions",
                **named, a=a, b=b, count=count,
            )  # fmt: skip
        if self.higher_is_better:
            size = say("{value} points", value=f"{100 * abs(d.value):.1f}")
        else:
            size = say("{value} nats", value=f"{abs(d.value):.4f}")
        if self.winner:
            better, worse = (b, a) if self.winner == 2 else (a, b)
            return say(
                "{task}: {better} is better than {worse} by {size} in {metric}; chance alone gives so much "
                "with p={p}", **named, better=better, worse=worse, size=size, p=f"{d.p:.2g}",
            )  # fmt: skip
        needed = _needed(d)
        more = "; with about {count} questions such a difference would show"
        return say(
            "{task}: the data cannot tell {a} and {b} apart: {size} in {metric} on {count} questions is "
            "within chance (p={p})", **named, a=a, b=b, size=size, count=count, p=f"{d.p:.2g}",
        ) + (say(more, count=f"{needed:,}") if needed else "")  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers as a dict that JSON can hold."""
        return {
            "metric": self.metric,
            "first": self.first,
            "second": self.second,
            **{k: v for k, v in asdict(self.difference).items() if k != "value"},
            "difference": self.difference.value,
            "winner": self.winner,
        }


def _needed(d: Difference) -> int:
    """Return about how many questions would make the difference significant, if its value stays the same.

    Returns 0 if there is no useful answer: if the models do not differ, if more than a million questions
    would be needed, or if no more questions would be needed than were measured.
    """
    if not d.value or d.high <= d.low:
        return 0
    half = (d.high - d.low) / 2
    # The 95 % interval is the difference +- `half`, so half / 1.96 is the standard error. A difference of 2.8
    # standard errors is found significant (at 5 %) with a probability of 80 %.
    needed = int(d.count * (2.8 * (half / 1.96) / abs(d.value)) ** 2)
    rounded = round(needed, 1 - len(str(needed)))
    return rounded if d.count < rounded <= 10**6 else 0


def compare_results(first: TaskResult, second: TaskResult, metric: str = "") -> Comparison:
    """Compare two models' results on the same task, question by question.

    Args:
        metric: name of the metric; "": the first metric.

    Raises:
        InputError: if the questions differ, or there is no such metric.
    """
    name = metric or first.main
    for result in (first, second):
        if name not in result.metrics:
            raise InputError(f"{result.task.name} has no metric {name!r}; it has {', '.join(result.metrics)}")
    asked = [[(one.example.line, one.example.subject, one.example.question) for one in result.answered]
             for result in (first, second)]  # fmt: skip
    if asked[0] != asked[1]:
        raise InputError(f"{first.task.name}: the two results are not about the same questions")
    a, b = first.metrics[name], second.metrics[name]
    sign = 1.0 if a.higher_is_better else -1.0
    difference = paired(sign * a.values, sign * b.values)
    pairs = list(zip(first.answered, second.answered))
    better = sign * (b.values - a.values)
    return Comparison(
        first.task.name, name, a.value, b.value, difference,
        [pair for pair, d in zip(pairs, better) if d < 0],
        [pair for pair, d in zip(pairs, better) if d > 0],
        a.higher_is_better,
    )  # fmt: skip
