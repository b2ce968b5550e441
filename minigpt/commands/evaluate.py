"""Measure a checkpoint on questions and answers, or on a text: loss, perplexity, bits, right answers.

    minigpt eval --model output/best --data data/val.jsonl
    minigpt eval --show 10 --json
    minigpt eval --precision float32 int8      # how much worse the model is with weights in fewer bits
    minigpt eval --model my-gpt2 --text novel.txt
    minigpt eval --model my-gpt2 --task cmmlu/ --shots 5

The loss is measured on all tokens and on the tokens of answers only. Then the model answers each distinct
question, always with the most likely token, and the answers are compared with the file's answers (exact
match, character F1). If a question has several right answers, the most similar answer counts. A text is
measured per token, and also per byte and per character, which does not depend on the vocabulary. A task is
a benchmark, such as CMMLU; docs/evaluation.md describes its formats.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minigpt.console import command_line
from minigpt.console import language as languages
from minigpt.data.field_names import DataOptions
from minigpt.errors import InputError
from minigpt.evaluation.options import EvaluationOptions, TaskOptions
from minigpt.generation.loading import adapter_note, require_model, warn_of_gaps

if TYPE_CHECKING:
    from minigpt.evaluation.answers import Row
    from minigpt.evaluation.api import AnswersReport
    from minigpt.evaluation.words import Say
    from minigpt.families.registry import LanguageModel
    from minigpt.weights.pretrained import AnyTokenizer


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions, EvaluationOptions, TaskOptions, command_line.MachineOptions):
    """Measure a checkpoint: loss, perplexity, bits per character, exact match, character F1."""

    RANGES = {"show": (0, 10**6), "show_wrong": (0, 10**6)}

    # Model
    model: Path = Path("output/best")
    """checkpoint folder, from `minigpt train` or in Hugging Face's format"""
    adapter: Path | None = None
    """PEFT adapter folder; it is merged into the weights, but int8 and int4 weights stay as they are"""
    precision: tuple[Literal["float32", "float16", "bfloat16", "int8", "int4"], ...] = ()
    """precision of the weights: one, or several to compare; default: as the folder stores them"""

    # Data
    data: Path = Path("data/val.jsonl")
    """file of questions and answers, or conversations"""
    text: Path | None = None
    """text to measure on instead, for a model with any vocabulary: plain text, or records with a text"""
    text_field: str = ""
    """name of the field that holds the text; left out: a usual name such as text, or the longest"""

    task: tuple[Path, ...] = ()
    """tasks to measure on instead: files, folders with test and dev, or TOML files that describe one"""
    helm: bool = False
    """with --task: also calibration, robustness and position bias; takes about fifteen times as long"""
    training_data: tuple[Path, ...] = ()
    """with --task: look for its questions in these files"""
    report: Path | None = None
    """with --task: folder for a page with tables, pictures and cases, in HTML and Markdown"""
    card: bool = False
    """with --task: write the results into README.md of the model's folder"""

    show: int = 10
    """number of questions to print with the expected and the given answer"""
    show_wrong: int = 0
    """number of wrongly answered questions to print, those whose answers are furthest from right first"""


_ONLY_TASKS = (
    "helm",
    "training_data",
    "report",
    "card",
    *(one.name for one in dataclasses.fields(TaskOptions)),
)
_NOT_TASKS = (
    *("data", "text_field", "max_length", "show", "show_wrong"),
    *("question_field", "answer_field", "speaker"),
)


def build(given: dict[str, Any]) -> Options:
    """Make the options. Raises InputError for a flag that would have no effect."""
    options = Options(**given)
    if options.task:
        if options.text is not None:
            raise InputError("give --task or --text, not both")
        for name in _NOT_TASKS:
            if name in given:
                raise InputError(f"--{name} has no effect with --task: leave one of them out")
    for name in () if options.task else _ONLY_TASKS:
        if name in given:
            raise InputError(f"--{name} needs --task FILE: it is about tasks")
    return options


def main(options: Options) -> dict[str, Any]:
    """Read the model and the data, measure, print."""
    require_model(options.model)
    if len({*options.precision}) < len(options.precision):
        raise InputError(f"--precision names one twice: got {' '.join(options.precision)}")
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    if options.task:
        return _measure_tasks(options)
    return measure_pairs(options)[0] if options.text is None else _measure_text(options, options.text)


def _measure_tasks(options: Options) -> dict[str, Any]:
    from minigpt.evaluation.task_command import load, measure, profiles_of, tasks_of
    from minigpt.evaluation.words import speaker

    language = languages.language()
    say = speaker(language)
    if len(options.precision) > 1:
        raise InputError("--task takes one --precision; compare two with minigpt compare")
    if options.card and options.precision:
        raise InputError("--card describes the folder as it is stored: leave out --precision")
    for path in options.training_data:  # checked now, so that the error does not come after a long evaluation
        if not path.exists():
            raise InputError(f"--training_data {path} does not exist (looked for it from {Path.cwd()})")
        if path.is_dir():
            raise InputError(f"--training_data {path} is a folder: name its files")
    for path in () if options.report is None else (options.report, *options.report.parents):
        if path.exists() and not path.is_dir():
            raise InputError(f"--report {options.report}: {path} is a file; give a folder, which may be new")
    tasks = tasks_of(options.task, options, options.strict, options.encoding)
    precision = next(iter(options.precision), None)
    loaded = load(options.model, options.device, precision, options.adapter, options.batch_size)
    loaded = dataclasses.replace(loaded, max_new_tokens=options.max_new_tokens)
    results = measure(loaded, tasks, options, say)
    profiles = profiles_of(
        loaded, results, options, options.helm, options.training_data, say, options.encoding
    )
    if options.report is not None:
        from minigpt.evaluation.report import write_report

        files = write_report(options.report, str(options.model), list(results.values()), profiles, language)
        print(say("the report is in {file}", file=files[0]))
    if options.card:
        from minigpt.evaluation.model_card import update_card
        from minigpt.finetuning.adapters import adapter_folder

        assert loaded.folder is not None, "load"
        folder = adapter_folder(options.adapter) if options.adapter else loaded.folder
        print(say("the results are in {file}", file=update_card(folder, list(results.values()))))
    return {
        "tasks": {
            name: {**result.as_dict(), **(profiles[name].as_dict() if name in profiles else {})}
            for name, result in results.items()
        }
    }


def _models(options: Options) -> "Iterator[tuple[LanguageModel, AnyTokenizer]]":
    """Yield the model in each precision of --precision.

    The model is loaded again for each precision, because the rounding of its weights cannot be undone.
    """
    from minigpt.devices import pick_device
    from minigpt.weights.pretrained import load_model_and_tokenizer
    from minigpt.weights.quantized import set_precision

    for number, precision in enumerate(options.precision or (None,)):
        device = pick_device(options.device)
        model, tokenizer = load_model_and_tokenizer(options.model, device, adapter=options.adapter)
        model = set_precision(model, precision)
        if number == 0:
            warn_of_gaps(tokenizer, options.model)
        if options.adapter is not None and number == 0:
            from minigpt.console.terminal import note

            note(adapter_note(model, options.adapter))
        yield model, tokenizer


def measure_pairs(options: Options) -> "tuple[dict[str, Any], list[Row]]":
    """Measure on questions and answers, and print. Return results for --json, and a row per question."""

    from minigpt.data.reader import read_conversations
    from minigpt.evaluation.answers import answer_rows, by_question, character_f1
    from minigpt.evaluation.api import evaluate_conversations
    from minigpt.evaluation.words import speaker
    from minigpt.finetuning.adapters import adapter_folder
    from minigpt.generation.generation_config import trained_length
    from minigpt.weights.pretrained import model_folder

    language = languages.language()
    say = speaker(language)
    conversations, reading = read_conversations(
        options.data, options.strict, options.encoding, options.field_names
    )
    reading.print_summary()
    # By default, conversations are cut to the same max_length as in training, so that the loss on the
    # validation data equals the loss that training printed. The folder `source` records this max_length.
    source = adapter_folder(options.adapter) if options.adapter else model_folder(options.model)
    length = options.max_length or trained_length(source)
    reports = [
        evaluate_conversations(
            model, tokenizer, conversations, options.batch_size, length, options.max_new_tokens
        )
        for model, tokenizer in _models(options)
    ]
    report = reports[0]
    counted = reading.counted
    if language == "zh":
        counted = say("{count} conversations", count=f"{reading.conversations:,}")
    _print_report(report, counted, say)
    found = [one.as_dict() for one in reports]
    perplexities = {
        "all": [one.losses.all.perplexity for one in reports],
        "answers": [one.losses.answer.perplexity for one in reports],
    }
    others = {
        "exact match": [f"{one.scores.exact_match:.1%}" for one in reports],
        "F1": [f"{one.scores.character_f1:.3f}" for one in reports],
    }
    more = _compare(options.precision, perplexities, others, found, say)
    right, given = list(by_question(conversations).values()), list(report.answers.values())
    questions = [asked.question for asked in report.answers]
    every = answer_rows(questions, right, given, len(questions))
    if options.show:
        show_rows(say("some of the questions"), spread(every, options.show), say)
    if options.show_wrong:
        wrong = sorted((row for row in every if row[0] == "✗"), key=lambda row: character_f1(row[3], row[2]))
        title = say("{wrong} of {count} are wrong", wrong=f"{len(wrong):,}", count=f"{len(every):,}")
        show_rows(title, wrong[: options.show_wrong], say)
        more["wrong"] = [
            dict(zip(("question", "expected", "given"), row[1:])) for row in wrong[: options.show_wrong]
        ]
    return {**found[0], "skipped": len(reading.skipped), **more}, every


def spread(rows: "Sequence[Row]", count: int) -> "list[Row]":
    """Return at most `count` of the rows, evenly spread over all."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def show_rows(title: str, rows: "Sequence[Row]", say: "Say | None" = None) -> None:
    """Print a table. A row has a mark (right or wrong), the question, the expected and the given answer."""
    from minigpt.console.terminal import shortened, table
    from minigpt.evaluation.words import speaker

    say = say or speaker(languages.language())
    cells = [[mark, *(shortened(text, 60) for text in texts)] for mark, *texts in rows]
    table(title, [*map(say, ("", "question", "expected", "given"))], cells)


def _print_report(report: "AnswersReport", counted: str, say: "Say") -> None:
    from minigpt.console.terminal import table

    rows = [
        (
            say(name),
            f"{part.loss:.4f}",
            f"{part.perplexity:.2f}",
            f"{part.bits_per_character:.3f}",
            f"{part.count:,}",
        )
        for name, part in (("all", report.losses.all), ("answers", report.losses.answer))
    ]
    columns = ("tokens", "loss (nats)", "perplexity", "bits per character", "count")
    table(say("how well the text is predicted"), [*map(say, columns)], rows, numeric=(1, 2, 3, 4))
    right, count = f"{report.scores.exact_match:.1%}", f"{report.scores.count:,}"
    print(say("exact match   {share} of {count} questions", share=right, count=count))
    print(say("character F1  {value}", value=f"{report.scores.character_f1:.3f}"))
    if report.cut:
        cut = "{cut} of {counted} were cut at {length} tokens for the loss"
        print(say(cut, cut=f"{report.cut:,}", counted=counted, length=report.max_length))
    if report.too_long:
        long = "too long for block_size={context}, counted as not answered: {count} of the questions"
        print(say(long, context=report.context, count=f"{report.too_long:,}"))
    if report.unknown_characters:
        unknown = "with characters that are not in the vocabulary: {count} of the questions"
        print(say(unknown, count=f"{report.unknown_characters:,}"))


def _measure_text(options: Options, text: Path) -> dict[str, Any]:
    from minigpt.console.terminal import table
    from minigpt.data.corpus import TextOptions
    from minigpt.evaluation.api import evaluate_pieces, text_pieces, warn_of_unknown
    from minigpt.evaluation.text import TextReport
    from minigpt.evaluation.words import speaker

    say = speaker(languages.language())
    reading = TextOptions(encoding=options.encoding, text_field=options.text_field)
    pieces = text_pieces(text, options.strict, reading)
    reports: list[TextReport] = []
    for model, tokenizer in _models(options):
        if not reports:
            warn_of_unknown(tokenizer, pieces)
        reports.append(evaluate_pieces(model, tokenizer, pieces, options.max_length))
    report = reports[0]
    rows = [
        ("loss (nats)", f"{report.loss.loss:.4f}"),
        ("perplexity", f"{report.loss.perplexity:.2f}"),
        ("bits per byte", f"{report.bits_per_byte:.4f}"),
        ("bits per character", f"{report.bits_per_character:.4f}"),
        ("tokens", f"{report.loss.count:,}"),
        ("characters", f"{report.characters:,}"),
        ("bytes", f"{report.bytes:,}"),
    ]
    table(
        say("how well the text is predicted"), ("", str(text)), [(say(name), value) for name, value in rows],
        numeric=(1,),
    )  # fmt: skip
    found = [one.as_dict() for one in reports]
    bits = {"bits per byte": [f"{one.bits_per_byte:.4f}" for one in reports]}
    perplexities = {"text": [one.loss.perplexity for one in reports]}
    return {**found[0], **_compare(options.precision, perplexities, bits, found, say)}


def _compare(
    precisions: tuple[str, ...],
    perplexities: dict[str, list[float]],
    others: dict[str, list[str]],
    found: list[dict[str, Any]],
    say: "Say",
) -> dict[str, Any]:
    """Print a table that compares each precision with the first one. Return the results for JSON.

    With a single precision nothing is printed.

    Args:
        precisions: names of the precisions.
        perplexities: name of a measurement -> perplexity in each precision.
        others: title of a column -> its cell for each precision.
        found: further numbers of each precision, for JSON.
    """
    from minigpt.console.terminal import table

    if len(precisions) < 2:
        return {}
    rows: list[list[object]] = [[name] for name in precisions]
    columns = [say("precision")]
    changes: list[dict[str, float]] = [{} for _ in precisions]
    for part, values in perplexities.items():
        columns.append(say("perplexity ({part})", part=say(part)))
        for row, change, value in zip(rows, changes, values):
            change[part] = 100 * (value / values[0] - 1)
            row.append(f"{value:.4f}" + ("" if row is rows[0] else f" {change[part]:+8.3f} %"))
    for title, cells in others.items():
        columns.append(say(title))
        for row, cell in zip(rows, cells):
            row.append(cell)
    table(say("what it costs to store the weights in fewer bits"), columns, rows, range(1, len(columns)))
    return {
        "precisions": {
            name: {**numbers, "perplexity_change_percent": change}
            for name, numbers, change in zip(precisions, found, changes)
        }
    }


if __name__ == "__main__":
    command_line.run(Options, main, build)
