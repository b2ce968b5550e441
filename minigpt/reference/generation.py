"""The loop that generates, for either model: choose a token, give it to the model, choose the next.

With a cache the model sees each token once. Without, it is given the whole text for each new token and its
answer is taken from the last row: the slow twin.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy

from minigpt.errors import InputError
from minigpt.reference import sampling
from minigpt.reference.names import Tree
from minigpt.reference.transforms import compiled

__all__ = ["check_ids", "generate"]


def check_ids(ids: Sequence[int], V: int, n_tokens_to_generate: int, N: int | None = None) -> None:
    """Find what NumPy and JAX would let pass: an id below 0 counts from the end there, JAX clips one above.

    Raises:
        InputError: for an empty prompt, an id outside of the vocabulary, or more than N tokens in all.
    """
    if len(ids) == 0:
        raise InputError("the prompt is empty: the model needs at least one token to continue")
    wrong = [int(i) for i in ids if not 0 <= i < V]
    if wrong:
        raise InputError(f"ids must be at least 0 and below the vocabulary's size, {V}: got {wrong[0]}")
    if n_tokens_to_generate < 0:
        raise InputError(f"n_tokens_to_generate must be at least 0: got {n_tokens_to_generate}")
    if N is not None and len(ids) + n_tokens_to_generate > N:
        raise InputError(
            f"the model has {N} positions: after a prompt of {len(ids)} tokens at most "
            f"{max(0, N - len(ids))} new ones are possible, not {n_tokens_to_generate}"
        )


def generate(
    ids: Sequence[int],
    params: Tree,
    *,
    step: Callable[..., Any],
    forward: Callable[..., Any],
    cache: Callable[[int], Any],
    settings: dict[str, Any],
    n_tokens_to_generate: int,
    eos_token_id: int | Sequence[int] | None = None,
    use_cache: bool = True,
    rng: numpy.random.Generator | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    np: Any = numpy,
) -> list[int]:
    """New ids, at most n_tokens_to_generate; the end token, which is not among them, stops it.

    Args:
        step, forward, cache, settings: a model's functions, and their settings.
        rng: draws a number for each token; None takes the most likely token instead.
        temperature, top_k, top_p: as `sampling.filtered`; they matter only with rng.
    """
    sampling.check(temperature, top_k, top_p)
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
    if np is not numpy:
        step, forward = (compiled(function, **settings) for function in (step, forward))
        settings = {}
    else:
        settings = {**settings, "np": np}
    state = cache(len(ids) + n_tokens_to_generate) if use_cache else None
    written: list[int] = []
    while len(written) < n_tokens_to_generate:
        if state is None:
            logits = forward(numpy.array([*ids, *written]), params, **settings)[-1]  # (V,)
        else:
            given = written[-1:] if written else ids  # the cache holds what came before
            logits, state = step(numpy.array(given), state, params, **settings)  # (V,)
        if rng is None:
            token = int(sampling.greedy(logits, np))
        else:
            scores = sampling.filtered(logits, temperature, top_k, top_p, np)
            token = int(sampling.sample(scores, rng.random(), np))
        if token in ends:
            break
        written.append(token)
    return written
