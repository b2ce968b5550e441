"""One sequence that is being written: what it may choose next, and when it ends.

A `Row` is for those who write rows one by one: the engine, speculation, the sliding window. It reads nothing:
logits come from the caller. From the same logits it chooses what minigpt.generation.batch chooses, from the
same drawn numbers.

Letters in shapes: V entries of the vocabulary, S tokens so far.
"""

from collections.abc import Generator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from minigpt.errors import InputError
from minigpt.generation import sampling
from minigpt.generation.batch import check_scores, likeliest
from minigpt.generation.options import GenerationOptions
from minigpt.generation.request import Request
from minigpt.generation.stopping import Written

__all__ = ["Row", "check_single", "outcome"]

End = TypeVar("End")


def check_single(options: GenerationOptions, where: str) -> None:
    """Refuse options that do not make one sequence of ids of one prompt, or do without a cache.

    Raises:
        InputError: naming the option, and `where` it does not go.
    """
    plain_values = {
        "num_beams": 1, "num_return_sequences": 1, "use_cache": True, "prompt_lookup_num_tokens": None
    }  # fmt: skip
    for name, plain in plain_values.items():
        if (value := getattr(options, name)) != plain:
            raise InputError(f"{name}={value} does not go with {where}: use generate_ids")
    if options.reports:
        raise InputError(f"{options.reports[0]} does not go with {where}: use generate_output")


def outcome(tokens: Generator[int, None, End]) -> End:
    """Let a text be written to its end; returns what the generator returns."""
    while True:
        try:
            next(tokens)
        except StopIteration as end:
            found: End = end.value
            return found


class Row(Written):
    """The new tokens of one prompt, and what chooses them.

    Args:
        seed: what its drawn numbers begin with (minigpt.generation.api.row_seed); None: the likeliest.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        limit: int,
        options: GenerationOptions,
        request: Request,
        vocab_size: int,
        device: torch.device,
        seed: Sequence[int] | None,
    ) -> None:
        super().__init__(limit, options, request)
        self.prompt, self.options, self._request = list(prompt), options, request
        self._processors = request.processors(options, vocab_size, device)
        self._all: Tensor | None = None  # (1, S_max)  where scores depend on what was said
        if self._processors:
            self._all = torch.zeros(1, len(prompt) + limit, dtype=torch.int64, device=device)
            self._all[0, : len(prompt)] = torch.tensor(self.prompt, device=device)
        self.uniform: Tensor | None = None  # (limit,)  a drawn number for each new token
        if seed is not None:
            drawn = torch.from_numpy(np.random.default_rng(list(seed)).random(limit))
            dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
            self.uniform = drawn.to(device, dtype)

    @property
    def length(self) -> int:
        """Tokens so far, the prompt's included."""
        return len(self.prompt) + len(self.ids)

    @property
    def last(self) -> int:
        """The last token so far."""
        return self.ids[-1] if self.ids else self.prompt[-1]

    @property
    def first(self) -> int:
        """Tokens before the one that is read when the first new token is chosen."""
        return len(self.prompt) - 1

    @property
    def end(self) -> int:
        """Tokens that have been read when the last new token is chosen, at most."""
        return self.first + self.limit

    @property
    def tokens(self) -> int | None:
        """How many ids there are tokens for; None: nobody knows."""
        return self._request.tokens

    def scores(self, logits: Tensor) -> Tensor:
        """What the options make of the logits behind the last token, (1, V): -inf is what cannot come.

        Raises:
            InputError: if the logits are not numbers, or no token is left.
        """
        scores = self._processed(logits)
        check_scores(logits, scores)
        return scores

    def _processed(self, logits: Tensor) -> Tensor:
        scores = logits
        for process in self._processors:
            assert self._all is not None, "kept for them"
            scores = process(scores, self._all[:, : self.length], len(self.ids))
        return scores

    def filtered(self, scores: Tensor) -> Tensor:
        """Scores (n, V) after temperature, top_k, top_p, min_p and typical_p: their softmax is drawn from."""
        o = self.options
        return sampling.filtered(scores, o.temperature, o.top_k, o.top_p, o.min_p, o.typical_p)

    def choose(self, logits: Tensor) -> int:
        """The next token, from the logits behind the last one, (1, V)."""
        if self.uniform is None:
            return likeliest(logits, self._processed(logits))[0]
        scores = self.filtered(self.scores(logits))
        return int(sampling.sample(scores, self.uniform[len(self.ids)][None]))

    def push(self, token: int) -> bool:
        """Take the next token; returns whether it is one of the new ids: all but the ending eos are."""
        is_new = super().push(token)
        if is_new and self._all is not None:
            self._all[0, self.length - 1] = token
        return is_new
