"""Parts damage and disk: files that changed, disks that fail."""

import errno
import math
import os
import resource
import shutil
from pathlib import Path

from minigpt.training import checkpoint
from tests.survival.bench import Bench
from tests.survival.children import at_point
from tests.survival.runs import flip, newest_step


def damage(bench: Bench) -> None:
    """Flipped bits and cut, missing, additional or renamed files are noticed; an older checkpoint is used."""
    output = bench.runs.folder / "damaged"
    assert bench.reference.end
    shutil.copytree(bench.runs.folder / "reference", output, symlinks=True)
    newest, older = checkpoint.list_checkpoints(output)[:2]
    whole = {path: path.read_bytes() for path in sorted(newest.iterdir())}

    def noticed() -> bool:
        snapshot, passed_over = checkpoint.read_newest(output)
        return snapshot.folder == older and passed_over[0].startswith(f"{newest.name} passed over: ")

    held, sizes = 0, [len(content) for content in whole.values()]
    # `older` does not change here. To read it a thousand times would take most of the time.
    read, known = checkpoint.read, checkpoint.read(older)

    def remembered(folder: Path, rank: int = 0) -> checkpoint.Snapshot:
        return known if folder == older else read(folder, rank)

    checkpoint.read = remembered
    for _ in range(bench.options.flips):
        (path,) = bench.random.choices(list(whole), weights=[math.sqrt(size) for size in sizes])
        flip(path, bench.random.randrange(8 * len(whole[path])))
        held += noticed()
        path.write_bytes(whole[path])
    checkpoint.read = read
    bench.table.add("damage", "one flipped bit in any file: noticed", bench.options.flips, held)

    trials = held = 0
    for path, content in whole.items():
        for wrong in (content[:-1], content[: len(content) // 2], b"", content + b"\0", None):
            path.unlink() if wrong is None else path.write_bytes(wrong)
            trials, held = trials + 1, held + noticed()
            path.write_bytes(content)
        path.rename(newest / f"{path.name}.bak")
        trials, held = trials + 1, held + noticed()
        (newest / f"{path.name}.bak").rename(path)
    (newest / "more").touch()
    trials, held = trials + 1, held + noticed()
    (newest / "more").unlink()
    bench.table.add("damage", "cut, missing, additional, renamed files: noticed", trials, held)

    for stranger in ("step-100.backup", "step-00000100.backup", "step-00000100-old", ".step-1.tmp-x"):
        shutil.copytree(older, output / stranger)
    (output / "step-99999999").symlink_to(newest.name)
    (output / "step-00000001").write_text("a file", encoding="utf-8")
    before = sorted(path.name for path in output.iterdir())
    first = checkpoint.read_newest(output)[0].folder == newest
    checkpoint.clear_leftovers(output)
    checkpoint.prune(output, 2)
    after = sorted(path.name for path in output.iterdir())
    bench.table.add(
        "damage", "strangers' names and links: not used, not deleted", 1, int(first and after == before)
    )

    flip(newest / "config.json", 3)
    for name in ("best", "last"):
        checkpoint.set_link(output, name, newest)
    checkpoint.prune(output, 1)
    bench.table.add("damage", "the last whole checkpoint is never deleted", 1, int(newest_step(output) >= 0))


def disk(bench: Bench) -> None:
    """Every write of a save fails once. The earlier checkpoint stays whole, and the run can continue."""
    codes = (errno.ENOSPC, errno.EIO, errno.EROFS)

    def failing(output: Path, trial: tuple[str, int]) -> bool:
        point, number = trial

        def fail() -> None:
            raise OSError(number, os.strerror(number))

        if point.startswith("old one"):
            bench.damage_newest(output)
        before = newest_step(output)
        code = bench.runs.run(output.name, at_point(point, fail), on_save_error="stop")
        return code in (0, 2) and newest_step(output) >= before

    after = () if bench.options.full else (": renamed", ": flushed", "parent flushed", ": deleted")
    points = (
        [point for point in bench.reference.points if not point.endswith(after)]
        if after
        else bench.reference.points
    )
    trials = [(point, codes[n % len(codes)]) for n, point in enumerate(points)]
    held = bench.chain("failing", trials, failing, on_save_error="stop")
    bench.table.add(
        "disk", "a failure at each point of writing: the old checkpoint is whole", len(trials), held
    )

    def too_large(output: Path, size: int) -> bool:
        before = newest_step(output)
        code = bench.runs.run(
            output.name,
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
            on_save_error="stop",
        )
        return code in (0, 2) and newest_step(output) >= before

    size = (bench.runs.folder / "reference" / "last" / "optimizer.safetensors").stat().st_size
    sizes = [1000, 3000, size // 2, size - 1] if size > 4000 else [size // 2]
    held = bench.chain("limited", sizes, too_large, on_save_error="stop")
    bench.table.add("disk", "the kernel refuses bytes in the middle of a file", len(sizes), held)

    def once(output: Path, point: str) -> bool:
        def fail() -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return bench.runs.run(output.name, at_point(point, fail)) == 0

    some = [
        point for point in bench.reference.points if point.startswith(("folder", "manifest", "optimizer"))
    ]
    some = [point for point in some if bench.options.full or point.endswith(("filled", "renamed", "begun"))]
    held = bench.chain("going on", some, once)
    bench.table.add("disk", "--on_save_error continue: the run ends as if nothing had been", len(some), held)
