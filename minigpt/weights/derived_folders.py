"""Writes a copy of a model folder: with new weights, but the same tokenizer and generation settings."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minigpt.storage.files import atomic_folder
from minigpt.storage.json_files import json_text

__all__ = ["write_derived"]

# Files that are copied from the old folder. The weights and config.json are written anew. Files that only
# training needs are left out.
_COPIED = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    "vocab.txt",
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "encoder.json", "vocab.bpe"),
)


def write_derived(
    source: Path, goal: Path, config: Mapping[str, Any], write: Callable[[Path], object]
) -> None:
    """Write a complete model folder with a manifest. If an error occurs, nothing is written.

    Args:
        source: the old folder, whose tokenizer and generation_config.json are copied.
        goal: the new folder. It may exist if it is empty.
        config: the content of config.json.
        write: called with a temporary folder, into which it writes the weights.

    Raises:
        InputError: if the folder cannot be written.
    """

    def fill(folder: Path) -> None:
        write(folder)
        for name in _COPIED:
            if (source / name).exists():
                shutil.copyfile(source / name, folder / name)
        text = json_text(config, indent=2)
        (folder / "config.json").write_text(f"{text}\n", encoding="utf-8")

    atomic_folder(goal, fill, goal.rmdir if goal.is_dir() else None)
