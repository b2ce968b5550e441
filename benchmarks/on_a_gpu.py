"""Runs every benchmark of this folder that is made for a GPU, and writes a JSON file for each.

    python benchmarks/on_a_gpu.py --output results                          # all that need no data
    python benchmarks/on_a_gpu.py --output results --text input.txt         # also training, on plain text

A benchmark is a script whose name ends in _gpu.py; its last line is JSON. If one fails, it is named, its
output is kept with the results, the others still run, and the exit status is 1. Without a CUDA device they
run at toy size, and say so.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
NEEDS_TEXT = {"training_gpu"}


def run(script: Path, arguments: list[str], goal: Path) -> dict[str, Any]:
    """Run one benchmark. Returns its JSON object, or the error."""
    start = time.perf_counter()
    print(f"\n== {script.name} {' '.join(arguments)}", flush=True)
    # minigpt need not be installed: the checkout is on PYTHONPATH
    path = os.pathsep.join([str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments], cwd=FOLDER.parent, text=True, encoding="utf-8",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert process.stdout is not None
    lines = []
    with (goal / f"{script.stem}.log").open("w", encoding="utf-8") as log:
        for line in process.stdout:  # show the output at once, because it may take minutes
            print(line, end="", flush=True)
            log.write(line)
            lines.append(line)
    seconds = round(time.perf_counter() - start, 1)
    if process.wait() != 0:
        return {"failed": f"exit status {process.returncode}", "seconds": seconds}
    try:
        result = json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError):
        return {"failed": "its last line is no JSON", "seconds": seconds}
    (goal / f"{script.stem}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    return {"file": f"{script.stem}.json", "seconds": seconds}


def main() -> int:
    """Run all benchmarks. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the results; made if need be")
    parser.add_argument("--text", type=Path, help="what the benchmarks of training read")
    parser.add_argument("--only", nargs="+", default=[], help="names of benchmarks, without _gpu.py")
    parser.add_argument("--toy", action="store_true", help="toy size, whatever the device")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    done: dict[str, dict[str, Any]] = {}
    for script in sorted(FOLDER.glob("*_gpu.py")):
        name = script.stem
        if name == "on_a_gpu" or (options.only and name.removesuffix("_gpu") not in options.only):
            continue
        arguments = ["--toy"] if options.toy else []
        if name in NEEDS_TEXT:
            if options.text is None:
                done[name] = {"left_out": "it needs --text"}
                continue
            arguments += ["--text", str(options.text.resolve())]
        done[name] = run(script, arguments, options.output.resolve())
    print()
    for name, outcome in done.items():
        print(f"{name}: {', '.join(f'{key} {value}' for key, value in outcome.items())}")
    print(json.dumps({"benchmark": "on_a_gpu", "output": str(options.output), "done": done}))
    return int(any("failed" in outcome for outcome in done.values()))


if __name__ == "__main__":
    sys.exit(main())
