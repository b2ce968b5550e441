"""Reads TensorFlow's checkpoint files ("tensor bundles") without TensorFlow.

    tensors = read_bundle(Path("models/124M/model.ckpt"))  # .index and .data-00000-of-00001

The data files hold the numbers, one tensor after another. The index file says where each tensor is: it is a
sorted table in LevelDB's format, from names to protocol buffers. TensorFlow describes the formats in
`lib/io/table_format.txt`, `util/tensor_bundle/tensor_bundle.h` and `protobuf/tensor_bundle.proto`. Each block
of the table and each tensor has a CRC-32C checksum, and all are checked.

Only what OpenAI's GPT-2 needs is supported: float32, little-endian, no partitioned variables.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from minigpt.errors import InputError
from minigpt.storage.regular_files import open_regular, read_bytes

__all__ = ["read_bundle"]

# Number of bytes of the footer, with which the index ends. The footer consists of two handles (a handle is
# the offset and the size of a block), zeros as padding, and the magic number.
FOOTER = 48
MAGIC = 0xDB4775248B80FB57
TRAILER = 5  # number of bytes after a block: one for the kind of compression, four for the checksum
FLOAT32 = 1  # number that stands for float32 in TensorFlow's DataType
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types of protocol buffers


class _DamageError(Exception):
    """Raised when a file is damaged. The message describes the damage; `read_bundle` adds the file's name."""


class _Entry(NamedTuple):
    """Where a tensor is in the data files, and its shape."""

    shape: tuple[int, ...]
    shard: int  # number of the data file that holds the tensor
    offset: int  # first byte of the tensor in its data file
    size: int  # number of bytes of the tensor
    checksum: int  # CRC-32C of the bytes, changed as in _masked_checksum


def read_bundle(prefix: Path) -> dict[str, NDArray[np.float32]]:
    """Read all tensors of a checkpoint. The names are TensorFlow's, in sorted order.

    The arrays are views of memory-mapped files. Writing to them does not change the files.

    Args:
        prefix: path of the checkpoint's files without ".index" and ".data-00000-of-00001".

    Raises:
        InputError: if a file or tensor is missing, damaged or unsupported; the message names the file.
    """
    path = prefix.with_name(f"{prefix.name}.index")
    try:
        entries, shards = _parse_index(read_bytes(path))
        tensors, opened = {}, {}
        for name, entry in entries.items():
            path = prefix.with_name(f"{prefix.name}.data-{entry.shard:05d}-of-{shards:05d}")
            if entry.shard not in opened:
                opened[entry.shard] = _mapped(path)
            try:
                tensors[name] = _tensor(opened[entry.shard], entry)
            except _DamageError as damage:
                raise _DamageError(f"{name} {damage}") from None
    except FileNotFoundError:
        raise InputError(f"{path} is missing: a checkpoint of TensorFlow consists of several files") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except _DamageError as damage:
        raise InputError(f"{path} cannot be used: {damage}; if it was downloaded, do so again") from None
    return tensors


def _mapped(path: Path) -> NDArray[np.uint8]:
    if path.stat().st_size == 0:
        return np.zeros(0, np.uint8)  # an empty file cannot be memory-mapped
    with open_regular(path) as file:
        # Mode "c" keeps writes in memory. (For a read-only array, torch would print a warning.)
        return np.asarray(np.memmap(file, np.uint8, mode="c"))


def _tensor(data: NDArray[np.uint8], entry: _Entry) -> NDArray[np.float32]:
    if entry.offset + entry.size > len(data):
        raise _DamageError(
            f"should be at bytes {entry.offset:,} to {entry.offset + entry.size:,}, "
            f"but the file has {len(data):,}"
        )
    raw = data[entry.offset : entry.offset + entry.size]
    if _masked_checksum(raw) != entry.checksum:
        raise _DamageError("does not match its checksum")
    values = raw.view("<f4")
    # "A" copies a tensor that is not aligned. In old files a tensor may start at any byte.
    return np.require(values, np.float32, "A").reshape(entry.shape)


def _masked_checksum(data: Any) -> int:
    """Return the CRC-32C of the data, rotated and increased by a constant, as in LevelDB's files.

    LevelDB changes the CRC because a plain CRC is weak for data that itself contains CRCs.
    """
    checksum = int(google_crc32c.value(data))  # type: ignore[no-untyped-call, unused-ignore]
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


# -- the index: a sorted table ------------------------------------------------------------------------------


def _parse_index(file: bytes) -> tuple[dict[str, _Entry], int]:
    """Return a dict, name of a tensor -> its _Entry, and the number of data files."""
    rows = list(_table(file))
    keys = [key for key, _ in rows]
    if keys != sorted(set(keys)):
        raise _DamageError("its names are not in order")
    if not keys or keys[0] != b"":  # the first row must have an empty name: it is the header
        raise _DamageError("it has no header")
    shards = _header(rows[0][1])
    entries = {}
    for key, value in rows[1:]:
        try:
            name = key.decode("utf-8")
        except UnicodeDecodeError:
            raise _DamageError(f"the name {key!r} is not UTF-8") from None
        try:
            entries[name] = _entry(value, shards)
        except _DamageError as damage:
            raise _DamageError(f"{name}: {damage}") from None
    return entries, shards


def _table(file: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the key and the value of each row of the index.

    A handle is the offset and the size of a block. The end of the file has the handle of a block of handles.
    Each of those handles points to a block of rows.
    """
    if len(file) < FOOTER or int.from_bytes(file[-8:], "little") != MAGIC:
        raise _DamageError("it does not end as a checkpoint's index does (cut off, or another kind of file)")
    footer = file[-FOOTER:-8]
    _, at = _handle(footer, 0)  # skip the first handle: it points to an empty block of statistics
    handle, at = _handle(footer, at)
    if footer[at:].strip(b"\0"):
        raise _DamageError("its last 48 bytes are damaged")
    for _, value in _rows(_block(file, handle)):
        inner, _ = _handle(value, 0)
        yield from _rows(_block(file, inner))


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """Read a block's offset and size. Also return the index of the next byte."""
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return (offset, size), at


def _block(file: bytes, handle: tuple[int, int]) -> bytes:
    offset, size = handle
    end = offset + size
    if end + TRAILER > len(file) - FOOTER:
        raise _DamageError("it points beyond its own end")
    if _masked_checksum(file[offset : end + 1]) != int.from_bytes(file[end + 1 : end + TRAILER], "little"):
        raise _DamageError(f"the block at byte {offset:,} does not match its checksum")
    if file[end] != 0:
        raise _DamageError(
            f"the block at byte {offset:,} is compressed (kind {file[end]}), as TensorFlow never does"
        )
    return file[offset:end]


def _rows(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the key and the value of each row of a block.

    In the file, each key omits the beginning that it shares with the key before it. After its rows, a block
    has a list of offsets for binary search, which is not needed here.
    """
    restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 * (restarts + 1)
    if len(block) < 4 or end < 0:
        raise _DamageError("a block is too short")
    at, key = 0, b""
    while at < end:
        shared, at = _varint(block, at)
        added, at = _varint(block, at)
        length, at = _varint(block, at)
        if shared > len(key) or at + added + length > end:
            raise _DamageError("a row leads out of its block")
        key = key[:shared] + block[at : at + added]
        at += added
        yield key, block[at : at + length]
        at += length


# -- the rows' values: protocol buffers ---------------------------------------------------------------------


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Read a number stored in groups of 7 bits, lowest first. Also return the index of the next byte."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise _DamageError("it ends inside a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, at
    raise _DamageError("a number has more than 64 bits")


def _fields(message: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield each field of a protocol buffer: (field number, wire type, value as integer, value as bytes).

    With type VARINT, the bytes are b"". With type BYTES, the integer is 0.
    """
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        value, content = 0, b""
        if kind == VARINT:
            value, at = _varint(message, at)
            value -= (value >> 63) << 64  # negative numbers are stored as 64-bit two's complement
        elif kind in (FIXED32, FIXED64, BYTES):
            length = {FIXED32: 4, FIXED64: 8}.get(kind)
            if length is None:
                length, at = _varint(message, at)
            if at + length > len(message):
                raise _DamageError("it ends inside a value")
            content = message[at : at + length]
            at += length
            value = int.from_bytes(content, "little") if kind != BYTES else 0
        else:
            raise _DamageError(f"a value of an unknown kind ({kind})")
        yield number, kind, value, content


def _header(message: bytes) -> int:
    """Read a BundleHeaderProto. Returns the number of data files."""
    shards = 0
    for number, kind, value, _ in _fields(message):
        if (number, kind) == (1, VARINT):
            shards = value
        elif (number, kind) == (2, VARINT) and value != 0:
            raise _DamageError("its numbers are big-endian, which is not supported")
    if not 1 <= shards <= 99_999:  # the names of data files have five digits, so there are at most 99,999
        raise _DamageError(f"it claims to have {shards} data files")
    return shards


def _entry(message: bytes, shards: int) -> _Entry:
    """Read a BundleEntryProto, which describes a tensor. Check its fields, but not the tensor's bytes."""
    dtype = shard = offset = size = 0
    checksum: int | None = None
    shape: tuple[int, ...] = ()
    for number, kind, value, content in _fields(message):
        match number, kind:
            case 1, 0:
                dtype = value
            case 2, 2:
                shape = _shape(content)
            case 3, 0:
                shard = value
            case 4, 0:
                offset = value
            case 5, 0:
                size = value
            case 6, 5:
                checksum = value
            case 7, 2:
                raise _DamageError("it is stored in slices, which is not supported")
            case _:
                raise _DamageError(f"an unknown field ({number}, kind {kind})")
    if dtype != FLOAT32:
        raise _DamageError(f"its numbers are of TensorFlow's type {dtype}; only float32 (1) is supported")
    if checksum is None:
        raise _DamageError("it has no checksum")
    if not 0 <= shard < shards or offset < 0 or any(side < 0 for side in shape) or len(shape) > 8:
        raise _DamageError(f"impossible place or shape: data file {shard}, byte {offset}, {shape}")
    if size != 4 * math.prod(shape) or (size == 0 and shape != (0,)):
        raise _DamageError(f"its {size:,} bytes are not those of float32 {shape}")
    return _Entry(shape, shard, offset, size, checksum)


def _shape(message: bytes) -> tuple[int, ...]:
    """Read a TensorShapeProto. If the size of a dimension is absent, it is 0: protocol buffers omit zeros."""
    sides = []
    for number, kind, _, content in _fields(message):
        if (number, kind) != (2, BYTES):
            raise _DamageError("its shape is not known")
        sides.append(0)
        for inner, wire, value, _ in _fields(content):
            if (inner, wire) == (1, VARINT):
                sides[-1] = value
    return tuple(sides)
