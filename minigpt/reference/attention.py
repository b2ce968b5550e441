"""Functions that GPT-2 and Qwen3 share: softmax, causal attention, the cache of keys and values.

Letters in shapes: T tokens of this call; S all tokens, which are the cached tokens and these T (under JAX, S
is the size of the cache); H query heads; G key and value heads (GPT-2: G = H); D channels of a head.
"""

import math
from typing import Any, TypeAlias

import numpy

__all__ = ["Array", "attend", "new_cache", "remember", "softmax"]

Array: TypeAlias = Any  # numpy.ndarray or jax.Array; the functions work with both


def softmax(x: Array, np: Any = numpy) -> Array:
    """Return positive numbers that sum to 1 along the last axis. Subtracting the maximum avoids overflow.

    >>> softmax(numpy.array([1000.0, 1000.0]))
    array([0.5, 0.5])
    """
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attend(q: Array, k: Array, v: Array, positions: Array, np: Any = numpy) -> Array:
    """Compute softmax(QK^T / sqrt(D)) V: q (H, T, D), k and v (G, S, D) -> (T, H * D), heads side by side.

    The query at position p attends to the keys 0 ... p. H / G query heads share one head of keys and values
    (grouped-query attention, https://arxiv.org/abs/2305.13245). To avoid copies of the keys, the queries of
    these H / G heads become the rows of one matrix, (H / G * T, D).

    https://arxiv.org/abs/1706.03762 (Attention Is All You Need), equation 1.
    """
    (H, T, D), (G, S, _) = q.shape, k.shape
    scores = q.reshape(G, H // G * T, D) @ k.swapaxes(1, 2)  # (G, H/G*T, S)
    # sqrt of a Python int is a Python float, so float32 scores stay float32
    scores = scores.reshape(H, T, S) / math.sqrt(D)
    visible = np.arange(S) <= positions[:, None]  # (T, S)
    weights = softmax(np.where(visible, scores, -math.inf), np)  # (H, T, S)
    out = weights.reshape(G, H // G * T, S) @ v  # (G, H/G*T, D)
    return out.reshape(H, T, D).transpose(1, 0, 2).reshape(T, H * D)  # (H, T, D) -> (T, H, D) -> (T, H*D)


def new_cache(layers: int, G: int, size: int, D: int, dtype: Any, np: Any = numpy) -> dict[str, Any]:
    """Make an empty cache for `size` tokens: a dict with `length`, and k and v of each layer, (G, size, D).

    `length` is the number of tokens in the cache. All memory is allocated here, because appending to an array
    would copy the whole array for each token.
    """
    blank = [{name: np.zeros((G, size, D), dtype) for name in ("k", "v")} for _ in range(layers)]
    # int32 instead of a Python int: under jax.jit, the generation loop needs the same types in each step
    return {"length": np.int32(0), "layers": blank}


def remember(
    cache: dict[str, Array] | None, k: Array, v: Array, positions: Array, np: Any = numpy
) -> tuple[Array, Array, dict[str, Array] | None]:
    """Write k and v, (G, T, D) each, into a layer's cache. Returns all keys, all values, and the cache.

    With NumPy, the cache changes in place, and the returned keys and values are views of its S tokens. JAX
    arrays cannot change, so a new cache is made. The returned keys and values then have the full size of the
    cache, because jax.jit must know all shapes when it compiles. The causal mask hides the unused places.
    """
    if cache is None:
        return k, v, None
    if np is not numpy:
        cache = {"k": cache["k"].at[:, positions].set(k), "v": cache["v"].at[:, positions].set(v)}
        return cache["k"], cache["v"], cache
    start, end = int(positions[0]), int(positions[-1]) + 1
    cache["k"][:, start:end], cache["v"][:, start:end] = k, v
    return cache["k"][:, :end], cache["v"][:, :end], cache
