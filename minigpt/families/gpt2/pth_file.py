"""Reads a GPT from a file of torch.save, written by nanoGPT, minGPT or the tutorial that minigpt grew from.

    found = read_pth("output/best_model.pth", n_head=8)
    found.model, found.step            # found.origin is the program that the file seems to come from

Such a file is a zip that holds a pickle, and a malicious pickle can call any function. So the file is read in
three steps. First, the zip's checksums are checked. Second, pickle_check.py refuses a pickle that holds more
than tensors need. Third, torch.load reads the file with weights_only=True.

The model's sizes come from the shapes of the tensors. But the shapes do not show n_head and the kind of GELU
(exact or tanh). nanoGPT's files hold n_head. The kind of GELU follows from the program that wrote the file.
"""

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from minigpt.errors import InputError
from minigpt.families.checks import differences, listed, unwrapped
from minigpt.families.family import HEAD
from minigpt.families.gpt2.family import FAMILY
from minigpt.families.gpt2.pickle_check import check_pickle
from minigpt.families.strict_loading import cast, tensor_kind
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.storage.regular_files import open_regular

__all__ = ["Imported", "read_pth"]

Gelu = Literal["exact", "tanh"]

_WTE, _WPE = "transformer.wte.weight", "transformer.wpe.weight"
_BLOCK = re.compile(r"transformer\.blocks\.(0|[1-9]\d{0,3})\..+")
_MASK = re.compile(r"transformer\.blocks\.\d+\.attn\.(mask|bias|masked_bias|causal_mask|tril)")
# keys under which a file may hold the weights
_STATES = (
    "model_state_dict",
    "model",
    "state_dict",
)
# names in files of nanoGPT, minGPT, minGPT's first release and transformers -> our names
_NAMES = (
    (r"transformer\.h\.(\d+)\.attn\.c_attn\.", r"transformer.blocks.\1.attn.qkv_proj."),
    (r"transformer\.h\.(\d+)\.attn\.c_proj\.", r"transformer.blocks.\1.attn.out_proj."),
    (r"transformer\.h\.(\d+)\.", r"transformer.blocks.\1."),
    (r"tok_emb\.weight$", _WTE),
    (r"pos_emb$", _WPE),
    (r"ln_f\.", "transformer.ln_f."),
    (r"head\.weight$", HEAD),
    (r"blocks\.(\d+)\.ln(\d)\.", r"transformer.blocks.\1.ln_\2."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"transformer.blocks.\1.attn.out_proj."),
    (r"blocks\.(\d+)\.mlp\.0\.", r"transformer.blocks.\1.mlp.c_fc."),
    (r"blocks\.(\d+)\.mlp\.2\.", r"transformer.blocks.\1.mlp.c_proj."),
    (r"blocks\.(\d+)\.attn\.", r"transformer.blocks.\1.attn."),
)
_GELUS: dict[str, Gelu] = {  # program -> the GELU of its models; minigpt grew from "the tutorial"
    "the tutorial": "exact",
    "nanoGPT": "exact",  # before 2023 nanoGPT used "tanh"; for such files, the user must choose it
    "minGPT": "tanh",
    "minGPT's first release": "exact",
    "transformers": "tanh",
}


@dataclass(frozen=True)
class Imported:
    """A model that was read from a file, and two facts about the file."""

    model: GPTLMHeadModel  # float32, eval mode
    step: str  # when the file was saved: "epoch 7", "iteration 2000", or "" if unknown
    origin: str  # program that probably wrote the file, such as "nanoGPT"; guessed from names and shapes


def read_pth(path: str | Path, n_head: int | None = None, gelu: Gelu | None = None) -> Imported:
    """Read the model from a file of torch.save.

    Args:
        path: the file. It holds a state_dict, or a dictionary with a state_dict under
            `model_state_dict`, `model` or `state_dict`. All names of tensors may begin with "module." or
            "_orig_mod.".
        n_head: number of heads; it must divide the number of channels. None: the number in the file, or 8
            if the file does not have it. With a wrong number, the model's answers make no sense.
        gelu: as in GPTConfig. None: the GELU of the program that wrote the file.

    Raises:
        InputError: if the file is damaged, holds Python objects that weights do not need, or holds no GPT
            model.
    """
    path = Path(path)
    content = _load(path)
    state = content
    if isinstance(content, dict):
        state = next((content[key] for key in _STATES if isinstance(content.get(key), dict)), content)
    if not isinstance(state, dict) or not state or not all(isinstance(one, Tensor) for one in state.values()):
        has = type(content).__name__
        if isinstance(content, dict):
            has = f"a dictionary with {listed(content, 8) or 'nothing'}"
        raise InputError(f"{path} holds no model_state_dict of tensors, but {has}")
    if not all(isinstance(name, str) for name in state):
        raise InputError(f"{path} has a tensor whose name is not a string")
    arguments = content.get("model_args")
    stated = arguments.get("n_head") if isinstance(arguments, dict) else None
    try:
        _require_plain(state, path.stat().st_size)
        named, origin = _named(state)
        if n_head is None:
            n_head = stated if isinstance(stated, int) else 8
        model = _model(named, n_head, _GELUS[origin] if gelu is None else gelu)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    steps = {"epoch": content.get("epoch"), "iteration": content.get("iter_num")}
    numbers = [f"{kind} {one}" for kind, one in steps.items() if type(one) is int]
    return Imported(model, next(iter(numbers), ""), origin)


def _load(path: Path) -> Any:
    if not path.exists():
        raise InputError(f"{path} does not exist: give the .pth that torch.save wrote")
    if not path.is_file():
        raise InputError(f"{path} must be a file: give the .pth that torch.save wrote")
    _require_sound_zip(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged or malicious file may raise anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        refused = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
        if refused:
            reason = f"it asks for {refused[1]}, but only tensors are read; no code was run"
        raise InputError(f"{path} cannot be read as weights: {reason}") from None


def _require_sound_zip(path: Path) -> None:
    """Check the pickle in a zip, and the CRC-32 of each zip entry. torch does not compare the CRC-32.

    torch.save has written zips since 2020; older files are an error. Two entries with names that differ only
    in upper and lower case are an error, too: torch might not read the entry that was checked here.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise InputError(f"{path} is not a file of torch.save, which never compresses")
            names = [entry.filename.lower() for entry in entries]
            lists = [entry for entry in entries if entry.filename.lower().endswith("data.pkl")]
            if (
                len(lists) != 1
                or len(set(names)) < len(names)
                or len({n.partition("/")[0] for n in names}) > 1
            ):
                raise InputError(f"{path} is not a file of torch.save: it needs one folder with one data.pkl")
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise InputError(f"{path} is damaged: its parts are larger than the file")
            damaged = archive.testzip()
            if damaged is None:
                try:
                    check_pickle(archive.read(lists[0]))
                except ValueError as error:
                    raise InputError(f"{path} cannot be read as weights: {error}") from None
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged, or not a file of torch.save: {error}") from None
    if damaged is not None:
        raise InputError(f"{path} is damaged: {damaged} in it does not match its checksum (CRC-32)")


def _require_plain(state: dict[str, Tensor], size: int) -> None:
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise InputError(f"{name} is not a plain tensor, but {tensor.layout} on {tensor.device}")
        # A malicious file can be small and still claim a huge tensor: with strides of 0, all its values
        # are one stored number.
        if tensor.numel() * tensor.element_size() > size:
            raise InputError(f"{name} claims more bytes than the file has")


def _named(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Return the parameters under GPTLMHeadModel's names, and the program that wrote the file.

    Causal masks, which old files hold, are left out.
    """
    state = {bare: state[name] for bare, name in unwrapped(state).items()}
    fused, embedding = state.get("transformer.h.0.attn.c_attn.weight"), state.get(_WTE)
    first = "tok_emb.weight" in state
    if not first and (fused is None or embedding is None or fused.ndim != 2):
        return _without_masks(state), "the tutorial"
    # transformers stores matrices as (in, out), so the fused QKV matrix has shape (C, 3C), not (3C, C)
    transposed = fused is not None and fused.shape[1] == 3 * fused.shape[0]
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for pattern, ours in _NAMES:
            ours, count = re.subn(f"^{pattern}", ours, name)
            if count:
                name = ours
                break
        if transposed and tensor.ndim == 2 and ".blocks." in name:
            tensor = tensor.t()
        renamed[name] = tensor
    if first:
        renamed = _joined(renamed)
    for name in [name for name in renamed if name.endswith("ln_1.weight")]:
        block = name.removesuffix("ln_1.weight")
        # nanoGPT can leave out the biases of QKV and LayerNorm. minigpt's GPT always has these biases, even
        # if GPTConfig.bias is False. So zeros are added.
        renamed.setdefault(f"{block}attn.qkv_proj.bias", torch.zeros(3 * renamed[name].numel()))
    for name in [name for name in renamed if re.search(r"\.ln_\w\.weight$", name)]:
        renamed.setdefault(f"{name.removesuffix('weight')}bias", torch.zeros_like(renamed[name]))
    head = renamed.get(HEAD)
    is_tied = head is None or torch.equal(head, renamed[_WTE])
    if transposed:
        return _without_masks(renamed), "transformers"
    return _without_masks(renamed), "minGPT's first release" if first else "nanoGPT" if is_tied else "minGPT"


def _joined(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the weights of minGPT's first release, in which Q, K and V are three matrices.

    Q, K and V are joined into one matrix. The batch axis of the position embeddings is removed.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(transformer\.blocks\.\d+\.attn)\.(query|key|value)\.(weight|bias)", name)
        if match is None:
            found[name] = tensor[0] if name == _WPE and tensor.ndim == 3 else tensor
        elif match[2] == "query":
            parts = [state.get(f"{match[1]}.{part}.{match[3]}") for part in ("query", "key", "value")]
            whole = [part for part in parts if part is not None]
            found[f"{match[1]}.qkv_proj.{match[3]}"] = torch.cat(whole)
    return found


def _without_masks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor for name, tensor in state.items() if not (_MASK.fullmatch(name) and _is_mask(tensor))
    }


def _is_mask(tensor: Tensor) -> bool:
    """Return True if a tensor looks like a causal mask, or like masked_bias, the number for masked scores.

    A causal mask is a square matrix in which all entries above the diagonal are equal, and all other entries
    are equal, too. masked_bias is a single number.
    """
    if tensor.numel() == 1:
        return True
    if tensor.ndim < 2 or tensor.shape[-1] != tensor.shape[-2] or tensor.numel() != tensor.shape[-1] ** 2:
        return False
    square = tensor.reshape(tensor.shape[-2:])
    visible = torch.ones(square.shape, dtype=torch.bool).tril()
    return bool((square == torch.where(visible, square[0, 0], square[0, -1])).all())


def _model(state: dict[str, Tensor], n_head: int, gelu: Gelu) -> GPTLMHeadModel:
    for name in (_WTE, _WPE):
        if name not in state or state[name].ndim != 2:
            raise InputError(f"this is not a GPT of minigpt: there is no matrix {name}, but {listed(state)}")
    blocks = {match[1] for match in map(_BLOCK.fullmatch, state) if match}
    (vocab_size, n_embd), block_size = state[_WTE].shape, state[_WPE].shape[0]
    bias = "transformer.blocks.0.attn.out_proj.bias" in state
    head = state.get(HEAD)
    is_tied = head is None or torch.equal(head, state[_WTE])
    if is_tied:
        state.pop(HEAD, None)
    config = GPTConfig(
        n_embd=n_embd,
        n_head=n_head,
        n_layer=max(len(blocks), 1),
        block_size=block_size,
        vocab_size=vocab_size,
        bias=bias,
        gelu=gelu,
        tie_word_embeddings=is_tied,
    )
    expected = FAMILY.on_meta(config)
    wrong = differences(
        {name: tensor_kind(tensor) for name, tensor in state.items()},
        {name: tensor_kind(tensor) for name, tensor in expected.named_parameters()},
    )
    if wrong:
        raise InputError(f"the tensors are not those of a GPT of minigpt; {wrong}")
    weights = {name: cast(name, tensor, torch.float32) for name, tensor in state.items()}
    FAMILY.load_state(expected, weights, assign=True)
    model: GPTLMHeadModel = expected.eval()
    return model
