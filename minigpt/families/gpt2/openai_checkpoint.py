"""Reads GPT-2 as OpenAI released it, a TensorFlow checkpoint, without TensorFlow and without torch.

    sizes, weights = read_checkpoint("models/124M")
    weights["transformer.h.0.attn.c_attn.weight"].shape  # (768, 2304), under Hugging Face's name

The folder holds `checkpoint` (a text file with the name of the checkpoint), `hparams.json` (the sizes) and
the checkpoint: `model.ckpt.index` and `model.ckpt.data-00000-of-00001`. Other files of the release are not
read: `model.ckpt.meta` holds the graph, and encoder.json and vocab.bpe hold the tokenizer.

OpenAI and Hugging Face both store GPT-2's matrices as (in, out). So no matrix is transposed, and
`FAMILY.from_hugging_face` in family.py accepts the arrays.
"""

import re
from dataclasses import fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minigpt.errors import InputError
from minigpt.families.checks import differences
from minigpt.families.gpt2.presets import Sizes
from minigpt.families.gpt2.tensor_bundle import read_bundle
from minigpt.storage.json_files import read_json
from minigpt.storage.regular_files import read_text

__all__ = ["read_checkpoint"]

# (OpenAI's name, Hugging Face's name). `*` is the number of the block. OpenAI stores a matrix named "w" with
# shape (1, in, out), because it is the kernel of a convolution of width 1. Hugging Face leaves out the 1.
NAMES = (
    ("model/wte", "transformer.wte.weight"),
    ("model/wpe", "transformer.wpe.weight"),
    ("model/h*/ln_1/g", "transformer.h.*.ln_1.weight"),
    ("model/h*/ln_1/b", "transformer.h.*.ln_1.bias"),
    ("model/h*/attn/c_attn/w", "transformer.h.*.attn.c_attn.weight"),
    ("model/h*/attn/c_attn/b", "transformer.h.*.attn.c_attn.bias"),
    ("model/h*/attn/c_proj/w", "transformer.h.*.attn.c_proj.weight"),
    ("model/h*/attn/c_proj/b", "transformer.h.*.attn.c_proj.bias"),
    ("model/h*/ln_2/g", "transformer.h.*.ln_2.weight"),
    ("model/h*/ln_2/b", "transformer.h.*.ln_2.bias"),
    ("model/h*/mlp/c_fc/w", "transformer.h.*.mlp.c_fc.weight"),
    ("model/h*/mlp/c_fc/b", "transformer.h.*.mlp.c_fc.bias"),
    ("model/h*/mlp/c_proj/w", "transformer.h.*.mlp.c_proj.weight"),
    ("model/h*/mlp/c_proj/b", "transformer.h.*.mlp.c_proj.bias"),
    ("model/ln_f/g", "transformer.ln_f.weight"),
    ("model/ln_f/b", "transformer.ln_f.bias"),
)


def read_checkpoint(folder: str | Path) -> tuple[Sizes, dict[str, NDArray[np.float32]]]:
    """Read the sizes of a released model, and its weights under Hugging Face's names.

    The arrays are float32 views of the memory-mapped file. Writing to them does not change the file.

    Raises:
        InputError: if a file is missing, damaged or does not fit the other files; the message names the file.
    """
    folder = Path(folder)
    hparams = folder / "hparams.json"
    sizes = _read_sizes(hparams)
    prefix = folder / _checkpoint_name(folder / "checkpoint")
    tensors = read_bundle(prefix)
    if sizes.n_layer > len(tensors):  # check before the loop: a damaged n_layer could be a billion
        raise InputError(
            f"{hparams}: n_layer={sizes.n_layer}, but {prefix}.index names {len(tensors)} tensors"
        )
    weights, expected = {}, {}
    for theirs, ours in NAMES:
        for block in map(str, range(sizes.n_layer)) if "*" in theirs else [""]:
            name = theirs.replace("*", block)
            expected[name] = _shape(theirs, sizes)
            if name in tensors and tensors[name].shape == expected[name]:
                matrix = expected[name][-2:] if name.endswith("/w") else expected[name]
                weights[ours.replace("*", block)] = tensors[name].reshape(matrix)
    wrong = differences(
        {name: str(tensor.shape) for name, tensor in tensors.items()},
        {name: str(shape) for name, shape in expected.items()},
    )
    if wrong:
        raise InputError(f"{prefix}.index does not fit {hparams.name}; {wrong}")
    return sizes, weights


def _read_sizes(path: Path) -> Sizes:
    content = read_json(path, missing=f"{path.parent} is not a folder of OpenAI's GPT-2 release")
    known = {field.name for field in fields(Sizes)}
    if content.keys() != known:
        keys = ", ".join(sorted(map(repr, content))[:8])
        raise InputError(f"{path} must have the keys {', '.join(sorted(known))}: got {keys}")
    for name, value in content.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{path}: {name} must be a whole number of at least 1: got {name}={value!r:.40}")
    sizes = Sizes(**content)
    if sizes.n_embd % sizes.n_head:
        raise InputError(f"{path}: n_head must divide n_embd: got {sizes.n_head} and {sizes.n_embd}")
    return sizes


def _checkpoint_name(path: Path) -> str:
    """Return the name of the checkpoint, which the text file `checkpoint` holds.

    The file may hold a path from the computer that trained the model. Only the last part of the path is used.
    """
    try:
        content = read_text(path)
    except FileNotFoundError:
        raise InputError(
            f'{path} is missing: it holds a line like model_checkpoint_path: "model.ckpt"'
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is damaged: it is not text") from None
    found = re.search(r'^\s*model_checkpoint_path\s*:\s*"([^"\n]*)"', content, re.MULTILINE)
    name = re.split(r"[/\\]", found[1])[-1] if found else ""
    if not name or name in (".", "..") or not name.isprintable():
        raise InputError(f'{path} is damaged: it has no line like model_checkpoint_path: "model.ckpt"')
    return name


def _shape(name: str, sizes: Sizes) -> tuple[int, ...]:
    """Return the shape that a tensor must have in OpenAI's file. `name`: OpenAI's name, from NAMES."""
    C = sizes.n_embd
    inside = 4 * C if name.endswith("mlp/c_proj/w") else C
    outside = 3 * C if "/c_attn/" in name else 4 * C if "/c_fc/" in name else C
    if name.endswith("/w"):
        return (1, inside, outside)
    if name.endswith(("/g", "/b")):
        return (outside,)
    return (sizes.n_vocab if name.endswith("wte") else sizes.n_ctx, C)
