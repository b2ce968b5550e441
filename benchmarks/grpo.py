"""Learning from rewards: the rise of the share of right answers, and the time that it takes.

    python benchmarks/grpo.py --output benchmarks/results/NAME.json
    python benchmarks/grpo.py --toy

The problems are all sums of two numbers below `--below`. Some are held out. A small model first learns the
others from examples, and stops while most of its answers are wrong: the last checkpoint is used that gets at
most `--right_before` of the held-out problems right. From there, `minigpt finetune --task grpo --reward
exact` samples answers and learns from the right ones, for `--steps`. The share of right answers is measured
on the held-out problems, each answered with the most likely tokens. `seconds` is the time of the second run,
evaluations included. `cpu_seconds` is the computing time of its threads, which depends less on other
programs. The last line is JSON.
"""

import sys
from pathlib import Path

# run as a script: this checkout's minigpt, and the file beside this one
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import random
import tempfile
import time
from typing import Any

from benchmarks.turns import add_flags, finish, shown_spread, spread, surroundings
from minigpt.console.terminal import table
from minigpt.evaluation.api import evaluate
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.training.run import finetune, train
from minigpt.weights.pretrained import load_model, load_tokenizer

EVERY = 20  # number of steps between two checkpoints while the model learns from examples
SHAPE: dict[str, Any] = {"n_layer": 2, "n_embd": 128, "n_head": 4, "block_size": 32, "max_length": 16}
TOY: dict[str, Any] = {
    "below": 10, "held_out": 20, "steps_before": 60, "right_before": 0.3, "steps": 30, "batch_size": 8,
    "learning_rate": 1e-3,
}  # fmt: skip


def main() -> None:
    """Train the base and learn from rewards, once for each seed; print the table and one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--below", type=int, default=100, help="the numbers are smaller than this")
    parser.add_argument("--held_out", type=int, default=500, help="problems that are measured on")
    parser.add_argument("--steps_before", type=int, default=300, help="by example, at most")
    parser.add_argument("--right_before", type=float, default=0.35)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch_size", type=int, default=64, help="prompts of a step")
    parser.add_argument("--num_generations", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add_flags(parser)
    flags = parser.parse_args()
    if flags.toy:
        parser.set_defaults(**TOY)
        flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        runs = [measure(flags, make_data(flags, work / f"seed-{seed}", seed), seed) for seed in flags.seeds]
    names = ("exact_match_before", "exact_match", "seconds", "cpu_seconds")
    summary = {name: spread([run[name] for run in runs]) for name in names}
    table("held-out sums", ("", "median (least to most)"), [(n, shown_spread(summary[n])) for n in names])
    settings = {name: getattr(flags, name) for name in TOY} | {"num_generations": flags.num_generations}
    where = surroundings("grpo", None, flags.threads)
    finish({**where, "toy": flags.toy, **settings, "summary": summary, "runs": runs}, flags.output)


def make_data(flags: argparse.Namespace, folder: Path, seed: int) -> Path:
    """Write all sums in random order. The first ones are held out."""
    folder.mkdir()
    pairs = [(a, b) for a in range(flags.below) for b in range(flags.below)]
    random.Random(seed).shuffle(pairs)
    rows = [json.dumps({"question": f"{a}+{b}=", "answer": str(a + b)}) + "\n" for a, b in pairs]
    for name, part in (("val", rows[: flags.held_out]), ("train", rows[flags.held_out :])):
        (folder / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    Tokenizer.from_word2id(build_vocabulary(["0123456789+="])).save(folder / "vocab.json")
    return folder


def measure(flags: argparse.Namespace, folder: Path, seed: int) -> dict[str, Any]:
    """Do one run. Return the share of right answers before, during and after it."""
    common: dict[str, Any] = {
        "train_data": folder / "train.jsonl", "val_data": folder / "val.jsonl", "seed": seed,
        "threads": flags.threads, "device": "cpu", "report_to": "none", "precision": "float32",
    }  # fmt: skip
    base = train(
        recipe="qa-cpu", vocab_path=folder / "vocab.json", output=folder / "base", batch_size=128,
        max_steps=flags.steps_before, eval_steps=EVERY, save_total_limit=flags.steps_before, **SHAPE,
        **common,
    )  # fmt: skip
    start = Path(base["model"])
    for checkpoint in sorted((folder / "base").glob("step-*")):
        found = evaluate(load_model(checkpoint), load_tokenizer(checkpoint), folder / "val.jsonl")
        if found["exact_match"] > flags.right_before:
            break
        start = checkpoint
    began, computed = time.monotonic(), time.process_time()
    finetune(
        task="grpo", reward=("exact",), model=start, output=folder / "rewarded",
        batch_size=flags.batch_size, num_generations=flags.num_generations, max_steps=flags.steps,
        learning_rate=flags.learning_rate, max_completion_length=len(str(2 * flags.below)) + 1,
        eval_steps=max(flags.steps // 10, 30), **common,
    )  # fmt: skip
    lines = (folder / "rewarded" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    curve = [row for row in map(json.loads, lines) if "val_exact_match" in row]
    run = {
        "seed": seed,
        "exact_match_before": curve[0]["val_exact_match"],
        "exact_match": curve[-1]["val_exact_match"],
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(time.process_time() - computed, 1),
        "curve": [[row["step"], row["val_exact_match"]] for row in curve],
    }
    print(run, flush=True)
    return run


if __name__ == "__main__":
    main()
