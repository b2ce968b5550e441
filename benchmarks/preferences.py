"""Learning from preferences: how often a small model learns to prefer the better answer, and what it costs.

    python benchmarks/preferences.py --data qa.jsonl --pairs preferences.jsonl --output NAME.json
    python benchmarks/preferences.py --data data/data.jsonl --toy

A model of the size of `qa-cpu` learns the questions and answers of `--data` for `--epochs_before` epochs.
From there, `minigpt finetune --task dpo` learns the pairs, once for each seed. The seed also decides which 30
% of the prompts are held out. Numbers of each run on the held-out pairs:

- `accuracy`: the share of pairs whose chosen answer has gained more log-probability than the rejected one
  since
  the first step. Guessing gives one half. `longer` is the share whose chosen answer is the longer one (after
  cutting), which is the accuracy of preferring long answers;
- `chosen_loss`, before and after: nats per token of the chosen answers. It should not rise;
- `margin`: the mean gain of the chosen answer over the rejected one, times beta.

All numbers are those of the checkpoint with the lowest loss. The last line is JSON.
"""

import sys
from pathlib import Path

# run as a script: this checkout's minigpt, and the file beside this one
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import tempfile
from typing import Any

from benchmarks.turns import add_flags, finish, shown_spread, spread, surroundings
from minigpt.console.terminal import table
from minigpt.data.preferences import EncodedPreferences, read_preferences
from minigpt.data.reader import read_conversations
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.training.finetune_config import FinetuneConfig
from minigpt.training.resolve import resolve
from minigpt.training.run import finetune, train
from minigpt.training.run_data import read_data

HELD_OUT = 0.3
TOY: dict[str, Any] = {"n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 63, "max_length": 64}


def main() -> None:
    """Train the base model and a run from it for each seed. Print the table and one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="questions and answers")
    parser.add_argument("--pairs", type=Path, help="two answers to each prompt; needed without --toy")
    parser.add_argument("--epochs_before", type=float, default=3.0)
    parser.add_argument("--method", default="full", choices=("full", "freeze", "lora"))
    parser.add_argument("--learning_rate", type=float, help="else the default of --task dpo")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--base", type=Path, help="folder of a model to begin with instead of training one")
    add_flags(parser)
    flags = parser.parse_args()
    if flags.pairs is None and not flags.toy:
        parser.error("--pairs FILE is needed without --toy")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        pairs = flags.pairs or toy_pairs(flags.data[0], work)
        base = flags.base or make_base(flags, pairs, work)
        runs = [measure(flags, base, pairs, work, seed) for seed in flags.seeds]
    names = ("accuracy", "longer", "margin", "chosen_loss_before", "chosen_loss", "seconds")
    summary = {name: spread([run[name] for run in runs]) for name in names}
    table("on held-out pairs", ("", "median (least to most)"), [(n, shown_spread(summary[n])) for n in names])
    where = surroundings("preferences", flags.pairs, flags.threads)
    settings = {"method": flags.method, "beta": flags.beta, "epochs": flags.epochs}
    finish({**where, **settings, "summary": summary, "runs": runs}, flags.output)


def toy_pairs(data: Path, work: Path) -> Path:
    """Write pairs from answers of some questions: the whole answer, and only its beginning."""
    found, _ = read_conversations(data)
    rows = [{"prompt": c.question, "chosen": c.answer, "rejected": c.answer[:1]} for c in found[:24]]
    path = work / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_base(flags: argparse.Namespace, pairs: Path, work: Path) -> Path:
    """Train a model on the questions and answers. Its vocabulary includes the pairs' characters."""
    found = [each for path in flags.data for each in read_conversations(path)[0]]
    texts = [text for each in found for text in each.texts()]
    texts += [text for each in read_preferences(pairs)[0] for c in each[:2] for text in c.texts()]
    Tokenizer.from_word2id(build_vocabulary(texts)).save(work / "vocab.json")
    for name, part in (("train", found[len(found) // 20 :]), ("val", found[: len(found) // 20 + 1])):
        lines = [json.dumps({"messages": each.messages()}) + "\n" for each in part]
        (work / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    result = train(
        recipe="qa-cpu", train_data=work / "train.jsonl", val_data=work / "val.jsonl", loss_on="all",
        vocab_path=work / "vocab.json", output=work / "base", threads=flags.threads, device="cpu",
        num_train_epochs=flags.epochs_before, report_to="none", precision="float32",
        **(TOY if flags.toy else {}),
    )  # fmt: skip
    return Path(result["model"])


def measure(flags: argparse.Namespace, base: Path, pairs: Path, work: Path, seed: int) -> dict[str, Any]:
    """Do the run of one seed. Return the numbers of its best checkpoint."""
    options: dict[str, Any] = {
        "task": "dpo", "method": flags.method, "model": base, "train_data": pairs, "seed": seed,
        "val_fraction": HELD_OUT, "beta": flags.beta, "num_train_epochs": flags.epochs, "device": "cpu",
        "output": work / f"seed-{seed}", "threads": flags.threads, "report_to": "none",
        "precision": "float32",
        **({"train_only": "last:1"} if flags.method == "freeze" else {}),
        **({"learning_rate": flags.learning_rate} if flags.learning_rate else {}),
    }  # fmt: skip
    val = read_data(resolve(options, FinetuneConfig)).val
    assert isinstance(val, EncodedPreferences)
    lengths = val.examples.lengths
    result = finetune(**options)
    lines = (options["output"] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    curve = [row for row in map(json.loads, lines) if "val_loss" in row]
    run = {
        "seed": seed,
        "pairs": len(val),
        "accuracy": result["rewards/accuracies"],
        "longer": float((lengths[::2] > lengths[1::2]).mean() + (lengths[::2] == lengths[1::2]).mean() / 2),
        "margin": result["rewards/margins"],
        "chosen_loss_before": curve[0]["val_chosen_loss"],
        "chosen_loss": result["val_chosen_loss"],
        "steps": result["best_step"],
        "seconds": result["seconds"],
        "curve": curve,
    }
    print({name: value for name, value in run.items() if name != "curve"}, flush=True)
    return run


if __name__ == "__main__":
    main()
