"""Training data as the model sees it: the tokens of examples, and the examples with the highest loss.

batch(conversations, tokenizer).places             # each token, its target, and whether the loss counts it
data(model, tokenizer, conversations).hardest      # the examples with the highest loss
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from minigpt.data.batches import EncodedExamples, encode_conversation, encode_conversations
from minigpt.data.chat_encoding import encode_chat_conversation
from minigpt.data.conversation import Conversation
from minigpt.families.registry import LanguageModel
from minigpt.generation.conversation import token_text
from minigpt.lens.results import Bars, Part, Table, View, shown
from minigpt.lens.words import Say
from minigpt.tokenization.subword import SubwordTokenizer
from minigpt.training.loss import token_cross_entropy
from minigpt.training.run_data import PLAIN_TEMPLATE
from minigpt.weights.pretrained import AnyTokenizer

__all__ = ["Data", "Example", "batch", "data", "encode"]


def encode(
    conversations: Sequence[Conversation], tokenizer: AnyTokenizer, max_length: int
) -> EncodedExamples:
    """Encode conversations as training does: with a chat template if the tokenizer is a SubwordTokenizer.

    For other tokenizers: question <sep> answer.

    Raises:
        InputError: if max_length leaves no token of an answer, or a chat template fails.
    """
    if isinstance(tokenizer, SubwordTokenizer):
        if tokenizer.chat_template is None:
            tokenizer = tokenizer.with_chat_template(PLAIN_TEMPLATE)
        return encode_conversations(conversations, tokenizer, max_length, encode_chat_conversation)
    return encode_conversations(conversations, tokenizer, max_length, encode_conversation)


class Place(NamedTuple):
    """One position in a row of a batch: the token that the model reads there, and the target."""

    row: int
    reads: str
    id: int
    target: str
    target_id: int
    is_token: bool  # False: the target is padding
    counts: bool  # True: this target is a part of the loss


@dataclass(frozen=True)
class Example(View):
    """A view of a training batch: rows of tokens, padded to the length of the longest row."""

    lines: list[int]
    places: list[Place]
    loss_on: str

    def parts(self, say: Say) -> list[Part]:
        """Return the tables and charts of this view, translated by `say`."""
        found: list[Part] = []
        counted = []
        for number, line in enumerate(self.lines):
            mine = [place for place in self.places if place.row == number]
            rows = [
                (i, p.reads, p.id, p.target, p.target_id, int(p.is_token), "✓" if p.counts else "")
                for i, p in enumerate(mine)
            ]
            counted.append(float(sum(place.counts for place in mine)))
            title = say(
                "line {line}: {count} of {tokens} targets count (loss_on={loss_on})",
                line=line,
                count=sum(place.counts for place in mine),
                tokens=sum(place.is_token for place in mine),
                loss_on=self.loss_on,
            )
            columns = ("", say("reads"), "id", say("target"), "id", say("mask"), say("counts"))
            found.append(Table(title, columns, rows, (0, 2, 4, 5)))
        lines = [say("line {line}", line=line) for line in self.lines]
        return [*found, Bars(say("targets that count"), lines, counted)]

    def headline(self, say: Say) -> dict[str, str]:
        """Return a summary of this view: one table row, as a dict {column title: cell}."""
        return {say("counts"): str(sum(place.counts for place in self.places))}


def batch(
    conversations: Sequence[Conversation],
    tokenizer: AnyTokenizer,
    max_length: int = 256,
    loss_on: Literal["answer", "all"] = "answer",
) -> Example:
    """Return a view of the batch that training would make of these conversations."""
    encoded = encode(conversations, tokenizer, max_length)
    made = encoded.batch(np.arange(len(encoded)))
    counts = made.answer_mask if loss_on == "answer" else made.token_mask

    def text(index: int) -> str:
        return shown(token_text(tokenizer, index))

    places = [
        Place(row, text(index), index, text(target), target, is_token, is_counted)
        for row, cells in enumerate(
            zip(*(part.tolist() for part in (made.input_ids, made.targets, made.token_mask, counts)))
        )
        for index, target, is_token, is_counted in zip(*cells)
    ]
    return Example(encoded.lines.tolist(), places, loss_on)


class Hard(NamedTuple):
    """A training example whose answer has a high loss."""

    line: int
    loss: float  # nats per token of its answers
    question: str
    answer: str
    worst: str  # the token with the highest loss, and this loss in nats


class Costly(NamedTuple):
    """A token of the vocabulary, with the sum and the mean of its losses over all answers."""

    text: str
    number: int
    total: float  # sum of its losses in nats
    mean: float


@dataclass(frozen=True)
class Data(View):
    """A view of training data: examples with the highest loss, and tokens with the highest total loss."""

    loss: float  # nats per token of all answers
    examples: int
    hardest: list[Hard]
    costly: list[Costly]
    losses: npt.NDArray[np.float64]  # (examples,)  mean loss of each example's answers, in file order

    def parts(self, say: Say) -> list[Part]:
        """Return the tables and charts of this view, translated by `say`."""
        title = say(
            "{count} examples, {loss} nats a token; the hardest ones",
            count=f"{self.examples:,}",
            loss=f"{self.loss:.4f}",
        )
        columns = (say("line"), say("loss"), say("question"), say("answer"), say("worst token"))
        rows = [(h.line, f"{h.loss:.3f}", shown(h.question), shown(h.answer), h.worst) for h in self.hardest]
        whole = float(self.losses.size and sum(c.total for c in self.costly))
        tokens = [(c.text, f"{c.number:,}", f"{c.total:.1f}", f"{c.mean:.3f}") for c in self.costly]
        costly = Table(
            say("the tokens that cost most"),
            (say("token"), say("number"), say("nats"), say("mean")),
            tokens,
            (1, 2, 3),
        )
        names = [c.text for c in self.costly]
        bars = Bars(say("the tokens that cost most"), names, [c.total for c in self.costly])
        return [Table(title, columns, rows, (0, 1)), costly, *([bars] if whole else [])]

    def headline(self, say: Say) -> dict[str, str]:
        """Return a summary of this view: one table row, as a dict {column title: cell}."""
        return {say("loss"): f"{self.loss:.4f}", say("hardest"): shown(self.hardest[0].question)}


@torch.inference_mode()
def data(
    model: LanguageModel,
    tokenizer: AnyTokenizer,
    conversations: Sequence[Conversation],
    count: int = 10,
    batch_size: int = 64,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Data:
    """Measure the loss of each example's answers, and the total loss of each token that occurs in answers.

    Args:
        count: number of examples in the result, and also number of tokens. These are the examples with the
            highest loss per token, and the tokens with the highest total loss.
        on_progress: called with the number of examples measured so far.
    """
    encoded = encode(conversations, tokenizer, model.config.max_position_embeddings + 1)
    device = next(model.parameters()).device
    sums, worst = np.zeros(len(encoded)), [(0.0, 0)] * len(encoded)
    totals: dict[int, list[float]] = {}
    was_training, done = model.training, 0
    model.eval()
    for some in encoded.in_order(batch_size):
        made = some.to(device)
        targets = made.targets[made.answer_mask]  # (P,), P tokens of answers
        hidden = model.base_model(made.input_ids)[made.answer_mask]  # (P, C)
        nats = token_cross_entropy(model.lm_head, hidden, targets).double().tolist()
        owners = some.rows[np.nonzero(some.answer_mask.numpy())[0]].tolist()
        for row, index, value in zip(owners, targets.tolist(), nats):
            sums[row] += value
            worst[row] = max(worst[row], (value, index))
            totals.setdefault(index, []).append(value)
        done += len(some.rows)
        on_progress(done)
    model.train(was_training)
    lengths = np.add.reduceat(encoded.is_answer, encoded.starts[:-1])
    means, by_line = sums / lengths, {each.line: each for each in conversations}
    hardest = []
    for row in np.argsort(-means, kind="stable")[:count].tolist():
        line, (value, index) = int(encoded.lines[row]), worst[row]
        last = by_line[line].exchanges[-1]
        token = f"{shown(token_text(tokenizer, index))} {value:.1f}"
        hardest.append(Hard(line, float(means[row]), last.question, last.answer, token))
    costly = [
        Costly(shown(token_text(tokenizer, index)), len(values), sum(values), sum(values) / len(values))
        for index, values in sorted(totals.items(), key=lambda item: -sum(item[1]))[:count]
    ]
    return Data(float(sums.sum() / lengths.sum()), len(encoded), hardest, costly, means)
