"""Folders of models in int8 and int4: what rounding made of a model, written down and read back bit for bit.

    config.json         as before, and "quantization_config": {"quant_method": "minigpt", "precision": "int8"}
    int8.safetensors    Hugging Face's names and shapes. NAME.weight of a product is int8, and beside it lies
                        NAME.scale, one float32 for each output, so shaped that NAME.weight * NAME.scale is
                        the matrix: (1, N) where Hugging Face keeps (in, out), as in GPT-2, else (N, 1).
                        All else (embeddings, norms, biases) is float32. lm_head has weights of its own.
    int4.safetensors    lm_head as above. NAME.weight of any other product is uint8 (N, K / 2), outputs by
                        inputs in every family: the first of two neighbours in the upper four bits, K padded
                        to a multiple of 64. NAME.scales is bfloat16 (K / 64, N, 2): a weight is about
                        (number - 8) * scale + offset of its group of 64. Embeddings and norms are bfloat16,
                        biases of products float32.

The file is not called model.safetensors, because transformers only warns of a `quant_method` that it does not
know, and would then take the whole numbers for weights. float16 needs no format of its own: a folder of
float16 weights is one that every program reads.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel, ModelConfig, family_of, family_of_json
from minigpt.families.strict_loading import is_finite
from minigpt.storage.large_pages import LargePages
from minigpt.weights.quantized import precision_of, quantized_modules
from minigpt.weights.weight_only import to_int4

__all__ = ["FILES", "KEY", "is_quantized", "quantized_config", "quantized_weights", "read_quantized"]

KEY = "quantization_config"
FILES = {"int8": "int8.safetensors", "int4": "int4.safetensors"}
_METHOD = "minigpt"
_SHOWN = 6  # tensors that a message names


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Is the content of a config.json that of a quantised model, ours or another program's?"""
    return config.get(KEY) is not None


def quantized_config(config: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """The content of config.json with what says that the weights are int8 or int4."""
    return {**config, KEY: {"quant_method": _METHOD, "precision": precision}}


def quantized_weights(model: LanguageModel) -> dict[str, Tensor]:
    """All tensors of an int8 or int4 model on a CPU under Hugging Face's names, as the file keeps them."""
    state = model.state_dict()
    written = {}
    for entry in _entries(model.config, state):
        tensor = state[entry.ours]
        if precision_of(model) == "int8" and tensor.is_floating_point():
            tensor = tensor.float()  # an embedding that came in 16 bits
        if tensor.dim() == 1 and entry.ours.endswith(".scale"):
            tensor = tensor[:, None]  # (N, 1)
        written[entry.theirs] = (tensor.t() if entry.transposed else tensor).contiguous().cpu()
    return written


def read_quantized(folder: Path, content: Mapping[str, Any]) -> LanguageModel:
    """The int8 or int4 model of a folder, on the CPU, in eval mode.

    Args:
        content: of the folder's config.json.

    Raises:
        InputError: naming the file and what is wrong: another program's format, an unknown precision, tensors
            that are missing, unexpected, of another type or shape, or damaged scales.
    """
    config, precision = _config(folder / "config.json", content)
    path = folder / FILES[precision]
    model: LanguageModel = family_of(config).on_meta(config)
    if precision == "int8":
        quantized_modules(model, "int8")
    else:
        to_int4(model)
    try:
        found = safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing: weights are read from this one file") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or no safetensors file: {error}") from None
    sketch = model.state_dict()
    entries = list(_entries(config, sketch))
    _require_fit(path, found, entries, sketch)
    state, pages = {}, LargePages()
    for ours, theirs, transposed in entries:
        tensor = found.pop(theirs)
        _require_sound(path, theirs, tensor)
        tensor = tensor.t() if transposed else tensor
        state[ours] = pages.copied(tensor[:, 0] if ours.endswith(".scale") else tensor)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


class _Entry(NamedTuple):
    """A tensor's name in our state_dict and in the file; transposed ones lie there as (in, out)."""

    ours: str
    theirs: str
    transposed: bool


def _entries(config: ModelConfig, state: Mapping[str, Tensor]) -> Iterator[_Entry]:
    names = family_of(config).weight_names(config)
    for ours in state:
        module, _, kind = ours.rpartition(".")
        if kind in ("scale", "scales"):
            theirs, transposed = names[f"{module}.weight"]
            yield _Entry(ours, f"{theirs.removesuffix('.weight')}.{kind}", transposed and kind == "scale")
        else:
            theirs, transposed = names[ours]
            is_packed = state[ours].dtype == torch.uint8  # two inputs in a byte: nothing to transpose
            yield _Entry(ours, theirs, transposed and not is_packed)


def _config(path: Path, content: Mapping[str, Any]) -> tuple[ModelConfig, str]:
    method = content[KEY].get("quant_method") if isinstance(content[KEY], Mapping) else content[KEY]
    if method != _METHOD:
        raise InputError(
            f"{path}: {KEY} names the method {method!r}: only {_METHOD!r}, what `minigpt quantize` writes, "
            "is read; take the model's unquantised folder"
        )
    precision = content[KEY].get("precision")
    if precision not in FILES:
        known = " or ".join(map(repr, FILES))
        raise InputError(f"{path}: {KEY}: precision must be {known}: got {precision!r}")
    plain = {key: value for key, value in content.items() if key != KEY}
    try:
        config: ModelConfig = family_of_json(plain).config_from_hugging_face(plain)
        return config, precision
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _require_fit(
    path: Path, found: Mapping[str, Tensor], entries: list[_Entry], sketch: Mapping[str, Tensor]
) -> None:
    expected = {}
    for ours, theirs, transposed in entries:
        form = sketch[ours]
        shape = (*form.shape, 1) if ours.endswith(".scale") else tuple(form.shape)
        expected[theirs] = (form.dtype, shape[::-1] if transposed else shape)
    complaints = {
        "missing": [name for name in expected if name not in found],
        "unexpected": sorted(found.keys() - expected.keys()),
        "unfit": [
            f"{name} is {found[name].dtype} {tuple(found[name].shape)}, not {dtype} {shape}"
            for name, (dtype, shape) in expected.items()
            if name in found and (found[name].dtype, tuple(found[name].shape)) != (dtype, shape)
        ],
    }
    if any(complaints.values()):
        text = "; ".join(
            f"{kind}: {', '.join(names[:_SHOWN])}{' ...' if len(names) > _SHOWN else ''}"
            for kind, names in complaints.items()
            if names
        )
        raise InputError(f"{path}: the weights do not fit the configuration; {text}")


def _require_sound(path: Path, name: str, tensor: Tensor) -> None:
    """Refuse what quantising never makes: such a model would answer nonsense without a word."""
    wrong = ""
    if tensor.dtype == torch.int8:
        wrong = "the number -128, which is not used" if tensor.numel() and tensor.amin() == -128 else ""
    elif not is_finite(tensor):
        wrong = "NaN or infinity"
    elif (name.endswith(".scale") and (tensor < 0).any()) or (
        name.endswith(".scales") and (tensor[..., 0] < 0).any()
    ):
        wrong = "a scale below 0"
    if wrong:
        raise InputError(f"{path}: {name} holds {wrong}: it is damaged; quantise the model anew")
