"""The generation loop for GPT-2 and Qwen3: choose a token, give it to the model, choose the next one.

With a cache, the model reads each token once. Without a cache, it reads the whole text again for each new
token, which is slower; the tokens are the same.
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
    """Check the ids of a prompt. Without this check, wrong ids would give wrong results and no error.

    For a negative id, NumPy counts the rows of the embedding from the end. For an id that is too large, JAX
    takes the last row.

    Raises:
        InputError: if the prompt is empty, an id is outside the vocabulary (V ids), n_tokens_to_generate is
            below 0, or prompt and new tokens together are more than N (the model's number of positions).
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
    """Return at most n_tokens_to_generate new ids. An end token stops the loop and is not returned.

    Args:
        ids: the prompt.
        params: the weights.
        step, forward: the model's functions of these names, such as gpt2.step and gpt2.forward.
        cache: called with a number of tokens; makes an empty cache for this number.
        settings: further arguments of step and forward.
        n_tokens_to_generate: largest number of new tokens.
        eos_token_id: one end token or several.
        use_cache: True: the model reads each token once. False: the model reads the whole text for each new
            token.
        rng: random generator for sampling. None: always take the most likely token.
        temperature, top_k, top_p: see `sampling.filtered`; used only with rng.
        np: numpy or jax.numpy.
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
            # First give the whole prompt. Later the last token is enough, because the cache holds the others.
            given = written[-1:] if written else ids
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
