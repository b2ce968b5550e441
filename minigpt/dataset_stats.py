"""Print statistics of a file of questions and answers: lengths in tokens, and pairs that training would cut.

    python ./minigpt/dataset_stats.py --train_data ./data/train.jsonl --vocab_path ./data/vocab.json
    minigpt stats --max_length 256 --plot stats.png

The data is not changed. `--plot` needs: pip install 'minigpt[plot]'.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: put the parent folder into sys.path, so that `import minigpt` works
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass
from typing import Any

from minigpt.console import command_line
from minigpt.console.language import say
from minigpt.data.field_names import DataOptions


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions, command_line.CommandOptions):
    """Print token lengths, what a max_length would cut, unknown characters, repeated questions."""

    RANGES = {"max_length": (1, 10**6)}

    train_data: Path = Path("data/train.jsonl")
    """questions and answers, or conversations: JSON Lines, JSON, CSV, Excel or Parquet"""
    vocab_path: Path = Path("data/vocab.json")
    """vocabulary file, made by `minigpt vocab`"""
    max_length: int = 128
    """most tokens of a pair that you plan to train with; 64, 128, 256 and 512 are always shown"""
    brief: bool = False
    """print three lines instead of the tables"""
    plot: Path | None = None
    """also write a picture to this .png, .pdf or .svg file"""


def main(options: Options) -> dict[str, Any]:
    """Read the file, count, print, and draw."""
    from minigpt.console.fonts import require_plotting
    from minigpt.data.reader import read_conversations
    from minigpt.data.token_statistics import (
        compute_statistics,
        plot,
        print_brief,
        print_statistics,
    )
    from minigpt.tokenizer import Tokenizer

    if options.plot is not None:
        require_plotting()
    tokenizer = Tokenizer(options.vocab_path)
    conversations, report = read_conversations(
        options.train_data, options.strict, options.encoding, options.field_names
    )
    report.print_summary()
    statistics = compute_statistics(conversations, tokenizer, options.max_length)
    text = "{data}: {counted}; {vocab}: {size:,} entries"
    values = {"data": options.train_data, "counted": report.counted, "vocab": options.vocab_path}
    print(say(text, **values, size=statistics.vocab_size))
    (print_brief if options.brief else print_statistics)(statistics)
    if options.plot is not None:
        plot(statistics, options.plot, title=options.train_data.name)
        print(say("picture: {path}", path=options.plot))
    return {"read": report.as_dict(), **statistics.as_dict()}


if __name__ == "__main__":
    command_line.run(Options, main)
