"""Classifiers on a CPU, beside TF-IDF of characters with logistic regression, on three sets of texts.

    python benchmarks/classification.py --data FOLDER --output benchmarks/results/NAME.json
    python benchmarks/classification.py --data FOLDER --sets sms_spam --arms pretrained --seeds 42
    python benchmarks/classification.py --data FOLDER --baseline_python /path/to/python
    python benchmarks/classification.py --toy                        # seconds; a set of its own

The arms: `pretrained` is `minigpt finetune --task classification` without other options, which first trains a
language model on the texts of the training part; `scratch` trains this language model for one step only, to
show the effect of pretraining; `adamw` uses the recipe for published models with a higher rate. Time is the
time of all training. The test part is measured once with the checkpoint of the lowest validation loss, and
once with the last one. The baseline (1 to 2 characters, C=10) needs a Python with scikit-learn, which may be
another Python than this; without `--baseline_python` it is left out. The last line is JSON.
"""

import sys
from pathlib import Path

# run as a script: this checkout's minigpt, and the file beside this one
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import os
import subprocess
import tempfile
import time
from typing import Any

from benchmarks.turns import add_flags, finish, surroundings
from minigpt.console.terminal import table

ROOT = Path(__file__).resolve().parents[1]
SETS = {  # training part, validation part (none: a part of training is held out), test part
    "chnsenticorp": ("train.csv", "dev.csv", "test.csv"),
    "thucnews_titles": ("dev.txt", "", "test.txt"),
    "sms_spam": ("train.csv", "", "test.csv"),
}
TOY = ("--max_steps", "20")
ARMS: dict[str, list[str]] = {
    "pretrained": [],
    "scratch": ["--pretraining_epochs", "0.001"],
    "adamw": ["--recipe", "classification", "--learning_rate", "1e-3"],
}
BASELINE = """
import json, sys
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
train, test = json.load(sys.stdin)
model = make_pipeline(TfidfVectorizer(analyzer="char", ngram_range=(1, 2), sublinear_tf=True),
                      LogisticRegression(C=10, max_iter=300))
model.fit(*zip(*train))
texts, labels = zip(*test)
print(json.dumps({"accuracy": model.score(texts, labels),
                  "macro_f1": f1_score(labels, model.predict(texts), average="macro")}))
"""


def main() -> None:
    """Train and measure every arm on every set, and print the table and one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of the sets, each a folder")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=[*SETS])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--work", type=Path, default=Path("classification-runs"), help="folder of the runs")
    parser.add_argument("--baseline_python", type=Path, help="a Python with scikit-learn")
    parser.add_argument(
        "--flags", nargs=argparse.REMAINDER, default=[], help="more flags of minigpt finetune"
    )
    add_flags(parser)
    options = parser.parse_args()
    if options.data is None and not options.toy:
        parser.error("--data FOLDER is needed without --toy")
    with tempfile.TemporaryDirectory() as folder:
        if options.toy:
            write_toy(Path(folder) / "data" / "sms_spam")
            options.data, options.work = Path(folder) / "data", Path(folder) / "runs"
            options.sets, options.arms, options.flags = ["sms_spam"], ["scratch"], [*TOY, *options.flags]
        results = measure(options)
    rows = [
        [
            each["set"],
            each["arm"],
            each.get("seed", ""),
            *(f"{each[key]:.4f}" if key in each else "" for key in SHOWN),
            f"{each['seconds']:.0f}" if "seconds" in each else "",
        ]
        for each in results
    ]
    table("test part", ("set", "arm", "seed", *SHOWN, "seconds"), rows, range(2, 4 + len(SHOWN)))
    where = surroundings("classification", None, options.threads)
    finish({**where, "toy": options.toy, "flags": [*options.flags], "results": results}, options.output)


def write_toy(folder: Path) -> None:
    """Write texts with two labels in the files of a set, to check that the script runs."""
    folder.mkdir(parents=True)
    for name, first in (("train", 0), ("test", 60)):
        numbers = range(first, first + 60)
        rows = [f"win a prize {n},spam" if n % 2 else f"see you {n},ham" for n in numbers]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every arm on every set, and the baseline if its Python is given."""
    results: list[dict[str, Any]] = []
    for name in options.sets:
        if options.baseline_python is not None:
            results.append({"set": name, "arm": "tf-idf", **baseline(options, name)})
        for arm in options.arms:
            for seed in options.seeds:
                result = {"set": name, "arm": arm, "seed": seed, **run(options, name, arm, seed)}
                results.append(result)
                print(json.dumps(result), flush=True)
    return results


SHOWN = ("accuracy", "macro_f1", "calibration_error", "accuracy_of_last")


def files_of(options: argparse.Namespace, name: str) -> tuple[Path, Path | None, Path]:
    """Return the paths of the training, validation and test part of a set."""
    train, val, test = SETS[name]
    folder = options.data / name
    return folder / train, folder / val if val else None, folder / test


def baseline(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Measure TF-IDF with logistic regression on a set."""
    from minigpt.data.labelled import LabelledOptions, read_labelled

    train, _, test = files_of(options, name)
    parts = [
        [(each.text, (each.labels or ("",))[0]) for each in read_labelled(path, LabelledOptions())[0]]
        for path in (train, test)
    ]
    began = time.monotonic()
    done = subprocess.run(
        [options.baseline_python, "-c", BASELINE], input=json.dumps(parts), text=True, capture_output=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    return {**json.loads(done.stdout), "seconds": time.monotonic() - began}


def run(options: argparse.Namespace, name: str, arm: str, seed: int) -> dict[str, Any]:
    """Train one classifier and measure it on the test part."""
    train, val, test = files_of(options, name)
    output = options.work / f"{name}-{arm}-{seed}"
    flags: list[Any] = ["--task", "classification", "--train_data", train, "--output", output]
    flags += ["--seed", seed, "--threads", options.threads, "--overwrite", "--report_to", "none"]
    flags += ["--val_data", val] if val else []
    began = time.monotonic()
    trained = command("finetune", *flags, *ARMS[arm], *options.flags)
    seconds = time.monotonic() - began
    measured = {
        which: command(
            "classify",
            *("--model", output / which, "--file", test, "--output", output / f"{which}.jsonl"),
            *("--threads", options.threads, "--show", 0),
        )
        for which in ("best", "last")
    }
    keys = ("accuracy", "macro_f1", "calibration_error", "loss")
    return {
        **{key: measured["best"][key] for key in keys},
        "accuracy_of_last": measured["last"]["accuracy"],
        "val_accuracy": trained["accuracy"],
        "best_step": trained["best_step"],
        "steps": trained["steps"],
        "seconds": seconds,
    }


def command(verb: str, *flags: object) -> dict[str, Any]:
    """Run a command of minigpt; returns what its --json prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "minigpt", verb, *map(str, flags), "--json"]
    done = subprocess.run(words, env=environment, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(f"minigpt {verb} ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
