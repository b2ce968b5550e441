"""Continues to train a model on your own data: all weights, some of them, or a LoRA adapter.

    minigpt finetune --model output/best --train_data chats.jsonl --output mine
    minigpt finetune --model Qwen3-0.6B --method lora --train_data chats.jsonl --output mine
    minigpt finetune --model output/best --method freeze --train_only last:2 --train_data chats.jsonl
    minigpt finetune --output mine --resume

The training loop and most flags are the same as in `minigpt train` (minigpt/training/loop.py).
"""

from typing import Any

from minigpt.console import command_line
from minigpt.training.command import train_command
from minigpt.training.config import read_recipe
from minigpt.training.finetune_config import FinetuneConfig


def main(given: dict[str, Any]) -> dict[str, Any]:
    """Fill in the options that the user did not give, and train."""
    return train_command(given, FinetuneConfig)


def defaults() -> FinetuneConfig:
    """Return the values that --help shows."""
    recipe = read_recipe("finetune", FinetuneConfig)
    assert isinstance(recipe, FinetuneConfig)
    return recipe


if __name__ == "__main__":
    command_line.run(FinetuneConfig, main, build=dict, defaults=defaults)
