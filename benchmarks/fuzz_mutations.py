"""Changes to files that damage or forge them, for fuzz.py: bytes, JSON and TOML trees, kinds of files.

A mutation takes a random generator and the bytes of a file, and gives other bytes. Nothing here depends on
anything but the generator, so a number gives an input again.
"""

import json
import os
import random
import socket
import struct
import tomllib
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

__all__ = ["KINDS", "changed_bytes", "changed_file", "changed_tree"]

NUMBERS: list[Any] = [
    *(0, -1, 1, 2, 3, 7, 100, 255, 256, 65536, 10**6, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63),
    *(2**64, -(2**63), 10**18, 10**30, 10**299, 10**400, 0.5, -0.0, 1e-300, 1e300, 1e308, 0.1, 1.5),
    *(float("nan"), float("inf"), float("-inf")),
]
TEXTS = [
    *(
        "",
        " ",
        "\0",
        "a" * 10,
        "\ud800",
        "\u202e\u2066",
        "\x1b[31m",
        "..",
        "../../x",
        "/etc/passwd",
        "/dev/zero",
    ),
    *(
        "{{ 1 }}",
        "{% for a in b %}",
        "%s%n",
        "中",
        "\U0001f600",
        "a\nb",
        "\r\n",
        "true",
        "null",
        "0",
        "-1",
        "1e999",
    ),
    *(
        "float32",
        "int8",
        "F32",
        "BF16",
        "gpt2",
        "qwen3",
        "auto",
        "<|endoftext|>",
        "<pad>",
        "é",
        "\u0301",
        "\ufeff",
    ),
]
WORDS = [
    b"\0",
    b"\xff",
    b"\n",
    b'"',
    b"{",
    b"[",
    b"}",
    b"]",
    b",",
    b":",
    b"\\",
    b"\\u",
    b"\xed\xa0\x80",
    b"\x80",
]


def changed_bytes(rng: random.Random, data: bytes, other: bytes = b"") -> bytes:
    """Damage bytes: flipped bits, cuts, splices, copies, numbers. `other`: bytes to take pieces from."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        size = len(found)
        at = rng.randrange(size + 1)
        if rng.random() < 0.5:  # near the beginning and the end, where headers are
            at = min(size, int(rng.expovariate(0.02)))
            at = size - at if rng.random() < 0.3 else at
        length = min(size - at, int(rng.expovariate(0.05)) + 1)
        match rng.randrange(12):
            case 0 | 1 | 2 if at < size:
                found[at] ^= 1 << rng.randrange(8)
            case 3:
                del found[at:]
            case 4:
                del found[at : at + length]
            case 5:
                found[at:at] = found[at : at + length] * rng.choice((1, 1, 2, 50))
            case 6:
                begin = rng.randrange(len(other) + 1)
                found[at : at + rng.choice((0, length))] = other[begin : begin + length]
            case 7:
                found[at:at] = rng.choice(WORDS) * rng.choice((1, 1, 3, 200))
            case 8:
                found[at : at + length] = rng.randbytes(length)
            case 9:
                found[at : at + 8] = struct.pack(
                    "<q", rng.choice((0, 1, -1, 2**31, 2**62, rng.getrandbits(40)))
                )
            case 10:
                found[at : at + 4] = struct.pack("<i", rng.choice((0, 1, -1, 2**31 - 1, rng.getrandbits(20))))
            case 11:
                found += rng.choice((b"\0", b"\n", b"{}", found[:length], rng.randbytes(20)))
    return bytes(found)


# -- trees ---------------------------------------------------------------------------------------------------


class _Twice(dict[str, Any]):
    """An object that is written with its first key twice."""


def changed_tree(rng: random.Random, tree: Any) -> Any:
    """Change values, keys and shapes of a tree of JSON's types."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            return _value(rng, tree)
        holder, key = rng.choice(places)
        old = holder[key]
        match rng.randrange(10):
            case 0 | 1 | 2 | 3:
                holder[key] = _value(rng, old)
            case 4:
                del holder[key]
            case 5 if isinstance(holder, dict):
                holder[rng.choice((f"{key}x", key.upper(), key[1:], rng.choice(TEXTS)))] = holder.pop(key)
            case 6:
                _, giver = rng.choice(places)[0], rng.choice(places)
                holder[key] = _copied(giver[0][giver[1]])
            case 7:
                depth = rng.choice((3, 50, 99, 101, 500))
                holder[key] = _nested(rng, old, depth)
            case 8 if isinstance(holder, list):
                holder[key:key] = [_copied(old) for _ in range(rng.choice((1, 2, 100)))]
            case 8 | 9 if isinstance(holder, dict):
                holder[rng.choice(TEXTS)] = _value(rng, old)
    return tree


def _places(tree: Any) -> Any:
    """Each (holder, key) of a tree."""
    todo = [tree]
    while todo:
        holder = todo.pop()
        keys = (
            list(holder)
            if isinstance(holder, dict)
            else range(len(holder))
            if isinstance(holder, list)
            else ()
        )
        for key in keys:
            yield holder, key
            todo.append(holder[key])


def _copied(value: Any) -> Any:
    return json.loads(json.dumps(value)) if isinstance(value, dict | list) else value


def _nested(rng: random.Random, value: Any, depth: int) -> Any:
    is_list = rng.random() < 0.5
    for _ in range(depth):
        value = [value] if is_list else {"a": value}
    return value


def _value(rng: random.Random, old: Any) -> Any:
    """Another value, often of the same kind."""
    if isinstance(old, bool) and rng.random() < 0.5:
        return not old
    if isinstance(old, int | float) and rng.random() < 0.6:
        return rng.choice((old + 1, old - 1, -old, old * 2, float(old), str(old), rng.choice(NUMBERS)))
    if isinstance(old, str) and rng.random() < 0.6:
        cut = rng.randrange(len(old) + 1)
        return rng.choice(
            (old[:cut], old[cut:] + old[:cut], old * 2, old[:cut] + rng.choice(TEXTS) + old[cut:], [old])
        )
    return rng.choice(
        (rng.choice(NUMBERS), rng.choice(TEXTS), None, True, [], {}, [old], {"a": old}, [1, "a", None])
    )


def written_json(rng: random.Random, tree: Any) -> bytes:
    """A tree as JSON in some encoding, or with a key twice."""
    try:
        text = json.dumps(tree, ensure_ascii=rng.random() < 0.5)
    except ValueError:  # 10**400 has more digits than Python prints
        text = "1" + "0" * 400
    if rng.random() < 0.05 and text.startswith("{") and len(text) > 2:
        text = f"{text[:-1]},{text[1:]}"  # each key twice
    codec = rng.choice(
        ("utf-8", "utf-8", "utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32", "gb18030")
    )
    return text.encode(codec, "surrogatepass" if codec.startswith("utf") else "replace")


def written_toml(tree: dict[str, Any]) -> bytes:
    """A flat tree as TOML; what TOML lacks becomes a text."""

    def shown(value: Any) -> str:
        match value:
            case bool():
                return str(value).lower()
            case float():
                return repr(value).replace("e+", "e")
            case int():
                return str(value) if value.bit_length() < 10_000 else "1"
            case list():
                return f"[{', '.join(map(shown, value))}]"
            case dict():
                inner = ", ".join(f"{json.dumps(str(k))} = {shown(v)}" for k, v in value.items())
                return f"{{ {inner} }}"
        return json.dumps(str(value))

    lines = [f"{json.dumps(str(key))} = {shown(value)}" for key, value in tree.items()]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


# -- files ---------------------------------------------------------------------------------------------------


def changed_file(rng: random.Random, name: str, data: bytes, other: bytes, sealed: bool = False) -> bytes:
    """Change a file by what it is: a JSON or TOML tree, lines of JSON, a header and data, a zip, or bytes.

    Args:
        sealed: a zip gets no new checksums.
    """
    structured = rng.random() < 0.6
    try:
        if structured and name.endswith((".json", ".ipynb")):
            return written_json(rng, changed_tree(rng, json.loads(data)))
        if structured and name.endswith(".jsonl"):
            lines = data.splitlines()
            at = rng.randrange(len(lines))
            new = written_json(rng, changed_tree(rng, json.loads(lines[at])))
            return b"\n".join([*lines[:at], new, *lines[at + 1 :]]) + b"\n"
        if structured and name.endswith(".toml"):
            return written_toml(changed_tree(rng, tomllib.loads(data.decode())))
        if structured and name.endswith(".safetensors"):
            (length,) = struct.unpack("<Q", data[:8])
            header = written_json(rng, changed_tree(rng, json.loads(data[8 : 8 + length])))
            return struct.pack("<Q", len(header)) + header + data[8 + length :]
        if structured and not sealed and data[:4] == b"PK\x03\x04":
            return changed_zip(rng, data, other)
    except (ValueError, IndexError, RecursionError, OverflowError, struct.error, TypeError, AttributeError):
        pass  # not what its name says, or a value that the format lacks
    if name.endswith((".json", ".jsonl", ".toml", ".txt", ".csv", ".tsv", ".jinja", ".md", ".log")):
        match rng.randrange(12):
            case 0:
                codecs = ("utf-16", "utf-32", "gb18030", "big5", "shift_jis", "latin-1", "cp1252", "utf-7")
                return data.decode("utf-8", "replace").encode(rng.choice(codecs), "replace")
            case 1:
                opening = rng.choice((b"[", b'{"a":', b"[{", b"<", b"("))
                return opening * rng.choice((50, 101, 2000, 100_000)) + data
            case 2:
                lines = data.splitlines(keepends=True)
                rng.shuffle(lines)
                return b"".join(lines)
    return changed_bytes(rng, data, other)


def changed_zip(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A zip whose entries are changed and whose checksums are right, or that lacks or doubles entries."""
    entries = [
        (one.filename, zipfile.ZipFile(BytesIO(data)).read(one))
        for one in zipfile.ZipFile(BytesIO(data)).infolist()
    ]
    at = rng.randrange(len(entries))
    name, content = entries[at]
    match rng.randrange(8):
        case 0:
            del entries[at]
        case 1:
            entries[at] = rng.choice((f"{name}x", f"../{name}", f"/{name}", name.upper(), "a\\b")), content
        case 2:
            entries.append((name, content))
        case 3:
            entries[at] = name, bytes(rng.choice((10**6, 5 * 10**7)))
        case _:
            entries[at] = name, changed_bytes(rng, content, other)
    packed = BytesIO()
    kind = zipfile.ZIP_DEFLATED if len(entries[at][1]) > 10**5 or rng.random() < 0.1 else zipfile.ZIP_STORED
    with zipfile.ZipFile(packed, "w", kind, compresslevel=1) as archive:
        for name, content in entries:
            archive.writestr(zipfile.ZipInfo(name), content, kind)
    return packed.getvalue()


# -- kinds of files ------------------------------------------------------------------------------------------


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        here = Path.cwd()
        os.chdir(path.parent)  # the path of a socket may have 100 characters only
        try:
            one.bind(path.name)
        finally:
            os.chdir(here)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


KINDS: dict[str, Callable[[Path], None]] = {
    "FIFO": os.mkfifo,
    "/dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "folder": Path.mkdir,
    "socket": _socket,
    "empty": Path.touch,
    "missing": lambda path: None,
    "a sparse terabyte": _sparse,
}
