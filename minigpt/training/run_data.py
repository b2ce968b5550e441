"""The data of a run: questions and answers, or plain text.

Both kinds of data have the same methods: a plan (which rows stand in batch m), batches of rows, the positions
of a batch in the data, and a sample to print at an evaluation.
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

SHARDS = "shards"  # in the output folder
_SAMPLE = 48  # new tokens of a sample
_PROMPT = 32  # tokens of text that a sample continues
_NAMED = 5  # windows that a message names


@dataclass(frozen=True)
class RunData:
    """Questions and answers."""

    tokenizer: Tokenizer
    train: EncodedExamples
    val: EncodedExamples
    val_conversations: list[Conversation]

    @property
    def sentence(self) -> str:
        """How much it is."""
        return f"{len(self.train):,} {self.examples} to learn from, {len(self.val):,} to measure on"

    @property
    def examples(self) -> str:
        """What an example is called."""
        several = any(len(each.exchanges) > 1 for each in self.val_conversations)
        return "conversations" if several else "pairs"

    def plan(self, config: TrainConfig) -> BatchPlan:
        """Which pairs stand in which batch."""
        return BatchPlan(
            self.train,
            batch_size=config.batch_size,
            tokens_per_batch=config.tokens_per_batch,
            pad_to=config.max_length if config.pad_to_max_length else 0,
            by_length=config.by_length,
            seed=config.seed,
        )

    def shapes(self, plan: BatchPlan | WindowPlan, pad_to: int) -> list[tuple[int, int]]:
        """Rows and tokens of an epoch's batches."""
        assert isinstance(plan, BatchPlan)
        return plan.shapes(self.train, pad_to)

    def names(self, config: TrainConfig) -> tuple[str, str, str]:
        """The sources of the training part, the validation part and the vocabulary, for a message."""
        return str(config.train_data), str(config.val_data), str(config.vocab_path)

    unit = "lines"  # of positions

    def positions(self, batch: Batch) -> list[int]:
        """The lines of the file that a batch of the training part comes from."""
        return [int(line) for line in self.train.lines[batch.rows]]

    def where(self, positions: Sequence[int], config: TrainConfig) -> str:
        """The same for a message."""
        return f"{shown_lines(positions)} of {config.train_data}"

    @without_warning()
    def sample(self, model: LanguageModel, number: int) -> str:
        """The model's answer to a question of the validation part; empty if none fits into its context."""
        question = self.val_conversations[number % len(self.val_conversations)].exchanges[0].question
        free = model.config.max_position_embeddings - len(question) - 1
        if free <= 0:
            return ""
        options = GenerationOptions(max_new_tokens=min(_SAMPLE, free))
        answer = answer_questions(model, self.tokenizer, [question], options)[0]
        return f"  Q: {question}  A: {answer.text}"


@dataclass(frozen=True)
class TextData:
    """Plain text."""

    tokenizer: AnyTokenizer
    train: TextPart
    val: TextPart

    @property
    def sentence(self) -> str:
        """How much it is."""
        return f"{len(self.train):,} tokens to learn from, {len(self.val):,} to measure on"

    def plan(self, config: TrainConfig) -> WindowPlan:
        """Which windows stand in which batch."""
        return WindowPlan(
            self.train,
            batch_size=config.batch_size,
            tokens_per_batch=config.tokens_per_batch,
            seed=config.seed,
        )

    def shapes(self, plan: BatchPlan | WindowPlan, pad_to: int) -> list[tuple[int, int]]:
        """Rows and tokens of a typical batch."""
        assert isinstance(plan, WindowPlan)
        return plan.shapes(self.train, pad_to)

    def names(self, config: TrainConfig) -> tuple[str, str, str]:
        """The sources of the training part, the validation part and the vocabulary, for a message."""
        val = config.val_text or f"the last {config.val_fraction:.0%} of {config.text}"
        return str(config.text), str(val), f"--tokenizer {config.tokenizer}"

    unit = "windows"  # of positions

    def positions(self, batch: Batch) -> list[int]:
        """The numbers of the first tokens of a batch's windows, in the training part."""
        return [int(start) for start in batch.rows]

    def where(self, positions: Sequence[int], config: TrainConfig) -> str:
        """The same for a message."""
        text = self.tokenizer.decode(
            self.train.tokens.read(positions[0], min(_PROMPT, len(self.train) - positions[0])).tolist()
        )
        starts = ", ".join(f"{start:,}" for start in positions[:_NAMED])
        return f"the windows from tokens {starts}, ... of {config.text}, the first of which begins {text!r}"

    @without_warning()
    def sample(self, model: LanguageModel, number: int) -> str:
        """The model's continuation of a piece of the validation part, another one each time."""
        length = min(_PROMPT, model.config.max_position_embeddings // 2, len(self.val))
        # multiples of the golden ratio: each falls into the largest gap between the earlier ones
        start = int((number * 0.6180339887498949) % 1 * (len(self.val) - length))
        prompt = self.val.tokens.read(self.val.first + start, length).tolist()
        free = model.config.max_position_embeddings - length
        options = GenerationOptions(max_new_tokens=min(_SAMPLE, free))
        written = generate_ids(model, [prompt], options, end_of_text(self.tokenizer))[0].ids
        before, after = self.tokenizer.decode(prompt), self.tokenizer.decode(written)
        return f"  {before!r} goes on {after!r}"


def shown_lines(lines: Sequence[int], limit: int = 8) -> str:
    """Line numbers for a message: the first ones.

    >>> shown_lines([3, 1, 4])
    'lines 3, 1, 4'
    """
    more = ", ..." if len(lines) > limit else ""
    return f"lines {', '.join(map(str, lines[:limit]))}{more}"


def read_data(config: TrainConfig) -> RunData | TextData:
    """Read vocabulary and both parts of the data, and say what was skipped or cut.

    Raises:
        InputError: naming the file, if one cannot be read or holds nothing to learn from.
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
    """How shards are made."""

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
    others = ("tokenizer.json", "vocab.txt", "best")
    if path.is_dir() and not any((path / name).exists() for name in others):
        return BpeTokenizer.from_folder(path)  # GPT-2's and Qwen's own files
    return load_tokenizer(path)
