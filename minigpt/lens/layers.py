"""The logit lens: for each layer, the token that the model would predict if this were its last layer.

The hidden state after a block goes directly to the last norm and lm_head, without the blocks that follow
(https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens).
"""

from dataclasses import dataclass

import torch

from minigpt.families.registry import LanguageModel, family_of
from minigpt.generation.conversation import token_text
from minigpt.generation.generation_config import PromptFormat
from minigpt.lens.reading import Reading, read_question
from minigpt.lens.recorder import as_row, record
from minigpt.lens.results import Floats, Heat, Part, Table, View, percent, shown
from minigpt.lens.words import Say
from minigpt.weights.pretrained import AnyTokenizer

__all__ = ["LogitLens", "logit_lens"]


@dataclass(frozen=True)
class LogitLens(View):
    """A view of the most likely token after each layer, at each position of the answer."""

    layers: list[str]  # (L) "embeddings", "blocks.0", ...
    reads: list[str]  # (n) the model's input token at each position
    writes: list[str]  # (n) the token of the answer that follows each position
    tokens: list[list[str]]  # (L, n) the most likely token after each layer
    best: Floats  # (L, n) probability of the most likely token
    probabilities: Floats  # (L, n) probability of the token in `writes`
    ranks: list[list[int]]  # (L, n) rank of the token in `writes`; 1: the most likely one

    def known_after(self, place: int) -> int | None:
        """Return the index of the first layer from which on all layers predict writes[place], or None."""
        later = [i for i in range(len(self.layers)) if all(row[place] == 1 for row in self.ranks[i:])]
        return later[0] if later else None

    def parts(self, say: Say) -> list[Part]:
        """Return the tables and charts of this view, translated by `say`."""
        names = [self._short(name, say) for name in self.layers]
        rows = []
        for place in range(len(self.reads)):
            path = [
                f"{name}: {tokens[place]} {percent(float(values[place]))}"
                for name, tokens, values in zip(names, self.tokens, self.best)
            ]
            first = self.known_after(place)
            known = say("never") if first is None else names[first]
            rows.append((self.reads[place], self.writes[place], known, "  ".join(path)))
        columns = (say("reads"), say("writes"), say("known after"), say("what each layer would write"))
        heat = Heat(say("probability of the written token after each layer"), self.probabilities, names,
                    self.writes, self.tokens)  # fmt: skip
        return [Table(say("logit lens"), columns, rows), heat]

    def _short(self, name: str, say: Say) -> str:
        return say("embedding") if name == "embeddings" else name.removeprefix("blocks.")

    def headline(self, say: Say) -> dict[str, str]:
        """Return a summary of this view: one table row, as a dict {column title: cell}."""
        names = [self._short(name, say) for name in self.layers]
        firsts = [self.known_after(place) for place in range(len(self.reads))]
        known = [f"{text} {'-' if i is None else names[i]}" for text, i in zip(self.writes, firsts)]
        return {say("known after"): "  ".join(known)}


@torch.inference_mode()
def logit_lens(
    model: LanguageModel,
    tokenizer: AnyTokenizer,
    question: str | Reading,
    answer: str | None = None,
    form: PromptFormat | None = None,
) -> LogitLens:
    """For each position of an answer and each layer, compute which token the logit lens predicts.

    Args:
        answer: the answer; None: the model writes it.

    Raises:
        InputError: if the text is too long for the model.
    """
    reading = read_question(model, tokenizer, question, answer, form)
    start = len(reading.prompt) - 1
    seen = record(model, as_row(model, reading.ids), ["embeddings", *_blocks(model)])
    norm = model.get_submodule(family_of(model.config).final_norm)
    places = slice(start, start + max(1, len(reading.answer)))
    rows = [model.lm_head(norm(states[:, places])).float().softmax(-1)[0].cpu() for states in seen.values()]
    values = torch.stack(rows)  # (L, n, V) probabilities
    top = values.max(dim=-1)  # (L, n) highest probabilities and their ids
    # (n,) ids of the answer's tokens; without an answer, the one id that the model predicts
    follows = torch.tensor(reading.answer or [int(top.indices[-1, 0])])
    own = values.gather(-1, follows.expand(len(values), -1)[..., None])  # (L, n, 1) probability of `follows`
    texts = [[shown(token_text(tokenizer, index)) for index in row] for row in top.indices.tolist()]
    return LogitLens(
        layers=list(seen),
        reads=reading.pieces[places],
        writes=[shown(token_text(tokenizer, index)) for index in follows.tolist()],
        tokens=texts,
        best=top.values.numpy(),
        probabilities=own[..., 0].numpy(),
        ranks=(1 + (values > own).sum(-1)).tolist(),
    )


def _blocks(model: LanguageModel) -> list[str]:
    return [f"blocks.{layer}" for layer in range(model.config.num_hidden_layers)]
