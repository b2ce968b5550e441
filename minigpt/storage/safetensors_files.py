"""Weights in safetensors: one model.safetensors, or shards with an index, with Hugging Face's file names.

    weights = WeightFiles("my-model")    # reads the headers: names, types, shapes
    weights["transformer.wte.weight"]    # reads this tensor; it is not cached
    write_weights(folder, tensors, max_shard_size="5GB")

This module never reads pickles, because a pickle can run code. It does not know what the names of tensors
mean; `minigpt.families` does.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from minigpt.errors import InputError
from minigpt.storage.files import atomic_open, atomic_write
from minigpt.storage.json_files import json_text
from minigpt.storage.read_ahead import INDEX, KEPT, WEIGHTS, ReadAhead
from minigpt.storage.regular_files import open_regular
from minigpt.storage.safetensors_header import ITEM_SIZES, PICKLE_REMEDY, read_header, read_index

__all__ = [
    "INDEX",
    "WEIGHTS",
    "TensorFile",
    "WeightFiles",
    "described",
    "has_own_memory",
    "parse_size",
    "safetensors_parts",
    "write_weights",
]

_SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
_DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
assert list(_DTYPES) == list(ITEM_SIZES), "safetensors_parts writes tensors in this order"


class TensorFile(Mapping[str, Tensor]):
    """The tensors of one safetensors file, by name. Each look-up reads the tensor again; nothing is cached.

    Args:
        path: the file.
        ahead: a ReadAhead that may have the file's bytes in memory.
        missing: end of the error message if the file does not exist.

    Raises:
        InputError: if the file is missing or not a safetensors file.
    """

    def __init__(self, path: Path, ahead: ReadAhead | None = None, missing: str = "") -> None:
        self.path, self._ahead = path, ahead
        # Names of returned tensors whose memory nothing else uses. The caller may overwrite these tensors.
        self.own: set[str] = set()
        self.described = {  # name -> tensor on "meta", which has dtype and shape
            name: torch.empty(entry.shape, dtype=_DTYPES[entry.dtype], device="meta")
            for name, entry in read_header(path, missing).items()
        }

    def __getitem__(self, name: str) -> Tensor:
        # If `ahead` does not have the bytes, the file is opened again for each tensor. The returned tensor is
        # a memory-mapped view, and the mapping ends when the tensor is deleted. With one mapping for all
        # tensors, the whole file would stay in memory.
        form, content = self.described[name], self._ahead.take(self.path, name) if self._ahead else None
        self.own.discard(name)
        if content is not None and content.nbytes == form.nbytes:
            if content.nbytes >= KEPT:
                self.own.add(name)
            return torch.frombuffer(content, dtype=form.dtype).view(form.shape)
        try:
            with _utf8_name(self.path) as name_of_file, safetensors.safe_open(name_of_file, "pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(f"{self.path} is damaged, or changed while it was read: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.described)

    def __len__(self) -> int:
        return len(self.described)


@contextmanager
def _utf8_name(path: Path) -> Iterator[str]:
    """Yield a path in valid UTF-8 that leads to the file `path`, because safetensors needs UTF-8.

    On Linux, a path may hold any bytes.
    """
    try:
        path.as_posix().encode()
    except UnicodeEncodeError:
        with open_regular(path) as file:
            yield f"/proc/self/fd/{file.fileno()}"
    else:
        yield str(path)


class WeightFiles(Mapping[str, Tensor]):
    """The tensors of a folder, by name.

    They are read from model.safetensors, or else from the shards that model.safetensors.index.json lists. If
    the folder has neither, but exactly one other .safetensors file, that file is read.

    Args:
        folder: the folder.
        ahead: a ReadAhead that may have the bytes in memory.

    Raises:
        InputError: if a file is missing, is not a safetensors file, or differs from the index.
    """

    def __init__(self, folder: Path | str, ahead: ReadAhead | None = None) -> None:
        folder = Path(folder)
        self.path = _find(folder)  # the weights, or the index of the shards; error messages name this file
        self._parts: list[TensorFile] = []
        self._files: dict[str, TensorFile] = {}
        self.described: dict[str, Tensor] = {}  # name -> tensor on "meta", with dtype and shape
        names_of = read_index(self.path) if self.path.name == INDEX else {self.path.name: None}
        for file_name, names in names_of.items():
            file = TensorFile(folder / file_name, ahead)
            if names is not None and file.keys() != names:
                different = ", ".join(sorted(file.keys() ^ names)[:4])
                raise InputError(f"{file.path} and {INDEX} do not list the same tensors: {different}")
            self._parts.append(file)
            self.described |= file.described
            self._files |= dict.fromkeys(file, file)

    @property
    def own(self) -> set[str]:
        """Names of returned tensors whose memory nothing else uses. The caller may overwrite them."""
        return {name for file in self._parts for name in file.own}

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def described(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return name -> tensor, for callers that need only dtype and shape.

    For tensors in files, only the headers are read, and the returned tensors are on "meta", without values.
    Tensors in memory are returned as they are.
    """
    return tensors.described if isinstance(tensors, WeightFiles | TensorFile) else tensors


def has_own_memory(tensors: Mapping[str, Tensor], name: str) -> bool:
    """Return True if the caller may overwrite tensors[name], which it has just looked up.

    The caller may do so if the tensor was read from a file, and no other tensor and no memory-mapped file
    uses the tensor's memory. For tensors that were not read from files, the result is always False.
    """
    return isinstance(tensors, WeightFiles | TensorFile) and name in tensors.own


def safetensors_parts(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file, tensor by tensor, without copying the tensors.

    The format: https://github.com/huggingface/safetensors. `safetensors.torch.save` gives the same
    bytes, but copies all tensors. `safetensors.torch.save_file` does not copy. But the permissions of its
    files let only the owner read them, and its errors are not OSErrors.

    Args:
        tensors: contiguous tensors on the CPU, with dtypes in `_DTYPES`.
        metadata: texts for the header.
    """
    places = {dtype: (place, name) for place, (name, dtype) in enumerate(_DTYPES.items())}
    order = sorted(tensors, key=lambda name: (places[tensors[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        tensor, begin = tensors[name], end
        end += tensor.nbytes
        header[name] = {
            "dtype": places[tensor.dtype][1],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json_text(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield tensors[name].detach().reshape(-1).view(torch.uint8).numpy().data


def write_weights(folder: Path, tensors: dict[str, Tensor], max_shard_size: int | str = "5GB") -> None:
    """Write weights to a folder. The same weights always give the same bytes in the files.

    Each tensor is removed from the dict when it is written, so that its memory can be freed. Weights up to
    `max_shard_size` go into one model.safetensors. Larger weights go into shards, in the order of the dict,
    with an index. Weight files of an earlier call that are not needed any more are removed.

    Args:
        folder: the folder.
        tensors: contiguous tensors on the CPU that share no memory.
        max_shard_size: a number of bytes, or text such as "500MB" (1 MB is 1,000,000 bytes, as at Hugging
            Face).

    Raises:
        InputError: for an invalid size, or a file that cannot be written.
    """
    limit = parse_size(max_shard_size)
    shards: list[list[str]] = []
    free = 0
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    for name, size in sizes.items():
        if not shards or size > free:
            shards.append([])
            free = limit
        shards[-1].append(name)
        free -= size
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    names = [WEIGHTS] if len(shards) == 1 else names
    total = sum(tensor.numel() for tensor in tensors.values())
    for file_name, shard in zip(names, shards, strict=True):
        part = {name: tensors.pop(name) for name in shard}
        with atomic_open(folder / file_name) as file:
            file.writelines(safetensors_parts(part, {"format": "pt"}))
    written = {*names}
    if len(shards) > 1:
        index = {
            "metadata": {"total_parameters": total, "total_size": sum(sizes.values())},
            "weight_map": {
                name: file_name for file_name, shard in zip(names, shards, strict=True) for name in shard
            },
        }
        atomic_write(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
        written.add(INDEX)
    for path in folder.iterdir():
        if path.name not in written and (path.name in (WEIGHTS, INDEX) or _SHARD.fullmatch(path.name)):
            path.unlink()


def parse_size(size: int | str) -> int:
    """Convert a size to a number of bytes.

    >>> parse_size("5GB"), parse_size("1.5 MB"), parse_size(4096)
    (5000000000, 1500000, 4096)

    Raises:
        InputError: for anything but a size above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", str(size).upper())
    count = int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " ")) if match else 0
    if count < 1:
        raise InputError(f'max_shard_size must be a size like "5GB" or "500MB": got {size!r:.80}')
    return count


def _find(folder: Path) -> Path:
    for name in (WEIGHTS, INDEX):  # if both files exist, the first one is read, as in transformers
        if (folder / name).exists():
            return folder / name
    others = sorted(path for path in folder.glob("*.safetensors") if path.name != "adapter_model.safetensors")
    if len(others) == 1:
        return others[0]
    if others:
        names = ", ".join(path.name for path in others[:4]) + (", ..." if len(others) > 4 else "")
        raise InputError(
            f"{folder / WEIGHTS} is missing, and no {INDEX} says which of these belong together: {names}; "
            f"call the file with the weights {WEIGHTS}"
        )
    text = f"{folder / WEIGHTS} is missing: weights are read from safetensors, never from a pickle"
    for pattern in ("pytorch_model*.bin", "*.pth", "*.pt", "*.ckpt", "*.bin"):
        for path in sorted(folder.glob(pattern)):
            remedy = "see `minigpt import --help`" if path.suffix == ".pth" else PICKLE_REMEDY
            raise InputError(f"{text} like {path.name}; {remedy}")
    raise InputError(text)
