"""Parquet files and rows in memory, where pyarrow is installed; and what is said where it is not."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from minigpt.data.corpus import read_texts
from minigpt.data.parquet import parquet_rows
from minigpt.data.reader import read_pairs
from minigpt.data.shards import prepare
from minigpt.errors import InputError
from minigpt.tokenizer import Tokenizer, build_vocabulary

ROWS: list[dict[str, Any]] = [
    {"instruction": "一", "input": None, "output": "二"},
    {"instruction": "三", "input": "四", "output": "五"},
    {"instruction": None, "input": "", "output": "六"},
]


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_rows_in_memory() -> None:
    """What iterating over a datasets.Dataset gives."""
    pairs, report = read_pairs(ROWS)
    assert [pair[:3] for pair in pairs] == [("一", "二", 1), ("三\n四", "五", 2)]
    assert report.skipped == [(3, "`instruction` is null, not text")]
    with pytest.raises(InputError, match=r"the data set:3: `instruction` is null"):
        read_pairs(ROWS, strict=True)
    with pytest.raises(InputError, match=r"holds no good pair.*`instruction` is null"):
        read_pairs(ROWS[2:])
    with pytest.raises(InputError, match="no rows"):
        read_pairs([])


def test_pairs_of_a_file(tmp_path: Path) -> None:
    path = parquet(tmp_path / "d.parquet", ROWS)
    assert list(parquet_rows(path)) == ROWS
    assert read_pairs(path)[0] == read_pairs(ROWS)[0]
    talk = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    assert read_pairs(parquet(path, [talk]))[0][0][:2] == ("q", "a")


def test_texts_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = parquet(tmp_path / "d.parquet", [{"text": "一\r\n二"}, {"text": None}, {"text": "三"}])
    tokenizer = Tokenizer.from_word2id(build_vocabulary("一二三\n"))
    tokens = prepare(path, tmp_path / "shards", tokenizer)
    assert tokenizer.decode(tokens.read(0, len(tokens))) == "一\n二<sep>三<sep>"
    assert list(read_texts(path)) == ["一\n二", "三"]
    assert f"{path}:2: skipped: `text` is null" in capsys.readouterr().err
    with pytest.raises(InputError, match="minigpt train --text"):
        read_pairs(path)


def test_a_damaged_file(tmp_path: Path) -> None:
    path = parquet(tmp_path / "d.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="is damaged or no Parquet file"):
        read_pairs(path)


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs pyarrow: pip install 'minigpt\[datasets\]'"):
        read_pairs(tmp_path / "d.parquet")
