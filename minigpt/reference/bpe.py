"""Byte-level BPE in plain Python: how a vocabulary is learned, and how text becomes ids. Made to be read.

    tokens, merges = train(["low lower lowest"], vocab_size=260)
    ids = encode("lowest", tokens, merges)
    text = b"".join(tokens[i] for i in ids).decode()

Learning: split the texts into words, the words into bytes; join the most frequent pair of neighbours into
one token, everywhere; repeat. Encoding: split the text in the same way, and repeat the joins in the order in
which they were learned. Sennrich et al., https://arxiv.org/abs/1508.07909; bytes in place of characters:
section 2.2 of GPT-2's paper. minigpt/tokenization/bpe.py gives the same merges and ids, in less time.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise

__all__ = ["encode", "split", "train"]

Pair = tuple[bytes, bytes]

# GPT-2's order of the bytes: those that can be printed first. Of equally frequent pairs the order decides.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = [bytes([byte]) for byte in (*_PRINTABLE, *sorted({*range(256)} - {*_PRINTABLE}))]

_CONTRACTION = re.compile("'(?:s|t|re|ve|m|ll|d)")
# Over kinds of characters: L letter, N number, _ a space, S other white space, O everything else
_WORD = re.compile(r"_?L+|_?N+|_?O+|[_S]+(?=[_S]|$)|[_S]")


def _kind(character: str) -> str:
    if character == " ":
        return "_"
    if (
        character.isspace() and character not in "\x1c\x1d\x1e\x1f"
    ):  # which Unicode does not count as white space
        return "S"
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "O"


def split(text: str) -> Iterator[str]:
    """GPT-2's words: one space belongs to the word behind it. No token reaches across two words.

    >>> list(split("it's 2024,  so"))
    ['it', "'s", ' 2024', ',', ' ', ' so']
    """
    kinds = "".join(map(_kind, text))
    start = 0
    while start < len(text):
        match = _CONTRACTION.match(text, start) or _WORD.match(kinds, start)
        assert match is not None
        yield text[start : match.end()]
        start = match.end()


def train(
    texts: Iterable[str], vocab_size: int, min_frequency: int = 2, longest_word: int = 64
) -> tuple[list[bytes], list[Pair]]:
    """All tokens, a token's id being its place; and the pairs that were joined, in order.

    Args:
        vocab_size: tokens in all, the 256 bytes included.
        min_frequency: how often a pair must occur.
        longest_word: characters; longer ones are cut, for learning only.
    """
    counts = Counter[str]()
    for text in texts:
        for word in split(text):
            counts.update(word[i : i + longest_word] for i in range(0, len(word), longest_word))
    words = {word: [bytes([byte]) for byte in word.encode()] for word in counts}
    tokens, merges = list(_BYTES), list[Pair]()
    ids = {token: i for i, token in enumerate(tokens)}
    while len(tokens) < vocab_size:
        pairs = Counter[Pair]()
        for word, parts in words.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        # the most frequent pair; of equals the one whose tokens have the lowest ids
        best = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]), default=None)
        if best is None or pairs[best] < min_frequency:
            break
        merges.append(best)
        if (new := best[0] + best[1]) not in ids:  # it may have been made before of other parts
            ids[new] = len(tokens)
            tokens.append(new)
        words = {word: _join(parts, best) for word, parts in words.items()}
    return tokens, merges


def _join(parts: list[bytes], pair: Pair) -> list[bytes]:
    """Each occurrence of the pair becomes one part, from the left."""
    joined: list[bytes] = []
    i = 0
    while i < len(parts):
        found = tuple(parts[i : i + 2]) == pair
        joined.append(pair[0] + pair[1] if found else parts[i])
        i += 1 + found
    return joined


def encode(text: str, tokens: list[bytes], merges: list[Pair]) -> list[int]:
    """The ids of a text: of a word's pairs, the one that was learned first is joined first."""
    ids = {token: i for i, token in enumerate(tokens)}
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    result: list[int] = []
    for word in split(text):
        parts = [bytes([byte]) for byte in word.encode()]
        while known := [pair for pair in pairwise(parts) if pair in ranks]:
            parts = _join(parts, min(known, key=ranks.__getitem__))
        result += [ids[part] for part in parts]
    return result
