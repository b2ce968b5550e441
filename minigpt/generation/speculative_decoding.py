"""Speculative decoding: guesses several tokens cheaply. One step of the model then checks all guesses.

    sequence.speculation = Speculation(NgramDrafter(), 4)            # the text repeats itself
    sequence.speculation = Speculation(ModelDrafter(small), 4)       # a smaller model guesses

A step that computes one token reads all weights. A step that computes a few tokens also reads all weights
once, and takes about as long. So a drafter guesses some tokens, and the model computes all of them in one
step. The guesses before the first wrong guess are kept, and the model's own choice replaces the wrong guess.
The tokens have the same distribution as without guesses:

- Without sampling, the ids are *the same* as without guesses. With sampling, they are the same for the same
  seed if the guesses are not drawn at random (NgramDrafter), because each choice has the same logits and the
  same random number. Exception: PyTorch rounds differently if it computes several tokens in one step. So if
  two scores are almost equal, another id may be chosen. The C code (minigpt.generation.native) rounds in the
  same way with and without guesses.
- Guesses that a model has drawn at random are accepted by the rule of https://arxiv.org/abs/2211.17192 (Fast
  Inference from Transformers via Speculative Decoding), section 2.3: see `accept`.

Letters in shapes: k guesses, V entries of the vocabulary.
"""

import functools
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel
from minigpt.generation import sampling
from minigpt.generation.cache import KeyValueCache
from minigpt.generation.loop import choose, filtered, problems_of, processed
from minigpt.generation.model_runner import TorchRunner
from minigpt.generation.native import NativeRunner, runner_for
from minigpt.generation.options import GenerationOptions, refuse_pair
from minigpt.generation.sequence import Sequence

__all__ = [
    "Draft",
    "Drafter",
    "ModelDrafter",
    "NgramDrafter",
    "Speculation",
    "accept",
    "check_assistant",
    "speculation",
]


@dataclass(frozen=True)
class Draft:
    """Guesses at the next tokens."""

    ids: list[int]
    # (k, V)  distributions from which the guesses were drawn; None: they were not drawn at random
    probabilities: Tensor | None = None


class Drafter(Protocol):
    """An object that guesses the next tokens of one sequence."""

    def draft(self, sequence: Sequence, count: int) -> Draft:
        """Guess at most `count` next tokens."""


def check_assistant(model: LanguageModel, options: GenerationOptions, assistant_model: LanguageModel) -> None:
    """Raise InputError if an assistant model cannot be used with these options or this model.

    Both models must have vocabularies of the same size.
    """
    ours, theirs = assistant_model.config.vocab_size, model.config.vocab_size
    if ours != theirs:
        raise InputError(
            f"the assistant model has vocab_size={ours}, the model {theirs}: both must have one tokenizer"
        )
    if options.num_beams > 1:
        refuse_pair("num_beams", options.num_beams, "assistant_model")
    if options.prompt_lookup_num_tokens is not None:
        refuse_pair("assistant_model", None, "prompt_lookup_num_tokens")


class Speculation:
    """Speculative decoding of one sequence: `draft` guesses its next tokens, `take` adds the right guesses.

    Args:
        count: largest number of guesses for one step of the model.
    """

    def __init__(self, drafter: Drafter, count: int) -> None:
        self.drafter, self.count = drafter, count
        self.drafted = self.accepted = 0  # number of guesses so far, and how many of them were right
        self._draft = Draft([])
        self._judge: np.random.Generator | None = None

    def draft(self, sequence: Sequence, most: int) -> list[int]:
        """Return at most `most` guesses at the next tokens."""
        count = min(self.count, most, sequence.limit - len(sequence.ids) - 1)
        self._draft = self.drafter.draft(sequence, count) if count > 0 else Draft([])
        self.drafted += len(self._draft.ids)
        return self._draft.ids

    def take(self, sequence: Sequence, logits: Tensor) -> None:
        """Add to the sequence the guesses before the first wrong one, then the model's own choice.

        Args:
            logits: (1 + k, V), after the last token and after each of the k guesses.
        """
        for place, guess in enumerate(self._draft.ids):
            token = self._next(sequence, logits, place, guess)
            if token != guess or sequence.has_ended:
                self.accepted += token == guess
                return
            self.accepted += 1
        choose([sequence], logits, len(self._draft.ids))

    def _next(self, sequence: Sequence, logits: Tensor, place: int, guess: int) -> int | None:
        q = self._draft.probabilities
        if q is None or sequence.seed is None:
            choose([sequence], logits, place)
            return sequence.chosen[-1] if sequence.error is None else None
        given = logits[place : place + 1]
        scores = processed([sequence], given)
        if problem := problems_of(given, scores)[0]:
            sequence.fail(problem)
            return None
        if self._judge is None:
            self._judge = np.random.default_rng([*sequence.seed, 0, 2])
        scores = filtered(scores, sequence.request.options)
        p = scores.softmax(dim=-1, dtype=torch.float64)[0]  # (V,)
        token = accept(p, q[place], guess, self._judge.random(), self._judge.random())
        if sequence.recorder:
            sequence.recorder.record(logits[place], scores[0], token, place)
        sequence.push(token)
        return token


def speculation(options: GenerationOptions, assistant_model: LanguageModel | None = None) -> Speculation:
    """Make the Speculation of one sequence. The assistant model guesses; without one, prompt lookup does."""
    if assistant_model is not None:
        return Speculation(ModelDrafter(assistant_model), options.num_assistant_tokens)
    assert options.prompt_lookup_num_tokens is not None, "the other way to guess"
    return Speculation(NgramDrafter(options.max_matching_ngram_size), options.prompt_lookup_num_tokens)


class NgramDrafter:
    """Looks for an earlier occurrence of the last tokens, and guesses the tokens that followed it.

    This method is called prompt lookup. Prompt lookup costs almost nothing, and helps if an answer repeats
    parts of its question or of itself, as code does.

    Args:
        max_matching_ngram_size: the drafter first looks for an earlier occurrence of this many last tokens.
            If there is none, it looks for one token fewer, and so on.
    """

    def __init__(self, max_matching_ngram_size: int = 3) -> None:
        if max_matching_ngram_size < 1:
            raise InputError(f"max_matching_ngram_size must be at least 1: got {max_matching_ngram_size}")
        self._size = max_matching_ngram_size
        # n-gram -> index of the token after the last occurrence of the n-gram
        self._ends: dict[tuple[int, ...], int] = {}
        self._seen = 0  # `_ends` has all n-grams that end within the first `_seen` tokens

    def draft(self, sequence: Sequence, count: int) -> Draft:
        """Guess the tokens that followed an earlier occurrence of the sequence's last tokens."""
        ids = [*sequence.prompt, *sequence.ids]
        # the last n-gram is left out, because no token follows it yet
        for end in range(self._seen + 1, len(ids)):
            for size in range(1, min(self._size, end) + 1):
                self._ends[tuple(ids[end - size : end])] = end
        self._seen = max(self._seen, len(ids) - 1)
        for size in range(min(self._size, len(ids)), 0, -1):
            place = self._ends.get(tuple(ids[-size:]))
            if place is not None:
                return Draft(ids[place : place + count])
        return Draft([])


class ModelDrafter:
    """Guesses with a smaller model, the assistant model. It must have the large model's vocabulary.

    Both models use the sequence's temperature, top_k and so on. Penalties and constraints are applied to the
    large model only. A guess that they forbid counts as wrong.
    """

    def __init__(self, assistant_model: LanguageModel) -> None:
        self._model = assistant_model
        self._cache: KeyValueCache | None = None
        self._read: list[int] = []  # tokens that the cache holds
        self._random: np.random.Generator | None = None

    @functools.cached_property
    def _runner(self) -> NativeRunner | TorchRunner:
        return runner_for(self._model.eval())

    def draft(self, sequence: Sequence, count: int) -> Draft:
        """Let the assistant model choose `count` tokens, or fewer if its context is full. Return them."""
        ids, options = sequence.context, sequence.request.options
        if self._cache is None:
            weight, most = next(self._model.parameters()), self._model.config.max_position_embeddings
            columns = min(len(sequence.prompt) + sequence.limit, most)
            self._cache = KeyValueCache(self._model.config, 1, columns, weight.device, weight.dtype)
            if sequence.seed is not None:
                self._random = np.random.default_rng([*sequence.seed, 0, 1])
        count = min(count, self._cache.max_length - len(ids) + 1)
        if count < 1:
            return Draft([])
        same = 0  # the cache already holds the first `same` tokens of `ids`
        while same < min(len(self._read), len(ids) - 1) and self._read[same] == ids[same]:
            same += 1
        self._cache.truncate(0, same)
        new, guesses, distributions = ids[same:], list[int](), list[Tensor]()
        for _ in range(count):
            logits = self._runner.prefill([new], [0], self._cache)  # (1, V)
            if self._random is None:
                guesses.append(int(sampling.greedy(logits)))
            else:
                scores = filtered(logits, options)
                uniform = torch.tensor([self._random.random()], dtype=torch.float64, device=scores.device)
                guesses.append(int(sampling.sample(scores, uniform)))
                distributions.append(scores.softmax(dim=-1, dtype=torch.float64))
            new = guesses[-1:]
        self._read = ids + guesses[:-1]
        return Draft(guesses, torch.cat(distributions) if distributions else None)


def accept(p: Tensor, q: Tensor, token: int, keep: float, again: float) -> int:
    """Turn a token that was drawn from q into a token drawn from p. The token is kept as often as possible.

    https://arxiv.org/abs/2211.17192, section 2.3: keep the token with probability min(1, p / q). Otherwise
    draw from max(p - q, 0), normalised. The result then has the distribution min(p, q) + (1 - sum(min(p, q)))
    * max(p - q, 0) / sum(max(p - q, 0)) = p, because 1 - sum(min(p, q)) and sum(max(p - q, 0)) are equal.

    Args:
        p, q: distributions, (V,). q[token] must be above 0.
        keep, again: two independent uniform numbers, 0 <= u < 1. `keep` decides whether the token is kept. If
            not, `again` draws a new token.
    """
    if keep * float(q[token]) < float(p[token]):
        return token
    more = (p - q).clamp(min=0)  # (V,)
    if float(more.sum()) <= 0:  # p and q are equal up to rounding
        more = p
    return int(sampling.sample(more.log()[None], torch.tensor([again], dtype=p.dtype, device=p.device)))
