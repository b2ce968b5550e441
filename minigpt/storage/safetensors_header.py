"""Reads the header of a safetensors file (type, shape and place of each tensor), and an index of such files.

    entries = read_header(Path("model.safetensors"))     # name -> Entry, in the order of the file

A file begins with 8 bytes, which hold the length of the header. Then come the header, which is JSON, and the
tensors without gaps: https://github.com/huggingface/safetensors. Everything is checked: length, JSON, types,
shapes, offsets, and that the tensors fill the file exactly. This module needs neither torch nor NumPy.
"""

import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from minigpt.errors import InputError
from minigpt.storage.json_files import parse_json, read_json, reading

__all__ = ["ITEM_SIZES", "MAX_HEADER", "PICKLE_REMEDY", "Entry", "read_header", "read_index"]

_MOST_SIDES = 16  # largest number of dimensions of a tensor; torch takes very long for a million dimensions
MAX_HEADER = 100_000_000  # largest number of bytes of a header; the format's own limit
PICKLE_REMEDY = "where you trust it, load it with transformers and write it anew with its save_pretrained()"

# The data types that minigpt reads: name in the header -> number of bytes of a value. The safetensors library
# sorts tensors by type in this order. 8-bit floats are missing, because such weights would need scales.
ITEM_SIZES = {
    "I64": 8,
    "F64": 8,
    "F32": 4,
    "I32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


class Entry(NamedTuple):
    """A tensor in a file: the type's name in the header, the shape, and the bytes `begin` ... `end` - 1."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path, missing: str = "") -> dict[str, Entry]:
    """Read the header of a file. Returns name -> Entry, in the order of the file.

    Args:
        path: the file.
        missing: end of the error message if the file does not exist.

    Raises:
        InputError: if the file is missing or damaged; the message names it.
    """
    try:
        with reading(path, missing) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if not 0 < length <= min(MAX_HEADER, size - 8):
                if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
                    raise ValueError(f"it is a pickle, which is never read; {PICKLE_REMEDY}")
                raise ValueError(
                    "its header is longer than the file" if len(start) == 8 else "it is too short"
                )
            header = parse_json(file.read(length))
        if not isinstance(header, dict):
            raise ValueError(f"its header must be a JSON object, and is {type(header).__name__}")
        header.pop("__metadata__", None)
        entries = sorted((_entry(name, entry) for name, entry in header.items()), key=lambda row: row[1][2:])
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path} is damaged or not a safetensors file: {error}") from None
    found: dict[str, Entry] = {}
    place = first = 8 + length
    for name, (dtype, shape, begin, end) in entries:
        if dtype not in ITEM_SIZES:
            known = ", ".join(ITEM_SIZES)
            raise InputError(f"{path}: {name} is stored as {dtype}: only {known} are read")
        if first + begin != place or end - begin != math.prod(shape) * ITEM_SIZES[dtype]:
            wrong = f"the bytes of {name} are not those of {dtype} {list(shape)} in its place"
            raise InputError(f"{path} is damaged or not a safetensors file: {wrong}")
        place = first + end
        found[name] = Entry(dtype, shape, first + begin, place)
    if place != size:
        wrong = f"its tensors end at byte {place:,}, the file has {size:,}"
        raise InputError(f"{path} is damaged or not a safetensors file: {wrong}")
    return found


def _entry(name: str, entry: Any) -> tuple[str, Entry]:
    """Check one tensor's entry in the header. Return (name, Entry), with offsets from the header's end."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r:.80} needs dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    is_whole = all(type(number) is int and 0 <= number < 2**63 for number in numbers)
    fits = is_whole and len(shape) <= _MOST_SIDES and math.prod(max(1, side) for side in shape) < 2**63
    if not (isinstance(dtype, str) and fits and len(offsets) == 2):
        raise ValueError(f"{name!r:.80} has no dtype, shape or data_offsets that make sense")
    return name, Entry(dtype, tuple(shape), *offsets)


def read_index(path: Path) -> dict[str, set[str]]:
    """Read model.safetensors.index.json. Returns for each file of weights the names of its tensors.

    Raises:
        InputError: if the index is damaged, or a file that it names is missing or in another folder.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: weight_map must be an object from tensor to file")
    shards: dict[str, set[str]] = {}
    for name, file_name in weight_map.items():
        # Only a plain file name is allowed: an index must not make minigpt open files in other folders. On
        # Linux, a file name has at most 255 bytes.
        if not (
            isinstance(file_name, str)
            and re.fullmatch(r"[\w-][\w.-]*\.safetensors", file_name)
            and len(file_name.encode()) <= 255
        ):
            raise InputError(
                f"{path}: {name} must be in a .safetensors file beside it: got {file_name!r:.80}"
            )
        shards.setdefault(file_name, set()).add(name)
    for file_name in shards:
        if not (path.parent / file_name).exists():
            raise InputError(f"{path.parent / file_name} is missing: {path.name} names it")
    return shards
