"""Reads a Hugging Face folder into NumPy arrays, without torch: config.json and safetensors files.

    config, params = load("output/best")
    new_ids = gpt2.generate(ids, params, **gpt2.settings(config), n_tokens_to_generate=20)

A safetensors file begins with 8 bytes, which hold the length of a JSON header. Then come the header and the
numbers. The numbers are memory-mapped, not copied, so a float32 file takes no extra memory. float16 and
bfloat16 are converted to float32, because NumPy is slow with float16 and does not know bfloat16. The
conversion is exact.

https://github.com/huggingface/safetensors describes the format.
"""

import math
import mmap
from pathlib import Path
from typing import Any

import numpy

from minigpt.errors import InputError
from minigpt.reference import gpt2, qwen3
from minigpt.reference.names import Tree
from minigpt.storage.files import MANIFEST, verify_manifest
from minigpt.storage.json_files import read_json
from minigpt.storage.regular_files import is_there, open_regular
from minigpt.storage.safetensors_header import read_header, read_index

__all__ = ["load", "read_safetensors", "read_tensors"]

FAMILIES: dict[str, Any] = {"gpt2": gpt2, "qwen3": qwen3}
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# dtype in a file's header -> NumPy's dtype. NumPy has no bfloat16, so bfloat16 numbers are read as 16-bit
# integers, which `_widened` converts to float32.
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def load(folder: str | Path, dtype: Any = None) -> tuple[dict[str, Any], Tree]:
    """Load a folder. Returns the content of config.json, and the weights as a tree for `gpt2` or `qwen3`.

    Args:
        folder: a folder from transformers or minigpt. If it has a manifest.json, the files must match it.
        dtype: dtype of the weights, for example numpy.float64. Default: float64 if the file has float64, else
            float32.

    Raises:
        InputError: if a file is missing or wrong; the message names it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give the one with {CONFIG} and {WEIGHTS}")
    if is_there(folder / MANIFEST):
        verify_manifest(folder)
    config = read_json(folder / CONFIG, missing=f"{folder} is not a model folder")
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        known = ", ".join(FAMILIES)
        raise InputError(f"{folder / CONFIG}: model_type must be {known}: got {config.get('model_type')!r}")
    try:
        family.settings(config)
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from None
    tensors = read_tensors(folder)
    for name, array in tensors.items():
        if not numpy.isfinite(array).all():
            raise InputError(f"{folder}: {name} holds NaN or infinity: these weights are unusable")
        if dtype is not None:
            with numpy.errstate(over="ignore"):  # suppress NumPy's warning; the error below is clearer
                tensors[name] = array.astype(dtype)
            if not numpy.isfinite(tensors[name]).all():
                raise InputError(f"{folder}: {name} holds values beyond the largest {numpy.dtype(dtype)}")
    if family is qwen3 and config.get("tie_word_embeddings", False):
        tensors = _without_tied_head(tensors)
    try:
        params = family.params_from_names(tensors)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    _compare_sizes(folder / CONFIG, config, params)
    return config, params


def _without_tied_head(tensors: dict[str, Any]) -> dict[str, Any]:
    """Remove lm_head from the tensors of a model whose lm_head is tied.

    As in transformers, the embedding is used in its place, even if the lm_head in the file differs.
    """
    return {name: array for name, array in tensors.items() if name != "lm_head.weight"}


def _compare_sizes(path: Path, config: dict[str, Any], params: Tree) -> None:
    """Check that the sizes in config.json fit the weights. A size that config.json lacks is not checked."""
    if config["model_type"] == "gpt2":
        V, C = params["wte"]["weight"].shape
        sizes = {"vocab_size": V, "n_embd": C, "n_layer": len(params["h"])}
        sizes["n_positions"] = params["wpe"]["weight"].shape[0]
    else:
        V, C = params["embed_tokens"]["weight"].shape
        attention = params["layers"][0]["self_attn"]
        D = attention["q_norm"]["weight"].shape[0]
        sizes = {"vocab_size": V, "hidden_size": C, "num_hidden_layers": len(params["layers"]), "head_dim": D}
        sizes["num_attention_heads"] = attention["q_proj"]["weight"].shape[0] // D
        sizes["num_key_value_heads"] = attention["k_proj"]["weight"].shape[0] // D
        sizes["tie_word_embeddings"] = "lm_head" not in params
    wrong = [f"{key} {config[key]!r}, not {size!r}" for key, size in sizes.items()
             if config.get(key, size) != size]  # fmt: skip
    if wrong:
        raise InputError(f"{path}: the weights have another size: {', '.join(wrong)}")


def read_tensors(folder: str | Path) -> dict[str, Any]:
    """Read all tensors of a folder: model.safetensors, or the files in model.safetensors.index.json.

    Raises:
        InputError: if a file is missing or wrong; the message names it.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        return read_safetensors(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise InputError(f"{folder / WEIGHTS} is missing, and {INDEX} too: weights are read from these only")
    tensors: dict[str, Any] = {}
    for file, listed in sorted(read_index(folder / INDEX).items()):
        found = read_safetensors(folder / file)
        if found.keys() != listed:
            example = sorted(found.keys() ^ listed)[0]
            raise InputError(f"{folder / file} and {INDEX} do not agree on what it holds: {example}")
        tensors |= found
    return tensors


def read_safetensors(path: str | Path) -> dict[str, Any]:
    """Read the tensors of one file.

    float32 and float64 arrays are read-only views of the memory-mapped file. float16 and bfloat16 tensors are
    converted, so their arrays are float32 copies.

    Raises:
        InputError: if the file is missing or wrong; the message names it.
    """
    path = Path(path)
    entries = read_header(path)
    with open_regular(path) as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    tensors = {}
    for name, (dtype, shape, begin, end) in entries.items():
        if dtype not in DTYPES:
            raise InputError(f"{path}: {name} is {dtype}; read are {', '.join(DTYPES)}")
        kind, count = DTYPES[dtype], math.prod(shape)
        array = numpy.frombuffer(data, kind, count, begin) if end > begin else numpy.empty(0, kind)
        tensors[name] = _widened(array.reshape(shape))
    return tensors


def _widened(array: Any) -> Any:
    """Convert float16 and bfloat16 to float32.

    A bfloat16 number is the upper 16 bits of a float32 number. The lower 16 bits become 0.
    """
    if array.dtype == numpy.uint16:
        return (array.astype(numpy.uint32) << 16).view(numpy.float32)
    return array.astype(numpy.float32) if array.dtype == numpy.float16 else array
