"""What generation returns: completions, and on request everything that led to them.

A `Recorder` collects one sequence's outputs, step by step. What was not asked for is neither computed nor
kept. Hidden states are taken by hooks on the blocks, not by the model's own code.

Letters in shapes: B rows, H heads, T tokens read in a step (the first step reads the prompts, later ones one
token, or all without a cache), S tokens so far, C channels, V entries of the vocabulary, n tokens reported.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from minigpt.families.registry import LanguageModel
from minigpt.generation.options import GenerationOptions

__all__ = ["Completion", "GenerateOutput", "Recorder", "StopReason", "joined"]

# "eos" came; a "stop_string" came; "length": max_new_tokens; "context": the model can read no further;
# "cancelled": stopped by its owner (minigpt.generation.engine)
StopReason = Literal["eos", "stop_string", "length", "context", "cancelled"]


class Completion(NamedTuple):
    """The answer to one prompt."""

    ids: list[int]  # the new tokens, without the eos that ended them, with those that made a stop string
    stop_reason: StopReason


@dataclass(frozen=True)
class GenerateOutput:
    """What followed all prompts, and how; None is what was not asked for.

    Names and shapes are Hugging Face's (GenerateDecoderOnlyOutput, GenerateBeamDecoderOnlyOutput); those of
    log-probabilities are ours. Tuples have an entry for each step; those of the two nested ones have one for
    each layer. A row that ended before the others is padded with eos (or 0), its numbers with zeros; the
    completions tell which are its own. With guesses, a step is a token.
    """

    completions: list[Completion]
    sequences: Tensor  # (B, S)  prompts, padded on the left, and what followed, padded on the right
    sequences_scores: Tensor | None = None  # (B,)  with beams: log-probability / length ** length_penalty
    scores: tuple[Tensor, ...] | None = (
        None  # (B, V)  what the token was chosen by: -inf is what could not be
    )
    logits: tuple[Tensor, ...] | None = None  # (B, V)  what the model said
    hidden_states: tuple[tuple[Tensor, ...], ...] | None = None  # (B, T, C)  embeddings, then each layer's
    attentions: tuple[tuple[Tensor, ...], ...] | None = None  # (B, H, T, S)  a row is a distribution
    logprobs: Tensor | None = None  # (B, steps)  of the chosen tokens, as the model said, before any option
    top_logprobs: Tensor | None = None  # (B, steps, n)  of the most likely, in descending order
    top_ids: Tensor | None = None  # (B, steps, n)  which these are


class Recorder:
    """Collects the outputs of one sequence that its options ask for; see GenerateOutput."""

    def __init__(self, options: GenerationOptions) -> None:
        self.options = options
        self.needs_states = options.output_hidden_states or options.output_attentions
        self.steps: list[dict[str, Any]] = []  # one for each token that was chosen
        self._states: list[Tensor] = []  # (1, T, C) each, of the last forward pass
        self._attentions: list[Tensor] = []  # (1, H, T, S) each

    @contextmanager
    def watching(self, model: LanguageModel) -> Iterator[list[Tensor] | None]:
        """Meanwhile the model's states are collected; yields a list that it shall fill with attentions."""
        hooks = []
        self._states, self._attentions = [], []
        if self.options.output_hidden_states:
            # What a block reads is the state before it. The last state is, as in Hugging Face, the one behind
            # the last norm; what the last block hands to that norm is not among them.
            for block in model.blocks:
                hooks.append(
                    block.register_forward_pre_hook(lambda _, inputs: self._states.append(inputs[0]))
                )
            hooks.append(
                model.base_model.register_forward_hook(lambda _, __, output: self._states.append(output))
            )
        try:
            yield self._attentions if self.options.output_attentions else None
        finally:
            for hook in hooks:
                hook.remove()

    def record(self, logits: Tensor, scores: Tensor, token: int, place: int | None = None) -> None:
        """The model said logits (V,), the options made scores (V,) of them, and `token` was chosen.

        Args:
            place: the token's place among those of the last forward pass, where several were chosen.
        """
        options, step = self.options, dict[str, Any]()
        if options.output_scores:
            step["scores"] = scores.clone()
        if options.output_logits:
            step["logits"] = logits.clone()
        if place is None:
            states, attentions = self._states, self._attentions
        else:
            states = [state[:, place : place + 1] for state in self._states]
            unseen = [weights.shape[2] - 1 - place for weights in self._attentions]
            attentions = [
                weights[:, :, place : place + 1, : weights.shape[3] - n]
                for weights, n in zip(self._attentions, unseen)
            ]
        if options.output_hidden_states:
            step["hidden_states"] = states
        if options.output_attentions:
            step["attentions"] = attentions
        if options.logprobs is not None:
            log_p = logits.log_softmax(dim=-1)  # (V,)
            top = log_p.topk(options.logprobs)
            step |= {"logprobs": log_p[token], "top_logprobs": top.values, "top_ids": top.indices}
        self.steps.append(step)


def joined(recorders: Sequence[Recorder], completions: list[Completion], sequences: Tensor) -> GenerateOutput:
    """The outputs of all sequences, step by step; zeros stand where one has ended, and on the left."""
    found: dict[str, Any] = {}
    length = max(len(recorder.steps) for recorder in recorders)
    for name in recorders[0].steps[0]:
        columns = [[recorder.steps[step : step + 1] for recorder in recorders] for step in range(length)]
        values = [[rows[0][name] if rows else None for rows in column] for column in columns]
        if name in ("hidden_states", "attentions"):
            found[name] = tuple(tuple(map(_stacked, zip(*_filled(column)))) for column in values)
        else:
            steps = [_stacked(tuple(_filled(column))) for column in values]
            is_tuple = name in ("scores", "logits")
            found[name] = tuple(steps) if is_tuple else torch.stack(steps, dim=1)
    return GenerateOutput(completions, sequences, **found)


def _filled(column: list[Any]) -> list[Any]:
    """Zeros, for a sequence that has ended."""
    known = next(value for value in column if value is not None)
    zeros = [torch.zeros_like(one) for one in known] if isinstance(known, list) else torch.zeros_like(known)
    return [zeros if value is None else value for value in column]


def _stacked(rows: tuple[Tensor, ...]) -> Tensor:
    """(V,) each -> (B, V); or (1, T, C) or (1, H, T, S) each, padded on the left in T and S, -> (B, ...)."""
    if rows[0].dim() < 3:
        return torch.stack(rows)
    sizes = [max(row.shape[axis] for row in rows) for axis in (-2, -1)]
    padded = [F.pad(row, (sizes[1] - row.shape[-1], 0, sizes[0] - row.shape[-2], 0)) for row in rows]
    return torch.cat(padded)
