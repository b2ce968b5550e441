"""Parts processes and sharded: a process of several dies; DDP and FSDP2 compute what one process does."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from tests.survival.bench import Bench
from tests.survival.children import finished, start_several, stopped
from tests.survival.runs import digest

IN_A_RUN = 5  # number of kills before a run may finish


def processes(bench: Bench) -> None:
    """One of 2 processes (--full: also of 4) is killed again and again; all of them are started again."""
    for size in (2, 4) if bench.options.full else (2,):
        more: dict[str, Any] = {"max_steps": bench.options.short_steps}
        more["gradient_accumulation_steps"] = 3  # 2 does not divide it, so rows are split
        whole, began = bench.runs.folder / f"{size}-whole", time.monotonic()
        codes = several(bench, whole, size, **more)
        assert codes == [0] * size, bench.runs.said()
        longest, end = time.monotonic() - began, digest(whole)
        kills = held = runs = starts = 0
        while kills < bench.options.lost:
            output = bench.runs.folder / f"{size}-killed-{runs}"
            instants = [
                bench.random.uniform(0.1, longest) for _ in range(min(IN_A_RUN, bench.options.lost - kills))
            ]
            killed, started = disturbed(bench, output, size, instants, **more)
            runs, starts, kills = runs + 1, starts + started, kills + killed
            done = bench.is_done(output, bench.options.short_steps)
            held += killed if done and digest(output) == end else 0
            shutil.rmtree(output)
        what = f"{size} processes, one killed at random: complete, the same bits"
        bench.table.add("processes", what, kills, held, runs=runs, starts=starts)


def disturbed(bench: Bench, output: Path, size: int, instants: list[float], **more: Any) -> tuple[int, int]:
    """Do a run of several processes. At each instant, one of them is killed if it is still running.

    Returns: the number of kills, and the number of starts.
    """
    first = bench.runs.argv(output.name, **more)  # a launcher has the same flags each time
    kills = starts = 0
    # Allowed starts: one per kill, one that finishes, and as many again for instants that came too late.
    while not bench.is_done(output, more["max_steps"]) and starts < 2 * len(instants) + 1:
        children = start_several(first, [bench.runs.log] * size, restart=starts)
        starts += 1
        if kills < len(instants):
            victim = bench.random.randrange(size)
            time.sleep(instants[kills])
            if os.waitpid(children[victim], os.WNOHANG) == (0, 0):
                os.kill(children[victim], signal.SIGKILL)
                kills += 1
            else:
                children.pop(victim)
        stopped(children)
    return kills, starts


def several(bench: Bench, output: Path, size: int, **more: Any) -> list[int]:
    """Do a run of several processes. Return their exit codes."""
    children = start_several(bench.runs.argv(output.name, **more), [bench.runs.log] * size)
    return [finished(child) for child in children]


def sharded(bench: Bench) -> None:
    """Check that FSDP2 and DDP on 2 processes compute the same losses as one process."""
    more: dict[str, Any] = {
        "gradient_accumulation_steps": 2,
        "dropout": 0.0,
        "max_steps": 20,
        "eval_steps": 20,  # only the losses of training are compared
        "optimizer": "adamw",
        # sums in another order differ in the last bit; rounded to bfloat16, a few of them by 2^-8
        "precision": "float32",
    }
    found = []
    for name, size, kind in (("one", 1, "ddp"), ("ddp", 2, "ddp"), ("fsdp", 2, "fsdp")):
        output = bench.runs.folder / f"losses-{name}"
        codes = several(bench, output, size, parallel=kind, **more)
        assert codes == [0] * size, bench.runs.said()
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found.append([v["train_loss"] for v in map(json.loads, lines) if "train_loss" in v])
    for name, losses in zip(("DDP", "FSDP2"), found[1:]):
        worst = [abs(a - b) for a, b in zip(found[0], losses, strict=True)]
        what = f"{name} on 2 processes: losses as of one process, within 1e-5"
        held = sum(difference <= 1e-5 for difference in worst)
        bench.table.add("sharded", what, len(worst), held, largest_difference=max(worst))
