"""The commands `minigpt train` and `minigpt finetune`: from the user's flags to a training run."""

import os
import sys
from collections.abc import Callable
from typing import Any

from minigpt.console.language import translated
from minigpt.errors import check_ranges
from minigpt.training.config import TrainConfig
from minigpt.training.resolve import resolve

__all__ = ["train_command"]


def train_command(given: dict[str, Any], kind: type[TrainConfig]) -> dict[str, Any]:
    """Train a model with the user's flags. Return the dict that --json prints.

    Args:
        given: the flags that the user gave, name -> value.
        kind: the class of the command's options.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0":
        # With several processes, only process 0 prints results; other processes print to /dev/null.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 -- until the process ends
    if given.get("task") == "classification" and "model" not in given:
        check_ranges(kind, given)  # report wrong numbers before torch is imported, which takes 1 s
        from minigpt.training.pretraining import with_pretrained

        given = _stoppable(with_pretrained, given)
    config = resolve(given, kind)
    from minigpt.training.run import run_training

    return _stoppable(run_training, config, given)


def _stoppable(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    from minigpt.training.stop_request import Stopped

    try:
        return work(*arguments)
    except Stopped as stopped:
        print(translated(stopped.args[0]), file=sys.stderr)
        sys.exit(stopped.code)
