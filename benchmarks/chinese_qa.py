"""Chinese questions and answers on a CPU: the recipe `qa-cpu` beside the tutorial's loop, at one model size.

    python benchmarks/chinese_qa.py --data QA.jsonl --output benchmarks/results/NAME.json
    python benchmarks/chinese_qa.py --data data/data.jsonl --budgets 2 4 --slice 1      # toy size

Each budget is a training time in seconds. `qa-cpu` is run once for each budget, its cosine fitted to it; the
`document` arm (AdamW, 1e-4 constant, batch 32, padded to 128, loss on all positions, dropout 0.1) has no
schedule and is one run, measured at every budget. All arms take turns of `--slice` seconds on the same
threads, so that a busy neighbour slows all of them alike. Time counts steps only, not evaluation. Printed is
the loss per answer character (its closing <sep> counts as one) over the whole validation part.
"""

import sys
from pathlib import Path

# run as a script: this checkout's minigpt, and the file beside this one
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import dataclasses
import json
import tempfile
from typing import Any

from benchmarks.turns import Arm, prepared_data, surroundings, take_turns
from minigpt.terminal import table
from minigpt.training.config import read_recipe
from minigpt.training.run_data import RunData, read_data


def main() -> None:
    """Run all arms in turns and print the table, the machine, and one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="JSONL file of questions and answers")
    parser.add_argument("--budgets", type=float, nargs="+", default=[60, 180, 600], help="training seconds")
    parser.add_argument("--slice", type=float, default=15, help="seconds of a turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=42, help="of the split and of the training")
    parser.add_argument("--output", type=Path, help="also write the JSON object here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        numbers = measure(options, Path(folder))
    columns = ("arm", "seconds", "steps", "tokens", "answer_loss")
    table(
        "loss per answer character",
        columns,
        [[row[c] for c in columns] for row in numbers["rows"]],
        (1, 2, 3, 4),
    )
    print(json.dumps(numbers, ensure_ascii=False), flush=True)  # first: the file may be refused
    if options.output:
        options.output.write_text(json.dumps(numbers, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Split the data, build the arms, let them take turns."""
    paths = {
        **prepared_data(options.data, folder, options.seed),
        "threads": options.threads,
        "seed": options.seed,
        "device": "cpu",
    }
    ours = dataclasses.replace(read_recipe("qa-cpu"), **paths)
    size = {name: getattr(ours, name) for name in ("n_layer", "n_embd", "n_head", "block_size")}
    document = dataclasses.replace(read_recipe("document"), **paths, **size)
    budgets = sorted(options.budgets)
    data = read_data(ours)
    assert isinstance(data, RunData)
    arms = [Arm(f"qa-cpu, {budget:g} s", ours, data, [budget]) for budget in budgets]
    arms.append(Arm("document", document, read_data(document), budgets))
    # both arms are measured on the same characters: what `qa-cpu` reads, uncut at its max_length
    peer = arms[-1].trainer
    assert isinstance(peer.data, RunData)
    peer.data = dataclasses.replace(peer.data, val=data.val)
    rows = take_turns(arms, options.slice)
    return {
        **surroundings("chinese_qa", options.data, options.threads),
        "pairs": {"train": len(data.train), "val": len(data.val)},
        "parameters": ours.model_config(data.tokenizer.get_vocab_size()).parameter_count(),
        "rows": rows,
    }


if __name__ == "__main__":
    main()
