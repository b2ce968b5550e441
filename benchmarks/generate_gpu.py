"""Generation on one GPU: a single answer, batches of 1 to 256, and 256 requests of mixed lengths.

    python benchmarks/generate_gpu.py --output benchmarks/results/NAME.json      # Qwen3-0.6B's shape
    python benchmarks/generate_gpu.py --only single --precision bfloat16 int4
    python benchmarks/generate_gpu.py --toy                                      # seconds, on any machine

Weights are random; nothing is downloaded. All parts use minigpt.generation.engine, as a server would.

single: one request; the step as a CUDA graph, as a CUDA graph with torch.compile, and without either.
sweep: B requests of equal length, submitted together. The time to the first token is that of the last one.
    The time per token counts from there until the first request ends. Bytes: the weights once per step, and
    on average the keys and values of all rows. Operations: 2 per weight and row, and attention's. Both are
    compared with the device's data sheet, if minigpt knows it.
mixed: 256 requests, prompts and answers of 100 to 1,024 tokens each; as many rows as fit into the memory.

Without a CUDA device all parts run at toy size on the CPU, and the result says so. The last line is JSON.
"""

import argparse
import datetime
import json
import math
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minigpt.families.qwen3.model import Qwen3Config
from minigpt.families.qwen3.presets import preset
from minigpt.families.registry import LanguageModel, new_model
from minigpt.generation.cache import cache_bytes
from minigpt.generation.engine import Engine
from minigpt.generation.options import GenerationOptions
from minigpt.generation.request_handle import RequestHandle
from minigpt.training.flops import peaks
from minigpt.weights.quantized import PRECISIONS, set_precision

PARTS = ("single", "sweep", "mixed")
TOY = Qwen3Config(300, 64, 96, 2, 4, 2, 16, 256)


def build(config: Qwen3Config, precision: str, device: torch.device) -> LanguageModel:
    """Make a model with random weights on its device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = new_model(config)
    return set_precision(model, precision)  # type: ignore[arg-type]


def weights_of(model: LanguageModel) -> tuple[int, int]:
    """Return the bytes of weights that a step reads, and the number of weights that are multiplied."""
    held = {id(tensor): tensor for module in model.modules() for tensor in module._buffers.values()
            if tensor is not None}  # fmt: skip
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and not isinstance(module, nn.Embedding):
                held[id(parameter)] = parameter
    products: list[Any] = [module for module in model.modules() if hasattr(module, "in_features")]
    count = sum(module.in_features * module.out_features for module in products)
    return sum(tensor.nbytes for tensor in held.values()), count


def wait(device: torch.device) -> float:
    """Return the time when the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def run(engine: Engine, prompts: list[list[int]], new: list[int]) -> dict[str, float]:
    """Submit all requests and run them. Returns seconds to the last first token, per token, and in total."""
    start = wait(engine.cache.layer(0)[0].device)
    handles: list[RequestHandle] = [
        engine.submit(prompt, GenerationOptions(max_new_tokens=n)) for prompt, n in zip(prompts, new)
    ]
    first = end = 0.0
    at_first = at_end = 0
    goes_on = True
    while goes_on:
        goes_on = engine.step()
        written = [len(handle.tokens) for handle in handles]
        if not first and min(written):
            first, at_first = time.perf_counter(), sum(written)
        if first and not end and any(handle.done for handle in handles):
            end, at_end = time.perf_counter(), sum(written)
    total = time.perf_counter() - start
    found = {"seconds": total, "tokens_per_second": sum(new) / total}
    if first and at_end > at_first:
        found["first_token"] = first - start
        found["per_token"] = (end - first) / ((at_end - at_first) / len(handles))
    return found


def prompts_of(count: int, lengths: tuple[int, int], vocab_size: int) -> list[list[int]]:
    """Make prompts of random ids, with lengths in a range."""
    draw = random.Random(0)
    return [[draw.randrange(vocab_size) for _ in range(draw.randint(*lengths))] for _ in range(count)]


def median(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each number over the rounds."""
    return {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}


class Bench:
    """The three parts of the benchmark, and the objects that they share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.is_toy = options.toy or self.device.type == "cpu"
        self.config = TOY if self.is_toy else preset("0.6B").config()
        self.prompt, self.new = (16, 24) if self.is_toy else (512, 256)
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        self.name = name
        self.peaks = [peak / 1e12 for peak in peaks(self.device) if not math.isnan(peak)]

    def measure(
        self, model: LanguageModel, prompts: list[list[int]], new: list[int], **more: Any
    ) -> dict[str, float]:
        """Return the medians of the rounds, after a warm-up round."""
        engine = Engine(model, max_waiting=len(prompts), **{"cuda_graph": True, **more})
        run(engine, prompts, new)
        found = median([run(engine, prompts, new) for _ in range(self.options.rounds)])
        return {**found, "cache_mib": engine.bytes / 2**20}

    def single(self) -> list[dict[str, Any]]:
        """Measure one request, in each precision and each way of running a step."""
        rows = []
        prompts = prompts_of(1, (self.prompt, self.prompt), self.config.vocab_size)
        kinds: dict[str, dict[str, Any]] = {"graph": {}, "neither": {"cuda_graph": False}}
        if self.device.type == "cuda":
            kinds["graph, compiled"] = {"compiled": True}
        for precision in self.options.precision:
            model = build(self.config, precision, self.device)
            for kind, more in kinds.items():
                size = {"max_rows": 1, "max_length": self.prompt + self.new, "chunk": self.prompt}
                found = self.measure(model, prompts, [self.new], **size, **more)
                rows.append({"precision": precision, "kind": kind, **found, **self.use(model, 1, found)})
                print(f"{precision}, {kind}: {1 / found['per_token']:.1f} tokens/s", flush=True)
        return rows

    def use(self, model: LanguageModel, rows: int, found: dict[str, float]) -> dict[str, float]:
        """Return bytes and operations per second, and their share of the data sheet's numbers."""
        held = self.prompt + self.new / 2  # mean number of tokens in a row
        size, count = weights_of(model)
        dtype = next(model.parameters()).dtype
        moved = size + rows * held * cache_bytes(self.config, 1, 1, dtype)
        c = self.config
        operations = rows * (2 * count + 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * held)
        per_second = {"bytes": moved / found["per_token"], "flops": operations / found["per_token"]}
        if self.peaks:
            flops, width = self.peaks
            per_second["flop_utilisation"] = per_second["flops"] / (flops * 1e12)
            per_second["bandwidth_utilisation"] = per_second["bytes"] / (width * 1e12)
        return per_second

    def sweep(self) -> list[dict[str, Any]]:
        """Measure batches of requests of equal length."""
        model, rows = build(self.config, self.options.precision[0], self.device), []
        for B in (1, 2, 4) if self.is_toy else (1, 2, 4, 8, 16, 32, 64, 128, 256):
            prompts = prompts_of(B, (self.prompt, self.prompt), self.config.vocab_size)
            size = {"max_rows": B, "max_length": self.prompt + self.new, "chunk": B * self.prompt}
            found = self.measure(model, prompts, [self.new] * B, **size)
            rows.append({"batch": B, **found, **self.use(model, B, found)})
            print(f"batch {B}: first token {found['first_token']:.4f} s, {1000 * found['per_token']:.3f} ms "
                  f"per token, {B / found['per_token']:.0f} tokens/s", flush=True)  # fmt: skip
        return rows

    def mixed(self) -> dict[str, Any]:
        """Measure requests of mixed lengths. Requests without a free row wait."""
        count, lengths = (8, (4, 24)) if self.is_toy else (256, (100, 1024))
        model = build(self.config, self.options.precision[0], self.device)
        prompts = prompts_of(count, lengths, self.config.vocab_size)
        draw = random.Random(1)
        new = [draw.randint(*lengths) for _ in prompts]
        length, rows = 2 * lengths[1], count
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info()
            row = cache_bytes(self.config, 1, length, next(model.parameters()).dtype)
            rows = min(count, max(1, int(0.85 * free / row)))
        size = {"max_rows": rows, "max_length": length, "chunk": 4096}
        found = self.measure(model, prompts, new, **size)
        found.pop("per_token", None)  # not meaningful for mixed lengths
        found.pop("first_token", None)
        print(f"mixed: {count} requests in {rows} rows, {found['tokens_per_second']:.0f} new tokens/s")
        return {"requests": count, "rows": rows, "read": sum(map(len, prompts)), "written": sum(new), **found}


def main() -> None:
    """Parse the flags, run the parts, print the JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=None,
                        help="of single; the first one for the rest")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--toy", action="store_true", help="toy size, whatever the device")
    parser.add_argument("--output", type=Path, help="also write the JSON object here")
    options = parser.parse_args()
    bench = Bench(options)
    if options.precision is None:
        options.precision = ["float32"] if bench.device.type == "cpu" else ["bfloat16", "int8", "int4"]
    if bench.device.type == "cpu":
        print("no CUDA device: toy size on the CPU, without graphs")
    result = {
        "benchmark": "generate_gpu",
        "device": bench.name,
        "toy": bench.is_toy,
        "shape": "toy" if bench.is_toy else "Qwen3-0.6B",
        "prompt": bench.prompt,
        "new": bench.new,
        "rounds": options.rounds,
        "precision": options.precision,
        "peak_tflops_and_tb_per_second": bench.peaks or None,
        **{part: getattr(bench, part)() for part in options.only},
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
    }
    text = json.dumps(result)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
