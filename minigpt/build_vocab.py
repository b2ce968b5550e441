"""Build a vocabulary from questions and answers, or from plain text: of characters, or of byte-level tokens.

    python ./minigpt/build_vocab.py --data ./data/data.jsonl --output ./data/vocab.json
    minigpt vocab --data data/data.jsonl --output data/vocab.json
    minigpt vocab --data book.txt --kind bpe --vocab_size 6400 --output bpe

`char` gives every character an id, however rare, in a vocab.json. `bpe` learns tokens of several characters
(minigpt/tokenization/bpe.py) and writes a folder with a tokenizer.json.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: Python put this folder first, where our names would shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from minigpt.console import command_line
from minigpt.errors import InputError

if TYPE_CHECKING:
    from minigpt.data.reader import ReadReport


@dataclass(frozen=True, kw_only=True)
class Options(command_line.CommandOptions):
    """Build a vocabulary: one token a character, or byte-level tokens of several characters."""

    RANGES = {"vocab_size": (1, 10**6)}

    data: Path = Path("data/data.jsonl")
    """JSONL file, one {"question", "answer"} object a line; or a .txt or .md file, or a folder of these"""
    output: Path = Path("data/vocab.json")
    """the vocabulary to write (bpe: a folder); an existing one is replaced"""
    kind: Literal["char", "bpe"] = "char"
    """char: one token a character; bpe: tokens of several characters, learned from the data"""
    vocab_size: int = 6400
    """entries of a bpe vocabulary at most, the special ones included; char has as many as it needs"""
    strict: bool = False
    """stop at the first bad line instead of skipping it"""


def main(options: Options) -> dict[str, Any]:
    """Read the texts, collect their characters or learn their tokens, write the vocabulary."""
    from minigpt.tokenizer import SPECIAL_TOKENS, Tokenizer, build_vocabulary

    texts, described, report = _read(options)
    if options.output.exists() and options.output.samefile(options.data):
        raise InputError(f"{options.output} is the data and would be overwritten; change --output")
    if options.kind == "bpe":
        result = _learn(options, texts, described)
    else:
        tokenizer = Tokenizer.from_word2id(build_vocabulary(texts))
        tokenizer.save(options.output)
        size = tokenizer.get_vocab_size()
        print(
            f"{options.output}: {size:,} entries, {len(SPECIAL_TOKENS)} special ones and "
            f"{size - len(SPECIAL_TOKENS):,} characters from {described}"
        )
        result = {"output": options.output, "vocab_size": size, "fingerprint": tokenizer.fingerprint}
    return result if report is None else {**result, "read": report.as_dict()}


def _read(options: Options) -> tuple[Iterable[str], str, "ReadReport | None"]:
    """The texts, their origin in words, and what was skipped. Plain text is read while it is used."""
    from minigpt.data.reader import read_pairs

    if options.data.is_dir() or options.data.suffix in (".txt", ".md"):
        from minigpt.data.corpus import find_sources, read_texts

        count = len(find_sources(options.data))
        described = f"{count:,} files in {options.data}" if options.data.is_dir() else str(options.data)
        return read_texts(options.data, options.strict), described, None
    pairs, report = read_pairs(options.data, strict=options.strict)
    report.print_summary()
    texts = [text for pair in pairs for text in (pair.question, pair.answer)]
    return texts, f"{len(pairs):,} pairs", report


def _learn(options: Options, texts: Iterable[str], described: str) -> dict[str, Any]:
    from minigpt.tokenization.bpe import BpeTokenizer

    if options.output.is_file() or options.output.suffix == ".json":
        raise InputError(
            f"--kind bpe writes a folder with a tokenizer.json, not {options.output}; give --output FOLDER"
        )
    try:
        tokenizer = BpeTokenizer.train(texts, options.vocab_size)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"--{error}") from None
    tokenizer.save(options.output)
    size, special = tokenizer.get_vocab_size(), len(tokenizer.special_ids)
    print(f"{options.output}: {size:,} byte-level tokens, {special} special ones, from {described}")
    return {"output": options.output, "vocab_size": size, "fingerprint": tokenizer.fingerprint}


if __name__ == "__main__":
    command_line.run(Options, main)
