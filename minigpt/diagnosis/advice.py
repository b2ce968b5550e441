"""Advice that can be followed as it stands: the run's own command with other settings.

    train_command(record, {"learning_rate": 1e-3})
    'minigpt train --recipe qa-cpu --train_data mine.jsonl --learning_rate 0.001 --output output-2'

A flag is advised only where the run's family and optimiser have it. Each command is run by a test on a run
that causes the advice.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minigpt.diagnosis.record import RunRecord
from minigpt.errors import InputError
from minigpt.training.config import PER_CALL, TrainConfig, read_recipe

__all__ = [
    "anew",
    "gentler",
    "longer",
    "rates",
    "reading",
    "recipe_command",
    "relative_rate",
    "split_commands",
    "train_command",
    "usual_rates",
]

# No settings: where it goes, what a call was to do, and --size, which chose settings that stand there.
_NOT_COPIED = {*PER_CALL, "recipe", "size", "resume", "output"}


def rates(config: TrainConfig) -> dict[str, float]:
    """The learning rates that the run's optimisers have."""
    names = ("learning_rate", "muon_learning_rate") if config.optimizer == "muon" else ("learning_rate",)
    return {name: getattr(config, name) for name in names}


def usual_rates(config: TrainConfig) -> dict[str, float]:
    """Rates that a model of this width trains well with.

    AdamW's best rate falls as the width grows (https://arxiv.org/abs/2203.03466); 1e-3 at 256 channels is
    what recipes for small GPTs have. Muon's does not; beside it AdamW has embeddings and vectors only. These
    two are the recipe qa-cpu's.
    """
    if config.optimizer == "muon":
        return {"learning_rate": 1e-2, "muon_learning_rate": 0.02}
    return {"learning_rate": float(f"{1e-3 * min(3.0, 256 / config.n_embd):.1g}")}


def gentler(record: RunRecord) -> dict[str, Any]:
    """Settings for a run whose steps were too long: a third of the rate, or the usual one if that is less."""
    config, usual = record.config, usual_rates(record.config)
    lower = {name: float(f"{min(rate / 3, usual[name]):.2g}") for name, rate in rates(config).items()}
    warmup = max(config.warmup_steps, min(100, record.total_steps // 10))
    return {**lower, "max_grad_norm": min(config.max_grad_norm or 1.0, 1.0), "warmup_steps": warmup}


def relative_rate(config: TrainConfig) -> float:
    """The run's rate in usual ones, the highest of its optimisers'."""
    usual = usual_rates(config)
    return max(rate / usual[name] for name, rate in rates(config).items())


def longer(config: TrainConfig, times: float) -> dict[str, Any]:
    """Settings for a run of more steps, or of fewer."""
    if config.max_steps:
        return {"max_steps": max(1, round(times * config.max_steps))}
    return {"num_train_epochs": float(f"{times * config.num_train_epochs:.3g}")}


def anew(folder: Path) -> Path:
    """A name for another run that nothing has yet: output-2, output-3, ..."""
    number = 2
    while (path := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return path


def train_command(record: RunRecord, flags: Mapping[str, Any]) -> str:
    """The run once more, with some settings changed, into a folder of its own."""
    config = record.config
    recipe = config.recipe
    try:
        base = read_recipe(recipe)
    except InputError:  # none, or one that is no longer there
        recipe = "document"
        base = read_recipe(recipe)
    usual = base.as_dict()
    values = {**config.as_dict(), **flags}
    words = ["minigpt", "train", "--recipe", recipe]
    for name, value in values.items():
        if name not in _NOT_COPIED and value is not None and value != usual[name]:
            words += _words(name, value)
    return shlex.join([*words, "--output", str(anew(record.folder))])


def recipe_command(record: RunRecord, recipe: str) -> str:
    """The same data with a recipe's own settings."""
    config = record.config
    words = ["minigpt", "train", "--recipe", recipe]
    names = ["text", "val_text", "tokenizer", "train_data", "val_data", "vocab_path"]
    names += ["encoding", "question_field", "answer_field", "text_field", "document_separator"]
    usual = TrainConfig()
    for name in names:
        if (value := getattr(config, name)) != getattr(usual, name):
            words += _words(name, value)
    return shlex.join([*words, "--output", str(anew(record.folder))])


def _words(name: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no_{name}"]
    return [f"--{name}", str(value)]


def reading(config: TrainConfig) -> list[str]:
    """How the data is to be read, for every command that reads it."""
    names = ("encoding", "question_field", "answer_field")
    return [word for name in names if (value := getattr(config, name)) for word in (f"--{name}", value)]


def split_commands(record: RunRecord) -> tuple[str, dict[str, Any]]:
    """A command that splits the training file anew, and the flags of a run on the two parts."""
    config = record.config
    folder = anew(record.folder.with_name(f"{record.folder.name}-data"))
    words = ["minigpt", "split", "--input", str(config.train_data), "--output_dir", str(folder)]
    parts = {"train_data": str(folder / "train.jsonl"), "val_data": str(folder / "val.jsonl")}
    return shlex.join([*words, *reading(config)]), parts
