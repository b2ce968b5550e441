"""Every command reads one file of conversations: counts agree, no pair is in both parts, losses agree."""

import json
from pathlib import Path
from typing import Any

import pytest

from minigpt.data.reader import read_conversations
from minigpt.data.split import exchange_key
from minigpt.qa_dataset import QADataset
from minigpt.tokenizer import Tokenizer
from tests.commands import RunCommand

TINY = (
    "--n_layer",
    1,
    "--n_embd",
    16,
    "--n_head",
    2,
    "--batch_size",
    4,
    "--report_to",
    "none",
    "--device",
    "cpu",
)


def conversations(count: int) -> str:
    """Return conversations of one to three questions, some with a system text, in formats of other tools."""
    lines = []
    for n in range(count):
        turns = [
            turn for k in range(1 + n % 3) for turn in (("user", f"{n}加{k}？"), ("assistant", f"{n + k}。"))
        ]
        if n % 4 == 0:
            turns.insert(0, ("system", "算"))
        if n % 2:
            record: Any = {"messages": [{"role": role, "content": text} for role, text in turns]}
        else:
            record = {"conversations": [{"from": role, "value": text} for role, text in turns]}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines)


@pytest.mark.parametrize(("max_length", "block_size"), [(12, 32), (32, 32), (33, 32)])
def test_every_command_counts_and_measures_the_same(
    tmp_path: Path, run_command: RunCommand, max_length: int, block_size: int
) -> None:
    def run(verb: str, *flags: object) -> dict[str, Any]:
        result = run_command(verb, *flags, "--json")
        assert result.code == 0, result.err
        found: dict[str, Any] = json.loads(result.out.splitlines()[-1])
        return found

    data, vocab = tmp_path / "d.jsonl", tmp_path / "vocab.json"
    data.write_text(conversations(40), encoding="utf-8")
    train, val = tmp_path / "train.jsonl", tmp_path / "val.jsonl"
    whole = run("vocab", "--data", data, "--output", vocab)["read"]
    assert (whole["conversations"], whole["pairs"]) == (40, 79)
    divided = run("split", "--input", data)["result"]
    assert divided["train"] + divided["val"] == 40
    assert divided["train_answers"] + divided["val_answers"] == 79
    parts = [read_conversations(part)[0] for part in (train, val)]
    learned, measured = ({exchange_key(e) for each in part for e in each.exchanges} for part in parts)
    assert not learned & measured
    for part, name in ((train, "train"), (val, "val")):
        statistics = run("stats", "--train_data", part, "--vocab_path", vocab)
        counts = (divided[name], divided[f"{name}_answers"])
        assert (statistics["read"]["conversations"], statistics["read"]["pairs"]) == counts
        dataset = QADataset(part, Tokenizer(vocab), max_length)
        assert (len(dataset), sum(len(each.exchanges) for each in dataset.conversations)) == counts
    size = ("--max_length", max_length, "--block_size", block_size, "--max_steps", 3)
    files = ("--train_data", train, "--val_data", val, "--vocab_path", vocab, "--output", tmp_path / "run")
    trained = run("train", *files, *size, *TINY)
    found = run("eval", "--model", tmp_path / "run/best", "--data", val, "--show", 0, "--max_new_tokens", 1)
    assert (found["conversations"], found["pairs"]) == (divided["val"], divided["val_answers"])
    assert found["answer"]["loss"] == pytest.approx(trained["val_loss"], rel=1e-6)
    doctor = run_command("doctor", tmp_path / "run", "--language", "en")
    assert "leak" not in doctor.out
    assert "data_changed" not in doctor.out
