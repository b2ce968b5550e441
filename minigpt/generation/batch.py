"""The loop of generation: prompts of one batch, written on together, token by token, each until its own end.

Prompts of unlike length share a batch: the shorter ones are padded on the left, so that all rows end in the
same column and each step adds one. Padding has attention weight 0 and takes no position; a batch without any
takes the path without a mask. (Batches of equal lengths only would need no padding, but there are too many,
too small ones of them.) So a row's result is the one that it has alone, up to the rounding of floating-point
sums, which depends on a batch's shape in every library.

It answers no questions and checks no options: that is minigpt.generation.api's work.

Letters in shapes: B rows, S columns so far, n rows not finished yet, T columns read now, V the vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel
from minigpt.generation import sampling
from minigpt.generation.cache import KeyValueCache, cache_bytes, check_memory
from minigpt.generation.inputs_embeds import replaced_embeddings
from minigpt.generation.logits_processors import NO_TOKEN
from minigpt.generation.native import NativeStep, native_step
from minigpt.generation.options import GenerationOptions
from minigpt.generation.output import Completion, Recorder
from minigpt.generation.quantized_cache import QuantizedCache, quantized_bytes
from minigpt.generation.request import Request
from minigpt.generation.stopping import Written

__all__ = ["NOT_FINITE", "Batch", "check_scores", "evaluating", "likeliest", "new_cache"]

Index: TypeAlias = slice | Tensor | npt.NDArray[np.int64]  # of rows, (n,)

NOT_FINITE = "the model's scores are not finite numbers: its weights are damaged or diverged"


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Switch dropout off; the model is left in the mode (train or eval) that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def new_cache(
    model: LanguageModel, rows: int, columns: int, options: GenerationOptions | None = None
) -> KeyValueCache:
    """A cache of this model's sizes, on its device, in its precision or the one that the options ask for.

    Raises:
        InputError: if it takes more than max_cache_mib; before it is taken.
    """
    weight, options = next(model.parameters()), options or GenerationOptions()
    is_quantized = options.cache_implementation == "quantized"
    needed = (
        quantized_bytes(model.config, rows, columns)
        if is_quantized
        else cache_bytes(model.config, rows, columns, weight.dtype)
    )
    check_memory(needed, options.max_cache_mib, f"a cache of {rows} rows of {columns} tokens")
    make = QuantizedCache if is_quantized else KeyValueCache
    return make(model.config, rows, columns, weight.device, weight.dtype)


def check_scores(logits: Tensor, scores: Tensor, highest: Sequence[float] | None = None) -> None:
    """Raise InputError where the model's logits (n, V) are no numbers, or the options leave no token.

    Args:
        highest: each row's highest score, where it is known.
    """
    # A NaN or an infinity would be a row's highest score; where all is -infinity, that is.
    highest = scores.amax(dim=-1).tolist() if highest is None else highest
    if not all(map(math.isfinite, highest if scores is logits else logits.amax(dim=-1).tolist())):
        raise InputError(NOT_FINITE)
    if not all(map(math.isfinite, highest)):
        raise InputError(
            "the options forbid every token: allow some in logit_bias, bad_words_ids, "
            "no_repeat_ngram_size or min_new_tokens; or the vocabulary lacks what a constraint needs"
        )


def likeliest(logits: Tensor, scores: Tensor, native: NativeStep | None = None) -> list[int]:
    """The likeliest token of each of n rows, and what `check_scores` raises: in one look at the scores."""
    found = native.likeliest(scores) if native else None
    if found is None:
        tokens = sampling.greedy(scores)
        found = tokens.tolist(), scores.gather(-1, tokens[:, None])[:, 0].tolist()
    check_scores(logits, scores, found[1])
    return found[0]


class Batch:
    """Prompts that are written on together; B rows, S columns so far, n rows not finished yet.

    Args:
        request: what was made of the options: ids that end a row, stop strings' decoder, a constraint.
        recorder: gets every step's outputs. Rows then stay to the end, so that all steps have B rows.
        embeds: what prompts are, (tokens, C) each, where they are no ids: then `prompts` holds placeholders.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions,
        request: Request,
        recorder: Recorder | None = None,
        embeds: Sequence[Tensor] | None = None,
    ) -> None:
        self.embeds = embeds
        self.model, self.options, self.recorder = model, options, recorder
        self.device = next(model.parameters()).device
        context = model.config.max_position_embeddings
        lengths = [len(prompt) for prompt in prompts]
        limits = [options.limit(length, context) for length in lengths]
        self.rows = [Written(limit, options, request) for limit in limits]
        B, self.width, self.steps = len(prompts), max(lengths), max(limits)
        self.pad = next(iter(request.eos), 0)
        ids = torch.full((B, self.width + self.steps), self.pad, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, self.width - len(prompt) : self.width] = torch.tensor(prompt)
        self.ids = ids.to(self.device)  # (B, S_max)  the prompts, padded on the left; then what follows
        # The same memory for NumPy, whose small operations are faster than torch's.
        self._ids = self.ids.numpy() if self.device.type == "cpu" else None
        self.first: Tensor | None = None  # (B,)  columns of padding
        self.mask: Tensor | None = None  # (B, S_max)  True: token, False: padding
        self.positions: Tensor | None = None  # (B, S_max)
        if min(lengths) < self.width:
            self.first = self.width - torch.tensor(lengths, device=self.device)
            column = torch.arange(self.width + self.steps, device=self.device)  # (S_max,)
            place = column - self.first[:, None]  # (B, S_max)
            self.mask = place >= 0
            self.positions = place.clamp(0, context - 1)  # what lies beyond belongs to finished rows
        self.processors = request.processors(options, model.config.vocab_size, self.device)
        self.uniform: Tensor | None = None
        # the last token is never read: one column less
        columns = self.width + self.steps - 1
        self.cache = new_cache(model, B, columns, options) if options.use_cache else None
        is_plain = type(self.cache) is KeyValueCache  # C reads floats
        self.native = native_step(model) if is_plain and recorder is None else None

    def draw(self, seeds: Sequence[Sequence[int]]) -> None:
        """Draw all numbers that sampling will use, each row's from its own generator."""
        drawn = np.stack([np.random.default_rng(list(seed)).random(self.steps) for seed in seeds])
        dtype = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no float64
        self.uniform = torch.from_numpy(drawn).to(self.device, dtype)  # (B, steps)

    def run(self) -> Iterator[int]:
        """Generate to the end; yields the number of finished rows after each step."""
        numbers = list(range(len(self.rows)))  # of the rows that the cache holds, in its order
        alive: Index = slice(None)  # the same as an index, (n,)
        n_done = 0
        for step in range(self.steps):
            end = self.width + step
            chosen = self._next(alive, step, end)
            if self.recorder:  # finished rows are still there
                chosen = [self.pad if row.stop_reason else token for row, token in zip(self.rows, chosen)]
            if self._ids is not None:
                self._ids[alive, end] = chosen
            else:
                self.ids[alive, end] = torch.tensor(chosen, device=self.device)
            finished: list[int] = []  # places in `numbers`
            for place, (number, token) in enumerate(zip(numbers, chosen)):
                row = self.rows[number]
                if row.stop_reason is None:
                    row.push(token)
                    if row.stop_reason:
                        finished.append(place)
            n_done += len(finished)
            yield n_done
            if n_done == len(self.rows):
                return
            if finished and not self.recorder:
                numbers = self._drop(numbers, finished)
                on_cpu = self._ids is not None
                alive = np.array(numbers) if on_cpu else torch.tensor(numbers, device=self.device)

    def _drop(self, numbers: list[int], finished: list[int]) -> list[int]:
        """The rows that stay. Holes are filled from the end, so that the cache moves as few as possible."""
        n, gone = len(numbers) - len(finished), {*finished}
        places = list(range(n))
        movers = (place for place in range(n, len(numbers)) if place not in gone)
        for hole in finished:
            if hole < n:
                places[hole] = next(movers)
        if self.cache is not None:
            self.cache.select(torch.tensor(places, device=self.device))
        return [numbers[place] for place in places]

    def _next(self, alive: Index, step: int, end: int) -> list[int]:
        """One token for each row that is alive, from the columns before `end`."""
        logits = self._logits(alive, end)  # (n, V)
        scores = logits
        if self.processors:
            ids = self.ids[alive, :end]  # (n, S)
            if self.mask is not None:
                ids = ids.where(self.mask[alive, :end], NO_TOKEN)
            if self.embeds is not None:
                ids = ids.clone()
                ids[:, : self.width] = NO_TOKEN
            for process in self.processors:
                scores = process(scores, ids, step)
        if self.uniform is None:
            tokens = likeliest(logits, scores, self.native)
        else:
            check_scores(logits, scores)
            o = self.options
            scores = sampling.filtered(scores, o.temperature, o.top_k, o.top_p, o.min_p, o.typical_p)
            tokens = sampling.sample(scores, self.uniform[alive, step]).tolist()
        if self.recorder:
            self.recorder.end_step(logits, scores, torch.tensor(tokens, device=self.device))
        return tokens

    def _logits(self, alive: Index, end: int) -> Tensor:
        """What the model says after the columns before `end`, (n, V), of which the cache holds the first."""
        start = 0 if self.cache is None else self.cache.length
        embeds = self.embeds if start == 0 else None  # all rows are alive, and there is a cache: only once
        if self.native and self.cache and embeds is None and self._ids is not None:
            given = self._ids[alive, start:end]  # (n, T)
            if self.native.takes(given.size):
                if self.positions is None or self.first is None:
                    return self.native(given, start, 0, self.cache)
                return self.native(given, self.positions[alive, start:end], self.first[alive], self.cache)
        ids = self.ids[alive, start:end]  # (n, T)
        with nullcontext() if embeds is None else replaced_embeddings(self.model, embeds):
            hidden = self.model.base_model(
                ids,
                None if self.mask is None else self.mask[alive, :end],
                None if self.positions is None else self.positions[alive, start:end],
                self.cache,
                self.recorder.begin_step() if self.recorder else None,
            )  # (n, T, C)
        logits: Tensor = self.model.lm_head(hidden[:, -1]).float()  # (n, V)  only the last position is asked
        return logits

    def completions(self) -> list[Completion]:
        """What every row has become."""
        return [row.completion() for row in self.rows]
