"""Compare two models on the same questions: which is better, and is it chance?

    minigpt compare output/best output/tuned --task val.jsonl
    minigpt compare A B --task cmmlu/ arc.jsonl --shots 5 --show 5

The models are compared question by question. A question that both models get right, or both get wrong, does
not show which model is better. McNemar's exact test counts only the other questions. The confidence interval
of the difference is found by the bootstrap. If the difference is not significant, the command says so in
words.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minigpt.console import command_line
from minigpt.console import language as languages
from minigpt.console.flags import POSITIONAL
from minigpt.errors import InputError
from minigpt.evaluation.options import TaskOptions
from minigpt.generation.loading import require_model

if TYPE_CHECKING:
    from minigpt.evaluation.comparison import Comparison
    from minigpt.evaluation.words import Say


@dataclass(frozen=True, kw_only=True)
class Options(TaskOptions, command_line.MachineOptions):
    """Compare two models on the same questions: difference, interval, exact test."""

    RANGES = {"show": (0, 10**6), "batch_size": (1, 10**6)}

    # Models
    first: Path = field(metadata=POSITIONAL)
    """checkpoint folder"""
    second: Path = field(metadata=POSITIONAL)
    """checkpoint folder that is compared with it"""
    precision: Literal["float32", "float16", "bfloat16", "int8", "int4"] | None = None
    """precision of the weights of both"""
    second_precision: Literal["float32", "float16", "bfloat16", "int8", "int4"] | None = None
    """precision of the second model's weights, to compare a model with itself in fewer bits"""

    task: tuple[Path, ...] = ()
    """what to compare on: files, folders with dev and test, or TOML files"""
    metric: str = ""
    """what is compared; left out: the first metric of the task"""
    batch_size: int = 64
    """answers that are generated at once"""
    encoding: str = ""
    """encoding of the tasks' files, such as gb18030; left out: found out"""
    strict: bool = False
    """stop at the first bad record instead of skipping it"""
    show: int = 3
    """questions to print that one model gets right and the other wrong, of each kind"""


def main(options: Options) -> dict[str, Any]:
    """Measure both models on the tasks, and print the differences."""
    for path in (options.first, options.second):
        require_model(path, has_flag=False)
    if not options.task:
        raise InputError("nothing to compare on: give --task FILE, a file of questions or a folder")
    import torch

    from minigpt.evaluation.comparison import compare_results
    from minigpt.evaluation.task_command import load, show_table, tasks_of, warn_of_unknown_characters
    from minigpt.evaluation.task_results import metric_names, run_task
    from minigpt.evaluation.words import speaker

    say = speaker(languages.language())
    if options.threads:
        torch.set_num_threads(options.threads)
    tasks = tasks_of(options.task, options, options.strict, options.encoding)
    for task in tasks:
        if options.metric and options.metric not in metric_names(task):
            known = ", ".join(metric_names(task))
            raise InputError(f"--metric {options.metric} does not fit {task.name}: it has {known}")
    measured = []
    for path, precision in (
        (options.first, options.precision),
        (options.second, options.second_precision or options.precision),
    ):
        loaded = load(path, options.device, precision, batch_size=options.batch_size)
        measured.append([run_task(loaded, task, options) for task in tasks])
        for result in measured[-1]:
            warn_of_unknown_characters(result, loaded, options)
        del loaded  # frees the first model before the second is loaded: both may not fit into memory
    found = [compare_results(a, b, options.metric) for a, b in zip(*measured)]
    rows = [
        [
            one.name, one.metric, f"{one.first:.4f}", f"{one.second:.4f}",
            f"{one.difference.value:+.4f} ({_interval(one, say)})",
            f"{one.difference.p:.2g}", f"{one.difference.only_first:,} / {one.difference.only_second:,}",
            f"{one.difference.count:,}",
        ]
        for one in found
    ]  # fmt: skip
    before = [*map(say, ("task", "metric", "first", "second", "difference (95 %)"))]
    columns = [*before, "p", say("better only"), say("count")]
    show_table(say("two models on the same questions"), columns, rows, range(2, 8))
    a, b = _names(options, say)
    for one in found:
        print(one.in_words(a, b, say))
        _show(one, options.show, a, b, say)
    return {"tasks": {one.name: one.as_dict() for one in found}}


def _interval(one: "Comparison", say: "Say") -> str:
    d = one.difference
    return say("{low} to {high}", low=f"{d.low:+.4f}", high=f"{d.high:+.4f}")


def _names(options: Options, say: "Say") -> tuple[str, str]:
    a, b = str(options.first), str(options.second)
    return (say("the first"), say("the second")) if a == b else (a, b)


def _show(one: "Comparison", count: int, a: str, b: str, say: "Say") -> None:
    from minigpt.evaluation.task_command import show_table

    columns = [*map(say, ("line", "question", "right", "first", "second"))]
    for name, pairs in ((a, one.only_first), (b, one.only_second)):
        if pairs[:count]:
            rows = [
                [left.example.line, _short(left.example.question), _right(left), _short(left.given, 30),
                 _short(right.given, 30)]
                for left, right in pairs[:count]
            ]  # fmt: skip
            show_table(say("only {model} is better", model=name), columns, rows)


def _right(one: Any) -> str:
    example = one.example
    return _short(
        example.choices[example.answer] if example.choices else (example.references or ("",))[0], 30
    )


def _short(text: str, limit: int = 60) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= limit else f"{plain[: limit - 1]}…"


if __name__ == "__main__":
    command_line.run(Options, main)
