"""Finds the tokens nearest to a token, by their vectors in the input embedding and their rows in lm_head."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel, family_of
from minigpt.finetuning.layers import AdaptedLayer
from minigpt.generation.conversation import token_text
from minigpt.generation.sequence import bare_ids
from minigpt.lens.results import Bars, Part, Table, View, shown
from minigpt.lens.words import Say
from minigpt.weights.pretrained import AnyTokenizer

__all__ = ["Neighbours", "float_matrix", "neighbours"]


class Near(NamedTuple):
    """A token whose vector has nearly the direction of another token's vector."""

    text: str
    id: int
    cosine: float  # cosine of the angle between the vectors; 1: same direction


@dataclass(frozen=True)
class Neighbours(View):
    """A view of the nearest tokens of each token of a text."""

    pieces: list[str]
    inputs: list[list[Near]]  # for each of `pieces`, its nearest tokens in the input embedding
    outputs: list[list[Near]]  # the same in lm_head; equal to `inputs` if both share one matrix
    is_tied: bool

    def parts(self, say: Say) -> list[Part]:
        """Return the tables and charts of this view, translated by `say`."""
        found: list[Part] = []
        for piece, inside, outside in zip(self.pieces, self.inputs, self.outputs):
            rows = [
                (a.text, f"{a.cosine:.3f}", *(() if self.is_tied else (b.text, f"{b.cosine:.3f}")))
                for a, b in zip(inside, outside)
            ]
            columns = (say("embedding"), "cos", *(() if self.is_tied else ("lm_head", "cos")))
            tied = say("; lm_head shares the embedding's matrix") if self.is_tied else ""
            found.append(Table(say("nearest to {text}", text=piece) + tied, columns, rows, (1, 3)))
            found.append(
                Bars(
                    say("nearest to {text}", text=piece), [a.text for a in inside], [a.cosine for a in inside]
                )
            )
        return found

    def headline(self, say: Say) -> dict[str, str]:
        """Return a summary of this view: one table row, as a dict {column title: cell}."""
        return {
            piece: " ".join(near.text for near in inside[:5])
            for piece, inside in zip(self.pieces, self.inputs)
        }


@torch.inference_mode()
def neighbours(model: LanguageModel, tokenizer: AnyTokenizer, text: str, count: int = 10) -> Neighbours:
    """Find for each token of a text the tokens whose vectors have the highest cosine with its vector.

    Raises:
        InputError: if the text is empty, or has a character that the vocabulary lacks.
    """
    if unknown := tokenizer.unknown_characters(text):
        raise InputError(f"not in the vocabulary, so there is no vector to look at: {' '.join(unknown)}")
    ids = list(dict.fromkeys(bare_ids(tokenizer, text)))
    if not ids:
        raise InputError("the text has no tokens: there is nothing to look at")
    embedding = model.get_submodule(family_of(model.config).embedding.removesuffix(".weight"))
    inside, outside = float_matrix(embedding), float_matrix(model.lm_head)
    tables = [_nearest(matrix, ids, tokenizer, count) for matrix in (inside, outside)]
    pieces = [shown(token_text(tokenizer, index)) for index in ids]
    return Neighbours(pieces, tables[0], tables[1], torch.equal(inside, outside))


def float_matrix(module: Any) -> Tensor:
    """Return a linear layer's or embedding's weight matrix in float32, with its active adapters merged in."""
    # A bottleneck adapter is not linear, so it cannot be merged into the matrix. If one is active, the
    # matrix is returned without any adapter.
    if isinstance(module, AdaptedLayer):
        is_linear = all(layer.is_linear for layer in module.actives)
        return (module.merged()[0] if is_linear else module.float_weight()).detach().float()
    if hasattr(module, "dequantized"):
        whole: Tensor = module.dequantized()[:, : module.in_features].float()
        return whole
    plain: Tensor = module.weight.float()
    return plain


def _nearest(matrix: Tensor, ids: list[int], tokenizer: AnyTokenizer, count: int) -> list[list[Near]]:
    """Return for each id the tokens with the highest cosine to its vector, without the token itself.

    Rows of the matrix beyond the vocabulary (padding) are not considered.
    """
    rows = torch.nn.functional.normalize(matrix[: tokenizer.get_vocab_size()], dim=-1)  # (V, C)
    cosines = rows[ids] @ rows.T  # (n, V)
    cosines[torch.arange(len(ids)), ids] = -2
    top = cosines.topk(min(count, len(rows) - 1), dim=-1)
    return [
        [Near(shown(token_text(tokenizer, i)), i, value) for i, value in zip(row.tolist(), values.tolist())]
        for row, values in zip(top.indices, top.values)
    ]
