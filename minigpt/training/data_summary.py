"""Measures how much data a run has, and the loss of a model that only knows the frequency of each token.

    summary = summarize(data, config)
    for sentence in summary.warnings(): ...    # warns before training if there is too little data
    summary.as_dict()                          # is saved in run.json, for `minigpt doctor`

A trained model is compared with two losses. ln V is the loss of a uniform guess among V tokens. The unigram
loss is the loss of a model that predicts the token frequencies of the training data, without context. If a
model's loss is not below the unigram loss, the model has learned nothing from the context.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from minigpt.data.batches import EncodedExamples
from minigpt.data.windows import TextPart
from minigpt.errors import Message
from minigpt.training.config import TrainConfig
from minigpt.training.run_data import AnyData, RunData

__all__ = ["LEARN_FROM", "MEASURE_ON", "DataSummary", "read_summary", "summarize"]

# With fewer training targets (tokens that the loss counts) than this, a warning appears. A thousand targets
# of two nats each are about 3,000 bits of information. Every model of minigpt has more than 3,000 weights, so
# it memorises such data instead of learning rules.
LEARN_FROM = 1000
# With fewer validation targets than this, a warning appears. The losses of single tokens have a standard
# deviation of about their mean. So the relative error of a mean over n tokens is about 1 / sqrt(n): 5 % for
# 400 tokens.
MEASURE_ON = 400
# At most this many tokens of a long text are counted: more would hardly change the token frequencies.
_COUNTED = 1 << 22
_PIECE = 1 << 12
_SIZES = {  # kind of example -> text for a number of examples
    "pairs": "{count:,} pair{several}",
    "conversations": "{count:,} conversation{several}",
    "pairs of answers": "{count:,} pair{several} of answers",
    "prompts": "{count:,} prompt{several}",
    "windows": "{count:,} window{several}",
    "examples": "{count:,} example{several}",
}
# For held_out_unigram_loss, the training data is divided into this number of parts. The loss of each part
# uses the token frequencies of the other parts.
_PARTS = 4


@dataclass(frozen=True)
class DataSummary:
    """Sizes of the data, and the losses of simple guesses, with which a model's loss can be compared.

    A "target" is a token that the loss counts.
    """

    unit: str  # kind of example: pairs, conversations, windows, ...
    train_examples: int
    train_targets: int
    val_examples: int
    val_targets: int
    vocab_size: int
    train_unigram_loss: float  # nats per training target, with the token frequencies of the training data
    val_unigram_loss: float  # nats per validation target, with the token frequencies of the training data
    # nats per training target: loss of each quarter of the training data, with the token frequencies of the
    # other three quarters
    held_out_unigram_loss: float
    is_same: bool  # True if training and validation data are the same

    @property
    def uniform_loss(self) -> float:
        """Return the loss of a uniform guess, in nats."""
        return math.log(self.vocab_size)

    @property
    def val_error(self) -> float:
        """Return the relative statistical error of a validation loss on this data."""
        return 1 / math.sqrt(self.val_targets)

    def warnings(self) -> Iterator[str]:
        """Yield warnings with advice: training or validation data is too small, or the two are the same."""
        if self.train_targets < LEARN_FROM:
            yield Message(
                "{count:,} tokens to learn from ({size}) are so few that a model learns them by heart and "
                "nothing else: add data, to {least:,} tokens at least",
                count=self.train_targets,
                size=self._size(self.train_examples),
                least=LEARN_FROM,
            )
        if self.val_targets < MEASURE_ON:
            yield Message(
                "{count:,} tokens to measure on ({size}) give a loss that is right to {error:.0%} at best: "
                "measure on more, {least:,} tokens at least",
                count=self.val_targets,
                size=self._size(self.val_examples),
                error=self.val_error,
                least=MEASURE_ON,
            )
        if self.is_same:
            yield Message(
                "the validation data is the training data: its loss says nothing about other data; "
                "`minigpt split` makes two files of one"
            )

    def _size(self, count: int) -> str:
        return Message(
            _SIZES[self.unit if self.unit in _SIZES else "examples"],
            count=count,
            several="" if count == 1 else "s",
        )

    def as_dict(self) -> dict[str, Any]:
        """Return a dictionary for JSON."""
        return dataclasses.asdict(self)


def read_summary(value: object) -> DataSummary | None:
    """Build a DataSummary from the result of `as_dict`. Return None for any other value (an older format)."""
    if not isinstance(value, dict):
        return None
    for item in dataclasses.fields(DataSummary):
        if type(value.get(item.name)) is not item.type:
            return None
    found = DataSummary(**{item.name: value[item.name] for item in dataclasses.fields(DataSummary)})
    is_usable = min(found.train_targets, found.val_targets, found.vocab_size - 1) > 0
    return found if is_usable else None


def summarize(data: AnyData, config: TrainConfig) -> DataSummary:
    """Measure training and validation data. In a long text, at most 4 million tokens are counted."""
    train, part_of = _targets(data.train, config)
    val, _ = _targets(data.val, config)
    vocab_size = data.tokenizer.get_vocab_size()
    parts = np.bincount(part_of * vocab_size + train, minlength=_PARTS * vocab_size)
    parts = parts.reshape(_PARTS, vocab_size)  # (_PARTS, V): how often each token occurs in each part
    counts = parts.sum(axis=0)
    held_out = 0.0
    for own in parts:
        held_out += float(own @ _unigram_losses(counts - own))
    if isinstance(data, RunData):
        unit, sizes = data.examples, (len(data.train), len(train), len(data.val), len(val))
    else:
        unit = "windows"
        sizes = (data.train.rows, len(data.train) - 1, data.val.rows, len(data.val) - 1)
    losses = _unigram_losses(counts)
    return DataSummary(
        unit,
        *sizes,
        vocab_size=vocab_size,
        train_unigram_loss=float(losses[train].mean()),
        val_unigram_loss=float(losses[val].mean()),
        held_out_unigram_loss=held_out / len(train),
        is_same=data.train.fingerprint == data.val.fingerprint,
    )


def _unigram_losses(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Compute the loss of each token of the vocabulary from its count: (V,) -> (V,).

    Tokens that do not occur get a probability, too: n / V is added to each of the V counts. n is the number
    of different tokens that occur (after Witten and Bell, https://doi.org/10.1109/18.87000).
    """
    seen = max(1, int(np.count_nonzero(counts)))
    losses: npt.NDArray[np.float64] = -np.log((counts + seen / len(counts)) / (counts.sum() + seen))
    return losses


def _targets(
    part: EncodedExamples | TextPart, config: TrainConfig
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the ids of the P targets, (P,), and for each target the index of the part that it is in, (P,).

    The data is divided into _PARTS parts, with the indices 0 to _PARTS - 1. Rows with the same answer are in
    the same part, because the same answer to a rephrased question is not new data.
    """
    if isinstance(part, EncodedExamples):
        counts = part.is_answer.copy() if config.loss_on == "answer" else np.ones(len(part.ids), dtype=bool)
        counts[part.starts[:-1]] = False  # the first token of a row is never predicted
        answers: dict[bytes, int] = {}
        spans = itertools.pairwise(part.starts.tolist())
        keys = (part.ids[a:b][part.is_answer[a:b]].tobytes() for a, b in spans)
        groups = np.array([answers.setdefault(key, len(answers)) for key in keys])
        return part.ids[counts].astype(np.int64), np.repeat(groups, part.lengths)[counts] % _PARTS
    size = max(1, min(_PIECE, len(part) // (4 * _PARTS)))
    pieces = range(1, len(part), size)  # from 1 on, because the first token is never predicted
    every = -(-len(pieces) * size // _COUNTED)
    some = [part.tokens.read(part.first + at, min(size, len(part) - at)) for at in pieces[::every]]
    numbers = np.repeat(np.arange(len(some)), [len(piece) for piece in some])
    return np.concatenate(some), numbers % _PARTS
