"""How much data a run has, and the loss of a model that knows nothing but how frequent each token is.

    summary = summarize(data, config)
    for sentence in summary.warnings(): ...    # before training: is it enough to learn from, to measure on?
    summary.as_dict()                          # into run.json, where the doctor reads it

Two losses are baselines. ln V is that of guessing evenly among V tokens. The unigram loss is that of a model
that has counted the tokens of the training part and looks at no context: whoever is not below it has learned
nothing about the data.
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
from minigpt.training.config import TrainConfig
from minigpt.training.run_data import AnyData, RunData

__all__ = ["LEARN_FROM", "MEASURE_ON", "DataSummary", "read_summary", "summarize"]

# A thousand tokens of two nats each are 3,000 bits, and every model here has more weights than that: it
# learns them by heart before it learns a rule.
LEARN_FROM = 1000
# The loss of a token varies about as much as it is large. So a mean over n tokens is right to 1 / sqrt(n) at
# best: 400 give 5 %.
MEASURE_ON = 400
_COUNTED = 1 << 22  # tokens of a text that are counted, at most: frequencies are known well before
_PIECE = 1 << 12
_PARTS = 4  # the frequencies of three measure the fourth


@dataclass(frozen=True)
class DataSummary:
    """Sizes count targets, the tokens whose loss counts."""

    unit: str  # what an example is: pairs, conversations, windows
    train_examples: int
    train_targets: int
    val_examples: int
    val_targets: int
    vocab_size: int
    train_unigram_loss: float  # nats a target, by the frequencies in the training part
    val_unigram_loss: float  # by the same frequencies
    held_out_unigram_loss: float  # of each quarter of the training part by the others: what new data costs
    is_same: bool  # one file is learned from and measured on

    @property
    def uniform_loss(self) -> float:
        """Of guessing evenly, nats."""
        return math.log(self.vocab_size)

    @property
    def val_error(self) -> float:
        """How far chance takes the validation loss, as a share of it."""
        return 1 / math.sqrt(self.val_targets)

    def warnings(self) -> Iterator[str]:
        """What is too small, and what would help: a sentence each."""
        if self.train_targets < LEARN_FROM:
            yield (
                f"{self.train_targets:,} tokens to learn from ({self._size(self.train_examples)}) are so few "
                f"that a model learns them by heart and nothing else: add {self.unit}, to {LEARN_FROM:,} "
                "tokens at least"
            )
        if self.val_targets < MEASURE_ON:
            yield (
                f"{self.val_targets:,} tokens to measure on ({self._size(self.val_examples)}) give a loss "
                f"that is right to {self.val_error:.0%} at best: measure on more, {MEASURE_ON:,} tokens at "
                "least"
            )
        if self.is_same:
            yield (
                "the validation data is the training data: its loss says nothing about other data; "
                "`minigpt split` makes two files of one"
            )

    def _size(self, count: int) -> str:
        return f"{count:,} {self.unit if count != 1 else self.unit.removesuffix('s')}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def read_summary(value: object) -> DataSummary | None:
    """What `as_dict` gave; None for anything else, such as an earlier version's."""
    if not isinstance(value, dict):
        return None
    for item in dataclasses.fields(DataSummary):
        if type(value.get(item.name)) is not item.type:
            return None
    found = DataSummary(**{item.name: value[item.name] for item in dataclasses.fields(DataSummary)})
    is_usable = min(found.train_targets, found.val_targets, found.vocab_size - 1) > 0
    return found if is_usable else None


def summarize(data: AnyData, config: TrainConfig) -> DataSummary:
    """Count the targets of both parts; of a long text, a sample of some million."""
    train, part_of = _targets(data.train, config)
    val, _ = _targets(data.val, config)
    vocab_size = data.tokenizer.get_vocab_size()
    parts = np.bincount(part_of * vocab_size + train, minlength=_PARTS * vocab_size)
    parts = parts.reshape(_PARTS, vocab_size)  # how often each token stands in each part
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
    """The loss of each token by its frequency, (V,).

    A token that was not seen has a share, too: as many new ones are expected as there were first ones
    (Witten and Bell, https://doi.org/10.1109/18.87000), and each is as likely as another.
    """
    seen = max(1, int(np.count_nonzero(counts)))
    losses: npt.NDArray[np.float64] = -np.log((counts + seen / len(counts)) / (counts.sum() + seen))
    return losses


def _targets(
    part: EncodedExamples | TextPart, config: TrainConfig
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The ids that are predicted and count, (P,), and which of `_PARTS` parts each belongs to, (P,).

    Rows with the same answers are in the same part: a question asked in another way is no new one.
    """
    if isinstance(part, EncodedExamples):
        counts = part.is_answer.copy() if config.loss_on == "answer" else np.ones(len(part.ids), dtype=bool)
        counts[part.starts[:-1]] = False  # the first of a row has nothing before it
        answers: dict[bytes, int] = {}
        spans = itertools.pairwise(part.starts.tolist())
        keys = (part.ids[a:b][part.is_answer[a:b]].tobytes() for a, b in spans)
        groups = np.array([answers.setdefault(key, len(answers)) for key in keys])
        return part.ids[counts].astype(np.int64), np.repeat(groups, part.lengths)[counts] % _PARTS
    size = max(1, min(_PIECE, len(part) // (4 * _PARTS)))
    pieces = range(1, len(part), size)  # the first token has nothing before it, either
    every = -(-len(pieces) * size // _COUNTED)
    some = [part.tokens.read(part.first + at, min(size, len(part) - at)) for at in pieces[::every]]
    numbers = np.repeat(np.arange(len(some)), [len(piece) for piece in some])
    return np.concatenate(some), numbers % _PARTS
