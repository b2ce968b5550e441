"""The results of generation: completions, and optionally scores, hidden states, attentions, probabilities.

A `Recorder` collects the outputs of one sequence, step by step. It computes and keeps only the outputs that
the options select. Hooks on the blocks collect the hidden states, so the model needs no code for them.

Letters in shapes: B rows; H heads; T tokens that a step reads; S tokens so far; C channels; V entries of the
vocabulary; n tokens with the highest probabilities. The first step reads the prompts. A later step reads one
token, or all tokens if there is no cache.
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

# "eos": an eos was chosen; "stop_string": a stop string occurred; "length": max_new_tokens was reached;
# "context": the model's context is full; "cancelled": the caller cancelled the request (Engine.cancel)
StopReason = Literal["eos", "stop_string", "length", "context", "cancelled"]


class Completion(NamedTuple):
    """The answer to one prompt."""

    ids: list[int]  # new ids, without the eos that ended them; a stop string's ids are included
    stop_reason: StopReason


@dataclass(frozen=True)
class GenerateOutput:
    """The result of generation for all prompts. An output that the options do not select is None.

    Names and shapes are Hugging Face's (GenerateDecoderOnlyOutput, GenerateBeamDecoderOnlyOutput). Only the
    log-probabilities have minigpt's own names.

    scores, logits, hidden_states and attentions have an entry for each step (each new token). An entry of
    attentions is a tuple with a tensor for each layer. An entry of hidden_states is a tuple, too: the
    embeddings, then a tensor for each layer (for the last layer, its output after the model's last norm).

    Rows that end early are padded: `sequences` with an eos (or 0), other tensors with zeros. `completions`
    have no padding.
    """

    completions: list[Completion]
    sequences: Tensor  # (B, S)  prompts, padded on the left, and new ids, padded on the right
    # (B,)  only with beams: log-probability of the new tokens / (number of new tokens) ** length_penalty
    sequences_scores: Tensor | None = None
    # (B, V)  scores from which the token was chosen; -inf: the token is forbidden
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None  # (B, V)  the model's logits
    hidden_states: tuple[tuple[Tensor, ...], ...] | None = None  # (B, T, C)  embeddings, then layer outputs
    attentions: tuple[tuple[Tensor, ...], ...] | None = None  # (B, H, T, S)  attention weights after softmax
    logprobs: Tensor | None = None  # (B, steps)  log-probabilities of the chosen tokens, from `logits`
    top_logprobs: Tensor | None = None  # (B, steps, n)  log-probabilities of top_ids, from `logits`
    top_ids: Tensor | None = None  # (B, steps, n)  ids of the n most likely tokens, in descending order


class Recorder:
    """Collects the outputs, such as scores, that the options of one sequence select."""

    def __init__(self, options: GenerationOptions) -> None:
        self.options = options
        self.needs_states = options.output_hidden_states or options.output_attentions
        self.steps: list[dict[str, Any]] = []  # one entry for each chosen token
        self._states: list[Tensor] = []  # hidden states of the last forward pass, (1, T, C) each
        self._attentions: list[Tensor] = []  # attention weights of the last forward pass, (1, H, T, S) each

    @contextmanager
    def watching(self, model: LanguageModel) -> Iterator[list[Tensor] | None]:
        """In a `with` block, collect the model's hidden states and attention weights, if they are selected.

        Yield the list for the attention weights, which the caller must pass to the model; None if they are
        not selected. Hidden states are collected by hooks.
        """
        hooks = []
        self._states, self._attentions = [], []
        if self.options.output_hidden_states:
            # The input of each block is a hidden state. As in Hugging Face, the last hidden state is the
            # output of the last norm. The output of the last block, before this norm, is left out.
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
        """Record the outputs for one chosen token.

        Args:
            logits: (V,), the model's logits.
            scores: (V,), the logits after penalties, temperature, top_k and so on.
            place: in speculative decoding, the last forward pass also reads guesses of the next tokens.
                `place` is then the index of the position from which the token was chosen, and hidden states
                and attentions are recorded for this position only. None: they are recorded for all positions.
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
    """Join the outputs of all sequences into one GenerateOutput.

    Hidden states and attentions of shorter prompts are padded with zeros on the left. All outputs are 0 for
    the steps after the end of a sequence.
    """
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
    """Replace each None by zeros. None stands for a sequence that has already ended."""
    known = next(value for value in column if value is not None)
    zeros = [torch.zeros_like(one) for one in known] if isinstance(known, list) else torch.zeros_like(known)
    return [zeros if value is None else value for value in column]


def _stacked(rows: tuple[Tensor, ...]) -> Tensor:
    """Stack the tensors of B sequences: (V,) to (B, V), (1, T, C) to (B, T, C), (1, H, T, S) to (B, H, T, S).

    Tensors with a smaller T or S are padded with zeros on the left.
    """
    if rows[0].dim() < 3:
        return torch.stack(rows)
    sizes = [max(row.shape[axis] for row in rows) for axis in (-2, -1)]
    padded = [F.pad(row, (sizes[1] - row.shape[-1], 0, sizes[0] - row.shape[-2], 0)) for row in rows]
    return torch.cat(padded)
