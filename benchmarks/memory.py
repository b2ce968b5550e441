"""Peak memory of `minigpt train`, compared with the estimate of `--dry_run` and with simple arithmetic.

    python benchmarks/memory.py --output benchmarks/results/NAME.json             # 124M: 6 GiB of memory
    python benchmarks/memory.py --toy

Each run is a process of its own: the users' command with a few steps, an evaluation and two checkpoints, on
random text with `--tokens` tokens per step. `peak` is the maximum memory of the process as the system reports
it (ru_maxrss), with Python and torch. `import` is the same for a process that only imports what training
needs. `parts` is 16 bytes per parameter (weights, gradients and AdamW's two moments in float32) plus the
computed memory of activations. `estimate` is the estimate of --dry_run: these parts with the gaps of the C
library's allocator, plus Python and torch. `error` is the difference between estimate and peak. The last line
is JSON.
"""

import sys
from pathlib import Path

# run as a script: import minigpt from this checkout, and the other files of this folder
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import os
import subprocess
import tempfile
from typing import Any

from benchmarks.sizes import SIZES, write_text
from benchmarks.turns import add_flags, finish, spread, surroundings
from minigpt.console.terminal import table
from minigpt.training.estimate import HELD, TORCH_ITSELF

# The run is started by a small process, because ru_maxrss of a new process begins with the size of its
# parent.
LAUNCHER = """
import json, os, sys
pid = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, *sys.argv[1:]])
_, status, usage = os.wait4(pid, 0)
print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_maxrss]), file=sys.stderr)
"""
IMPORT = "import minigpt.train, minigpt.training.estimate, minigpt.training.loop, minigpt.training.run_data"


def main() -> None:
    """Measure every size. Print the table, the machine, and one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", nargs="+", choices=SIZES, default=[size for size in SIZES if size != "toy"]
    )
    parser.add_argument("--length", type=int, default=256, help="T; 124M has 1,024")
    parser.add_argument("--tokens", type=int, default=2048, help="of a step; at least one sequence")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    add_flags(parser)
    options = parser.parse_args()
    if options.toy:
        options.sizes, options.rounds, options.tokens, options.length = ["toy"], 1, 64, 16
    rows = []
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(size, options, Path(folder)))
        print(rows[-1], flush=True)
    numbers = {
        **surroundings("memory", None, options.threads),
        "toy": options.toy,
        "optimizer": options.optimizer,
        "rounds": options.rounds,
        "tokens_per_step": options.tokens,
        "rows": rows,
    }
    columns = ("size", "parameters", "import", "parts", "estimate", "peak", "error")
    shown = []
    for r in rows:
        cells = [r["import"]["median"], r["parts"], r["estimate"], r["peak"]["median"], f"{r['error']:+.1%}"]
        shown.append([r["size"], f"{r['parameters']:,}", *cells])
    title = f"MiB, {options.optimizer}, median of {options.rounds} rounds"
    table(title, columns, shown, (1, 2, 3, 4, 5, 6))
    finish(numbers, options.output)


def measure(size: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure the rounds of one size."""
    flags = command(size, options, folder)
    told, _ = run([*flags, "--output", str(folder / "dry"), "--dry_run"], options.threads)
    estimate = json.loads(told.splitlines()[-1])
    peaks, imports = [], []
    for number in range(options.rounds):
        imports.append(run(["-c", IMPORT], options.threads)[1])
        output = folder / f"run-{number}"
        peaks.append(run([*flags, "--output", str(output)], options.threads)[1])
    peak, expected = spread(peaks, 5), estimate["memory_bytes"] / 2**20
    return {
        "size": size,
        "parameters": estimate["parameters"],
        "tokens_per_step": estimate["tokens_per_step"],
        "import": spread(imports, 5),
        "parts": round((expected - TORCH_ITSELF / 2**20) / HELD),
        "estimate": round(expected),
        "peak": peak,
        "error": round(expected / peak["median"] - 1, 4),
    }


def command(size: str, options: argparse.Namespace, folder: Path) -> list[str]:
    """Return the user's command, without --output."""
    shape = {"block_size": options.length, **SIZES[size]}
    paths = write_text(folder, shape.pop("vocab_size"))
    values = {**shape, **paths, "shards": folder / "shards", "optimizer": options.optimizer}
    values |= {"dropout": 0.0, "batch_size": max(1, options.tokens // shape["block_size"]), "device": "cpu"}
    values |= {"max_steps": options.steps, "eval_steps": options.steps, "threads": options.threads}
    values |= {"loss_on": "all", "report_to": "none", "val_fraction": 0.05, "max_length": shape["block_size"]}
    flags = [f"--{name}={value}" for name, value in values.items() if not isinstance(value, bool)]
    flags += [f"--{name}" for name, value in values.items() if value is True]
    return ["-m", "minigpt", "train", "--recipe", "document", *flags, "--json"]


def run(arguments: list[str], threads: int) -> tuple[str, float]:
    """Run Python. Returns its standard output and its peak memory in MiB.

    Raises:
        SystemExit: if it fails, with its output.
    """
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, *arguments],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    code, most = json.loads(done.stderr.splitlines()[-1])
    if code:
        raise SystemExit(f"{' '.join(arguments)}: exit code {code}\n{done.stderr}")
    return done.stdout, most / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, KiB on Linux


if __name__ == "__main__":
    main()
