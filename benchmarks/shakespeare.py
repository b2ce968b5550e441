"""Plain text on a CPU: time to a validation loss, for nanoGPT's recipe for CPUs and `shakespeare-cpu`.

    python benchmarks/shakespeare.py --text input.txt --nanogpt DIR --output benchmarks/results/NAME.json
    python benchmarks/shakespeare.py --text input.txt --nanogpt DIR --toy

DIR is your checkout of https://github.com/karpathy/nanoGPT. It is run unchanged, with the command that its
README gives for CPUs (2,000 iterations; only its own evaluations are turned off, and each run has another
seed). minigpt trains with the recipe `shakespeare-cpu`, once for each of `--fast_budgets` and for `--budget`,
with a schedule that ends with that time. Both learn from the first 90 % of the text's characters. All runs of
a seed take turns of `--slice` seconds on the same threads, so that other programs slow all of them equally.

Time is training only, from the first step on. The loss is in nats per character over the whole validation
part, in adjacent windows of 64 characters, computed for both by one function. nanoGPT is measured every
`--every` iterations; the time at which it reaches `--target` is interpolated. For minigpt, it is the time of
the shortest whole run that ends at or below the target. The last line is JSON.
"""

import sys
from pathlib import Path

# run as a script: import minigpt from this checkout, and the other files of this folder
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import dataclasses
import itertools
import tempfile
from typing import Any

from benchmarks.nanogpt import Missing, NanoGPT, loss_over, require_checkout
from benchmarks.turns import (
    Arm,
    Runner,
    add_flags,
    finish,
    first_to_reach,
    seconds_to,
    shown_spread,
    spread,
    surroundings,
    take_turns,
)
from minigpt.console.terminal import table
from minigpt.data.windows import TextPart
from minigpt.training.config import read_recipe
from minigpt.training.loop import Trainer
from minigpt.training.run_data import TextData, read_data

COMMAND = (  # from nanoGPT's README, "I only have a macbook"
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 "
    "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 "
    "--lr_decay_iters=2000 --dropout=0.0"
)
WINDOW = 64  # length of a window when both are measured: nanoGPT's block_size
TOY = "--n_layer=1 --n_embd=32 --n_head=2 --max_iters=60 --lr_decay_iters=60 --eval_iters=1"


def main() -> None:
    """Run all arms in turns. Print the table, the machine, and one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="plain text, UTF-8: tinyshakespeare")
    parser.add_argument("--nanogpt", type=Path, help="your checkout of nanoGPT; without it, minigpt alone")
    parser.add_argument("--recipe", default="shakespeare-cpu", help="of minigpt, by name or path")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--target", type=float, default=1.88, help="loss whose time counts")
    parser.add_argument("--budget", type=float, default=100, help="seconds after which losses are compared")
    parser.add_argument(
        "--fast_budgets", type=float, nargs="+", default=[8, 12, 16, 24], help="seconds of the runs to target"
    )
    parser.add_argument("--every", type=int, default=100, help="iterations of nanoGPT between measurements")
    parser.add_argument("--slice", type=float, default=5, help="seconds of a turn")
    add_flags(parser)
    options = parser.parse_args()
    if options.toy:
        options.seeds, options.budget, options.fast_budgets = options.seeds[:1], 0.4, [0.1, 0.2]
        options.every, options.slice = 20, 0.1
    with tempfile.TemporaryDirectory() as folder:
        numbers = measure(options, Path(folder))
    shown = [
        (arm["arm"], shown_spread(arm["seconds_to_target"]), shown_spread(arm["loss_at_budget"]))
        for arm in numbers["summary"]
    ]
    title = f"median of {len(options.seeds)} seeds (least to most)"
    table(title, ("", f"seconds to {options.target}", f"loss after {options.budget:g} s"), shown, (1, 2))
    if numbers["left_out"]:
        print(f"left out: {'; '.join(numbers['left_out'])}")
    finish(numbers, options.output)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prepare both programs; they take turns, seed by seed."""
    text = options.text.read_text(encoding="utf-8")
    config = dataclasses.replace(
        read_recipe(options.recipe), text=options.text, output=folder, threads=options.threads, device="cpu"
    )
    if options.toy:
        config = dataclasses.replace(config, n_layer=1, n_embd=32, n_head=2, warmup_steps=5)
    data = read_data(config)
    assert isinstance(data, TextData)
    first, tokens = int(len(text) * 0.9), data.train.tokens  # the same split as nanoGPT's
    assert len(tokens) == len(text) + 1, "one token a character, and the one that ends the text"
    data = dataclasses.replace(data, train=TextPart(tokens, 0, first, config.block_size))
    validation = tokens.read(first, len(text) - first)

    def loss(trainer: Trainer) -> dict[str, float]:
        trainer.model.eval()
        found = loss_over(trainer.model, validation, WINDOW)
        return {"loss": round(found, 4), "parameters": trainer.model.config.parameter_count()}

    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    for seed in options.seeds:
        arms: list[Runner] = [
            Arm(
                f"minigpt, {budget:g} s",
                dataclasses.replace(config, seed=seed),
                data,
                [budget],
                loss,
                seed=seed,
            )
            for budget in sorted({*options.fast_budgets, options.budget})
        ]
        peer = None
        if not left_out:
            try:
                peer = start_peer(options, folder / f"nanogpt-{seed}", text, seed)
                arms.insert(0, peer)
            except Missing as why:
                left_out.append(str(why))
        try:
            rows += take_turns(arms, options.slice)
        except Missing as why:
            left_out.append(str(why))
            rows += take_turns(arms[1:], options.slice)  # the runs continue where they stopped
        finally:
            if peer is not None:
                peer.close()
    return {
        **surroundings("shakespeare", options.text, options.threads),
        "toy": options.toy,
        "target": options.target,
        "budget": options.budget,
        "seeds": options.seeds,
        "command": f"python train.py {COMMAND}",
        "left_out": left_out,
        **summary(rows, options),
        "rows": rows,
    }


def start_peer(options: argparse.Namespace, work: Path, text: str, seed: int) -> NanoGPT:
    """Start nanoGPT, ready for its first turn.

    Raises:
        Missing: if the folder is not a checkout of nanoGPT.
    """
    checkout = require_checkout(
        options.nanogpt, "train.py", "model.py", "configurator.py", "config/train_shakespeare_char.py"
    )
    work.mkdir()
    arguments = [*COMMAND.split(), *(TOY.split() if options.toy else [])]
    return NanoGPT(checkout, work, text, arguments, every=options.every, seed=seed, threads=options.threads)


def summary(rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Return the numbers of the table, over the seeds, and how many times faster minigpt is.

    `final_ratio`: nanoGPT's whole training time divided by that of the shortest minigpt run with as low a
    loss.
    """
    times: dict[str, list[float | None]] = {"nanoGPT": [], "minigpt": []}
    losses: dict[str, list[float]] = {"nanoGPT": [], "minigpt": []}
    ends, ratios, final_ratios = [], [], []
    for seed in options.seeds:
        mine = [r for r in rows if r["seed"] == seed and r["arm"] != "nanoGPT"]
        runs = [(r["seconds"], r["loss"]) for r in mine]
        times["minigpt"].append(fast := first_to_reach(options.target, runs))
        losses["minigpt"].append(
            next(r["loss"] for r in mine if r["arm"] == f"minigpt, {options.budget:g} s")
        )
        curve = [(r["seconds"], r["loss"]) for r in rows if r["seed"] == seed and r["arm"] == "nanoGPT"]
        if not curve:
            continue
        times["nanoGPT"].append(slow := seconds_to(options.target, curve))
        losses["nanoGPT"].append(loss_at(options.budget, curve))
        ends.append(curve[-1][0])
        if fast and slow:
            ratios.append(slow / fast)
        if as_low := first_to_reach(curve[-1][1], runs):
            final_ratios.append(curve[-1][0] / as_low)
    arms = [
        {
            "arm": arm,
            "seconds_to_target": spread([t for t in times[arm] if t]) if all(times[arm]) else None,
            "reached": sum(t is not None for t in times[arm]),
            "loss_at_budget": spread(losses[arm]),
        }
        for arm in times
        if losses[arm]
    ]
    return {
        "summary": arms,
        "ratio": spread(ratios) if ratios else None,
        "final_ratio": spread(final_ratios) if final_ratios else None,
        "nanogpt_seconds": spread(ends) if ends else None,  # time of its whole run
    }


def loss_at(seconds: float, curve: list[tuple[float, float]]) -> float:
    """Return a curve's loss after some seconds, interpolated; after its end, its last loss."""
    for (before, a), (after, b) in itertools.pairwise(curve):
        if before <= seconds <= after:
            return a + (b - a) * (seconds - before) / (after - before)
    return curve[-1][1] if seconds > curve[0][0] else curve[0][1]


if __name__ == "__main__":
    main()
