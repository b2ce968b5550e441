"""Finds the model family of a configuration or of a config.json, and makes models of any family.

    family = family_of(model.config)         # a Family, see family.py
    model = new_model(GPTConfig(n_embd=64))

The rest of minigpt works with any family, because it uses only this:

- from a model: `config`, `base_model` (ids -> hidden states), `blocks`, `lm_head`;
- from a configuration: `parameter_count()`, and the names that most configurations of Hugging Face have
  (`hidden_size`, `num_hidden_layers`, `num_attention_heads`, `num_key_value_heads`, `head_dim`,
  `max_position_embeddings`, `vocab_size`).
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from minigpt.errors import InputError
from minigpt.families.family import HEAD, Family
from minigpt.families.gpt2 import family as gpt2
from minigpt.families.qwen3 import family as qwen3
from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM
from minigpt.model import GPTConfig, GPTLMHeadModel

__all__ = ["FAMILIES", "LanguageModel", "ModelConfig", "family_of", "new_model", "parameter_table"]
__all__ += ["BY_CONFIG", "family_of_json", "is_classifier", "weight_names"]

LanguageModel = GPTLMHeadModel | Qwen3ForCausalLM
ModelConfig = GPTConfig | Qwen3Config
FAMILIES: dict[str, Family] = {family.model_type: family for family in (gpt2.FAMILY, qwen3.FAMILY)}
BY_CONFIG: dict[type, Family] = {family.config_class: family for family in FAMILIES.values()}


def family_of(config: ModelConfig) -> Family:
    """Return the family of a configuration object."""
    return BY_CONFIG[type(config)]


def family_of_json(values: Mapping[str, Any]) -> Family:
    """Return the family of a config.json, given its content.

    Raises:
        InputError: if minigpt has no such family.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(f"model_type must be one of {', '.join(FAMILIES)}: got {model_type!r:.80}")
    if model_type not in FAMILIES:
        # The message suggests no similar name: qwen2 is another architecture, not a misspelt qwen3.
        raise InputError(
            f"model_type {model_type!r} is another architecture; minigpt reads {' and '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def is_classifier(values: Mapping[str, Any]) -> bool:
    """Return True if the content of a config.json describes a classifier instead of a language model."""
    return values.get("architectures") in [[family.classifier] for family in FAMILIES.values()]


def new_model(config: ModelConfig, *, zero_projections: bool = False) -> LanguageModel:
    """Make a model with random weights, drawn from torch's global random generator.

    Args:
        config: configuration of the model.
        zero_projections: set the last matrices of attention and MLP in each block to zero, and also lm_head
            unless it is tied. At first, each block then adds nothing (https://arxiv.org/abs/1901.09321), and
            a zero lm_head makes all tokens equally likely (https://arxiv.org/abs/2203.03466). In the first
            step, the other matrices of the blocks have no gradient. Such a model needs high learning rates.
    """
    family = family_of(config)
    model: LanguageModel = family.model_class(config)
    if zero_projections:
        # A tied lm_head does not become zero, because named_parameters lists its matrix only once, under the
        # embedding's name.
        zeros = [f".{end}" for end in family.residual_projections] + [HEAD]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(tuple(zeros)):
                    parameter.zero_()
    return model


def weight_names(model: Any) -> dict[str, tuple[str, bool]]:
    """Return a dict: our name of a weight -> (Hugging Face's name, True if stored transposed there).

    A classifier has `score` instead of lm_head. That weight has the same name at Hugging Face.
    """
    names = family_of(model.config).weight_names(model.config)
    if not hasattr(model, "score"):
        return names
    return {
        **{ours: one for ours, one in names.items() if ours != HEAD},
        "score.weight": ("score.weight", False),
    }


def parameter_table(model: LanguageModel, only_trained: bool = False) -> list[tuple[str, int]]:
    """Return a list of (part of the model, number of parameters).

    A part that is in every block is one entry for all blocks. only_trained: leave out frozen weights.
    """
    counts: dict[str, int] = {}
    # named_parameters lists a tied tensor once, under its first name
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad or not only_trained}
    if not only_trained:  # quantised weights are not parameters, so they are added here
        layers = [(name, one) for name, one in model.named_modules() if hasattr(one, "dequantized")]
        sizes |= {f"{name}.weight": int(one.out_features) * int(one.in_features) for name, one in layers}
        sizes |= {f"{name}.bias": one.bias.numel() for name, one in layers if one.bias is not None}
    for name, size in sizes.items():
        part = re.sub(r"\.\d+\.", ".*.", name).removeprefix(family_of(model.config).prefix)
        part = part.rpartition(".")[0]
        counts[part] = counts.get(part, 0) + size
    return list(counts.items())
