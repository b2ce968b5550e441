"""The data of a run: questions and answers (RunData), or plain text (TextData).

Both classes have the same methods: the plan (which rows are in which batch), the positions of a batch in the
data, and a sample of the model's output that is printed at an evaluation.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from minigpt.console.terminal import warn
from minigpt.data.batches import Batch, BatchPlan, EncodedExamples, encode_conversations
from minigpt.data.conversation import Conversation
from minigpt.data.corpus import TextOptions
from minigpt.data.memory_mapped import Tokens
from minigpt.data.reader import read_conversations
from minigpt.data.shards import characters_of, end_of_text, prepare
from minigpt.data.windows import TextPart, WindowPlan
from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel
from minigpt.generation.api import GenerationOptions, answer_questions, generate_ids
from minigpt.generation.native import without_warning
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenizer import Tokenizer
from minigpt.training.config import TrainConfig
from minigpt.training.lock import lock_folder
from minigpt.weights.pretrained import AnyTokenizer, load_tokenizer

__all__ = ["RunData", "TextData", "read_data", "shown_lines"]

SHARDS = "shards"  # name of a folder in the output folder
_SAMPLE = 48  # number of tokens that the model generates for a sample
_PROMPT = 32  # number of prompt tokens of a sample
_NAMED = 5  # most windows that a message lists


@dataclass(frozen=True)
class RunData:
    """The data of a run on questions and answers, or conversations."""

    tokenizer: Tokenizer
    train: EncodedExamples
    val: EncodedExamples
    val_conversations: list[Conversation]

    @property
    def sentence(self) -> str:
        """A sentence with the sizes of the training and the validation data."""
        return f"{len(self.train):,} {self.examples} to learn from, {len(self.val):,} to measure on"

    @property
    def examples(self) -> str:
        """The word for an example in messages: "conversations" or "pairs"."""
        several = any(len(each.exchanges) > 1 for each in self.val_conversations)
        return "conversations" if several else "pairs"

    def plan(self, config: TrainConfig) -> BatchPlan:
        """Plan which examples are in which batch."""
        return BatchPlan(
            self.train,
            batch_size=config.batch_size,
            tokens_per_batch=config.tokens_per_batch,
            pad_to=config.max_length if config.pad_to_max_length else 0,
            by_length=config.by_length,
            seed=config.seed,
        )

    def shapes(self, plan: BatchPlan | WindowPlan, pad_to: int) -> list[tuple[int, int]]:
        """Return (rows, tokens per row) of each batch of an epoch."""
        assert isinstance(plan, BatchPlan)
        return plan.shapes(self.train, pad_to)

    def names(self, config: TrainConfig) -> tuple[str, str, str]:
        """Return the names of training data, validation data and vocabulary for messages."""
        return str(config.train_data), str(config.val_data), str(config.vocab_path)

    unit = "lines"  # word for the numbers that `positions` returns

    def positions(self, batch: Batch) -> list[int]:
        """Return the line numbers, in the training file, of a batch's rows."""
        return [int(line) for line in self.train.lines[batch.rows]]

    def where(self, positions: Sequence[int], config: TrainConfig) -> str:
        """Describe positions in the training data, for a message."""
        return f"{shown_lines(positions)} of {config.train_data}"

    @without_warning()
    def sample(self, model: LanguageModel, number: int) -> str:
        """Answer a validation question. Returns "" if the question leaves no room in the context."""
        question = self.val_conversations[number % len(self.val_conversations)].exchanges[0].question
        free = model.config.max_position_embeddings - len(question) - 1
        if free <= 0:
            return ""
        options = GenerationOptions(max_new_tokens=min(_SAMPLE, free))
        answer = answer_questions(model, self.tokenizer, [question], options)[0]
        return f"  Q: {question}  A: {answer.text}"


@dataclass(frozen=True)
class TextData:
    """The data of a run on plain text."""

    tokenizer: AnyTokenizer
    train: TextPart
    val: TextPart

    @property
    def sentence(self) -> str:
        """A sentence with the sizes of the training and the validation data."""
        return f"{len(self.train):,} tokens to learn from, {len(self.val):,} to measure on"

    def plan(self, config: TrainConfig) -> WindowPlan:
        """Plan which windows are in which batch."""
        return WindowPlan(
            self.train,
            batch_size=config.batch_size,
            tokens_per_batch=config.tokens_per_batch,
            seed=config.seed,
        )

    def shapes(self, plan: BatchPlan | WindowPlan, pad_to: int) -> list[tuple[int, int]]:
        """Return (rows, tokens per row) of a typical batch."""
        assert isinstance(plan, WindowPlan)
        return plan.shapes(self.train, pad_to)

    def names(self, config: TrainConfig) -> tuple[str, str, str]:
        """Return the names of training data, validation data and vocabulary for messages."""
        val = config.val_text or f"the last {config.val_fraction:.0%} of {config.text}"
        return str(config.text), str(val), f"--tokenizer {config.tokenizer}"

    unit = "windows"  # word for the numbers that `positions` returns

    def positions(self, batch: Batch) -> list[int]:
        """Return the number of the first training token of each window in a batch."""
        return [int(start) for start in batch.rows]

    def where(self, positions: Sequence[int], config: TrainConfig) -> str:
        """Describe positions in the training data, for a message."""
        text = self.tokenizer.decode(
            self.train.tokens.read(positions[0], min(_PROMPT, len(self.train) - positions[0])).tolist()
        )
        starts = ", ".join(f"{start:,}" for start in positions[:_NAMED])
        return f"the windows from tokens {starts}, ... of {config.text}, the first of which begins {text!r}"

    @without_warning()
    def sample(self, model: LanguageModel, number: int) -> str:
        """Continue a piece of the validation text. Each `number` takes another piece."""
        length = min(_PROMPT, model.config.max_position_embeddings // 2, len(self.val))
        # multiples of the golden ratio spread the samples evenly over the text
        start = int((number * 0.6180339887498949) % 1 * (len(self.val) - length))
        prompt = self.val.tokens.read(self.val.first + start, length).tolist()
        free = model.config.max_position_embeddings - length
        options = GenerationOptions(max_new_tokens=min(_SAMPLE, free))
        written = generate_ids(model, [prompt], options, end_of_text(self.tokenizer))[0].ids
        before, after = self.tokenizer.decode(prompt), self.tokenizer.decode(written)
        return f"  {before!r} goes on {after!r}"


def shown_lines(lines: Sequence[int], limit: int = 8) -> str:
    """Format line numbers for a message; at most `limit` of them.

    >>> shown_lines([3, 1, 4])
    'lines 3, 1, 4'
    """
    more = ", ..." if len(lines) > limit else ""
    return f"lines {', '.join(map(str, lines[:limit]))}{more}"


def read_data(config: TrainConfig) -> RunData | TextData:
    """Read the vocabulary, the training and the validation data. Print what was skipped or cut.

    Raises:
        InputError: if a file cannot be read or holds nothing to learn from; the message names the file.
    """
    return _read_pairs(config) if config.text is None else _read_text(config, config.text)


def _read_pairs(config: TrainConfig) -> RunData:
    tokenizer = Tokenizer(config.vocab_path)
    encoded = []
    conversations: list[Conversation] = []
    for path in (config.train_data, config.val_data):
        conversations, report = read_conversations(path, config.strict, config.encoding, config.field_names)
        report.print_summary()
        try:
            part = encode_conversations(conversations, tokenizer, config.max_length)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        if part.n_cut:
            lost = (
                f", {part.n_without_answer} of them left out: no answer remained"
                if part.n_without_answer
                else ""
            )
            warn(
                f"{path}: {part.n_cut} of {report.counted} are longer than max_length={config.max_length} "
                f"and were cut{lost}"
            )
        unknown = int((part.ids == tokenizer.unk_token_id).sum())
        if unknown:
            warn(f"{path}: {unknown} characters are not in {config.vocab_path} and became <unk>")
        encoded.append(part)
    return RunData(tokenizer, encoded[0], encoded[1], conversations)


class _ShardOptions(TypedDict):
    """Keyword arguments for making shards."""

    options: TextOptions
    workers: int
    lock: Callable[[Path], None]


def _read_text(config: TrainConfig, text: Path) -> TextData:
    folder = config.output / SHARDS if config.shards is None else config.shards
    with contextlib.ExitStack() as locks:
        locked: set[Path] = set()

        def lock(folder: Path) -> None:
            if folder not in locked:
                locks.callback(lock_folder(folder, wait=True).release)
                locked.add(folder)

        reading = TextOptions(
            encoding=config.encoding,
            text_field=config.text_field,
            document_separator=config.document_separator,
        )
        options: _ShardOptions = {"options": reading, "workers": config.workers, "lock": lock}
        tokenizer = _text_tokenizer(config, text, folder, options)
        tokens = prepare(text, folder, tokenizer, **options)
        if config.val_text is not None:
            others = prepare(config.val_text, folder / "val", tokenizer, **options)
    if config.strict:
        _require_no_skipped(text, tokens)
    T = config.block_size
    if config.val_text is None:
        first = len(tokens) - int(len(tokens) * config.val_fraction)
        val = (tokens, first, len(tokens))
    else:
        first = len(tokens)
        if others.manifest["sources"] == tokens.manifest["sources"]:
            warn("--val_text is --text: the validation loss will say nothing about other texts")
        val = (others, 0, len(others))
    for name, length in (("to learn from", first), ("to measure on", val[2] - val[1])):
        if length < 2:
            raise InputError(
                f"{text}: {length} tokens are left {name}; give more text, or change --val_fraction"
            )
    if first < T + 1:
        raise InputError(
            f"{text}: {first:,} tokens to learn from do not fill one window of block_size={T} and the token "
            "behind it; lower --block_size"
        )
    return TextData(tokenizer, TextPart(tokens, 0, first, T), TextPart(*val, T))


def _require_no_skipped(text: Path, tokens: Tokens) -> None:
    for name, line, why in tokens.manifest["skipped"][:1]:
        raise InputError(f"{text if text.is_file() else text / name}:{line}: {why}")


def _text_tokenizer(config: TrainConfig, text: Path, folder: Path, options: _ShardOptions) -> AnyTokenizer:
    if config.tokenizer == "char":
        return characters_of(text, folder, **options)
    path = Path(config.tokenizer)
    if path.is_dir() and not (path / "tokenizer.json").exists() and not (path / "best").exists():
        # a folder with vocab.json and merges.txt, as OpenAI and Qwen publish them
        return BpeTokenizer.from_folder(path)
    return load_tokenizer(path)
