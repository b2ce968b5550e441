"""Measures how much of a CPU's speed a training step uses: its GFLOP/s compared with a large matrix product.

    python benchmarks/arithmetic.py --output benchmarks/results/NAME.json         # 124M: 4 GiB of memory
    python benchmarks/arithmetic.py --sizes 10M --profile                          # what takes the time
    python benchmarks/arithmetic.py --precision bfloat16 --sizes 10M 124M --lengths 256 --output ...
    python benchmarks/arithmetic.py --toy

A step is a step of `minigpt train`: batches, forward, backward, clipping, AdamW, in float32, with `--tokens`
tokens of random text. With `--precision bfloat16`, steps in both precisions take turns, and `times` is how
many times faster the step in 16 bits is.

The FLOPs of a step are those of minigpt's own estimate. For each token: 6 per weight that is multiplied (the
matrices of the blocks and lm_head; an embedding is looked up, not multiplied), and 12 LdT for attention over
all T positions. A causal product may skip the masked half; `causal` is the ratio with 6 LdT instead. The
baseline is torch.mm of two 2048 x 2048 matrices in the same process, just before and after each measurement.

Then a + b N + c LdT, with N weights that are multiplied, is fitted to the seconds per token, so that the
relative errors are small. The last line is JSON.

    python benchmarks/arithmetic.py --rows benchmarks/results/NAME.json            # repeat only the fit
"""

import sys
from pathlib import Path

# run as a script: import minigpt from this checkout, and the other files of this folder
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import dataclasses
import itertools
import json
import math
import tempfile
import time
from typing import Any

import numpy as np
import torch

from benchmarks.sizes import SIZES, config_of, write_text
from benchmarks.turns import add_flags, finish, shown_spread, spread, surroundings
from minigpt.console.terminal import table
from minigpt.training import estimate as report
from minigpt.training.loop import Trainer
from minigpt.training.run_data import TextData, read_data


def main() -> None:
    """Measure every size at every length. Print the table, the fit, the machine, and one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = [size for size in SIZES if size != "toy"]
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=sizes)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024], help="T, of each size")
    parser.add_argument("--tokens", type=int, default=2048, help="of a step; at least one sequence")
    parser.add_argument("--precision", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--edge", type=int, default=2048, help="of the square matrices of the baseline")
    parser.add_argument("--profile", action="store_true", help="also print which operations take the time")
    parser.add_argument("--rows", type=Path, help="an earlier result, to fit again; nothing is measured")
    add_flags(parser)
    options = parser.parse_args()
    if options.rows:
        earlier = json.loads(options.rows.read_text(encoding="utf-8"))
        show(earlier | {"fit": fit(earlier["rows"])}, options.output)
        return
    if options.toy:
        options.sizes, options.lengths, options.tokens = ["toy"], [8, 16, 64], 128
        options.rounds, options.edge = 2, 128
    torch.set_num_threads(options.threads)
    rows = []
    for size in options.sizes:
        for T in options.lengths:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(size, T, options, Path(folder)))
            print(rows[-1], flush=True)
    numbers = {
        **surroundings("arithmetic", None, options.threads),
        "toy": options.toy,
        "precision": options.precision,
        "rounds": options.rounds,
        "tokens_per_step": options.tokens,
        "fit": fit(rows),
        "rows": rows,
    }
    show(numbers, options.output)


def show(numbers: dict[str, Any], output: Path | None) -> None:
    """Print the table, the fit, the machine, and one JSON object."""
    keys = {"gflops": "GFLOP/s", "ratio": "of sgemm", "times": "times float32"}
    keys = {key: title for key, title in keys.items() if key in numbers["rows"][0]}
    shown = [
        (r["size"], f"{r['parameters']:,}", r["T"], *(shown_spread(r[key]) for key in keys))
        for r in numbers["rows"]
    ]
    columns = ("size", "parameters", "T", *keys.values())
    arithmetic = numbers.get("precision", "float32")
    title = f"a training step in {arithmetic}, median of {numbers['rounds']} rounds (least to most)"
    table(title, columns, shown, range(1, len(columns)))
    found = numbers["fit"]
    print("seconds a token = {constant:.3g} + {per_weight:.3g} N + {per_attention:.3g} LdT, "
          "R^2 = {r_squared:.4f}, farthest off: {worst:.0%}".format(**found))  # fmt: skip
    finish(numbers, output)


def measure(size: str, T: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure the rounds of one size and length."""
    paths = write_text(folder, SIZES[size]["vocab_size"])
    B = max(1, options.tokens // T)
    config = config_of(size, paths, block_size=T, batch_size=B, output=folder, threads=options.threads)
    data = read_data(config)
    assert isinstance(data, TextData)
    trainer = Trainer(dataclasses.replace(config, precision=options.precision), data)
    plain = None if options.precision == "float32" else Trainer(config, data)
    a, b = torch.randn(2, options.edge, options.edge)

    def product() -> float:
        times = []
        for _ in range(3):
            began = time.perf_counter()
            torch.mm(a, b)
            times.append(time.perf_counter() - began)
        return float(2 * options.edge**3 / min(times))

    def steps(count: int, trainer: Trainer = trainer) -> float:
        """Return seconds per token. (Batches may differ by a row.)"""
        before, began = trainer.progress.tokens_seen, time.perf_counter()
        for _ in range(count):
            trainer.step()
        trainer.step.read_metrics()
        return (time.perf_counter() - began) / (trainer.progress.tokens_seen - before)

    flops = report.batch_flops(trainer, 1 / T, T, 1.0)  # FLOPs of one token
    half = attention_share(trainer, T) / 2
    steps(1)  # the first step allocates memory
    product()
    count = max(1, math.ceil(0.3 / (steps(1) * options.tokens)))  # steps for at least 0.3 seconds
    if plain is not None:
        steps(1, plain)
    yards, taken, times = [product()], [], []
    for _ in range(options.rounds):
        taken.append(steps(count))
        yards.append(product())
        if plain is not None:
            times.append(steps(count, plain) / taken[-1])
    if options.profile:
        profile(trainer)
    speeds = [flops / seconds for seconds in taken]
    beside = [(before + after) / 2 for before, after in itertools.pairwise(yards)]
    model = trainer.model.config
    return {
        "size": size,
        "parameters": model.parameter_count(),
        "multiplying": multiplying(trainer),
        "layers_times_width": model.num_hidden_layers * model.num_attention_heads * model.head_dim,
        "T": T,
        "gflops": spread([speed / 1e9 for speed in speeds]),
        "sgemm": spread([speed / 1e9 for speed in yards]),
        "ratio": spread([speed / yard for speed, yard in zip(speeds, beside)]),
        "causal": spread([speed / yard * (1 - half) for speed, yard in zip(speeds, beside)]),
        "seconds_per_token": spread(taken, 6),
        **({"times": spread(times)} if times else {}),
    }


def multiplying(trainer: Trainer) -> int:
    """Count the weights that are multiplied with a token's vector: matrices of the blocks and lm_head."""
    blocks = sum(p.numel() for p in trainer.model.blocks.parameters() if p.dim() == 2)
    return int(blocks + trainer.model.lm_head.weight.numel())


def attention_share(trainer: Trainer, T: int) -> float:
    """Return attention's share of the FLOPs of a step, with T positions."""
    model = trainer.model.config
    attention = 12 * model.num_hidden_layers * model.num_attention_heads * model.head_dim * T
    return float(attention / (attention + 6 * multiplying(trainer)))


def fit(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Fit seconds per token = constant + per_weight N + per_attention LdT by least relative squares.

    `gflops_of_weights` and `gflops_of_attention` follow from the slopes: 6 FLOPs per weight, 12 per LdT.
    """
    y = np.array([row["seconds_per_token"]["median"] for row in rows])
    columns = [[1.0, row["multiplying"], row["layers_times_width"] * row["T"]] for row in rows]
    x = np.array(columns) / y[:, None]
    scale = x.max(axis=0)  # scale the columns, because otherwise the solution loses digits
    found = np.linalg.lstsq(x / scale, np.ones(len(y)), rcond=None)[0] / scale
    guess = x @ found * y
    spread_of = float(((y - y.mean()) ** 2).sum())
    constant, per_weight, per_attention = map(float, found)
    return {
        "constant": constant,
        "per_weight": per_weight,
        "per_attention": per_attention,
        "gflops_of_weights": 6 / per_weight / 1e9 if per_weight else math.nan,
        "gflops_of_attention": 12 / per_attention / 1e9 if per_attention else math.nan,
        "r_squared": 1 - float(((y - guess) ** 2).sum()) / spread_of if spread_of else math.nan,
        "worst": float((abs(guess - y) / y).max()),
    }


def profile(trainer: Trainer) -> None:
    """Print the operations that take most of the time of a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        for _ in range(3):
            trainer.step()
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=18, max_name_column_width=45))


if __name__ == "__main__":
    main()
