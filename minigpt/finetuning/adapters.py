"""PEFT's adapter folders: adapter_config.json and adapter_model.safetensors, read and written.

    save_adapter(model, config, Path("output/mine"), base="gpt2")
    config = load_adapter(model, Path("output/mine"))    # apply_lora, then the adapter's weights

The names of weights are PEFT's: base_model.model.<Hugging Face's name of the layer>.lora_A.weight, and so on.
A folder of PEFT is read as it is; what it asks for and minigpt does not have is one clear refusal.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minigpt.errors import InputError
from minigpt.families.checks import differences
from minigpt.families.registry import LanguageModel, family_of
from minigpt.finetuning.lora import LoraConfig, apply_lora, lora_layers
from minigpt.storage.files import atomic_write
from minigpt.storage.json_files import read_json
from minigpt.storage.safetensors_files import TensorFile, safetensors_parts

__all__ = ["ADAPTER_CONFIG", "ADAPTER_MODEL", "adapter_tensors", "is_adapter", "load_adapter", "save_adapter"]

ADAPTER_CONFIG, ADAPTER_MODEL = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What PEFT may vary and minigpt does not have: the value that asks for nothing.
_FIXED: dict[str, Any] = {
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_pattern": None,
    "layer_replication": None,
    "megatron_config": None,
    "loftq_config": {},
    "exclude_modules": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "lora_bias": False,
    "alora_invocation_tokens": None,
    "use_qalora": False,
}


def is_adapter(folder: Path) -> bool:
    """Is it an adapter's folder?"""
    return (folder / ADAPTER_CONFIG).is_file()


def adapter_tensors(model: LanguageModel, config: LoraConfig) -> dict[str, Tensor]:
    """The adapter's parameters under PEFT's names; they are the model's own, not copies."""
    theirs = {
        ours.removesuffix(".weight"): name.removesuffix(".weight")
        for ours, (name, _) in family_of(model.config).weight_names(model.config).items()
    }
    found: dict[str, Tensor] = {}
    for name, layer in lora_layers(model):
        stem = f"{_PREFIX}{theirs[name]}"
        found[f"{stem}.lora_A.weight"] = layer.lora_A
        found[f"{stem}.lora_B.weight"] = layer.lora_B
        if layer.use_dora:
            found[f"{stem}.lora_magnitude_vector"] = layer.lora_magnitude_vector
    for name, parameter in _saved_whole(model, config):
        key, _, kind = name.rpartition(".")
        found[f"{_PREFIX}{theirs.get(key, key)}.{kind}"] = parameter
    return found


def _saved_whole(model: LanguageModel, config: LoraConfig) -> list[tuple[str, nn.Parameter]]:
    return [
        (name, parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if any(
            f".{module}." in f".{name}" and not name.split(".")[-1].startswith("lora_")
            for module in config.modules_to_save
        )
    ]


def save_adapter(
    model: LanguageModel,
    config: LoraConfig,
    folder: Path,
    base: str = "",
    tensors: Mapping[str, Tensor] | None = None,
    task_type: str = "CAUSAL_LM",
) -> None:
    """Write a model's adapter as PEFT does.

    Args:
        config: what `apply_lora` was given.
        base: folder or name of the model that the adapter belongs to, for whoever loads it.
        tensors: what `adapter_tensors` gave earlier, if the model has changed since; left out: as it is now.
        task_type: as PEFT calls it; of a classifier SEQ_CLS.

    Raises:
        InputError: if a value is not finite, or the files cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in (adapter_tensors(model, config) if tensors is None else tensors).items()
    }
    transposed = any(flip for _, flip in family_of(model.config).weight_names(model.config).values())
    layers = {name.partition(".lora_A.")[0] for name in tensors if ".lora_A." in name}
    names: Any = sorted({layer.rpartition(".")[2] for layer in layers})
    if isinstance(config.target_modules, str) and config.target_modules != "all-linear":
        names = config.target_modules  # a regular expression
    values = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": names,
        "layers_to_transform": list(config.layers_to_transform) or None,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "init_lora_weights": True if config.init_lora_weights == "default" else config.init_lora_weights,
        "modules_to_save": list(config.modules_to_save) or None,
        "fan_in_fan_out": transposed,
        "bias": "none",
        "inference_mode": True,
    }
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"{name} holds NaN or infinity: the adapter is not written")
    atomic_write(folder / ADAPTER_CONFIG, json.dumps(values, ensure_ascii=False, indent=2) + "\n")
    atomic_write(folder / ADAPTER_MODEL, b"".join(bytes(part) for part in safetensors_parts(tensors)))


def load_adapter(model: LanguageModel, folder: Path) -> LoraConfig:
    """Put an adapter's folder onto a model that has none, in place; only the adapter requires gradients then.

    Raises:
        InputError: naming the file and what is wrong: no adapter, one for another model or rank, a kind of
            adapter that minigpt does not have.
    """
    if not is_adapter(folder):
        raise InputError(f"{folder} is no adapter's folder: it has no {ADAPTER_CONFIG}")
    path = folder / ADAPTER_CONFIG
    values = read_json(path)
    config = config_of(values, path)
    if values.get("task_type") == "SEQ_CLS":  # PEFT lists all names that a head may have
        modules = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        there = tuple(name for name in config.modules_to_save if name in modules)
        config = replace(config, modules_to_save=there)
    tensors = _read(folder / ADAPTER_MODEL)
    apply_lora(model, config)
    own = adapter_tensors(model, config)
    wrong = differences(
        {name: f"{tuple(tensor.shape)}" for name, tensor in tensors.items()},
        {name: f"{tuple(tensor.shape)}" for name, tensor in own.items()},
    )
    if wrong:
        raise InputError(f"{folder / ADAPTER_MODEL} does not fit the model; {wrong}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise InputError(f"{folder / ADAPTER_MODEL}: {name} holds NaN or infinity")
            own[name].copy_(tensor)
    return config


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"{path} does not exist: the adapter's weights are read from safetensors only")
    file = TensorFile(path)
    return {name: file[name] for name in file}


def config_of(values: Mapping[str, Any], path: Path) -> LoraConfig:
    """The contents of an adapter_config.json as a LoraConfig.

    Raises:
        InputError: for what minigpt does not have, naming the key.
    """
    if values.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type={values.get('peft_type')!r}; only LORA is known")
    for key, plain in _FIXED.items():
        if values.get(key, plain) not in (plain, None, [], {}):
            raise InputError(f"{path}: {key}={values[key]!r} is not known here, only {plain!r}")
    kind = values.get("init_lora_weights", True)
    target = values.get("target_modules")
    if not isinstance(target, str | list) or not target:
        raise InputError(f"{path}: target_modules must name modules: got {target!r}")
    try:
        return LoraConfig(
            r=_number(values, "r", 8, path, int),
            lora_alpha=_number(values, "lora_alpha", 8, path, float),
            lora_dropout=_number(values, "lora_dropout", 0.0, path, float),
            target_modules=target if isinstance(target, str) else tuple(map(str, target)),
            layers_to_transform=_layers(values.get("layers_to_transform")),
            use_rslora=bool(values.get("use_rslora", False)),
            use_dora=bool(values.get("use_dora", False)),
            init_lora_weights="gaussian" if kind == "gaussian" else "default",
            modules_to_save=tuple(values.get("modules_to_save") or ()),
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _number(values: Mapping[str, Any], key: str, default: Any, path: Path, kind: type) -> Any:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        raise InputError(f"{path}: {key} must be a number: got {value!r}")
    return kind(value)


def _layers(value: Any) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)
