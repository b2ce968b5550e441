"""Chinese questions and answers on a CPU: the recipe `qa-cpu` beside the tutorial's loop, at one model size.

    python benchmarks/chinese_qa.py --data QA.jsonl --output benchmarks/results/NAME.json
    python benchmarks/chinese_qa.py --data data/data.jsonl --budgets 2 4 --slice 1      # toy size

Each budget is a training time in seconds. `qa-cpu` is run once for each budget, its cosine fitted to it; the
`document` arm (AdamW, 1e-4 constant, batch 32, padded to 128, loss on all positions, dropout 0.1) has no
schedule and is one run, measured at every budget. All arms take turns of `--slice` seconds on the same
threads, so that a busy neighbour slows all of them alike. Time counts steps only, not evaluation. Printed is
the loss per answer character (its closing <sep> counts as one) over the whole validation part.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from minigpt.data.reader import read_pairs
from minigpt.data.split import split_pairs, write_split
from minigpt.terminal import table
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.training.config import TrainConfig, read_recipe
from minigpt.training.loop import Trainer
from minigpt.training.run_data import RunData, read_data


class Arm:
    """One training run that can be continued for a while."""

    def __init__(self, name: str, config: TrainConfig, data: RunData, budgets: list[float]) -> None:
        self.name, self.budgets = name, budgets
        self.fitted = config.lr_scheduler_type == "cosine"
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
                row = {"arm": self.name, "seconds": round(self.seconds, 1), "steps": trainer.steps_done}
                row |= {"tokens": trainer.tokens_seen, "answer_loss": round(report.answer.loss, 4)}
                self.rows.append(row)
                print(row, flush=True)
        return len(self.rows) < len(self.budgets)


def main() -> None:
    """Run all arms in turns and print the table, the machine, and one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="JSONL file of questions and answers")
    parser.add_argument("--budgets", type=float, nargs="+", default=[60, 180, 600], help="training seconds")
    parser.add_argument("--slice", type=float, default=15, help="seconds of a turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=42, help="of the split and of the training")
    parser.add_argument("--output", type=Path, help="also write the JSON object here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        numbers = measure(options, Path(folder))
    columns = ("arm", "seconds", "steps", "tokens", "answer_loss")
    table(
        "loss per answer character",
        columns,
        [[row[c] for c in columns] for row in numbers["rows"]],
        (1, 2, 3, 4),
    )
    print(json.dumps(numbers, ensure_ascii=False), flush=True)  # first: the file may be refused
    if options.output:
        options.output.write_text(json.dumps(numbers, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Split the data, build the arms, let them take turns."""
    pairs, report = read_pairs(options.data)
    Tokenizer.from_word2id(build_vocabulary(p.question + p.answer for p in pairs)).save(folder / "vocab.json")
    split = split_pairs(pairs, 0.8, options.seed)
    write_split(split, report, folder, train_ratio=0.8, seed=options.seed)
    paths: dict[str, Any] = {
        "train_data": folder / "train.jsonl",
        "val_data": folder / "val.jsonl",
        "vocab_path": folder / "vocab.json",
        "threads": options.threads,
        "seed": options.seed,
        "device": "cpu",
    }
    ours = dataclasses.replace(read_recipe("qa-cpu"), **paths)
    size = {name: getattr(ours, name) for name in ("n_layer", "n_embd", "n_head", "block_size")}
    document = dataclasses.replace(read_recipe("document"), **paths, **size)
    budgets = sorted(options.budgets)
    data = read_data(ours)
    arms = [Arm(f"qa-cpu, {budget:g} s", ours, data, [budget]) for budget in budgets]
    arms.append(Arm("document", document, read_data(document), budgets))
    # both arms are measured on the same characters: what `qa-cpu` reads, uncut at its max_length
    arms[-1].trainer.data = dataclasses.replace(arms[-1].trainer.data, val=data.val)
    running = list(arms)
    while running:
        running = [arm for arm in running if arm.run(options.slice)]
    return {
        "benchmark": "chinese_qa",
        "data": options.data.parent.name + "/" + options.data.name,
        "pairs": {"train": len(data.train), "val": len(data.val)},
        "parameters": ours.model_config(data.tokenizer.get_vocab_size()).parameter_count(),
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {_processor()}",
        "threads": options.threads,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rows": [row for arm in arms for row in arm.rows],
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
