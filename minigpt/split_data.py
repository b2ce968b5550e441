"""Split a file of questions and answers into train.jsonl and val.jsonl.

    python ./minigpt/split_data.py --input ./data/data.jsonl --train_ratio 0.8
    minigpt split --input data/data.jsonl --train_ratio 0.8

No question is in both files, and repeated pairs are dropped. The files keep the input's records and their
order (training shuffles anyway). split.json, in the same folder, records the result. The input is not
changed.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: put the parent folder into sys.path, so that `import minigpt` works
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minigpt.console import command_line
from minigpt.console.language import say, translated
from minigpt.data.field_names import DataOptions

if TYPE_CHECKING:
    from minigpt.data.conversation import Conversation
    from minigpt.data.reader import ReadReport


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions, command_line.CommandOptions):
    """Split a file into train.jsonl and val.jsonl; no question is in both."""

    RANGES = {"train_ratio": (1e-6, 0.999999), "seed": (0, 2**63 - 1)}

    input: Path = Path("data/data.jsonl")
    """questions and answers, or conversations: JSON Lines, JSON, CSV, Excel or Parquet"""
    train_ratio: float = 0.9
    """share of the pairs that go into train.jsonl, between 0 and 1"""
    seed: int = 42
    """another seed gives another split"""
    output_dir: Path | None = None
    """folder for train.jsonl, val.jsonl and split.json; default: the folder of the input"""


def main(options: Options) -> dict[str, Any]:
    """Read the data, split it, write both files, print a summary."""
    from minigpt.data.reader import read_conversations

    conversations, report = read_conversations(
        options.input, options.strict, options.encoding, options.field_names
    )
    report.print_summary()
    return divide(options, conversations, report)


def divide(options: Options, conversations: "list[Conversation]", report: "ReadReport") -> dict[str, Any]:
    """Split the conversations, write train.jsonl, val.jsonl and split.json, and print a summary."""
    from minigpt.console.terminal import shortened
    from minigpt.data.reader import ReadReport
    from minigpt.data.split import split_conversations, write_split

    split = split_conversations(conversations, options.train_ratio, options.seed)
    folder = options.input.parent if options.output_dir is None else options.output_dir
    manifest = write_split(split, report, folder, train_ratio=options.train_ratio, seed=options.seed)
    if split.dropped:
        text = "dropped as repeated: {count:,} of {counted} ({share:.1%})"
        share = len(split.dropped) / len(conversations)
        print(say(text, count=len(split.dropped), counted=report.counted, share=share))
        for each, first in split.dropped[:3]:
            values = {"line": each.line, "first": first.line, "question": shortened(each.question)}
            print(say("  line {line} repeats line {first}: {question}", **values))
    if split.grouped:
        text = "questions with several answers, each kept on one side: {count:,}, with {pairs:,} pairs"
        print(say(text, count=len(split.grouped), pairs=sum(map(len, split.grouped))))
        for group in split.grouped[:3]:
            lines = ", ".join(str(each.line) for each in group[:5]) + (", ..." if len(group) > 5 else "")
            print(say("  lines {lines}: {question}", lines=lines, question=shortened(group[0].question)))
    total = len(split.train) + len(split.val)
    for name, side in (("train.jsonl", split.train), ("val.jsonl", split.val)):
        answers = sum(len(each.exchanges) for each in side)
        counted = ReadReport(folder / name, conversations=len(side), answers=answers).counted
        print(f"{folder / name}: {translated(counted)} ({len(side) / total:.2%})")
    if split.on_both_sides:
        (exchange, times), count = split.on_both_sides[0], len(split.on_both_sides)
        text = (
            "still on both sides, since very many conversations share them: {count:,} questions with the "
            "same answers, the most frequent in {times:,} conversations of val.jsonl: {question}"
        )
        if count == 1:
            text = (
                "still on both sides, since very many conversations share it: 1 question with the same "
                "answers, in {times:,} conversations of val.jsonl: {question}"
            )
        print(say(text, count=count, times=times, question=shortened(exchange.question)))
    return {**manifest, "output_dir": str(folder)}


if __name__ == "__main__":
    command_line.run(Options, main)
