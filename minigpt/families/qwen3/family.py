"""Qwen3, the family: the names of its weights and settings at Hugging Face, and its arithmetic.

    .model.Qwen3ForCausalLM  <->  transformers.Qwen3ForCausalLM (model.safetensors, config.json)

Our model's attributes are called as theirs are, and both keep torch's shapes: no name needs a translation.

A config.json may ask for what this model does not compute (a sliding window, stretched positions, biases).
Each such key is an error unless it is off; keys that change no result, `auto_map` among them, are not read.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from minigpt.errors import InputError
from minigpt.families.checks import require_fixed, require_keys
from minigpt.families.family import Family, Weight
from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM
from minigpt.families.qwen3.native import MODULES, list_operations, rotary_table

__all__ = ["FAMILY"]

_WEIGHTS = tuple(
    Weight(f"model.{name}.weight", f"model.{name}.weight")
    for name in (
        "embed_tokens",
        "layers.*.input_layernorm",
        *(
            f"layers.*.self_attn.{part}"
            for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
        ),
        "layers.*.post_attention_layernorm",
        *(f"layers.*.mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")),
        "norm",
    )
)
_ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen3Model")

# What a Qwen3 may vary elsewhere and not here. An absent key means Hugging Face's default, the same value.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
    "quantization_config": None,
}
_ROPE_KEYS = ("rope_parameters", "rope_scaling")  # the name since transformers 5, and the one before


def _config_to_hugging_face(
    config: Qwen3Config, eos_token_id: int | None = None, pad_token_id: int | None = None
) -> dict[str, Any]:
    """The contents of config.json, with the keys that the published models have."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **{field.name: getattr(config, field.name) for field in fields(config)},
        **{key: value for key, value in _FIXED.items() if value is not None},
        "rope_scaling": None,
        "sliding_window": None,
        "initializer_range": 0.02,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "dtype": "float32",
    }


def _config_from_hugging_face(values: Mapping[str, Any]) -> Qwen3Config:
    """Qwen3Config from the contents of config.json.

    Raises:
        InputError: naming the key, if the file describes a model that this one cannot be.
    """
    if values.get("model_type") != "qwen3":
        raise InputError(f'model_type must be "qwen3": got {values.get("model_type")!r}')
    architectures = values.get("architectures")
    if architectures is not None and architectures not in [[name] for name in _ARCHITECTURES]:
        raise InputError(f"architectures must be one of {', '.join(_ARCHITECTURES)}: got {architectures!r}")
    require_fixed(values, _FIXED)
    sizes = [field.name for field in fields(Qwen3Config) if field.type is int]
    require_keys(values, sizes)
    chosen = {name: values[name] for name in sizes}
    if chosen["num_key_value_heads"] is None:  # older files: as many as there are heads of queries
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]
    try:
        config = Qwen3Config(
            **chosen,
            rms_norm_eps=values.get("rms_norm_eps", 1e-6),
            rope_theta=_rope_theta(values),
            tie_word_embeddings=values.get("tie_word_embeddings", False),  # Hugging Face's default
        )
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from None
    kinds = values.get("layer_types")
    is_list = isinstance(kinds, list) and len(kinds) == config.num_hidden_layers  # which may be a billion
    if kinds is not None and not (is_list and set(map(str, kinds)) == {"full_attention"}):
        raise InputError(
            'layer_types must be null or "full_attention" for each of the '
            f"{config.num_hidden_layers} layers: got {_shown(kinds)}"
        )
    return config


def _rope_theta(values: Mapping[str, Any]) -> Any:
    """RoPE's base, which files of different age keep in different places."""
    found = {"rope_theta": values["rope_theta"]} if "rope_theta" in values else {}
    for key in _ROPE_KEYS:
        inside = values.get(key)
        if inside is None:
            continue
        off = isinstance(inside, dict) and inside.keys() <= {"rope_theta", "rope_type", "type"}
        if not off or any(inside.get(kind, "default") != "default" for kind in ("rope_type", "type")):
            raise InputError(
                f'{key}={_shown(inside)} is not supported, only null or {{"rope_type": "default"}}'
            )
        if "rope_theta" in inside:
            found[f"{key}.rope_theta"] = inside["rope_theta"]
    require_keys(found or values, () if found else ("rope_theta",))
    first, *others = found.values()
    if any(other != first for other in others):
        raise InputError(f"{', '.join(found)} must be the same: got {', '.join(map(repr, found.values()))}")
    return first


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _block_weights(config: Qwen3Config) -> int:
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads  # queries, output; keys, values
    block = config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)
    return config.num_hidden_layers * block


FAMILY = Family(
    model_type="qwen3",
    config_class=Qwen3Config,
    model_class=Qwen3ForCausalLM,
    config_from_hugging_face=_config_from_hugging_face,
    config_to_hugging_face=_config_to_hugging_face,
    weights=_WEIGHTS,
    prefix="model.",
    layer_prefix="model.layers.",
    layers_key="num_hidden_layers",
    embedding="model.embed_tokens.weight",
    residual_projections=("self_attn.o_proj.weight", "mlp.down_proj.weight"),
    block_weights=_block_weights,
    gguf_values=lambda config: {
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
    },
    list_operations=list_operations,
    native_modules=MODULES,
    rotary_table=rotary_table,
)
