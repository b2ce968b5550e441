"""JSONL with other usual field names: one table decides, the first line for the whole file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minigpt.data.batches import encode_pairs
from minigpt.data.reader import read_pairs
from minigpt.data.records import BadLine, pairs_of, shape_of
from minigpt.data.split import split_pairs
from minigpt.errors import InputError
from minigpt.tokenizer import Tokenizer, build_vocabulary

TALK = {
    "messages": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q1"},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "Q2"},
        {"role": "assistant", "content": "A2"},
    ]
}
GOOD: list[tuple[dict[str, Any], list[tuple[str, str]]]] = [
    ({"question": "q", "answer": "a"}, [("q", "a")]),
    ({"prompt": "q", "completion": "a", "text": "t"}, [("q", "a")]),
    ({"instruction": "i", "input": "x", "output": "a"}, [("i\nx", "a")]),
    ({"instruction": "i", "input": "", "output": "a"}, [("i", "a")]),
    ({"instruction": "i", "output": "a"}, [("i", "a")]),
    (TALK, [("S\nQ1", "A1"), ("S\nQ1\nA1\nQ2", "A2")]),
]


def write(path: Path, *items: object) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


@pytest.mark.parametrize(("item", "pairs"), GOOD)
def test_shapes(tmp_path: Path, item: dict[str, Any], pairs: list[tuple[str, str]]) -> None:
    shape = shape_of(item)
    assert shape is not None
    assert pairs_of(item, shape) == pairs
    path = write(tmp_path / "d.jsonl", item, item)
    every, report = read_pairs(path, strict=True, every_turn=True)
    assert [pair[:3] for pair in every] == [(*pair, line) for line in (1, 2) for pair in pairs]
    assert report.skipped == []
    lines, _ = read_pairs(path, strict=True)  # one pair a line, so that a split keeps lines whole
    assert [pair[:3] for pair in lines] == [(*pairs[-1], 1), (*pairs[-1], 2)]


def test_a_split_keeps_conversations_whole(tmp_path: Path) -> None:
    talks = [{"messages": [*TALK["messages"], {"role": "assistant", "content": str(i)}]} for i in range(3)]
    talks += [{"messages": [{"role": "user", "content": str(i)}, *TALK["messages"]]} for i in range(7)]
    pairs, _ = read_pairs(write(tmp_path / "d.jsonl", *talks), strict=True)
    split = split_pairs(pairs, 0.5, 0)
    assert sorted(pair.line for pair in (*split.train, *split.val)) == list(range(1, 11))


@pytest.mark.parametrize(
    ("item", "shape", "reason"),
    [
        ({"prompt": "q"}, "prompt", "`completion` is missing"),
        ({"prompt": "", "completion": "a"}, "prompt", "`prompt` is empty"),
        ({"instruction": "i", "input": 3, "output": "a"}, "instruction", "`input` is a number, not text"),
        ({"instruction": "i", "output": None}, "instruction", "`output` is null, not text"),
        ({}, "messages", "`messages` is missing"),
        ({"messages": "hello"}, "messages", "`messages` is text, not a list"),
        ({"messages": []}, "messages", "no message is an assistant's"),
        ({"messages": ["hello"]}, "messages", "a message is text, not an object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "a `role` is none of"),
        ({"messages": [{"role": "user"}]}, "messages", "`content` is missing"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "the assistant speaks first"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages", "no message is an assistant's"),
    ],
)
def test_what_is_wrong_is_named(item: dict[str, Any], shape: Any, reason: str) -> None:
    with pytest.raises(BadLine) as bad:
        pairs_of(item, shape)
    assert reason in str(bad.value)


def test_the_first_line_with_known_fields_decides(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"x": 1}, GOOD[1][0], GOOD[0][0], GOOD[1][0])
    pairs, report = read_pairs(path)
    assert [pair.line for pair in pairs] == [2, 4]
    assert report.skipped == [(1, "`question` is missing"), (3, "`prompt` is missing")]
    with pytest.raises(InputError, match=r":3: `prompt` is missing"):
        read_pairs(write(path, GOOD[1][0], GOOD[1][0], GOOD[0][0]), strict=True)


def test_texts_have_another_way_in(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="minigpt train --text"):
        read_pairs(write(tmp_path / "d.jsonl", {"text": "t"}))


def test_twice_the_same_key(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 1, "prompt": "a"}\n')
    assert read_pairs(tmp_path / "d.jsonl")[1].skipped == [(2, "`prompt` stands there more than once")]


@pytest.mark.parametrize(("item", "expected"), GOOD)
def test_loss_counts_on_what_is_answered(
    tmp_path: Path, item: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    pairs, _ = read_pairs(write(tmp_path / "d.jsonl", item), every_turn=True)
    tokenizer = Tokenizer.from_word2id(build_vocabulary(q + a for q, a in expected))
    batch = encode_pairs(pairs, tokenizer, 64).batch(np.arange(len(pairs)))
    for row, (_, answer) in enumerate(expected):
        counted = batch.targets[row][batch.answer_mask[row]].tolist()
        assert counted == [*tokenizer.encode_text(answer), tokenizer.sep_token_id]
