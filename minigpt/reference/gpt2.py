"""GPT-2 as pure functions over a tree of arrays.

    config, params = weights.load("output/best")
    logits = forward(ids, params, **settings(config))                                     # (T,) -> (T, V)
    new_ids = generate(ids, params, **settings(config), n_tokens_to_generate=20)          # a list

The arguments of a function have the names of the weights in Hugging Face's files. `np` is the array module:
NumPy or `jax.numpy`. With `jax.numpy`, the same functions can be compiled, differentiated and batched
(`minigpt.reference.transforms`). Computation is in the dtype of the arrays, float32 or float64.

The architecture: https://openai.com/index/better-language-models (Language Models are Unsupervised Multitask
Learners, 2019). Weights of linear layers are (in, out), as in OpenAI's release. There is no dropout.

Letters in shapes: T tokens of this call, S all tokens (see `attention.py`), C = n_embd channels, H = n_head
heads, D = C / H channels of a head, V entries of the vocabulary, N = n_positions.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy

from minigpt.errors import InputError
from minigpt.reference import generation, names
from minigpt.reference.attention import Array, attend, new_cache, remember

__all__ = ["cache_for", "forward", "generate", "params_from_names", "settings", "shapes", "step"]


# -- the model ---------------------------------------------------------------------------------------------


def linear(x: Array, weight: Array, bias: Array) -> Array:
    """Compute a linear layer, (T, in) -> (T, out); weight (in, out), bias (out,)."""
    return x @ weight + bias


def layer_norm(x: Array, weight: Array, bias: Array, np: Any = numpy) -> Array:
    """(T, C) -> (T, C): normalise each token's channels to mean 0 and variance 1, scale and shift."""
    centred = x - x.mean(axis=-1, keepdims=True)  # (T, C)
    variance = (centred * centred).mean(axis=-1, keepdims=True)  # (T, 1)
    return centred / np.sqrt(variance + 1e-5) * weight + bias  # (T, C)


def gelu_tanh(x: Array, np: Any = numpy) -> Array:
    """GPT-2's approximation of GELU: https://arxiv.org/abs/1606.08415, section 2."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))


def gelu_exact(x: Array, np: Any = numpy) -> Array:
    """The exact GELU: x times the standard normal distribution function.

    `minigpt train` uses it by default.
    """
    return 0.5 * x * (1 + erf(x * math.sqrt(0.5), np))


def erf(x: Array, np: Any = numpy) -> Array:
    """The error function of each number. NumPy lacks it, so math.erf is called; JAX has its own."""
    if np is numpy:
        return numpy.fromiter(map(math.erf, x.ravel().tolist()), x.dtype, x.size).reshape(x.shape)
    from jax.scipy.special import erf as jax_erf

    return jax_erf(x)


GELUS = {"tanh": gelu_tanh, "exact": gelu_exact}


def mlp_forward(x: Array, c_fc: names.Tree, c_proj: names.Tree, gelu: str, np: Any = numpy) -> Array:
    """Compute the MLP, (T, C) -> (T, C). The result for a token depends on this token alone."""
    a = GELUS[gelu](linear(x, **c_fc), np)  # (T, C) -> (T, 4C)
    return linear(a, **c_proj)  # (T, 4C) -> (T, C)


def attention_forward(
    x: Array, c_attn: names.Tree, c_proj: names.Tree,
    n_head: int, positions: Array, cache: Any = None, np: Any = numpy,
) -> tuple[Array, Any]:  # fmt: skip
    """Compute causal self-attention, (T, C) -> (T, C). Returns the result and the layer's cache."""
    T, C = x.shape
    qkv = linear(x, **c_attn).reshape(T, 3, n_head, C // n_head)  # (T, C) -> (T, 3C) -> (T, 3, H, D)
    q, k, v = qkv.transpose(1, 2, 0, 3)  # (3, H, T, D): three times (H, T, D)
    k, v, cache = remember(cache, k, v, positions, np)  # (H, S, D) each
    return linear(attend(q, k, v, positions, np), **c_proj), cache  # (T, C) -> (T, C)


def block(
    x: Array, ln_1: names.Tree, attn: names.Tree, ln_2: names.Tree, mlp: names.Tree, *,
    n_head: int, gelu: str, positions: Array, cache: Any = None, np: Any = numpy,
) -> tuple[Array, Any]:  # fmt: skip
    """Compute a block: attention, then MLP. Attention and MLP add their results to the residual stream.

    Returns: the new x (T, C), and the layer's cache.
    """
    normed = layer_norm(x, **ln_1, np=np)  # (T, C)
    mixed, cache = attention_forward(normed, **attn, n_head=n_head, positions=positions, cache=cache, np=np)
    x = x + mixed  # (T, C)
    return x + mlp_forward(layer_norm(x, **ln_2, np=np), **mlp, gelu=gelu, np=np), cache  # (T, C)


def transformer(
    ids: Array,
    wte: names.Tree,
    wpe: names.Tree,
    h: list[names.Tree],
    ln_f: names.Tree,
    *,
    n_head: int,
    gelu: str = "tanh",
    cache: Any = None,
    np: Any = numpy,
) -> tuple[Array, Any]:
    """ids (T,) -> hidden states (T, C), and the cache with these tokens added."""
    ids = np.asarray(ids)
    past = 0 if cache is None else cache["length"]
    positions = past + np.arange(ids.shape[0])  # (T,)
    x = wte["weight"][ids] + wpe["weight"][positions]  # (T, C)
    updated = []
    for i, weights in enumerate(h):
        of_layer = None if cache is None else cache["layers"][i]
        x, of_layer = block(
            x, **weights, n_head=n_head, gelu=gelu, positions=positions, cache=of_layer, np=np
        )
        updated.append(of_layer)
    if cache is not None:
        cache = {"length": cache["length"] + np.int32(ids.shape[0]), "layers": updated}
    return layer_norm(x, **ln_f, np=np), cache  # (T, C)


def forward(ids: Array, params: names.Tree, *, n_head: int, gelu: str = "tanh", np: Any = numpy) -> Array:
    """ids (T,) -> logits (T, V): at each position, the scores of the next token."""
    x, _ = transformer(ids, **params, n_head=n_head, gelu=gelu, np=np)  # (T, C)
    return x @ params["wte"]["weight"].T  # (T, V); the output matrix is the transposed embedding wte


def step(
    ids: Array, cache: Any, params: names.Tree, *, n_head: int, gelu: str = "tanh", np: Any = numpy
) -> tuple[Array, Any]:
    """Read the next ids (T,). Returns the logits after the last id, (V,), and the cache with these ids.

    With NumPy the cache changes in place, with JAX it does not. Always use the returned cache afterwards.
    """
    x, cache = transformer(ids, **params, n_head=n_head, gelu=gelu, cache=cache, np=np)  # (T, C)
    return params["wte"]["weight"] @ x[-1], cache  # (V, C) @ (C,) -> (V,)


def cache_for(params: names.Tree, size: int, *, n_head: int, np: Any = numpy) -> Any:
    """Make an empty cache for `size` tokens of this model."""
    wte = params["wte"]["weight"]
    return new_cache(len(params["h"]), n_head, size, wte.shape[1] // n_head, wte.dtype, np)


def generate(
    ids: list[int],
    params: names.Tree,
    *,
    n_head: int,
    n_tokens_to_generate: int,
    gelu: str = "tanh",
    eos_token_id: int | list[int] | None = None,
    use_cache: bool = True,
    np: Any = numpy,
    **sampling: Any,
) -> list[int]:
    """Return the ids that continue a prompt. With `rng` they are drawn at random, else the most likely ones.

    Args:
        ids: the prompt.
        params: the weights.
        n_head, gelu: see `settings`.
        n_tokens_to_generate: largest number of new tokens.
        eos_token_id: one end token or several; an end token is not in the result.
        use_cache: True: keep keys and values. False: compute them again for each new token.
        np: numpy or jax.numpy. With jax.numpy, `step` is compiled.
        sampling: rng (numpy.random.default_rng(seed)), temperature, top_k, top_p: see `generation.generate`.

    Raises:
        InputError: for ids outside the vocabulary, or more tokens than the model has positions.
    """
    V, N = params["wte"]["weight"].shape[0], params["wpe"]["weight"].shape[0]
    generation.check_ids(ids, V, n_tokens_to_generate, N)
    return generation.generate(
        ids,
        params,
        step=step,
        forward=forward,
        cache=lambda size: cache_for(params, size, n_head=n_head, np=np),
        settings={"n_head": n_head, "gelu": gelu},
        n_tokens_to_generate=n_tokens_to_generate,
        eos_token_id=eos_token_id,
        use_cache=use_cache,
        np=np,
        **sampling,
    )


# -- files -------------------------------------------------------------------------------------------------


def shapes(vocab_size: int, n_positions: int, n_embd: int, n_layer: int) -> dict[str, tuple[int, ...]]:
    """Return the name (without `transformer.`) and the shape of every weight."""
    C = n_embd
    of_block = {
        "ln_1.weight": (C,),
        "ln_1.bias": (C,),
        "attn.c_attn.weight": (C, 3 * C),
        "attn.c_attn.bias": (3 * C,),
        "attn.c_proj.weight": (C, C),
        "attn.c_proj.bias": (C,),
        "ln_2.weight": (C,),
        "ln_2.bias": (C,),
        "mlp.c_fc.weight": (C, 4 * C),
        "mlp.c_fc.bias": (4 * C,),
        "mlp.c_proj.weight": (4 * C, C),
        "mlp.c_proj.bias": (C,),
    }
    return {
        "wte.weight": (vocab_size, C),
        "wpe.weight": (n_positions, C),
        **{f"h.{i}.{name}": shape for i in range(n_layer) for name, shape in of_block.items()},
        "ln_f.weight": (C,),
        "ln_f.bias": (C,),
    }


def params_from_names(tensors: Mapping[str, Array]) -> names.Tree:
    """Convert a model's tensors, given by Hugging Face name, to the tree of weights.

    The names may be those of GPT2LMHeadModel or GPT2Model.

    Raises:
        InputError: if a weight is missing, unexpected or of the wrong shape, or if lm_head differs from wte.
    """
    found = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    if len(found) < len(tensors):
        raise InputError("a weight comes twice, with and without `transformer.` before its name")
    for name in [name for name in found if name.endswith((".attn.bias", ".attn.masked_bias"))]:
        del found[name]  # these tensors are causal masks, which old files store among the weights
    head = found.pop("lm_head.weight", None)
    sizes = [found[name].shape for name in ("wte.weight", "wpe.weight") if name in found]
    if len(sizes) != 2 or any(len(size) != 2 for size in sizes):
        raise InputError("these are not GPT-2's weights: wte.weight (V, C) and wpe.weight (N, C) are missing")
    (V, C), (N, _) = sizes
    names.check_names(found, shapes(V, N, C, names.layer_count(found, "h.")))
    if head is not None and not numpy.array_equal(head, found["wte.weight"]):
        raise InputError("lm_head.weight differs from wte.weight: GPT-2 has one matrix for both")
    return names.tree(found)


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `forward` and `generate` that come from config.json.

    Raises:
        InputError: if this code does not support a setting; the message names the key.
    """
    fixed = {
        "model_type": "gpt2",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "quantization_config": None,
    }
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise InputError(f"{key}={config[key]!r} is not supported, only {value!r}")
    gelus = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
    gelu = config.get("activation_function", "gelu_new")
    if gelu not in list(gelus):
        raise InputError(f"activation_function must be one of {', '.join(gelus)}: got {gelu!r}")
    n_head = config.get("n_head")
    if not isinstance(n_head, int) or isinstance(n_head, bool) or n_head < 1:
        raise InputError(f"n_head must be a whole number of at least 1: got {n_head!r}")
    n_embd = config.get("n_embd", n_head)
    if not isinstance(n_embd, int) or n_embd % n_head:
        raise InputError(f"n_head must divide n_embd: got n_head={n_head}, n_embd={n_embd!r:.80}")
    return {"n_head": n_head, "gelu": gelus[gelu]}
