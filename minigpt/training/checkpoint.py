"""Checkpoints of a run: OUTPUT/step-00000400/, complete or not there, with links `best` and `last`.

Each is a Hugging Face model folder, or a PEFT adapter's; beside the weights lie `optimizer.safetensors`,
`rng.safetensors` and `training_state.json`, which a resume needs, and `manifest.json`, against which the
folder is verified first.
Where several processes train, `rng-rank-00001.safetensors` and so on are the others'. Where each has a shard
of the model, the optimiser's state lies in `shard-00001-*.safetensors`, a file a process.
No pickle anywhere. Each step of the writing is announced to `files.step_hook`, so that tests can kill there.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from minigpt.console.command_line import obey_swallowed
from minigpt.errors import InputError
from minigpt.storage.files import atomic_folder, reached, sync_folder, verify_manifest
from minigpt.storage.json_files import read_json
from minigpt.storage.safetensors_files import safetensors_parts

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
    """The contents of one checkpoint. The tensors must not change until it is written."""

    step: int
    write_model: Callable[[Path], None]
    optimizer: dict[str, torch.Tensor]
    rng: dict[str, torch.Tensor]
    state: dict[str, Any]
    other_rngs: Sequence[bytes] = ()  # of the processes from number 1 on, as safetensors
    shards: Callable[[Path], None] | None = None  # writes the optimiser's state instead of `optimizer`


@dataclass
class Snapshot:
    """What a resume needs besides the weights, which lie in the same folder."""

    folder: Path
    optimizer: dict[str, torch.Tensor] | None  # None: it lies in shards
    rng: dict[str, torch.Tensor]  # empty: there was no such process
    state: dict[str, Any]


def list_checkpoints(output: Path) -> list[Path]:
    """The run's checkpoint folders, newest first. Names must match in full: step-100.backup is none."""
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

    A checkpoint of the same step (one that was found damaged, or saved before its evaluation) gives way only
    when the new one is whole and on the disk.

    Raises:
        InputError: if it cannot be written; earlier checkpoints are untouched.
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
        text = json.dumps(contents.state, ensure_ascii=False, indent=2, allow_nan=False)
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
        with contextlib.suppress(OSError):  # the new one is in its place; the next start clears this away
            shutil.rmtree(aside)
            reached("old one: deleted")
    return folder


def _rng(rank: int) -> str:
    return f"rng-rank-{rank:05d}.safetensors" if rank else "rng.safetensors"


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """A file inside the temporary folder, which is flushed with its manifest."""
    reached(f"{path.name}: begun")
    with path.open("wb") as file:
        file.writelines(parts)
    reached(f"{path.name}: written")


def set_link(output: Path, name: str, folder: Path) -> None:
    """Point `output/name` at a checkpoint, atomically.

    Raises:
        InputError: if something else has that name, or links cannot be made there.
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
    """Remove what a killed process was still writing, and put back what it had set aside.

    The caller must hold the folder's lock: another run's work in progress looks the same.
    """
    for path in output.glob(".step-*"):
        match = _SET_ASIDE.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink():
            if (output / match[1]).exists():
                shutil.rmtree(path)
            else:  # killed between the two renames
                path.rename(output / match[1])
    for path in output.glob(".*.tmp-*"):
        if _LEFTOVER.fullmatch(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def prune(output: Path, keep: int) -> None:
    """Delete old checkpoints, but neither the newest `keep` nor what `best` and `last` point at.

    At least one good checkpoint stays. Before anything is deleted, one of the checkpoints that stay is read
    and compared with its manifest. If all of them are damaged, the newest older one that is good stays, too.

    Raises:
        InputError: if a folder cannot be removed.
    """
    linked = {(output / name).resolve() for name in ("best", "last") if (output / name).is_symlink()}
    folders = list_checkpoints(output)
    staying = [f for number, f in enumerate(folders) if number < keep or f.resolve() in linked]
    going = [folder for folder in folders if folder not in staying]
    if not going:
        return
    if not any(map(verifies, staying)):
        going = going[next((n for n, folder in enumerate(going) if verifies(folder)), len(going) - 1) + 1 :]
    reached("pruning: begun")
    try:
        sync_folder(output)  # the links, before what they pointed at goes
        for folder in going:
            doomed = output / f".{folder.name}.tmp-{os.getpid()}"
            folder.rename(doomed)  # half deleted, it must not look like a checkpoint
            reached("pruning: renamed")
            shutil.rmtree(doomed)
            reached("pruning: deleted")
    except OSError as error:
        raise InputError(
            f"{output}: an old checkpoint cannot be removed: {error.strerror or error}"
        ) from None


def verifies(folder: Path) -> bool:
    """Whether a checkpoint is what its manifest says; reads all of it."""
    try:
        verify_manifest(folder)
    except (InputError, OSError):
        return False
    return True


def read(folder: Path, rank: int = 0) -> Snapshot:
    """A checkpoint that was verified, for the process number `rank`.

    Raises:
        OSError, ValueError, safetensors.SafetensorError: if it is none.
    """
    state = read_json(folder / "training_state.json")
    path = folder / _rng(rank)
    rng = safetensors.torch.load_file(path) if rank == 0 or path.exists() else {}
    is_whole = (folder / _OPTIMIZER).exists() or not any(folder.glob("shard-*.safetensors"))
    optimizer = safetensors.torch.load_file(folder / _OPTIMIZER) if is_whole else None
    return Snapshot(folder, optimizer, rng, state)


def read_newest(
    output: Path, acceptable: Callable[[dict[str, Any]], bool] = lambda state: True
) -> tuple[Snapshot, list[str]]:
    """The newest checkpoint that verifies, and one sentence for each newer one that does not.

    Args:
        output: the run's folder.
        acceptable: of a checkpoint's training state, whether it will do.

    Raises:
        InputError: if there is none.
    """
    passed_over = []
    for folder in list_checkpoints(output):
        try:
            verify_manifest(folder)
            snapshot = read(folder)
        except (InputError, OSError, ValueError, safetensors.SafetensorError) as error:
            obey_swallowed()
            passed_over.append(f"{folder.name} passed over: {error}")
            continue
        if acceptable(snapshot.state):
            return snapshot, passed_over
    reasons = "; ".join(passed_over) or "no checkpoint was written yet; start without --resume"
    raise InputError(f"nothing to resume in {output}: {reasons}")
