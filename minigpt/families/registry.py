"""The model families side by side: what each must have, and a table from a name to its room.

    names = naming_of(model.config)          # the weight-name table of the model's family
    model = new_model(GPTConfig(n_embd=64))  # a model of whatever family the configuration is of

A family is a folder (`gpt2`, `qwen3`) with the same file names and functions. Everything above this level
works on either: it asks a model for `config`, `base_model` (ids -> hidden vectors), `blocks` and `lm_head`,
and a configuration for Hugging Face's common names (`num_hidden_layers`, `max_position_embeddings`, ...).
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from minigpt.errors import InputError, unknown_name
from minigpt.families.gpt2 import state_dict as gpt2_names
from minigpt.families.qwen3 import state_dict as qwen3_names
from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM
from minigpt.model import GPTConfig, GPTLMHeadModel

__all__ = ["FAMILIES", "LanguageModel", "ModelConfig", "naming", "naming_of", "new_model", "parameter_table"]

LanguageModel = GPTLMHeadModel | Qwen3ForCausalLM
ModelConfig = GPTConfig | Qwen3Config


class Naming(Protocol):
    """What a family's `weight_names` module has; M is its model, C its configuration."""

    def config_from_hugging_face(self, values: Mapping[str, Any], /) -> Any:
        """C from the contents of a config.json; InputError naming the key."""

    def config_to_hugging_face(
        self, config: Any, /, *, eos_token_id: int | None, pad_token_id: int | None
    ) -> dict[str, Any]:
        """The contents of config.json."""

    def from_hugging_face(
        self, tensors: Mapping[str, Tensor], config: Any, dtype: torch.dtype = ..., /
    ) -> dict[str, Tensor]:
        """Weights under our names; InputError naming what is missing, unexpected or unfit."""

    def to_hugging_face(self, model: Any, /) -> dict[str, Tensor]:
        """Weights under Hugging Face's names: copies on the CPU."""

    def fill(self, model: Any, weights: dict[str, Tensor], /, *, assign: bool) -> None:
        """Put what `from_hugging_face` returned into a model."""

    def weight_table(self, config: Any, /) -> dict[str, tuple[str, bool]]:
        """Our name of each weight, lm_head's too -> Hugging Face's, and whether that is (in, out)."""

    def unfilled(self, config: Any, /) -> Any:
        """M on "meta": shapes without memory."""

    def shapes(self, config: Any, /) -> dict[str, torch.Size]:
        """Of each parameter; kept, so that the second time costs nothing."""


# config.json's model_type -> the room's table of weight names, which also reads and writes config.json
FAMILIES: dict[str, Naming] = {"gpt2": gpt2_names, "qwen3": qwen3_names}
_CLASSES: dict[type[ModelConfig], tuple[str, Callable[[Any], LanguageModel]]] = {
    GPTConfig: ("gpt2", GPTLMHeadModel),
    Qwen3Config: ("qwen3", Qwen3ForCausalLM),
}
# what ends attention and MLP: these are added to the stream
_STREAM_PROJECTIONS = {
    "gpt2": ("attn.out_proj.weight", "mlp.c_proj.weight"),
    "qwen3": ("self_attn.o_proj.weight", "mlp.down_proj.weight"),
}


def naming(values: Mapping[str, Any]) -> Naming:
    """The family that the contents of a config.json are of.

    Raises:
        InputError: if there is no such family here.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(f"model_type must be one of {', '.join(FAMILIES)}: got {model_type!r}")
    if model_type not in FAMILIES:
        raise InputError(unknown_name("model_type", model_type, FAMILIES))
    return FAMILIES[model_type]


def naming_of(config: ModelConfig) -> Naming:
    """The family of a configuration in memory."""
    return FAMILIES[_CLASSES[type(config)][0]]


def new_model(config: ModelConfig, *, zero_projections: bool = False) -> LanguageModel:
    """A model with freshly drawn weights, from torch's random generator.

    Args:
        zero_projections: then zero the projections that end attention and MLP in each block, and an lm_head
            of its own. Each block begins by adding nothing (https://arxiv.org/abs/1901.09321), and the first
            guess is that all tokens are equally likely (https://arxiv.org/abs/2203.03466). The blocks' other
            matrices get a gradient from the second step on: only for rates that are high enough to leave.
    """
    family, model_class = _CLASSES[type(config)]
    model = model_class(config)
    if zero_projections:
        ends = [
            parameter
            for name, parameter in model.blocks.named_parameters()
            if name.endswith(_STREAM_PROJECTIONS[family])
        ]
        if all(parameter is not model.lm_head.weight for parameter in model.base_model.parameters()):
            ends.append(model.lm_head.weight)  # not tied
        with torch.no_grad():
            for parameter in ends:
                parameter.zero_()
    return model


def parameter_table(model: LanguageModel) -> list[tuple[str, int]]:
    """The parts and how many values each holds in all blocks; their sum is config.parameter_count()."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():  # a tied tensor comes once, under its first name
        part = re.sub(r"\.\d+\.", ".*.", name).removeprefix("transformer.").removeprefix("model.")
        part = part.rpartition(".")[0]
        counts[part] = counts.get(part, 0) + parameter.numel()
    return list(counts.items())
