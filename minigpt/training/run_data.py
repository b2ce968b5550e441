"""The data of a run: questions and answers (RunData), or plain text (TextData).

All kinds of data have the methods of `AnyData`. For example, they plan which rows are in which batch, say
where a batch's rows are in the training data, and give a sample of the model's output for an evaluation.
Texts with labels are in classification.py.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypedDict

from minigpt.console.command_line import show
from minigpt.console.language import say
from minigpt.console.terminal import note, warn
from minigpt.data.batches import (
    Batch,
    BatchPlan,
    Encode,
    EncodedExamples,
    encode_conversation,
    encode_conversations,
)  # fmt: skip
from minigpt.data.chat_encoding import encode_chat_conversation
from minigpt.data.conversation import Conversation
from minigpt.data.corpus import QuietTextOptions, TextOptions, find_sources, read_sources
from minigpt.data.memory_mapped import Tokens
from minigpt.data.preferences import (
    EncodedPreferences,
    Preference,
    encode_preferences,
    read_preferences,
    split_preferences,
)
from minigpt.data.prompts import EncodedPrompts, encode_prompts, read_prompts
from minigpt.data.reader import read_conversations
from minigpt.data.shards import VOCABULARY, end_of_text, prepare
from minigpt.data.split import split_conversations
from minigpt.data.windows import TextPart, WindowPlan
from minigpt.errors import InputError, Message
from minigpt.families.registry import LanguageModel
from minigpt.finetuning.masked_lm import MASK, fill_masks, mask_token_id
from minigpt.generation.api import GenerationOptions, generate_ids
from minigpt.generation.conversation import QuestionAnswering, question_ids
from minigpt.generation.generation_config import PromptFormat
from minigpt.generation.native import without_warning
from minigpt.storage.regular_files import read_text
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenization.subword import SubwordTokenizer
from minigpt.tokenizer import Tokenizer
from minigpt.training.config import TrainConfig
from minigpt.training.finetune_config import FinetuneConfig
from minigpt.training.lock import lock_folder
from minigpt.weights.pretrained import AnyTokenizer, load_tokenizer

__all__ = ["AnyData", "RunData", "TextData", "read_data", "shown_lines"]

# A function of (conversations, tokenizer, max_length, function that encodes one conversation). It returns the
# encoded conversations.
EncodeAll: TypeAlias = Callable[[Sequence[Conversation], Any, int, Encode], EncodedExamples]
HELD_OUT = Path()  # this value of val_data means: hold out a part of train_data for validation
# A chat template for subword tokenizers without one. It joins messages as minigpt.data.conversation does.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'system' %}{{ '\\n' }}{% else %}{{ eos_token }}{% endif %}{% endfor %}"
)
SHARDS = "shards"  # name of the folder for the encoded text, in the output folder
_SAMPLE = 48  # number of tokens that the model generates for the sample at an evaluation
_PROMPT = 32  # number of tokens of the sample's prompt
_NAMED = 5  # largest number of windows (of plain text) that a message lists


class AnyData(Protocol):
    """The attributes and methods that every kind of training data has."""

    @property
    def tokenizer(self) -> AnyTokenizer:
        """Return the tokenizer of the training and the validation data."""

    @property
    def train(self) -> Any:
        """Return the training data: an object with `batch`, `fingerprint`, `lengths` and `answer_share`."""

    @property
    def val(self) -> Any:
        """Return the validation data: an object with `in_order`, `fingerprint`, `rows` and `mean_targets`."""

    @property
    def sentence(self) -> str:
        """Return a sentence with the sizes of the training and the validation data."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return warnings about the data. With --size, they are printed after it has chosen max_length."""

    @property
    def unit(self) -> str:
        """Return the unit of `positions`: "lines" of a file, or "windows" (block_size tokens) of a text."""

    def plan(self, config: TrainConfig) -> Any:
        """Plan which rows are in which batch. plan.rows(i): rows of batch i; len(plan): batches per epoch."""

    def shapes(self, plan: Any, pad_to: int) -> list[tuple[int, int]]:
        """Return (rows, tokens per row) of each batch of an epoch."""

    def names(self, config: TrainConfig) -> tuple[str, str, str]:
        """Return the names of training data, validation data and vocabulary, as messages show them."""

    def positions(self, batch: Any) -> list[int]:
        """Return each row's place in the training data: its line number, or the first token of its window."""

    def where(self, positions: Sequence[int], config: TrainConfig) -> str:
        """Describe places in the training data (a result of `positions`) in words, for a message."""

    def sample(self, model: Any, number: int) -> str:
        """Return a sample of the model's output. Each `number` selects a different prompt."""


_HELD_OUT = "no --val_data: {val:,} of {all:,} {what} of {path} are measured on and not learned from"


@dataclass(frozen=True)
class RunData:
    """The data of a run on questions and answers, or conversations."""

    tokenizer: AnyTokenizer
    train: EncodedExamples | EncodedPreferences
    val: EncodedExamples | EncodedPreferences
    val_conversations: list[Conversation]
    warnings: tuple[str, ...] = ()  # about cut examples and unknown characters; the run prints them

    @property
    def sentence(self) -> str:
        """Return a sentence with the sizes of the training and the validation data."""
        text = "{train:,} {examples} to learn from, {val:,} to measure on"
        return Message(text, train=len(self.train), examples=self.examples, val=len(self.val))

    @property
    def examples(self) -> str:
        """Return the word for the examples in messages, such as "conversations" or "pairs"."""
        if isinstance(self.train, EncodedPreferences):
            return Message("pairs of answers")
        if isinstance(self.train, EncodedPrompts):
            return Message("prompts")
        several = any(len(each.exchanges) > 1 for each in self.val_conversations)
        return Message("conversations" if several else "pairs")

    def plan(self, config: TrainConfig) -> BatchPlan:
        """Plan which examples are in which batch."""
        return BatchPlan(
            self.train,
            batch_size=config.batch_size,
            tokens_per_batch=config.tokens_per_batch // self._rows,
            pad_to=config.max_length if config.pad_to_max_length else 0,
            by_length=config.by_length,
            seed=config.seed,
        )

    @property
    def _rows(self) -> int:
        """Return the number of rows of one example in a batch: 2 for pairs of answers, or else 1."""
        return 2 if isinstance(self.train, EncodedPreferences) else 1

    def shapes(self, plan: BatchPlan | WindowPlan, pad_to: int) -> list[tuple[int, int]]:
        """Return (rows, tokens per row) of each batch of an epoch."""
        assert isinstance(plan, BatchPlan)
        return [(self._rows * count, width) for count, width in plan.shapes(self.train, pad_to)]

    def names(self, config: TrainConfig) -> tuple[str, str, str]:
        """Return the names of training data, validation data and vocabulary, as messages show them."""
        val = f"a part of {config.train_data}" if config.val_data == HELD_OUT else str(config.val_data)
        return str(config.train_data), val, _tokenizer_name(config)

    unit = "lines"  # `positions` returns line numbers

    def positions(self, batch: Batch) -> list[int]:
        """Return the line numbers, in the training file, of a batch's rows."""
        return [int(line) for line in self.train.lines[batch.rows]]

    def where(self, positions: Sequence[int], config: TrainConfig) -> str:
        """Describe some lines of the training data in words, for a message."""
        return Message("{lines} of {path}", lines=shown_lines(positions), path=config.train_data)

    @without_warning()
    def sample(self, model: LanguageModel, number: int) -> str:
        """Let the model answer a validation question, as a sample of its output.

        Returns "" if the question fills the model's context, so that there is no space for an answer.
        """
        question = self.val_conversations[number % len(self.val_conversations)].exchanges[0].question
        form: PromptFormat = "chat" if isinstance(self.tokenizer, SubwordTokenizer) else "question"
        free = model.config.max_position_embeddings - len(question_ids(self.tokenizer, form, question))
        if free <= 0:
            return ""
        options = GenerationOptions(max_new_tokens=min(_SAMPLE, free))
        answer = QuestionAnswering(model, self.tokenizer, form, options).answers([question])[0]
        return f"  Q: {question}  A: {answer.text}"


@dataclass(frozen=True)
class TextData:
    """The data of a run on plain text."""

    tokenizer: AnyTokenizer
    train: TextPart
    val: TextPart
    warnings: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """Return a sentence with the sizes of the training and the validation data."""
        text = "{train:,} tokens to learn from, {val:,} to measure on"
        return Message(text, train=len(self.train), val=len(self.val))

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
        """Return the names of training data, validation data and vocabulary, as messages show them."""
        val = config.val_text or f"the last {config.val_fraction:.0%} of {config.text}"
        return str(config.text), str(val), f"--tokenizer {config.tokenizer}"

    unit = "windows"  # `positions` returns where windows of block_size tokens begin

    def positions(self, batch: Batch) -> list[int]:
        """Return the first token of each window of a batch, as an index into the training text."""
        return [int(start) for start in batch.rows]

    def where(self, positions: Sequence[int], config: TrainConfig) -> str:
        """Describe some windows of the training text in words, for a message."""
        text = self.tokenizer.decode(
            self.train.tokens.read(positions[0], min(_PROMPT, len(self.train) - positions[0])).tolist()
        )
        starts = ", ".join(f"{start:,}" for start in positions[:_NAMED])
        template = "the windows from tokens {starts}, ... of {path}, the first of which begins {text!r}"
        return Message(template, starts=starts, path=config.text, text=text)

    @without_warning()
    def sample(self, model: LanguageModel, number: int) -> str:
        """Let the model continue a part of the validation text. Each `number` selects a different part."""
        length = min(_PROMPT, model.config.max_position_embeddings // 2, len(self.val))
        # multiples of the golden ratio spread the samples evenly over the text
        start = int((number * 0.6180339887498949) % 1 * (len(self.val) - length))
        prompt = self.val.tokens.read(self.val.first + start, length).tolist()
        free = model.config.max_position_embeddings - length
        options = GenerationOptions(max_new_tokens=min(_SAMPLE, free))
        written = generate_ids(model, [prompt], options, end_of_text(self.tokenizer))[0].ids
        before, after = self.tokenizer.decode(prompt), self.tokenizer.decode(written)
        return Message("  {before!r} goes on {after!r}", before=before, after=after)


@dataclass(frozen=True)
class MaskedTextData(TextData):
    """Plain text for masked language modelling. The tokens are hidden later, by MaskedTokenLoss."""

    def sample(self, model: LanguageModel, number: int) -> str:
        """Hide every eighth token of a part of the validation text, and show the model's predictions."""
        length = min(_PROMPT, model.config.max_position_embeddings, len(self.val))
        start = int((number * 0.6180339887498949) % 1 * (len(self.val) - length))
        ids = self.val.tokens.read(self.val.first + start, length).tolist()
        mask_id = mask_token_id(self.tokenizer)
        assert mask_id is not None
        places = range(min(4, length - 1), length, 8)
        hidden = [mask_id if place in places else token for place, token in enumerate(ids)]
        best = iter(each[0].token for each in fill_masks(model, hidden, mask_id, 1))
        shown = [self.tokenizer.decode([token]) for token in hidden]
        for place in places:
            shown[place] = f"[{self.tokenizer.decode([next(best)])}]"
        return f"  {''.join(shown)!r}"


def shown_lines(lines: Sequence[int], limit: int = 8) -> str:
    """Format line numbers for a message; at most `limit` numbers are listed.

    >>> shown_lines([3, 1, 4])
    'lines 3, 1, 4'
    """
    more = ", ..." if len(lines) > limit else ""
    return Message("lines {numbers}", numbers=", ".join(map(str, lines[:limit])) + more)


def read_data(config: TrainConfig) -> RunData | TextData:
    """Read the vocabulary, the training and the validation data. Print which records were skipped, and why.

    The result's `warnings` are not printed here, because --size may read the data again with another
    max_length.

    Raises:
        InputError: if a file cannot be read or holds no training example; the message names the file.
    """
    if isinstance(config, FinetuneConfig) and config.task == "dpo":
        return _read_preferences(config)
    if isinstance(config, FinetuneConfig) and config.task == "mlm":
        return _with_mask(config)
    if isinstance(config, FinetuneConfig) and config.task == "grpo":
        return _read_pairs(config, encode_prompts)
    return _read_pairs(config) if config.text is None else _read_text(config, config.text)


def _read_pairs(config: TrainConfig, encode_all: EncodeAll = encode_conversations) -> RunData:
    train, val = _read_parts(config)
    tokenizer = pair_tokenizer(config, (text for each in train for text in each.texts()))
    encoded, warnings = [], list[str]()
    for path, part in ((config.train_data, train), (config.val_data, val)):
        where = config.train_data if path == HELD_OUT else path
        one = _encode_part(config, where, part, tokenizer, encode_all)
        warnings += _warnings(config, where, len(part), one, Message("conversations"), tokenizer)
        encoded.append(one)
    if encode_all is encode_prompts:
        _warn_of_weights(config, train)
    elif (weights := encoded[0].weights) is not None:
        if not weights.any():
            raise InputError(
                f"{config.train_data}: the `weight` of every record is 0: there is nothing to learn"
            )
        show(
            f"weights of {config.train_data}: {weights.min():g} to {weights.max():g}, mean {weights.mean():g}"
        )
    return RunData(tokenizer, encoded[0], encoded[1], val, tuple(warnings))


def _read_parts(config: TrainConfig) -> tuple[list[Conversation], list[Conversation]]:
    """Read the conversations for training and validation."""
    parts: list[list[Conversation]] = []
    for path in (config.train_data, config.val_data):
        if parts and path == HELD_OUT:  # `path` is val_data here: train_data cannot be HELD_OUT
            with _cannot_be_divided(config, len(parts[0]), "conversations"):
                split = split_conversations(parts[0], 1 - config.val_fraction, config.seed)
            values = {"val": len(split.val), "all": len(parts[0]), "what": Message("conversations")}
            print(say(_HELD_OUT, **values, path=config.train_data))
            return split.train, split.val
        options = config.strict, config.encoding, config.field_names
        rewards = config.reward if isinstance(config, FinetuneConfig) and config.task == "grpo" else None
        # only the reward `exact` needs answers in the data file
        if rewards is not None and "exact" not in rewards:
            part, report = read_prompts(path, *options)
        else:
            part, report = read_conversations(path, *options)
        report.print_summary()
        parts.append(part)
    return parts[0], parts[1]


@contextlib.contextmanager
def _cannot_be_divided(config: TrainConfig, count: int, what: str) -> Iterator[None]:
    """Context manager for code that divides the data into training and validation.

    If the data is too small, that code raises an InputError with advice for `minigpt split`. This context
    manager replaces it by an InputError with advice for training.
    """
    try:
        yield
    except InputError:
        raise InputError(
            f"{config.train_data}: {count:,} {what} cannot be divided: give --val_data FILE, another "
            "--val_fraction, or more of them"
        ) from None


def _warn_of_weights(config: TrainConfig, conversations: Sequence[Conversation]) -> None:
    """Warn the user if the records have sample weights, but the task does not use them."""
    if any(each.weight != 1 and not math.isnan(each.weight) for each in conversations):
        warn(f"{config.train_data}: records have a `weight`, which counts in --task sft only")


def _read_preferences(config: FinetuneConfig) -> RunData:
    parts: list[list[Preference]] = []
    for path in (config.train_data, config.val_data):
        if parts and path == HELD_OUT:  # `path` is val_data here: train_data cannot be HELD_OUT
            pairs = parts[0]
            with _cannot_be_divided(config, len(pairs), "pairs of answers"):
                parts = [*split_preferences(pairs, 1 - config.val_fraction, config.seed)]
            values = {"val": len(parts[1]), "all": len(pairs), "what": Message("pairs of answers")}
            print(say(_HELD_OUT, **values, path=config.train_data))
            break
        part, report = read_preferences(path, config.strict, config.encoding, config.field_names)
        report.print_summary()
        parts.append(part)
    train, val = parts
    _warn_of_weights(config, [pair.chosen for pair in train])
    texts = (text for pair in train for one in (pair.chosen, pair.rejected) for text in one.texts())
    tokenizer = pair_tokenizer(config, texts)
    encode = encode_conversation if isinstance(tokenizer, Tokenizer) else encode_chat_conversation
    encoded, warnings = [], list[str]()
    for path, part in ((config.train_data, train), (config.val_data, val)):
        where = config.train_data if path == HELD_OUT else path
        try:
            encoded.append(encode_preferences(part, tokenizer, config.max_length, encode))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        what = Message("pairs of answers")
        warnings += _warnings(config, where, len(part), encoded[-1], what, tokenizer)
    return RunData(tokenizer, encoded[0], encoded[1], [pair.chosen for pair in val], tuple(warnings))


def pair_tokenizer(config: TrainConfig, texts: Iterable[str]) -> AnyTokenizer:
    """Return the tokenizer for conversations: the given model's tokenizer, or the one that --tokenizer names.

    A byte-level BPE or WordPiece tokenizer without a chat template gets PLAIN_TEMPLATE, which ends each
    question and each answer with the end-of-text token.

    Args:
        texts: texts of the training part, in which `--add_tokens from-data` looks for characters.

    Raises:
        InputError: if the tokenizer cannot be read.
    """
    if config.starts_from is not None:
        tokenizer = with_more_tokens(load_tokenizer(config.starts_from), config, texts)
    elif config.tokenizer == "char":
        tokenizer = Tokenizer(config.vocab_path)
    else:
        tokenizer = named_tokenizer(config.tokenizer)
    if isinstance(tokenizer, SubwordTokenizer) and tokenizer.chat_template is None:
        if tokenizer.eos_token_id is None:
            tokenizer = _with_end(tokenizer)
        tokenizer = tokenizer.with_chat_template(PLAIN_TEMPLATE)
    return tokenizer


def _with_end(tokenizer: SubwordTokenizer) -> SubwordTokenizer:
    """Return a copy of the tokenizer whose eos_token is the sep_token (such as BERT's [SEP]).

    The run's checkpoints contain this copy.
    """
    separator = tokenizer.named_tokens.get("sep_token")
    if separator not in tokenizer.special_tokens:
        raise InputError(
            "the tokenizer has neither a chat template nor a token that ends a text: name one of its special "
            'tokens in its tokenizer_config.json, such as "eos_token": "<|endoftext|>"'
        )
    note(f"the tokenizer has no eos_token: its sep_token {separator!r} ends each question and each answer")
    return tokenizer.with_eos_token(separator)


def with_more_tokens(tokenizer: AnyTokenizer, config: TrainConfig, texts: Iterable[str]) -> AnyTokenizer:
    """Return the tokenizer with the tokens of --add_tokens. Print their number."""
    if not config.add_tokens:
        return tokenizer
    if config.add_tokens == "from-data":
        seen = dict.fromkeys(character for text in texts for character in text)
        new = [c for c in seen if tokenizer.unknown_characters(c)]
    else:
        path = Path(config.add_tokens)
        try:
            new = [line for line in read_text(path, "utf-8-sig").splitlines() if line]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--add_tokens {path} must be from-data, or a text in UTF-8: {error}") from None
    larger = tokenizer.with_tokens(new)
    count = larger.get_vocab_size() - tokenizer.get_vocab_size()
    show(f"add_tokens: {count:,} new tokens, {larger.get_vocab_size():,} in all")
    return larger


def _encode_part(
    config: TrainConfig,
    path: Path,
    conversations: list[Conversation],
    tokenizer: AnyTokenizer,
    encode_all: EncodeAll,
) -> EncodedExamples:
    encode = encode_chat_conversation if isinstance(tokenizer, SubwordTokenizer) else encode_conversation
    try:
        return encode_all(conversations, tokenizer, config.max_length, encode)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _warnings(
    config: TrainConfig,
    path: Path,
    count: int,
    part: EncodedExamples | EncodedPreferences,
    what: str,
    tokenizer: AnyTokenizer,
) -> list[str]:
    """Return warnings about examples that were cut because of their length, and about unknown characters."""
    found: list[str] = []
    if part.n_cut:
        left_out = part.n_without_answer
        lost = Message(", {count} of them left out: no answer remained", count=left_out) if left_out else ""
        found.append(
            Message(
                "{path}: {cut} of {count:,} {what} are longer than max_length={most} and were cut{lost}",
                path=path,
                cut=part.n_cut,
                count=count,
                what=what,
                lost=lost,
                most=config.max_length,
            )
        )
    unknown = int((part.ids == tokenizer.unk_token_id).sum()) if isinstance(tokenizer, Tokenizer) else 0
    if unknown:
        more = Message("" if config.starts_from is None else "; --add_tokens from-data adds them")
        text = "{path}: {count} characters are not in {tokenizer} and became <unk>{more}"
        found.append(Message(text, path=path, count=unknown, tokenizer=_tokenizer_name(config), more=more))
    return found


def _tokenizer_name(config: TrainConfig) -> str:
    if config.starts_from is not None:
        return f"the tokenizer of {config.starts_from}"
    return str(config.vocab_path) if config.tokenizer == "char" else f"--tokenizer {config.tokenizer}"


class _ShardOptions(TypedDict):
    """Keyword arguments of the function `prepare`, which encodes a text into shard files."""

    options: TextOptions
    workers: int
    lock: Callable[[Path], None]


def _with_mask(config: FinetuneConfig) -> "MaskedTextData":
    """Read a text for masked language modelling. [MASK] is added as the last token of the vocabulary."""
    assert config.text is not None
    data = _read_text(config, config.text)
    return MaskedTextData(data.tokenizer.with_tokens([MASK]), data.train, data.val)


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
        own = _text_tokenizer(config, text, reading)
        tokens = prepare(text, folder, own, **options)
        tokenizer = Tokenizer(folder / VOCABULARY) if own is None else own
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


def _text_tokenizer(config: TrainConfig, text: Path, reading: TextOptions) -> AnyTokenizer | None:
    """Load the tokenizer for a text. Return None if the vocabulary is yet to be made from the text."""
    if config.starts_from is not None:
        quiet = QuietTextOptions(**dataclasses.asdict(reading))
        texts = read_sources(find_sources(text, quiet), options=quiet)
        return with_more_tokens(load_tokenizer(config.starts_from), config, texts)
    return None if config.tokenizer == "char" else named_tokenizer(config.tokenizer)


def named_tokenizer(name: str) -> AnyTokenizer:
    """Load the tokenizer that --tokenizer names: a vocab.json, a model folder, or a tokenizer's folder."""
    path = Path(name)
    others = ("tokenizer.json", "vocab.txt", "best")
    if path.is_dir() and not any((path / name).exists() for name in others):
        # a folder without these files has vocab.json and merges.txt, as OpenAI and Qwen publish them
        return BpeTokenizer.from_folder(path)
    return load_tokenizer(path)
