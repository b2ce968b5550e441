"""Build vocab.json: every character of a JSONL file of questions and answers gets an id.

    python ./minigpt/build_vocab.py --data ./data/data.jsonl --output ./data/vocab.json
    minigpt vocab --data data/data.jsonl --output data/vocab.json

It does not learn sub-words, and leaves out no character however rare.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: Python put this folder first, where our names would shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass
from typing import Any

from minigpt import command_line


@dataclass(frozen=True, kw_only=True)
class Options(command_line.DoorOptions):
    """Build vocab.json: one token per character of the questions and answers."""

    data: Path = Path("data/data.jsonl")
    """JSONL file, one {"question", "answer"} object a line"""
    output: Path = Path("data/vocab.json")
    """the vocabulary to write; an existing one is replaced"""
    strict: bool = False
    """stop at the first bad line instead of skipping it"""


def main(options: Options) -> dict[str, Any]:
    """Read the pairs, collect their characters, write the vocabulary."""
    from minigpt.data.reader import read_pairs
    from minigpt.tokenizer import SPECIAL_TOKENS, Tokenizer, build_vocabulary

    pairs, report = read_pairs(options.data, strict=options.strict)
    report.print_summary()
    if options.output.exists() and options.output.samefile(options.data):
        raise command_line.InputError(
            f"{options.output} is the data and would be overwritten; change --output"
        )
    tokenizer = Tokenizer.from_word2id(
        build_vocabulary(text for pair in pairs for text in (pair.question, pair.answer))
    )
    tokenizer.save(options.output)
    size = tokenizer.get_vocab_size()
    print(
        f"{options.output}: {size:,} entries, {len(SPECIAL_TOKENS)} special ones and "
        f"{size - len(SPECIAL_TOKENS):,} characters from {len(pairs):,} pairs"
    )
    return {
        "output": options.output,
        "vocab_size": size,
        "fingerprint": tokenizer.fingerprint,
        "read": report.as_dict(),
    }


if __name__ == "__main__":
    command_line.run(Options, main)
