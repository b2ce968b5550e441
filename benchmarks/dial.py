"""The law of the loss behind `minigpt train --size`: small runs on several corpora, and the fit.

    python benchmarks/dial.py --text input.txt songci.txt --output benchmarks/results/NAME.json
    python benchmarks/dial.py --qa QA.jsonl OTHER.jsonl --tokens 100000 400000 --shapes 2x64 4x128
    python benchmarks/dial.py --rows benchmarks/results/NAME.json           # only fit again

Each run is one shape and one number of tokens, with the recipe's rates and its schedule fitted to them
(`shakespeare-cpu` for text, `qa-cpu` for questions and answers, the family that --size takes). Its loss on
the validation part (about 50,000 tokens of it) is put on a scale from floor * the loss of counted n-grams
(0) to the loss of counted single tokens (1), and

    a (1e6 / N)^alpha + b (1e6 V^gamma / D)^beta

is fitted to all runs of a kind, N being the weights of the blocks, V the entries of the vocabulary and D
the tokens read, repeated ones counted as `sizing.worth` does. Printed are the law and its settings as
`minigpt/training/sizing.py` holds them, and two errors: the law's on the runs that it was fitted to, and on
each corpus that of a law that was fitted to the others alone. For a new corpus trust the second.
"""

import sys
from pathlib import Path

# run as a script: this checkout's minigpt, and the file beside this one
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import dataclasses
import itertools
import json
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.turns import prepared_data, surroundings
from minigpt.console.terminal import table
from minigpt.evaluation.loss import evaluate_loss
from minigpt.training.config import FOREIGN_KNOBS, TrainConfig, read_recipe
from minigpt.training.loop import Trainer
from minigpt.training.measuring import LAW_RECIPES, Machine, facts_of, law_settings
from minigpt.training.run_data import read_data
from minigpt.training.sizing import Facts, Kind, Law, Shape, heads, worth

_EXPONENTS = np.round(np.arange(0.1, 1.05, 0.1), 2)
# Short runs do not show where the loss ends. On tinyshakespeare nanoGPT's 1.47
# (https://github.com/karpathy/nanoGPT) is 0.86 of the n-grams' loss; a floor much below it would promise what
# nobody has seen.
_FLOORS = np.round(np.arange(0.7, 1.01, 0.05), 2)
_GAMMAS = np.round(np.arange(0.0, 1.01, 0.25), 2)


def main() -> None:
    """Run, fit, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="plain text files")
    parser.add_argument("--qa", type=Path, nargs="*", default=[], help="JSONL files of questions and answers")
    parser.add_argument("--rows", type=Path, nargs="*", default=[], help="results of earlier runs, to add")
    parser.add_argument("--shapes", nargs="+", default=["2x64", "3x96", "4x128", "4x256"])
    parser.add_argument("--tokens", type=float, nargs="+", default=[1e5, 3e5, 1e6, 3e6])
    parser.add_argument("--most_gflop", type=float, default=5000, help="of a run; larger ones are left out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="also write the JSON object here")
    options = parser.parse_args()
    rows = [row for path in options.rows for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    with tempfile.TemporaryDirectory() as folder:
        for number, path in enumerate([*options.text, *options.qa]):
            rows += measure(path, path in options.text, Path(folder) / str(number), options)
    laws = {kind: fitted(rows, kind) for kind in ("text", "answers") if any(r["kind"] == kind for r in rows)}
    for kind, (law, per_corpus) in laws.items():
        mine = [row for row in rows if row["kind"] == kind]
        shown = [
            (*(row[k] for k in ("corpus", "shape", "tokens", "loss")), f"{_predicted(law, row):.3f}")
            for row in mine
        ]
        table(f"{kind}: loss and law", ("corpus", "shape", "tokens", "loss", "law"), shown, (2, 3, 4))
        print(f'    "{kind}": {law},  # LAWS')
        print(f'    "{kind}": {mine[-1]["settings"]},  # LAW_SETTINGS')
        for corpus, error in per_corpus.items():
            print(f"    {corpus}, from the others' law: mean error {error:.1%}")
    numbers = {
        **surroundings("dial", Path("several/corpora"), options.threads),
        "laws": {kind: dataclasses.asdict(law) for kind, (law, _) in laws.items()},
        "errors_on_a_new_corpus": {kind: errors for kind, (_, errors) in laws.items()},
        "rows": rows,
    }
    print(json.dumps(numbers, ensure_ascii=False), flush=True)
    if options.output:
        options.output.write_text(json.dumps(numbers, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def measure(path: Path, is_text: bool, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs on a corpus that do not take more arithmetic than allowed."""
    folder.mkdir()
    kind: Kind = "text" if is_text else "answers"
    values: dict[str, Any] = {"text": path} if is_text else prepared_data(path, folder, 42)
    values |= {**FOREIGN_KNOBS["qwen3"], "family": "qwen3", "output": folder / "run"}
    base = dataclasses.replace(
        read_recipe(LAW_RECIPES[kind]), **values, threads=options.threads, device="cpu"
    )
    data = read_data(base)
    facts = facts_of(base, data)
    machine = Machine(base, data)
    rows = []
    for text, tokens in itertools.product(options.shapes, options.tokens):
        layers, channels = map(int, text.split("x"))
        shape = Shape(layers, channels, heads(channels))
        cost = machine.counted(shape)
        steps = max(1, round(tokens / facts.tokens_per_step))
        if steps * cost.step > options.most_gflop * 1e9 or steps > facts.epochs * facts.steps_per_epoch:
            continue
        seconds, loss = trained(
            dataclasses.replace(
                base,
                **dataclasses.asdict(shape),
                max_steps=steps,
                warmup_steps=min(base.warmup_steps, -(-steps // 10)),
            ),
            data,
        )
        row = {"kind": kind, "corpus": f"{path.parent.name}/{path.name}", "shape": text}
        row |= {"parameters": cost.parameters, "tokens": round(steps * facts.tokens_per_step)}
        row |= {"unique": facts.unique, "yardstick": round(facts.yardstick, 4)}
        row |= {"unigram": round(facts.unigram, 4), "vocab_size": facts.vocab_size}
        row |= {"settings": law_settings(base)}
        rows.append({**row, "steps": steps, "loss": round(loss, 4), "seconds": round(seconds, 1)})
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def trained(config: TrainConfig, data: Any) -> tuple[float, float]:
    """A run from beginning to end: its seconds, and the loss on some fifty thousand tokens."""
    trainer = Trainer(config, data)
    began = time.perf_counter()
    while trainer.progress.steps_done < trainer.step.total_steps:
        trainer.step()
    seconds = time.perf_counter() - began
    batches = list(data.val.in_order(32))
    tokens = sum(int(batch.token_mask.sum()) for batch in batches)
    every = max(1, round(tokens / 50_000))  # over all lengths: they come in order
    report = evaluate_loss(trainer.model, batches[every // 2 :: every])
    return seconds, (report.answer if config.loss_on == "answer" else report.all).loss


def fitted(rows: Sequence[dict[str, Any]], kind: str) -> tuple[Law, dict[str, float]]:
    """The law of a kind, and its mean relative error on each corpus when fitted to the others."""
    mine = [row for row in rows if row["kind"] == kind]
    corpora = sorted({row["corpus"] for row in mine})
    per_corpus = {}
    for corpus in corpora if len(corpora) > 1 else ():
        law = fit([row for row in mine if row["corpus"] != corpus])
        errors = [abs(_predicted(law, r) / r["loss"] - 1) for r in mine if r["corpus"] == corpus]
        per_corpus[corpus] = float(np.mean(errors))
    return fit(mine), per_corpus


def _facts(row: dict[str, Any]) -> Facts:
    return Facts(
        kind=row["kind"],
        unique=row["unique"],
        steps_per_epoch=1.0,
        tokens_per_step=1.0,
        vocab_size=row["vocab_size"],
        yardstick=row["yardstick"],
        unigram=row["unigram"],
        epochs=1.0,
    )


def _predicted(law: Law, row: dict[str, Any]) -> float:
    return law.loss(_facts(row), row["parameters"], row["tokens"])


def fit(rows: Sequence[dict[str, Any]]) -> Law:
    """Least squares of the relative error; a and b, not below 0, solved for, the rest from grids."""
    loss, yardstick, unigram, N, V = (
        np.array([row[key] for row in rows], dtype=float)
        for key in ("loss", "yardstick", "unigram", "parameters", "vocab_size")
    )
    D = np.array([worth(row["tokens"], row["unique"]) for row in rows])
    best: tuple[float, tuple[float, ...]] = (np.inf, ())
    for floor in _FLOORS:
        lowest = floor * yardstick
        weight = (unigram - lowest) / loss  # of the share that is left, in relative errors of the loss
        goal = (loss - lowest) / loss
        for alpha, beta, gamma in itertools.product(_EXPONENTS, _EXPONENTS, _GAMMAS):
            terms = weight * np.stack([(1e6 / N) ** alpha, (1e6 * V**gamma / D) ** beta])
            squares, values = _not_negative(terms, goal)
            if squares < best[0] - 1e-12:
                best = squares, (float(floor), *values, float(alpha), float(beta), float(gamma))
    floor, a, b, alpha, beta, gamma = best[1]
    law = Law(
        floor=round(floor, 2),
        a=round(a, 5),
        alpha=round(alpha, 2),
        b=round(b, 5),
        beta=round(beta, 2),
        gamma=round(gamma, 2),
        error=0.0,
        parameters=(float(N.min()), float(N.max())),
        tokens=(float(round(D.min())), float(round(D.max()))),
        regularity=_bounds([row["yardstick"] / row["unigram"] for row in rows]),
    )
    off = [abs(_predicted(law, row) / row["loss"] - 1) for row in rows]
    return dataclasses.replace(law, error=round(float(np.quantile(off, 0.9)), 3))


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    return round(min(values), 3), round(max(values), 3)


def _not_negative(terms: Any, goal: Any) -> tuple[float, tuple[float, ...]]:
    """Two coefficients of at least 0 with their sum of terms nearest to the goal: both, or one alone."""
    best: tuple[float, tuple[float, ...]] = (np.inf, ())
    for chosen in ([0, 1], [0], [1]):
        solved = np.zeros(2)
        some = terms[chosen]
        gram = some @ some.T
        if np.linalg.matrix_rank(gram) < len(chosen):
            continue
        solved[chosen] = np.linalg.solve(gram, some @ goal)
        squares = float(((solved @ terms - goal) ** 2).sum())
        if (solved >= 0).all() and squares < best[0]:
            best = squares, tuple(float(value) for value in solved)
    return best


if __name__ == "__main__":
    main()
