"""Completes the options that the user gave: a recipe, or the run to resume, provides the others.

resolve({"recipe": "document", "n_layer": 2})
resolve({"resume": True, "output": "run"})
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minigpt.errors import InputError, check_ranges
from minigpt.training.config import FOREIGN_OPTIONS, TrainConfig, checked_config, read_recipe, read_run
from minigpt.training.sizing import parse_size

__all__ = ["resolve"]


def resolve(given: Mapping[str, Any]) -> TrainConfig:
    """Build the whole configuration: `given`, and for the rest a recipe, or with `resume` the earlier run.

    If no recipe is given, the device and the data decide which one is used, and a line says so.

    Args:
        given: fields of TrainConfig; a path may be a string.

    Raises:
        InputError: for an unknown option (the message names the nearest one) or a bad value; for a recipe or
            run that cannot be read; for a recipe or size that differs from that of the run to resume.
    """
    check_ranges(TrainConfig, given)  # check ranges first, because looking for a GPU imports torch
    base = _run(given) if given.get("resume") else _recipe(given)
    return checked_config({**base.as_dict(), **given}, "options")


def _run(given: Mapping[str, Any]) -> TrainConfig:
    run = read_run(Path(given.get("output", "output")))
    if given.get("recipe", run.recipe) != run.recipe:
        raise InputError(
            f"the run in {run.output} began with --recipe {run.recipe}, got --recipe {given['recipe']}: "
            "--resume keeps the run's; change single values by their flags"
        )
    if given.get("size", run.size) != run.size:
        began = f"began with --size {run.size}" if run.size else "began without --size"
        raise InputError(
            f"the run in {run.output} {began}, got --size {given['size']}: --resume keeps what was "
            "chosen then; raise --max_steps to train for longer"
        )
    return run


def _recipe(given: Mapping[str, Any]) -> TrainConfig:
    if given.get("size"):
        parse_size(given["size"])  # report a bad size before anything is printed
    if given.get("recipe"):
        name = given["recipe"]
    elif given.get("size") and given.get("text"):
        name = "shakespeare-cpu"
        print(f"recipe {name}: no --recipe was given and the data is plain text")
    else:
        from minigpt.devices import pick_device

        device = pick_device(given.get("device", "auto"))
        name = "qa-gpu" if device.type == "cuda" else "qa-cpu"
        print(f"recipe {name}: no --recipe was given and the device is {device.type}")
    return _of_family(read_recipe(name), given.get("family"))


def _of_family(recipe: TrainConfig, family: str | None) -> TrainConfig:
    """Change a recipe to the given family. Options that the family lacks are reset, and printed."""
    # an unknown family raises an error later
    if family is None or family == recipe.family or family not in FOREIGN_OPTIONS:
        return recipe
    nothing = FOREIGN_OPTIONS[family]
    dropped = [f"{name}={value}" for name in nothing if (value := getattr(recipe, name)) != nothing[name]]
    if dropped:
        print(f"family {family} has no such options, the recipe's values do not count: {', '.join(dropped)}")
    values: dict[str, Any] = {**nothing, "family": family}
    return dataclasses.replace(recipe, **values)
