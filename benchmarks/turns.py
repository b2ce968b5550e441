"""Training runs that take turns in one process, so that a busy neighbour slows all of them alike.

What the benchmarks of training share: the split of the data, a run that can be continued for a while, and
what a result says about the machine. Time counts steps only, not evaluation.
"""

import datetime
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from minigpt.data.reader import read_pairs
from minigpt.data.split import split_pairs, write_split
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.training.config import TrainConfig
from minigpt.training.loop import Trainer
from minigpt.training.run_data import RunData, TextData

__all__ = ["Arm", "prepared_data", "surroundings", "take_turns"]


class Arm:
    """One training run that can be continued for a while, measured at each budget of seconds.

    With cosine or wsd the schedule is fitted to the last budget, so give such a run one budget.
    """

    def __init__(
        self, name: str, config: TrainConfig, data: RunData | TextData, budgets: list[float], **labels: Any
    ) -> None:
        self.name, self.budgets, self.labels = name, budgets, labels
        self.fitted = config.lr_scheduler_type != "constant"
        self.trainer = Trainer(config, data)
        self.trainer.total_steps = 10**9
        self.seconds = 0.0
        self.rows: list[dict[str, Any]] = []

    def run(self, slice_seconds: float) -> bool:
        """Train for a slice, measuring at each budget that is reached; False once the last one is."""
        turn = self.seconds + slice_seconds
        while self.seconds < turn and len(self.rows) < len(self.budgets):
            trainer, goal = self.trainer, self.budgets[len(self.rows)]
            if self.fitted and trainer.steps_done >= 5:  # the schedule's end is where the time will be up
                left = (goal - self.seconds) * trainer.steps_done / self.seconds
                trainer.total_steps = trainer.steps_done + max(1, round(left))
            start = time.perf_counter()
            trainer.step()
            self.seconds += time.perf_counter() - start
            if self.seconds >= goal:
                report = trainer.evaluate()
                row = {"arm": self.name, **self.labels, "seconds": round(self.seconds, 1)}
                row |= {"steps": trainer.steps_done, "tokens": trainer.tokens_seen}
                row |= {"answer_loss": round(report.answer.loss, 4)}
                self.rows.append(row)
                print(row, flush=True)
        return len(self.rows) < len(self.budgets)


def take_turns(arms: list[Arm], slice_seconds: float) -> list[dict[str, Any]]:
    """Run all arms to their ends, a slice each in turn; returns their rows, arm by arm."""
    running = list(arms)
    while running:
        running = [arm for arm in running if arm.run(slice_seconds)]
    return [row for arm in arms for row in arm.rows]


def prepared_data(data: Path, folder: Path, seed: int) -> dict[str, Any]:
    """Build the vocabulary of a JSONL file and split it, into `folder`; returns TrainConfig's paths."""
    pairs, report = read_pairs(data)
    Tokenizer.from_word2id(build_vocabulary(p.question + p.answer for p in pairs)).save(folder / "vocab.json")
    split = split_pairs(pairs, 0.8, seed)
    write_split(split, report, folder, train_ratio=0.8, seed=seed)
    return {
        "train_data": folder / "train.jsonl",
        "val_data": folder / "val.jsonl",
        "vocab_path": folder / "vocab.json",
    }


def surroundings(benchmark: str, data: Path, threads: int) -> dict[str, Any]:
    """What a result must say to be compared: which benchmark, which data, when, where, with what."""
    return {
        "benchmark": benchmark,
        "data": data.parent.name + "/" + data.name,
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {_processor()}",
        "threads": threads,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
