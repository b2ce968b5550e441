"""Checkpoint folders are replaced as a whole; the last good one is never deleted, even if the disk fails."""

import errno
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minigpt.errors import InputError
from minigpt.storage import files
from minigpt.storage.files import atomic_folder, atomic_write
from minigpt.training import checkpoint
from minigpt.training.metrics import Metrics
from minigpt.training.model_files import copied
from tests.runs import config, identical, stop_at, trainer, write_data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder with a tiny data set."""
    write_data(tmp_path)
    return tmp_path


def folder_of(output: Path, step: int) -> Path:
    """Make a small folder that looks like a checkpoint, with a correct manifest."""
    goal = output / f"step-{step:08d}"
    atomic_folder(goal, lambda new: atomic_write(new / "weights", b"weights"))
    return goal


def names(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir())


# -- links and pruning --------------------------------------------------------------------------------------


def test_a_link_that_cannot_be_made_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = tmp_path / "step-00000001"
    step.mkdir()
    (tmp_path / "last").mkdir()  # as a copy that follows links makes it
    with pytest.raises(InputError, match=r"last cannot be made a link to it: .*irectory; remove what"):
        checkpoint.set_link(tmp_path, "last", step)

    def refuse(path: Path, target: str) -> None:
        raise OSError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(InputError, match=r"best cannot be made a link to it: Operation not permitted"):
        checkpoint.set_link(tmp_path, "best", step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-00000001"]


def test_pruning_keeps_newest_best_and_strangers(tmp_path: Path) -> None:
    for step in range(1, 7):
        folder_of(tmp_path, step)
    for stranger in ("step-1", "step-00000001.backup", "step-000000001", "notes"):
        (tmp_path / stranger).mkdir()
    checkpoint.set_link(tmp_path, "best", tmp_path / "step-00000002")
    checkpoint.set_link(tmp_path, "last", tmp_path / "step-00000006")
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best", "last", "notes", "step-000000001", "step-00000001.backup", "step-00000002",
        "step-00000005", "step-00000006", "step-1",
    ]  # fmt: skip


def test_the_last_whole_checkpoint_is_never_pruned(tmp_path: Path) -> None:
    for step in range(1, 7):
        folder_of(tmp_path, step)
    for step in (3, 5, 6):
        (tmp_path / f"step-{step:08d}" / "weights").write_bytes(b"weighty")  # as long as before
    checkpoint.prune(tmp_path, keep=2)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (4, 5, 6)]
    shutil.rmtree(tmp_path / "step-00000004")
    folder_of(tmp_path, 1)
    (tmp_path / "step-00000001" / "weights").write_bytes(b"weighty")
    checkpoint.prune(tmp_path, keep=1)  # none of them is whole: who knows what can be saved of them
    assert names(tmp_path) == [f"step-{step:08d}" for step in (1, 5, 6)]


def test_links_and_files_with_a_checkpoint_s_name_are_left_alone(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    precious = folder_of(elsewhere, 1)
    output = tmp_path / "run"
    for step in (5, 6):
        folder_of(output, step)
    (output / "step-00000001").symlink_to(precious)
    (output / "step-00000002").write_text("mine", encoding="utf-8")
    before = names(output)
    assert [path.name for path in checkpoint.list_checkpoints(output)] == ["step-00000006", "step-00000005"]
    checkpoint.prune(output, keep=2)
    checkpoint.clear_leftovers(output)
    assert names(output) == before
    assert names(precious) == ["manifest.json", "weights"]


# -- saving a step again ------------------------------------------------------------------------------------


def test_what_was_set_aside_comes_back_unless_it_was_replaced(tmp_path: Path) -> None:
    first, second = folder_of(tmp_path, 1), folder_of(tmp_path, 2)
    first.rename(tmp_path / ".step-00000001.old-7")  # killed between the two renames
    shutil.copytree(second, tmp_path / ".step-00000002.old-7")  # killed right after them
    (tmp_path / ".step-00000003.old-x").mkdir()
    checkpoint.clear_leftovers(tmp_path)
    assert names(tmp_path) == [".step-00000003.old-x", "step-00000001", "step-00000002"]
    assert checkpoint.verifies(first)


@pytest.mark.parametrize("point", ["folder: filled", "old one: set aside"])
def test_a_failure_while_replacing_keeps_the_old_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    run = trainer(config(folder, on_save_error="stop"))
    stop_at(run, 6)  # saved by the evaluation
    before = (folder / "run" / "step-00000006" / "model.safetensors").read_bytes()
    again = trainer(config(folder, on_save_error="stop"))
    again.resume()
    again.progress.evaluated = False  # as after a signal in the evaluation: the step is saved once more

    def fail(name: str) -> None:
        if name == point:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files, "step_hook", fail)
    with pytest.raises(InputError, match=r"cannot write .*step-00000006: Input/output error \(.* bytes free"):
        again.run()
    assert (folder / "run" / "step-00000006" / "model.safetensors").read_bytes() == before
    assert checkpoint.verifies(folder / "run" / "step-00000006")
    assert not [name for name in names(folder / "run") if "old" in name or "tmp" in name]


def test_the_rename_comes_after_every_flush_and_the_deleting_last(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points: list[str] = []
    monkeypatch.setattr(files, "step_hook", points.append)
    trainer(config(folder, save_total_limit=1, max_steps=6, eval_steps=2)).run()
    save = points[len(points) - points[::-1].index("folder: begun") - 1 :]
    order = ["folder: filled", "manifest: flushed", "folder: flushed", "folder: renamed"]
    order += ["folder: parent flushed", "last: renamed", "pruning: begun", "pruning: deleted"]
    assert [save.index(point) for point in order] == sorted(save.index(point) for point in order)
    assert all(save.index(p) < save.index("folder: renamed") for p in save if p.endswith(": hashed"))
    assert len(set(points)) >= 20


# -- a disk that fails --------------------------------------------------------------------------------------


def test_a_failed_save_leaves_the_earlier_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(config(folder))
    write, count = checkpoint._write, 0

    def full_disk(path: Path, parts: Any) -> None:
        nonlocal count
        count += path.name == "rng.safetensors"
        if count > 1:  # the first checkpoint went well
            raise OSError(28, "No space left on device", str(path))
        write(path, parts)

    monkeypatch.setattr(checkpoint, "_write", full_disk)
    with pytest.raises(InputError, match=r"step-00000012.*No space left on device.*bytes free"):
        run.run()
    left = [path.name for path in (folder / "run").iterdir()]
    assert "step-00000006" in left
    assert not [name for name in left if "tmp" in name or name == "step-00000012"]
    monkeypatch.undo()
    assert trainer(config(folder)).resume().name == "step-00000006"


@pytest.mark.parametrize("in_background", [False, True])
def test_a_failed_save_is_tried_again_at_the_next(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    in_background: bool,
) -> None:
    trainer(config(folder, "straight", eval_steps=3)).run()
    write, count = checkpoint._write, 0

    def full_disk(path: Path, parts: Any) -> None:
        nonlocal count
        count += path.name == "rng.safetensors"
        if count == 2 and path.name == "rng.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, parts)

    monkeypatch.setattr(checkpoint, "_write", full_disk)
    run = trainer(config(folder, eval_steps=3, save_async=in_background, save_total_limit=9))
    run.run()
    assert "step-00000006: No space left on device" in capsys.readouterr().err
    found = [path.name for path in checkpoint.list_checkpoints(folder / "run")]
    assert found == ["step-00000012", "step-00000009", "step-00000003"]
    assert (folder / "run" / "best").resolve().exists()
    identical(folder / "run", folder / "straight")


def test_a_lost_best_checkpoint_is_not_the_best(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(config(folder, eval_steps=3))
    seen = []

    def failing(name: str) -> None:
        if name == "folder: filled" and run.progress.steps_done == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if name == "folder: filled":
            seen.append((run.progress.steps_done, run.progress.best_step))

    monkeypatch.setattr(files, "step_hook", failing)
    evaluate = run.evaluate
    monkeypatch.setattr(run, "evaluate", lambda: check(evaluate()))

    def check(found: Any) -> Any:
        if run.progress.steps_done == 6:
            assert run.progress.best_step == 0  # step 3 was, but is not on the disk
        return found

    run.run()
    assert seen[0] == (6, 6)


def test_background_saves_end_on_the_same_files(folder: Path) -> None:
    for name, in_background in (("straight", False), ("run", True)):
        trainer(config(folder, name, dropout=0.1, optimizer="muon", save_async=in_background)).run()
    identical(folder / "run", folder / "straight")
    for step in ("step-00000006", "step-00000012"):
        for file in ("model", "optimizer", "rng"):
            left, right = (folder / name / step / f"{file}.safetensors" for name in ("run", "straight"))
            assert left.read_bytes() == right.read_bytes()


def test_the_copy_for_the_background_is_no_view(folder: Path) -> None:
    run = trainer(config(folder))
    copy = copied(run.model)
    before = {name: p.detach().clone() for name, p in copy.named_parameters()}
    run.step()
    for name, parameter in copy.named_parameters():
        assert torch.equal(parameter, before[name])
    assert any(not torch.equal(p, before[name]) for name, p in run.model.named_parameters())


def test_metrics_survive_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, room = os.write, 10_000

    def full(descriptor: int, content: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real(descriptor, content[:room])
        room -= written
        return written

    with Metrics(tmp_path, 0) as metrics:
        metrics.write(1, train_loss=1.5)
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            room = 7  # less than a line
            metrics.write(2, train_loss=float("nan"))
            metrics.write(3, train_loss=0.5)
            with pytest.raises(InputError, match=r"metrics\.jsonl: No space left on device"):
                metrics.flush()
        metrics.flush()
        metrics.write(4, event="spike", lines=[1, 2])
    assert capsys.readouterr().err.count("No space left on device") == 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1, "train_loss": 1.5},
        {"step": 2, "train_loss": None},
        {"step": 3, "train_loss": 0.5},
        {"step": 4, "event": "spike", "lines": [1, 2]},
    ]


def test_a_checkpoint_holds_every_generator_and_nothing_that_is_not_finite(folder: Path) -> None:
    trainer(config(folder)).run()
    last = folder / "run" / "last"
    assert {"torch", "python", "numpy"} <= load_file(last / "rng.safetensors").keys()
    for name in ("model", "optimizer"):
        assert all(t.isfinite().all() for t in load_file(last / f"{name}.safetensors").values())


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_every_file_of_a_checkpoint_follows_the_umask(folder: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        trainer(config(folder, max_steps=2, eval_steps=2)).run()
    finally:
        os.umask(before)
    run = folder / "run"
    assert stat.S_IMODE((run / "last").resolve().stat().st_mode) == 0o777 & ~umask
    written = [*(run / "last").iterdir(), run / "run.json", run / "metrics.jsonl"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o666 & ~umask}
