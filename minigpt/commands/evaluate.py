"""Measure a checkpoint on questions and answers, or on a text: loss, perplexity, bits, right answers.

    python ./minigpt/commands/evaluate.py --model output/best --data data/val.jsonl
    minigpt eval --show 10 --json
    minigpt eval --precision float32 int8      # what weights in fewer bits cost
    minigpt eval --model my-gpt2 --text novel.txt

The loss is measured on all tokens and on the answers' alone; then every distinct question is answered
greedily and compared with what the file says (exact match, character F1; of several right answers the best
counts). A text is measured per token, and per byte and character, which does not depend on the vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minigpt.console import command_line
from minigpt.errors import InputError

if TYPE_CHECKING:
    from minigpt.data.batches import Batch, EncodedPairs
    from minigpt.evaluation.answers import AnswerReport
    from minigpt.evaluation.loss import LossReport
    from minigpt.families.registry import LanguageModel
    from minigpt.tokenizer import Tokenizer
    from minigpt.weights.pretrained import AnyTokenizer


@dataclass(frozen=True, kw_only=True)
class Options(command_line.CommandOptions):
    """Measure a checkpoint: loss, perplexity, bits per character, exact match, character F1."""

    model: Path = Path("output/best")
    """checkpoint folder, as `minigpt train` writes it"""
    data: Path = Path("data/val.jsonl")
    """questions and answers to measure on (JSONL)"""
    text: Path | None = None
    """a plain text to measure on instead, for a model of any vocabulary"""
    precision: tuple[Literal["float32", "float16", "bfloat16", "int8", "int4"], ...] = ()
    """store the weights so: one, or several to compare; left out: as the folder has them"""
    batch_size: int = 64
    """pairs measured, and questions answered, at once"""
    max_length: int = 0
    """tokens of a pair that the loss is measured on, or of a window of --text; 0: the model's block_size"""
    max_new_tokens: int | None = None
    """tokens of an answer, at most; left out: up to 128, fewer if the model has no room for more"""
    show: int = 10
    """questions to show with expected and given answers"""
    strict: bool = False
    """stop at the first bad line of the data instead of skipping it"""
    device: str = "auto"
    """cpu, cuda, mps, or auto: the best that is there"""
    threads: int = 0
    """CPU threads; 0: as many as there are cores"""


def main(options: Options) -> dict[str, Any]:
    """Read, measure the loss, answer, score, print."""
    for name, least in (("batch_size", 1), ("max_length", 0), ("show", 0), ("threads", 0)):
        if getattr(options, name) < least:
            raise InputError(f"{name} must be at least {least}: got {name}={getattr(options, name)}")
    if not options.model.exists():
        raise InputError(
            f"{options.model} does not exist: train a model first (`minigpt train`; or `make demo`, then "
            "--model output/demo/best), or name its folder with --model"
        )
    if len({*options.precision}) < len(options.precision):
        raise InputError(f"--precision names one twice: got {' '.join(options.precision)}")
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    return _measure_pairs(options) if options.text is None else _measure_text(options, options.text)


def _load(options: Options, precision: Any) -> "tuple[LanguageModel, AnyTokenizer]":
    """The model, its weights stored with this precision; anew each time, since rounding is for good."""
    from minigpt.devices import pick_device
    from minigpt.weights.pretrained import load_model_and_tokenizer
    from minigpt.weights.weight_only import stored_as

    model, tokenizer = load_model_and_tokenizer(options.model, pick_device(options.device))
    return stored_as(model, precision), tokenizer


def _measure_pairs(options: Options) -> dict[str, Any]:
    from minigpt.console.terminal import table
    from minigpt.data.batches import encode_pairs
    from minigpt.data.reader import read_pairs
    from minigpt.evaluation.answers import answer_rows, by_question, score_answers
    from minigpt.generation.api import GenerationOptions
    from minigpt.tokenizer import Tokenizer

    pairs, reading = read_pairs(options.data, strict=options.strict)
    reading.print_summary()
    asking = GenerationOptions(max_new_tokens=options.max_new_tokens)
    right = by_question(pairs)
    questions, references = list(right), list(right.values())
    results: list[tuple[LossReport, AnswerReport]] = []
    shown: list[str] = []
    for precision in options.precision or (None,):
        model, tokenizer = _load(options, precision)
        if not isinstance(tokenizer, Tokenizer):
            raise InputError(
                f"{options.model} has no <sep> between question and answer: measure it with --text FILE"
            )
        limit = model.config.max_position_embeddings
        if options.max_length > limit + 1:  # a pair's last token is predicted, not read
            raise InputError(
                f"--max_length {options.max_length} does not fit the model's block_size={limit}: "
                f"at most {limit + 1} tokens are possible"
            )
        max_length = options.max_length or limit
        encoded = encode_pairs(pairs, tokenizer, max_length)
        losses = _loss(model, encoded, options.batch_size)
        given, n_too_long = _answers(model, tokenizer, questions, asking, options.batch_size)
        results.append((losses, score_answers(given, references)))
        shown = shown or given
    losses, scores = results[0]
    n_unknown = sum(bool(tokenizer.unknown_characters(question)) for question in questions)

    _print_losses(losses)
    print(f"exact match   {scores.exact_match:.1%} of {scores.count:,} questions")
    print(f"character F1  {scores.character_f1:.3f}")
    if encoded.n_cut:
        print(f"{encoded.n_cut:,} of {len(pairs):,} pairs were cut at {max_length} tokens for the loss")
    if n_too_long:
        print(f"too long for block_size={limit}, counted as not answered: {n_too_long:,} of the questions")
    if n_unknown:
        print(f"with characters that are not in the vocabulary: {n_unknown:,} of the questions")
    found = [
        {"all": one.all.as_dict(), "answer": one.answer.as_dict(), **marks.as_dict()}
        for one, marks in results
    ]
    more = _compare(
        options.precision,
        {
            "all": [one.all.perplexity for one, _ in results],
            "answers": [a.answer.perplexity for a, _ in results],
        },
        {
            "exact match": [f"{marks.exact_match:.1%}" for _, marks in results],
            "F1": [f"{marks.character_f1:.3f}" for _, marks in results],
        },
        found,
    )
    if options.show:
        rows = answer_rows(questions, references, shown, options.show)
        cells = [[mark, *map(_shortened, texts)] for mark, *texts in rows]
        table("some of the questions", ("", "question", "expected", "given"), cells)
    return {
        **found[0],
        "pairs": len(pairs),
        "skipped": len(reading.skipped),
        "cut": encoded.n_cut,
        "too_long": n_too_long,
        "unknown_characters": n_unknown,
        **more,
    }


def _measure_text(options: Options, text: Path) -> dict[str, Any]:
    from minigpt.console.terminal import ProgressLine, table, warn
    from minigpt.data.corpus import read_texts
    from minigpt.evaluation.text import TextReport, evaluate_text

    if not text.is_file():
        raise InputError(
            f"--text {text} must be a file: {'it is a folder' if text.exists() else 'not found'}"
        )
    pieces = list(read_texts(text, strict=options.strict))
    reports: list[TextReport] = []
    for precision in options.precision or (None,):
        model, tokenizer = _load(options, precision)
        if not reports:
            unknown = list(dict.fromkeys(c for piece in pieces for c in tokenizer.unknown_characters(piece)))
            if unknown:
                warn(f"not in the vocabulary, read as <unk>: {' '.join(map(repr, unknown[:20]))}")
        with ProgressLine("characters measured", sum(map(len, pieces)), patience=2.0) as progress:
            reports.append(evaluate_text(model, tokenizer, pieces, options.max_length, progress.update))
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
    table("how well the text is predicted", ("", str(text)), rows, numeric=(1,))
    found = [one.as_dict() for one in reports]
    bits = {"bits per byte": [f"{one.bits_per_byte:.4f}" for one in reports]}
    perplexities = {"text": [one.loss.perplexity for one in reports]}
    return {**found[0], **_compare(options.precision, perplexities, bits, found)}


def _compare(
    precisions: tuple[str, ...],
    perplexities: dict[str, list[float]],
    others: dict[str, list[str]],
    found: list[dict[str, Any]],
) -> dict[str, Any]:
    """Print what each precision gives beside the first; returns it for JSON. Of one there is nothing to say.

    Args:
        perplexities: what was measured on -> one for each precision.
        others: title of a column -> one cell for each precision.
        found: what else JSON is to hold of each precision.
    """
    from minigpt.console.terminal import table

    if len(precisions) < 2:
        return {}
    rows: list[list[object]] = [[name] for name in precisions]
    columns = ["precision"]
    changes: list[dict[str, float]] = [{} for _ in precisions]
    for part, values in perplexities.items():
        columns.append(f"perplexity ({part})")
        for row, change, value in zip(rows, changes, values):
            change[part] = 100 * (value / values[0] - 1)
            row.append(f"{value:.4f}" + ("" if row is rows[0] else f" {change[part]:+8.3f} %"))
    for title, cells in others.items():
        columns.append(title)
        for row, cell in zip(rows, cells):
            row.append(cell)
    table("what it costs to store the weights in fewer bits", columns, rows, range(1, len(columns)))
    return {
        "precisions": {
            name: {**numbers, "perplexity_change_percent": change}
            for name, numbers, change in zip(precisions, found, changes)
        }
    }


def _shortened(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _loss(model: "LanguageModel", encoded: "EncodedPairs", batch_size: int) -> "LossReport":
    from minigpt.console.terminal import ProgressLine
    from minigpt.evaluation.loss import evaluate_loss

    with ProgressLine("measuring the loss", len(encoded), patience=2.0) as progress:

        def watched() -> Iterator["Batch"]:
            done = 0
            for batch in encoded.in_order(batch_size):
                yield batch
                done += len(batch.rows)
                progress.update(done)

        return evaluate_loss(model, watched(), next(model.parameters()).device)


def _answers(
    model: "LanguageModel", tokenizer: "Tokenizer", questions: list[str], asking: Any, batch_size: int
) -> tuple[list[str], int]:
    """Answers, "" where a question fills the whole model, and how many of these there are."""
    from minigpt.console.terminal import ProgressLine
    from minigpt.generation.api import answer_questions

    room = model.config.max_position_embeddings - 2  # for the question's <sep> and a token of the answer
    short = [question for question in questions if len(question) <= room]
    with ProgressLine("answering", len(short), patience=2.0) as progress:
        found = iter(
            answer_questions(model, tokenizer, short, asking, batch_size, on_progress=progress.update)
        )
    given = [next(found).text if len(question) <= room else "" for question in questions]
    return given, len(questions) - len(short)


def _print_losses(losses: "LossReport") -> None:
    from minigpt.console.terminal import table

    rows = [
        (
            name,
            f"{part.loss:.4f}",
            f"{part.perplexity:.2f}",
            f"{part.bits_per_character:.3f}",
            f"{part.count:,}",
        )
        for name, part in (("all", losses.all), ("answers", losses.answer))
    ]
    columns = ("tokens", "loss (nats)", "perplexity", "bits per character", "count")
    table("how well the text is predicted", columns, rows, numeric=(1, 2, 3, 4))


if __name__ == "__main__":
    command_line.run(Options, main)
