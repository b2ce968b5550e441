"""Finds the words in a row of tokens, so that training can mask whole words (--whole_words).

    words = WordFinder(tokenizer, "jieba")
    words.of(ids)                  # (T,): tokens of the same word have the same number

A token may hold only some bytes of a character, and a row may begin with such a token. So the places where
tokens and words begin are counted in bytes, not in characters. A token that contains the border of two words
belongs to the first word. A special token is a word of its own. `WordFinder` knows two kinds of words:

    tokenizer   With BPE, the words into which the tokenizer cuts a text before it merges: " hello", ",". All
                Chinese characters between two punctuation marks are one word. With WordPiece, a word is a
                token with the ## tokens after it, and each Chinese character is a word.
    jieba       Chinese words by the package rjieba (https://pypi.org/project/rjieba), an optional dependency
                that is jieba in Rust. White space belongs to the word after it.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from minigpt.errors import InputError
from minigpt.tokenization.subword import SubwordTokenizer
from minigpt.tokenization.wordpiece import WordPieceTokenizer
from minigpt.tokenizer import Tokenizer

__all__ = ["WordFinder"]

_SPECIAL = b"\n"  # stands for a special token, because no word contains a newline


class WordFinder:
    """Finds for each token the word to which it belongs.

    Args:
        tokenizer: the tokenizer of the ids.
        kind: "tokenizer" or "jieba", as described in the module's docstring.

    Raises:
        InputError: if kind is "tokenizer" and each token is a character; if kind is "jieba" without rjieba.
    """

    def __init__(self, tokenizer: Tokenizer | SubwordTokenizer, kind: Literal["tokenizer", "jieba"]) -> None:
        self._tokenizer = tokenizer
        self._starts: Callable[[str], list[int]]  # text -> indices of the characters at which words begin
        if kind == "jieba":
            self._starts = _jieba()
        elif isinstance(tokenizer, Tokenizer):
            raise InputError(
                "--whole_words tokenizer: a vocabulary of characters has no words; for Chinese words: "
                "--whole_words jieba"
            )
        elif isinstance(tokenizer, WordPieceTokenizer):
            self._starts = lambda text: [0, *(i for i, character in enumerate(text) if character == " ")]
        else:
            self._starts = tokenizer.word_starts
        self._joins_pieces = kind == "jieba" and isinstance(tokenizer, WordPieceTokenizer)

    def of(self, ids: Sequence[int]) -> npt.NDArray[np.int64]:
        """Return the number of each token's word, (T,), counted from 0."""
        pieces = [self._piece(index) for index in ids]
        is_special = np.array([piece == _SPECIAL for piece in pieces])
        # WordPiece puts a space before each word and each Chinese character. jieba needs Chinese text without
        # these spaces. So keep a space only if ASCII characters are on both sides.
        if self._joins_pieces:
            pieces = [
                piece[1:]
                if piece[:1] == b" " and not (piece[1:2] < b"\x80" and before[-1:] < b"\x80")
                else piece
                for before, piece in zip([b"\xff", *pieces], pieces)
            ]
        # The row may begin or end inside a character. Each of its bytes then becomes a lone surrogate.
        text = b"".join(pieces).decode("utf-8", "surrogateescape")
        widths = [1 if "\ud800" <= character <= "\udfff" else len(character.encode()) for character in text]
        text = "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in text)
        places = np.array([0, *accumulate(widths)])  # byte at which each character begins
        borders = places[sorted({0, *self._starts(text)})] if text else np.zeros(1, dtype=np.int64)
        begins = np.array([0, *accumulate(map(len, pieces))])[:-1]  # byte at which each token begins
        number = np.searchsorted(borders, begins, side="right")
        is_new = np.ones(len(pieces), dtype=np.bool_)
        is_new[1:] = (number[1:] != number[:-1]) | is_special[1:] | is_special[:-1]
        return np.cumsum(is_new) - 1

    def _piece(self, index: int) -> bytes:
        if isinstance(self._tokenizer, Tokenizer):
            word = self._tokenizer.id2word[index]
            return word.encode() if len(word) == 1 else _SPECIAL
        if index in self._tokenizer.special_ids:
            return _SPECIAL
        tokenizer: Any = self._tokenizer
        found: bytes = tokenizer.token_bytes(index)
        return found


def _jieba() -> Callable[[str], list[int]]:
    try:
        from rjieba import cut
    except ImportError:
        raise InputError(
            "--whole_words jieba needs the package rjieba: pip install 'minigpt[words]'"
        ) from None

    def starts(text: str) -> list[int]:
        found, place, after_space = list[int](), 0, False
        for word in cut(text):
            if not after_space:
                found.append(place)
            place, after_space = place + len(word), word.isspace()
        return found

    return starts
