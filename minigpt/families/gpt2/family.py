"""The GPT-2 family: the names of its weights and settings at Hugging Face, and its FLOPs.

    minigpt.model.GPTLMHeadModel  <->  transformers.GPT2LMHeadModel (model.safetensors, config.json)

Besides the names, two details differ. First, Hugging Face stores matrices as (in, out), like OpenAI's
TensorFlow weights; torch's Linear stores (out, in). Second, our models with `bias=False` lack some of GPT-2's
biases. Saving writes zeros for these biases, which does not change the logits. Loading drops the zeros.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from minigpt.errors import InputError
from minigpt.families.checks import require_fixed, require_keys
from minigpt.families.family import Family, Weight
from minigpt.families.gpt2.native import MODULES, list_operations
from minigpt.model import GPTConfig, GPTLMHeadModel

__all__ = ["FAMILY", "gelu_difference"]

_WEIGHTS = (
    Weight("transformer.wte.weight", "transformer.wte.weight"),
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

# field of GPTConfig -> key of Hugging Face's config.json
_SIZES = {
    "vocab_size": "vocab_size",
    "block_size": "n_positions",
    "n_embd": "n_embd",
    "n_layer": "n_layer",
    "n_head": "n_head",
}
# GPT-2 has three dropout settings; GPTConfig has one. Saving writes GPTConfig.dropout to all three keys.
# Loading reads the first key and ignores the two others.
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
_GELUS: dict[str, Any] = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
# minigpt's own key of config.json, for GPTConfig.bias; without the key, bias is True
_BIAS = "minigpt_bias"

# Settings for which this model supports one value only. An absent key counts as this value, which is
# Hugging Face's default.
_FIXED: dict[str, Any] = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "quantization_config": None,
}


def _config_to_hugging_face(
    config: GPTConfig, eos_token_id: int | None = None, pad_token_id: int | None = None
) -> dict[str, Any]:
    """Convert a GPTConfig to the content of a config.json."""
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
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": None,  # None must be written, because Hugging Face's default is 50256
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "dtype": "float32",
        _BIAS: config.bias,
    }


def _config_from_hugging_face(values: Mapping[str, Any]) -> GPTConfig:
    """Build a GPTConfig from the content of a config.json.

    Raises:
        InputError: if this model does not support a setting; the message names the key.
    """
    if values.get("model_type") != "gpt2":
        raise InputError(f'model_type must be "gpt2": got {values.get("model_type")!r}')
    require_fixed(values, _FIXED)
    require_keys(values, _SIZES.values())
    gelu = values.get("activation_function", "gelu_new")
    if gelu not in list(_GELUS):
        raise InputError(f"activation_function must be one of {', '.join(_GELUS)}: got {gelu!r:.80}")
    bias = values.get(_BIAS, True)
    if not isinstance(bias, bool):
        raise InputError(f"{_BIAS} must be true or false: got {bias!r:.80}")
    sizes = {ours: values[theirs] for ours, theirs in _SIZES.items()}
    try:
        config = GPTConfig(
            **sizes,
            dropout=values.get(_DROPOUTS[0], 0.1),
            bias=bias,
            gelu=_GELUS[gelu],
            tie_word_embeddings=values.get("tie_word_embeddings", True),
        )
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from None
    if values.get("n_inner") not in (None, 4 * config.n_embd):
        raise InputError(
            f"n_inner must be null or 4 * n_embd = {4 * config.n_embd}: got {values['n_inner']!r:.80}"
        )
    return config


def gelu_difference(model: GPTLMHeadModel, tokens: int = 64) -> tuple[float, float]:
    """Compare the exact GELU with its tanh approximation in a model, on random tokens.

    Returns: the largest difference between the logits, and the share of positions at which the most likely
    token differs.
    """
    length = min(tokens, model.config.block_size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=generator)  # (1, T)
    ids = ids.to(model.lm_head.weight.device)
    before = [block.mlp.approximate for block in model.blocks]
    with torch.no_grad():
        logits = []
        for form in ("none", "tanh"):
            for block in model.blocks:
                block.mlp.approximate = form
            logits.append(model(ids)[0].float())  # (T, V)
    for block, form in zip(model.blocks, before):
        block.mlp.approximate = form
    exact, approximate = logits
    changed = (exact.argmax(-1) != approximate.argmax(-1)).float().mean()
    return float((exact - approximate).abs().max()), float(changed)


def _gguf_notes(model: GPTLMHeadModel) -> list[str]:
    if model.config.gelu == "tanh":
        return []
    largest, share = gelu_difference(model)
    return [
        "this model was trained with the exact GELU, llama.cpp computes GPT-2 with its tanh form: on random "
        f"tokens logits differ by up to {largest:.2g}, and {share:.1%} of the most likely tokens change"
    ]


FAMILY = Family(
    model_type="gpt2",
    name="gpt",
    config_class=GPTConfig,
    model_class=GPTLMHeadModel,
    config_from_hugging_face=_config_from_hugging_face,
    config_to_hugging_face=_config_to_hugging_face,
    weights=_WEIGHTS,
    prefix="transformer.",
    layer_prefix="transformer.h.",
    layers_key="n_layer",
    embedding="transformer.wte.weight",
    classifier="GPT2ForSequenceClassification",
    # names of causal masks, which old files store beside the weights
    ignored=re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"),
    with_all_weights=lambda config: replace(config, bias=True),
    residual_projections=("attn.out_proj.weight", "mlp.c_proj.weight"),
    rescaled_outputs=("c_attn",),
    rescaled_inputs=("mlp.c_proj",),
    block_parts={
        "norm_1": "ln_1",
        "attn": "attn",
        "attn.heads": "attn.out_proj",
        "norm_2": "ln_2",
        "mlp": "mlp",
    },
    final_norm="transformer.ln_f",
    fused={"qkv_proj.weight": 3},
    # in each block, attention has (3 + 1) C^2 weights, and the MLP (4 + 4) C^2; C is n_embd
    block_weights=lambda config: config.n_layer * 12 * config.n_embd**2,
    gguf_values=lambda config: {
        "block_count": config.n_layer,
        "context_length": config.block_size,
        "embedding_length": config.n_embd,
        "feed_forward_length": 4 * config.n_embd,
        "head_count": config.n_head,
        "layer_norm_eps": _FIXED["layer_norm_epsilon"],
    },
    gguf_notes=_gguf_notes,
    list_operations=list_operations,
    native_modules=MODULES,
)
