"""What generation gives back: completions, and on request everything that led to them.

`Recorder` collects one batch's outputs, step by step. What was not asked for is neither computed nor kept:
the model runs as without it. Hidden states are taken by hooks on the blocks, not by the model's own code.

Letters in shapes: B rows, H heads, T tokens read in a step (the first step reads the prompts, later ones one
token, or all without a cache), S tokens so far, C channels, V entries of the vocabulary, n tokens reported.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from minigpt.families.registry import LanguageModel
from minigpt.generation.options import GenerationOptions

__all__ = ["Completion", "GenerateOutput", "Recorder", "StopReason"]

# "eos" came; a "stop_string" came; "length": max_new_tokens; "context": the model can read no further;
# "cancelled": nobody wants the rest (minigpt.generation.engine)
StopReason = Literal["eos", "stop_string", "length", "context", "cancelled"]


class Completion(NamedTuple):
    """What followed a prompt."""

    ids: list[int]  # the new tokens, without the eos that ended them, with those that made a stop string
    stop_reason: StopReason


@dataclass(frozen=True)
class GenerateOutput:
    """What followed all prompts, and how; None is what was not asked for.

    Names and shapes are Hugging Face's (GenerateDecoderOnlyOutput, GenerateBeamDecoderOnlyOutput); those of
    log-probabilities are ours. Tuples have an entry for each step; those of the two nested ones have one for
    each layer. A row that ended before the others goes on with eos (or 0), and its numbers there mean
    nothing; completions tell which are its own.
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
    top_logprobs: Tensor | None = None  # (B, steps, n)  of the likeliest, in descending order
    top_ids: Tensor | None = None  # (B, steps, n)  which these are


class Recorder:
    """Collects the outputs that the options ask for; see GenerateOutput."""

    def __init__(self, options: GenerationOptions) -> None:
        self._options = options
        self._found: dict[str, list[Any]] = {}
        self._states: list[Tensor] = []  # of the step under way
        self.attentions: list[Tensor] | None = None  # of the step under way: the model fills it

    @contextmanager
    def watching(self, model: LanguageModel) -> Iterator[None]:
        """Listen to the model's blocks, if their states were asked for."""
        hooks = []
        if self._options.output_hidden_states:
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
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def begin_step(self) -> list[Tensor] | None:
        """What to hand the model for its attention weights."""
        self._states = []
        self.attentions = [] if self._options.output_attentions else None
        return self.attentions

    def end_step(self, logits: Tensor, scores: Tensor, tokens: Tensor) -> None:
        """The model said logits (B, V), the options made scores (B, V) of them and chose tokens (B,)."""
        options = self._options
        if options.output_scores:
            self._keep("scores", scores)
        if options.output_logits:
            self._keep("logits", logits)
        if options.output_hidden_states:
            self._keep("hidden_states", tuple(self._states))
        if self.attentions is not None:
            self._keep("attentions", tuple(self.attentions))
        if options.logprobs is not None:
            log_p = logits.log_softmax(dim=-1)  # (B, V)
            top = log_p.topk(options.logprobs)
            self._keep("logprobs", log_p.gather(-1, tokens[:, None])[:, 0])
            self._keep("top_logprobs", top.values)
            self._keep("top_ids", top.indices)

    def _keep(self, name: str, value: Any) -> None:
        self._found.setdefault(name, []).append(value)

    def output(self, completions: list[Completion], sequences: Tensor) -> GenerateOutput:
        """All steps together."""
        joined: dict[str, Any] = {
            name: torch.stack(steps, dim=1)
            if name in ("logprobs", "top_logprobs", "top_ids")
            else tuple(steps)
            for name, steps in self._found.items()
        }
        return GenerateOutput(completions, sequences, **joined)
