"""Fine-tuning methods on one base model: held-out loss, trained parameters, time and memory of each.

    python benchmarks/methods.py --base_data A.jsonl --data B.jsonl --output benchmarks/results/NAME.json
    python benchmarks/methods.py --toy

A base model learns the questions and answers of `--base_data` by the recipe `qa-cpu` for `--base_seconds`.
Then each method continues with `--pairs` pairs of `--data`, which is another domain, and is measured on
`--held_out` other pairs of it. `scratch` is a new model of the same shape that sees these pairs alone. The
split is by question, the same for all. Every method runs with each of `--rates` times its usual learning
rate on the first seed; the rate with the lowest loss is used for all seeds.

Each run is a process of its own, so that its peak memory is its own. The loss is nats per answer character,
of the best checkpoint. The last line is JSON.
"""

import sys
from pathlib import Path

# run as a script: this checkout's minigpt, and the file beside this one
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from typing import Any

from benchmarks.turns import add_flags, finish, surroundings
from minigpt.console.terminal import table
from minigpt.data.reader import read_conversations
from minigpt.data.split import split_conversations
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.training.finetune_config import METHOD_RATES

METHODS: dict[str, list[str]] = {
    "full": ["--method", "full"],
    "last block": ["--method", "freeze", "--train_only", "last:1"],
    "LoRA, r 4": ["--method", "lora", "--r", "4"],
    "LoRA, r 16": ["--method", "lora", "--r", "16"],
    "DoRA, r 16": ["--method", "lora", "--r", "16", "--use_dora"],
    "adapter, 32": ["--method", "adapter", "--bottleneck_size", "32"],
    "IA3": ["--method", "ia3"],
}
TOY_METHODS = ("full", "LoRA, r 4", "adapter, 32")


def main() -> None:
    """Train the base, run every method, print the table, the machine, and one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base_data", type=Path, help="JSONL: what the base model learns")
    parser.add_argument("--data", type=Path, help="JSONL: what is fine-tuned on")
    parser.add_argument("--base_seconds", type=float, default=120)
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--held_out", type=int, default=300)
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.3, 1, 3], help="times the usual rate")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add_flags(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        numbers = measure(options, Path(folder))
    shown = [
        (
            row["method"],
            f"{row['trained']:,}",
            f"{row['loss']['median']:.3f} ({row['loss']['least']:.3f} to {row['loss']['most']:.3f})",
            f"{row['gain']:.0%}",
            f"{row['seconds']:.0f}",
            f"{row['mib']:.0f}",
        )
        for row in numbers["summary"]
    ]
    title = f"{options.pairs} pairs of another domain; median of {len(options.seeds)} seeds"
    names = ("method", "trained parameters", "held-out loss", "of full's gain", "seconds", "MiB")
    table(title, names, shown, (1, 2, 3, 4, 5))
    finish(numbers, options.output)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prepare the data, train the base, run each method."""
    if options.toy:
        write_toy(folder)
        options.base_data, options.data = folder / "toy-base.jsonl", folder / "toy.jsonl"
        options.base_seconds, options.pairs, options.held_out = 1, 30, 10
        options.epochs, options.rates, options.seeds = 1, [1], options.seeds[:1]
    base_data, _ = read_conversations(options.base_data)
    data, _ = read_conversations(options.data)
    unlike = {text for each in base_data for text in each.texts()}
    data = [each for each in data if each.question not in unlike]
    share = options.pairs / (options.pairs + options.held_out)
    split = split_conversations(data[: options.pairs + options.held_out], share, 7)
    base_split = split_conversations(base_data, 0.95, 7)
    for name, part in (("train", split.train), ("val", split.val)):
        write(folder / f"{name}.jsonl", part)
    for name, part in (("base-train", base_split.train), ("base-val", base_split.val)):
        write(folder / f"{name}.jsonl", part)
    # one vocabulary, so that the losses of all methods are about the same characters
    texts = [text for each in [*base_data, *data] for text in each.texts()]
    Tokenizer.from_word2id(build_vocabulary(texts)).save(folder / "vocab.json")
    small = ["--n_layer", "1", "--n_embd", "32", "--n_head", "2"] if options.toy else []
    shape = [*small, "--recipe", "qa-cpu", "--vocab_path", str(folder / "vocab.json")]
    machine = ["--threads", str(options.threads), "--device", "cpu", "--report_to", "none"]
    pairs = ["--train_data", str(folder / "train.jsonl"), "--val_data", str(folder / "val.jsonl")]
    base_pairs = [
        "--train_data",
        str(folder / "base-train.jsonl"),
        "--val_data",
        str(folder / "base-val.jsonl"),
    ]
    steps = ["--max_steps", "5"] if options.toy else ["--max_steps", str(steps_in(options.base_seconds))]
    run(["train", *shape, *base_pairs, *machine, *steps, "--output", str(folder / "base")])
    epochs = ["--num_train_epochs", str(options.epochs), "--batch_size", "16"]
    commands = {"scratch": (["train", *shape, "--num_train_epochs", str(3 * options.epochs)], 1e-2)}
    for name in TOY_METHODS if options.toy else METHODS:
        flags = METHODS[name]
        usual = METHOD_RATES[flags[1]]
        commands[name] = (["finetune", "--model", str(folder / "base"), *flags, *epochs], usual)
    rows = []
    for name, (command, usual) in commands.items():
        found: dict[float, list[dict[str, Any]]] = {}
        rates = [usual * times for times in options.rates]
        for seed in options.seeds:
            for rate in rates:
                flags = ["--learning_rate", str(rate), "--seed", str(seed), "--output", str(folder / "run")]
                found.setdefault(rate, []).append(run([*command, *pairs, *machine, *flags, "--overwrite"]))
            rates = [min(found, key=lambda rate: found[rate][0]["val_loss"])]
        runs = found[rates[0]]
        rows.append(
            {
                "method": name,
                "rate": rates[0],
                "trained": runs[0]["trained_parameters"],
                "losses": [one["val_loss"] for one in runs],
                "seconds": statistics.median(one["seconds"] for one in runs),
                "mib": statistics.median(one["mib"] for one in runs),
                "first_seed": {f"{rate:g}": some[0]["val_loss"] for rate, some in found.items()},
                "before": runs[0]["before"],
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr)
    before = rows[1]["before"]
    full = statistics.median(rows[1]["losses"])
    for row in rows:
        losses = sorted(row["losses"])
        row["loss"] = {"median": statistics.median(losses), "least": losses[0], "most": losses[-1]}
        row["gain"] = (before - row["loss"]["median"]) / (before - full)
    return {**surroundings("methods", options.data, options.threads), "toy": options.toy, "summary": rows}


def steps_in(seconds: float) -> int:
    """Return the steps of the base model: nine per second. So every machine trains the same model."""
    return int(9 * seconds)


def write(path: Path, conversations: Any) -> None:
    """Write conversations as JSON Lines."""
    lines = [json.dumps({"messages": each.messages()}, ensure_ascii=False) for each in conversations]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_toy(folder: Path) -> None:
    """Write sums and differences, to check that the script runs."""
    for name, sign in (("toy-base", "+"), ("toy", "-")):
        pairs = [(f"{a}{sign}{b}=", str(a + b if sign == "+" else a - b)) for a in range(9) for b in range(9)]
        lines = [json.dumps({"question": question, "answer": answer}) for question, answer in pairs]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")


def run(arguments: list[str]) -> dict[str, Any]:
    """Run a command in its own process. Return its JSON object, its peak memory, and the first loss."""
    environment = {**os.environ, "PYTHONPATH": sys.path[0]}
    code = (
        "import json, resource, sys; from minigpt.__main__ import main\n"
        "code = main(sys.argv[1:])\n"
        "print(json.dumps({'mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))\n"
        "sys.exit(code)"
    )
    command = [sys.executable, "-c", code, *arguments, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    *_, result, memory = done.stdout.splitlines()
    output = Path(arguments[arguments.index("--output") + 1])
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [line["val_loss"] for line in map(json.loads, lines) if "val_loss" in line]
    return {**json.loads(result), **json.loads(memory), "before": losses[0]}


if __name__ == "__main__":
    main()
