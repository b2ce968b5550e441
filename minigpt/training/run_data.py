"""What a run learns from and is measured on: questions and answers, or plain text.

The loop asks both for the same: a plan (which rows stand in batch m), batches of rows, where a batch comes
from, and a sample to print at an evaluation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from minigpt.console.terminal import warn
from minigpt.data.batches import Batch, BatchPlan, EncodedPairs, encode_pairs
from minigpt.data.memory_mapped import Tokens
from minigpt.data.reader import Pair, read_pairs
from minigpt.data.shards import characters_of, end_of_text, prepare
from minigpt.data.windows import TextPart, WindowPlan
from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel
from minigpt.generation.api import GenerationOptions, answer_questions, generate_ids
from minigpt.generation.native import without_warning
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenizer import Tokenizer
from minigpt.training.config import TrainConfig
from minigpt.training.lock import FolderLock
from minigpt.training.non_finite import shown_lines
from minigpt.weights.pretrained import AnyTokenizer, load_tokenizer

__all__ = ["RunData", "TextData", "read_data"]

SHARDS = "shards"  # in the output folder
_SAMPLE = 48  # new tokens of a sample
_PROMPT = 32  # tokens of text that a sample goes on from
_NAMED = 5  # windows that a message names


@dataclass(frozen=True)
class RunData:
    """Questions and answers."""

    tokenizer: Tokenizer
    train: EncodedPairs
    val: EncodedPairs
    val_pairs: list[Pair]

    @property
    def sentence(self) -> str:
        """How much it is."""
        return f"{len(self.train):,} pairs to learn from, {len(self.val):,} to measure on"

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
        """What training part, validation part and vocabulary come from, for a message."""
        return str(config.train_data), str(config.val_data), str(config.vocab_path)

    unit = "lines"  # what places are

    def places(self, batch: Batch) -> list[int]:
        """Where a batch of the training part stands: lines of the file."""
        return [int(line) for line in self.train.lines[batch.rows]]

    def where(self, places: Sequence[int], config: TrainConfig) -> str:
        """The same for a message."""
        return f"{shown_lines(places)} of {config.train_data}"

    @without_warning()
    def sample(self, model: LanguageModel, number: int) -> str:
        """The model's answer to a question of the validation part; empty if there is no room for one."""
        pair = self.val_pairs[number % len(self.val_pairs)]
        room = model.config.max_position_embeddings - len(pair.question) - 1
        if room <= 0:
            return ""
        options = GenerationOptions(max_new_tokens=min(_SAMPLE, room))
        answer = answer_questions(model, self.tokenizer, [pair.question], options)[0]
        return f"  Q: {pair.question}  A: {answer.text}"


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
        """What training part, validation part and vocabulary come from, for a message."""
        val = config.val_text or f"the last {config.val_fraction:.0%} of {config.text}"
        return str(config.text), str(val), f"--tokenizer {config.tokenizer}"

    unit = "windows"  # what places are

    def places(self, batch: Batch) -> list[int]:
        """Where a batch of the training part stands: the numbers of its windows' first tokens."""
        return [int(start) for start in batch.rows]

    def where(self, places: Sequence[int], config: TrainConfig) -> str:
        """The same for a message."""
        text = self.tokenizer.decode(
            self.train.tokens.read(places[0], min(_PROMPT, len(self.train) - places[0])).tolist()
        )
        starts = ", ".join(f"{start:,}" for start in places[:_NAMED])
        return f"the windows from tokens {starts}, ... of {config.text}, the first of which begins {text!r}"

    @without_warning()
    def sample(self, model: LanguageModel, number: int) -> str:
        """How the model goes on from a place of the validation part, another one each time."""
        length = min(_PROMPT, model.config.max_position_embeddings // 2, len(self.val))
        # the golden ratio's fractions fall ever into the largest gap that is left
        start = int((number * 0.6180339887498949) % 1 * (len(self.val) - length))
        prompt = self.val.tokens.read(self.val.first + start, length).tolist()
        room = model.config.max_position_embeddings - length
        options = GenerationOptions(max_new_tokens=min(_SAMPLE, room))
        written = generate_ids(model, [prompt], options, end_of_text(self.tokenizer))[0].ids
        before, after = self.tokenizer.decode(prompt), self.tokenizer.decode(written)
        return f"  {before!r} goes on {after!r}"


def read_data(config: TrainConfig) -> RunData | TextData:
    """Read vocabulary and both parts of the data, and say what was skipped or cut.

    Raises:
        InputError: naming the file, if one cannot be read or holds nothing to learn from.
    """
    return _read_pairs(config) if config.text is None else _read_text(config, config.text)


def _read_pairs(config: TrainConfig) -> RunData:
    tokenizer = Tokenizer(config.vocab_path)
    encoded = []
    pairs: list[Pair] = []
    for path in (config.train_data, config.val_data):
        pairs, report = read_pairs(path, strict=config.strict, every_turn=True)
        report.print_summary()
        try:
            part = encode_pairs(pairs, tokenizer, config.max_length)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        if part.n_cut:
            lost = (
                f", {part.n_without_answer} of them left out: no answer remained"
                if part.n_without_answer
                else ""
            )
            warn(
                f"{path}: {part.n_cut} of {len(pairs)} pairs are longer than max_length={config.max_length} "
                f"and were cut{lost}"
            )
        unknown = int((part.ids == tokenizer.unk_token_id).sum())
        if unknown:
            warn(f"{path}: {unknown} characters are not in {config.vocab_path} and became <unk>")
        encoded.append(part)
    return RunData(tokenizer, encoded[0], encoded[1], pairs)


class _Making(TypedDict):
    """How shards are made."""

    workers: int
    lock: Callable[[Path], None]


def _read_text(config: TrainConfig, text: Path) -> TextData:
    folder = config.output / SHARDS if config.shards is None else config.shards
    with FolderLock() as held:
        settings: _Making = {"workers": config.workers, "lock": lambda where: held.acquire(where, wait=True)}
        tokenizer = _text_tokenizer(config, text, folder, settings)
        tokens = prepare(text, folder, tokenizer, **settings)
        if config.val_text is not None:
            others = prepare(config.val_text, folder / "val", tokenizer, **settings)
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


def _text_tokenizer(config: TrainConfig, text: Path, folder: Path, settings: _Making) -> AnyTokenizer:
    if config.tokenizer == "char":
        return characters_of(text, folder, **settings)
    path = Path(config.tokenizer)
    if path.is_dir() and not (path / "tokenizer.json").exists() and not (path / "best").exists():
        return BpeTokenizer.from_folder(path)  # GPT-2's and Qwen's own files
    return load_tokenizer(path)
