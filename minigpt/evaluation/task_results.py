"""Measures a model on tasks: every number with its interval. `minigpt eval --task` calls this.

    loaded = LoadedModel(model, tokenizer)
    result = run_task(loaded, task, TaskOptions(shots=5))
    result.metrics["acc"].value, result.metrics["acc"].low, result.metrics["acc"].high

Metrics for each form of a task:

- multiple_choice: acc, where the choice with the highest log-likelihood is the model's answer; acc_norm,
  acc_bytes and acc_tokens, where the log-likelihood is divided by the choice's characters, bytes or tokens.
- cloze: acc, where an answer is right if each of its tokens is the most likely one; perplexity, of the whole
  answer, not per token.
- generation: the scores of text_metrics.py. The model always takes the most likely token.
- perplexity: bits_per_byte, byte_perplexity, word_perplexity.
- classification: acc and macro_f1. For a language model, each label is a choice, as in multiple_choice.
"""

import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from minigpt.console.terminal import ProgressLine
from minigpt.data.labelled import LabelledText
from minigpt.data.text_encoding import HALF_CHARACTER
from minigpt.errors import InputError
from minigpt.evaluation.classification import predict
from minigpt.evaluation.intervals import Values, bootstrap
from minigpt.evaluation.options import TaskOptions
from minigpt.evaluation.prompts import Prompter, Request, choose_shots
from minigpt.evaluation.scoring import ContinuationScorer, Scored
from minigpt.evaluation.task_shapes import Example, Form
from minigpt.evaluation.tasks import Task
from minigpt.evaluation.text_metrics import TEXT_METRICS, check_metric, corpus_score
from minigpt.evaluation.words import Say, speaker
from minigpt.families.registry import LanguageModel
from minigpt.finetuning.classification import SequenceClassifier
from minigpt.generation.api import ends_of_answer
from minigpt.generation.engine import Engine
from minigpt.generation.generation_config import prompt_format, recommended_options, start_token
from minigpt.generation.options import GenerationOptions
from minigpt.generation.sequence import cut
from minigpt.tokenizer import Tokenizer
from minigpt.weights.pretrained import AnyTokenizer

__all__ = [
    "Answered",
    "LoadedModel",
    "Metric",
    "TaskResult",
    "macro_f1",
    "metric_names",
    "rolling_windows",
    "run_task",
]

_PREFIX_MIB = 256.0  # memory in MiB for the cached keys and values of prefixes that prompts share
_NEW_TOKENS = 256  # largest number of tokens of an answer, if neither the user nor the task says it


@dataclass(frozen=True)
class Metric:
    """One number with its 95 % interval."""

    value: float
    low: float
    high: float
    values: Values = field(repr=False, compare=False)  # one value per question, to compare two models
    higher_is_better: bool = True

    def shown(self, say: Say = speaker()) -> str:  # noqa: B008
        """Return the number with its interval.

        >>> Metric(0.4512, 0.4, 0.5, np.zeros(1)).shown()
        '0.4512 (0.4000 to 0.5000)'
        """
        digits = 2 if abs(self.value) >= 10 else 4
        text = f"{self.value:.{digits}f}"
        if math.isfinite(self.low) and math.isfinite(self.high):
            ends = say("{low} to {high}", low=f"{self.low:.{digits}f}", high=f"{self.high:.{digits}f}")
            text += f" ({ends})"
        return text

    def as_dict(self) -> dict[str, float | None]:
        """Return the number and its interval for JSON."""
        shown = {"value": self.value, "low": self.low, "high": self.high}
        return {name: value if math.isfinite(value) else None for name, value in shown.items()}


@dataclass(frozen=True)
class Answered:
    """The model's answer to one example."""

    example: Example
    right: bool
    given: str  # the chosen or generated text; "" if a text was only scored
    logprobs: tuple[float, ...] = ()  # one for each choice; cloze: for each token; perplexity: for the text
    # One value for each choice, or one for the answer of a cloze: True if greedy decoding gives this text.
    greedy: tuple[bool, ...] = ()
    probabilities: tuple[float, ...] = ()  # probability of each choice
    n_tokens: tuple[int, ...] = ()  # number of tokens of each choice

    def lengths(self, unit: str) -> list[int]:
        """Return the lengths of the scored choices, in "characters", "bytes" or "tokens"."""
        if unit == "tokens":
            return [*self.n_tokens]
        texts = self.example.scored
        return [
            len(text if unit == "characters" else text.encode("utf-8", "surrogatepass")) for text in texts
        ]


@dataclass(frozen=True)
class TaskResult:
    """The result of a model on a task."""

    task: Task
    shots: int
    metrics: dict[str, Metric]
    answered: list[Answered] = field(repr=False)
    n_cut: int = 0  # number of prompts whose beginning was left out, because they were too long
    n_in_pieces: int = 0  # number of choices that are too long for the model and were scored in pieces
    tokens: int = 0  # number of tokens of all prompts
    tokens_read: int = 0  # number of tokens computed; less than `tokens` if prompts share prefixes
    tokens_written: int = 0
    seconds: float = 0.0
    peak_mib: float = 0.0  # highest memory use, in MiB
    subjects: dict[str, tuple[float, int]] = field(default_factory=dict)  # subject -> (main metric, count)

    @property
    def main(self) -> str:
        """The name of the main metric, which is the first metric."""
        return next(iter(self.metrics))

    @property
    def guessing(self) -> str:
        """The accuracy of random guessing, as text; "" for a task without choices."""
        choices = [len(one.example.choices) for one in self.answered]
        return f"{sum(1 / n for n in choices) / len(choices):.3f}" if all(choices) else ""

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers as a dict that JSON can hold."""
        found: dict[str, Any] = {
            "form": self.task.form,
            "count": len(self.answered),
            "shots": self.shots,
            "skipped": self.task.skipped,
            "cut": self.n_cut,
            "in_pieces": self.n_in_pieces,
            "metrics": {name: metric.as_dict() for name, metric in self.metrics.items()},
            "efficiency": {
                "seconds": round(self.seconds, 3),
                "tokens": self.tokens,
                "tokens_read": self.tokens_read,
                "tokens_written": self.tokens_written,
                "peak_mib": round(self.peak_mib, 1) if math.isfinite(self.peak_mib) else None,
            },
        }
        if len(self.subjects) > 1:
            found["subjects"] = {k: {"acc": v, "count": n} for k, (v, n) in self.subjects.items()}
        return found


@dataclass(frozen=True)
class LoadedModel:
    """A model to measure: a language model or a classifier."""

    model: "LanguageModel | SequenceClassifier"
    tokenizer: AnyTokenizer
    folder: Path | None = None
    batch_size: int = 8  # number of answers that are generated in one batch
    max_new_tokens: int | None = None  # largest number of tokens of an answer; None: as the task says
    adapter: Path | None = None  # folder of the model's adapter, if it has one

    @property
    def start(self) -> int | None:
        """The id of the token put before a text without context; None if the tokenizer has no such token."""
        if self.folder is not None:
            return start_token(self.folder, self.tokenizer)
        names = ("bos_token_id", "eos_token_id")
        return next((one for name in names if (one := getattr(self.tokenizer, name, None)) is not None), None)

    @property
    def ends(self) -> list[int]:
        """The ids of the tokens that end an answer, from the model's folder or else from the tokenizer."""
        named = recommended_options(self.folder).get("eos_token_id") if self.folder is not None else None
        return list(named or ends_of_answer(self.tokenizer))

    def prompter(self, options: TaskOptions) -> Prompter:
        """Return a Prompter for this model. Raises InputError if the format does not fit the model."""
        form = options.prompt_format
        # A model with a character tokenizer was trained by minigpt, usually with prompts "question <sep>".
        if form is None and isinstance(self.tokenizer, Tokenizer):
            form = "question"
            if self.folder is not None:
                form = prompt_format(self.folder, self.tokenizer, self.adapter)
        return Prompter(self.tokenizer, form or "text", self.start)


def run_task(loaded: LoadedModel, task: Task, options: TaskOptions | None = None) -> TaskResult:
    """Measure a model on a task.

    Raises:
        InputError: if the task does not fit the model, for example if a classifier does not have the task's
            labels; if there is no dev part for shots; if a metric needs a package that is not installed.
    """
    options = options or TaskOptions()
    task = task.limited(options.limit)
    metric_names(task)  # raises an error for an unknown metric now, before the long work
    if HALF_CHARACTER.search(options.instruction):
        raise InputError("--instruction holds half a character (a lone surrogate), which no file can hold")
    began = time.perf_counter()
    counts: dict[str, int] = {}
    if isinstance(loaded.model, SequenceClassifier):
        answered = _classify(loaded.model, loaded.tokenizer, task)
    else:
        shots = choose_shots(task, options)
        prompter = loaded.prompter(options)
        if task.form == "perplexity":
            return _measure_text(loaded, task, options, began)
        before = [_shots_of(one, shots, options.shots, task.is_own_dev) for one in task.examples]
        instruction = options.instruction
        if task.form == "generation":
            prompts = [prompter.prompt(one, some, instruction) for one, some in zip(task.examples, before)]
            answered, counts = _generate(loaded, prompter, task, prompts)
        else:
            requests = [prompter.requests(one, some, instruction) for one, some in zip(task.examples, before)]
            answered, counts = _score(loaded.model, task, requests)
    metrics = _metrics(task, answered)
    return TaskResult(
        task, options.shots, metrics, answered, seconds=time.perf_counter() - began, peak_mib=_peak_mib(),
        subjects=_by_subject(answered, metrics), **counts,
    )  # fmt: skip


def _shots_of(one: Example, shots: dict[str, list[Example]], count: int, is_own: bool) -> list[Example]:
    """Return `count` shots for the question `one`.

    is_own: True if the shots come from the measured file itself. Then `one` is never its own shot.
    """
    found = [shot for shot in shots.get(one.subject, []) if not (is_own and shot.line == one.line)]
    return found[:count]


def _peak_mib() -> float:
    """Return the highest memory use so far, of the GPU or of this process, in MiB; nan if unknown."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource  # does not exist on Windows
    except ImportError:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB; on macOS in bytes
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# -- scoring -----------------------------------------------------------------------------------------------


def _score(
    model: LanguageModel, task: Task, requests: Sequence[Sequence[Request]]
) -> tuple[list[Answered], dict[str, int]]:
    scorer = ContinuationScorer(model)
    flat = [request for some in requests for request in some]
    with ProgressLine(f"{task.name}, scoring", len(flat), patience=2.0) as progress:
        scored = iter(scorer.score(flat, progress.update))
    answered, n_cut, n_in_pieces = [], 0, 0
    for one, some in zip(task.examples, requests):
        own = [next(scored) for _ in some]
        n_cut += any(each.n_cut for each in own)
        n_in_pieces += sum(each.pieces > 1 for each in own)
        answered.append(_answered(one, own))
    counts = {
        "n_cut": n_cut, "n_in_pieces": n_in_pieces, "tokens": scorer.tokens_asked,
        "tokens_read": scorer.tokens_read,
    }  # fmt: skip
    return answered, counts


def _answered(one: Example, scored: Sequence[Scored]) -> Answered:
    totals = np.array([each.total for each in scored])
    if one.form == "cloze":
        given = one.references[0] if scored[0].is_greedy else ""
        return Answered(one, scored[0].is_greedy, given, tuple(scored[0].logprobs), (scored[0].is_greedy,))
    best = int(totals.argmax())
    weights = np.exp(totals - totals.max())
    return Answered(
        one, best == one.answer, one.choices[best], tuple(totals.tolist()),
        tuple(each.is_greedy for each in scored), tuple((weights / weights.sum()).tolist()),
        tuple(len(each.logprobs) for each in scored),
    )  # fmt: skip


# -- generation --------------------------------------------------------------------------------------------


def _generate(
    loaded: LoadedModel, prompter: Prompter, task: Task, prompts: list[list[int]]
) -> tuple[list[Answered], dict[str, int]]:
    model = loaded.model
    assert not isinstance(model, SequenceClassifier), "run_task"
    context = model.config.max_position_embeddings
    style = task.style
    wanted = min(loaded.max_new_tokens or style.max_new_tokens or _NEW_TOKENS, max(1, context // 2))
    kept = context - wanted
    n_cut = sum(len(ids) > kept for ids in prompts)
    prompts = [ids[-kept:] for ids in prompts]
    stops = prompter.stops(task.examples[0])
    options = GenerationOptions(max_new_tokens=wanted, stop_strings=stops)
    given, counts = generate_texts(loaded, prompts, options, task.name)
    answered = []
    for one, text in zip(task.examples, given):
        main = TEXT_METRICS.get(one.style.metrics[0], TEXT_METRICS["exact_match"])
        answered.append(Answered(one, main(text, one.references) == 1, text))
    return answered, {**counts, "n_cut": n_cut}


def generate_texts(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], options: GenerationOptions, name: str = ""
) -> tuple[list[str], dict[str, int]]:
    """Continue prompts, as `options` say. A prefix that all prompts share is computed once.

    Returns: the new texts, without stop strings; and a dict that counts tokens: its keys are fields of
    TaskResult (tokens, tokens_read, tokens_written).
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    assert not isinstance(model, SequenceClassifier), "run_task"
    rows = min(loaded.batch_size, len(prompts))
    longest = max(map(len, prompts)) + options.wanted
    engine = Engine(
        model, max_rows=rows, max_length=min(longest, model.config.max_position_embeddings),
        max_waiting=len(prompts), prefix_mib=_PREFIX_MIB,
    )  # fmt: skip
    ends = loaded.ends
    special = {*ends, *ends_of_answer(tokenizer), *getattr(tokenizer, "special_ids", ())}
    order = sorted(range(len(prompts)), key=lambda i: list(prompts[i]))
    shared = _shared(prompts[order[0]], prompts[order[-1]])
    # If the shared prefix is long, run it alone first, which puts it into the cache. Without this step, each
    # prompt of the first batch would compute the prefix.
    if shared > 64:
        first = GenerationOptions(max_new_tokens=1)
        engine.submit(prompts[0][: min(shared + 1, len(prompts[0]))], first, ends, tokenizer)
        engine.run()
    handles = {i: engine.submit(prompts[i], options, ends, tokenizer) for i in order}
    with ProgressLine(f"{name}, answering", len(prompts), patience=2.0) as progress:
        while engine.step():
            progress.update(engine.statistics.finished)
    texts = []
    for i in range(len(prompts)):
        ids = [one for one in handles[i].result().ids if one not in special]
        texts.append(cut(tokenizer.decode(ids), options.stops))
    statistics = engine.statistics
    return texts, {
        "tokens": sum(map(len, prompts)),
        "tokens_read": statistics.tokens_read,
        "tokens_written": statistics.tokens_written,
    }


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


# -- texts -------------------------------------------------------------------------------------------------


def rolling_windows(ids: Sequence[int], start: int, length: int, stride: int = 0) -> list[Request]:
    """Divide a text into pairs (context, continuation), so that each token is predicted once.

    Args:
        start: the id of the token put before the text.
        length: largest number of input tokens of a pair. (The last token of a pair is not an input.)
        stride: number of predicted tokens in each pair except the first; 0: as many as possible. The context
            of a pair is the tokens before them, as many as `length` leaves room for.

    >>> rolling_windows([1, 2, 3, 4, 5], 0, 3)
    [([0], [1, 2, 3]), ([2, 3], [4, 5])]
    >>> rolling_windows([1, 2, 3, 4, 5], 0, 3, 1)
    [([0], [1, 2, 3]), ([1, 2, 3], [4]), ([2, 3, 4], [5])]
    """
    text = [start, *ids]
    windows, end = [], min(length, len(ids))
    if ids:
        windows.append((text[:1], text[1 : end + 1]))
    while end < len(ids):
        new = min(len(ids) - end, stride or length)
        end += new
        windows.append(
            (text[end - length if end > length else 0 : end - new + 1], text[end - new + 1 : end + 1])
        )
    return [(context, continuation) for context, continuation in windows]


def _measure_text(loaded: LoadedModel, task: Task, options: TaskOptions, began: float) -> TaskResult:
    model, tokenizer = loaded.model, loaded.tokenizer
    assert not isinstance(model, SequenceClassifier), "run_task"
    if loaded.start is None:
        raise InputError("a text needs a model with a BOS or EOS token, which predicts its first token")
    length = model.config.max_position_embeddings
    if options.stride > length:
        raise InputError(f"--stride {options.stride} is more than the {length} tokens that the model reads")
    scorer, requests, owners = ContinuationScorer(model), list[Request](), list[int]()
    for number, one in enumerate(task.examples):
        ids = [*getattr(tokenizer, "before_text", ()), *bare_text(tokenizer, one.references[0])]
        windows = rolling_windows(ids, loaded.start, length, options.stride)
        requests += windows
        owners += [number] * len(windows)
    with ProgressLine(f"{task.name}, windows", len(requests), patience=2.0) as progress:
        scored = scorer.score(requests, progress.update)
    totals = np.zeros(len(task.examples))
    np.add.at(totals, owners, [one.total for one in scored])
    texts = [one.references[0] for one in task.examples]
    n_bytes = np.array([len(text.encode("utf-8", "surrogatepass")) for text in texts], dtype=np.float64)
    n_words = np.array([len(re.split(r"\s+", text)) for text in texts], dtype=np.float64)
    bits = -totals / math.log(2)
    metrics = {
        "bits_per_byte": _ratio(bits, n_bytes, lambda value: value),
        "byte_perplexity": _ratio(-totals, n_bytes, np.exp),
        "word_perplexity": _ratio(-totals, n_words, np.exp),
    }
    answered = [Answered(one, False, "", (float(total),)) for one, total in zip(task.examples, totals)]
    return TaskResult(
        task, 0, metrics, answered, tokens=scorer.tokens_asked, tokens_read=scorer.tokens_read,
        seconds=time.perf_counter() - began, peak_mib=_peak_mib(),
    )  # fmt: skip


def bare_text(tokenizer: AnyTokenizer, text: str) -> list[int]:
    """Return the ids of a text, without tokens such as BOS that the tokenizer adds."""
    return [int(one) for one in tokenizer.encode_array(text)]


def _ratio(values: Values, weights: Values, transform: Callable[[Values], Values]) -> Metric:
    with np.errstate(over="ignore"):  # no warning if a perplexity is too large for a float and becomes inf
        value = float(transform(np.array(values.sum() / weights.sum())))
        low, high = (
            bootstrap(values, weights, transform=transform) if len(values) > 1 else (-math.inf, math.inf)
        )
    return Metric(value, low, high, values / np.maximum(weights, 1), higher_is_better=False)


# -- classifiers -------------------------------------------------------------------------------------------


def _classify(model: SequenceClassifier, tokenizer: AnyTokenizer, task: Task) -> list[Answered]:
    from minigpt.weights.classifiers import encode_texts

    if task.form != "classification":
        raise InputError(f"{task.name} is of the form {task.form}: a classifier labels texts only")
    if model.labels.problem_type != "single_label_classification":
        raise InputError(
            f"the classifier is of the kind {model.labels.problem_type}: measure it with minigpt classify"
        )
    names = list(model.labels.names)
    if unknown := sorted({one.choices[one.answer] for one in task.examples} - set(names)):
        raise InputError(
            f"{task.name} has labels that the classifier does not know: {', '.join(unknown[:5])}; it knows "
            f"{', '.join(names[:10])}"
        )
    texts = [LabelledText(one.prompt, (one.choices[one.answer],), one.line) for one in task.examples]
    encoded = encode_texts(texts, tokenizer, model.labels, model.config.max_position_embeddings, task.name)
    with ProgressLine(f"{task.name}, texts", len(texts), patience=2.0) as progress:
        found = predict(model, encoded, on_progress=progress.update)
    answered = []
    for one, row in zip(task.examples, found):
        best = names[int(row.argmax())]
        place = [row[names.index(choice)] if choice in names else 0.0 for choice in one.choices]
        answered.append(
            Answered(one, best == one.choices[one.answer], best, (), (), tuple(map(float, place)))
        )
    return answered


# -- metrics -----------------------------------------------------------------------------------------------


_METRICS: dict[Form, tuple[str, ...]] = {
    "multiple_choice": ("acc", "acc_norm", "acc_bytes", "acc_tokens"),
    "classification": ("acc", "macro_f1", "acc_norm", "acc_bytes", "acc_tokens"),
    "cloze": ("acc", "perplexity"),
    "perplexity": ("bits_per_byte", "byte_perplexity", "word_perplexity"),
}


def metric_names(task: Task) -> tuple[str, ...]:
    """Return the names of a task's metrics.

    Raises:
        InputError: if a metric of the task is unknown, or does not fit the task's form.
    """
    asked = task.style.metrics
    if task.form == "generation":
        for name in asked:
            try:
                check_metric(name)
            except InputError as error:
                raise InputError(f"{task.name}: {error}") from None
        return asked
    if asked:
        raise InputError(
            f"{task.name}: metrics = {', '.join(asked)} are for generated texts; a task of the form "
            f"{task.form} gives {', '.join(_METRICS[task.form])}"
        )
    return _METRICS[task.form]


def _mean(values: Sequence[float] | Values) -> Metric:
    array = np.asarray(values, dtype=np.float64)
    low, high = bootstrap(array)
    return Metric(float(array.mean()), low, high, array)


def _metrics(task: Task, answered: Sequence[Answered]) -> dict[str, Metric]:
    if task.form == "cloze":
        totals = np.array([sum(one.logprobs) for one in answered])
        return {
            "acc": _mean([one.right for one in answered]),
            "perplexity": _ratio(-totals, np.ones_like(totals), np.exp),
        }
    if task.form == "generation":
        return _text_metrics(task, answered)
    found = {"acc": _mean([one.right for one in answered])}
    if task.form == "classification":
        found["macro_f1"] = _of_labels(answered)
    if all(one.logprobs for one in answered):
        for name in ("characters", "bytes", "tokens"):
            right = []
            for one in answered:
                lengths = np.array(one.lengths(name), dtype=np.float64)
                right.append(int((np.array(one.logprobs) / lengths).argmax()) == one.example.answer)
            found["acc_norm" if name == "characters" else f"acc_{name}"] = _mean(right)
    return found


def macro_f1(truth: npt.NDArray[np.int64], given: npt.NDArray[np.int64]) -> float:
    """Return the mean F1 over all labels that occur in `truth` or `given`.

    truth, given: (N,), for each text the index of the right label, and of the predicted label.

    >>> round(macro_f1(np.array([0, 0, 1]), np.array([0, 1, 1])), 4)
    0.6667
    """
    size = 1 + int(max(truth.max(), given.max()))
    true, said = (np.bincount(some, minlength=size) for some in (truth, given))
    hits = np.bincount(truth[truth == given], minlength=size)
    return float(np.mean((2 * hits / np.maximum(true + said, 1))[true + said > 0]))


def _of_labels(answered: Sequence[Answered]) -> Metric:
    """Return macro F1 with its bootstrap interval."""
    right = [one.example.choices[one.example.answer] for one in answered]
    places = {label: i for i, label in enumerate(sorted({*right, *(one.given for one in answered)}))}
    truth = np.array([places[label] for label in right])
    given = np.array([places[one.given] for one in answered])
    generator, n = np.random.default_rng(0), len(answered)
    rows = [generator.integers(0, n, n) for _ in range(1000)]
    low, high = np.quantile([macro_f1(truth[some], given[some]) for some in rows], [0.025, 0.975])
    values = np.array([float(one.right) for one in answered])
    return Metric(macro_f1(truth, given), float(low), float(high), values)


def _text_metrics(task: Task, answered: Sequence[Answered]) -> dict[str, Metric]:
    found: dict[str, Metric] = {}
    given, right = [one.given for one in answered], [one.example.references for one in answered]
    for name in task.style.metrics:
        if name in TEXT_METRICS:
            found[name] = _mean([TEXT_METRICS[name](text, refs) for text, refs in zip(given, right)])
        else:
            score = corpus_score(name, given, right)
            each = np.array([TEXT_METRICS["character_f1"](t, r) for t, r in zip(given, right)])
            found[name] = Metric(
                score["value"], score.get("low", math.nan), score.get("high", math.nan), each
            )
    return found


def _by_subject(answered: Sequence[Answered], metrics: dict[str, Metric]) -> dict[str, tuple[float, int]]:
    values = next(iter(metrics.values())).values
    rows: dict[str, list[float]] = {}
    for one, value in zip(answered, values):
        rows.setdefault(one.example.subject, []).append(float(value))
    return {subject: (sum(some) / len(some), len(some)) for subject, some in sorted(rows.items())}
