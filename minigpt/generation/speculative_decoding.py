"""Several tokens a step: cheap guesses, of which the model keeps those that it would have written itself.

    found = speculate_ids(model, prompt, options, eos, NgramDrafter())           # the text repeats itself
    found = speculate_ids(model, prompt, options, eos, ModelDrafter(small))      # a smaller model guesses
    found.completion, found.acceptance_rate

Decoding reads all weights for one token, and takes about as long for a few. So a drafter guesses some, the
model reads them all at once, and the guesses are accepted up to the first that is wrong; there the model's
own choice follows. What is written is distributed as without guesses:

- without sampling, and for guesses that are no draws (NgramDrafter), the ids are *those* of generate_ids,
  from the same seed: each choice is made from the same logits and the same drawn number. In C (see .reading)
  to the bit; in PyTorch several tokens are rounded in another order than one, which a near-tie can show.
- for guesses that a model has drawn, by the rule of https://arxiv.org/abs/2211.17192 (Fast Inference from
  Transformers via Speculative Decoding), section 2.3: see `accept`.

One prompt at a time: with many rows the weights are read for many tokens anyway.

Letters in shapes: k guesses, V entries of the vocabulary.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel
from minigpt.generation import sampling
from minigpt.generation.batch import evaluating, new_cache
from minigpt.generation.cache import KeyValueCache
from minigpt.generation.model_runner import Reader
from minigpt.generation.options import GenerationOptions
from minigpt.generation.output import Completion
from minigpt.generation.request import Request, TextTokenizer, base_seed, check_request, row_seed
from minigpt.generation.sequence import Row, check_single, outcome

__all__ = [
    "Draft",
    "Drafter",
    "ModelDrafter",
    "NgramDrafter",
    "Speculated",
    "accept",
    "speculate",
    "speculate_ids",
]


@dataclass(frozen=True)
class Draft:
    """Guesses at the next tokens."""

    ids: list[int]
    # (k, V)  what each was drawn from, given the guesses before it; None: they are no draws
    probabilities: Tensor | None = None


class Drafter(Protocol):
    """Who guesses."""

    def begin(self, model: LanguageModel, row: Row, seed: Sequence[int] | None) -> None:
        """A new text begins; `row` is it, `seed` what it draws with, None: nothing is drawn."""

    def draft(self, count: int) -> Draft:
        """At most that many tokens that may follow the text so far."""


@dataclass(frozen=True)
class Speculated:
    """What followed, and how many guesses it took."""

    completion: Completion
    drafted: int  # guesses that the model has read
    accepted: int  # guesses that it has kept
    steps: int  # times that it was asked, the prompt included: without guesses, once a token

    @property
    def acceptance_rate(self) -> float:
        """Of the guesses, the share that was kept; 0 without any."""
        return self.accepted / self.drafted if self.drafted else 0.0


class NgramDrafter:
    """Guesses what followed the last few tokens where they came before: prompt lookup.

    Good where an answer repeats its question, code or itself; costs nothing.

    Args:
        max_matching_ngram_size: how many of the last tokens are looked for first; then fewer, to one.
    """

    def __init__(self, max_matching_ngram_size: int = 3) -> None:
        if max_matching_ngram_size < 1:
            raise InputError(f"max_matching_ngram_size must be at least 1: got {max_matching_ngram_size}")
        self._size = max_matching_ngram_size
        self._row: Row | None = None
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram -> the place behind it, where it came last
        self._seen = 0  # tokens whose n-grams are in the table

    def begin(self, model: LanguageModel, row: Row, seed: Sequence[int] | None) -> None:
        """Forget all other texts."""
        self._row, self._ends, self._seen = row, {}, 0

    def draft(self, count: int) -> Draft:
        """What followed the same tokens before."""
        assert self._row is not None, "begin comes first"
        ids = [*self._row.prompt, *self._row.ids]
        for end in range(self._seen + 1, len(ids)):  # the n-grams that something follows
            for size in range(1, min(self._size, end) + 1):
                self._ends[tuple(ids[end - size : end])] = end
        self._seen = max(self._seen, len(ids) - 1)
        for size in range(min(self._size, len(ids)), 0, -1):
            place = self._ends.get(tuple(ids[-size:]))
            if place is not None:
                return Draft(ids[place : place + count])
        return Draft([])


class ModelDrafter:
    """A smaller model of the same vocabulary guesses, with the same temperature, top_k and so on.

    What looks back (penalties, constraints) is the large model's alone: the guesses need not be right.
    """

    def __init__(self, assistant_model: LanguageModel) -> None:
        self._model = assistant_model
        self._reader: Reader | None = None
        self._row: Row | None = None
        self._cache: KeyValueCache | None = None
        self._read: list[int] = []  # what the cache holds
        self._random: np.random.Generator | None = None

    def begin(self, model: LanguageModel, row: Row, seed: Sequence[int] | None) -> None:
        """Forget all other texts.

        Raises:
            InputError: if the models' vocabularies are of different sizes.
        """
        ours, theirs = self._model.config.vocab_size, model.config.vocab_size
        if ours != theirs:
            raise InputError(
                f"the assistant model has vocab_size={ours}, the model {theirs}: both must have one tokenizer"
            )
        columns = min(len(row.prompt) + row.limit, self._model.config.max_position_embeddings)
        self._model.eval()
        self._reader = Reader(self._model)  # anew: the model may have been quantised since
        self._row, self._cache, self._read = row, new_cache(self._model, 1, columns), []
        self._random = None if seed is None else np.random.default_rng([*seed, 0, 1])

    def draft(self, count: int) -> Draft:
        """The model's own next tokens; none beyond what it can read."""
        assert self._reader is not None, "begin comes first"
        assert self._row is not None
        assert self._cache is not None
        ids = [*self._row.prompt, *self._row.ids]
        count = min(count, self._cache.max_length - len(ids) + 1)
        if count < 1:
            return Draft([])
        same = 0  # guesses that were accepted need not be read again
        while same < min(len(self._read), len(ids) - 1) and self._read[same] == ids[same]:
            same += 1
        self._cache.truncate(same)
        new, guesses, distributions = ids[same:], list[int](), list[Tensor]()
        for _ in range(count):
            logits = self._reader.read(new, self._cache)  # (1, V)
            if self._random is None:
                guesses.append(int(sampling.greedy(logits)))
            else:
                scores = self._row.filtered(logits)
                uniform = torch.tensor([self._random.random()], dtype=torch.float64, device=scores.device)
                guesses.append(int(sampling.sample(scores, uniform)))
                distributions.append(scores.softmax(dim=-1, dtype=torch.float64))
            new = guesses[-1:]
        self._read = ids + guesses[:-1]
        return Draft(guesses, torch.cat(distributions) if distributions else None)


def accept(p: Tensor, q: Tensor, token: int, keep: float, choose: float) -> int:
    """A token distributed as p, from one that was drawn from q: the same one as often as possible.

    https://arxiv.org/abs/2211.17192, section 2.3: keep it with probability min(1, p / q); otherwise draw from
    what p has more than q, max(p - q, 0), normalised. Then P(x) = min(p, q) + (1 - sum(min(p, q))) *
    max(p - q, 0) / sum(max(p - q, 0)) = p, as both sums in the last two terms are the same.

    Args:
        p, q: distributions, (V,); q of the token is above 0.
        keep, choose: two independent uniform numbers, 0 <= u < 1.
    """
    if keep * float(q[token]) < float(p[token]):
        return token
    more = (p - q).clamp(min=0)  # (V,)
    if float(more.sum()) <= 0:  # p and q are the same up to rounding, and this was that rounding
        more = p
    return int(sampling.sample(more.log()[None], torch.tensor([choose], dtype=p.dtype, device=p.device)))


def speculate_ids(
    model: LanguageModel,
    prompt: Sequence[int],
    options: GenerationOptions,
    eos_token_id: int | Sequence[int] | None,
    drafter: Drafter,
    num_assistant_tokens: int = 4,
    tokenizer: TextTokenizer | None = None,
    copy: int = 0,
) -> Speculated:
    """Write on from a prompt with guesses; arguments as generate_ids.

    Args:
        num_assistant_tokens: guesses at a time, at most.
        copy: draw as generate_ids does for this one of num_return_sequences.

    Raises:
        InputError: as generate_ids does; for beams and reports; for a drafter of another vocabulary.
    """
    if num_assistant_tokens < 1:
        raise InputError(
            f"num_assistant_tokens must be at least 1: got num_assistant_tokens={num_assistant_tokens}"
        )
    check_single(options, "speculation")
    if options.window is not None:
        raise InputError(f"window={options.window} does not go with speculation: leave out one")
    request = check_request(model, [prompt], options, eos_token_id, tokenizer)
    base = base_seed(options)
    seed = None if base is None else row_seed(base, 0, copy)
    return outcome(speculate(model, prompt, options, request, seed, drafter, num_assistant_tokens))


@torch.inference_mode()
def speculate(
    model: LanguageModel,
    prompt: Sequence[int],
    options: GenerationOptions,
    request: Request,
    seed: Sequence[int] | None,
    drafter: Drafter,
    num_assistant_tokens: int,
) -> Generator[int, None, Speculated]:
    """As speculate_ids, of a checked request: yields each token when it is certain, eos too."""
    config = model.config
    limit = options.limit(len(prompt), config.max_position_embeddings)
    with evaluating(model):
        reader = Reader(model, options.cache_implementation)
        row = Row(prompt, limit, options, request, config.vocab_size, reader.device, seed)
        drafter.begin(model, row, seed)
        judge = None if seed is None else np.random.default_rng([*seed, 0, 2])
        cache = new_cache(model, 1, len(prompt) + limit - 1, options)
        row.push(token := row.choose(reader.read(prompt, cache)))
        yield token
        drafted, accepted, steps = 0, 0, 1
        while row.stop_reason is None:
            # one place is left for the token that follows the last guess
            draft = drafter.draft(min(num_assistant_tokens, limit - len(row.ids) - 1))
            given = [row.ids[-1], *draft.ids]
            logits = reader.read(given, cache, len(given), same_bits=True)  # (1 + k, V)
            kept = yield from _take(row, logits, draft, judge)
            drafted, accepted, steps = drafted + len(draft.ids), accepted + kept, steps + 1
            if row.stop_reason is None:
                cache.truncate(row.length - 1)  # the last token is not read yet; wrong guesses are forgotten
    return Speculated(row.completion(), drafted, accepted, steps)


def _take(
    row: Row, logits: Tensor, draft: Draft, judge: np.random.Generator | None
) -> Generator[int, None, int]:
    """Push the guesses up to the first wrong one, and what comes instead; returns how many were right."""
    for place, guess in enumerate(draft.ids):
        behind = logits[place : place + 1]  # (1, V)  what comes behind the guesses before this one
        if judge is None or draft.probabilities is None:
            token = row.choose(behind)
        else:
            p = row.filtered(row.scores(behind)).softmax(dim=-1, dtype=torch.float64)[0]  # (V,)
            token = accept(p, draft.probabilities[place], guess, judge.random(), judge.random())
        row.push(token)
        yield token
        if token != guess:
            return place
        if row.stop_reason is not None:
            return place + 1
    row.push(token := row.choose(logits[-1:]))
    yield token
    return len(draft.ids)
