"""Our names for GPT-2's weights and settings, and Hugging Face's: tables, read in both directions.

    minigpt.model.GPTLMHeadModel  <->  transformers.GPT2LMHeadModel (model.safetensors, config.json)

It renames, transposes and checks. It opens no file: that is `minigpt.weights.pretrained`.

Two things differ besides names. Hugging Face's GPT-2 keeps the shapes of the original TensorFlow weights,
(in, out) where torch's Linear has (out, in). And our `bias=False` variant lacks biases that GPT-2 always has:
they are written as zeros, which changes no result, and dropped again on reading.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minigpt.errors import InputError
from minigpt.families import strict_loading
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
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.storage.large_pages import LargePages
from minigpt.storage.safetensors_files import described, has_own_memory

__all__ = [
    "WEIGHTS",
    "config_from_hugging_face",
    "config_to_hugging_face",
    "fill",
    "from_hugging_face",
    "shapes",
    "to_hugging_face",
    "unfilled",
    "weight_table",
]


class Weight(NamedTuple):
    """One row: `*` is the block's number; the transposed ones are Hugging Face's Conv1D, stored (in, out)."""

    ours: str
    theirs: str
    transposed: bool = False


WEIGHTS = (
    Weight("transformer.wte.weight", "transformer.wte.weight"),  # also lm_head.weight, which is not written
    Weight("transformer.wpe.weight", "transformer.wpe.weight"),
    Weight("transformer.blocks.*.ln_1.weight", "transformer.h.*.ln_1.weight"),
    Weight("transformer.blocks.*.ln_1.bias", "transformer.h.*.ln_1.bias"),
    Weight(
        "transformer.blocks.*.attn.qkv_proj.weight", "transformer.h.*.attn.c_attn.weight", transposed=True
    ),
    Weight("transformer.blocks.*.attn.qkv_proj.bias", "transformer.h.*.attn.c_attn.bias"),
    Weight(
        "transformer.blocks.*.attn.out_proj.weight", "transformer.h.*.attn.c_proj.weight", transposed=True
    ),
    Weight("transformer.blocks.*.attn.out_proj.bias", "transformer.h.*.attn.c_proj.bias"),
    Weight("transformer.blocks.*.ln_2.weight", "transformer.h.*.ln_2.weight"),
    Weight("transformer.blocks.*.ln_2.bias", "transformer.h.*.ln_2.bias"),
    Weight("transformer.blocks.*.mlp.c_fc.weight", "transformer.h.*.mlp.c_fc.weight", transposed=True),
    Weight("transformer.blocks.*.mlp.c_fc.bias", "transformer.h.*.mlp.c_fc.bias"),
    Weight("transformer.blocks.*.mlp.c_proj.weight", "transformer.h.*.mlp.c_proj.weight", transposed=True),
    Weight("transformer.blocks.*.mlp.c_proj.bias", "transformer.h.*.mlp.c_proj.bias"),
    Weight("transformer.ln_f.weight", "transformer.ln_f.weight"),
    Weight("transformer.ln_f.bias", "transformer.ln_f.bias"),
)

# Causal masks that old files carry as if they were weights.
_MASK_BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")

# GPTConfig's fields that Hugging Face has one to one.
_SIZES = {
    "vocab_size": "vocab_size",
    "block_size": "n_positions",
    "n_embd": "n_embd",
    "n_layer": "n_layer",
    "n_head": "n_head",
}
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")  # one number here
_GELUS: dict[str, Any] = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
_BIAS = "minigpt_bias"  # our own key; a file without it is a GPT-2, which has all biases

# What a GPT-2 may vary elsewhere and not here. An absent key means Hugging Face's default, the same value.
_FIXED: dict[str, Any] = {
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "quantization_config": None,
}


def config_to_hugging_face(
    config: GPTConfig, eos_token_id: int | None = None, pad_token_id: int | None = None
) -> dict[str, Any]:
    """The contents of config.json."""
    gelu = next(theirs for theirs, ours in _GELUS.items() if ours == config.gelu)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: getattr(config, ours) for ours, theirs in _SIZES.items()},
        "n_inner": None,
        "activation_function": gelu,
        **dict.fromkeys(_DROPOUTS, config.dropout),
        "layer_norm_epsilon": _FIXED["layer_norm_epsilon"],
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": None,  # said aloud, because the default there is 50256
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "dtype": "float32",
        _BIAS: config.bias,
    }


def config_from_hugging_face(values: Mapping[str, Any]) -> GPTConfig:
    """GPTConfig from the contents of config.json.

    Raises:
        InputError: naming the key, if the file describes a model that this one cannot be.
    """
    if values.get("model_type") != "gpt2":
        raise InputError(f'model_type must be "gpt2": got {values.get("model_type")!r}')
    require_fixed(values, _FIXED)
    require_keys(values, _SIZES.values())
    dropouts = [values.get(key, 0.1) for key in _DROPOUTS]
    if dropouts != dropouts[:1] * 3:
        raise InputError(f"{', '.join(_DROPOUTS)} must be equal: got {', '.join(map(repr, dropouts))}")
    gelu = values.get("activation_function", "gelu_new")
    if gelu not in list(_GELUS):
        raise InputError(f"activation_function must be one of {', '.join(_GELUS)}: got {gelu!r}")
    bias = values.get(_BIAS, True)
    if not isinstance(bias, bool):
        raise InputError(f"{_BIAS} must be true or false: got {bias!r}")
    sizes = {ours: values[theirs] for ours, theirs in _SIZES.items()}
    try:
        config = GPTConfig(**sizes, dropout=dropouts[0], bias=bias, gelu=_GELUS[gelu])
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from None
    if values.get("n_inner") not in (None, 4 * config.n_embd):
        raise InputError(
            f"n_inner must be null or 4 * n_embd = {4 * config.n_embd}: got {values['n_inner']!r}"
        )
    return config


def to_hugging_face(model: GPTLMHeadModel) -> dict[str, Tensor]:
    """The model's weights under Hugging Face's names: float32 copies on the CPU.

    Raises:
        InputError: naming the tensor, if one holds NaN or infinity: nobody could load the file.
    """
    state, ours_has = dict(model.named_parameters()), shapes(model.config)
    assert state.keys() == ours_has.keys(), "a wrapped model: give the GPTLMHeadModel inside"
    with_biases = shapes(replace(model.config, bias=True))
    written = {}
    for ours, theirs, transposed in _rows(model.config):
        tensor = state[ours].detach() if ours in ours_has else torch.zeros(with_biases[ours])
        require_finite(ours, tensor)
        tensor = tensor.t() if transposed else tensor
        written[theirs] = tensor.to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
    return written


def from_hugging_face(
    tensors: Mapping[str, Tensor], config: GPTConfig, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Weights under our names, copied to `dtype`, from those of a GPT2LMHeadModel or a GPT2Model.

    The result has every parameter of GPTLMHeadModel(config) except lm_head.weight, which is wte's tensor. Of
    `WeightFiles`, two tensors at a time are held besides it.

    Raises:
        InputError: in one line, all that is missing, unexpected, or of the wrong shape or type; or the first
            tensor with NaN, with a bias that config says does not exist, or with a head of its own.
    """
    name_of, unexpected = completed_names(tensors, "transformer.", "lm_head.")
    head = name_of.pop("lm_head.weight", None)
    forms = described(tensors)
    found = {full: forms[name] for full, name in name_of.items() if not _MASK_BUFFER.fullmatch(full)}
    require_layers(found, "transformer.h.", config.n_layer, "n_layer")
    rows = list(_rows(config))
    ours_has, with_biases = shapes(config), shapes(replace(config, bias=True))
    expected = {row.theirs: with_biases[row.ours][:: -1 if row.transposed else 1] for row in rows}
    optional = [row.theirs for row in rows if row.ours not in ours_has]
    require_fit(found, expected, unexpected, optional)

    pages = LargePages()

    def read_copy(row: Weight) -> Tensor | None:
        name = name_of[row.theirs]
        tensor = tensors[name]  # files are read here, each tensor once
        require_finite(row.theirs, tensor)
        if row.ours in ours_has:
            ordered = tensor.t() if row.transposed else tensor
            return pages.copied(ordered, dtype, own=has_own_memory(tensors, name))
        if tensor.any():
            raise InputError(f"{row.theirs} is not zero, but {_BIAS} says that there is no such bias")
        return None

    there = [row for row in rows if row.theirs in found]
    copies = zip(there, two_at_a_time(read_copy, there))
    read = {row.ours: copy for row, copy in copies if copy is not None}
    if head is not None and not torch.equal(tensors[head].to(dtype), read["transformer.wte.weight"]):
        raise InputError(
            "lm_head.weight differs from transformer.wte.weight: only tied weights are supported"
        )
    return read


def fill(model: GPTLMHeadModel, weights: dict[str, Tensor], *, assign: bool) -> None:
    """Put what `from_hugging_face` returned into a model: copied, or (assign) taken as they are."""
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=assign)
    assert (missing, unexpected) == (["lm_head.weight"], []), "from_hugging_face gives all but the tied head"
    model.lm_head.weight = model.transformer.wte.weight  # assignment cuts the tie


def weight_table(config: GPTConfig) -> dict[str, tuple[str, bool]]:
    """Our name of each weight -> Hugging Face's, and whether it lies there as (in, out)."""
    table = {row.ours: (row.theirs, row.transposed) for row in _rows(config)}
    return {**table, "lm_head.weight": ("lm_head.weight", False)}


def _rows(config: GPTConfig) -> Iterator[Weight]:
    """The table with each block's number filled in."""
    for row in WEIGHTS:
        if "*" not in row.ours:
            yield row
            continue
        for block in map(str, range(config.n_layer)):
            yield Weight(row.ours.replace("*", block), row.theirs.replace("*", block), row.transposed)


def unfilled(config: GPTConfig) -> GPTLMHeadModel:
    """The model's shapes, on "meta": neither memory nor time for weights."""
    return strict_loading.unfilled(lambda: GPTLMHeadModel(config))


def shapes(config: GPTConfig) -> dict[str, torch.Size]:
    """Each parameter's shape; kept."""
    return parameter_shapes(unfilled, config)
