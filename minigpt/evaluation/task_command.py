"""The functions behind `minigpt eval --task` and `minigpt compare`: load, measure, print."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.console.terminal import note, table_text, warn
from minigpt.devices import pick_device
from minigpt.errors import InputError
from minigpt.evaluation.api import warn_of_unknown
from minigpt.evaluation.options import TaskOptions
from minigpt.evaluation.task_results import LoadedModel, TaskResult, run_task
from minigpt.evaluation.task_shapes import Style
from minigpt.evaluation.tasks import Task, read_tasks
from minigpt.evaluation.words import Say, speaker
from minigpt.finetuning.classification import SequenceClassifier
from minigpt.finetuning.masked_lm import mask_token_id
from minigpt.generation.loading import adapter_note
from minigpt.weights.classifiers import classifier_labels, load_classifier
from minigpt.weights.pretrained import load_model_and_tokenizer, model_folder
from minigpt.weights.quantized import set_precision

if TYPE_CHECKING:
    from minigpt.evaluation.model_profile import Profile

__all__ = [
    "evaluate_task",
    "load",
    "measure",
    "print_results",
    "profiles_of",
    "show_table",
    "tasks_of",
    "warn_of_unknown_characters",
]

_ENGLISH = speaker()


def evaluate_task(
    model: Any, tokenizer: Any, task: str | Path | Task | Sequence[dict[str, Any]], **options: Any
) -> TaskResult:
    """Measure a model on one task.

    Args:
        model, tokenizer: the results of `minigpt.load_model` and `minigpt.load_tokenizer`.
        task: a file, a folder, a TOML file, or a list of records.
        options: fields of TaskOptions, such as shots=5.

    Raises:
        InputError: if `task` cannot be read, holds several tasks, or does not fit the model.
    """
    chosen = TaskOptions(**options)
    if isinstance(task, str | Path):
        task = _only(tasks_of([Path(task)], chosen))
    elif not isinstance(task, Task):
        from minigpt.evaluation.tasks import task_of_records

        task = task_of_records(task)
    return run_task(LoadedModel(model, tokenizer), task, chosen)


def _only(tasks: Sequence[Task]) -> Task:
    if len(tasks) > 1:
        raise InputError(
            f"one task is needed, these are {len(tasks)}: {', '.join(t.name for t in tasks[:5])}"
        )
    return tasks[0]


def tasks_of(
    paths: Sequence[Path], options: TaskOptions, strict: bool = False, encoding: str = ""
) -> list[Task]:
    """Read the tasks, and apply the options to them. Raises InputError for an option that has no effect."""
    style = Style(score=options.score or "")
    tasks = read_tasks(paths, dev=options.dev, style=style, strict=strict, encoding=encoding)
    forms = {task.form for task in tasks}
    lists = any(one.letters for task in tasks for one in task.examples)
    for flag, is_given, is_used, why in (
        ("--score letter", options.score == "letter", lists, "no task lists choices that have letters"),
        ("--score text", options.score == "text", "multiple_choice" in forms, "no task has choices"),
        ("--stride", options.stride, "perplexity" in forms, "no task is a text that is read in windows"),
        ("--instruction", options.instruction, forms != {"perplexity"}, "a text is read without a prompt"),
        ("--shots_seed", options.shots_seed is not None, options.shots, "it draws the --shots; give both"),
    ):
        if is_given and not is_used:
            raise InputError(f"{flag} has no effect: {why}")
    return tasks


def load(
    folder: Path, device: str, precision: Any = None, adapter: Path | None = None, batch_size: int = 64
) -> LoadedModel:
    """Load a language model or a classifier, whichever the folder holds."""
    where = pick_device(device)
    path = model_folder(folder)
    if adapter is None and classifier_labels(folder) is not None:
        if precision is not None:
            raise InputError("--precision is for language models: a classifier is measured as it is stored")
        classifier, tokenizer = load_classifier(folder, where)
        return LoadedModel(classifier, tokenizer, path)
    model, tokenizer = load_model_and_tokenizer(path, where, adapter=adapter)
    if adapter is not None:
        note(adapter_note(model, adapter))
    if mask_token_id(tokenizer) is not None:
        warn(f"{folder} was trained to fill gaps (minigpt fill); it cannot continue a text")
    return LoadedModel(set_precision(model, precision), tokenizer, path, batch_size, adapter=adapter)


def measure(
    loaded: LoadedModel, tasks: Sequence[Task], options: TaskOptions, say: Say = _ENGLISH
) -> dict[str, TaskResult]:
    """Measure a model on tasks, and print the results. Returns a dict: name of a task -> its result."""
    results = {task.name: run_task(loaded, task, options) for task in tasks}
    for result in results.values():
        warn_of_unknown_characters(result, loaded, options)
    print_results(list(results.values()), say)
    for result in results.values():
        if result.n_cut:
            warn(f"{result.task.name}: {result.n_cut:,} prompts are too long: their beginning was left out")
        if result.n_in_pieces:
            warn(
                f"{result.task.name}: {result.n_in_pieces:,} choices are longer than the model's context: "
                "they were scored in pieces"
            )
    return results


def warn_of_unknown_characters(result: TaskResult, loaded: LoadedModel, options: TaskOptions) -> None:
    """Warn about characters that the vocabulary lacks, and about choices that differ only in them."""
    examples, tokenizer = result.task.examples, loaded.tokenizer
    asked = [one.prompt for one in examples]
    if not isinstance(loaded.model, SequenceClassifier):
        prompter = loaded.prompter(options)
        asked = [prompter.asked(one) for one in examples]
    answers = ["".join((*one.scored, *one.references)) for one in examples]
    warn_of_unknown(tokenizer, [text + more for text, more in zip(asked, answers)])
    alike = 0
    for one in examples:
        unknown = set(tokenizer.unknown_characters("".join(one.scored)))
        if unknown and one.form == "multiple_choice":
            read = {"".join("\0" if c in unknown else c for c in choice) for choice in one.scored}
            alike += len(read) < len(one.scored)
    if alike:
        warn(
            f"{result.task.name}: in {alike:,} questions, choices read the same, because the model does not "
            "know their characters; --score text may help"
        )


def profiles_of(
    loaded: LoadedModel,
    results: Mapping[str, TaskResult],
    options: TaskOptions,
    helm: bool,
    training: Sequence[Path],
    say: Say = _ENGLISH,
    encoding: str = "",
) -> "dict[str, Profile]":
    """Measure and print a profile for each task. Return a dict: name of the task -> its profile.

    Args:
        helm: True: measure the whole profile (calibration, robustness, ...). False: only the contamination,
            which says how much of the task is in the training data.
        training: files of training data. Without them and without `helm`, the result is {}.
    """
    from minigpt.evaluation.contamination import contamination
    from minigpt.evaluation.model_profile import Profile, profile
    from minigpt.evaluation.report import profile_tables

    found: dict[str, Profile] = {}
    for name, result in results.items():
        if helm:
            found[name] = profile(loaded, result, options, training, encoding)
        elif training:
            examples = result.task.examples
            found[name] = Profile(contamination=contamination(examples, training, encoding=encoding))
        for title, (columns, rows) in profile_tables(found[name], say) if name in found else []:
            show_table(f"{name}. {title}", columns, rows, range(1, len(columns)))
    return found


def print_results(results: Sequence[TaskResult], say: Say = _ENGLISH) -> None:
    """Print each metric with its interval, and the accuracy of random guessing."""
    rows = []
    for result in results:
        for name, metric in result.metrics.items():
            first = name == result.main
            rows.append([
                result.task.name if first else "", name, metric.shown(say),
                result.guessing if first else "", f"{len(result.answered):,}" if first else "",
            ])  # fmt: skip
    columns = [*map(say, ("task", "metric", "value (95 % interval)", "guessing", "count"))]
    show_table(say("tasks"), columns, rows, (4,))


def show_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], numeric: Sequence[int] = ()
) -> None:
    """Print a table that is not wider than the terminal. `numeric`: indices of the columns with numbers."""
    print(table_text(title, columns, rows, numeric, shutil.get_terminal_size().columns))
