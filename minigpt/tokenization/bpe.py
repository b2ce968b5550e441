"""Byte-level byte-pair encoding (BPE): GPT-2's tokenizer, Qwen's, or your own.

    >>> tokenizer = BpeTokenizer.train(["low lower lowest", "new newer newest"] * 2, vocab_size=265)
    >>> ids = tokenizer.encode_text("lowest 你")
    >>> [tokenizer.token_bytes(index) for index in ids[:3]]
    [b'lo', b'we', b'st']
    >>> tokenizer.decode(ids)
    'lowest 你'

A text is a sequence of UTF-8 bytes, so no character is unknown. Frequent pairs of neighbours are merged into
longer tokens (https://aclanthology.org/P16-1162, and section 2.2 of GPT-2's paper). The `tokenizers` library
does the merging; minigpt/reference/bpe.py does the same in plain Python, for reading.

If a text contains the characters of a special token, such as <sep>, they do not become that token, because
`tokenizers` is not given the special tokens. Damaged files are refused when they are read (bpe_files.py).
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, SupportsIndex

from minigpt.errors import InputError
from minigpt.tokenization.bpe_files import read_folder
from minigpt.tokenization.bpe_training import learn
from minigpt.tokenization.definition import BYTE_SYMBOLS, Definition
from minigpt.tokenization.subword import SubwordTokenizer

__all__ = ["BpeTokenizer"]


class BpeTokenizer(SubwordTokenizer):
    """Converts text to ids of byte-level tokens and back. Make one with `from_folder` or `train`.

    Decoding turns bytes that are not valid UTF-8 into U+FFFD.
    """

    def __init__(self, definition: Definition) -> None:
        super().__init__(definition)
        lacking = [byte for byte, symbol in enumerate(BYTE_SYMBOLS) if symbol not in definition.vocab]
        self._lacking = frozenset(lacking)  # bytes for which the vocabulary has no token
        self._drops = bool(lacking) and definition.frame["model"].get("unk_token") is None

    @classmethod
    def from_folder(
        cls, path: str | Path, kind: str | None = None, whole: dict[str, Any] | None = None
    ) -> "BpeTokenizer":
        """Read the tokenizer of a model folder. minigpt/tokenization/bpe_files.py lists the possible layouts.

        Args:
            path: the folder.
            kind: rule for splitting text into words, "gpt2" or "qwen2". None: the files define it. A
                tokenizer.json has priority over `kind`.
            whole: the parsed tokenizer.json, if the caller has it (parsing megabytes takes time).

        Raises:
            InputError: if a file is missing or wrong; the message names the file and what to do.
        """
        definition = read_folder(Path(path), kind, whole)
        try:
            tokenizer = cls(definition)
            tokenizer._encoding("a 1")  # some damaged files give an error only when a text is encoded
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        return tokenizer

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        kind: str = "gpt2",
        special_tokens: Sequence[str] = (),
        min_frequency: int = 2,
        on_progress: Callable[[int, str], None] = lambda stage, text: None,
    ) -> "BpeTokenizer":
        """Learn a vocabulary from texts. The same texts, in any order, give the same tokenizer.

        Ids 0, 1, 2 are `<pad>`, `<|endoftext|>`, `<sep>`. Then come the `special_tokens`, then one token for
        each of the 256 bytes, and then the results of the merges.

        Args:
            texts: the texts to learn from.
            vocab_size: number of tokens; there are fewer if the texts have no more pairs to merge.
            kind: rule for splitting text into words. "gpt2" changes no text. "qwen2" composes accents (NFC)
                and splits numbers into digits.
            special_tokens: further special tokens, such as `<|im_start|>`.
            min_frequency: least number of times that a pair must occur to be merged.
            on_progress: a function that is called ten times per second with the stage (1: reading, 2:
                merging) and a text.

        Raises:
            ValueError: if vocab_size is too small for bytes and special tokens, or kind is unknown.
            InputError: for a lone surrogate (half a character) in a text, or an invalid special token.
        """
        return cls(learn(texts, vocab_size, kind, special_tokens, min_frequency, on_progress))

    @cached_property
    def _bytes(self) -> "_Bytes":
        return _Bytes(self._definition, self._text_of)

    def _require_all_read(self, text: str, ids: list[int]) -> None:
        """Raise InputError if the text has bytes without a token: `tokenizers` would leave these out."""
        if self._drops and (unknown := self.unknown_characters(text)):
            raise InputError(f"the tokenizer has no tokens for the bytes of {''.join(unknown[:5])!r}")

    def unknown_characters(self, text: str) -> list[str]:
        """Return the distinct characters of a text that cannot be encoded; [] for nearly every text.

        These are lone surrogates (halves of characters) and characters with a byte that has no token.
        """
        if self._lacking:
            for word in self._definition.words:
                text = text.replace(word, "")
            text = self._normalized(text)
        return [
            character
            for character in dict.fromkeys(text)
            if "\ud800" <= character <= "\udfff" or not self._lacking.isdisjoint(character.encode())
        ]

    def merge_steps(self, text: str) -> list[tuple[str, list[list[bytes]]]]:
        """Return (word, steps) for each word of a text.

        The first step is the list of the word's bytes. Each later step is the list of the word's
        parts after one more merge.

        The `tokenizers` library does the same merges in the same order, but does not show the steps.
        """
        ranks = {pair: rank for rank, pair in enumerate(self._definition.merges)}
        text = self._normalized(text)
        found = []
        for word, (start, end) in self._words(text):
            parts = list(word)
            steps = [parts]
            if self._definition.frame["model"].get("ignore_merges") and word in self._definition.vocab:
                steps += [parts := [word]] if len(parts) > 1 else []
            while known := [pair for pair in itertools.pairwise(parts) if pair in ranks]:
                best, joined = min(known, key=ranks.__getitem__), list[str]()
                for part in parts:
                    if joined and (joined[-1], part) == best:
                        joined[-1] += part
                    else:
                        joined.append(part)
                parts = joined
                steps.append(parts)
            of = _Bytes._byte_of
            found.append((text[start:end], [[p.translate(of).encode("latin-1") for p in s] for s in steps]))
        return found

    def _joined(self, ids: list[int]) -> str:
        return b"".join(map(self._bytes.__getitem__, ids)).decode("utf-8", "replace")

    def token_bytes(self, index: SupportsIndex) -> bytes:
        """Return the bytes of one token. They are often only a part of a character.

        Raises:
            ValueError: for an id outside the vocabulary.
        """
        return self._bytes[self._checked_id(index, "")]


class _Bytes(dict[int, bytes]):
    """A dict: id -> bytes of the token. An entry is computed on first use, because a text needs few."""

    _byte_of: ClassVar = {ord(symbol): byte for byte, symbol in enumerate(BYTE_SYMBOLS)}

    def __init__(self, definition: Definition, text_of: dict[int, str]) -> None:
        self._tokens = text_of
        for token, index in (definition.special | definition.words).items():
            self[index] = token.encode("utf-8", "replace")

    def __missing__(self, index: int) -> bytes:
        token = self._tokens.get(index, "")  # "": the vocabulary has no token with this id
        if self._byte_of.keys() >= set(map(ord, token)):
            found = token.translate(self._byte_of).encode("latin-1")
        # Otherwise a character of the token stands for no byte. Use the token's text, encoded as UTF-8.
        else:
            found = token.encode("utf-8", "replace")
        self[index] = found
        return found
