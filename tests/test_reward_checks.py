"""The doctor finds rewards that are earned without right answers, in records and in a real run."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from minigpt.diagnosis.examination import examine
from minigpt.diagnosis.record import read_record
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.training.run import finetune, train


def written(folder: Path, lines: list[dict[str, Any]]) -> Path:
    """Return the record of a run with these lines of metrics."""
    config = {"task": "grpo", "loss_type": "dapo", "beta": 0.0, "reward": ["length"], "reward_length": 4}
    (folder / "run.json").write_text(json.dumps({"config": {**config, "max_steps": 10}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    checkpoint = folder / "step-00000010"
    checkpoint.mkdir()
    (checkpoint / "training_state.json").write_text(json.dumps({"steps_done": 10, "total_steps": 10}))
    return folder


def evaluation(step: int, reward: float, exact: float, length: float = 4, cut: float = 0) -> dict[str, Any]:
    return {
        "step": step, "val_loss": -reward, "val_reward": reward, "val_exact_match": exact,
        "val_completion_length": length, "val_clipped_ratio": cut,
    }  # fmt: skip


def training(equal: float) -> dict[str, Any]:
    return {"step": 10, "train_loss": 0.0, "reward": 0.5, "frac_reward_zero_std": equal}


CASES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "hacked": ([evaluation(0, 0.5, 0.6), evaluation(10, 0.9, 0.1, 12)], "reward_hacking"),
    "longer": ([evaluation(0, 0.5, 0.0), evaluation(10, 0.9, 0.0, 20)], "answers_degenerate"),
    "shorter": ([evaluation(0, 0.5, 0.0), evaluation(10, 0.9, 0.0, 1)], "answers_degenerate"),
    "endless": ([evaluation(0, 0.5, 0.0, 4, 0.1), evaluation(10, 0.9, 0.0, 8, 0.9)], "answers_degenerate"),
    "equal": ([evaluation(0, 0.5, 0.5), training(0.95), evaluation(10, 0.5, 0.5)], "rewards_equal"),
    "good": ([evaluation(0, 0.5, 0.5), training(0.4), evaluation(10, 0.9, 0.9)], "healthy"),
    "noise": ([evaluation(0, 0.5, 0.5), training(0.4), evaluation(10, 0.9, 0.47)], "healthy"),
    "worse": ([evaluation(0, 0.9, 0.9), training(0.4), evaluation(10, 0.5, 0.5)], "healthy"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_found(name: str, tmp_path: Path) -> None:
    lines, code = CASES[name]
    findings = examine(read_record(written(tmp_path, lines)))
    assert [one.code for one in findings] == [code]
    assert all(one.text(language) for one in findings for language in ("en", "zh"))


def test_a_planted_case(tmp_path: Path) -> None:
    """A model that copies a digit gets rewards for long answers instead."""
    pairs = [{"question": f"{a}{b}", "answer": a} for a in "0123456789" for b in "0123456789"]
    random.Random(1).shuffle(pairs)
    for name, part in (("train", pairs[20:]), ("val", pairs[:20])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in part))
    Tokenizer.from_word2id(build_vocabulary(["0123456789"])).save(tmp_path / "vocab.json")
    files: dict[str, Any] = {
        "train_data": tmp_path / "train.jsonl", "val_data": tmp_path / "val.jsonl", "threads": 1,
        "device": "cpu", "report_to": "none", "precision": "float32", "eval_steps": 10**6,
    }  # fmt: skip
    train(
        recipe="qa-cpu", vocab_path=tmp_path / "vocab.json", output=tmp_path / "base", n_layer=1, n_embd=32,
        n_head=2, block_size=16, max_length=16, batch_size=16, max_steps=90, **files,
    )  # fmt: skip
    result = finetune(
        task="grpo", model=tmp_path / "base" / "best", output=tmp_path / "run", reward=("length",),
        reward_length=6, max_completion_length=8, batch_size=10, max_steps=80, learning_rate=1e-2,
        temperature=2.0, **files,
    )  # fmt: skip
    assert result["val_reward"] > 0.5
    (found, *_) = examine(read_record(tmp_path / "run"))
    assert found.code == "reward_hacking"
    assert found.numbers["exact_match_first"] > 0.8
    assert found.numbers["exact_match_last"] < 0.2
