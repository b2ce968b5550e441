"""Reads and writes the model in a checkpoint's folder: a whole Hugging Face model, or a PEFT adapter."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel, family_of
from minigpt.finetuning.adapters import ADAPTER_MODEL, adapter_tensors, save_adapter
from minigpt.finetuning.bottleneck import BottleneckConfig
from minigpt.finetuning.ia3 import IA3Config
from minigpt.finetuning.layers import AdapterConfig
from minigpt.finetuning.lora import LoraConfig
from minigpt.storage.safetensors_files import TensorFile
from minigpt.training.config import TrainConfig
from minigpt.training.finetune_config import FinetuneConfig
from minigpt.weights.pretrained import AnyTokenizer, load_weights, save_pretrained, save_tokenizer
from minigpt.weights.quantized import is_quantised

__all__ = [
    "AdapterFiles", "ModelFiles", "adapter_config", "copied", "require_trainable", "weights_fingerprint",
]  # fmt: skip

# value of --method -> class of the adapter's configuration
_CONFIGS: dict[str, Callable[..., AdapterConfig]] = {
    "lora": LoraConfig, "adapter": BottleneckConfig, "ia3": IA3Config,
}  # fmt: skip


class ModelFiles:
    """Reads and writes a whole model: config.json, model.safetensors, and the tokenizer's files."""

    def __init__(self) -> None:
        self._facts: dict[str, str] = {}

    def writer(
        self, model: LanguageModel, tokenizer: AnyTokenizer, in_background: bool
    ) -> Callable[[Path], None]:
        """Return a function that writes the current model into a folder.

        Args:
            in_background: True if training continues while the function writes. The function then writes a
                copy of the model.
        """
        kept = copied(model) if in_background else model
        return lambda folder: save_pretrained(kept, folder, tokenizer)

    def facts(self) -> dict[str, str]:
        """Return facts for training_state.json, such as a fingerprint of the base model.

        When a run is resumed, its facts must equal the facts in the checkpoint.
        """
        return self._facts

    def rests_on(self, **facts: str) -> None:
        """Add facts (name=value) to training_state.json.

        When a run is resumed, its facts must equal the facts in the checkpoint.
        """
        self._facts.update(facts)

    def load(self, model: LanguageModel, folder: Path) -> None:
        """Copy the weights of a checkpoint into the model, in place.

        Raises:
            InputError: if the weights belong to another model.
        """
        load_weights(model, folder)


class AdapterFiles(ModelFiles):
    """Reads and writes an adapter: adapter_config.json, adapter_model.safetensors, the tokenizer's files.

    Args:
        model: the model with the adapter. Only the adapter is trainable.
        config: configuration of the adapter.
        base: folder of the base model. Its path is written into adapter_config.json.
    """

    task_type = "CAUSAL_LM"  # PEFT's name for language modelling

    def __init__(self, model: LanguageModel, config: AdapterConfig, base: Path) -> None:
        super().__init__()
        self._config, self._base = config, base
        self.rests_on(base_fingerprint=weights_fingerprint(model, only_frozen=True))

    def writer(
        self, model: LanguageModel, tokenizer: AnyTokenizer, in_background: bool
    ) -> Callable[[Path], None]:
        """Return a function that writes the adapter into a folder."""
        tensors = {name: t.detach().clone() for name, t in adapter_tensors(model).items()}

        def write(folder: Path) -> None:
            base = str(self._base)
            save_adapter(model, self._config, folder, base, tensors=tensors, task_type=self.task_type)
            save_tokenizer(tokenizer, folder, model.config.max_position_embeddings)

        return write

    def load(self, model: LanguageModel, folder: Path) -> None:
        """Copy the adapter of a checkpoint into the model, in place. The frozen weights do not change."""
        saved = TensorFile(folder / ADAPTER_MODEL)
        with torch.no_grad():
            for name, tensor in adapter_tensors(model).items():
                tensor.copy_(saved[name])


def adapter_config(method: str, options: dict[str, Any]) -> AdapterConfig:
    """Return the configuration of an adapter, from `method` and `adapter_options()` of FinetuneConfig."""
    return _CONFIGS[method](**options)


def require_trainable(model: nn.Module, config: TrainConfig, folder: Path) -> None:
    """Raise InputError if a folder's weights are quantised and the run trains no adapter.

    Quantised weights themselves cannot be trained.
    """
    if is_quantised(model) and not (isinstance(config, FinetuneConfig) and config.has_adapter):
        raise InputError(
            f"{folder} is quantised, so its weights cannot be trained: train an adapter beside them "
            "(minigpt finetune --method lora), or give the folder that it was made from"
        )


def copied(model: LanguageModel) -> LanguageModel:
    """Return a copy of the model on the CPU. Further training does not change the copy."""
    family = family_of(model.config)
    copy: LanguageModel = family.on_meta(model.config)
    weights = family.from_hugging_face(family.to_hugging_face(model), model.config, torch.float32)
    family.load_state(copy, weights, assign=True)
    return copy


def weights_fingerprint(model: LanguageModel, only_frozen: bool = False) -> str:
    """Return the SHA-256 of a model's weights, or with `only_frozen` of its frozen weights."""
    digest = hashlib.sha256()
    # buffers are needed, too: quantised weights are buffers
    for name, parameter in sorted([*model.named_parameters(), *model.named_buffers()]):
        if not (only_frozen and parameter.requires_grad):
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
