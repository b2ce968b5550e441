"""Attention: which tokens each head attends to, and how the loss changes without a head or a layer.

seen = attention(model, tokenizer, "四川的省会是哪里？")
seen.probabilities[layer, head]            # (T, T), each row sums to 1
ablate(model, tokenizer, [("四川的省会是哪里？", "成都。")]).heads     # rise of the loss in nats
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from minigpt.families.registry import LanguageModel
from minigpt.generation.generation_config import PromptFormat
from minigpt.lens.reading import Reading, read_question
from minigpt.lens.recorder import Change, as_row, read_logits, record, require_head, switched_off
from minigpt.lens.results import Floats, Heat, Part, Table, View, percent
from minigpt.lens.words import Say
from minigpt.weights.pretrained import AnyTokenizer

__all__ = ["Ablation", "Attention", "ablate", "attention"]


@dataclass(frozen=True)
class Attention(View):
    """A view of the attention weights of all heads on one text.

    Tables and charts show only the head `head` of the layer `layer`. None: all heads, or all layers.
    """

    pieces: list[str]  # (T) texts of the tokens
    probabilities: Floats  # (layers, heads, T, T)  row: query token; column: key token
    start: int  # index of the prompt's last token; from there on, the model predicts the answer
    layer: int | None = None
    head: int | None = None

    @property
    def chosen(self) -> list[tuple[int, int]]:
        """The heads to show, as pairs (layer, head)."""
        layers, heads = self.probabilities.shape[:2]
        return [
            (layer, head)
            for layer in (range(layers) if self.layer is None else [self.layer])
            for head in (range(heads) if self.head is None else [self.head])
        ]

    def as_dict(self) -> dict[str, object]:
        """Return the numbers as a dict for JSON, with the probabilities of the shown heads only."""
        heads = {
            f"blocks.{layer}.{head}": self.probabilities[layer, head].tolist() for layer, head in self.chosen
        }
        return {"pieces": self.pieces, "start": self.start, "probabilities": heads}

    def parts(self, say: Say) -> list[Part]:
        """Return the tables and charts of this view, translated by `say`."""
        maps: list[Part] = [
            Heat(say("layer {layer}, head {head}", layer=layer, head=head), self.probabilities[layer, head],
                 self.pieces, self.pieces)
            for layer, head in self.chosen
        ]  # fmt: skip
        if len(self.chosen) > 1:
            return [self._overview(say), *maps]
        (layer, head), T = self.chosen[0], len(self.pieces)
        rows = []
        for place in range(T):
            written = self.pieces[place + 1] if self.start <= place < T - 1 else ""
            rows.append((self.pieces[place], written, self._looked_at(layer, head, place)))
        title = say("layer {layer}, head {head}: whom each token looks at", layer=layer, head=head)
        return [Table(title, (say("reads"), say("writes"), say("looks at")), rows), *maps]

    def _overview(self, say: Say) -> Table:
        """Return a table with a row for each head to show.

        A row shows to which tokens the prompt's last token attends. It also shows three means over all
        tokens: how much a token attends to itself, to the token before it, and to the first token.
        """
        T = len(self.pieces)
        rows = []
        for layer, head in self.chosen:
            weights = self.probabilities[layer, head]
            before = float(np.diagonal(weights, -1).mean()) if T > 1 else 0.0
            shares = (float(np.diagonal(weights).mean()), before, float(weights[:, 0].mean()))
            looked = self._looked_at(layer, head, self.start, 3)
            rows.append((f"{layer}.{head}", looked, *map(percent, shares)))
        title = say("what each head looks at when the answer begins; its mean share on three places")
        if self.start == T - 1:  # no answer follows: a plain text, or a question alone
            title = say("what each head looks at from the last token; its mean share on three places")
        columns = (say("layer.head"), say("looks at"), say("itself"), say("before"), say("first"))
        return Table(title, columns, rows, (2, 3, 4))

    def _looked_at(self, layer: int, head: int, place: int, count: int = 4) -> str:
        weights = self.probabilities[layer, head, place, : place + 1]
        best = np.argsort(-weights, kind="stable")[:count]
        return "  ".join(f"{self.pieces[i]} {percent(float(weights[i]))}" for i in best if weights[i] >= 0.01)

    def headline(self, say: Say) -> dict[str, str]:
        """Return a summary of this view: one table row, as a dict {column title: cell}."""
        return {f"{layer}.{head}": self._looked_at(layer, head, self.start, 2) for layer, head in self.chosen}


def attention(
    model: LanguageModel,
    tokenizer: AnyTokenizer,
    question: str | Reading,
    answer: str | None = None,
    form: PromptFormat | None = None,
    layer: int | None = None,
    head: int | None = None,
) -> Attention:
    """Return a view of the attention on a question and its answer.

    The view holds the probabilities of all heads. Its tables and charts show the heads that `layer` and
    `head` choose.

    Args:
        answer: the answer; None: the model writes it.
        layer: show only this layer, counted from 0; None: all layers.
        head: show only the head with this number, counted from 0, in each shown layer; None: all heads.

    Raises:
        InputError: if the layer or the head does not exist, or the text is too long for the model.
    """
    require_head(model, layer, head)
    reading = read_question(model, tokenizer, question, answer, form)
    seen = record(model, as_row(model, reading.ids), ["*.attn.probabilities"])
    weights = np.stack([each[0].float().cpu().numpy() for each in seen.values()])  # (layers, H, T, T)
    start = len(reading.ids if reading.is_text else reading.prompt) - 1
    return Attention(reading.pieces, weights, start, layer, head)


@dataclass(frozen=True)
class Ablation(View):
    """A view of ablation: how much the loss rises without a head or a layer, in nats per answer token."""

    loss: float  # nats per token, with all heads and layers switched on
    count: int  # number of tokens of the answers
    heads: Floats  # (layers, heads)  loss without the head, minus `loss`
    layers: Floats  # (layers,)  loss without the attention and the MLP of the layer, minus `loss`
    parts_off: dict[str, Floats]  # "attn" or "mlp" -> (layers,)  loss without this part, minus `loss`

    def parts(self, say: Say) -> list[Part]:
        """Return the tables and charts of this view, translated by `say`."""
        rows = [
            (
                f"{layer}",
                *(f"{costs[layer]:+.3f}" for costs in (self.layers, *self.parts_off.values())),
                "  ".join(f"{value:+.3f}" for value in self.heads[layer]),
            )
            for layer in range(len(self.layers))
        ]
        title = say("loss {loss} on {count} tokens of answers; what each part adds to it when switched off",
                    loss=f"{self.loss:.4f}", count=self.count)  # fmt: skip
        columns = (say("layer"), say("whole"), say("attention"), "MLP", say("heads, from 0"))
        names = [str(number) for number in range(self.heads.shape[1])]
        labels = [say("layer {layer}", layer=layer) for layer in range(len(self.layers))]
        cells = [[f"{value:+.2f}" for value in row] for row in self.heads]
        heat = Heat(say("cost of each head (nats)"), np.clip(self.heads, 0, None), labels, names, cells)
        return [Table(title, columns, rows, (0, 1, 2, 3)), heat]

    def headline(self, say: Say) -> dict[str, str]:
        """Return a summary of this view: one table row, as a dict {column title: cell}."""
        layer, head = np.unravel_index(self.heads.argmax(), self.heads.shape)
        return {say("loss"): f"{self.loss:.4f}",
                say("dearest head"): f"{layer}.{head} {self.heads[layer, head]:+.3f}"}  # fmt: skip


def ablate(
    model: LanguageModel,
    tokenizer: AnyTokenizer,
    pairs: Sequence[tuple[str, str | None]],
    form: PromptFormat | None = None,
) -> Ablation:
    """Measure the loss without each head, each layer, each attention and each MLP, one at a time.

    Args:
        pairs: questions and answers. If an answer is None, the model writes it.

    Raises:
        InputError: if a text is too long for the model.
    """
    readings = [read_question(model, tokenizer, question, answer, form) for question, answer in pairs]
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads

    def cost(changes: Mapping[str, Change] | None) -> float:
        return sum(_nats(model, reading, changes) for reading in readings) / count - base

    base, count = 0.0, sum(len(reading.answer) for reading in readings)
    base = cost(None)
    per_head = [[cost(switched_off(model, i, head)) for head in range(heads)] for i in range(layers)]
    parts_off = {
        part: np.array([cost({f"blocks.{layer}.{part}": torch.zeros_like}) for layer in range(layers)])
        for part in ("attn", "mlp")
    }
    whole = np.array([cost(switched_off(model, layer)) for layer in range(layers)])
    return Ablation(base, count, np.array(per_head), whole, parts_off)


def _nats(model: LanguageModel, reading: Reading, changes: Mapping[str, Change] | None) -> float:
    logits = read_logits(model, reading.ids, changes)[len(reading.prompt) - 1 : -1]
    return float(F.cross_entropy(logits, torch.tensor(reading.answer), reduction="sum"))
