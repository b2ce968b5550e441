"""Checkpoints of a run: folders OUTPUT/step-00000400/, always complete, with the links `best` and `last`.

A checkpoint is a Hugging Face model folder, or a PEFT adapter folder, with four more files. Three are for
resuming: `optimizer.safetensors`, `rng.safetensors` (random states) and `training_state.json`.
`manifest.json` lists sizes and hashes; before each load, the files are compared with this list.

With several processes, `rng-rank-00001.safetensors` and so on hold the random states of the other processes.
With FSDP, the optimiser's state is in `shard-00001-*.safetensors`, one file per process. No file is a pickle.
Each stage of a save calls `files.step_hook`; tests use this hook to kill the process at that stage.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minigpt.console.command_line import obey_swallowed
from minigpt.errors import InputError
from minigpt.storage.files import atomic_folder, reached, sync_folder, verify_manifest
from minigpt.storage.json_files import json_text, read_json
from minigpt.storage.regular_files import resolved
from minigpt.storage.safetensors_files import TensorFile, safetensors_parts

__all__ = [
    "Contents",
    "Snapshot",
    "clear_leftovers",
    "list_checkpoints",
    "prune",
    "read",
    "read_newest",
    "save",
    "set_link",
    "verifies",
]

_NAME = re.compile(r"step-\d{8}")
_LEFTOVER = re.compile(r"\.(step-\d{8}|best|last|metrics\.jsonl|run\.json)\.tmp-\d+")
_OPTIMIZER = "optimizer.safetensors"
_SET_ASIDE = re.compile(r"\.(step-\d{8})\.old-\d+")


@dataclass(frozen=True)
class Contents:
    """Everything that one checkpoint contains. The tensors must not change before they are written."""

    step: int
    write_model: Callable[[Path], None]  # function that writes the model's files into a folder
    optimizer: dict[str, torch.Tensor]
    rng: dict[str, torch.Tensor]
    state: dict[str, Any]
    # random states of processes 1, 2, ..., each as the bytes of a safetensors file
    other_rngs: Sequence[bytes] = ()
    # With FSDP: a function that writes the optimiser's state into a folder. `optimizer` is then not written.
    shards: Callable[[Path], None] | None = None


@dataclass
class Snapshot:
    """What a resume reads from a checkpoint before it loads the weights from `folder`."""

    folder: Path
    optimizer: dict[str, torch.Tensor] | None  # None: the optimiser's state is in shard files (FSDP)
    rng: dict[str, torch.Tensor]  # empty if the saved run had no process with this process's rank
    state: dict[str, Any]


def list_checkpoints(output: Path) -> list[Path]:
    """List the checkpoint folders of a run, newest first. Other names (step-100.backup) are ignored."""
    if not output.is_dir():
        return []
    found = [
        path
        for path in output.iterdir()
        if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]
    return sorted(found, reverse=True)


def save(output: Path, contents: Contents) -> Path:
    """Write a checkpoint atomically and return its folder.

    If there is already a checkpoint of this step, the new checkpoint replaces it. (This happens if
    the old checkpoint is damaged, or was saved before the evaluation of this step.) The old checkpoint stays
    until the new one is complete on the disk.

    Raises:
        InputError: if the checkpoint cannot be written. Earlier checkpoints do not change.
    """
    folder = output / f"step-{contents.step:08d}"
    aside = output / f".{folder.name}.old-{os.getpid()}"

    def fill(temporary: Path) -> None:
        contents.write_model(temporary)
        if contents.shards is None:
            _write(temporary / _OPTIMIZER, safetensors_parts(contents.optimizer))
        else:
            contents.shards(temporary)
        _write(temporary / _rng(0), safetensors_parts(contents.rng))
        for rank, content in enumerate(contents.other_rngs, 1):
            _write(temporary / _rng(rank), [content])
        text = json_text(contents.state, indent=2, allow_nan=False)
        _write(temporary / "training_state.json", [text.encode()])

    def set_aside() -> None:
        if folder.is_dir() and not folder.is_symlink():
            if aside.exists():
                shutil.rmtree(aside)
            folder.rename(aside)
            reached("old one: set aside")

    try:
        atomic_folder(folder, fill, set_aside)
    except BaseException:
        if aside.exists() and not folder.exists():
            aside.rename(folder)
        raise
    if aside.exists():
        # The save is done. If the old folder cannot be deleted now, the next start of the run deletes it.
        with contextlib.suppress(OSError):
            shutil.rmtree(aside)
            reached("old one: deleted")
    return folder


def _rng(rank: int) -> str:
    return f"rng-rank-{rank:05d}.safetensors" if rank else "rng.safetensors"


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file into the temporary folder. It is flushed to the disk later, together with the manifest."""
    reached(f"{path.name}: begun")
    with path.open("wb") as file:
        file.writelines(parts)
    reached(f"{path.name}: written")


def set_link(output: Path, name: str, folder: Path) -> None:
    """Make the symbolic link `output/name` point at a checkpoint, atomically.

    Raises:
        InputError: if another file or folder has that name, or the file system has no symbolic links.
    """
    temporary = output / f".{name}.tmp-{os.getpid()}"
    try:
        reached(f"{name}: begun")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(folder.name)
        reached(f"{name}: made")
        temporary.replace(output / name)
        reached(f"{name}: renamed")
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(
            f"{folder} is whole, but {output / name} cannot be made a link to it: {error.strerror or error}; "
            "remove what has that name, or use a file system with symbolic links (Windows: developer mode)"
        ) from None


def clear_leftovers(output: Path) -> None:
    """Clean up after a killed process: delete its unfinished files.

    If the process died while it replaced a checkpoint, before the new one was in place, the old checkpoint
    gets its name back. The caller must hold the folder's lock. Otherwise, unfinished files of a running
    process could be deleted, too.
    """
    for path in output.glob(".step-*"):
        match = _SET_ASIDE.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink():
            if (output / match[1]).exists():
                shutil.rmtree(path)
            else:  # the process died after it had renamed the old checkpoint, before the new one got its name
                path.rename(output / match[1])
    for path in output.glob(".*.tmp-*"):
        if _LEFTOVER.fullmatch(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def prune(output: Path, keep: int, keep_every: int = 0) -> None:
    """Delete old checkpoints. Keep the newest `keep`, and the targets of the links `best` and `last`.

    With `keep_every`, the checkpoints at multiples of `keep_every` steps stay, too.

    At least one undamaged checkpoint stays. To ensure this, the checkpoints to keep are compared with their
    manifests until an undamaged one is found. If all checkpoints to keep are damaged, the newest undamaged
    one of the other checkpoints stays, too.

    Raises:
        InputError: if a folder cannot be removed.
    """
    linked = {resolved(output / name) for name in ("best", "last") if (output / name).is_symlink()}
    folders = list_checkpoints(output)
    kept = [f for f in folders if keep_every and int(f.name.removeprefix("step-")) % keep_every == 0]
    staying = [f for n, f in enumerate(folders) if n < keep or resolved(f) in linked or f in kept]
    going = [folder for folder in folders if folder not in staying]
    if not going:
        return
    if not any(map(verifies, staying)):
        going = going[next((n for n, folder in enumerate(going) if verifies(folder)), len(going) - 1) + 1 :]
    reached("pruning: begun")
    try:
        sync_folder(output)  # the new links must be on the disk before their old targets are deleted
        for folder in going:
            doomed = output / f".{folder.name}.tmp-{os.getpid()}"
            # Rename the folder first. If the process dies while it deletes, the remaining files do not look
            # like a checkpoint.
            folder.rename(doomed)
            reached("pruning: renamed")
            shutil.rmtree(doomed)
            reached("pruning: deleted")
    except OSError as error:
        raise InputError(
            f"{output}: an old checkpoint cannot be removed: {error.strerror or error}"
        ) from None


def verifies(folder: Path) -> bool:
    """Return True if all files of a checkpoint agree with its manifest. Reads all files."""
    try:
        verify_manifest(folder)
    except (InputError, OSError):
        return False
    return True


def read(folder: Path, rank: int = 0) -> Snapshot:
    """Read a checkpoint for process number `rank`. The caller must have called `verify_manifest`.

    Raises:
        InputError, OSError, ValueError: if a file is missing or cannot be read.
    """
    state = read_json(folder / "training_state.json")
    path = folder / _rng(rank)
    rng = dict(TensorFile(path)) if rank == 0 or path.exists() else {}
    is_whole = (folder / _OPTIMIZER).exists() or not any(folder.glob("shard-*.safetensors"))
    optimizer = dict(TensorFile(folder / _OPTIMIZER)) if is_whole else None
    return Snapshot(folder, optimizer, rng, state)


def read_newest(
    output: Path, acceptable: Callable[[dict[str, Any]], bool] = lambda state: True
) -> tuple[Snapshot, list[str]]:
    """Read the newest undamaged checkpoint. Also return a sentence about each newer, damaged checkpoint.

    Args:
        output: folder of the run.
        acceptable: a function of the content of training_state.json. If it returns False, the checkpoint is
            skipped.

    Raises:
        InputError: if no checkpoint is undamaged and acceptable.
    """
    passed_over = []
    for folder in list_checkpoints(output):
        try:
            verify_manifest(folder)
            snapshot = read(folder)
        except (InputError, OSError, ValueError) as error:
            obey_swallowed()
            passed_over.append(f"{folder.name} passed over: {error}")
            continue
        if acceptable(snapshot.state):
            return snapshot, passed_over
    reasons = "; ".join(passed_over) or "no checkpoint was written yet; start without --resume"
    raise InputError(f"nothing to resume in {output}: {reasons}")
