"""Measures more than accuracy on one task, as the benchmark HELM does (https://arxiv.org/abs/2211.09110).

    found = profile(loaded, result, options)
    found.calibration.error, found.robustness["typing errors"].value, found.positions

- Calibration: where the model gives a choice the probability 80 %, is it right in 80 % of the cases? This
  is measured twice: without a temperature, and with one by which the logits are divided. The temperature is
  fitted on the task's dev part, from which few-shot examples are taken. If there is no such part, or if it
  has fewer than 20 examples, every second question is used for fitting. These questions are then not
  measured.
- Robustness: how much worse are the answers if questions are changed a little, for example by typing errors?
  There are several kinds of changes. One kind rewords the instruction instead of the question.
- Position: how often is each letter chosen, and right, if the choices are listed in every cyclic order?
- Contamination: which questions are in the training data?
- Efficiency: seconds, tokens and memory. TaskResult already has these numbers.

HELM also measures fairness and toxicity. This needs data with human judgements, or another model as a judge.
So these two are not measured here.
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minigpt.evaluation.classification import calibration_error
from minigpt.evaluation.contamination import Contamination, contamination
from minigpt.evaluation.intervals import Difference, Values, paired
from minigpt.evaluation.options import TaskOptions
from minigpt.evaluation.perturbations import PERTURBATIONS, wordings
from minigpt.evaluation.task_results import Answered, LoadedModel, TaskResult, run_task
from minigpt.evaluation.task_shapes import Example

__all__ = ["Calibration", "Positions", "Profile", "calibrate", "fit_temperature", "profile"]

_BINS = 10


@dataclass(frozen=True)
class Calibration:
    """How well the probabilities of a model's answers agree with the share of right answers."""

    error: float  # expected calibration error
    low: float  # lower end of the error's 95 % interval
    high: float
    # The logits are divided by this temperature. It gives the lowest loss on the questions that `fitted_on`
    # names. These questions are used only to find the temperature. The numbers in this class are about
    # other questions.
    temperature: float
    error_after: float  # expected calibration error of the measured questions with this temperature
    bins: list[tuple[float, float, int]]  # (mean probability, share of right answers, number of questions)
    fitted_on: str
    count: int

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers for JSON."""
        return {**self.__dict__, "bins": [list(one) for one in self.bins]}


@dataclass(frozen=True)
class Positions:
    """How much the model's choice depends on the order in which the choices are listed."""

    chosen: dict[str, float]  # letter -> share of answers that choose this letter
    right: dict[str, float]  # letter -> accuracy on questions whose right answer has this letter
    consistent: float  # share of questions with the same choice in every order
    spread: float  # highest minus lowest value of `right`

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers for JSON."""
        return dict(self.__dict__)


@dataclass(frozen=True)
class Profile:
    """Measurements on one task. What was not measured is None (`robustness`: empty)."""

    calibration: Calibration | None = None
    # Kind of change -> score with changed questions minus score with unchanged questions.
    robustness: dict[str, Difference] = field(default_factory=dict)
    positions: Positions | None = None
    contamination: Contamination | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers for JSON."""
        kinds = {
            name: {"difference": d.value, "low": d.low, "high": d.high, "p": d.p, "count": d.count}
            for name, d in self.robustness.items()
        }
        found = {name: getattr(self, name) for name in ("calibration", "positions", "contamination")}
        return {**{k: v.as_dict() for k, v in found.items() if v is not None}, "robustness": kinds}


def profile(
    loaded: LoadedModel,
    result: TaskResult,
    options: TaskOptions,
    training: Sequence[Path] = (),
    encoding: str = "",
) -> Profile:
    """Measure calibration, robustness, positions and contamination of a model on one task.

    For a plain text without questions, only the contamination is measured.

    Args:
        result: what `run_task` returned for this model and this task.
        training: files of training data, which are searched for the task's questions.
        encoding: encoding of these files; "": detect it.
    """
    task = result.task
    found = contamination(task.examples, training, encoding=encoding) if training else None
    if task.form == "perplexity":
        return Profile(contamination=found)
    return Profile(
        calibrate(loaded, result, options),
        robustness(loaded, result, options),
        positions(loaded, result, options),
        found,
    )


# -- calibration -------------------------------------------------------------------------------------------


def _logits_of(answered: Sequence[Answered]) -> tuple[Values, npt.NDArray[np.int64]]:
    """Return the log-probabilities of the choices (N, K), and the index of the right choice (N,).

    K is the largest number of choices. A question with n < K choices has -inf in the last K - n columns.
    """
    most = max(len(one.probabilities) for one in answered)
    rows = np.full((len(answered), most), -np.inf)
    for row, one in zip(rows, answered):
        row[: len(one.probabilities)] = np.log(np.maximum(one.probabilities, 1e-30))
    return rows, np.array([one.example.answer for one in answered])


def _softened(rows: Values, temperature: float) -> Values:
    weights = np.exp((rows - rows.max(1, keepdims=True)) / temperature)
    softened: Values = weights / weights.sum(1, keepdims=True)
    return softened


def fit_temperature(rows: Values, truth: npt.NDArray[np.int64]) -> float:
    """Return the temperature from 0.05 to 20 with the lowest loss of softmax(rows / temperature).

    As a function of 1 / temperature, the loss has only one minimum. A search narrows an interval
    around this minimum.

    Args:
        rows: (N, K), logits of N questions with K choices.
        truth: (N,), index of the right choice of each question.
    """

    def loss(logarithm: float) -> float:
        found = _softened(rows, float(np.exp(logarithm)))[np.arange(len(rows)), truth]
        return -float(np.log(np.maximum(found, 1e-300)).sum())

    low, high = np.log(0.05), np.log(20.0)
    for _ in range(40):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if loss(a) <= loss(b) else (a, high)
    return float(np.exp((low + high) / 2))


def calibrate(loaded: LoadedModel, result: TaskResult, options: TaskOptions) -> Calibration | None:
    """Return the calibration; None for a task without choices, or with fewer than four answers."""
    answered = result.answered
    if not all(one.probabilities for one in answered) or len(answered) < 4:
        return None
    dev = {subject: some for subject, some in result.task.dev.items() if some}
    fitting: Sequence[Answered]
    if dev and not result.task.is_own_dev and sum(map(len, dev.values())) >= 20:
        examples = [replace(one, subject=subject) for subject, some in dev.items() for one in some]
        others = replace(result.task, examples=examples[:1000], is_own_dev=False)
        fitting, where = (
            run_task(loaded, others, replace(options, shots=0, limit=0)).answered,
            "dev part, without shots",
        )
    else:
        fitting, answered, where = answered[::2], answered[1::2], "every second question"
    temperature = fit_temperature(*_logits_of(fitting))
    rows, truth = _logits_of(answered)
    before, after = _softened(rows, 1.0), _softened(rows, temperature)
    confidence, right = before.max(1), before.argmax(1) == truth
    generator = np.random.default_rng(0)
    drawn = [generator.integers(0, len(right), len(right)) for _ in range(500)]
    errors = [_error(confidence[i], right[i]) for i in drawn]
    low, high = np.quantile(errors, [0.025, 0.975])
    place = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    bins = [
        (float(confidence[place == i].mean()), float(right[place == i].mean()), int((place == i).sum()))
        for i in range(_BINS)
        if (place == i).any()
    ]
    return Calibration(
        _error(confidence, right), float(low), float(high), temperature, _error(after.max(1), right),
        bins, where, len(right),
    )  # fmt: skip


def _error(confidence: Values, right: npt.NDArray[np.bool_]) -> float:
    """Return the expected calibration error.

    Args:
        confidence: (N,), probability of the choice that the model makes.
        right: (N,), True if this choice is right.
    """
    pairs = np.stack([confidence, 1 - confidence], axis=1)  # (N, 2)
    # Column 0 is the model's choice. But `calibration_error` takes the larger of the two columns as the
    # choice. If a confidence is below 0.5, column 1 is larger. Then column 1 gets the value of column 0. (If
    # both columns are equal, column 0 counts as the choice.)
    pairs[:, 1] = np.minimum(pairs[:, 1], pairs[:, 0])
    return calibration_error(pairs, np.where(right, 0, 1), _BINS)


# -- robustness --------------------------------------------------------------------------------------------


def robustness(loaded: LoadedModel, result: TaskResult, options: TaskOptions) -> dict[str, Difference]:
    """Return a dict: kind of change -> score with changed questions minus score with unchanged questions.

    A kind that changes fewer than two questions is left out.
    """
    values = next(iter(result.metrics.values())).values
    found = {}
    for name, change in PERTURBATIONS.items():
        changed: list[Example] = []
        places: list[int] = []
        for place, one in enumerate(result.task.examples):
            seed = zlib.crc32(f"{name} {one.line} {one.question}".encode("utf-8", "surrogatepass"))
            text = change(one.question, random.Random(seed))
            if text != one.question and text.strip():
                changed.append(one.asking(text))
                places.append(place)
        if len(changed) >= 2:
            task = replace(result.task, examples=changed)
            again = run_task(loaded, task, replace(options, limit=0))
            found[name] = paired(values[places], next(iter(again.metrics.values())).values)
    texts = wordings(result.task.form, [one.question for one in result.task.examples])
    if texts and not (options.instruction or result.task.style.instruction) and len(values) >= 2:
        asked = (replace(options, limit=0, instruction=text) for text in texts)
        first, *others = (
            next(iter(run_task(loaded, result.task, one).metrics.values())).values for one in asked
        )
        found["reworded instruction"] = paired(first, np.mean(others, axis=0))
    return found


# -- position ----------------------------------------------------------------------------------------------


def positions(loaded: LoadedModel, result: TaskResult, options: TaskOptions) -> Positions | None:
    """Measure the influence of the order of the choices.

    Returns None in two cases. First, the template of a prompt fixes the order. Second, a prompt does not
    list its choices: each choice is scored as a text of its own, so there is no order.
    """
    examples = result.task.examples
    if not all(one.letters and one.can_be_reordered for one in examples):
        return None
    n = min(len(one.choices) for one in examples)
    chosen = dict.fromkeys(examples[0].letters[:n], 0)
    hits: dict[str, list[bool]] = {letter: [] for letter in chosen}
    given: list[set[str]] = [set() for _ in examples]
    for shift in range(n):
        if shift == 0:
            answered = result.answered
        else:
            turned = [
                one.reordered([(i + shift) % len(one.choices) for i in range(len(one.choices))])
                for one in examples
            ]
            task = replace(result.task, examples=turned)
            answered = run_task(loaded, task, replace(options, limit=0)).answered
        for place, one in enumerate(answered):
            letters = one.example.letters
            said = letters[int(np.argmax(one.logprobs))]
            chosen[said] = chosen.get(said, 0) + 1
            hits.setdefault(letters[one.example.answer], []).append(one.right)
            given[place].add(one.given)
    total = sum(chosen.values())
    right = {letter: sum(some) / len(some) for letter, some in hits.items() if some}
    return Positions(
        {letter: count / total for letter, count in chosen.items()},
        right,
        sum(len(some) == 1 for some in given) / len(given),
        max(right.values()) - min(right.values()),
    )
