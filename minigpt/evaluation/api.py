"""Measures a model on questions and answers, or on a text. `minigpt eval` and `minigpt.evaluate` call this.

    evaluate(model, tokenizer, "data/val.jsonl")["exact_match"]
    evaluate(model, tokenizer, [("1+1等于几？", "2")])
    evaluate(model, tokenizer, text="novel.txt")["bits_per_byte"]

The loss is measured on all tokens and on the tokens of answers only. Then the model answers each distinct
question, always with the most likely token, and the answers are compared with the right answers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt.console.terminal import ProgressLine, warn
from minigpt.data.batches import Batch, EncodedExamples, encode_conversations, encode_prompt
from minigpt.data.conversation import Conversation, conversation_of_pair
from minigpt.data.corpus import TextOptions, read_texts
from minigpt.data.reader import read_conversations
from minigpt.errors import InputError, check_ranges
from minigpt.evaluation.answers import AnswerReport, Asked, by_question, score_answers
from minigpt.evaluation.loss import LossReport, evaluate_loss
from minigpt.evaluation.options import EvaluationOptions
from minigpt.evaluation.text import TextReport, evaluate_text
from minigpt.families.registry import LanguageModel
from minigpt.generation.api import eos_of, generate_ids
from minigpt.generation.options import GenerationOptions
from minigpt.tokenizer import Tokenizer
from minigpt.weights.pretrained import AnyTokenizer

__all__ = [
    "AnswersReport",
    "evaluate",
    "evaluate_conversations",
    "evaluate_pieces",
    "text_pieces",
    "warn_of_unknown",
]

BATCH_SIZE = EvaluationOptions.batch_size


@dataclass(frozen=True)
class AnswersReport:
    """The results of a model on questions and answers."""

    losses: LossReport
    scores: AnswerReport
    conversations: int  # number of conversations
    pairs: int  # number of question-answer pairs in all conversations together
    max_length: int  # for the loss, a longer conversation is cut to this number of tokens
    cut: int  # number of conversations with more than max_length tokens
    context: int  # largest number of tokens that the model can read
    too_long: int  # number of questions that fill the whole context; the answer to them is ""
    unknown_characters: int  # number of questions with characters that are not in the vocabulary
    answers: dict[Asked, str]  # the model's answer to each distinct question

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers as a dict that JSON can hold."""
        measured = {"all": self.losses.all.as_dict(), "answer": self.losses.answer.as_dict()}
        names = ("conversations", "pairs", "cut", "too_long", "unknown_characters")
        return {**measured, **self.scores.as_dict(), **{name: getattr(self, name) for name in names}}


def evaluate(
    model: LanguageModel,
    tokenizer: AnyTokenizer,
    data: str | Path | Sequence[Conversation | tuple[str, str]] | None = None,
    *,
    text: str | Path | None = None,
    batch_size: int = BATCH_SIZE,
    max_length: int = 0,
    max_new_tokens: int | None = None,
    strict: bool = False,
) -> dict[str, Any]:
    """Measure a model on questions and answers, or on a text. Returns the numbers of `minigpt eval --json`.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        data: questions and answers: a file, or a list of (question, answer) pairs or conversations.
        text: a text file, instead of `data`.
        batch_size: number of conversations or questions in one batch.
        max_length: for the loss, a longer conversation is cut to this number of tokens, and a text is divided
            into windows of this number of tokens. 0: the model's context (for a text at most 1,024 tokens).
        max_new_tokens: largest number of tokens of an answer.
        strict: raise an error at the first bad record of a file, instead of skipping it.

    Raises:
        InputError: if the data or the text cannot be read or is empty. With `data`, also if the tokenizer
            lacks <sep>, the token after each question.
    """
    given = {"batch_size": batch_size, "max_length": max_length, "max_new_tokens": max_new_tokens}
    check_ranges(EvaluationOptions, given)
    if (data is None) == (text is None):
        raise InputError("evaluate needs questions and answers (data) or a text (text): give one of them")
    if text is not None:
        pieces = text_pieces(Path(text), strict)
        warn_of_unknown(tokenizer, pieces)
        return evaluate_pieces(model, tokenizer, pieces, max_length).as_dict()
    skipped = 0
    if isinstance(data, str | Path):
        conversations, reading = read_conversations(Path(data), strict)
        reading.print_summary()
        skipped = len(reading.skipped)
    else:
        conversations = [
            one if isinstance(one, Conversation) else conversation_of_pair(*one) for one in data or ()
        ]
    report = evaluate_conversations(model, tokenizer, conversations, batch_size, max_length, max_new_tokens)
    return {**report.as_dict(), "skipped": skipped}


def evaluate_conversations(
    model: LanguageModel,
    tokenizer: AnyTokenizer,
    conversations: Sequence[Conversation],
    batch_size: int = BATCH_SIZE,
    max_length: int = 0,
    max_new_tokens: int | None = None,
) -> AnswersReport:
    """Measure the loss on conversations, and let the model answer their questions. Called by `evaluate`."""
    if not isinstance(tokenizer, Tokenizer):
        raise InputError("the model has no <sep> behind a question: measure it on a text (--text FILE)")
    limit = model.config.max_position_embeddings
    if max_length > limit + 1:  # + 1: the model predicts the last token but does not read it
        raise InputError(
            f"max_length={max_length} does not fit the model's block_size={limit}: at most {limit + 1} are "
            "possible"
        )
    encoded = encode_conversations(conversations, tokenizer, max_length or limit)
    losses = _loss(model, encoded, batch_size)
    right = by_question(conversations)
    options = GenerationOptions(max_new_tokens=max_new_tokens)
    answers, too_long = _answers(model, tokenizer, list(right), options, batch_size)
    return AnswersReport(
        losses,
        score_answers(list(answers.values()), list(right.values())),
        conversations=len(conversations),
        pairs=sum(len(one.exchanges) for one in conversations),
        max_length=max_length or limit,
        cut=encoded.n_cut,
        context=limit,
        too_long=too_long,
        unknown_characters=sum(bool(tokenizer.unknown_characters(asked.question)) for asked in right),
        answers=answers,
    )


def _loss(model: LanguageModel, encoded: EncodedExamples, batch_size: int) -> LossReport:
    with ProgressLine("measuring the loss", len(encoded), patience=2.0) as progress:

        def watched() -> Iterator[Batch]:
            done = 0
            for batch in encoded.in_order(batch_size):
                yield batch
                done += len(batch.rows)
                progress.update(done)

        return evaluate_loss(model, watched(), next(model.parameters()).device)


def _answers(
    model: LanguageModel,
    tokenizer: Tokenizer,
    questions: Sequence[Asked],
    options: GenerationOptions,
    batch_size: int,
) -> tuple[dict[Asked, str], int]:
    """Return the model's answer to each question, and the number of questions that are too long.

    If the exchanges before a question are long, the oldest ones are left out until half of the context is
    free. If the question alone fills the whole context, it counts as too long, and its answer is "".
    """
    context = model.config.max_position_embeddings
    prompts = [encode_prompt(asked.before, asked.question, tokenizer, context // 2) for asked in questions]
    short = [prompt for prompt in prompts if len(prompt) < context]
    with ProgressLine("answering", len(short), patience=2.0) as progress:
        eos = eos_of(tokenizer)
        found = iter(generate_ids(model, short, options, eos, batch_size, progress.update, tokenizer))
    answers = [tokenizer.decode(next(found).ids) if len(prompt) < context else "" for prompt in prompts]
    return dict(zip(questions, answers)), len(prompts) - len(short)


def text_pieces(
    path: Path,
    strict: bool = False,
    options: TextOptions = TextOptions(),  # noqa: B008 -- this default is frozen, so it cannot change
) -> list[str]:
    """Read a text file. Return its text as a list of pieces in order; a short text is one piece.

    Raises:
        InputError: if the path is a folder, or the file cannot be read.
    """
    if not path.is_file():
        wrong = "it is a folder" if path.is_dir() else "it is none" if path.exists() else "not found"
        raise InputError(f"text {path} must be a file: {wrong}")
    return list(read_texts(path, strict=strict, options=options))


def evaluate_pieces(
    model: LanguageModel, tokenizer: AnyTokenizer, pieces: Sequence[str], max_length: int = 0
) -> TextReport:
    """Measure loss and bits per byte of a text, given as the pieces that `text_pieces` returns."""
    with ProgressLine("characters measured", sum(map(len, pieces)), patience=2.0) as progress:
        return evaluate_text(model, tokenizer, pieces, max_length, progress.update)


def warn_of_unknown(tokenizer: AnyTokenizer, pieces: Sequence[str]) -> None:
    """Warn about characters of a text that are not in the vocabulary. The warning shows at most twenty."""
    unknown = list(dict.fromkeys(c for piece in pieces for c in tokenizer.unknown_characters(piece)))
    if unknown:
        warn(f"not in the vocabulary, {tokenizer.unknown_read_as}: {' '.join(map(repr, unknown[:20]))}")
