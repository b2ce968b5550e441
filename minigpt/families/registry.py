"""The model families by name, and a model of whichever family a configuration belongs to.

    family = family_of(model.config)         # a Family: see .family for what it can do
    model = new_model(GPTConfig(n_embd=64))

The rest of minigpt works on any family. It asks a model for `config`, `base_model` (ids -> hidden vectors),
`blocks` and `lm_head`, and a configuration for `parameter_count()` and Hugging Face's common names
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
__all__ += ["BY_CONFIG", "family_of_json"]

LanguageModel = GPTLMHeadModel | Qwen3ForCausalLM
ModelConfig = GPTConfig | Qwen3Config
FAMILIES: dict[str, Family] = {family.model_type: family for family in (gpt2.FAMILY, qwen3.FAMILY)}
BY_CONFIG: dict[type, Family] = {family.config_class: family for family in FAMILIES.values()}


def family_of(config: ModelConfig) -> Family:
    """The family of a configuration in memory."""
    return BY_CONFIG[type(config)]


def family_of_json(values: Mapping[str, Any]) -> Family:
    """The family that the contents of a config.json belong to.

    Raises:
        InputError: if there is no such family here.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(f"model_type must be one of {', '.join(FAMILIES)}: got {model_type!r}")
    if model_type not in FAMILIES:
        # No "did you mean": a qwen2 is no misspelt qwen3.
        raise InputError(
            f"model_type {model_type!r} is another architecture: read are {' and '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def new_model(config: ModelConfig, *, zero_projections: bool = False) -> LanguageModel:
    """A model with freshly drawn weights, from torch's random generator.

    Args:
        zero_projections: set the last matrices of attention and MLP in each block to zero, and an lm_head
            that is not tied. Each block begins by adding nothing (https://arxiv.org/abs/1901.09321), and at
            first all tokens are equally likely (https://arxiv.org/abs/2203.03466). The blocks' other matrices
            get a gradient from the second step on: only for learning rates that are high enough to leave.
    """
    family = family_of(config)
    model: LanguageModel = family.model_class(config)
    if zero_projections:
        zeros = [f".{end}" for end in family.residual_projections] + [HEAD]  # a tied head has another name
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(tuple(zeros)):
                    parameter.zero_()
    return model


def parameter_table(model: LanguageModel) -> list[tuple[str, int]]:
    """The parts and how many values each holds in all blocks; their sum is config.parameter_count()."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():  # a tied tensor comes once, under its first name
        part = re.sub(r"\.\d+\.", ".*.", name).removeprefix(family_of(model.config).prefix)
        part = part.rpartition(".")[0]
        counts[part] = counts.get(part, 0) + parameter.numel()
    return list(counts.items())
