"""Training runs that take turns in one process, so that other programs slow all of them equally.

The benchmarks of training share this: the split of the data, a run that can train for a slice of time, and
the description of the machine in a result. Time counts steps only, not evaluation.
"""

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch

from minigpt.data.reader import read_conversations
from minigpt.data.split import split_conversations, write_split
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.training.config import TrainConfig
from minigpt.training.loop import Trainer
from minigpt.training.run_data import RunData, TextData

__all__ = [
    "Arm",
    "Runner",
    "add_flags",
    "finish",
    "first_to_reach",
    "prepared_data",
    "seconds_to",
    "shown_spread",
    "spread",
    "surroundings",
    "take_turns",
]


class Runner(Protocol):
    """The interface of a run that takes turns: one of minigpt, or a peer's."""

    rows: list[dict[str, Any]]

    def run(self, slice_seconds: float) -> bool:
        """Train for a slice. Returns False when the run is finished."""


def answer_loss(run: Trainer) -> dict[str, float]:
    """Return the loss of a run's answers, the default measure of an arm."""
    return {"answer_loss": round(run.evaluate().metrics()["val_answer_loss"], 4)}


class Arm:
    """A training run that can train for a slice of time. It is measured at each budget of seconds.

    With cosine or wsd the schedule ends with the last budget, so such a run should have one budget.
    """

    def __init__(
        self,
        name: str,
        config: TrainConfig,
        data: RunData | TextData,
        budgets: list[float],
        measure: Callable[[Trainer], dict[str, float]] | None = None,
        **labels: Any,
    ) -> None:
        self.name, self.budgets, self.labels = name, budgets, labels
        self.measure = measure or answer_loss
        self.fitted = config.lr_scheduler_type != "constant"
        self.trainer = Trainer(config, data)
        self.trainer.step.total_steps = 10**9
        self.seconds = 0.0
        self.rows: list[dict[str, Any]] = []

    def run(self, slice_seconds: float) -> bool:
        """Train for a slice, and measure at each budget reached. Returns False after the last budget."""
        turn = self.seconds + slice_seconds
        while self.seconds < turn and len(self.rows) < len(self.budgets):
            trainer, goal = self.trainer, self.budgets[len(self.rows)]
            if self.fitted and trainer.progress.steps_done >= 5:  # let the schedule end when the time is up
                left = (goal - self.seconds) * trainer.progress.steps_done / self.seconds
                trainer.step.total_steps = trainer.progress.steps_done + max(1, round(left))
            start = time.perf_counter()
            trainer.step()
            self.seconds += time.perf_counter() - start
            if self.seconds >= goal:
                row = {"arm": self.name, **self.labels, "budget": goal, "seconds": round(self.seconds, 1)}
                row |= {"steps": trainer.progress.steps_done, "tokens": trainer.progress.tokens_seen}
                row |= self.measure(trainer)
                self.rows.append(row)
                print(row, flush=True)
        return len(self.rows) < len(self.budgets)


def take_turns(arms: Sequence[Runner], slice_seconds: float) -> list[dict[str, Any]]:
    """Run all arms to their ends, a slice each in turn. Returns their rows, arm by arm."""
    running = list(arms)
    while running:
        running = [arm for arm in running if arm.run(slice_seconds)]
    return [row for arm in arms for row in arm.rows]


def prepared_data(data: Path, folder: Path, seed: int) -> dict[str, Any]:
    """Write the vocabulary and the split of a JSONL file into `folder`. Returns the paths for TrainConfig."""
    pairs, report = read_conversations(data)
    Tokenizer.from_word2id(build_vocabulary(p.question + p.answer for p in pairs)).save(folder / "vocab.json")
    split = split_conversations(pairs, 0.8, seed)
    write_split(split, report, folder, train_ratio=0.8, seed=seed)
    return {
        "train_data": folder / "train.jsonl",
        "val_data": folder / "val.jsonl",
        "vocab_path": folder / "vocab.json",
    }


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Return median, least and greatest value, rounded to a number of significant digits."""
    found = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {name: float(f"{value:.{digits}g}") for name, value in found.items()}


def shown_spread(values: dict[str, float] | None, nothing: str = "not reached") -> str:
    """Format a spread for a table."""
    return "{median:g} ({least:g} to {most:g})".format(**values) if values else nothing


def seconds_to(goal: float, curve: Sequence[tuple[float, float]]) -> float | None:
    """Return the time when a curve of (seconds, loss) first reaches a loss, interpolated between points.

    >>> seconds_to(2.0, [(10, 3.0), (20, 2.5), (30, 1.5)])
    25.0
    >>> seconds_to(1.0, [(10, 3.0), (20, 2.5)])  # None: never
    """
    for (before, above), (after, below) in itertools.pairwise(curve):
        if above > goal >= below:
            return before + (after - before) * (above - goal) / (above - below)
    return curve[0][0] if curve and curve[0][1] <= goal else None


def first_to_reach(goal: float, runs: Sequence[tuple[float, float]]) -> float | None:
    """Return the time of the shortest run, of several (seconds, loss), that reaches a loss; or None."""
    return min((seconds for seconds, loss in runs if loss <= goal), default=None)


def add_flags(parser: argparse.ArgumentParser, threads: int = 2) -> None:
    """Add the flags that every benchmark of training has."""
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to see that it runs: in seconds")
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--output", type=Path, help="also write the JSON object here")


def finish(numbers: dict[str, Any], output: Path | None) -> None:
    """Print machine and versions, the JSON object as the last line; then write the file, if any."""
    versions = ", ".join(f"{name} {version}" for name, version in numbers["versions"].items())
    print(f"{numbers['machine']}, {numbers['threads']} threads, {versions}, {numbers['date']}")
    print(json.dumps(numbers, ensure_ascii=False), flush=True)
    if output:
        output.write_text(json.dumps(numbers, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def surroundings(
    benchmark: str, data: Path | None, threads: int, packages: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the facts of a result: which benchmark, which data, when, where, with which versions."""
    return {
        "benchmark": benchmark,
        **({"data": data.resolve().parent.name + "/" + data.name} if data else {}),
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {_processor()}",
        "threads": threads,
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {package: _version(package) for package in packages},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
