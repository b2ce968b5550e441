"""Train a GPT on questions and answers, or on plain text.

    python ./minigpt/train.py                      # chooses a recipe for the device, and says why
    minigpt train --recipe qa-cpu --num_train_epochs 5
    minigpt train --text book.txt --recipe shakespeare-cpu
    minigpt train --size 10min                     # chooses model and steps for the data and this machine
    minigpt train --init_from gpt2 --text book.txt # start from the weights of a folder
    minigpt train --resume                         # after Ctrl-C or a crash; the same bits as without a stop

The command reads data/train.jsonl, data/val.jsonl and data/vocab.json, or the text of --text. It writes to
output/ (`--help` lists all paths). The run is in minigpt/training/run.py, the loop in
minigpt/training/loop.py.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: put the parent folder into sys.path, so that `import minigpt` works
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from typing import Any

from minigpt.console import command_line
from minigpt.training.command import train_command
from minigpt.training.config import TrainConfig, read_recipe


def main(given: dict[str, Any]) -> dict[str, Any]:
    """Fill in the options that the user did not give, and train."""
    return train_command(given, TrainConfig)


if __name__ == "__main__":
    command_line.run(TrainConfig, main, build=dict, defaults=lambda: read_recipe("qa-cpu"))
elif __name__ == "minigpt.train":  # on import, the function `train` replaces this module
    from minigpt.training.run import train

    sys.modules[__name__] = train  # type: ignore[assignment]
