"""Build a vocabulary of characters or of byte-level BPE tokens, from questions and answers or plain text.

    python ./minigpt/build_vocab.py --data ./data/data.jsonl --output ./data/vocab.json
    minigpt vocab --data data/data.jsonl --output data/vocab.json
    minigpt vocab --data book.txt --kind bpe --vocab_size 6400 --output bpe

`char` gives every character an id, even a rare one, and writes a vocab.json. `bpe` learns tokens of several
characters (minigpt/tokenization/bpe.py), and writes a folder with a tokenizer.json.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: put the parent folder into sys.path, so that `import minigpt` works
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from minigpt.console import command_line
from minigpt.console.language import say
from minigpt.data.field_names import DataOptions
from minigpt.errors import InputError, Message

if TYPE_CHECKING:
    from minigpt.data.corpus import Recognised
    from minigpt.data.reader import ReadReport


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions, command_line.CommandOptions):
    """Build a vocabulary: one token per character, or byte-level tokens of several characters."""

    RANGES = {"vocab_size": (1, 10**6)}

    data: Path = Path("data/data.jsonl")
    """questions and answers, conversations, or texts, in any supported format; or a folder of texts"""
    output: Path = Path("data/vocab.json")
    """vocabulary file to write (bpe: a folder); an existing one is replaced"""
    kind: Literal["char", "bpe"] = "char"
    """char: one token per character; bpe: tokens of several characters, learned from the data"""
    vocab_size: int = 6400
    """most entries of a bpe vocabulary, special tokens included; char has as many as it needs"""
    text_field: str = ""
    """field of a record that holds the text; default: a usual name such as text, or the longest field"""


def main(options: Options) -> dict[str, Any]:
    """Read the texts, collect their characters or learn tokens, write the vocabulary."""
    texts, described, report = _read(options)
    result = build(options, texts, described)
    return result if report is None else {**result, "read": report.as_dict()}


def build(options: Options, texts: Iterable[str], described: str) -> dict[str, Any]:
    """Build the vocabulary of texts, write it, and print its size.

    Args:
        described: where the texts come from, in words, for the printed line.
    """
    from minigpt.tokenizer import SPECIAL_TOKENS, Tokenizer, build_vocabulary

    if options.output.exists() and options.output.samefile(options.data):
        raise InputError(f"{options.output} is the data and would be overwritten; change --output")
    if options.kind == "bpe":
        return _learn(options, texts, described)
    tokenizer = Tokenizer.from_word2id(build_vocabulary(texts))
    tokenizer.save(options.output)
    size = tokenizer.get_vocab_size()
    text = "{path}: {size:,} entries, {special} special ones and {count:,} characters from {source}"
    values = {"path": options.output, "size": size, "special": len(SPECIAL_TOKENS)}
    print(say(text, **values, count=size - len(SPECIAL_TOKENS), source=described))
    return {"output": options.output, "vocab_size": size, "fingerprint": tokenizer.fingerprint}


def recognised(options: Options) -> "Recognised":
    """Find out whether the data holds texts or conversations. Raises InputError for other data."""
    from minigpt.data.corpus import Recognised, TextOptions, recognise

    if options.data.is_dir():
        return Recognised(True)
    # A pipe can be read only once, so its content is not examined here: a pipe must hold conversations.
    if not options.data.is_file():
        return Recognised(False)
    reading = TextOptions(encoding=options.encoding, text_field=options.text_field)
    return recognise(options.data, reading, options.field_names)


def _read(options: Options) -> tuple[Iterable[str], str, "ReadReport | None"]:
    """Return the texts, a description of their source, and a report on skipped records (None for plain text).

    Plain text is not read here, but piece by piece when the texts are iterated.
    """
    from minigpt.data.corpus import TextOptions, find_sources, read_sources
    from minigpt.data.reader import read_conversations

    is_text, opened = recognised(options)
    if is_text:
        reading = TextOptions(encoding=options.encoding, text_field=options.text_field)
        sources = find_sources(options.data, reading)
        described = str(options.data)
        if options.data.is_dir():
            described = Message("{count:,} files in {path}", count=len(sources), path=options.data)
        return read_sources(sources, options.strict, options=reading, opened=opened), described, None
    conversations, report = read_conversations(
        options.data, options.strict, options.encoding, options.field_names, opened
    )
    report.print_summary()
    texts = [text for conversation in conversations for text in conversation.texts()]
    return texts, report.counted, report


def _learn(options: Options, texts: Iterable[str], described: str) -> dict[str, Any]:
    from minigpt.console.terminal import ProgressLine
    from minigpt.tokenization.bpe import BpeTokenizer

    if options.output.is_file() or options.output.suffix == ".json":
        raise InputError(
            f"--kind bpe writes a folder with a tokenizer.json, not {options.output}; give --output FOLDER"
        )
    try:
        with ProgressLine("vocabulary, stage", total=2, patience=2.0) as progress:
            tokenizer = BpeTokenizer.train(texts, options.vocab_size, on_progress=progress.update)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"--{error}") from None
    tokenizer.save(options.output)
    size, special = tokenizer.get_vocab_size(), len(tokenizer.special_ids)
    text = "{path}: {size:,} byte-level tokens, {special} special ones, from {source}"
    print(say(text, path=options.output, size=size, special=special, source=described))
    return {"output": options.output, "vocab_size": size, "fingerprint": tokenizer.fingerprint}


if __name__ == "__main__":
    command_line.run(Options, main)
