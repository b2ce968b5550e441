"""Train a GPT on questions and answers, or on plain text.

    python ./minigpt/train.py                      # picks a recipe by device, says which and why
    minigpt train --recipe qa-cpu --num_train_epochs 5
    minigpt train --text book.txt --recipe shakespeare-cpu
    minigpt train --size 10min                     # chooses model and steps for the data and this machine
    minigpt train --init_from gpt2 --text book.txt # begins with the weights of a folder
    minigpt train --resume                         # after Ctrl-C or a crash: continues to the same bits

Reads data/train.jsonl, data/val.jsonl and data/vocab.json, or what --text names. Writes output/ (see `--help`
for every path). What a run does stands in minigpt/training/run.py, its loop in minigpt/training/loop.py.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: Python put this folder first, where our names would shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from typing import Any

from minigpt.console import command_line
from minigpt.training.command import train_command
from minigpt.training.config import TrainConfig, read_recipe


def main(given: dict[str, Any]) -> dict[str, Any]:
    """Complete the options that were given, then train."""
    return train_command(given, TrainConfig)


if __name__ == "__main__":
    command_line.run(TrainConfig, main, build=dict, defaults=lambda: read_recipe("qa-cpu"))
elif __name__ == "minigpt.train":  # imported: `minigpt.train` is the function, not this script
    from minigpt.training.run import train

    sys.modules[__name__] = train  # type: ignore[assignment]
