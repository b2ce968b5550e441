"""Checkpoints of a run: OUTPUT/step-00000400/, whole or not there, with links `best` and `last`.

Each is a Hugging Face model folder; beside the model lie `optimizer.safetensors`, `rng.safetensors` and
`training_state.json`, which a resume needs, and `manifest.json`, against which the folder is verified first.
No pickle anywhere.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from minigpt.command_line import InputError
from minigpt.families import LanguageModel
from minigpt.files import atomic_folder, verify_manifest
from minigpt.pretrained import AnyTokenizer, save_pretrained

__all__ = ["Snapshot", "clear_leftovers", "list_checkpoints", "prune", "read_newest", "save", "set_link"]

_NAME = re.compile(r"step-\d{8}")
_LEFTOVER = re.compile(r"\.(step-\d{8}|best|last|metrics\.jsonl|run\.json)\.tmp-\d+")


@dataclass
class Snapshot:
    """What a resume needs besides the weights, which lie in the folder's model.safetensors."""

    folder: Path
    optimizer: dict[str, torch.Tensor]
    rng: dict[str, torch.Tensor]
    state: dict[str, Any]


def list_checkpoints(output: Path) -> list[Path]:
    """The run's checkpoint folders, newest first. Names must match in full: step-100.backup is nobody's."""
    if not output.is_dir():
        return []
    found = [
        path
        for path in output.iterdir()
        if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]
    return sorted(found, reverse=True)


def save(
    output: Path,
    step: int,
    model: LanguageModel,
    tokenizer: AnyTokenizer,
    optimizer: dict[str, torch.Tensor],
    rng: dict[str, torch.Tensor],
    state: dict[str, Any],
) -> Path:
    """Write checkpoint `step` atomically and return its folder.

    Raises:
        InputError: if it cannot be written; earlier checkpoints are untouched.
    """
    folder = output / f"step-{step:08d}"

    def fill(temporary: Path) -> None:
        save_pretrained(model, tokenizer, temporary)
        # through bytes: safetensors' own save_file makes files that only their owner may read
        (temporary / "optimizer.safetensors").write_bytes(safetensors.torch.save(optimizer))
        (temporary / "rng.safetensors").write_bytes(safetensors.torch.save(rng))
        text = json.dumps(state, ensure_ascii=False, indent=2, allow_nan=False)
        (temporary / "training_state.json").write_text(text, encoding="utf-8")

    if folder.exists():  # written before, found damaged, and reached again
        shutil.rmtree(folder)
    atomic_folder(folder, fill)
    return folder


def set_link(output: Path, name: str, folder: Path) -> None:
    """Point `output/name` at a checkpoint, atomically.

    Raises:
        InputError: if something else has that name, or links cannot be made there.
    """
    temporary = output / f".{name}.tmp-{os.getpid()}"
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(folder.name)
        temporary.replace(output / name)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(
            f"{folder} is whole, but {output / name} cannot be made a link to it: {error.strerror or error}; "
            "remove what has that name, or use a file system with symbolic links (Windows: developer mode)"
        ) from None


def clear_leftovers(output: Path) -> None:
    """Remove what a killed process was still writing under a temporary name."""
    for path in output.glob(".*.tmp-*"):
        if _LEFTOVER.fullmatch(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def prune(output: Path, keep: int) -> None:
    """Delete old checkpoints, but neither the newest `keep` nor what `best` and `last` point at."""
    linked = {(output / name).resolve() for name in ("best", "last") if (output / name).is_symlink()}
    for folder in list_checkpoints(output)[keep:]:
        if folder.resolve() not in linked:
            shutil.rmtree(folder)  # half deleted, it does not verify: the manifest names every file


def read_newest(output: Path) -> tuple[Snapshot, list[str]]:
    """The newest checkpoint that verifies, and one sentence for each newer one that does not.

    Raises:
        InputError: if there is none.
    """
    passed_over = []
    for folder in list_checkpoints(output):
        try:
            verify_manifest(folder)
            state = json.loads((folder / "training_state.json").read_text(encoding="utf-8"))
            optimizer = safetensors.torch.load_file(folder / "optimizer.safetensors")
            rng = safetensors.torch.load_file(folder / "rng.safetensors")
        except (InputError, OSError, ValueError) as error:
            passed_over.append(f"{folder.name} passed over: {error}")
            continue
        return Snapshot(folder, optimizer, rng, state), passed_over
    reasons = "; ".join(passed_over) or "no checkpoint was written yet; start without --resume"
    raise InputError(f"nothing to resume in {output}: {reasons}")
