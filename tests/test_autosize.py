"""`minigpt train --size`: bad input, options that it keeps, its record, resuming, processes."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from minigpt.errors import InputError
from minigpt.training import autosize
from minigpt.training.autosize import Shape
from minigpt.training.config import read_recipe
from minigpt.training.distributed import Processes
from minigpt.training.estimate import Estimate
from minigpt.training.run_data import RunData, read_data
from tests.commands import RunCommand
from tests.runs import config, identical, paths, trainer, write_data

# A time budget that is never used up: the tiny data allows 150 steps, which take some seconds.
LONG = "20min"
ONE_SHAPE = ("--n_layer", 1, "--n_embd", 32, "--threads", 1, "--device", "cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_data(tmp_path)
    return tmp_path


def flags(folder: Path, size: str, *more: object, output: str = "run") -> list[object]:
    given = [part for name, path in paths(folder, output).items() for part in (f"--{name}", path)]
    return [*given, "--size", size, *more]


def record(folder: Path, output: str = "run") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / output / "run.json").read_text(encoding="utf-8"))
    return found


# -- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "more", "message"),
    [
        ("0min", (), "size must be above 0"),
        ("banana", (), "got size=banana"),
        ("10", (), "size=10 has no unit"),
        ("1e30GFLOP", (), "at most 1e15GFLOP"),
        ("10min", ("--max_steps", 5), "--size 10min decides the number of steps, --max_steps too"),
        (
            "10GFLOP",
            ("--num_train_epochs=2",),
            "--size 10GFLOP decides the number of steps, --num_train_epochs",
        ),
        ("10min", ("--n_embd", 36, "--n_head", 5), "n_head must divide n_embd: got n_head=5, n_embd=36"),
        ("1e-6GFLOP", ONE_SHAPE, "steps of the smallest model; give at least 1GFLOP"),
        ("0.001s", ONE_SHAPE, "--size 0.001s is too short: measuring takes"),
        ("small", ("--resume",), "nothing to resume"),
    ],
)
def test_bad_input_is_one_line(
    folder: Path, run_command: RunCommand, size: str, more: tuple[object, ...], message: str
) -> None:
    result = run_command("train.py", *flags(folder, size, *more))
    assert result.code == 2, result.err
    assert message in result.err
    assert len(result.err.splitlines()) == 1
    assert not (folder / "run").exists()


def test_a_negative_size_is_one_line(folder: Path, run_command: RunCommand) -> None:
    for given in (("--size", "-3"), ("--size=-3",)):
        result = run_command("train.py", *given)
        assert result.code == 2
        assert "size must be small, base, large, a time" in result.err
        assert len(result.err.splitlines()) == 1


def test_a_model_that_memory_does_not_hold_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(folder, size="large", n_layer=1, n_embd=32)
    monkeypatch.setattr(autosize, "free_memory", lambda _: 1000.0)
    with pytest.raises(InputError, match=r"a model of 1 x 32 needs 0\.\d GiB, and 0\.0 are free"):
        autosize.decide(settings, read_data(settings), ("n_layer", "n_embd", "n_head"), Processes())


def test_memory_chooses_a_smaller_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = Shape(1, 8, 1), Shape(1, 16, 1)
    monkeypatch.setattr(autosize, "LADDER", (small, large))
    monkeypatch.setattr(autosize, "_TOKENS_PER_PARAMETER", 0.01)  # the tiny data has few tokens
    settings = config(folder, size="1GFLOP")
    data = read_data(settings)
    chosen = autosize.decide(settings, data, (), Processes())
    assert chosen.config.n_embd == 16
    needed = chosen.record["expected"]["memory_bytes"]
    monkeypatch.setattr(autosize, "free_memory", lambda _: (needed - 1) / 0.8)
    assert autosize.decide(settings, data, (), Processes()).config.n_embd == 8


def test_a_time_for_several_processes_is_refused(folder: Path) -> None:
    settings = config(folder, size="10min")
    with pytest.raises(InputError, match="one process cannot measure how fast 2 are together"):
        autosize.decide(settings, read_data(settings), (), Processes(rank=0, size=2))


def test_one_pair_is_enough(tmp_path: Path, run_command: RunCommand) -> None:
    write_data(tmp_path)
    one = (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[0]
    (tmp_path / "train.jsonl").write_text(one, encoding="utf-8")
    (tmp_path / "val.jsonl").write_text(one, encoding="utf-8")
    result = run_command("train.py", *flags(tmp_path, LONG, "--device", "cpu", "--threads", 1))
    assert result.code == 0, result.err
    # the data has hardly any tokens, so the smallest model is chosen
    assert record(tmp_path)["size"]["chosen"]["n_embd"] == autosize.LADDER[0].n_embd


# -- what it does -------------------------------------------------------------------------------------------


def test_a_run_writes_down_what_it_expected_and_what_came(folder: Path, run_command: RunCommand) -> None:
    result = run_command("train.py", *flags(folder, LONG, *ONE_SHAPE, "--json"))
    assert result.code == 0, result.err
    written = record(folder)
    settings, chosen = written["config"], written["size"]["chosen"]
    assert (settings["n_layer"], settings["n_embd"], settings["n_head"]) == (1, 32, 1)
    assert settings["family"] == "qwen3"
    assert settings["optimizer"] == "muon"  # the recipe's
    assert settings["size"] == LONG
    assert settings["max_steps"] == chosen["steps"]
    # the recipe's epochs of a data set that is one or two batches are too few steps
    assert chosen["steps"] == 150 > 2 * read_recipe("qa-cpu").num_train_epochs
    epochs = written["size"]["because"]["epochs"]
    assert written["size"]["because"]["limited_by_data"]
    got = written["size"]["got"]
    assert got["val_loss"] > 0
    numbers = json.loads(result.out.splitlines()[-1])
    assert numbers["size"] == written["size"]
    assert (numbers["val_loss"], numbers["seconds"]) == (got["val_loss"], got["seconds"])
    assert f"reads the data {epochs:g} times;" in " ".join(result.out.replace("│", " ").split())
    assert "got" in result.out.splitlines()[-2]


def test_flags_that_are_given_stay(folder: Path, run_command: RunCommand) -> None:
    given: list[object] = ["--n_layer", 3, "--warmup_steps", 1, "--eval_steps", 7, "--batch_size", 4]
    given += ["--family", "gpt", "--dropout", 0.1]
    result = run_command("train.py", *flags(folder, "9GFLOP", *given, "--dry_run", "--json"))
    assert result.code == 0, result.err
    numbers = json.loads(result.out.splitlines()[-1])
    assert numbers["size"]["chosen"]["n_layer"] == 3
    assert "dropout: not an option of qwen3" in result.out
    assert not (folder / "run").exists()
    steps = run_command(
        "train.py", *flags(folder, "small", "--n_embd", 32, "--max_steps", 5, "--dry_run", "--json")
    )
    assert json.loads(steps.out.splitlines()[-1])["size"]["chosen"]["steps"] == 5


def test_plain_text_needs_nothing_else(tmp_path: Path, run_command: RunCommand) -> None:
    text = tmp_path / "book.txt"
    text.write_text("天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。\n" * 60, encoding="utf-8")
    result = run_command(
        "train.py", "--text", text, "--output", tmp_path / "run", "--size", "2GFLOP", *ONE_SHAPE
    )
    assert result.code == 0, result.err
    assert "recipe shakespeare-cpu" in result.out
    assert (tmp_path / "run" / "best" / "model.safetensors").exists()
    assert record(tmp_path)["size"]["got"]["val_loss"] > 0


def test_long_pairs_are_not_cut(tmp_path: Path, run_command: RunCommand) -> None:
    write_data(tmp_path)
    pair = json.dumps({"question": "天是什么颜色？", "answer": "黑" * 400}, ensure_ascii=False)
    for name in ("train.jsonl", "val.jsonl"):
        path = tmp_path / name
        path.write_text(path.read_text(encoding="utf-8") + f"{pair}\n" * 3, encoding="utf-8")
    more = (*ONE_SHAPE, "--dry_run", "--json")
    result = run_command("train.py", *flags(tmp_path, "9GFLOP", *more))
    assert result.code == 0, result.err
    row = next(line for line in result.out.splitlines() if "max_length" in line)
    assert "416" in row  # 400 + 7 + two separators, in whole 32s
    assert "256 would cut 27% of the pairs" in row
    assert "were cut" not in result.err  # lengths that were only tried are not reported
    assert result.out.count("train.jsonl: ") == 0, result.out
    kept = run_command("train.py", *flags(tmp_path, "9GFLOP", *more, "--max_length", 64))
    row = next(line for line in kept.out.splitlines() if "max_length" in line)
    assert "64" in row
    assert "given" in row
    assert (
        kept.err.count("train.jsonl: 3 of 11 conversations are longer than max_length=64 and were cut") == 1
    )


# -- resuming -----------------------------------------------------------------------------------------------


def test_a_resume_measures_nothing_and_keeps_the_record(
    folder: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run_command("train.py", *flags(folder, LONG, *ONE_SHAPE, output="straight"))
    assert straight.code == 0, straight.err
    steps = record(folder, "straight")["config"]["max_steps"]
    first = run_command("train.py", *flags(folder, "small", *ONE_SHAPE, "--max_steps", steps - 2))
    assert first.code == 0, first.err
    before = record(folder)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a resume must not choose anew")

    monkeypatch.setattr(autosize, "decide", never)
    output = ("--output", folder / "run")
    other = run_command("train.py", *output, "--resume", "--size", "large")
    assert other.code == 2
    assert "began with --size small, got --size large" in other.err
    again = run_command("train.py", *output, "--resume", "--size", "small", "--max_steps", steps)
    assert again.code == 0, again.err
    after = record(folder)
    assert after["size"]["expected"] == before["size"]["expected"]
    assert after["size"]["got"]["seconds"] >= before["size"]["got"]["seconds"]
    assert after["config"]["n_embd"] == 32
    (folder / "run" / "run.json").write_text('{"size": 3}', encoding="utf-8")
    assert autosize.read_record(folder / "run") is None
    without = run_command(
        "train.py", *flags(folder, "small", output="plain")[:-2], *ONE_SHAPE, "--max_steps", 2
    )
    assert without.code == 0
    assert "size" not in record(folder, "plain")


@pytest.mark.parametrize(
    ("expected", "is_sound"),
    [({"seconds": 3.5}, True), ({"seconds": None}, True), ({}, False), ("seconds", False), (None, False)]
    + [({"seconds": value}, False) for value in ("3", -1, True, [3], math.inf, math.nan)],
)
def test_a_time_that_is_none_is_no_record(expected: object, is_sound: bool, tmp_path: Path) -> None:
    """Otherwise the comparison would fail after the training."""
    record = {"expected": expected}
    (tmp_path / "run.json").write_text(json.dumps({autosize.RECORD: record}), encoding="utf-8")
    assert autosize.read_record(tmp_path) == (record if is_sound else None)


def test_the_same_amount_is_the_same_run(folder: Path, run_command: RunCommand) -> None:
    for output in ("a", "b"):  # nothing that was measured decides anything
        result = run_command("train.py", *flags(folder, "1GFLOP", *ONE_SHAPE, output=output))
        assert result.code == 0, result.err
    identical(folder / "a", folder / "b")


# -- the rule -----------------------------------------------------------------------------------------------


def chosen(folder: Path, size: str, **values: Any) -> dict[str, Any]:
    settings = config(folder, size=size, **values)
    decision = autosize.decide(settings, read_data(settings), ("threads", "device"), Processes())
    return dict(decision.record["chosen"])


def test_more_arithmetic_never_means_a_smaller_model_or_fewer_steps_of_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autosize, "_EPOCHS_OF_TEXT", 1e6)
    monkeypatch.setattr(autosize._Choice, "_that_fits", lambda self, shape, shapes: shape)
    estimate = Estimate(1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1)
    monkeypatch.setattr(autosize._Choice, "_measure", lambda self, shape: estimate)
    found = [
        chosen(folder, f"{amount}GFLOP", num_train_epochs=1e6, max_steps=0)
        for amount in (3, 30, 300, 3000, 30000)
    ]
    parameters = [each["parameters_in_blocks"] for each in found]
    assert parameters == sorted(parameters)
    assert parameters[0] < parameters[-1]
    for one, more in itertools.pairwise(found):
        if one["n_embd"] == more["n_embd"] and one["n_layer"] == more["n_layer"]:
            assert one["steps"] < more["steps"]
    data = read_data(config(folder))
    assert isinstance(data, RunData)
    tokens_a_step = (int(data.train.lengths.sum()) - len(data.train)) / len(data.plan(config(folder)))
    for each in found[2:]:  # the first budgets allow for no shape that reads enough
        assert each["steps"] * tokens_a_step >= 2 * each["parameters_in_blocks"]


def test_parameters_are_those_of_the_blocks(folder: Path) -> None:
    for family in ("gpt", "qwen3"):
        settings = config(folder, size="1GFLOP", family=family, dropout=0.0)
        found = autosize.decide(settings, read_data(settings), ("family",), Processes())
        run = trainer(found.config)
        blocks = sum(parameter.numel() for parameter in run.model.blocks.parameters())
        assert found.record["chosen"]["parameters_in_blocks"] == blocks


def test_a_name_is_its_shape(folder: Path) -> None:
    for name, shape in autosize.NAMED.items():
        found = chosen(folder, name, n_layer=6, n_embd=768, n_head=8, max_steps=0)
        assert (found["n_layer"], found["n_embd"], found["n_head"]) == shape


def test_the_comparison_says_by_how_much() -> None:
    record = {"expected": {"seconds": 100.0, "memory_bytes": 1}}
    got = {"val_loss": 2.1, "seconds": 50.0}
    written, sentence = autosize.compare(record, got)
    assert written == {**record, "got": got}
    assert sentence == "expected 1 min 40 s, got 50 s (-50%)"
    nothing = {"expected": {"seconds": None}}
    assert autosize.compare(nothing, got)[1] == "no time was expected that could be compared"


def test_measuring_changes_nothing_of_the_run(folder: Path) -> None:
    settings = config(folder, size="9s")
    autosize.decide(settings, read_data(settings), ("n_layer", "n_embd", "n_head"), Processes())
    assert not (folder / "run").exists()
