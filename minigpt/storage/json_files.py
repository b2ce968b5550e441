"""Reads JSON files, with limits. Each error message is one line.

    config = read_json(folder / "config.json", missing=f"{folder} is not a model folder")

An error is raised for: anything but a regular file (reading a pipe or device might never end), more than
`max_bytes`, more than 100 levels of nesting, an integer of more than 300 digits, invalid UTF-8, a key that
occurs twice in an object (programs disagree about which value counts), and a top level that is not an object.
"""

import json
import os
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from minigpt.errors import InputError, Message, shown
from minigpt.storage.regular_files import open_regular

__all__ = ["MAX_BYTES", "json_text", "parse_json", "read_json", "read_toml", "read_utf8", "reading"]

# Largest number of bytes of a JSON file. Published tokenizer.json files have about a tenth of it, or less.
MAX_BYTES = 256_000_000
MAX_DEPTH = 100  # largest number of levels of nesting
_MAX_DIGITS = 300  # largest number of digits of an integer; with 300 digits, float(integer) is still finite


def json_text(value: Any, **options: Any) -> str:
    r"""Return a value as JSON for a file. Chinese stays readable; lone surrogates are escaped.

    Python's str of a file name that is not UTF-8 contains lone surrogates, which UTF-8 cannot encode.

    Args:
        value: a value that JSON can hold.
        options: further arguments of json.dumps.

    >>> print(json_text({"模型": "\udcff"}))
    {"模型": "\udcff"}
    """
    text = json.dumps(value, ensure_ascii=False, **options)
    return text.encode("utf-8", "backslashreplace").decode()


def read_json(path: Path | str, *, missing: str = "", max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: the file.
        missing: end of the error message if the file does not exist.
        max_bytes: largest size of the file.

    Raises:
        InputError: if the file is missing or wrong; the message names it.
    """
    path = Path(path)
    try:
        with reading(path, missing) as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise InputError(f"{path} has {size:,} bytes: more than {max_bytes:,} are not read")
            # `read(max_bytes)` would allocate max_bytes bytes of memory, even for a small file
            content = parse_json(file.read(size))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object: got {type(content).__name__}")
    return content


def read_toml(path: Path | str, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        OSError: if the file cannot be opened, or is not a regular file.
        ValueError: if the file is too large or not TOML; the message is one line.
    """
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > max_bytes:
            raise ValueError(f"it has {size:,} bytes: more than {max_bytes:,} are not read")
        content = file.read(size)
    try:
        return tomllib.loads(content.decode("utf-8").replace("\r\n", "\n"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_utf8(path: Path, missing: str = "") -> str:
    """Return the text of a UTF-8 file. A byte order mark at its beginning is removed.

    Raises:
        InputError: if the file is missing, not regular, larger than MAX_BYTES, or not UTF-8.
    """
    with reading(path, missing) as file:
        if (size := os.fstat(file.fileno()).st_size) > MAX_BYTES:
            raise InputError(f"{path} has {size:,} bytes: more than {MAX_BYTES:,} are not read")
        content = file.read(size)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text in UTF-8 ({error}): copy it again") from None


@contextmanager
def reading(path: Path, missing: str = "") -> Iterator[BinaryIO]:
    """Open a regular file for reading.

    Args:
        path: the file.
        missing: end of the error message if the file does not exist.

    Raises:
        InputError: if the path is not a regular file, or cannot be opened or read.
    """
    try:
        with open_regular(path) as file:
            yield file
    except FileNotFoundError:
        text = "{path} is missing: {why}" if missing else "{path} is missing"
        raise InputError(Message(text, path=path, why=missing)) from None
    except IsADirectoryError:
        raise InputError(f"{path} must be a file, and is a directory") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def parse_json(content: bytes | str) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: if the text is invalid or exceeds a limit; the message is one line.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        value = json.loads(text, object_pairs_hook=_unique, parse_int=_whole)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _children(outer) if isinstance(inner, dict | list)]
        if not level:
            return value
    raise ValueError("it is nested too deeply")


def _children(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _whole(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a whole number has more than {_MAX_DIGITS} digits")
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {shown(twice)} comes twice")
    return content
