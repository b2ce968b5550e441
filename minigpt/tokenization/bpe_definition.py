"""What decides the ids of a byte-level BPE tokenizer, and whether it holds together.

A definition is checked as a whole before it is used: the `tokenizers` library itself would drop text without
a word, or panic, on some damaged ones. Files are minigpt/tokenization/bpe_files.py's affair.
"""

import itertools
from dataclasses import dataclass
from typing import Any

from minigpt.errors import InputError

__all__ = ["BYTE_SYMBOLS", "NAMED", "Definition", "checked"]

NAMED = ("eos_token", "pad_token", "sep_token", "bos_token", "unk_token", "cls_token", "mask_token")
_UNKNOWN_FLAGS = ("single_word", "lstrip", "rstrip")  # of added tokens


def _byte_symbols() -> tuple[str, ...]:
    # GPT-2's trick: each byte is written as one printable character, so that a token is a readable word
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


BYTE_SYMBOLS = _byte_symbols()
"""How each byte is written in the files: `BYTE_SYMBOLS[32] == "Ġ"`."""


@dataclass(frozen=True)
class Definition:
    """Everything that decides a tokenizer's ids, and what is kept for writing it again."""

    vocab: dict[str, int]
    """token, in byte symbols -> id; GPT-2's holds its special token too"""
    merges: list[tuple[str, str]]
    """pairs of tokens that become one, the most urgent first"""
    special: dict[str, int]
    """the text of a special token -> id, in the order of the ids"""
    frame: dict[str, Any]
    """tokenizer.json without its vocabulary, merges and special tokens' ids"""
    config: dict[str, Any]
    """tokenizer_config.json: which token ends a text, the chat template, ..."""


def checked(definition: Definition, source: str) -> Definition:
    """The definition with its vocabulary in the order of the ids.

    Raises:
        InputError: if ids are no numbers, given twice or missing; a byte has no token; a merge names an
            unknown token; or text could become a special token.
    """
    vocab, special = definition.vocab, definition.special
    if not _is_sound(definition):
        _complain(definition, source)
    values = list(vocab.values())
    in_order = vocab if values == sorted(values) else dict(sorted(vocab.items(), key=lambda item: item[1]))
    pairs = [(first, second) for first, second in definition.merges]
    return Definition(in_order, pairs, special, definition.frame, definition.config)


def _is_sound(definition: Definition) -> bool:
    """Has `_complain` nothing to say? The same questions, put to whole sets: 100,000 entries take a while.

    What it finds too odd to ask, it leaves to `_complain`, too.
    """
    vocab, special, merges = definition.vocab, definition.special, definition.merges
    tokens = vocab | special
    plain = vocab.keys() - special.keys()
    try:
        return (
            {*map(type, vocab.values()), *map(type, special.values())} <= {int}
            and all(vocab.get(text, index) == index for text, index in special.items())
            and sorted(tokens.values()) == list(range(len(tokens)))
            and plain >= set(BYTE_SYMBOLS) >= set("".join(plain))
            and "" not in plain
            and all(token["content"].strip() for token in definition.frame["added_tokens"])
            and not any(token[flag] for token in definition.frame["added_tokens"] for flag in _UNKNOWN_FLAGS)
            and {*map(type, merges)} <= {list, tuple}
            and {*map(len, merges)} <= {2}
            and plain >= {*itertools.chain.from_iterable(merges)}
            and plain >= {*map("".join, merges)}
        )
    except TypeError:
        return False


def _complain(definition: Definition, source: str) -> None:
    """Go through all entries until the first that is wrong, and name it."""
    vocab, special = definition.vocab, definition.special
    for text, index in (*vocab.items(), *special.items()):
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise InputError(f"{source}: the id of {text!r} is {index!r}, not a whole number of at least 0")
        if special.get(text, index) != vocab.get(text, index):
            raise InputError(f"{source}: {text!r} has the ids {vocab[text]} and {special[text]}")
    tokens = vocab | special
    ordered = sorted(tokens, key=tokens.__getitem__)
    for number, text in enumerate(ordered):
        if tokens[text] < number:
            raise InputError(
                f"{source}: id {tokens[text]} is given twice, to {ordered[number - 1]!r} and {text!r}"
            )
        if tokens[text] > number:
            raise InputError(f"{source}: id {number} is missing among {len(tokens)} entries")
    symbols = set(BYTE_SYMBOLS)
    plain = vocab.keys() - special.keys()
    if missing := sorted(symbols - plain):
        raise InputError(
            f"{source}: byte {BYTE_SYMBOLS.index(missing[0])} ({missing[0]!r}) has no token of its own"
        )
    if wrong := [text for text in plain if not text or not symbols.issuperset(text)]:
        raise InputError(f"{source}: entry {min(wrong)!r} is not written in the symbols that stand for bytes")
    for token in definition.frame["added_tokens"]:
        if not token["content"].strip():
            raise InputError(f"{source}: the added token {token['content']!r} is plain text")
        for flag in _UNKNOWN_FLAGS:
            if token[flag]:
                raise InputError(
                    f"{source}: the added token {token['content']!r} has {flag}, which is not known here"
                )
    for number, pair in enumerate(definition.merges, 1):
        if (
            not isinstance(pair, list | tuple)
            or len(pair) != 2
            or not all(isinstance(part, str) for part in pair)
        ):
            raise InputError(f"{source}: merge {number} is {pair!r}, not two tokens")
        for part in (*pair, "".join(pair)):
            if part not in plain:
                what = "a special token" if part in special else "not in the vocabulary"
                raise InputError(f"{source}: merge {number}, {' '.join(pair)!r}: {part!r} is {what}")
