"""Training on CUDA GPUs: tokens per second and MFU of GPT-2 124M, time to a loss, several GPUs.

    python benchmarks/training_gpu.py --text input.txt --nanogpt DIR --output benchmarks/results/NAME.json
    python benchmarks/training_gpu.py --text input.txt --only speed --compare_compile

DIR is your checkout of https://github.com/karpathy/nanoGPT; it is run unchanged. There are three parts:

- `speed`: GPT-2's 124M shape, T = 1024, bfloat16, random text, with the users' command `minigpt train`,
  compared with nanoGPT's bench.py (`--real_data=False`, batches of 12). The first third of the steps does not
  count.
- `loss`: nanoGPT's recipe for one GPU (config/train_shakespeare_char.py, 10.7M parameters, 5,000
  iterations) and minigpt's `shakespeare-gpu`, in turns. It is the training time until the loss over the whole
  validation part, in windows of 256 characters, is `--target`, interpolated between measurements. `first` is
  the first step, in which torch.compile works; it is included.
- `scaling`: the speed of 1, 2, ... GPUs under torchrun, each with the same batch.

MFU is 6 N + 12 LdT operations per token (N: weights that are multiplied) over `--peak_tflops`, the data
sheet's speed for bfloat16 without sparsity (H100 and H200 SXM: 989; A100: 312), with the same formula for
both. Without a CUDA device all parts run at toy size on the CPU, and the result says so. The last line is
JSON.
"""

import sys
from pathlib import Path

# run as a script: import minigpt from this checkout, and the other files of this folder
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import dataclasses
import json
import os
import re
import subprocess
import tempfile
import time
from typing import Any

import torch

from benchmarks.nanogpt import Missing, NanoGPT, lay_out, loss_over, require_checkout
from benchmarks.sizes import SIZES, write_text
from benchmarks.turns import (
    Runner,
    add_flags,
    finish,
    seconds_to,
    shown_spread,
    spread,
    surroundings,
    take_turns,
)
from minigpt.console.terminal import table
from minigpt.data.windows import TextPart
from minigpt.training.config import RECIPES, TrainConfig, read_recipe
from minigpt.training.loop import Trainer
from minigpt.training.run_data import TextData, read_data

PARTS = ("speed", "loss", "scaling")
TOY = ["--n_layer=1", "--n_embd=32", "--n_head=2", "--block_size=64", "--batch_size=4", "--max_iters=30"]
OPTIONS = {field.name for field in dataclasses.fields(TrainConfig)}


def main() -> None:
    """Run the parts. Print the tables, the machine, and one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="plain text, UTF-8: tinyshakespeare")
    parser.add_argument("--nanogpt", type=Path, help="your checkout of nanoGPT; without it, minigpt alone")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--rounds", type=int, default=5, help="of speed")
    parser.add_argument("--steps", type=int, default=150, help="of a round")
    parser.add_argument("--batch_size", type=int, default=12, help="of speed and scaling, for each GPU")
    parser.add_argument("--compare_compile", action="store_true", help="speed without torch.compile, too")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of loss")
    parser.add_argument("--target", type=float, default=1.4697)
    parser.add_argument("--every", type=int, default=250, help="steps between measurements of loss")
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="of one GPU")
    add_flags(parser, threads=os.cpu_count() or 1)
    options = parser.parse_args()
    options.has_gpu = torch.cuda.is_available()
    options.toy = options.toy or not options.has_gpu
    if not options.has_gpu:
        print("no CUDA device: toy size")
    if options.toy:
        options.rounds, options.steps, options.seeds, options.every = 1, 6, options.seeds[:1], 10
        options.batch_size, options.threads = 4, 1
    parts = {"speed": speed, "loss": loss, "scaling": scaling}
    found: dict[str, Any] = {}
    left_out: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            if part in options.only:
                work = Path(folder) / part
                work.mkdir()
                found[part] = parts[part](options, work, left_out)
    if left_out:
        print(f"left out: {'; '.join(left_out)}")
    device = torch.cuda.get_device_name() if options.has_gpu else "no CUDA device: toy size"
    numbers = {
        **surroundings("training_gpu", options.text, options.threads),
        "toy": options.toy,
        "device": device,
        "devices": torch.cuda.device_count(),
        "peak_tflops": options.peak_tflops,
        "target": options.target,
        "left_out": left_out,
        **found,
    }
    print(device)
    finish(numbers, options.output)


# -- tokens per second ---------------------------------------------------------------------------------------


def speed(options: argparse.Namespace, work: Path, left_out: list[str]) -> list[dict[str, Any]]:
    """Measure GPT-2 124M on one device; minigpt and nanoGPT take turns, round by round."""
    flags, per_token = gpt2_flags(options, work)
    arms: dict[str, list[float]] = {"minigpt": []}
    if options.compare_compile and "compile" in OPTIONS:
        arms["minigpt, eager"] = []
    peer: Path | None = None
    try:
        peer = require_checkout(options.nanogpt, "bench.py", "model.py", "configurator.py")
        if not options.has_gpu:
            raise Missing("nanoGPT: its bench.py needs a CUDA device")
        arms["nanoGPT"] = []
    except Missing as why:
        left_out.append(str(why))
    for number in range(options.rounds):
        for arm in list(arms):
            place = work / f"{arm.replace(', ', '-')}-{number}"
            if arm == "nanoGPT":
                assert peer is not None
                try:
                    arms[arm].append(bench_of(peer, place, options))
                except Missing as why:
                    left_out.append(str(why))
                    del arms[arm]
            else:
                eager = ["--no_compile"] if arm.endswith("eager") else []
                arms[arm].append(tokens_per_second([*flags, *eager], place, options, 1))
    rows = [speed_row(arm, values, per_token, options) for arm, values in arms.items()]
    shown = [(r["arm"], shown_spread(r["tokens_per_second"]), shown_spread(r["mfu"], "")) for r in rows]
    table(f"GPT-2 124M, median of {options.rounds} rounds", ("", "tokens/s", "MFU"), shown, (1, 2))
    return rows


def speed_row(
    arm: str, values: list[float], per_token: float, options: argparse.Namespace, devices: int = 1
) -> dict[str, Any]:
    """Return the spread of an arm's rounds, and its share of the devices' peak."""
    peak = options.peak_tflops * 1e12 * devices
    mfu = spread([value * per_token / peak for value in values]) if options.has_gpu else None
    return {"arm": arm, "devices": devices, "tokens_per_second": spread(values), "mfu": mfu}


def gpt2_flags(options: argparse.Namespace, work: Path) -> tuple[list[str], float]:
    """Return the flags of `minigpt train` for GPT-2's shape on random text, and the FLOPs per token."""
    shape = {"block_size": 16, **SIZES["toy" if options.toy else "124M"]}
    V, L, C, T = shape.pop("vocab_size"), shape["n_layer"], shape["n_embd"], shape["block_size"]
    values = {**shape, **write_text(work, V, 2_000_000 if options.has_gpu else 20_000)}
    values |= {"shards": work / "shards", "batch_size": options.batch_size, "dropout": 0.0}
    values |= {"max_steps": options.steps, "eval_steps": options.steps, "logging_steps": options.steps // 3}
    values |= {"val_fraction": 0.01, "report_to": "none", "loss_on": "all", "max_length": T}
    values |= {
        "optimizer": "adamw",
        "gradient_accumulation_steps": 1,
        "tokens_per_batch": 0,
        "warmup_steps": 2,
    }
    values |= {"device": "cuda" if options.has_gpu else "cpu"}
    values |= {"precision": "bfloat16" if options.has_gpu else "float32"}
    recipe = "gpt2-124m" if (RECIPES / "gpt2-124m.toml").exists() else "qa-gpu"
    flags = ["--recipe", recipe]
    flags += [f"--{name}={value}" for name, value in values.items() if not isinstance(value, bool)]
    flags += [f"--{name}" for name, value in values.items() if value is True]
    if "compile" in OPTIONS:
        flags.append("--compile" if options.has_gpu else "--no_compile")
    return flags, 6 * (12 * L * C * C + V * C) + 12 * L * C * T


def tokens_per_second(flags: list[str], place: Path, options: argparse.Namespace, devices: int) -> float:
    """Run `minigpt train`. Returns its speed from the first line of metrics (after a third) to the last.

    Raises:
        SystemExit: if it fails, with its output.
    """
    module = ["-m", "minigpt", "train", *flags, "--output", str(place)]
    if devices > 1:
        module = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={devices}", *module]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, *module], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"minigpt train: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    lines = (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    points = [(v["step"], v["seconds"]) for v in map(json.loads, lines) if "train_loss" in v]
    (first, began), (last, ended) = points[0], points[-1]
    block = next(int(flag.split("=")[1]) for flag in flags if flag.startswith("--block_size="))
    batch = next(int(flag.split("=")[1]) for flag in flags if flag.startswith("--batch_size="))
    return float((last - first) * batch * block / max(ended - began, 1e-9))


def bench_of(checkout: Path, work: Path, options: argparse.Namespace) -> float:
    """Return the tokens per second of nanoGPT's bench.py.

    Raises:
        Missing: if it fails; the message has its last line.
    """
    work.mkdir()
    lay_out(checkout, work)
    arguments = ["--real_data=False", f"--batch_size={options.batch_size}", "--block_size=1024"]
    done = subprocess.run(
        [sys.executable, "bench.py", *arguments], cwd=work, capture_output=True, text=True, check=False
    )
    found = re.search(r"time per iteration: ([\d.]+)ms", done.stdout)
    if done.returncode or not found:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise Missing(f"nanoGPT: bench.py failed: {said[-1] if said else 'it said nothing'}")
    return float(options.batch_size) * 1024 / float(found[1]) * 1000


# -- time to a loss ------------------------------------------------------------------------------------------


class Run:
    """A minigpt run on the device. A turn is some steps; only whole turns are timed."""

    def __init__(self, config: TrainConfig, data: TextData, validation: Any, every: int) -> None:
        self.trainer, self.validation, self.every = Trainer(config, data), validation, every
        self.seconds, self.first = 0.0, 0.0
        self.rows: list[dict[str, Any]] = []

    def run(self, slice_seconds: float) -> bool:
        """Train until the next measurement."""
        trainer = self.trainer
        left = min(self.every, trainer.step.total_steps - trainer.progress.steps_done)
        if not self.first:  # the time of torch.compile
            self.first = self._timed(1)
            left -= 1
        self._timed(left)
        trainer.model.eval()
        device = trainer.device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            found = loss_over(trainer.model, self.validation, trainer.config.block_size, device)
        trainer.model.train()
        row = {"arm": "minigpt", "seed": trainer.config.seed, "seconds": round(self.seconds, 3)}
        row |= {
            "first": round(self.first, 3),
            "iterations": trainer.progress.steps_done,
            "loss": round(found, 4),
        }
        self.rows.append({**row, "parameters": trainer.model.config.parameter_count()})
        print(self.rows[-1], flush=True)
        return trainer.progress.steps_done < trainer.step.total_steps

    def _timed(self, steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            self.trainer.step()
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize()
        taken = time.perf_counter() - began
        self.seconds += taken
        return taken


def loss(options: argparse.Namespace, work: Path, left_out: list[str]) -> dict[str, Any]:
    """Measure Shakespeare by character: both recipes for one GPU, in turns, seed by seed."""
    text = options.text.read_text(encoding="utf-8")
    config = shakespeare_config(options, work)
    data = read_data(config)
    assert isinstance(data, TextData)
    first, tokens = int(len(text) * 0.9), data.train.tokens  # the same split as nanoGPT's
    data = dataclasses.replace(data, train=TextPart(tokens, 0, first, config.block_size))
    validation = tokens.read(first, len(text) - first)
    rows: list[dict[str, Any]] = []
    failed = False
    for seed in options.seeds:
        arms: list[Runner] = [Run(dataclasses.replace(config, seed=seed), data, validation, options.every)]
        peer = None
        try:
            if not failed:
                peer = start_peer(options, work / f"nanogpt-{seed}", text, seed)
                arms.insert(0, peer)
            rows += take_turns(arms, 10.0)
        except Missing as why:
            failed = True
            left_out.append(str(why))
            rows += take_turns(arms[-1:], 10.0)
        finally:
            if peer is not None:
                peer.close()
    summary = [
        summary_of(arm, rows, options.target) for arm in ("minigpt", "nanoGPT") if curves_of(rows, arm)
    ]
    shown = [(s["arm"], shown_spread(s["seconds_to_target"]), shown_spread(s["last_loss"])) for s in summary]
    table("Shakespeare, 10.7M", ("", f"seconds to {options.target}", "last loss"), shown, (1, 2))
    return {"summary": summary, "rows": rows}


def summary_of(arm: str, rows: list[dict[str, Any]], target: float) -> dict[str, Any]:
    """Return the summary of an arm over its seeds."""
    curves = curves_of(rows, arm)
    times = [found for curve in curves if (found := seconds_to(target, curve))]
    return {
        "arm": arm,
        "seconds_to_target": spread(times) if times else None,
        "reached": len(times),
        "last_loss": spread([curve[-1][1] for curve in curves]),
        "first": spread([row["first"] for row in rows if row["arm"] == arm]),
    }


def curves_of(rows: list[dict[str, Any]], arm: str) -> list[list[tuple[float, float]]]:
    """Return the (seconds, loss) points of each seed."""
    seeds = dict.fromkeys(row["seed"] for row in rows if row["arm"] == arm)
    return [
        [(row["seconds"], row["loss"]) for row in rows if (row["arm"], row["seed"]) == (arm, seed)]
        for seed in seeds
    ]


def shakespeare_config(options: argparse.Namespace, work: Path) -> TrainConfig:
    """Return minigpt's recipe; if there is none, nanoGPT's shape with the recipe for CPUs."""
    there = (RECIPES / "shakespeare-gpu.toml").exists()
    config = read_recipe("shakespeare-gpu" if there else "shakespeare-cpu")
    values: dict[str, Any] = {"text": options.text, "output": work / "run", "report_to": "none"}
    values |= {"device": "cuda" if options.has_gpu else "cpu"}
    if not there:
        values |= {"n_layer": 6, "n_embd": 384, "n_head": 6, "block_size": 256, "batch_size": 64}
        values |= {"max_steps": 5000, "precision": "bfloat16" if options.has_gpu else "float32"}
    if options.toy:
        values |= {"n_layer": 1, "n_embd": 32, "n_head": 2, "block_size": 64, "batch_size": 4}
        values |= {"max_steps": 30, "warmup_steps": 2, "threads": options.threads}
    if not options.has_gpu:
        values |= {"precision": "float32"} | ({"compile": False} if "compile" in OPTIONS else {})
    return dataclasses.replace(config, **values)


def start_peer(options: argparse.Namespace, work: Path, text: str, seed: int) -> NanoGPT:
    """Start nanoGPT with its recipe for one GPU.

    Raises:
        Missing: if the folder is not a checkout of nanoGPT.
    """
    needed = ("train.py", "model.py", "configurator.py", "config/train_shakespeare_char.py")
    checkout = require_checkout(options.nanogpt, *needed)
    work.mkdir()
    arguments = ["config/train_shakespeare_char.py", "--eval_iters=1"]
    if options.toy:
        arguments += TOY
    if not options.has_gpu:
        arguments += ["--device=cpu", "--compile=False"]
    return NanoGPT(checkout, work, text, arguments, every=options.every, seed=seed, threads=options.threads)


# -- several devices -----------------------------------------------------------------------------------------


def scaling(options: argparse.Namespace, work: Path, left_out: list[str]) -> list[dict[str, Any]]:
    """Measure the speed of 1, 2, ... devices, each with the same batch; on a CPU, processes of one thread."""
    flags, per_token = gpt2_flags(options, work)
    devices = torch.cuda.device_count() if options.has_gpu else 2
    counts = [n for n in (1, 2, 4, 8, 16) if n <= devices]
    if len(counts) == 1:
        left_out.append("scaling: there is one device")
    rows: list[dict[str, Any]] = []
    found: dict[int, list[float]] = {n: [] for n in counts}
    for number in range(options.rounds):
        for n in counts:
            size = [f"--batch_size={options.batch_size * n}"]
            others = [flag for flag in flags if not flag.startswith("--batch_size=")]
            found[n].append(tokens_per_second([*others, *size], work / f"{n}-{number}", options, n))
    for n in counts:
        row = speed_row(f"{n}", found[n], per_token, options, n)
        one = spread(found[1])["median"]
        rows.append({**row, "share_of_ideal": round(row["tokens_per_second"]["median"] / (n * one), 4)})
    shown = [(r["devices"], shown_spread(r["tokens_per_second"]), f"{r['share_of_ideal']:.1%}") for r in rows]
    table("several devices", ("devices", "tokens/s", "of n times one"), shown, (0, 1, 2))
    return rows


if __name__ == "__main__":
    main()
