"""The command line of the survival tests; tests/survival/__init__.py describes it."""

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from minigpt.console.terminal import table
from tests import survival
from tests.survival.bad_numbers import numbers, order
from tests.survival.bench import Bench, Table
from tests.survival.corpus import corpus
from tests.survival.cost import cost
from tests.survival.damage import damage, disk
from tests.survival.finetuning import finetuning
from tests.survival.interruptions import kill, signals
from tests.survival.several import processes, sharded

PARTS: dict[str, Callable[[Bench], None]] = {
    "kill": kill,
    "signal": signals,
    "finetune": finetuning,
    "damage": damage,
    "disk": disk,
    "numbers": numbers,
    "order": order,
    "processes": processes,
    "sharded": sharded,
    "corpus": corpus,
    "cost": cost,
}
COUNTS = {  # name -> number of trials or amount of data, for --toy and for --full
    "kills": (10, 500),
    "signals": (16, 200),
    "flips": (1000, 1000),
    "bad_steps": (50, 100),
    "resumes": (1000, 1000),
    "lost": (2, 20),  # number of kills in runs of several processes
    "steps": (20, 60),  # number of steps of the disturbed run
    "short_steps": (6, 60),  # the same for fine-tuning and for several processes
    "gigabytes": (0.02, 5.0),  # amount of text
    "bpe_gigabytes": (0.001, 0.5),  # amount of text for byte-pair encoding
    "sampled": (100_000, 2_000_000),  # characters that byte-pair encoding learns its vocabulary from
    "megabytes": (16, 1024),  # size of the checkpoint that is verified
}


def main() -> None:
    """Run the parts, print the table and one JSON object."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.survival",
        description=survival.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--toy", action="store_true", help="small counts (the default)")
    size.add_argument("--full", action="store_true", help="large counts, and every point everywhere")
    for name, (toy, full) in COUNTS.items():
        parser.add_argument(f"--{name}", type=type(full), help=f"{toy} with --toy, {full} with --full")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--demo", action="store_true", help="also train the demo, for the share of its time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="of the part corpus; 0: one a core")
    parser.add_argument("--folder", type=Path, help="where to work: on the disk that is to be examined")
    parser.add_argument("--output", type=Path, help="write the JSON object here, after each row")
    options = parser.parse_args()
    for name, (toy, full) in COUNTS.items():
        if getattr(options, name) is None:
            setattr(options, name, full if options.full else toy)
    results = Table(options.output, "full" if options.full else "toy", options.seed)
    gc.freeze()  # so that garbage collection does not copy the memory that children share
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:  # the folder must be on the tested disk
        bench = Bench(Path(folder), options, results)
        for part in options.only:
            PARTS[part](bench)
            results.ended(part)
    shown = [[row["part"], row["what"], row["trials"], row["held"]] for row in results.new]
    table("what was promised, and what held", ("part", "promise", "trials", "held"), shown, numeric=(2, 3))
    print(json.dumps(results.numbers(), ensure_ascii=False), flush=True)
    sys.exit(any(row["held"] != row["trials"] for row in results.new))


if __name__ == "__main__":
    main()
