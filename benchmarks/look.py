"""How long each look inside a model takes, from the command line to the prompt.

    make demo    # three minutes; the machine must be quiet
    python benchmarks/look.py --output benchmarks/results/NAME.json

The commands are those of docs/lens.md that look, and `look attention` of 512 tokens in a model of GPT-2's
124M shape. Each runs in a process of its own, `--rounds` times in turns. Seconds are on the clock, from the
start of the process to its end, so `import torch` counts; beside them stand the processor's seconds and the
largest memory.
"""

import sys
from pathlib import Path

# run as a script: import minigpt from this checkout, and the other files of this folder
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import os
import shlex
import statistics
import subprocess
import tempfile

from benchmarks.turns import finish, surroundings
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.storage.files import atomic_folder
from minigpt.tokenizer import SPECIAL_TOKENS, Tokenizer
from minigpt.weights.pretrained import save_pretrained

ROOT = Path(__file__).resolve().parents[1]
# ru_maxrss of a new process begins with the size of its parent: so a small process starts the command.
LAUNCHER = """
import json, os, sys, time
begin = time.perf_counter()
pid = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, *sys.argv[1:]])
_, status, used = os.wait4(pid, 0)
seconds = time.perf_counter() - begin
code = os.waitstatus_to_exitcode(status)
print(json.dumps([seconds, used.ru_utime + used.ru_stime, used.ru_maxrss, code]), file=sys.stderr)
"""


def documented() -> list[str]:
    """Return the commands of docs/lens.md that look at the demo's model or its run."""
    lines = (ROOT / "docs" / "lens.md").read_text(encoding="utf-8").splitlines()
    looks = (line for line in lines if line.startswith(("minigpt look", "minigpt plot")))
    return [line for line in looks if "output/width" not in line]


LARGE = GPTConfig(768, 12, 12, 0.0, 1024, 50_257, True, "tanh")


def large_model(place: Path, config: GPTConfig = LARGE) -> str:
    """Save a model with random weights. Returns the command that looks at 512 characters, with one head."""
    numbers = (*range(0x4E00, 0xD800), *range(0x20000, 0x30000))
    characters = [chr(number) for number in numbers[: config.vocab_size - len(SPECIAL_TOKENS)]]
    tokenizer = Tokenizer.from_word2id({token: i for i, token in enumerate((*SPECIAL_TOKENS, *characters))})
    atomic_folder(place / "large", lambda goal: save_pretrained(GPTLMHeadModel(config), goal, tokenizer))
    text = "".join(characters[:512])
    layer = config.n_layer // 2
    return f"minigpt look attention --model {place / 'large'} --text {text} --layer {layer} --head 3"


def measured(command: str, demo: Path, threads: int) -> dict[str, float]:
    """Run a command: seconds on the clock, the processor's seconds, the largest memory in MiB."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory(prefix="look-") as place:
        for name in ("data", "output"):
            (Path(place) / name).symlink_to(demo / name)
        words = [sys.executable, "-c", LAUNCHER, "-m", *shlex.split(command)]
        done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True)
    seconds, processor_seconds, peak, status = json.loads(done.stderr.splitlines()[-1])
    if status:
        raise SystemExit(f"{command}: exit code {status}: {done.stderr}")
    unit = 1024**2 if sys.platform == "darwin" else 1024
    return {"seconds": seconds, "processor_seconds": processor_seconds, "mib": peak / unit}


def main() -> None:
    """Measure each command, print the table and one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, default=Path(), help="the folder in which `make demo` ran")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    demo = options.demo.resolve()
    if not (demo / "output" / "demo" / "best").is_dir():
        raise SystemExit(f"there is no output/demo in {demo}: run `make demo` there")
    with tempfile.TemporaryDirectory(prefix="look-") as place:
        commands = {command: command for command in documented()}
        commands["minigpt look attention, a 124M shape, 512 tokens"] = large_model(Path(place))
        seen: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        for _ in range(options.rounds):
            for name, command in commands.items():
                seen[name].append(measured(command, demo, options.threads))
    rows = []
    print("  seconds processor      MiB")
    for name, rounds in seen.items():
        middle = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        rows.append({"command": name, **{key: round(value, 2) for key, value in middle.items()}})
        shown = "".join(f"{middle[key]:9.2f}" for key in ("seconds", "processor_seconds", "mib"))
        print(f"{shown}  {name}")
    finish(
        {**surroundings("look", None, options.threads), "rounds": options.rounds, "rows": rows},
        options.output,
    )


if __name__ == "__main__":
    main()
