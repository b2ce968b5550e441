"""Completes the options that the user gave. The other options come from a recipe, or from the run to resume.

resolve({"recipe": "document", "n_layer": 2})
resolve({"resume": True, "output": "run"})
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minigpt.console.command_line import show
from minigpt.console.language import say
from minigpt.errors import InputError, check_ranges
from minigpt.training.config import FOREIGN_OPTIONS, TrainConfig, checked_config, read_recipe, read_run
from minigpt.training.finetune_config import (
    GRPO_DEFAULTS,
    METHOD_RATES,
    TASK_RATES,
    TASK_RECIPES,
    FinetuneConfig,
)
from minigpt.training.sizing import parse_size

__all__ = ["SHAPE", "resolve"]

# Options that describe a new model. If training begins with a given model, that model decides them.
SHAPE = (
    *("family", "n_layer", "n_embd", "n_head", "dropout", "bias", "gelu", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "rope_theta", "tie_word_embeddings", "zero_projections"),
)


def resolve(given: Mapping[str, Any], kind: type[TrainConfig] = TrainConfig) -> TrainConfig:
    """Build the whole configuration. The values that `given` lacks come from a recipe.

    With `resume`, they come from the earlier run instead. If `given` names no recipe, one is chosen by the
    task, or by the data and the device.

    Args:
        given: fields of `kind`; a path may be a string.
        kind: class of the configuration: TrainConfig or FinetuneConfig.

    Raises:
        InputError: if an option is unknown (the message suggests a similar name) or has a bad value, if a
            recipe or run cannot be read, or if the recipe or size differs from the resumed run's.
    """
    # Check numbers first, so that an error comes at once: the search for a GPU imports torch, which is slow.
    check_ranges(kind, given)
    if given.get("resume"):
        base = _run(given, kind)
    else:
        base = _recipe(given, kind)
        start = given.get("model", base.starts_from) if kind is FinetuneConfig else given.get("init_from")
        if start is not None:
            base = _with_weights(base, given, Path(start))
    config = checked_config({**base.as_dict(), **given}, "options", kind)
    if given.get("max_steps") and not base.max_steps:
        text = "max_steps {steps}: num_train_epochs={epochs:g} does not count"
        print(say(text, steps=config.max_steps, epochs=config.num_train_epochs))
    return config


def _run(given: Mapping[str, Any], kind: type[TrainConfig]) -> TrainConfig:
    run = read_run(Path(given.get("output", "output")), kind)
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


def _recipe(given: Mapping[str, Any], kind: type[TrainConfig]) -> TrainConfig:
    if given.get("size"):
        parse_size(given["size"])  # raises an error for a wrong size, before anything is printed
    if given.get("recipe"):
        name = given["recipe"]
    elif kind is FinetuneConfig:
        name = TASK_RECIPES[given.get("task", "sft")]
    elif given.get("init_from"):
        name = "finetune"
        text = "recipe {name}: no --recipe was given and training begins with the weights of a folder"
        print(say(text, name=name))
    elif given.get("size") and given.get("text"):
        name = "shakespeare-cpu"
        print(say("recipe {name}: no --recipe was given and the data is plain text", name=name))
    else:
        from minigpt.devices import pick_device

        device = pick_device(given.get("device", "auto"))
        name = "qa-gpu" if device.type == "cuda" else "qa-cpu"
        text = "recipe {name}: no --recipe was given and the device is {device}"
        print(say(text, name=name, device=device.type))
    recipe = read_recipe(name, kind)
    _require_task(name, kind, given)
    # a task's built-in recipe sets no learning rate: --method and --task decide it
    if isinstance(recipe, FinetuneConfig) and name in TASK_RECIPES.values():
        # `get`, because an unknown method is reported later
        rate = METHOD_RATES.get(given.get("method", recipe.method), recipe.learning_rate)
        rate *= TASK_RATES.get(given.get("task", recipe.task), 1.0)
        recipe = dataclasses.replace(recipe, learning_rate=rate)
    if isinstance(recipe, FinetuneConfig) and given.get("task", recipe.task) == "grpo":
        plain = FinetuneConfig.__dataclass_fields__
        own = {k: v for k, v in GRPO_DEFAULTS.items() if getattr(recipe, k) == plain[k].default}
        recipe = dataclasses.replace(recipe, task="grpo", **own)
    return _of_family(recipe, given.get("family"))


def _require_task(name: str, kind: type[TrainConfig], given: Mapping[str, Any]) -> None:
    """Raise InputError if the recipe that the user gave is for another task or command.

    A recipe that names no task fits all tasks.
    """
    if not given.get("recipe"):
        return
    recipe = read_recipe(name, FinetuneConfig)
    assert isinstance(recipe, FinetuneConfig)
    if recipe.task == FinetuneConfig.__dataclass_fields__["task"].default:
        return
    if kind is not FinetuneConfig:
        raise InputError(f"recipe {name} is for minigpt finetune --task {recipe.task}, not for minigpt train")
    if given.get("task", recipe.task) != recipe.task:
        raise InputError(f"recipe {name} is for --task {recipe.task}: got --task {given['task']}")


def _with_weights(recipe: TrainConfig, given: Mapping[str, Any], folder: Path) -> TrainConfig:
    """Return the recipe, changed to the family and the sizes of the model in `folder`.

    The recipe's `block_size` and `max_length` are limited to the model's context.

    Raises:
        InputError: if there is no model, or if the user gave an option for new models only.
    """
    from minigpt.families.registry import family_of
    from minigpt.weights.pretrained import read_config

    model = read_config(folder)
    context = model.max_position_embeddings
    if given.get("block_size", 0) > context:
        raise InputError(f"--block_size {given['block_size']}: the model in {folder} reads {context} tokens")
    family = family_of(model).name
    values: dict[str, Any] = {
        **FOREIGN_OPTIONS[family],
        "family": family,
        "n_layer": model.num_hidden_layers,
        "n_embd": model.hidden_size,
        "n_head": model.num_attention_heads,
        "dropout": getattr(model, "dropout", 0.0),
        "block_size": min(given.get("block_size", recipe.block_size), context),
    }
    values["max_length"] = given.get("max_length", min(recipe.max_length, values["block_size"] + 1))
    config = dataclasses.replace(recipe, **values)
    for name in SHAPE:
        if given.get(name, getattr(config, name)) != getattr(config, name):
            raise InputError(f"--{name} is for a new model: the one in {folder} has its own; leave it out")
    return config


def _of_family(recipe: TrainConfig, family: str | None) -> TrainConfig:
    """Change a recipe to the model family `family`.

    If the recipe sets options that this family does not have, drop their values, and print what was dropped.
    """
    # an unknown family is not an error here, because it is reported later
    if family is None or family == recipe.family or family not in FOREIGN_OPTIONS:
        return recipe
    nothing = FOREIGN_OPTIONS[family]
    dropped = [f"{name}={value}" for name in nothing if (value := getattr(recipe, name)) != nothing[name]]
    if dropped:
        show(f"family {family} has no such options, the recipe's values do not count: {', '.join(dropped)}")
    values: dict[str, Any] = {**nothing, "family": family}
    return dataclasses.replace(recipe, **values)
