"""Folders of models in int8 and int4: the result of rounding, written and read back bit for bit.

    config.json         as before, and "quantization_config": {"quant_method": "minigpt", "precision": "int8"}
    int8.safetensors    Hugging Face's names and shapes. NAME.weight of a product is int8, and next to it is
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

import torch
from torch import Tensor

from minigpt.errors import InputError
from minigpt.families.checks import differences
from minigpt.families.registry import LanguageModel, ModelConfig, family_of, family_of_json
from minigpt.families.strict_loading import is_finite
from minigpt.storage.large_pages import LargePages
from minigpt.storage.safetensors_files import TensorFile
from minigpt.weights.quantized import Precision, cast_parameters, precision_of, replace_linears

__all__ = ["FILES", "KEY", "is_quantized", "quantized_config", "quantized_weights", "read_quantized"]

KEY = "quantization_config"
FILES: dict[Precision, str] = {"int8": "int8.safetensors", "int4": "int4.safetensors"}
_METHOD = "minigpt"


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Whether the content of a config.json is that of a quantised model, ours or another program's."""
    return config.get(KEY) is not None


def quantized_config(config: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """The content of config.json, and that the weights are int8 or int4."""
    return {**config, KEY: {"quant_method": _METHOD, "precision": precision}}


def quantized_weights(model: LanguageModel) -> dict[str, Tensor]:
    """All tensors of an int8 or int4 model on a CPU under Hugging Face's names, as the file keeps them."""
    state, precision = model.state_dict(), precision_of(model)
    written = {}
    for entry in _entries(model.config, state):
        tensor = state[entry.ours]
        if precision == "int8" and tensor.is_floating_point():
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
    replace_linears(model, precision, rounds_inputs=precision == "int8")
    if precision == "int4":
        cast_parameters(model, torch.bfloat16)
    found = TensorFile(path, missing="weights are read from this one file")
    forms = model.state_dict()
    entries = list(_entries(config, forms))
    wrong = differences(
        {name: f"{form.dtype} {tuple(form.shape)}" for name, form in found.described.items()},
        {entry.theirs: _stored_form(entry, forms[entry.ours]) for entry in entries},
    )
    if wrong:
        raise InputError(f"{path}: the weights do not fit the configuration; {wrong}")
    state, pages = {}, LargePages()
    for ours, theirs, transposed in entries:
        tensor = found[theirs]
        _require_sound(path, theirs, tensor)
        tensor = tensor.t() if transposed else tensor
        state[ours] = pages.copied(tensor[:, 0] if ours.endswith(".scale") else tensor)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


class _Entry(NamedTuple):
    """A tensor's name in our state_dict and in the file; transposed ones are (in, out) in the file."""

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


def _config(path: Path, content: Mapping[str, Any]) -> tuple[ModelConfig, Precision]:
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


def _stored_form(entry: _Entry, form: Tensor) -> str:
    """Type and shape in the file of a tensor that has the dtype and shape of `form` in the model."""
    shape = (*form.shape, 1) if entry.ours.endswith(".scale") else tuple(form.shape)
    return f"{form.dtype} {shape[::-1] if entry.transposed else shape}"


def _require_sound(path: Path, name: str, tensor: Tensor) -> None:
    """Refuse what quantising never makes: such a model would answer nonsense in silence."""
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
