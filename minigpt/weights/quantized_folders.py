"""Reads and writes folders of models in int8 and int4. Reading gives the same bits that were written.

config.json is that of the unquantised model, plus "quantization_config": {"quant_method": "minigpt",
"precision": "int8"}. Names and shapes of tensors are Hugging Face's. N is the number of outputs of a linear
layer, K of its inputs.

    int8.safetensors    NAME.weight of a linear layer is int8. NAME.scale has one float32 per output; its
                        shape is (N, 1), or (1, N) where Hugging Face stores (in, out), as in GPT-2. So
                        NAME.weight * NAME.scale is the matrix. lm_head is stored even if it was tied to the
                        embedding. All other tensors (embeddings, norms, biases) are float32.
    int4.safetensors    lm_head is stored as in int8. NAME.weight of each other linear layer is uint8
                        (N, K / 2) in every family, two weights in a byte: the first one in the upper four
                        bits. K is padded to a multiple of 64. NAME.scales is bfloat16 (K / 64, N, 2): scale
                        and offset of each group of 64. A weight is about (integer - 8) * scale + offset.
                        Embeddings and norms are bfloat16; biases of linear layers are float32.

The file is not named model.safetensors: transformers only warns about an unknown `quant_method`, and would
load the integers of a file with this name as weights. For float16 no such format is needed: every program can
read a folder of float16 weights.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minigpt.errors import InputError, Message
from minigpt.families.checks import differences
from minigpt.families.registry import LanguageModel, ModelConfig, family_of, family_of_json
from minigpt.families.strict_loading import is_finite
from minigpt.storage.large_pages import LargePages
from minigpt.storage.safetensors_files import TensorFile
from minigpt.weights.quantized import Precision, cast_parameters, precision_of, replace_linears

__all__ = [
    "FILES", "KEY", "config_of", "is_quantized", "quantized_config", "quantized_weights", "read_quantized",
]  # fmt: skip

KEY = "quantization_config"
FILES: dict[Precision, str] = {"int8": "int8.safetensors", "int4": "int4.safetensors"}
_METHOD = "minigpt"


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Return True if a config.json describes a quantised model, in minigpt's or another program's format."""
    return config.get(KEY) is not None


def quantized_config(config: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """Return the content of a config.json with the quantisation settings added."""
    return {**config, KEY: {"quant_method": _METHOD, "precision": precision}}


def quantized_weights(model: LanguageModel) -> dict[str, Tensor]:
    """Return the tensors of an int8 or int4 model as they are written, with the names in the file."""
    state, precision = model.state_dict(), precision_of(model)
    written = {}
    for entry in _entries(model.config, state):
        tensor = state[entry.ours]
        if precision == "int8" and tensor.is_floating_point():
            tensor = tensor.float()  # the embedding may be in 16 bits; the file has float32
        if tensor.dim() == 1 and entry.ours.endswith(".scale"):
            tensor = tensor[:, None]  # (N,) -> (N, 1), as in the file
        written[entry.theirs] = (tensor.t() if entry.transposed else tensor).contiguous().cpu()
    return written


def read_quantized(folder: Path, content: Mapping[str, Any]) -> LanguageModel:
    """Load the int8 or int4 model of a folder, on the CPU, in eval mode.

    Args:
        folder: the folder.
        content: content of its config.json.

    Raises:
        InputError: for another program's format, an unknown precision, damaged scales, or tensors that are
            missing, unexpected, or of another type or shape; the message names the file.
    """
    config, precision = config_of(folder / "config.json", content)
    path = folder / FILES[precision]
    found = TensorFile(path, missing=Message("weights are read from this one file"))
    family = family_of(config)
    try:
        family.names_in(found.described, config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    model: LanguageModel = family.on_meta(config)
    replace_linears(model, precision, rounds_inputs=precision == "int8")
    if precision == "int4":
        cast_parameters(model, torch.bfloat16)
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
    """A tensor's name in our state_dict (`ours`) and in the file (`theirs`).

    `transposed`: the file stores the tensor as (in, out).
    """

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
            # packed int4 weights are never transposed, because each byte holds two neighbours of one row
            is_packed = state[ours].dtype == torch.uint8
            yield _Entry(ours, theirs, transposed and not is_packed)


def config_of(path: Path, content: Mapping[str, Any]) -> tuple[ModelConfig, Precision]:
    """Read the model's configuration and its precision from the content of a config.json.

    Raises:
        InputError: for another program's format, or a wrong value; the message names the file.
    """
    method = content[KEY].get("quant_method") if isinstance(content[KEY], Mapping) else content[KEY]
    if method != _METHOD:
        raise InputError(
            f"{path}: {KEY} names the method {method!r}: only {_METHOD!r}, what `minigpt quantize` writes, "
            "is read; take the model's unquantised folder"
        )
    precision = content[KEY].get("precision")
    # `in FILES` would fail for a value that cannot be hashed, such as a list
    if precision not in list(FILES):
        known = " or ".join(map(repr, FILES))
        raise InputError(f"{path}: {KEY}: precision must be {known}: got {precision!r:.80}")
    plain = {key: value for key, value in content.items() if key != KEY}
    try:
        config: ModelConfig = family_of_json(plain).config_from_hugging_face(plain)
        return config, precision
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _stored_form(entry: _Entry, form: Tensor) -> str:
    """Return the dtype and shape that the file must have for the model's tensor `form`, as text."""
    shape = (*form.shape, 1) if entry.ours.endswith(".scale") else tuple(form.shape)
    return f"{form.dtype} {shape[::-1] if entry.transposed else shape}"


def _require_sound(path: Path, name: str, tensor: Tensor) -> None:
    """Raise InputError for values that quantising never makes, such as NaN or an int8 weight of -128."""
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
