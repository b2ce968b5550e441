"""Tiny training runs that several test files use: data, configuration, and functions to compare two runs."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.training.config import TrainConfig
from minigpt.training.loop import Trainer
from minigpt.training.run_data import read_data
from minigpt.training.run_state import StepMetrics
from minigpt.training.stop_request import Stopped

TINY: dict[str, Any] = {
    "n_layer": 2, "n_embd": 32, "n_head": 2, "block_size": 32, "max_length": 32, "batch_size": 4,
    "learning_rate": 1e-2, "max_steps": 12, "eval_steps": 6, "logging_steps": 2, "threads": 1,
    "device": "cpu",
}  # fmt: skip


def write_data(folder: Path) -> None:
    """Write a tiny data set: the colours of eight things, in answers of different lengths."""
    things, colours = "天地日月山水花草", ("黑", "土黄", "红", "雪白", "青", "天蓝", "淡淡的紫", "绿")
    pairs = [(f"{t}是什么颜色？", f"{t}是{c}色。") for t, c in zip(things, colours)]
    lines = "".join(json.dumps({"question": q, "answer": a}, ensure_ascii=False) + "\n" for q, a in pairs)
    (folder / "train.jsonl").write_text(lines, encoding="utf-8")
    (folder / "val.jsonl").write_text("".join(lines.splitlines(keepends=True)[:3]), encoding="utf-8")
    Tokenizer.from_word2id(build_vocabulary(q + a for q, a in pairs)).save(folder / "vocab.json")


def paths(folder: Path, output: str = "run") -> dict[str, Path]:
    """Return the paths of `write_data`'s files and of the run's folder."""
    return {
        "train_data": folder / "train.jsonl",
        "val_data": folder / "val.jsonl",
        "vocab_path": folder / "vocab.json",
        "output": folder / output,
    }


def config(folder: Path, output: str = "run", **values: Any) -> TrainConfig:
    """Return the configuration of a tiny run on the data in `folder`."""
    return TrainConfig(**{**paths(folder, output), **TINY, **values})


def given(folder: Path, **values: Any) -> list[str]:
    """Return the flags that give `config(folder)`."""
    settings = {**TINY, **paths(folder), **values}
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def trainer(settings: TrainConfig) -> Trainer:
    """Return the Trainer of a run, with its data."""
    return Trainer(settings, read_data(settings))


def one_step(run: Trainer) -> StepMetrics:
    """Do a step, and return its metrics."""
    run.step()
    return run.step.read_metrics()[-1]


def after_updates(run: Trainer, act: Callable[[int], None]) -> None:
    """Call `act` with each step's number (from 1) right after its update."""
    update = run.step.update

    def updating(share: float, found_inf: torch.Tensor) -> None:
        update(share, found_inf)
        act(run.progress.steps_done + 1)

    run.step.update = updating  # type: ignore[method-assign]


def identical(a: Path, b: Path) -> None:
    """Check that weights, optimiser, random state and metrics (without times) of two runs are equal."""
    for name in ("model", "optimizer", "rng"):
        left = load_file(a / "last" / f"{name}.safetensors")
        right = load_file(b / "last" / f"{name}.safetensors")
        assert left.keys() == right.keys()
        for key in left:
            assert torch.equal(left[key], right[key]), (name, key)
    assert metrics(a) == metrics(b)


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, without the values that depend on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def stop_at(run: Trainer, step: int, number: signal.Signals = signal.SIGINT) -> None:
    """Run, and send a signal right after the update of step number `step`."""

    def stop(done: int) -> None:
        if done == step:
            os.kill(os.getpid(), number)

    after_updates(run, stop)
    with pytest.raises(Stopped, match=f"saved step {step} ") as stopped:
        run.run()
    assert stopped.value.code == 128 + number
