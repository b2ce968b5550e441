"""Qwen3 (the dense models) as pure functions over a tree of arrays.

    config, params = weights.load("Qwen3-0.6B")
    logits = forward(ids, params, **settings(config))                                     # (T,) -> (T, V)
    new_ids = generate(ids, params, **settings(config), n_tokens_to_generate=20)          # a list

The file has the same structure as `gpt2.py`. The differences: RMSNorm instead of LayerNorm, rotated queries
and keys (RoPE) instead of learned positions, norms on queries and keys, fewer heads for keys and values,
SwiGLU instead of GELU, and no biases. Weights of linear layers are (out, in), as in torch's Linear.

The architecture: https://arxiv.org/abs/2505.09388 (Qwen3 Technical Report), section 2.

Letters in shapes: T tokens of this call, S all tokens (see `attention.py`), C = hidden_size channels, H query
heads, G key and value heads, D channels of a head (H * D need not be C), F = intermediate_size, V entries of
the vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import numpy

from minigpt.errors import InputError
from minigpt.reference import generation, names
from minigpt.reference.attention import Array, attend, new_cache, remember

__all__ = ["cache_for", "forward", "generate", "params_from_names", "settings", "shapes", "step"]


# -- the model ---------------------------------------------------------------------------------------------


def linear(x: Array, weight: Array) -> Array:
    """Compute a linear layer, (T, in) -> (T, out); weight (out, in). `.T` is a view, so nothing is copied."""
    return x @ weight.T


def rms_norm(x: Array, weight: Array, eps: float, np: Any = numpy) -> Array:
    """(..., C) -> (..., C): divide by the root of the mean square. https://arxiv.org/abs/1910.07467."""
    return weight * (x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps))


def silu(x: Array, np: Any = numpy) -> Array:
    """Compute x * sigmoid(x), with tanh, because exp(-x) could overflow."""
    return x * (0.5 + 0.5 * np.tanh(0.5 * x))


def rotation(positions: Array, D: int, rope_theta: float, dtype: Any, np: Any = numpy) -> tuple[Array, Array]:
    """Return cos and sin, (T, D/2) each, of the angle by which RoPE rotates each pair of channels.

    The angle of pair i at position p is p * rope_theta^(-2i/D). Cos and sin are computed in the dtype of the
    weights.
    """
    frequencies = 1 / rope_theta ** (np.arange(0, D, 2).astype(dtype) / D)  # (D/2,)
    angles = positions[:, None].astype(dtype) * frequencies  # (T, D/2)
    return np.cos(angles), np.sin(angles)


def rotate(x: Array, cos: Array, sin: Array, np: Any = numpy) -> Array:
    """(H, T, D) -> (H, T, D): take channels i and i + D/2 as a point in the plane, and rotate it.

    The product of a rotated query and a rotated key then depends on the distance of the two tokens, but not
    on their positions. https://arxiv.org/abs/2104.09864 (RoFormer), section 3.2. The paper rotates channels
    2i and 2i + 1 together; Qwen3 rotates channels i and i + D/2 together.
    """
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]  # (H, T, D/2) each
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)  # (H, T, D)


def mlp_forward(
    x: Array, gate_proj: names.Tree, up_proj: names.Tree, down_proj: names.Tree, np: Any = numpy
) -> Array:
    """Compute the MLP (SwiGLU), (T, C) -> (T, C). https://arxiv.org/abs/2002.05202."""
    a = silu(linear(x, **gate_proj), np) * linear(x, **up_proj)  # (T, C) -> (T, F)
    return linear(a, **down_proj)  # (T, F) -> (T, C)


def attention_forward(
    x: Array, q_proj: names.Tree, k_proj: names.Tree, v_proj: names.Tree, o_proj: names.Tree,
    q_norm: names.Tree, k_norm: names.Tree, *, positions: Array, turn: tuple[Array, Array], eps: float,
    cache: Any = None, np: Any = numpy,
) -> tuple[Array, Any]:  # fmt: skip
    """Compute causal self-attention, (T, C) -> (T, C), and the layer's cache. `turn`: RoPE's cos and sin."""
    T, D = x.shape[0], q_norm["weight"].shape[0]
    q = linear(x, **q_proj).reshape(T, -1, D)  # (T, C) -> (T, H * D) -> (T, H, D)
    k = linear(x, **k_proj).reshape(T, -1, D)  # (T, C) -> (T, G * D) -> (T, G, D)
    v = linear(x, **v_proj).reshape(T, -1, D).transpose(1, 0, 2)  # (T, C) -> (T, G, D) -> (G, T, D)
    # The norms over the D channels of each head keep the attention scores small, even if weights grow.
    q = rotate(rms_norm(q, **q_norm, eps=eps, np=np).transpose(1, 0, 2), *turn, np)  # (H, T, D)
    k = rotate(rms_norm(k, **k_norm, eps=eps, np=np).transpose(1, 0, 2), *turn, np)  # (G, T, D)
    k, v, cache = remember(cache, k, v, positions, np)  # (G, S, D) each; the cache holds rotated keys
    return linear(attend(q, k, v, positions, np), **o_proj), cache  # (T, H * D) -> (T, C)


def layer_forward(
    x: Array, input_layernorm: names.Tree, self_attn: names.Tree, post_attention_layernorm: names.Tree,
    mlp: names.Tree, *, positions: Array, turn: tuple[Array, Array], eps: float,
    cache: Any = None, np: Any = numpy,
) -> tuple[Array, Any]:  # fmt: skip
    """Compute a block: attention, then MLP. Attention and MLP add their results to the residual stream.

    Returns: the new x (T, C), and the layer's cache.
    """
    normed = rms_norm(x, **input_layernorm, eps=eps, np=np)  # (T, C)
    mixed, cache = attention_forward(
        normed, **self_attn, positions=positions, turn=turn, eps=eps, cache=cache, np=np
    )
    x = x + mixed  # (T, C)
    normed = rms_norm(x, **post_attention_layernorm, eps=eps, np=np)  # (T, C)
    return x + mlp_forward(normed, **mlp, np=np), cache  # (T, C)


def transformer(
    ids: Array,
    embed_tokens: names.Tree,
    layers: list[names.Tree],
    norm: names.Tree,
    lm_head: names.Tree | None = None,
    *,
    rope_theta: float,
    eps: float = 1e-6,
    cache: Any = None,
    np: Any = numpy,
) -> tuple[Array, Any]:
    """ids (T,) -> hidden states (T, C), and the cache with these tokens added. lm_head is not used here."""
    ids = np.asarray(ids)
    past = 0 if cache is None else cache["length"]
    positions = past + np.arange(ids.shape[0])  # (T,)
    x = embed_tokens["weight"][ids]  # (T, C)
    D = layers[0]["self_attn"]["q_norm"]["weight"].shape[0]
    turn = rotation(positions, D, rope_theta, x.dtype, np)  # (T, D/2) each; the same for all layers
    updated = []
    for i, weights in enumerate(layers):
        of_layer = None if cache is None else cache["layers"][i]
        x, of_layer = layer_forward(
            x, **weights, positions=positions, turn=turn, eps=eps, cache=of_layer, np=np
        )
        updated.append(of_layer)
    if cache is not None:
        cache = {"length": cache["length"] + np.int32(ids.shape[0]), "layers": updated}
    return rms_norm(x, **norm, eps=eps, np=np), cache  # (T, C)


def head(params: names.Tree) -> Array:
    """Return the matrix (V, C) that gives logits: lm_head, or the embedding if lm_head is tied."""
    return params["lm_head" if "lm_head" in params else "embed_tokens"]["weight"]


def forward(
    ids: Array, params: names.Tree, *, rope_theta: float, eps: float = 1e-6, np: Any = numpy
) -> Array:
    """ids (T,) -> logits (T, V): at each position, the scores of the next token."""
    x, _ = transformer(ids, **params, rope_theta=rope_theta, eps=eps, np=np)  # (T, C)
    return x @ head(params).T  # (T, V)


def step(
    ids: Array, cache: Any, params: names.Tree, *, rope_theta: float, eps: float = 1e-6, np: Any = numpy
) -> tuple[Array, Any]:
    """Read the next ids (T,). Returns the logits after the last id, (V,), and the cache with these ids.

    With NumPy the cache changes in place, with JAX it does not. Always use the returned cache afterwards.
    """
    x, cache = transformer(ids, **params, rope_theta=rope_theta, eps=eps, cache=cache, np=np)  # (T, C)
    return head(params) @ x[-1], cache  # (V, C) @ (C,) -> (V,)


def cache_for(params: names.Tree, size: int, *, np: Any = numpy) -> Any:
    """Make an empty cache for `size` tokens of this model, with G heads of keys and values."""
    attention = params["layers"][0]["self_attn"]
    D = attention["q_norm"]["weight"].shape[0]
    k_proj = attention["k_proj"]["weight"]  # (G * D, C)
    return new_cache(len(params["layers"]), k_proj.shape[0] // D, size, D, k_proj.dtype, np)


def generate(
    ids: list[int],
    params: names.Tree,
    *,
    rope_theta: float,
    n_tokens_to_generate: int,
    eps: float = 1e-6,
    eos_token_id: int | list[int] | None = None,
    use_cache: bool = True,
    np: Any = numpy,
    **sampling: Any,
) -> list[int]:
    """Return the ids that continue a prompt.

    rope_theta and eps: see `settings`. For the other arguments, see `gpt2.generate`. A text should not exceed
    max_position_embeddings of config.json, because the model was not trained on longer texts. This is not
    checked.

    Raises:
        InputError: for an empty prompt, or ids outside the vocabulary.
    """
    generation.check_ids(ids, params["embed_tokens"]["weight"].shape[0], n_tokens_to_generate)
    return generation.generate(
        ids,
        params,
        step=step,
        forward=forward,
        cache=lambda size: cache_for(params, size, np=np),
        settings={"rope_theta": rope_theta, "eps": eps},
        n_tokens_to_generate=n_tokens_to_generate,
        eos_token_id=eos_token_id,
        use_cache=use_cache,
        np=np,
        **sampling,
    )


# -- files -------------------------------------------------------------------------------------------------


def shapes(
    vocab_size: int, hidden_size: int, intermediate_size: int, num_hidden_layers: int,
    num_attention_heads: int, num_key_value_heads: int, head_dim: int, tie_word_embeddings: bool = True,
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """Return the name (without `model.`) and the shape of every weight."""
    C, F, D = hidden_size, intermediate_size, head_dim
    H, G = num_attention_heads, num_key_value_heads
    of_layer = {
        "input_layernorm.weight": (C,),
        "self_attn.q_proj.weight": (H * D, C),
        "self_attn.k_proj.weight": (G * D, C),
        "self_attn.v_proj.weight": (G * D, C),
        "self_attn.o_proj.weight": (C, H * D),
        "self_attn.q_norm.weight": (D,),
        "self_attn.k_norm.weight": (D,),
        "post_attention_layernorm.weight": (C,),
        "mlp.gate_proj.weight": (F, C),
        "mlp.up_proj.weight": (F, C),
        "mlp.down_proj.weight": (C, F),
    }
    return {
        "embed_tokens.weight": (vocab_size, C),
        **{f"layers.{i}.{name}": shape for i in range(num_hidden_layers) for name, shape in of_layer.items()},
        "norm.weight": (C,),
        **({} if tie_word_embeddings else {"lm_head.weight": (vocab_size, C)}),
    }


def params_from_names(tensors: Mapping[str, Array]) -> names.Tree:
    """Convert a model's tensors, given by Hugging Face name, to the tree of weights.

    The names may be those of Qwen3ForCausalLM or Qwen3Model. All sizes come from the shapes of the tensors.

    Raises:
        InputError: if a weight is missing, unexpected or of the wrong shape; the message names it.
    """
    found = {name.removeprefix("model."): array for name, array in tensors.items()}
    if len(found) < len(tensors):
        raise InputError("a weight comes twice, with and without `model.` before its name")
    first = "layers.0."
    needed = {
        "embed_tokens.weight": 2,
        f"{first}self_attn.q_norm.weight": 1,
        f"{first}self_attn.q_proj.weight": 2,
        f"{first}self_attn.k_proj.weight": 2,
        f"{first}mlp.gate_proj.weight": 2,
    }
    for name, dimensions in needed.items():
        if name not in found or len(found[name].shape) != dimensions:
            raise InputError(f"these are not Qwen3's weights: {name} with {dimensions} dimensions is missing")
    (V, C), (D,), (HD, _), (GD, _), (F, _) = (found[name].shape for name in needed)
    if not D or HD % D or GD % D or not GD or HD % GD:
        raise InputError(
            f"q_proj's {HD} rows must be heads of q_norm's {D} channels, and a multiple of k_proj's {GD}"
        )
    tied, layers = "lm_head.weight" not in found, names.layer_count(found, "layers.")
    names.check_names(found, shapes(V, C, F, layers, HD // D, GD // D, D, tied))
    return names.tree(found)


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `forward` and `generate` that come from config.json.

    Raises:
        InputError: if this code does not support a setting; the message names the key.
    """
    fixed = {
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "rope_scaling": None,
        "quantization_config": None,
    }
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise InputError(f"{key}={config[key]!r} is not supported, only {value!r}")
    rope = config.get("rope_parameters") or {}  # transformers 5 stores rope_theta in rope_parameters
    if not isinstance(rope, Mapping) or rope.get("rope_type", "default") != "default":
        raise InputError(f'rope_parameters={rope!r} is not supported, only rope_type "default"')
    values = {
        "rope_theta": config.get("rope_theta", rope.get("rope_theta", 10000.0)),
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
    }
    for key, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise InputError(f"{key} must be a number above 0: got {value!r}")
    return {"rope_theta": float(values["rope_theta"]), "eps": float(values["rms_norm_eps"])}
