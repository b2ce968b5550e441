"""GPT and Qwen3 compared: with equal parameters, equal data and recipe, equal time.

    python benchmarks/families.py --data QA.jsonl --output benchmarks/results/NAME.json
    python benchmarks/families.py --data data/data.jsonl --budgets 2 4 --seeds 1 --slice 1      # toy size

Both families train with one recipe (`qa-cpu`, without dropout, which Qwen3 does not have), with the same
layers, width and heads. `intermediate_size` of Qwen3 is chosen so that both have the same number of
parameters, within 1 %. For each seed and each budget of training seconds there is one run per family, with a
schedule that ends with the budget. The runs of a seed take turns of `--slice` seconds on the same threads.
The loss is per answer character (a closing <sep> counts as one) over the whole validation part. A seed
decides initial weights and order; the split is the same for all.
"""

import sys
from pathlib import Path

# run as a script: import minigpt from this checkout, and the other files of this folder
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import dataclasses
import json
import statistics
import tempfile
from typing import Any

from benchmarks.turns import Arm, prepared_data, surroundings, take_turns
from minigpt.console.terminal import table
from minigpt.training.config import FOREIGN_OPTIONS, TrainConfig, read_recipe
from minigpt.training.run_data import read_data

FAMILIES = ("gpt", "qwen3")


def main() -> None:
    """Run all arms in turns. Print the table, the machine, and one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="JSONL file of questions and answers")
    parser.add_argument("--recipe", default="qa-cpu", help="recipe, by name or path, for both families")
    parser.add_argument("--budgets", type=float, nargs="+", default=[60, 180, 600], help="training seconds")
    parser.add_argument("--slice", type=float, default=15, help="seconds of a turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the training")
    parser.add_argument("--split_seed", type=int, default=42)
    for name in ("n_layer", "n_embd", "n_head"):
        parser.add_argument(f"--{name}", type=int, help="of both families, instead of the recipe's")
    for name in ("num_key_value_heads", "head_dim"):
        parser.add_argument(f"--{name}", type=int, default=0, help="of Qwen3, as in `minigpt train`")
    parser.add_argument("--rope_theta", type=float, default=10_000.0, help="of Qwen3")
    parser.add_argument("--output", type=Path, help="also write the JSON object here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        numbers = measure(options, Path(folder))
    columns = ("seconds", *FAMILIES, "difference", "deviation")
    rows = [[row[column] for column in columns] for row in numbers["means"]]
    table(f"loss per answer character, mean of {len(options.seeds)} seeds", columns, rows, (0, 1, 2, 3, 4))
    # printed before the file is written, which may fail
    print(json.dumps(numbers, ensure_ascii=False), flush=True)
    if options.output:
        options.output.write_text(json.dumps(numbers, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Split the data and build the arms; they take turns, seed by seed."""
    paths = prepared_data(options.data, folder, options.split_seed)
    chosen = {name: value for name in ("n_layer", "n_embd", "n_head") if (value := getattr(options, name))}
    family: dict[str, Any] = {**FOREIGN_OPTIONS["gpt"], "family": "gpt", "dropout": 0.0}
    gpt = dataclasses.replace(
        read_recipe(options.recipe), **family, **paths, **chosen, threads=options.threads, device="cpu"
    )
    data = read_data(gpt)
    qwen3 = {name: getattr(options, name) for name in ("num_key_value_heads", "head_dim", "rope_theta")}
    vocab_size = data.tokenizer.get_vocab_size()
    configs = {"gpt": gpt, "qwen3": as_large(gpt, vocab_size, qwen3)}
    budgets, rows = sorted(options.budgets), []
    for seed in options.seeds:
        arms = [
            Arm(
                f"{family}, {budget:g} s, seed {seed}",
                dataclasses.replace(config, seed=seed),
                data,
                [budget],
                family=family,
                budget=budget,
                seed=seed,
            )
            for budget in budgets
            for family, config in configs.items()
        ]
        rows += take_turns(arms, options.slice)
    return {
        **surroundings("families", options.data, options.threads),
        "pairs": {"train": len(data.train), "val": len(data.val)},
        "parameters": {name: parameters(config, vocab_size) for name, config in configs.items()},
        "intermediate_size": configs["qwen3"].intermediate_size,
        "means": [mean_of(rows, budget) for budget in budgets],
        "rows": rows,
    }


def parameters(config: TrainConfig, vocab_size: int) -> int:
    """Return the number of parameters of a family's model."""
    return config.model_config(vocab_size).parameter_count()


def as_large(gpt: TrainConfig, vocab_size: int, more: dict[str, Any]) -> TrainConfig:
    """Return a Qwen3 with a GPT's layers and width. The size of its MLP makes the parameters equal.

    Raises:
        SystemExit: if no MLP size comes within 1 %.
    """
    values: dict[str, Any] = {**FOREIGN_OPTIONS["qwen3"], "family": "qwen3", **more, "intermediate_size": 8}
    least = dataclasses.replace(gpt, **values)
    goal, lowest = parameters(gpt, vocab_size), parameters(least, vocab_size)
    channels = (goal - lowest) / (
        3 * gpt.n_embd * gpt.n_layer
    )  # a channel of the MLP adds a row to three matrices
    found = dataclasses.replace(least, intermediate_size=8 + max(0, round(channels / 8) * 8))
    there = parameters(found, vocab_size)
    if abs(there - goal) > 0.01 * goal:
        raise SystemExit(
            f"no intermediate_size makes Qwen3 as large: {there:,} instead of {goal:,} parameters"
        )
    return found


def mean_of(rows: list[dict[str, Any]], budget: float) -> dict[str, Any]:
    """Return the mean losses at a budget, and how much higher Qwen3's is: mean and deviation over seeds."""
    losses = {
        family: [row["answer_loss"] for row in rows if (row["family"], row["budget"]) == (family, budget)]
        for family in FAMILIES
    }
    differences = [qwen3 - gpt for gpt, qwen3 in zip(*losses.values(), strict=True)]
    return {
        "seconds": budget,
        **{family: round(statistics.mean(values), 4) for family, values in losses.items()},
        "difference": round(statistics.mean(differences), 4),
        "deviation": round(statistics.stdev(differences), 4) if len(differences) > 1 else None,
    }


if __name__ == "__main__":
    main()
