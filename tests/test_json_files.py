"""Reading JSON files and safetensors headers: sizes are limited, and each error is one line."""

import json
import os
import struct
from pathlib import Path

import pytest

from minigpt.errors import InputError
from minigpt.storage import json_files
from minigpt.storage.json_files import MAX_DEPTH, parse_json, read_json, read_toml, read_utf8
from minigpt.storage.safetensors_header import Entry, read_header


def refused(path: Path, **options: int) -> str:
    with pytest.raises(InputError) as error:
        read_json(path, **options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(path))
    return str(error.value)


def test_an_object_is_read(tmp_path: Path) -> None:
    content = {"中": [1, -2.5, None, True, {"": "😀"}], "n": 10**299}
    texts = (json.dumps(content), json.dumps(content, ensure_ascii=False), "\ufeff" + json.dumps(content))
    for text in texts:
        (tmp_path / "a.json").write_text(text, encoding="utf-8")
        assert read_json(tmp_path / "a.json") == content


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"{} {}", "is not JSON"),
        (b'{"a": "\xff"}', "is not JSON: byte 7 is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "is not JSON: the key 'c' comes twice"),
        (b'{"a": ' + b"9" * 301 + b"}", "is not JSON: a whole number has more than 300 digits"),
        (b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "is not JSON: it is nested too deeply"),
        (b"[" * 200_000, "is not JSON: it is nested too deeply"),
        (b'{"a":' * 200_000, "is not JSON: it is nested too deeply"),
        (b"[]", "must hold a JSON object: got list"),
        (b"null", "must hold a JSON object: got NoneType"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_object_is_named(content: bytes, text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert text in refused(path)


def test_the_depth_that_is_allowed(tmp_path: Path) -> None:
    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(deepest)
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(f"[{deepest}]")


def test_files_that_are_missing_large_or_none(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert refused(path) == f"{path} is missing"
    with pytest.raises(InputError, match=r"a\.json is missing: look elsewhere"):
        read_json(path, missing="look elsewhere")
    path.write_text('{"a": 1}')
    assert read_json(path, max_bytes=8) == {"a": 1}
    assert "has 8 bytes: more than 7 are not read" in refused(path, max_bytes=7)
    assert "must be a file, and is a directory" in refused(tmp_path)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert "cannot be read: " in refused(loop)
    assert "cannot be read: is no regular file, but a device" in refused(Path(os.devnull))
    link = tmp_path / "link"
    link.symlink_to(path)
    assert read_json(link) == {"a": 1}


def test_toml_and_texts_have_a_largest_size_and_are_utf8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(b"a = 1\r\n")
    assert read_toml(path, max_bytes=7) == {"a": 1}
    with pytest.raises(ValueError, match="it has 7 bytes: more than 6 are not read"):
        read_toml(path, max_bytes=6)
    path.write_text("a = " + "[" * 20_000)
    with pytest.raises(ValueError, match="it is nested too deeply"):
        read_toml(path)
    path.write_bytes("\ufeff中".encode())
    assert read_utf8(path) == "中"
    monkeypatch.setattr(json_files, "MAX_BYTES", 5)
    with pytest.raises(InputError, match=r"a\.toml has 6 bytes: more than 5 are not read"):
        read_utf8(path)
    path.write_bytes("中".encode("gb18030"))
    with pytest.raises(InputError, match=r"a\.toml is not text in UTF-8 \(.*: copy it again"):
        read_utf8(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    for name in ("a.json", "a.safetensors"):
        os.mkfifo(tmp_path / name)
    assert "cannot be read: is no regular file, but a pipe" in refused(tmp_path / "a.json")
    with pytest.raises(InputError, match="is no regular file, but a pipe"):
        read_header(tmp_path / "a.safetensors")


# -- safetensors --------------------------------------------------------------------------------------------


def written(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_a_header_lists_tensors_in_the_order_of_the_file(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "late": {"dtype": "F32", "shape": [2, 1], "data_offsets": [1, 9]},
        "early": {"dtype": "BOOL", "shape": [], "data_offsets": [0, 1]},
        "empty": {"dtype": "F16", "shape": [0, 7], "data_offsets": [9, 9]},
    }
    path = written(tmp_path / "a.safetensors", header, bytes(9))
    first = path.stat().st_size - 9
    assert list(read_header(path).items()) == [
        ("early", Entry("BOOL", (), first, first + 1)),
        ("late", Entry("F32", (2, 1), first + 1, first + 9)),
        ("empty", Entry("F16", (0, 7), first + 9, first + 9)),
    ]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"data_offsets": [1, 9]}, "are not those of F32"),
        ({"data_offsets": [0, 4]}, "are not those of F32"),
        ({"data_offsets": [0, 8, 8]}, "has no dtype, shape or data_offsets that make sense"),
        ({"data_offsets": [0, True]}, "that make sense"),
        ({"data_offsets": [-8, 0]}, "that make sense"),
        ({"data_offsets": [0, 2**63]}, "that make sense"),
        ({"shape": [2.0]}, "that make sense"),
        ({"shape": "2"}, "that make sense"),
        ({"shape": [3]}, "are not those of F32"),
        ({"dtype": None}, "that make sense"),
        ({"dtype": "F8_E4M3"}, "w is stored as F8_E4M3: only I64, F64,"),
        ({"more": 1}, "needs dtype, shape and data_offsets"),
    ],
    ids=str,
)
def test_an_entry_that_is_wrong_is_named(change: dict[str, object], text: str, tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **change}
    path = written(tmp_path / "a.safetensors", {"w": entry}, bytes(8))
    with pytest.raises(InputError) as error:
        read_header(path)
    assert text in str(error.value)
    assert str(error.value).startswith(f"{path}")


@pytest.mark.parametrize("data", [bytes(7), bytes(9)], ids=["cut", "longer"])
def test_tensors_must_fill_the_file(data: bytes, tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    path = written(tmp_path / "a.safetensors", {"w": entry}, data)
    with pytest.raises(InputError, match=r"its tensors end at byte \d+, the file has \d+"):
        read_header(path)


@pytest.mark.parametrize("header", [b"[]", b"3", b"{", b"\xff\xff", b"[" * 100_000])
def test_a_header_that_is_no_object(header: bytes, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is damaged or not a safetensors file: "):
        read_header(written(tmp_path / "a.safetensors", header))
