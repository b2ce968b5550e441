"""The Qwen3 family: the names of its weights and settings at Hugging Face, and its FLOPs.

    .model.Qwen3ForCausalLM  <->  transformers.Qwen3ForCausalLM (model.safetensors, config.json)

Our model has the same attribute names and shapes as Hugging Face's, so no name is translated.

A config.json may have a key for a feature that this model lacks (another activation, LongRoPE). Such a key
is an error unless its value switches the feature off. Keys that do not change the result, like `auto_map`,
are not read.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any, get_args, get_type_hints

from minigpt.errors import InputError
from minigpt.families.checks import MAX_LAYERS, require_fixed, require_keys
from minigpt.families.family import Family, Weight
from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM, RopeScaling
from minigpt.families.qwen3.native import MODULES, list_operations, rotary_frequencies, rotary_table

__all__ = ["FAMILY"]

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_WEIGHTS = tuple(
    Weight(f"model.{name}", f"model.{name}")
    for name in (
        "embed_tokens.weight",
        "layers.*.input_layernorm.weight",
        *(f"layers.*.self_attn.{part}.weight" for part in (*_PROJECTIONS, "q_norm", "k_norm")),
        *(f"layers.*.self_attn.{part}.bias" for part in _PROJECTIONS),  # exist only with attention_bias
        "layers.*.post_attention_layernorm.weight",
        *(f"layers.*.mlp.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")),
        "norm.weight",
    )
)
_ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen3Model")

# Settings for which this model supports one value only. An absent key counts as this value, which is
# Hugging Face's default.
_FIXED: dict[str, Any] = {"hidden_act": "silu", "quantization_config": None}
# Keys of config.json for RoPE's settings. transformers 5 writes the first key, earlier versions the second.
_ROPE_KEYS = ("rope_parameters", "rope_scaling")
_LAYERS = ("full_attention", "sliding_attention")


def _config_to_hugging_face(
    config: Qwen3Config, eos_token_id: int | None = None, pad_token_id: int | None = None
) -> dict[str, Any]:
    """Convert a Qwen3Config to the content of a config.json, with the keys of the published models."""
    optional = ("attention_bias", "rope_scaling", "sliding_window", "layer_types")
    layers = {} if config.layer_types is None else {"layer_types": list(config.layer_types)}
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **{field.name: getattr(config, field.name) for field in fields(config) if field.name not in optional},
        "hidden_act": _FIXED["hidden_act"],
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "use_sliding_window": config.sliding_window is not None,
        "rope_scaling": None if config.rope_scaling is None else asdict(config.rope_scaling),
        "sliding_window": config.sliding_window,
        **layers,
        "initializer_range": 0.02,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "dtype": "float32",
    }


def _config_from_hugging_face(values: Mapping[str, Any]) -> Qwen3Config:
    """Build a Qwen3Config from the content of a config.json.

    Raises:
        InputError: if this model does not support a setting; the message names the key.
    """
    if values.get("model_type") != "qwen3":
        raise InputError(f'model_type must be "qwen3": got {values.get("model_type")!r}')
    architectures = values.get("architectures")
    if architectures is not None and architectures not in [[name] for name in _ARCHITECTURES]:
        raise InputError(
            f"architectures must be one of {', '.join(_ARCHITECTURES)}: got {architectures!r:.80}"
        )
    require_fixed(values, _FIXED)
    sizes = [field.name for field in fields(Qwen3Config) if field.type is int]
    require_keys(values, sizes)
    chosen = {name: values[name] for name in sizes}
    if chosen["num_key_value_heads"] is None:  # null in older files means the number of query heads
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]
    try:
        config = Qwen3Config(
            **chosen,
            rms_norm_eps=values.get("rms_norm_eps", 1e-6),
            rope_theta=_rope_theta(values),
            # transformers' default is False, unlike Qwen3Config's
            tie_word_embeddings=values.get("tie_word_embeddings", False),
            attention_bias=values.get("attention_bias", False),
        )
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from None
    scaling = _rope_scaling(values, config)
    window, layers = _windows(values, config)
    return replace(config, rope_scaling=scaling, sliding_window=window, layer_types=layers)


def _windows(values: Mapping[str, Any], config: Qwen3Config) -> tuple[int | None, tuple[str, ...] | None]:
    """Return the sliding window in tokens, and each layer's kind: "full_attention" or "sliding_attention".

    Both are None if no layer has a window, or if the window is so long that it hides nothing.
    """
    count = config.num_hidden_layers
    window = values.get("sliding_window", 4096) if values.get("use_sliding_window", False) else None
    kinds = values.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != count or not all(kind in _LAYERS for kind in kinds):
            raise InputError(
                f"layer_types must be null or a list of {' and '.join(_LAYERS)}, one for each of the "
                f"{count} layers: got {_shown(kinds)}"
            )
        if window is None and _LAYERS[1] in kinds:
            raise InputError(
                "layer_types has sliding_attention, but use_sliding_window or sliding_window is off"
            )
    if window is None or (kinds is not None and _LAYERS[1] not in kinds):
        return None, None
    if not _is_number(window) or not isinstance(window, int):
        raise InputError(f"sliding_window must be a whole number of at least 1: got {window!r:.80}")
    if window >= config.max_position_embeddings:
        return None, None
    if kinds is None:
        first = values.get("max_window_layers", 28)
        if not isinstance(first, int) or isinstance(first, bool):
            raise InputError(f"max_window_layers must be a whole number: got {first!r:.80}")
        if first >= count:
            return None, None
        # a damaged file may claim a billion layers, so `min` limits the length of this list
        kinds = [_LAYERS[index >= first] for index in range(min(count, MAX_LAYERS))]
    return window, tuple(kinds)


def _rope_parameters(values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the key of config.json that holds RoPE's settings, and these settings ({} if there are none)."""
    for key in _ROPE_KEYS:
        inside = values.get(key)
        if inside is not None and not isinstance(inside, dict):
            raise InputError(f"{key} must be null or an object: got {_shown(inside)}")
        if inside and any(isinstance(value, dict) for value in inside.values()):
            raise InputError(f"{key} must be the same for all kinds of layers: got {_shown(inside)}")
        if inside:
            return key, inside
    return _ROPE_KEYS[0], {}


def _rope_theta(values: Mapping[str, Any]) -> Any:
    """Return rope_theta, the base of RoPE's frequencies.

    Older files have rope_theta at the top level; newer files have it among RoPE's settings.
    """
    key, inside = _rope_parameters(values)
    found = {"rope_theta": values["rope_theta"]} if "rope_theta" in values else {}
    if "rope_theta" in inside:
        found[f"{key}.rope_theta"] = inside["rope_theta"]
    first, *others = found.values() or (10_000.0,)  # without rope_theta in the file: Hugging Face's default
    if any(other != first for other in others):
        raise InputError(f"{', '.join(found)} must be the same: got {', '.join(map(repr, found.values()))}")
    return first


def _rope_scaling(values: Mapping[str, Any], config: Qwen3Config) -> RopeScaling | None:
    """Return how RoPE's frequencies are scaled, or None if they are not scaled.

    Raises:
        InputError: for an unsupported rope_type, or a value that is not a number; the message names the key.
    """
    key, inside = _rope_parameters(values)
    kind = inside.get("rope_type", inside.get("type", "default"))
    if kind == "default":
        return None
    if kind not in get_args(get_type_hints(RopeScaling)["rope_type"]):
        raise InputError(
            f"{key}: rope_type={kind!r} is not supported, only default, linear, dynamic, yarn and llama3"
        )
    if inside.get("partial_rotary_factor") not in (None, 1, 1.0):
        got = inside["partial_rotary_factor"]
        raise InputError(f"{key}: partial_rotary_factor={got!r:.80} is not supported, only 1.0")
    used = {
        "linear": ("factor",), "dynamic": ("factor",),
        "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow"),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    }[kind]  # fmt: skip
    found = {name: inside[name] for name in used if inside.get(name) is not None}
    longest = config.max_position_embeddings
    if kind in ("yarn", "llama3"):
        own = inside.get("original_max_position_embeddings", longest)
        found["original_max_position_embeddings"] = values.get("original_max_position_embeddings", own)
    if kind == "yarn":
        found.setdefault("factor", longest / max(1, found["original_max_position_embeddings"]))
        found["truncate"] = bool(inside.get("truncate", True))
    needed = used if kind != "yarn" else ("factor",)
    require_keys({f"{key}.{name}": 0 for name in found}, [f"{key}.{name}" for name in needed])
    for name, value in found.items():
        if name != "truncate" and not _is_number(value):
            raise InputError(f"{key}: {name} must be a number above 0: got {value!r:.80}")
    if kind == "yarn" and "attention_factor" not in found:
        found["attention_factor"] = _yarn_attention_factor(found["factor"], inside)
    return RopeScaling(rope_type=kind, **found)


def _yarn_attention_factor(factor: float, inside: Mapping[str, Any]) -> float:
    """Return the number by which YaRN multiplies cos and sin.

    YaRN's paper gives this number in equation 22 (https://arxiv.org/abs/2309.00071). If the file has mscale
    and mscale_all_dim, DeepSeek's formula is used instead.
    """

    def grown(scale: Any) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    both = inside.get("mscale"), inside.get("mscale_all_dim")
    return grown(both[0]) / grown(both[1]) if all(map(_is_number, both)) else grown(1.0)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _block_weights(config: Qwen3Config) -> int:
    # A query head has hidden_size * head_dim weights in q_proj, and as many in o_proj. A key and value head
    # has as many in k_proj, and as many in v_proj.
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    block = config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)
    return config.num_hidden_layers * block


def _gguf_values(config: Qwen3Config) -> dict[str, float]:
    for name in ("attention_bias", "rope_scaling", "sliding_window"):
        if getattr(config, name):
            raise InputError(f"a Qwen3 with {name} cannot be written: llama.cpp's Qwen3 does not have it")
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "key_length": config.head_dim,
        "value_length": config.head_dim,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_freq_base": config.rope_theta,
    }


FAMILY = Family(
    model_type="qwen3",
    name="qwen3",
    config_class=Qwen3Config,
    model_class=Qwen3ForCausalLM,
    config_from_hugging_face=_config_from_hugging_face,
    config_to_hugging_face=_config_to_hugging_face,
    weights=_WEIGHTS,
    prefix="model.",
    layer_prefix="model.layers.",
    layers_key="num_hidden_layers",
    embedding="model.embed_tokens.weight",
    classifier="Qwen3ForSequenceClassification",
    residual_projections=("self_attn.o_proj.weight", "mlp.down_proj.weight"),
    rescaled_outputs=("q_proj", "v_proj"),
    rescaled_inputs=("down_proj",),
    block_parts={
        "norm_1": "input_layernorm",
        "attn": "self_attn",
        "attn.heads": "self_attn.o_proj",
        "norm_2": "post_attention_layernorm",
        "mlp": "mlp",
    },
    final_norm="model.norm",
    block_weights=_block_weights,
    gguf_values=_gguf_values,
    list_operations=list_operations,
    native_modules=MODULES,
    rotary_table=rotary_table,
    rotary_frequencies=rotary_frequencies,
)
