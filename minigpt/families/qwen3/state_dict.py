"""Qwen3's weights and settings as Hugging Face's files have them, read and written strictly.

    minigpt.families.qwen3.model.Qwen3ForCausalLM  <->  transformers.Qwen3ForCausalLM (model.safetensors, config.json)

There is no table of weight names, because there is nothing to translate: our model's attributes are called as
theirs are, and both keep torch's shapes. What is left is to compare. It opens no file: that is
`minigpt.weights.pretrained`.

A config.json may ask for what this model does not compute (a sliding window, stretched positions, biases).
Each such key is an error unless it is off; keys that change no result, `auto_map` among them, are not read.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from minigpt.errors import InputError
from minigpt.families import strict_loading
from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM
from minigpt.families.strict_loading import (
    completed_names,
    parameter_shapes,
    require_finite,
    require_fit,
    require_fixed,
    require_keys,
    require_layers,
    two_at_a_time,
)
from minigpt.storage.large_pages import LargePages
from minigpt.storage.safetensors_files import described, has_own_memory

__all__ = [
    "config_from_hugging_face",
    "config_to_hugging_face",
    "fill",
    "from_hugging_face",
    "shapes",
    "to_hugging_face",
    "unfilled",
    "weight_table",
]

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen3Model")

# What a Qwen3 may vary elsewhere and not here. An absent key means Hugging Face's default, the same value.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "quantization_config": None,
}
_ROPE_KEYS = ("rope_parameters", "rope_scaling")  # the name since transformers 5, and the one before


def config_to_hugging_face(
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


def config_from_hugging_face(values: Mapping[str, Any]) -> Qwen3Config:
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


def to_hugging_face(model: Qwen3ForCausalLM) -> dict[str, Tensor]:
    """The model's weights under Hugging Face's names: float32 copies on the CPU, a tied head left out.

    Raises:
        InputError: naming the tensor, if one holds NaN or infinity: nobody could load the file.
    """
    state = dict(model.named_parameters())
    assert state.keys() == shapes(model.config).keys(), "a wrapped model: give the Qwen3ForCausalLM inside"
    for name, tensor in state.items():
        require_finite(name, tensor)
    contiguous = torch.contiguous_format
    return {
        name: tensor.detach().to("cpu", torch.float32, copy=True, memory_format=contiguous)
        for name, tensor in state.items()
    }


def from_hugging_face(
    tensors: Mapping[str, Tensor], config: Qwen3Config, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Weights copied to `dtype`, from those of a Qwen3ForCausalLM or a Qwen3Model (without `model.`).

    The result has every parameter of Qwen3ForCausalLM(config), a tied head not twice.

    Raises:
        InputError: in one line, all that is missing, unexpected, or of the wrong shape or type; or the first
            tensor with NaN; or a head of its own where config says that it is tied.
    """
    name_of, unexpected = completed_names(tensors, "model.", "lm_head.")
    head = name_of.pop(_HEAD, None) if config.tie_word_embeddings else None
    forms = described(tensors)
    found = {full_name: forms[name] for full_name, name in name_of.items()}
    require_layers(found, "model.layers.", config.num_hidden_layers, "num_hidden_layers")
    require_fit(found, shapes(config), unexpected)

    pages = LargePages()

    def read_copy(full_name: str) -> Tensor:
        name = name_of[full_name]
        tensor = tensors[name]  # files are read here, each tensor once
        require_finite(full_name, tensor)
        return pages.copied(tensor, dtype, own=has_own_memory(tensors, name))

    read = dict(zip(name_of, two_at_a_time(read_copy, name_of)))
    if head is not None and not torch.equal(tensors[head].to(dtype), read[_EMBEDDING]):
        raise InputError(f"{_HEAD} differs from {_EMBEDDING}, but tie_word_embeddings says that they are one")
    return read


def fill(model: Qwen3ForCausalLM, weights: dict[str, Tensor], *, assign: bool) -> None:
    """Put what `from_hugging_face` returned into a model: copied, or (assign) taken as they are."""
    tied = model.config.tie_word_embeddings
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=assign)
    assert (missing, unexpected) == ([_HEAD] if tied else [], []), "from_hugging_face gives all the rest"
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight  # assignment cuts the tie


def weight_table(config: Qwen3Config) -> dict[str, tuple[str, bool]]:
    """Our name of each weight -> Hugging Face's, and whether it lies there as (in, out): all as they are."""
    names = [*shapes(config), _HEAD]
    return {name: (name, False) for name in names}


def unfilled(config: Qwen3Config) -> Qwen3ForCausalLM:
    """The model's shapes, on "meta": neither memory nor time for weights."""
    return strict_loading.unfilled(lambda: Qwen3ForCausalLM(config))


def shapes(config: Qwen3Config) -> dict[str, torch.Size]:
    """Each parameter's shape; kept."""
    return parameter_shapes(unfilled, config)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
