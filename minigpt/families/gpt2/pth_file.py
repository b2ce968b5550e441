"""Reads a .pth file of torch.save: the tutorial's checkpoint, `output/best_model.pth`, or a similar one.

    model, epoch = read_pth("output/best_model.pth", n_head=8)

Such a file is a zip with a pickle, and a pickle can call any function. Only torch's own reader is used, with
weights_only=True: it calls only functions that make tensors. Then only the tensors are used. Their shapes
give the sizes of the model, except n_head.
"""

import re
import zipfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from minigpt.errors import InputError
from minigpt.families.checks import differences, listed
from minigpt.families.family import HEAD
from minigpt.families.gpt2.family import FAMILY
from minigpt.families.strict_loading import cast, tensor_kind
from minigpt.model import GPTConfig, GPTLMHeadModel

__all__ = ["read_pth"]

_WTE, _WPE = "transformer.wte.weight", "transformer.wpe.weight"
_WRAPPERS = ("module.", "_orig_mod.")  # prefixes that DistributedDataParallel and torch.compile add to names
_BLOCK = re.compile(r"transformer\.blocks\.(0|[1-9]\d{0,3})\..+")
_MASK = re.compile(r"transformer\.blocks\.\d+\.attn\.(mask|bias|masked_bias|causal_mask|tril)")


def read_pth(
    path: str | Path, n_head: int = 8, gelu: Literal["exact", "tanh"] = "exact"
) -> tuple[GPTLMHeadModel, int | None]:
    """Read the model of a .pth file, in float32 and eval mode, and the epoch in the file (None if absent).

    Args:
        path: the file. It holds a dict with `model_state_dict`, as the tutorial's training script writes it,
            or a state_dict; the names may begin with "module." or "_orig_mod.".
        n_head: number of heads; must divide the channels. With a wrong number the answers make no sense.
        gelu: as in GPTConfig.

    Raises:
        InputError: if the file is damaged, holds more than tensors, or is not such a model.
    """
    path = Path(path)
    content = _load(path)
    state = content.get("model_state_dict", content) if isinstance(content, dict) else None
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(value, Tensor) for value in state.values())
    ):
        has = (
            f"a dictionary with {listed(content) or 'nothing'}"
            if isinstance(content, dict)
            else type(content).__name__
        )
        raise InputError(f"{path} holds no model_state_dict of tensors, but {has}")
    if not all(isinstance(name, str) for name in state):
        raise InputError(f"{path} has a tensor whose name is not a string")
    epoch = content.get("epoch")
    try:
        _require_plain(state, path.stat().st_size)
        model = _model(_named(state), n_head, gelu)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    return model, epoch if isinstance(epoch, int) and not isinstance(epoch, bool) else None


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
    """Check the CRC-32 of each zip entry, which torch does not. (torch.save has written zips since 2020.)"""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise InputError(f"{path} is not a file of torch.save, which never compresses")
            damaged = archive.testzip()
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
        # a tensor with strides of 0 can have any shape in a small file
        if tensor.numel() * tensor.element_size() > size:
            raise InputError(f"{name} claims more bytes than the file has")


def _named(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters under GPTLMHeadModel's names, without wrapper prefixes and without masks."""
    while prefix := next((p for p in _WRAPPERS if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return {
        name: tensor for name, tensor in state.items() if not (_MASK.fullmatch(name) and _is_mask(tensor))
    }


def _is_mask(tensor: Tensor) -> bool:
    """Return True for a causal mask: one number, or a square with one value above the diagonal."""
    if tensor.numel() == 1:
        return True
    if tensor.ndim < 2 or tensor.shape[-1] != tensor.shape[-2] or tensor.numel() != tensor.shape[-1] ** 2:
        return False
    square = tensor.reshape(tensor.shape[-2:])
    visible = torch.ones(square.shape, dtype=torch.bool).tril()
    return bool((square == torch.where(visible, square[0, 0], square[0, -1])).all())


def _model(state: dict[str, Tensor], n_head: int, gelu: Literal["exact", "tanh"]) -> GPTLMHeadModel:
    for name in (_WTE, _WPE):
        if name not in state or state[name].ndim != 2:
            raise InputError(f"this is not a GPT of minigpt: there is no matrix {name}, but {listed(state)}")
    blocks = {match[1] for match in map(_BLOCK.fullmatch, state) if match}
    (vocab_size, n_embd), block_size = state[_WTE].shape, state[_WPE].shape[0]
    bias = "transformer.blocks.0.attn.out_proj.bias" in state
    config = GPTConfig(
        n_embd=n_embd,
        n_head=n_head,
        n_layer=max(len(blocks), 1),
        block_size=block_size,
        vocab_size=vocab_size,
        bias=bias,
        gelu=gelu,
    )
    expected = FAMILY.on_meta(config)
    head = state.pop(HEAD, None)
    if head is not None and not torch.equal(head, state[_WTE]):
        raise InputError(f"{HEAD} differs from {_WTE}: only tied weights are supported")
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
