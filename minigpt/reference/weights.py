"""Reads a Hugging Face folder into arrays of NumPy: config.json and safetensors files, without torch.

    config, params = load("output/best")
    new_ids = gpt2.generate(ids, params, **gpt2.settings(config), n_tokens_to_generate=20)

A safetensors file is 8 bytes with the length of a JSON header, the header, and then the numbers. They are
mapped into memory, not copied: a float32 file needs no memory of its own. float16 and bfloat16, which NumPy
computes slowly or not at all, become float32, in which each of their numbers is exact.

https://github.com/huggingface/safetensors describes the format.
"""

import json
import math
import mmap
from pathlib import Path
from typing import Any

import numpy

from minigpt.errors import InputError
from minigpt.reference import gpt2, qwen3
from minigpt.reference.names import Tree
from minigpt.storage.files import MANIFEST, verify_manifest

__all__ = ["load", "read_safetensors", "read_tensors"]

FAMILIES: dict[str, Any] = {"gpt2": gpt2, "qwen3": qwen3}
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # bfloat16: its 16 bits, see _widened


def load(folder: str | Path, dtype: Any = None) -> tuple[dict[str, Any], Tree]:
    """The contents of config.json, and the weights as the tree that `gpt2` or `qwen3` computes with.

    Args:
        folder: written by transformers, or by minigpt; its manifest.json, if there is one, is verified.
        dtype: what to compute in, numpy.float64 say; None leaves float32 and float64 as they are.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: give the one with {CONFIG} and {WEIGHTS}")
    if (folder / MANIFEST).exists():
        verify_manifest(folder)
    config = _read_json(folder / CONFIG)
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
        tensors = {name: array.astype(dtype) for name, array in tensors.items()}
    if family is qwen3 and config.get("tie_word_embeddings", False):
        tensors = _without_tied_head(tensors)
    try:
        params = family.params_from_names(tensors)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    _compare_sizes(folder / CONFIG, config, params)
    return config, params


def _without_tied_head(tensors: dict[str, Any]) -> dict[str, Any]:
    """The embedding is the head, so a second copy says nothing; one that differs is not to be used."""
    return {name: array for name, array in tensors.items() if name != "lm_head.weight"}


def _compare_sizes(path: Path, config: dict[str, Any], params: Tree) -> None:
    """Whether config.json speaks of these weights; what it does not say is as in the weights."""
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
    """All tensors of a folder: model.safetensors, or the files that model.safetensors.index.json lists.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        return read_safetensors(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise InputError(f"{folder / WEIGHTS} is missing, and {INDEX} too: weights are read from these only")
    places = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in places.values()
    ):
        raise InputError(f"{folder / INDEX}: weight_map must give for each weight a file of this folder")
    tensors: dict[str, Any] = {}
    for file in sorted(set(places.values())):
        found, listed = read_safetensors(folder / file), {name for name in places if places[name] == file}
        if found.keys() != listed:
            example = sorted(found.keys() ^ listed)[0]
            raise InputError(f"{folder / file} and {INDEX} do not agree on what it holds: {example}")
        tensors |= found
    return tensors


def read_safetensors(path: str | Path) -> dict[str, Any]:
    """The tensors of one file, read-only; their memory is the file's.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    end = 8 + int.from_bytes(data[:8], "little")
    if size < 8 or end > size:
        raise InputError(f"{path} is damaged or no safetensors file: it ends in its header")
    try:
        header = json.loads(data[8:end], object_pairs_hook=_without_repetition)
        header.pop("__metadata__", None)
        entries = sorted(
            (_entry(name, **entry) for name, entry in header.items()), key=lambda entry: entry[3]
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise InputError(f"{path} is damaged or no safetensors file: {error}") from None
    tensors, place = {}, end
    for name, dtype, shape, (begin, stop) in entries:
        # one after the other without holes: then no two weights can share bytes, and none can be forgotten
        if end + begin != place or end + stop > size:
            raise InputError(f"{path} is damaged: {name} does not begin where the one before it ended")
        array = (
            numpy.frombuffer(data, dtype, math.prod(shape), place) if stop > begin else numpy.empty(0, dtype)
        )
        tensors[name] = _widened(array.reshape(shape))
        place = end + stop
    if place != size:
        raise InputError(f"{path} is damaged: {size - place} bytes belong to no weight")
    return tensors


def _entry(
    name: str, dtype: str, shape: list[int], data_offsets: list[int]
) -> tuple[str, str, list[int], tuple[int, int]]:
    if dtype not in DTYPES:
        raise ValueError(f"{name} is {dtype}; read are {', '.join(DTYPES)}")
    if not all(type(number) is int and number >= 0 for number in [*shape, *data_offsets]):
        raise ValueError(f"{name} has a shape or place that is no list of whole numbers")
    begin, stop = data_offsets
    if stop - begin != math.prod(shape) * numpy.dtype(DTYPES[dtype]).itemsize:
        raise ValueError(f"{name} has {stop - begin} bytes, which is not what {dtype} {shape} takes")
    return name, DTYPES[dtype], shape, (begin, stop)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name comes twice in its header")
    return dict(pairs)


def _widened(array: Any) -> Any:
    """float32 for what is narrower. bfloat16 is float32 without its last 16 bits: they come back as zeros."""
    if array.dtype == numpy.uint16:
        return (array.astype(numpy.uint32) << 16).view(numpy.float32)
    return array.astype(numpy.float32) if array.dtype == numpy.float16 else array


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {path.parent} is no model's folder") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object: got {type(content).__name__}")
    return content
