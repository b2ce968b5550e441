"""Weights in safetensors: one model.safetensors, or shards with an index, named as Hugging Face names them.

    weights = WeightFiles("my-model")    # looks at the headers: names, types, shapes
    weights["transformer.wte.weight"]    # reads this tensor, and keeps nothing of it
    write_weights(folder, tensors, max_shard_size="5GB")

A pickle can run code, so there is no way here to read one. `minigpt.families` knows what the names mean.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from minigpt.errors import InputError
from minigpt.storage.files import atomic_open, atomic_write
from minigpt.storage.read_ahead import HEADER_LIMIT, INDEX, KEPT, WEIGHTS, ReadAhead

__all__ = [
    "INDEX",
    "WEIGHTS",
    "WeightFiles",
    "described",
    "has_own_memory",
    "parse_size",
    "read_json_object",
    "safetensors_parts",
    "write_weights",
]

_SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
_REMEDY = "where you trust it, load it with transformers and write it anew with its save_pretrained()"

# Of the format's types those that weights, or the masks beside them, have; 8-bit floats need scales besides.
# In the order in which a file's tensors lie.
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


class WeightFiles(Mapping[str, Tensor]):
    """A directory's tensors by name. Each look-up reads from the disk, so that one tensor at a time is held.

    Args:
        folder: a directory with model.safetensors, or else with model.safetensors.index.json and its shards.
        ahead: where their bytes may be in memory already.

    Raises:
        InputError: if a file is missing, is no safetensors file, or is another one than the index says.
    """

    def __init__(self, folder: Path | str, ahead: ReadAhead | None = None) -> None:
        folder = Path(folder)
        self._ahead = ahead
        self.own: set[str] = set()  # those handed out in memory that is nobody else's
        self.path = _find(folder)  # what messages are about
        self.described: dict[str, Tensor] = {}  # on "meta": dtype and shape
        self._files: dict[str, Path] = {}
        names_of = {WEIGHTS: None} if self.path.name == WEIGHTS else _read_index(self.path)
        for file_name, names in names_of.items():
            tensors = _read_header(folder / file_name)
            if names is not None and tensors.keys() != names:
                different = ", ".join(sorted(tensors.keys() ^ names)[:4])
                raise InputError(
                    f"{folder / file_name} and {INDEX} do not list the same tensors: {different}"
                )
            self.described |= tensors
            self._files |= dict.fromkeys(tensors, folder / file_name)

    def __getitem__(self, name: str) -> Tensor:
        # Opened for each tensor: what is read is a window into the file, and the window closes with its last
        # user. Through one window for the whole file, a process would soon hold all of it a second time.
        path = self._files[name]
        form, content = self.described[name], self._ahead.take(path, name) if self._ahead else None
        self.own.discard(name)
        if content is not None and content.nbytes == form.nbytes:
            if content.nbytes >= KEPT:
                self.own.add(name)
            return torch.frombuffer(content, dtype=form.dtype).view(form.shape)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(f"{path} is damaged, or changed while it was read: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def described(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The same names with tensors that have dtype and shape: of files, nothing but headers is read for it."""
    return tensors.described if isinstance(tensors, WeightFiles) else tensors


def has_own_memory(tensors: Mapping[str, Tensor], name: str) -> bool:
    """Was the tensor that was looked up put into memory that is nobody else's?"""
    return isinstance(tensors, WeightFiles) and name in tensors.own


def safetensors_parts(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """A safetensors file, tensor by tensor: https://github.com/huggingface/safetensors says how it looks.

    Together the bytes that `safetensors.torch.save` returns, which makes a copy of all tensors, where this
    makes none. Its `save_file` makes none either, but files that only their owner may read, and its errors
    are no OSErrors.

    Args:
        tensors: contiguous, on the CPU, of the types above.
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
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield tensors[name].detach().reshape(-1).view(torch.uint8).numpy().data


def write_weights(folder: Path, tensors: dict[str, Tensor], max_shard_size: int | str = "5GB") -> None:
    """Write tensors, and empty the dictionary meanwhile. The same tensors give the same bytes.

    Up to `max_shard_size` there is one model.safetensors; of more, shards in the dictionary's order, each
    filled as far as the next tensor allows, and an index. What an earlier call left and no longer belongs
    here is removed.

    Args:
        tensors: contiguous, on the CPU, none sharing memory with another.
        max_shard_size: bytes, or a text like "500MB", in powers of 1000 as in Hugging Face's libraries.

    Raises:
        InputError: if the size is none, or a file cannot be written.
    """
    limit = parse_size(max_shard_size)
    shards: list[list[str]] = []
    room = 0
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
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
    """Bytes.

    >>> parse_size("5GB"), parse_size("1.5 MB"), parse_size(4096)
    (5000000000, 1500000, 4096)

    Raises:
        InputError: if it is no size above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", str(size).upper())
    count = int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " ")) if match else 0
    if count < 1:
        raise InputError(f'max_shard_size must be a size like "5GB" or "500MB": got {size!r}')
    return count


def read_json_object(path: Path, missing: str) -> dict[str, Any]:
    """The JSON object that a file holds, each key once.

    Args:
        missing: what to say after "is missing: ".

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    content = _explained(path, lambda: _parse(path.read_bytes()), "is not JSON", missing)
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object: got {type(content).__name__}")
    return content


def _explained(path: Path, read: Callable[[], Any], wrong: str, missing: str = "") -> Any:
    """What `read` returns, its errors in our words. A pipe is refused before it is opened: one could wait."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path} must be a file, and is {'a directory' if path.is_dir() else 'none'}")
    try:
        return read()
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {missing}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except RecursionError:
        raise InputError(f"{path} {wrong}: nested too deeply") from None
    except (ValueError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} {wrong}: {error}") from None


def _parse(content: bytes) -> Any:
    return json.loads(content, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two values for one key it is unclear which is meant, and programs differ in it."""
    content = dict(pairs)
    if len(content) < len(pairs):
        seen = Counter(key for key, _ in pairs)  # a tokenizer has 150,000 keys
        raise ValueError(f"the key {seen.most_common(1)[0][0]!r} stands there twice")
    return content


def _find(folder: Path) -> Path:
    for name in (WEIGHTS, INDEX):  # this order is transformers'
        if (folder / name).exists():
            return folder / name
    text = f"{folder / WEIGHTS} is missing: weights are read from safetensors, never from a pickle"
    for pattern in ("pytorch_model*.bin", "*.pth", "*.pt", "*.ckpt", "*.bin"):
        for path in sorted(folder.glob(pattern)):
            remedy = "see `minigpt import --help`" if path.suffix == ".pth" else _REMEDY
            raise InputError(f"{text} like {path.name}; {remedy}")
    raise InputError(text)


def _read_index(path: Path) -> dict[str, set[str]]:
    """The names that each shard must have."""
    weight_map = read_json_object(path, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: weight_map must be an object from tensor to file")
    shards: dict[str, set[str]] = {}
    for name, file_name in weight_map.items():
        # a plain name: an index from elsewhere shall not make us open files elsewhere
        if not (isinstance(file_name, str) and re.fullmatch(r"[\w-][\w.-]*\.safetensors", file_name)):
            raise InputError(f"{path}: {name} must lie in a .safetensors file beside it: got {file_name!r}")
        shards.setdefault(file_name, set()).add(name)
    for file_name in shards:
        if not (path.parent / file_name).exists():
            raise InputError(f"{path.parent / file_name} is missing: {path.name} names it")
    return shards


def _read_header(path: Path) -> dict[str, Tensor]:
    """Each tensor's dtype and shape, on "meta". The library checks lengths and offsets, we the rest."""

    def read() -> Any:
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if not 0 < length <= min(HEADER_LIMIT, path.stat().st_size - 8):
                if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
                    raise ValueError(f"it is a pickle, which is never read; {_REMEDY}")
                raise ValueError(
                    "its header is longer than the file" if len(start) == 8 else "it is too short"
                )
            content = _parse(file.read(length))
        with safetensors.safe_open(path, framework="pt") as file:
            names = {*file.keys()}
        content.pop("__metadata__", None)
        assert content.keys() == names, "two readers of one header"
        return content

    tensors = {}
    for name, entry in _explained(path, read, "is damaged or no safetensors file").items():
        if entry["dtype"] not in _DTYPES:
            raise InputError(
                f"{path}: {name} is stored as {entry['dtype']}: only {', '.join(_DTYPES)} are read"
            )
        tensors[name] = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device="meta")
    return tensors
