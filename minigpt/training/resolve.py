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
from minigpt.training.finetune_config import METHOD_RATES, FinetuneConfig
from minigpt.training.sizing import parse_size

__all__ = ["resolve"]

# Options of a new model. A folder's weights have theirs.
_SHAPE = (
    *("family", "n_layer", "n_embd", "n_head", "dropout", "bias", "gelu", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "rope_theta", "tie_word_embeddings", "zero_projections"),
)


def resolve(given: Mapping[str, Any], kind: type[TrainConfig] = TrainConfig) -> TrainConfig:
    """The configuration: `given`, and what it leaves out from the recipe, or with `resume` from the run.

    Without a recipe the device decides which one, and a line says so.

    Args:
        given: fields of `kind`; paths may be text.
        kind: TrainConfig, or the class of another command's options.

    Raises:
        InputError: for an unknown option (naming the nearest) or a bad value; for a recipe or a run that
            cannot be read; for a run that began with another recipe or size.
    """
    check_ranges(kind, given)  # before torch is imported to look for a GPU
    if given.get("resume"):
        base = _run(given, kind)
    else:
        base = _recipe(given, kind)
        start = given.get("model", base.starts_from) if kind is FinetuneConfig else given.get("init_from")
        if start is not None:
            base = _with_weights(base, given, Path(start))
    config = checked_config({**base.as_dict(), **given}, "options", kind)
    if given.get("max_steps") and not base.max_steps:
        epochs = f"num_train_epochs={config.num_train_epochs:g}"
        print(f"max_steps {config.max_steps}: {epochs} does not count")
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
        parse_size(given["size"])  # before anything is printed
    if given.get("recipe"):
        name = given["recipe"]
    elif kind is FinetuneConfig:
        name = "finetune"
    elif given.get("init_from"):
        name = "finetune"
        print(f"recipe {name}: no --recipe was given and training begins with the weights of a folder")
    elif given.get("size") and given.get("text"):
        name = "shakespeare-cpu"
        print(f"recipe {name}: no --recipe was given and the data is plain text")
    else:
        from minigpt.devices import pick_device

        device = pick_device(given.get("device", "auto"))
        name = "qa-gpu" if device.type == "cuda" else "qa-cpu"
        print(f"recipe {name}: no --recipe was given and the device is {device.type}")
    recipe = read_recipe(name, kind)
    if isinstance(recipe, FinetuneConfig):
        rate = METHOD_RATES[given.get("method", recipe.method)]
        recipe = dataclasses.replace(recipe, learning_rate=rate)
    return _of_family(recipe, given.get("family"))


def _with_weights(recipe: TrainConfig, given: Mapping[str, Any], folder: Path) -> TrainConfig:
    """A recipe with the shape of the model in a folder, and batches that fit into its context.

    Raises:
        InputError: if there is no model; for an option that only a new model has.
    """
    from minigpt.families.registry import family_of
    from minigpt.weights.pretrained import read_config

    model = read_config(folder)
    for name in _SHAPE:
        if name in given:
            raise InputError(f"--{name} is for a new model: the one in {folder} has its own; leave it out")
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
    if "max_length" not in given:
        values["max_length"] = min(recipe.max_length, values["block_size"] + 1)
    return dataclasses.replace(recipe, **values)


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
