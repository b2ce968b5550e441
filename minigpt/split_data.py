"""Split a JSONL file of questions and answers into train.jsonl and val.jsonl.

    python ./minigpt/split_data.py --input ./data/data.jsonl --train_ratio 0.8
    minigpt split --input data/data.jsonl --train_ratio 0.8

No question stands in both files; repeated pairs are dropped. The files keep the input's lines byte for byte
and in its order (training shuffles them itself). split.json beside them records what was done. The input is
not changed.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: Python put this folder first, where our names would shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass
from typing import Any

from minigpt.console import command_line
from minigpt.errors import printable


@dataclass(frozen=True, kw_only=True)
class Options(command_line.CommandOptions):
    """Split a JSONL file into train.jsonl and val.jsonl; no question is in both."""

    RANGES = {"seed": (0, 2**63 - 1)}

    input: Path = Path("data/data.jsonl")
    """JSONL file, one {"question", "answer"} object a line"""
    train_ratio: float = 0.9
    """share of the pairs for train.jsonl, between 0 and 1"""
    seed: int = 42
    """decides the split: another seed, another split"""
    output_dir: Path | None = None
    """folder for train.jsonl, val.jsonl and split.json; by default the input's"""
    strict: bool = False
    """stop at the first bad line instead of skipping it"""


def main(options: Options) -> dict[str, Any]:
    """Read, split, write, print what was found."""
    from minigpt.data.reader import read_pairs
    from minigpt.data.split import split_pairs, write_split

    pairs, report = read_pairs(options.input, strict=options.strict)
    report.print_summary()
    split = split_pairs(pairs, options.train_ratio, options.seed)
    folder = options.input.parent if options.output_dir is None else options.output_dir
    manifest = write_split(split, report, folder, train_ratio=options.train_ratio, seed=options.seed)
    if split.dropped:
        print(
            f"dropped as repeated: {len(split.dropped):,} of {len(pairs):,} pairs "
            f"({len(split.dropped) / len(pairs):.1%})"
        )
        for pair, first in split.dropped[:3]:
            print(f"  line {pair.line} repeats line {first.line}: {_short(pair.question)}")
    if split.grouped:
        print(
            f"questions with several answers, each kept on one side: {len(split.grouped):,}, "
            f"with {sum(map(len, split.grouped)):,} pairs"
        )
        for group in split.grouped[:3]:
            lines = ", ".join(str(pair.line) for pair in group[:5]) + (", ..." if len(group) > 5 else "")
            print(f"  lines {lines}: {_short(group[0].question)}")
    total = len(split.train) + len(split.val)
    for name, side in (("train.jsonl", split.train), ("val.jsonl", split.val)):
        print(f"{folder / name}: {len(side):,} pairs ({len(side) / total:.2%})")
    return {**manifest, "output_dir": str(folder)}


def _short(question: str) -> str:
    line = printable(question)
    return line if len(line) <= 40 else f"{line[:39]}…"


if __name__ == "__main__":
    command_line.run(Options, main)
