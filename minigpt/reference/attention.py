"""What GPT-2 and Qwen3 share: softmax, attention with a causal mask, the cache of earlier keys and values.

Letters in shapes: T tokens given now, S tokens in all (the cached ones and these T; under JAX the places of
the cache), H heads of the queries, G heads of keys and values (GPT-2: G = H), D channels of one head.
"""

import math
from typing import Any, TypeAlias

import numpy

__all__ = ["Array", "attend", "new_cache", "remember", "softmax"]

Array: TypeAlias = Any  # numpy.ndarray or jax.Array: the functions do not ask which


def softmax(x: Array, np: Any = numpy) -> Array:
    """Positive numbers that sum to 1 along the last axis; the largest is subtracted so that exp is finite.

    >>> softmax(numpy.array([1000.0, 1000.0]))
    array([0.5, 0.5])
    """
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attend(q: Array, k: Array, v: Array, positions: Array, np: Any = numpy) -> Array:
    """softmax(QK^T / sqrt(D)) V for q (H, T, D), k and v (G, S, D) -> (T, H * D), all heads side by side.

    The query at position p sees the keys 0 ... p. H / G heads in a row use the same keys and values
    (https://arxiv.org/abs/2305.13245, grouped-query attention): nothing is copied for that, their queries are
    stacked as if they were more tokens.

    https://arxiv.org/abs/1706.03762 (Attention Is All You Need), equation 1.
    """
    (H, T, D), (G, S, _) = q.shape, k.shape
    scores = q.reshape(G, H // G * T, D) @ k.swapaxes(1, 2)  # (G, H/G*T, S)
    scores = scores.reshape(H, T, S) / math.sqrt(D)  # a float of Python: float32 stays float32
    visible = np.arange(S) <= positions[:, None]  # (T, S)
    weights = softmax(np.where(visible, scores, -math.inf), np)  # (H, T, S)
    out = weights.reshape(G, H // G * T, S) @ v  # (G, H/G*T, D)
    return out.reshape(H, T, D).transpose(1, 0, 2).reshape(T, H * D)  # (H, T, D) -> (T, H, D) -> (T, H*D)


def new_cache(layers: int, G: int, size: int, D: int, dtype: Any, np: Any = numpy) -> dict[str, Any]:
    """An empty cache for `size` tokens: `length`, and for each layer k and v, (G, size, D).

    The memory is taken at once: to append to arrays would copy all of them for each token.
    """
    # int32, not int: under jax.jit a step must return the very types that it was given
    blank = [{name: np.zeros((G, size, D), dtype) for name in ("k", "v")} for _ in range(layers)]
    return {"length": np.int32(0), "layers": blank}


def remember(
    cache: dict[str, Array] | None, k: Array, v: Array, positions: Array, np: Any = numpy
) -> tuple[Array, Array, dict[str, Array] | None]:
    """Write k, v (G, T, D) at their positions into a layer's cache; returns all of them, and it.

    NumPy writes in place and returns views of the S filled places. JAX arrays never change: a new cache comes
    back, and with it all its places, because the number of filled ones is unknown when jax.jit compiles; the
    causal mask hides the empty ones.
    """
    if cache is None:
        return k, v, None
    if np is not numpy:
        cache = {"k": cache["k"].at[:, positions].set(k), "v": cache["v"].at[:, positions].set(v)}
        return cache["k"], cache["v"], cache
    start, end = int(positions[0]), int(positions[-1]) + 1
    cache["k"][:, start:end], cache["v"][:, start:end] = k, v
    return cache["k"][:, :end], cache["v"][:, :end], cache
