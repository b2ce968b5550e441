"""Pretrains a language model on the texts of a classification task, if the user gives no model.

    with_pretrained({"task": "classification", "train_data": "reviews.csv", "output": "reviews"})

The language model learns to predict the texts; it does not see the labels. It is trained on the training part
only, and evaluated on the validation part. The classifier then begins with its weights. The folder
OUTPUT.pretrained holds the texts of both parts, and its subfolder run/ holds the pretraining run. Stopping
and --resume work as for any run.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt.console.command_line import show
from minigpt.errors import InputError, Message
from minigpt.storage.files import atomic_write, make_folder
from minigpt.storage.json_files import json_text, read_json
from minigpt.training import checkpoint
from minigpt.training.classification import labelled_parts
from minigpt.training.config import RUN_FILE, checked_config, read_recipe
from minigpt.training.finetune_config import FinetuneConfig
from minigpt.training.resolve import resolve
from minigpt.training.run import run_training
from minigpt.training.stop_request import Stopped

__all__ = ["with_pretrained"]

# name of the recipe for the language model, name of the recipe for the classifier
_RECIPE, _SMALL = "classification-pretraining", "classification-cpu"
_TOKENS = 4096  # number of tokens per batch in pretraining
# If the user gives one of these options, both runs use it: the language model's and the classifier's.
_SHARED = (
    *("seed", "device", "threads", "precision", "report_to", "logging_steps", "save_total_limit"),
    "on_save_error",
)


def with_pretrained(given: Mapping[str, Any]) -> dict[str, Any]:
    """Pretrain the language model, unless it already exists. Return the options with its folder as `model`.

    Args:
        given: options of FinetuneConfig without `model`.

    Raises:
        InputError, Stopped: as for a training run.
    """
    base = read_recipe(given.get("recipe", _SMALL), FinetuneConfig)
    config = checked_config({**base.as_dict(), **given}, "options", FinetuneConfig)
    assert isinstance(config, FinetuneConfig)
    output = config.output
    if config.resume and (output / RUN_FILE).exists():
        return dict(given)  # the classifier's run has begun, so its run.json names the model
    if config.dry_run:
        raise InputError("--dry_run of a classifier needs --model: give the model that it begins with")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError("several processes need --model: first minigpt train --text FILE, on the texts")
    if checkpoint.list_checkpoints(output) and not config.overwrite:
        raise InputError(
            Message(
                "{output} holds a run already: --resume continues it, --overwrite moves it to "
                "{output}.previous and starts anew, --output FOLDER writes elsewhere",
                output=output,
            )
        )
    folder = Path(f"{output}.pretrained")
    run, texts, val_texts = folder / "run", folder / "texts.jsonl", folder / "val_texts.jsonl"
    if not (config.resume and _is_finished(run)):
        show(f"no --model: first a language model learns to predict the texts ({_RECIPE}), in {run}")
        train, val = labelled_parts(config)
        make_folder(folder)
        for path, part in ((texts, train), (val_texts, val)):
            lines = (json_text({"text": each.text}) + "\n" for each in part)
            atomic_write(path, "".join(lines))
        block = _block_size([len(each.text) + 1 for each in train])
        options: dict[str, Any] = {
            "block_size": block,
            "batch_size": max(1, _TOKENS // block),
            **{key: given[key] for key in _SHARED if key in given},
            "recipe": _RECIPE,
            "text": texts,
            "val_text": val_texts,
            "output": run,
            "num_train_epochs": config.pretraining_epochs,
            "overwrite": config.overwrite,
            "resume": config.resume and (run / RUN_FILE).exists(),
        }
        try:
            run_training(resolve(options), options)
        except Stopped as stopped:
            done = f"the language model is saved in {run / 'last'}"
            raise Stopped(stopped.code, f"{done}; continue with the same command and --resume") from None
    rest = {key: value for key, value in given.items() if key != "resume"}
    return {"recipe": _SMALL, **rest, "model": run / "best"}


def _block_size(lengths: Sequence[int]) -> int:
    """Choose the context of the new model, in tokens, from the lengths of the texts, in tokens.

    19 of 20 texts fit into the context, but it is at most 512. With little text it is shorter: all texts
    together must fill it at least eight times. The minimum is 16.

    >>> _block_size([20] * 100), _block_size([300] * 1000), _block_size([20] * 5)
    (64, 320, 16)
    """
    usual = sorted(lengths)[len(lengths) * 95 // 100]
    block = min(512, 64 * math.ceil(usual / 64))
    while block > 16 and sum(lengths) < 8 * block:
        block //= 2
    return block


def _is_finished(run: Path) -> bool:
    state = run / "last" / "training_state.json"
    if not state.exists():
        return False
    values = read_json(state)
    done, total = values.get("steps_done"), values.get("total_steps")
    return type(done) is int and type(total) is int and done >= total and bool(values.get("evaluated"))
