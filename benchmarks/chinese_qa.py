"""Chinese questions and answers on a CPU: the recipe `qa-cpu` compared with the tutorial's loop.

    python benchmarks/chinese_qa.py --data QA.jsonl --output benchmarks/results/NAME.json
    python benchmarks/chinese_qa.py --data QA.jsonl --peer_seeds 1    # the tutorial's loop for one seed only
    python benchmarks/chinese_qa.py --data data/data.jsonl --toy

A budget is a training time in seconds. `qa-cpu` is run once for each budget and seed, with a schedule that
ends with the budget. For the long budgets the model is wider (`--wide`), as users with more time would
choose. The `document` arm (AdamW, constant 1e-4, batch 32, padded to 128, loss on all positions, dropout 0.1)
has no schedule: there is one run of `--peer_seconds` per seed, which is measured at every budget and at its
end. All arms of a seed take turns of `--slice` seconds on the same threads, so that other programs slow all
of them equally. Time counts steps only, not evaluation. The loss is per answer character (a closing <sep>
counts as one) over the whole validation part.

The ratio is the peer's time divided by that of the shortest `qa-cpu` run whose loss is not above the peer's
last loss. A seed decides initial weights and order; the split is the same for all. The last line is JSON."""

import sys
from pathlib import Path

# run as a script: import minigpt from this checkout, and the other files of this folder
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import dataclasses
import statistics
import tempfile
from typing import Any

from benchmarks.turns import (
    Arm,
    add_flags,
    finish,
    first_to_reach,
    prepared_data,
    shown_spread,
    spread,
    surroundings,
    take_turns,
)
from minigpt.console.terminal import table
from minigpt.training.config import TrainConfig, read_recipe
from minigpt.training.run_data import RunData, read_data


def main() -> None:
    """Run all arms in turns. Print the table, the machine, and one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="JSONL file of questions and answers")
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[30, 40, 60], help="training seconds of qa-cpu"
    )
    parser.add_argument(
        "--long_budgets", type=float, nargs="*", default=[300], help="training seconds of the wider qa-cpu"
    )
    parser.add_argument("--wide", type=int, default=192, help="n_embd for the long budgets")
    parser.add_argument("--peer_seconds", type=float, default=1200, help="training seconds of document")
    parser.add_argument("--slice", type=float, default=15, help="seconds of a turn")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the training")
    parser.add_argument("--peer_seeds", type=int, help="run document for so many of the seeds only")
    parser.add_argument("--split_seed", type=int, default=42)
    add_flags(parser)
    options = parser.parse_args()
    if options.toy:
        options.budgets, options.long_budgets, options.wide = [0.2, 1.0], [0.5], 48
        options.peer_seconds, options.slice = 1.0, 0.2
        options.seeds = options.seeds[:1]
    options.budgets = sorted(set(options.budgets))
    with tempfile.TemporaryDirectory() as folder:
        numbers = measure(options, Path(folder))
    shown = [(arm["arm"], f"{arm['seconds']:g}", shown_spread(arm["loss"])) for arm in numbers["summary"]]
    title = f"loss per answer character, median of the seeds (least to most); {len(options.seeds)} seeds"
    table(title, ("arm", "seconds", "loss"), shown, (1, 2))
    if numbers["ratio"]:
        print(
            "times as fast to document's last loss: {median} ({least} to {most})".format(**numbers["ratio"])
        )
    else:
        print("qa-cpu reaches document's last loss in none of the budgets")
    finish(numbers, options.output)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Split the data and build the arms; they take turns, seed by seed."""
    paths = {
        **prepared_data(options.data, folder, options.split_seed),
        "threads": options.threads,
        "device": "cpu",
    }
    if options.toy:
        paths |= {"n_layer": 1, "n_embd": 32, "n_head": 2}
    ours = dataclasses.replace(read_recipe("qa-cpu"), **paths)
    wide = dataclasses.replace(ours, n_embd=options.wide)
    # the tutorial's GPT, scaled down to 4.1 million parameters at 3,382 characters (`qa-cpu` has fewer)
    size = {"n_layer": 4, "n_embd": 256, "n_head": 4, "block_size": ours.block_size}
    if options.toy:
        size = {name: getattr(ours, name) for name in ("n_layer", "n_embd", "n_head", "block_size")}
    document = dataclasses.replace(read_recipe("document"), **{**paths, **size})
    data, textbook = read_data(ours), read_data(document)
    assert isinstance(data, RunData)
    assert isinstance(textbook, RunData)
    # both arms are evaluated on the same characters: those of `qa-cpu`, cut at its max_length
    textbook = dataclasses.replace(textbook, val=data.val)
    rows: list[dict[str, Any]] = []
    for number, seed in enumerate(options.seeds):
        arms = [
            run_of(config, data, seed, f"{name}, {budget:g} s", [budget])
            for name, config, budgets in (
                ("qa-cpu", ours, options.budgets),
                (wider(options), wide, options.long_budgets),
            )
            for budget in budgets
        ]
        if options.peer_seeds is None or number < options.peer_seeds:
            times = sorted({*options.budgets, *options.long_budgets, options.peer_seconds})
            times = [t for t in times if t <= options.peer_seconds]
            arms.append(run_of(document, textbook, seed, "document", times))
        rows += take_turns(arms, options.slice)
    return {
        **surroundings("chinese_qa", options.data, options.threads),
        "toy": options.toy,
        "seeds": options.seeds,
        "pairs": {"train": len(data.train), "val": len(data.val)},
        "parameters": ours.model_config(data.tokenizer.get_vocab_size()).parameter_count(),
        "wide_parameters": wide.model_config(data.tokenizer.get_vocab_size()).parameter_count(),
        "peer_parameters": document.model_config(data.tokenizer.get_vocab_size()).parameter_count(),
        **summary(rows, options),
        "rows": rows,
    }


def wider(options: argparse.Namespace) -> str:
    """Return the name of the recipe with a wider model."""
    return f"qa-cpu --n_embd {options.wide}"


def run_of(config: TrainConfig, data: RunData, seed: int, name: str, budgets: list[float]) -> Arm:
    """Make one arm of a seed."""
    return Arm(name, dataclasses.replace(config, seed=seed), data, budgets, seed=seed)


def summary(rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Return the losses over the seeds, and how many times faster `qa-cpu` is.

    Each seed is compared with the peer's run of the same seed, or if there is none, with the median of the
    peer's runs.
    """
    of_peer = [row for row in rows if row["arm"] == "document"]
    found: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        key = (row["arm"].split(",")[0], row["budget"])
        found.setdefault(key, []).append(row["answer_loss"])
    last = [row for row in of_peer if row["budget"] == options.peer_seconds]
    goals = {row["seed"]: row["answer_loss"] for row in last}
    usual = statistics.median(goals.values()) if goals else None
    reached = []
    for seed in options.seeds:
        runs = [
            (r["seconds"], r["answer_loss"]) for r in rows if r["seed"] == seed and r["arm"] != "document"
        ]
        goal = goals.get(seed, usual)
        if goal is not None and (seconds := first_to_reach(goal, runs)):
            reached.append(options.peer_seconds / seconds)
    return {
        "summary": [
            {"arm": arm, "seconds": seconds, "seeds": len(losses), "loss": spread(losses)}
            for (arm, seconds), losses in sorted(found.items(), key=lambda item: (item[0][1], item[0][0]))
        ],
        "ratio": spread(reached) if reached else None,
        "reached": len(reached),  # number of seeds that reached the loss
    }


if __name__ == "__main__":
    main()
