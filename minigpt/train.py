"""Train a GPT on questions and answers, or on plain text.

    python ./minigpt/train.py                      # chooses a recipe for the device, and says why
    minigpt train --recipe qa-cpu --num_train_epochs 5
    minigpt train --text book.txt --recipe shakespeare-cpu
    minigpt train --size 10min                     # chooses model and steps for the data and this machine
    minigpt train --resume                         # after Ctrl-C or a crash; gives the same bits

The command reads data/train.jsonl, data/val.jsonl and data/vocab.json, or the text of --text. It writes to
output/ (`--help` lists all paths). The run is in minigpt/training/run.py, the loop in
minigpt/training/loop.py.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: in sys.path, replace this folder by the one above it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import os
from typing import Any

from minigpt.console import command_line
from minigpt.training.config import TrainConfig, read_recipe
from minigpt.training.resolve import resolve


def main(given: dict[str, Any]) -> dict[str, Any]:
    """Complete the options of the user, and train."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0":
        # with several processes, only process 0 prints results
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 -- until it ends
    config = resolve(given)
    from minigpt.training.run import run_training
    from minigpt.training.stop_request import Stopped

    try:
        return run_training(config, given)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.code)


if __name__ == "__main__":
    command_line.run(TrainConfig, main, build=dict, defaults=lambda: read_recipe("qa-cpu"))
elif __name__ == "minigpt.train":  # when imported, this module is replaced by the function of the same name
    from minigpt.training.run import train

    sys.modules[__name__] = train  # type: ignore[assignment]
