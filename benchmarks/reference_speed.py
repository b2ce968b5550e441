"""Tokens per second of minigpt.reference.gpt2 in NumPy, with and without its cache, at GPT-2's 124M shape.

    python benchmarks/reference_speed.py --threads 2
    python benchmarks/reference_speed.py --toy                                # takes a second

Without the cache it works like the shortest NumPy versions of GPT-2: for each new token the model reads the
whole text, and computes logits at all positions. Weights are random; both arms must give the same tokens. The
arms take turns in each round, so that other programs slow both equally; the result is the median of the
rounds. The last line is JSON.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

SHAPES = {  # vocab_size, n_positions, n_embd, n_layer; n_head
    "124M": ((50257, 1024, 768, 12), 12),
    "toy": ((500, 256, 64, 2), 4),
}


def measure(shape: str, prompt: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Measure both arms. Returns their seconds, and tokens per second by the medians."""
    import numpy

    from minigpt.reference import gpt2, names

    (V, N, C, layers), n_head = SHAPES[shape]
    rng = numpy.random.default_rng(0)
    weights = {
        name: 0.02 * rng.standard_normal(size, numpy.float32)
        + numpy.float32("ln_" in name and "weight" in name)
        for name, size in gpt2.shapes(V, N, C, layers).items()
    }
    params = names.tree(weights)
    ids = rng.integers(0, V, prompt).tolist()
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds):
        written = {}
        for use_cache in (True, False) if number % 2 else (False, True):
            start = time.perf_counter()
            written[use_cache] = gpt2.generate(
                ids, params, n_head=n_head, n_tokens_to_generate=tokens, use_cache=use_cache
            )
            seconds[use_cache].append(time.perf_counter() - start)
        # Another order of summation may change a token when two scores are nearly equal. The first token
        # comes from the same computation in both arms.
        assert written[True][0] == written[False][0]
    median = {use_cache: statistics.median(times) for use_cache, times in seconds.items()}
    return {
        "benchmark": "reference_speed",
        "shape": shape,
        "prompt": prompt,
        "tokens": tokens,
        "rounds": rounds,
        "threads": os.environ.get("OPENBLAS_NUM_THREADS", "not set"),
        "cached_per_second": tokens / median[True],
        "recomputed_per_second": tokens / median[False],
        "ratio": median[False] / median[True],
        "cached_seconds": seconds[True],
        "recomputed_seconds": seconds[False],
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {_processor()}",
        "versions": {"python": platform.python_version(), "numpy": numpy.__version__},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--prompt", type=int, default=8, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="threads of NumPy's matrix products")
    options = parser.parse_args()
    # NumPy's libraries read these variables when they are first imported, which happens in `measure`
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(options.threads)
    result = measure("toy" if options.toy else "124M", options.prompt, options.tokens, options.rounds)
    print(f"{result['shape']}, {options.tokens} tokens after {options.prompt}, {options.threads} threads")
    print(f"with the cache:      {result['cached_per_second']:8.2f} tokens a second")
    print(f"all computed anew:   {result['recomputed_per_second']:8.2f} tokens a second")
    print(f"ratio:               {result['ratio']:8.2f}")
    print(json.dumps(result))
