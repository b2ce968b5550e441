"""Tiny runs: their data, their flags, and a hash of a run's end."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from minigpt.storage import files
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.training import checkpoint
from minigpt.training.config import TrainConfig
from tests.survival.children import Prepare, finished, start

NEW_MODEL = ("recipe", "vocab_path", "n_layer", "n_embd", "n_head", "family", "dropout")  # not for finetune
EVERY = 2  # number of steps between checkpoints


class Runs:
    """A folder with a tiny data set, and runs on it."""

    def __init__(self, folder: Path, max_steps: int, precision: str) -> None:
        self.folder = folder
        folder.mkdir()
        things, colours = "天地日月山水花草木石火土", ("黑", "土黄", "红", "雪白", "青", "天蓝", "淡淡的紫")
        pairs = [(f"{t}是什么颜色？", f"{t}是{colours[i % 7]}色。") for i, t in enumerate(things)]
        lines = [json.dumps({"question": q, "answer": a}, ensure_ascii=False) + "\n" for q, a in pairs]
        (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
        (folder / "val.jsonl").write_text("".join(lines[:3]), encoding="utf-8")
        Tokenizer.from_word2id(build_vocabulary(q + a for q, a in pairs)).save(folder / "vocab.json")
        self.settings: dict[str, Any] = {
            "recipe": "qa-cpu", "train_data": folder / "train.jsonl", "val_data": folder / "val.jsonl",
            "vocab_path": folder / "vocab.json", "n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 32,
            "max_length": 32, "batch_size": 5, "family": "gpt", "dropout": 0.1, "learning_rate": 1e-3,
            "warmup_steps": 0,
            "max_steps": max_steps, "eval_steps": EVERY, "logging_steps": 1, "threads": 1, "device": "cpu",
            "precision": precision,
        }  # fmt: skip
        self.log = folder / "log"

    def argv(self, output: str, **more: Any) -> list[str]:
        """Return the flags of a run: all flags, or --resume if the run has begun."""
        goal = self.folder / output
        command = ["finetune"] if "method" in more else []
        if (goal / "run.json").exists():
            return [*command, "--output", str(goal), "--resume"]
        settings = {**self.settings, **more, "output": goal}
        return command + [
            part
            for name, value in settings.items()
            if not command or name not in NEW_MODEL
            for part in ((f"--{name}",) if value is True else (f"--{name}", str(value)))
        ]

    def run(self, output: str, prepare: Prepare | None = None, **more: Any) -> int:
        """Start or resume a run, and wait for its end."""
        return finished(start(self.argv(output, **more), self.log, prepare))

    def config(self, output: str, **more: Any) -> TrainConfig:
        """Return the configuration of the same run."""
        return TrainConfig(**{**self.settings, "output": self.folder / output, **more})

    def said(self) -> str:
        """Return the output of the last child, to show after a failure."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-2000:] if self.log.exists() else ""


def digest(output: Path) -> str:
    """Return a SHA-256 over everything at a run's end that does not depend on the clock."""
    last, total = output / "last", hashlib.sha256()
    files.verify_manifest(last)
    for path in sorted(last.glob("*.safetensors")):
        total.update(path.read_bytes())
    state = json.loads((last / "training_state.json").read_text(encoding="utf-8"))
    for key in ("train_seconds", "config"):
        del state[key]
    total.update(json.dumps(state, sort_keys=True).encode())
    for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        values = {k: v for k, v in json.loads(line).items() if k not in ("seconds", "tokens_per_second")}
        total.update(json.dumps(values).encode())
    return total.hexdigest()


def newest_step(output: Path) -> int:
    """Return the step of the newest undamaged checkpoint; -1: there is none."""
    for folder in checkpoint.list_checkpoints(output):
        if checkpoint.verifies(folder):
            return int(folder.name.removeprefix("step-"))
    return -1


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def void(_: object) -> None:
    """Return None, for functions that must return None."""


def is_done(output: Path, steps: int) -> bool:
    """Return True if a run of `steps` steps has reached its end."""
    return (output / f"step-{steps:08d}").exists() and newest_step(output) == steps


def is_finite(folder: Path) -> bool:
    """Return True if a checkpoint's weights and optimiser state have no NaN and no infinity."""
    return all(
        bool(torch.isfinite(tensor).all())
        for name in ("model", "optimizer")
        for tensor in load_file(folder / f"{name}.safetensors").values()
    )
