"""Reads and writes PEFT's adapter folders: adapter_config.json and adapter_model.safetensors.

    save_adapter(model, config, Path("output/mine"), base="gpt2")
    config = load_adapter(model, Path("output/mine"))    # calls add_adapter, then reads the weights

The names of weights are PEFT's: base_model.model.<Hugging Face's name of the layer>.lora_A.weight, and so on.
Folders that PEFT wrote can be read. If a folder needs a feature that minigpt lacks, an error names the key.
Bottleneck adapters, which PEFT does not have, are in folders of the same kind, with peft_type "BOTTLENECK".
"""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minigpt.errors import InputError
from minigpt.families.checks import differences
from minigpt.families.registry import LanguageModel, family_of, weight_names
from minigpt.families.strict_loading import cast
from minigpt.finetuning.bottleneck import BottleneckConfig
from minigpt.finetuning.classification import SequenceClassifier
from minigpt.finetuning.ia3 import IA3Config
from minigpt.finetuning.layers import (
    AdaptedLayer,
    AdapterConfig,
    adapted_layers,
    add_adapter,
    is_called,
    module_names,
    whole_modules,
)
from minigpt.finetuning.lora import LoraConfig
from minigpt.storage.files import MANIFEST, atomic_write, verify_manifest
from minigpt.storage.json_files import json_text, read_json
from minigpt.storage.read_ahead import has_weights
from minigpt.storage.regular_files import is_there
from minigpt.storage.safetensors_files import TensorFile, safetensors_parts

__all__ = [
    "ADAPTER_CONFIG", "ADAPTER_MODEL", "adapter_folder", "adapter_tensors", "advice", "is_adapter",
    "load_adapter", "save_adapter",
]  # fmt: skip

ADAPTER_CONFIG, ADAPTER_MODEL = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Keys of adapter_config.json that minigpt ignores: they matter only at the start of a training, or only
# describe the file. If a key is neither here nor known to minigpt, its value must be empty.
_NO_MATTER = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "ephemeral_gpu_offload", "eva_config"),
    *(
        "fan_in_fan_out",
        "inference_mode",
        "lora_ga_config",
        "loftq_config",
        "megatron_core",
        "parent_library",
    ),
    *(
        "init_ia3_weights",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    ),
}
# Value of peft_type in adapter_config.json -> class of the configuration. "BOTTLENECK" is minigpt's own type.
_KINDS: dict[str, type[LoraConfig | IA3Config | BottleneckConfig]] = {
    "LORA": LoraConfig, "IA3": IA3Config, "BOTTLENECK": BottleneckConfig,
}  # fmt: skip
_NOTHING: tuple[object, ...] = (None, False, "none", "", (), [], {})  # values that count as empty
# Allowed values of init_lora_weights: how LoRA's matrices A and B were initialised. With other values (pissa,
# olora, corda, loftq, lora_ga), PEFT changes the model's own weights when it loads the adapter, which minigpt
# does not do.
_DRAWN = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


# -- folders -----------------------------------------------------------------------------------------------


def is_adapter(folder: Path) -> bool:
    """Return True if a folder holds an adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def adapter_folder(path: Path) -> Path:
    """Return an adapter's folder. If the folder has a manifest (checksums), check the files against it.

    Args:
        path: the adapter's folder, or the folder of the run that trained the adapter.

    Raises:
        InputError: if there is no adapter, or a file differs from the manifest.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist: give a folder with {ADAPTER_CONFIG} and {ADAPTER_MODEL}")
    inside = (path, path / "best", path / "last")
    folder = next((folder for folder in inside if is_adapter(folder)), None)
    if folder is None:
        if has_weights(path):
            raise InputError(
                f"{path} is a model, not an adapter (it has no {ADAPTER_CONFIG}): give it as --model"
            )
        raise InputError(f"{path} is no adapter's folder: it has no {ADAPTER_CONFIG}")
    if is_there(folder / MANIFEST):
        verify_manifest(folder)
    return folder


def advice(folder: Path) -> str:
    """Return an error message for a user who gave an adapter's folder where a model's folder is needed."""
    values = read_json(folder / ADAPTER_CONFIG)
    base = values.get("base_model_name_or_path") or "MODEL"
    model, given = shlex.quote(str(base)), shlex.quote(str(folder))
    if values.get("task_type") == "SEQ_CLS":
        return f"{folder} is an adapter, not a model: {_of_classifier(folder)}"
    beside = f"`minigpt generate`, `chat` and `eval` take --model {model} --adapter {given}"
    if values.get("peft_type") == "BOTTLENECK":
        return f"{folder} is an adapter, not a model, and bottlenecks cannot be merged: {beside}"
    return (
        f"{folder} is an adapter, not a model. Merge them first: minigpt merge --model {model} --adapter "
        f"{given} --output {shlex.quote(f'{folder}-merged')}; {beside} as they are"
    )


def _of_classifier(folder: Path) -> str:
    return f"it is a classifier's: minigpt classify --model {shlex.quote(str(folder))} --text TEXT"


# -- weights -----------------------------------------------------------------------------------------------


def adapter_tensors(model: LanguageModel, adapter: str = "default") -> dict[str, Tensor]:
    """Return an adapter's parameters with PEFT's names and shapes. They share memory with the model."""
    names = weight_names(model)
    found: dict[str, Tensor] = {}
    for name, layer in adapted_layers(model):
        if layer.adapter == adapter:
            stem = f"{_PREFIX}{names[f'{name}.weight'][0].removesuffix('.weight')}"
            found |= {f"{stem}.{end}": parameter for end, parameter in layer.tensors().items()}
    for name, whole in whole_modules(model).items():
        if adapter in whole.copies:
            for inside, parameter in whole.copies[adapter].named_parameters():
                theirs, transposed = names[f"{name}.{inside}"]
                found[f"{_PREFIX}{theirs}"] = parameter.t() if transposed else parameter
    return found


def save_adapter(
    model: LanguageModel,
    config: AdapterConfig,
    folder: Path,
    base: str = "",
    adapter: str = "default",
    tensors: Mapping[str, Tensor] | None = None,
    task_type: str = "CAUSAL_LM",
) -> None:
    """Write a model's adapter in PEFT's format.

    Args:
        config: the configuration that was given to `add_adapter`.
        base: folder or name of the base model, for programs that load the adapter.
        adapter: name of the adapter in the model.
        tensors: the tensors to write, as `adapter_tensors` returned them earlier. Default: the model's
            present tensors.
        task_type: PEFT's name of the task; SEQ_CLS for a classifier.

    Raises:
        InputError: if a value is not finite, or the files cannot be written.
    """
    tensors = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in (adapter_tensors(model, adapter) if tensors is None else tensors).items()
    }
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"{name} holds NaN or infinity: the adapter is not written")
    config = config.of_family(model)
    values = {
        "peft_type": next(name for name, kind in _KINDS.items() if isinstance(config, kind)),
        "task_type": task_type,
        "base_model_name_or_path": base,
        **_options(model, config, adapter),
        "modules_to_save": list(config.modules_to_save) or None,
        "inference_mode": True,
    }
    atomic_write(folder / ADAPTER_CONFIG, json_text(values, indent=2) + "\n")
    atomic_write(folder / ADAPTER_MODEL, b"".join(bytes(part) for part in safetensors_parts(tensors)))


def _options(model: LanguageModel, config: AdapterConfig, adapter: str) -> dict[str, Any]:
    """Return the keys of adapter_config.json that depend on the kind of adapter, with their values."""
    transposed = any(flip for _, flip in weight_names(model).values())
    if isinstance(config, BottleneckConfig):
        layers = list(config.layers_to_transform) or None
        return {"bottleneck_size": config.bottleneck_size, "layers_to_transform": layers}
    if isinstance(config, IA3Config):
        target = _targets(model, config, adapter)
        inputs: str | Sequence[str] = config.feedforward_modules or ()
        if not isinstance(target, str) and not isinstance(inputs, str) and not {*inputs} <= {*target}:
            # PEFT requires that all names in feedforward_modules are in target_modules, too. Here they
            # are not. So write the full names of the layers into both lists.
            names = module_names(model)
            own = {names[name]: one for name, one in adapted_layers(model) if one.adapter == adapter}
            target = sorted(own)
            inputs = [name for name in target if getattr(own[name], "is_feedforward", False)]
        return {
            "target_modules": target,
            "feedforward_modules": inputs if isinstance(inputs, str) else list(inputs),
            "fan_in_fan_out": transposed,
        }
    assert isinstance(config, LoraConfig)
    return {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": _targets(model, config, adapter),
        "layers_to_transform": list(config.layers_to_transform) or None,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "init_lora_weights": True if config.init_lora_weights == "default" else config.init_lora_weights,
        "fan_in_fan_out": transposed,
        "bias": "none",
    }


def _targets(model: LanguageModel, config: LoraConfig | IA3Config, adapter: str) -> str | list[str]:
    """Return the value of target_modules for adapter_config.json.

    A regular expression, and names that a user gave for IA3, stay as they are. Otherwise the value is a list:
    short names such as "c_attn", if they match exactly the adapted layers, or else full names.
    """
    target = config.target_modules
    if isinstance(target, str) and target != "all-linear":
        return target  # a regular expression
    if isinstance(config, IA3Config) and not isinstance(target, str):
        return list(target)  # keep the user's names, because feedforward_modules uses the same names
    names = module_names(model)
    layers = {names[name] for name, layer in adapted_layers(model) if layer.adapter == adapter}
    short = sorted({layer.rpartition(".")[2] for layer in layers})
    chosen = replace(config, target_modules=tuple(short)).chosen_layers(model)
    return short if set(chosen.values()) == layers else sorted(layers)


def load_adapter(model: LanguageModel, folder: Path, adapter: str = "default") -> AdapterConfig:
    """Add the adapter of a folder to a model, in place. Only this adapter is then active and trainable.

    Args:
        folder: an adapter's folder, or the folder of a run that trained an adapter.
        adapter: a name that no other adapter of the model has.

    Raises:
        InputError: if the folder has no adapter, if minigpt does not know this kind of adapter, or if the
            adapter does not fit the model. The message names the file. The model stays unchanged.
    """
    folder = adapter_folder(folder)
    path = folder / ADAPTER_CONFIG
    values = read_json(path)
    config, tensors = config_of(values, path), _read(folder / ADAPTER_MODEL, model)
    # For a classifier, PEFT's modules_to_save lists all usual names of a head. Keep those that the model has.
    if values.get("task_type") == "SEQ_CLS":
        if not isinstance(model, SequenceClassifier) and f"{_PREFIX}score.weight" in tensors:
            raise InputError(f"{folder} does not fit a model that writes text: {_of_classifier(folder)}")
        modules = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        there = tuple(name for name in config.modules_to_save if name in modules)
        config = _with(config, modules_to_save=there)
    if isinstance(config, LoraConfig | IA3Config) and not isinstance(config.target_modules, str):
        # A name in target_modules that no layer has is ignored, as in PEFT.
        names, wanted = module_names(model).values(), config.target_modules
        known = tuple(name for name in wanted if any(is_called(theirs, name) for theirs in names))
        config = _with(config, target_modules=known or wanted)
    _require_size(folder, config, tensors)
    twin: Any = _on_meta(model)  # the adapter is added here first: after an error, `model` is unchanged
    try:
        add_adapter(twin, config, adapter, draw=False)
    except InputError as error:
        raise InputError(f"{path} does not fit the model: {error}") from None
    wrong = differences(
        {name: f"{tuple(tensor.shape)}" for name, tensor in tensors.items()},
        {name: f"{tuple(tensor.shape)}" for name, tensor in adapter_tensors(twin, adapter).items()},
    )
    if wrong:
        raise InputError(f"{folder / ADAPTER_MODEL} does not fit the model; {wrong}")
    add_adapter(model, config, adapter, draw=False)
    own = adapter_tensors(model, adapter)
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    return config


def _on_meta(model: Any) -> Any:
    """Build the same model on PyTorch's meta device, where weights have shapes but no memory."""
    if isinstance(model, SequenceClassifier):
        with torch.device("meta"):
            return SequenceClassifier(model.config, model.labels, model.pad_token_id)
    return family_of(model.config).on_meta(model.config)


def _read(path: Path, model: LanguageModel) -> dict[str, Tensor]:
    """Read the adapter's tensors from a file.

    If lm_head has an adapter, PEFT also saves lm_head's own weight. This weight belongs to the base model and
    is left out.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist: the adapter's weights are read from safetensors only")
    file = TensorFile(path)
    found = {name: file[name] for name in file}
    for ours, (theirs, transposed) in weight_names(model).items():
        name = f"{_PREFIX}{theirs.removesuffix('.weight')}.base_layer.weight"
        if name in found:
            module = model.get_submodule(ours.removesuffix(".weight"))
            linear = module.linear if isinstance(module, AdaptedLayer) else module
            stored = found.pop(name).t() if transposed else found.pop(name)
            if not isinstance(linear, nn.Linear):
                raise InputError(f"{path} has {name}: it cannot be compared with quantised weights")
            if not torch.equal(linear.weight.cpu(), stored.to(linear.weight.dtype)):
                raise InputError(
                    f"{path}: {name} is not the model's own weight: the adapter is for another one"
                )
    try:
        for name, tensor in found.items():
            cast(name, tensor, torch.float32)  # only to check that all values are finite in float32
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return found


def _with(config: AdapterConfig, **values: Any) -> AdapterConfig:
    changed: AdapterConfig = replace(config, **values)  # type: ignore[type-var]
    return changed


def _require_size(folder: Path, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raise InputError if the tensors have another rank or bottleneck size than the configuration."""
    if isinstance(config, LoraConfig):
        key, size, end, name = "r", config.r, ".lora_A.weight", "rank"
    elif isinstance(config, BottleneckConfig):
        key, size, end, name = "bottleneck_size", config.bottleneck_size, ".adapter_down.weight", "size"
    else:
        return
    for tensor_name, tensor in tensors.items():
        if tensor_name.endswith(end) and tensor.shape[:1] != (size,):
            raise InputError(
                f"{folder / ADAPTER_CONFIG} says {key}={size}, but {ADAPTER_MODEL} has another {name}: "
                f"{tensor_name} is {tuple(tensor.shape)}"
            )


# -- adapter_config.json -----------------------------------------------------------------------------------


def config_of(values: Mapping[str, Any], path: Path) -> AdapterConfig:
    """Convert the content of an adapter_config.json to a configuration.

    Raises:
        InputError: if a key needs a feature that minigpt does not have; the message names the key.
    """
    kind = _KINDS.get(str(values.get("peft_type")))
    if kind is None:
        known = ", ".join(_KINDS)
        raise InputError(f"{path}: peft_type={values.get('peft_type')!r}; known are {known}")
    fields = {field.name for field in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in fields | _NO_MATTER and value not in _NOTHING:
            raise InputError(f"{path}: {key}={value!r} is not known here")
    saved = values.get("modules_to_save") or []
    if not _is_list_of(saved, str):
        raise InputError(f"{path}: modules_to_save must be a list of names: got {saved!r:.80}")
    try:
        if kind is LoraConfig:
            return _lora_config(values, path, tuple(saved))
        if kind is IA3Config:
            inputs = values.get("feedforward_modules") or []
            if not isinstance(inputs, str) and not _is_list_of(inputs, str):
                raise InputError(f"feedforward_modules must name modules: got {inputs!r:.80}")
            return IA3Config(
                _target(values, path), inputs if isinstance(inputs, str) else tuple(inputs), tuple(saved)
            )
        size = _number(values, "bottleneck_size", 64, path, int)
        return BottleneckConfig(size, _layers(values, path), tuple(saved))
    except InputError as error:
        raise InputError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


def _lora_config(values: Mapping[str, Any], path: Path, saved: tuple[str, ...]) -> LoraConfig:
    drawn = values.get("init_lora_weights", True)
    drawn = drawn.lower() if isinstance(drawn, str) else drawn
    if drawn not in _DRAWN:
        raise InputError(
            f"{path}: init_lora_weights={drawn!r} changes the model's own weights, too: save the adapter "
            "with PEFT's path_initial_model_for_weight_conversion"
        )
    return LoraConfig(
        r=_number(values, "r", 8, path, int),
        lora_alpha=_number(values, "lora_alpha", 8, path, float),
        lora_dropout=_number(values, "lora_dropout", 0.0, path, float),
        target_modules=_target(values, path),
        layers_to_transform=_layers(values, path),
        use_rslora=_switch(values, "use_rslora", path),
        use_dora=_switch(values, "use_dora", path),
        init_lora_weights="gaussian" if drawn == "gaussian" else "default",
        modules_to_save=saved,
    )


def _target(values: Mapping[str, Any], path: Path) -> str | tuple[str, ...]:
    target = values.get("target_modules")
    if not (isinstance(target, str) or _is_list_of(target, str)) or not target:
        raise InputError(f"{path}: target_modules must name modules: got {target!r:.80}")
    return target if isinstance(target, str) else tuple(target)


def _layers(values: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    layers = values.get("layers_to_transform")
    layers = [] if layers is None else layers if isinstance(layers, list) else [layers]
    if not _is_list_of(layers, int):
        raise InputError(f"{path}: layers_to_transform must be numbers of blocks: got {layers!r:.80}")
    return tuple(layers)


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(one) is kind for one in value)


def _number(values: Mapping[str, Any], key: str, default: Any, path: Path, kind: type) -> Any:
    value = values.get(key, default)
    if type(value) not in (int, kind) or not abs(value) < 1e9:  # NaN is refused, too
        raise InputError(f"{path}: {key} must be a number below 1e9: got {str(value)[:40]}")
    return kind(value)


def _switch(values: Mapping[str, Any], key: str, path: Path) -> bool:
    value = values.get(key, False)
    if not isinstance(value, bool):
        raise InputError(f"{path}: {key} must be true or false: got {value!r:.80}")
    return value
