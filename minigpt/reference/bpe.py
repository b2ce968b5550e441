"""Byte-level BPE in plain Python: learning a vocabulary, and encoding text. The code is written for reading.

    tokens, merges = train(["low lower lowest"], vocab_size=260)
    ids = encode("lowest", tokens, merges)
    text = b"".join(tokens[i] for i in ids).decode()

Learning: split the texts into words, and the words into bytes. Find the most frequent pair of neighbours, and
join it into one token everywhere. Repeat this until the vocabulary is large enough. Encoding: split the text
in the same way, and repeat the joins in the order in which they were learned.

See Sennrich et al., https://arxiv.org/abs/1508.07909. Section 2.2 of GPT-2's paper uses bytes instead of
characters. minigpt/tokenization/bpe.py gives the same merges and ids, but faster.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise

__all__ = ["encode", "split", "train"]

Pair = tuple[bytes, bytes]

# The first 256 ids are the bytes in GPT-2's order: printable bytes first. The order matters, because the pair
# with the lower ids wins if two pairs are equally frequent.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = [bytes([byte]) for byte in (*_PRINTABLE, *sorted({*range(256)} - {*_PRINTABLE}))]

_CONTRACTION = re.compile("'(?:s|t|re|ve|m|ll|d)")
# A word as a regular expression over kinds of characters. Each kind has one sign: "L" letter, "N" number,
# "_" space, "S" other white space, "O" any other character.
_WORD = re.compile(r"_?L+|_?N+|_?O+|[_S]+(?=[_S]|$)|[_S]")


def _kind(character: str) -> str:
    if character == " ":
        return "_"
    # Python counts \x1c to \x1f as white space, but Unicode and GPT-2's pattern do not.
    if character.isspace() and character not in "\x1c\x1d\x1e\x1f":
        return "S"
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "O"


def split(text: str) -> Iterator[str]:
    """Split text into GPT-2's words. A space belongs to the word after it. No token spans two words.

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
    """Learn a vocabulary. Returns its tokens, in the order of their ids, and the pairs to join.

    The pairs are in the order in which they were learned. Encoding joins them in this order.

    Args:
        texts: the texts to learn from.
        vocab_size: number of tokens, the 256 bytes included.
        min_frequency: least number of times that a pair must occur to be joined.
        longest_word: while learning, a longer word is cut into pieces of this number of characters.
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
        # take the most frequent pair; in a tie, the pair with the lowest ids
        best = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]), default=None)
        if best is None or pairs[best] < min_frequency:
            break
        merges.append(best)
        # two different pairs can give the same token, which is added only once
        if (new := best[0] + best[1]) not in ids:
            ids[new] = len(tokens)
            tokens.append(new)
        words = {word: _join(parts, best) for word, parts in words.items()}
    return tokens, merges


def _join(parts: list[bytes], pair: Pair) -> list[bytes]:
    """Join each occurrence of the pair, from left to right."""
    joined: list[bytes] = []
    i = 0
    while i < len(parts):
        found = tuple(parts[i : i + 2]) == pair
        joined.append(pair[0] + pair[1] if found else parts[i])
        i += 1 + found
    return joined


def encode(text: str, tokens: list[bytes], merges: list[Pair]) -> list[int]:
    """Return the ids of a text. Within each word, the pair that was learned first is joined first."""
    ids = {token: i for i, token in enumerate(tokens)}
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    result: list[int] = []
    for word in split(text):
        parts = [bytes([byte]) for byte in word.encode()]
        while known := [pair for pair in pairwise(parts) if pair in ranks]:
            parts = _join(parts, min(known, key=ranks.__getitem__))
        result += [ids[part] for part in parts]
    return result
