"""Builds commands that a user can copy and run: each repeats a training run's command with other settings.

    train_command(record, {"learning_rate": 1e-3})
    'minigpt train --recipe qa-cpu --train_data mine.jsonl --learning_rate 0.001 --output output-2'

A command has a flag only if the run's model and optimiser have this option. For each kind of advice, a test
trains a model so that the problem occurs, and then runs the recommended command.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minigpt.diagnosis.record import RunRecord
from minigpt.errors import InputError
from minigpt.training.config import PER_CALL, TrainConfig, read_recipe
from minigpt.training.finetune_config import FinetuneConfig
from minigpt.training.resolve import SHAPE

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

# Options of the run that the new command does not repeat. `size` is not needed, because the command repeats
# the settings that `size` chose, such as n_layer.
_NOT_COPIED = {*PER_CALL, "recipe", "size", "resume", "output"}


def rates(config: TrainConfig) -> dict[str, float]:
    """Return the learning rate of each optimiser of the run as a dict, such as {"learning_rate": 1e-3}."""
    names = ("learning_rate", "muon_learning_rate") if config.optimizer == "muon" else ("learning_rate",)
    return {name: getattr(config, name) for name in names}


def usual_rates(config: TrainConfig) -> dict[str, float]:
    """Return learning rates that are usual for models with the run's number of channels (n_embd).

    AdamW's best rate falls as the number of channels grows (https://arxiv.org/abs/2203.03466). Recipes for
    small GPTs have 1e-3 at 256 channels. Muon's best rate does not depend on the number of channels. In a run
    with Muon, AdamW trains only embeddings and vectors. The two rates for such a run come from the recipe
    qa-cpu.
    """
    if config.optimizer == "muon":
        return {"learning_rate": 1e-2, "muon_learning_rate": 0.02}
    return {"learning_rate": float(f"{1e-3 * min(3.0, 256 / config.n_embd):.1g}")}


def gentler(record: RunRecord) -> dict[str, Any]:
    """Return settings for a gentler run: clipping, warm-up, and a lower learning rate.

    The learning rate is a third of the run's rate, but at most the usual rate (`usual_rates`).
    """
    config, usual = record.config, usual_rates(record.config)
    lower = {name: float(f"{min(rate / 3, usual[name]):.2g}") for name, rate in rates(config).items()}
    warmup = max(config.warmup_steps, min(100, record.total_steps // 10))
    return {**lower, "max_grad_norm": min(config.max_grad_norm or 1.0, 1.0), "warmup_steps": warmup}


def relative_rate(config: TrainConfig) -> float:
    """Return the run's learning rate / the usual rate; with several optimisers, the highest quotient."""
    usual = usual_rates(config)
    return max(rate / usual[name] for name, rate in rates(config).items())


def longer(config: TrainConfig, times: float) -> dict[str, Any]:
    """Return settings for a run with `times` times as many steps."""
    if config.max_steps:
        return {"max_steps": max(1, round(times * config.max_steps))}
    return {"num_train_epochs": float(f"{times * config.num_train_epochs:.3g}")}


def anew(folder: Path) -> Path:
    """Return a path for a new run. For the folder output, try output-2, output-3, ... until one is free."""
    number = 2
    while (path := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return path


def train_command(record: RunRecord, flags: Mapping[str, Any]) -> str:
    """Build the command that repeats the run with some settings changed, in a new folder."""
    config = record.config
    recipe = config.recipe
    is_finetuning = isinstance(config, FinetuneConfig)
    try:
        base = read_recipe(recipe, type(config))
    except InputError:  # the run has no recipe, or its recipe does not exist any more
        recipe = "finetune" if is_finetuning else "document"
        base = read_recipe(recipe, type(config))
    usual = base.as_dict()
    values = {**config.as_dict(), **flags}
    words = ["minigpt", "finetune" if is_finetuning else "train", "--recipe", recipe]
    of_the_weights = SHAPE if config.starts_from is not None else ()
    for name, value in values.items():
        if name in _NOT_COPIED or name in of_the_weights or value in (None, [], ()):
            continue
        if value != usual[name]:
            words += _words(name, value)
    return shlex.join([*words, "--output", str(anew(record.folder))])


def recipe_command(record: RunRecord, recipe: str) -> str:
    """Build the command that trains on the same data with a recipe's own settings."""
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
    if isinstance(value, list | tuple):
        return [f"--{name}", *map(str, value)]
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no_{name}"]
    return [f"--{name}", str(value)]


def reading(config: TrainConfig) -> list[str]:
    """Return the flags, such as --encoding, with which other commands read the data files of the run."""
    names = ("encoding", "question_field", "answer_field")
    return [word for name in names if (value := getattr(config, name)) for word in (f"--{name}", value)]


def split_commands(record: RunRecord) -> tuple[str, dict[str, Any]]:
    """Return a command that splits the training file again, and flags to train on the two new files."""
    config = record.config
    folder = anew(record.folder.with_name(f"{record.folder.name}-data"))
    words = ["minigpt", "split", "--input", str(config.train_data), "--output_dir", str(folder)]
    parts = {"train_data": str(folder / "train.jsonl"), "val_data": str(folder / "val.jsonl")}
    return shlex.join([*words, *reading(config)]), parts
