"""QADataset: the content of an item, and the behaviour of a torch Dataset."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from minigpt.errors import InputError
from minigpt.qa_dataset import QADataset
from minigpt.tokenizer import Tokenizer, build_vocabulary

TOKENIZER = Tokenizer.from_word2id(build_vocabulary(["abcd"]))  # a: 3, b: 4, c: 5, d: 6


def write(folder: Path, items: list[tuple[str, str]]) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in items))
    return path


@pytest.fixture
def dataset(tmp_path: Path) -> QADataset:
    return QADataset(write(tmp_path, [("ab", "c"), ("a?", "dddddd"), ("d", "d")]), TOKENIZER, max_length=8)


def test_items_by_hand(dataset: QADataset) -> None:
    assert len(dataset) == 3
    read = [(each.question, each.answer, each.line) for each in dataset.conversations]
    assert read == [("ab", "c", 1), ("a?", "dddddd", 2), ("d", "d", 3)]
    short, cut = dataset[0], dataset[1]
    assert {name: tensor.tolist() for name, tensor in short.items()} == {
        "input_ids": [3, 4, 2, 5, 2, 0, 0],
        "attention_mask": [1, 1, 1, 1, 1, 0, 0],
        "targets": [4, 2, 5, 2, 0, 0, 0],
    }
    assert {name: tensor.tolist() for name, tensor in cut.items()} == {
        "input_ids": [3, 1, 2, 6, 6, 6, 6],
        "attention_mask": [1, 1, 1, 1, 1, 1, 1],
        "targets": [1, 2, 6, 6, 6, 6, 6],
    }
    for tensor in [*short.values(), *cut.values()]:
        assert tensor.dtype == torch.int64
        assert tensor.shape == (7,)


def test_items_share_no_memory(dataset: QADataset) -> None:
    item = dataset[0]
    item["input_ids"].fill_(9)
    assert item["targets"].tolist() == [4, 2, 5, 2, 0, 0, 0]
    assert dataset[0]["input_ids"].tolist() == [3, 4, 2, 5, 2, 0, 0]


def test_indices_as_in_a_list(dataset: QADataset) -> None:
    assert torch.equal(dataset[-1]["input_ids"], dataset[2]["input_ids"])
    for index in (3, -4):
        with pytest.raises(IndexError):
            dataset[index]
    assert len([dataset[i] for i in range(len(dataset))]) == 3


def test_batches_of_a_loader(dataset: QADataset) -> None:
    batches = list(DataLoader(dataset, batch_size=2))
    assert [batch["input_ids"].shape for batch in batches] == [(2, 7), (1, 7)]
    assert torch.equal(batches[1]["targets"][0], dataset[2]["targets"])


def test_workers_get_a_whole_copy(dataset: QADataset) -> None:
    twin = pickle.loads(pickle.dumps(dataset))
    assert twin.conversations == dataset.conversations
    for i in range(3):
        for name, tensor in dataset[i].items():
            assert torch.equal(twin[i][name], tensor)


def test_shortest_max_length(tmp_path: Path) -> None:
    item = QADataset(write(tmp_path, [("ab", "c")]), TOKENIZER, max_length=2)[0]
    assert (item["input_ids"].tolist(), item["targets"].tolist()) == ([3], [4])


@pytest.mark.parametrize("max_length", [1, 0, -5])
def test_max_length_below_two(tmp_path: Path, max_length: int) -> None:
    with pytest.raises(InputError, match=f"max_length must be at least 2, .* got {max_length}"):
        QADataset(write(tmp_path, [("a", "b")]), TOKENIZER, max_length=max_length)


def test_skipped_lines_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, [("a", "b"), ("a", "")])
    assert len(QADataset(path, TOKENIZER, max_length=8)) == 1
    assert f"{path}: skipped 1: `answer` is empty (line 2)" in capsys.readouterr().err
