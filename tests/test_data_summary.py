"""Warnings about too little data before training, and the two baselines, compared with sums by hand."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.training.config import TrainConfig
from minigpt.training.data_summary import LEARN_FROM, MEASURE_ON, DataSummary, read_summary, summarize
from minigpt.training.run_data import read_data
from tests.commands import RunCommand
from tests.runs import config, given, write_data

ENOUGH = DataSummary("pairs", 100, LEARN_FROM, 40, MEASURE_ON, 50, 2.0, 2.0, 2.0, False)


def pairs(
    folder: Path, train: list[tuple[str, str]], val: list[tuple[str, str]], **values: Any
) -> TrainConfig:
    for name, part in (("train", train), ("val", val)):
        lines = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in part]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    Tokenizer.from_word2id(build_vocabulary(["abcde?"])).save(folder / "vocab.json")
    return config(folder, **values)


def test_the_unigram_losses_by_hand(tmp_path: Path) -> None:
    """Answers a, a, b, c; each is followed by <sep>. A vocabulary of 9: 3 special ones, a to e, ?."""
    settings = pairs(tmp_path, [("d?", a) for a in "aabc"], [("e?", "a"), ("e?", "d")])
    summary = summarize(read_data(settings), settings)
    assert (summary.unit, summary.vocab_size, summary.uniform_loss) == ("pairs", 9, math.log(9))
    assert (summary.train_examples, summary.train_targets) == (4, 8)
    assert (summary.val_examples, summary.val_targets) == (2, 4)
    # counted: 4 <sep>, 2 a, 1 b, 1 c: 8 in all and 4 kinds, so 4 of 12 parts are shared out evenly
    sep, a, b, d = ((count + 4 / 9) / 12 for count in (4, 2, 1, 0))
    assert summary.val_unigram_loss == pytest.approx(-math.log(a * d * sep * sep) / 4)
    assert summary.train_unigram_loss == pytest.approx(-math.log(a * a * b * b * sep**4) / 8)
    # the answers by each other; without both a: 2 <sep>, b, c; without b or c: 3 <sep>, 2 a and the other
    without_a = [(count + 3 / 9) / 7 for count in (0, 2)]
    without_b = [(count + 3 / 9) / 9 for count in (0, 3)]
    nats = -2 * sum(map(math.log, without_a)) - 2 * sum(map(math.log, without_b))
    assert summary.held_out_unigram_loss == pytest.approx(nats / 8)


def test_with_questions_every_token_but_a_row_s_first_is_a_target(tmp_path: Path) -> None:
    settings = pairs(tmp_path, [("dd?", "a")] * 4, [("e?", "ab")], loss_on="all")
    summary = summarize(read_data(settings), settings)
    assert (summary.train_targets, summary.val_targets) == (4 * 5, 5)
    # d ? <sep> a <sep> four times: 8 <sep>, 4 of d, ?, a; ? <sep> a b <sep> is measured
    shares = [(count + 4 / 9) / 24 for count in (4, 8, 4, 0, 8)]
    assert summary.val_unigram_loss == pytest.approx(-sum(map(math.log, shares)) / 5)


def test_a_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abcd" * 30, encoding="utf-8")
    settings = TrainConfig(
        text=tmp_path / "text.txt", output=tmp_path / "run", block_size=8, val_fraction=0.2
    )
    summary = summarize(read_data(settings), settings)
    assert summary.unit == "windows"
    # 120 characters and the <sep> behind the text: 97 to learn from, 24 to measure on
    assert (summary.train_targets, summary.val_targets) == (96, 23)
    assert 0.9 * math.log(4) < summary.train_unigram_loss < math.log(summary.vocab_size)
    assert not summary.is_same
    settings = dataclasses.replace(settings, val_text=tmp_path / "text.txt")
    assert summarize(read_data(settings), settings).is_same


def test_a_sentence_for_each_thing_that_is_too_small() -> None:
    assert list(ENOUGH.warnings()) == []
    (few,) = dataclasses.replace(ENOUGH, train_targets=LEARN_FROM - 1).warnings()
    assert few.startswith("999 tokens to learn from (100 pairs)")
    assert "add data" in few
    (few,) = dataclasses.replace(ENOUGH, val_targets=100, val_examples=1).warnings()
    assert few.startswith("100 tokens to measure on (1 pair)")
    assert "10%" in few  # 1 / sqrt(100)
    (same,) = dataclasses.replace(ENOUGH, is_same=True).warnings()
    assert "minigpt split" in same


def test_before_training_it_is_said_and_written_down(tmp_path: Path, run_command: RunCommand) -> None:
    write_data(tmp_path)
    result = run_command("train", *given(tmp_path))
    assert result.code == 0
    said = [line for line in result.err.splitlines() if line.startswith("warning: ")]
    assert [" ".join(line.split()[2:6]) for line in said] == ["tokens to learn from", "tokens to measure on"]
    assert result.err.index(said[1]) < result.err.index("training 12/12")
    again = run_command("train", "--output", tmp_path / "run", "--resume", "--max_steps", "14")
    assert (again.code, "tokens to learn from" in again.err) == (0, False), "said before"
    written = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["data"]
    settings = config(tmp_path)
    assert read_summary(written) == summarize(read_data(settings), settings)


@pytest.mark.parametrize(
    "change", [{"unit": 3}, {"val_targets": None}, {"val_targets": 0}, {"vocab_size": 1}]
)
def test_what_another_version_wrote_is_passed_over(change: dict[str, Any]) -> None:
    assert read_summary(ENOUGH.as_dict()) == ENOUGH
    assert read_summary({**ENOUGH.as_dict(), **change}) is None
    assert read_summary(None) is None
