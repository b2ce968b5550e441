"""From the options that a user gave to a whole configuration: the rest is a recipe's, or a run's.

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
    """The configuration: `given`, and what it leaves out from the recipe, or with `resume` from the run.

    Without a recipe the device decides which one, and a line says so.

    Args:
        given: fields of TrainConfig; paths may be text.

    Raises:
        InputError: for an unknown option (naming the nearest) or a bad value; for a recipe or a run that
            cannot be read; for a run that began with another recipe or size.
    """
    check_ranges(TrainConfig, given)  # before torch is imported to look for a GPU
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
        parse_size(given["size"])  # before anything is printed
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
    """A recipe with the family that was given, without the options of its own family, which are named."""
    if family is None or family == recipe.family or family not in FOREIGN_OPTIONS:  # checked later
        return recipe
    nothing = FOREIGN_OPTIONS[family]
    dropped = [f"{name}={value}" for name in nothing if (value := getattr(recipe, name)) != nothing[name]]
    if dropped:
        print(f"family {family} has no such options, the recipe's values do not count: {', '.join(dropped)}")
    values: dict[str, Any] = {**nothing, "family": family}
    return dataclasses.replace(recipe, **values)
