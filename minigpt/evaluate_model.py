"""Measure a checkpoint on questions and answers: loss, perplexity, bits per character, right answers.

    python ./minigpt/evaluate_model.py --model output/best --data data/val.jsonl
    minigpt eval --show 10 --json

The loss is measured on all tokens and on the answers' alone; then every distinct question is answered
greedily and compared with what the file says (exact match, character F1; of several right answers the best
counts).
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: Python put this folder first, where our names would shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minigpt import command_line
from minigpt.command_line import InputError

if TYPE_CHECKING:
    from minigpt.data.batches import Batch, EncodedPairs
    from minigpt.evaluation.loss import LossReport
    from minigpt.families import LanguageModel
    from minigpt.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Options(command_line.DoorOptions):
    """Measure a checkpoint: loss, perplexity, bits per character, exact match, character F1."""

    model: Path = Path("output/best")
    """checkpoint folder, as `minigpt train` writes it"""
    data: Path = Path("data/val.jsonl")
    """questions and answers to measure on (JSONL)"""
    batch_size: int = 64
    """pairs measured, and questions answered, at once"""
    max_length: int = 0
    """tokens of a pair that the loss is measured on; longer ones are cut; 0: the model's block_size"""
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
    from minigpt.data.reader import read_pairs

    pairs, reading = read_pairs(options.data, strict=options.strict)
    reading.print_summary()

    import torch

    from minigpt.data.batches import encode_pairs
    from minigpt.devices import pick_device
    from minigpt.evaluation.answers import answer_rows, by_question, score_answers
    from minigpt.inference.generation import GenerationOptions
    from minigpt.pretrained import load_model_and_tokenizer
    from minigpt.terminal import table
    from minigpt.tokenizer import Tokenizer

    asking = GenerationOptions(max_new_tokens=options.max_new_tokens)
    if options.threads:
        torch.set_num_threads(options.threads)
    model, tokenizer = load_model_and_tokenizer(options.model, pick_device(options.device))
    if not isinstance(tokenizer, Tokenizer):
        raise InputError(f"{options.model} has no <sep>: only models of questions and answers are measured")
    limit = model.config.max_position_embeddings
    if options.max_length > limit + 1:  # a pair's last token is predicted, not read
        raise InputError(
            f"--max_length {options.max_length} does not fit the model's block_size={limit}: "
            f"at most {limit + 1} tokens are possible"
        )
    max_length = options.max_length or limit
    encoded = encode_pairs(pairs, tokenizer, max_length)
    losses = _loss(model, encoded, options.batch_size)

    right = by_question(pairs)
    questions, references = list(right), list(right.values())
    given, n_too_long = _answers(model, tokenizer, questions, asking, options.batch_size)
    scores = score_answers(given, references)
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
    if options.show:
        rows = answer_rows(questions, references, given, options.show)
        shown = [[mark, *map(_shortened, texts)] for mark, *texts in rows]
        table("some of the questions", ("", "question", "expected", "given"), shown)
    return {
        "all": losses.all.as_dict(),
        "answer": losses.answer.as_dict(),
        **scores.as_dict(),
        "pairs": len(pairs),
        "skipped": len(reading.skipped),
        "cut": encoded.n_cut,
        "too_long": n_too_long,
        "unknown_characters": n_unknown,
    }


def _shortened(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _loss(model: "LanguageModel", encoded: "EncodedPairs", batch_size: int) -> "LossReport":
    from minigpt.evaluation.loss import evaluate_loss
    from minigpt.terminal import ProgressLine

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
    from minigpt.inference.generation import answer_questions
    from minigpt.terminal import ProgressLine

    room = model.config.max_position_embeddings - 2  # for the question's <sep> and a token of the answer
    short = [question for question in questions if len(question) <= room]
    with ProgressLine("answering", len(short), patience=2.0) as progress:
        found = iter(
            answer_questions(model, tokenizer, short, asking, batch_size, on_progress=progress.update)
        )
    given = [next(found).text if len(question) <= room else "" for question in questions]
    return given, len(questions) - len(short)


def _print_losses(losses: "LossReport") -> None:
    from minigpt.terminal import table

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
