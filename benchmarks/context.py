"""The cost of a longer context: milliseconds per token on a CPU, and a straight line fitted to them.

    python benchmarks/context.py --output benchmarks/results/NAME.json    # GPT-2's 124M shape
    python benchmarks/context.py --toy

A token reads every weight once, and the keys and values of each earlier token once: 2 L H D numbers. Both
come from memory. So with S earlier tokens, the time should be a + b S, where b is the size of these numbers
divided by the memory's speed. The cache is filled once. Then tokens are read at each length in turns,
`--rounds` times, and a line is fitted to the medians. The speed of the memory is measured in the same turns,
by summing
numbers that do not fit into a processor cache. Weights are random. The last line is JSON."""

import sys
from pathlib import Path

# run as a script: import minigpt from this checkout, and the other files of this folder
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import time
from typing import Any

import numpy as np
import torch

from benchmarks.turns import add_flags, finish, shown_spread, spread, surroundings
from minigpt.console.terminal import table
from minigpt.generation.cache import KeyValueCache, cache_bytes
from minigpt.generation.native import NativeRunner, runner_for
from minigpt.generation.native_library import system_build
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.weights.quantized import PRECISIONS, set_precision

SHAPE = {"n_embd": 768, "n_head": 12, "n_layer": 12, "vocab_size": 50257, "block_size": 1024}
TOY = {"n_embd": 64, "n_head": 2, "n_layer": 2, "vocab_size": 300, "block_size": 128}
LENGTHS = 16  # number of lengths for the fit


def main() -> None:
    """Measure all precisions. Print the table, the lines, the machine, and one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["float32", "int8"])
    parser.add_argument("--rounds", type=int, default=30)
    add_flags(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = TOY if options.toy else SHAPE
    rows = [measure(precision, shape, options) for precision in options.precisions]
    for row in rows:
        shown = [(one["length"], shown_spread(one["milliseconds"])) for one in row["lengths"]]
        title = f"{row['precision']}, median of {options.rounds} rounds (least to most)"
        table(title, ("tokens before it", "ms"), shown, (0, 1))
        print(
            "ms = {milliseconds:.4g} + {microseconds:.4g} / 1000 * tokens, R^2 = {r_squared:.4f}: a token's "
            "keys and values at {gigabytes:.3g} GB/s".format(**row["fit"])
        )
        print(f"{row['bytes_of_token']:,} bytes each; adding up numbers: {shown_spread(row['memory'])} GB/s")
    numbers = {**surroundings("context", None, options.threads), "toy": options.toy, "rows": rows}
    finish(numbers, options.output)


@torch.inference_mode()
def measure(precision: Any, shape: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Measure one precision: the times at all lengths, and the line through their medians."""
    torch.manual_seed(0)
    model = set_precision(GPTLMHeadModel(GPTConfig(dropout=0.0, bias=True, gelu="tanh", **shape)), precision)
    runner = runner_for(model)
    if not isinstance(runner, NativeRunner):
        raise SystemExit(f"the native step is what is measured: {system_build().reason}")
    longest = shape["block_size"]
    cache = KeyValueCache(model.config, 1, longest)
    for layer in range(model.config.num_hidden_layers):
        for tensor in cache.layer(layer):
            tensor.normal_()
    numbers = torch.ones(2**16 if options.toy else 2**26)  # 256 MiB
    lengths = [longest * i // LENGTHS - 1 for i in range(1, LENGTHS + 1)]
    taken: dict[int, list[float]] = {length: [] for length in lengths}
    speeds = []
    for number in range(options.rounds + 1):
        for length in lengths:
            seconds = timed(runner, cache, length)
            if number:  # the first round is a warm-up
                taken[length].append(1000 * seconds)
        began = time.perf_counter()
        numbers.sum()
        speeds.append(numbers.nbytes / (time.perf_counter() - began) / 1e9)
    found = {length: spread(times) for length, times in taken.items()}
    of_token = cache_bytes(model.config, 1, 1)
    return {
        "precision": precision,
        "bytes_of_token": of_token,
        "fit": fit([(length, times["median"]) for length, times in found.items()], of_token),
        "memory": spread(speeds[1:]),
        "lengths": [{"length": length, "milliseconds": times} for length, times in found.items()],
    }


def timed(runner: NativeRunner, cache: KeyValueCache, length: int) -> float:
    """Return the seconds of a token after `length` earlier ones."""
    cache.truncate(0, 0)
    cache.advance(0, length)  # the cached tokens are used again
    began = time.perf_counter()
    runner.decode([[length % 250]], [0], cache)
    return time.perf_counter() - began


def fit(points: list[tuple[int, float]], bytes_of_token: int) -> dict[str, float]:
    """Fit a line to (tokens, milliseconds). Returns its intercept, microseconds per token, and R^2."""
    lengths, times = np.array(points, float).T
    slope, begin = np.polyfit(lengths, times, 1)
    rest = times - (begin + slope * lengths)
    return {
        "milliseconds": float(begin),
        "microseconds": float(1000 * slope),
        "r_squared": 1 - float((rest**2).sum() / ((times - times.mean()) ** 2).sum()),
        "gigabytes": float(bytes_of_token / slope / 1e6),
    }


if __name__ == "__main__":
    main()
