"""The common code of all parts: the table of results, the undisturbed run, chains of disturbed runs."""

import argparse
import json
import os
import platform
import random
import shutil
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minigpt.storage import files
from minigpt.training import checkpoint
from tests.survival.runs import Runs, digest, flip, void

__all__ = ["Bench", "Table"]


class Table:
    """The table of promises, with trials and how many held. It is written to a file after each row.

    Args:
        path: path of the file; None: no file. Rows of other parts in the file are kept.
        size: "toy" or "full", written into each row.

    Raises:
        SystemExit: if the file holds results of another machine or version, or something else.
    """

    def __init__(self, path: Path | None, size: str, seed: int) -> None:
        self.path, self.size, self.seed = path, size, seed
        self.rows: list[dict[str, Any]] = []
        self.new: list[dict[str, Any]] = []  # rows of this call
        self._began = time.monotonic()
        cpu = _processor()
        self.head = {
            "benchmark": "survival",
            "machine": f"{os.cpu_count()} cores, {cpu}, {platform.system()} {platform.release()}",
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        if path is not None and path.exists():
            old = json.loads(path.read_text(encoding="utf-8"))
            if {name: old.get(name) for name in self.head} != self.head:
                sys.exit(f"{path} holds results of another machine or version: give another --output")
            self.rows = old["rows"]

    def add(self, part: str, what: str, trials: int, held: int, **more: Any) -> None:
        """Add a row. It replaces an earlier row with the same name."""
        took, self._began = round(time.monotonic() - self._began, 1), time.monotonic()
        row = {"part": part, "what": what, "trials": trials, "held": held, **more}
        row |= {"size": self.size, "seed": self.seed, "seconds": took, "date": f"{datetime.now(UTC):%F}"}
        print(f"  {part}: {what}: {held} of {trials} {more or ''} ({took} s)", file=sys.stderr, flush=True)
        self.new.append(row)
        self.rows = [old for old in self.rows if (old["part"], old["what"]) != (part, what)] + [row]
        self.write()

    def ended(self, part: str) -> None:
        """Remove rows of this part that an earlier call wrote and this call did not."""
        self.rows = [row for row in self.rows if row["part"] != part or row in self.new]
        self.write()

    def numbers(self) -> dict[str, Any]:
        """Return the JSON object: machine, versions, rows, and the promises that did not hold."""
        failed = [row["what"] for row in self.rows if row["held"] != row["trials"]]
        return {**self.head, "failed": failed, "rows": self.rows}

    def write(self) -> None:
        """Write the file atomically."""
        if self.path is not None:
            files.atomic_write(self.path, json.dumps(self.numbers(), ensure_ascii=False, indent=2) + "\n")


def _processor() -> str:
    """Return the processor's name if Linux says it, else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


class Reference(NamedTuple):
    """The undisturbed run."""

    end: str  # hash of its end
    seconds: float
    points: list[str]  # names of the points that writing passes


class Bench:
    """The objects that a part gets: options, the table, random numbers, and the runs in their folder."""

    def __init__(self, folder: Path, options: argparse.Namespace, table: Table) -> None:
        self.options, self.table = options, table
        self.random = random.Random(options.seed)
        # In bfloat16, each process first compiles its kernels, for longer than it trains.
        self.runs = Runs(folder / "runs", options.steps, "auto" if options.full else "float32")

    @cached_property
    def reference(self) -> Reference:
        """The undisturbed run, in the folder `reference`. It is made at the first use."""
        record = self.runs.folder / "points"

        def recording() -> None:
            descriptor = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            files.step_hook = lambda point: void(os.write(descriptor, f"{point}\n".encode()))

        began = time.monotonic()
        code = self.runs.run("reference", recording)
        assert code == 0, self.runs.said()
        seconds = time.monotonic() - began
        seen = dict.fromkeys(record.read_text(encoding="utf-8").splitlines())
        # Writing passes these two points only if a checkpoint of the same step exists already.
        points = [*seen, "old one: set aside", "old one: deleted"]
        points.sort(key=lambda point: not point.startswith("best"))  # while the loss still falls
        print(f"  reference: {seconds:.1f} s, {len(points)} points", file=sys.stderr, flush=True)
        return Reference(digest(self.runs.folder / "reference"), seconds, points)

    def chain(
        self,
        name: str,
        trials: list[Any],
        one: Callable[[Path, Any], bool | None],
        expected: str = "",
        **more: Any,
    ) -> int:
        """Disturb runs until all trials are done. Each run must end like the reference.

        Args:
            name: beginning of the names of the runs' folders.
            trials: the trials, which are passed to `one` in order.
            one: does a trial on the run in a folder; returns True if the run behaved as it should.
            expected: the hash that a run must end with. Default: the reference's.
            more: flags of the runs.

        `one` returns None if the trial came too late, because the run had ended. Then it is tried again, in
        half the time if the trial is a number of seconds.

        Returns: how many trials held. The trials of a run with a different end did not hold.
        """
        held, in_this, number, steps = 0, 0, 0, more.get("max_steps", 0)
        queue = list(trials)
        expected = expected or self.reference.end
        while queue:
            output = self.runs.folder / f"{name}-{number}"
            number += 1
            while queue and not self.is_done(output, steps):
                result = one(output, queue[0])
                if result is None:
                    queue[0] = queue[0] / 2 if isinstance(queue[0], float) else queue[0]
                else:
                    in_this += result
                    queue.pop(0)
            code = 0 if self.is_done(output, steps) else self.runs.run(output.name, **more)
            same = code == 0 and digest(output) == expected
            if not same:
                print(f"{output.name}: exit {code}, differs: {self.runs.said()}", file=sys.stderr)
            held += in_this if same else 0
            in_this = 0
            shutil.rmtree(output, ignore_errors=True)
        return held

    def is_done(self, output: Path, steps: int = 0) -> bool:
        """Return True if a run of `steps` steps has reached its end. 0: as many as the reference has."""
        path = output / f"step-{steps or self.options.steps:08d}" / "training_state.json"
        return path.exists() and bool(json.loads(path.read_bytes())["evaluated"])

    def damage_newest(self, output: Path) -> None:
        """Damage the newest checkpoint, so that its step is done and saved once more."""
        folders = checkpoint.list_checkpoints(output)
        if len(folders) > 1 and checkpoint.verifies(folders[1]):
            flip(folders[0] / "rng.safetensors", 4000)
