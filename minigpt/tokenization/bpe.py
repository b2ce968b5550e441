"""Byte-level byte-pair encoding: GPT-2's tokenizer, Qwen's, or one trained on your own texts.

    >>> tokenizer = BpeTokenizer.train(["low lower lowest", "new newer newest"] * 2, vocab_size=265)
    >>> ids = tokenizer.encode_text("lowest 你")
    >>> [tokenizer.token_bytes(index) for index in ids[:3]]
    [b'lo', b'we', b'st']
    >>> tokenizer.decode(ids)
    'lowest 你'

A text is UTF-8 bytes, so that no character is unknown; frequent neighbours are merged into longer tokens
(https://aclanthology.org/P16-1162, and section 2.2 of GPT-2's paper). The `tokenizers` library does the
merging; minigpt/reference/bpe.py does the same in plain Python, to be read.

Text never becomes a special token: the library is not told about them, so there is no switch that could be
set wrong. Damaged files are refused when they are read (minigpt/tokenization/bpe_files.py).
"""

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
    """Text <-> ids of byte-level tokens. Make one with `from_folder` or `train`.

    Bytes that are no UTF-8 become U+FFFD when ids are decoded.
    """

    def __init__(self, definition: Definition) -> None:
        super().__init__(definition)
        lacking = [byte for byte, symbol in enumerate(BYTE_SYMBOLS) if symbol not in definition.vocab]
        self._lacking = frozenset(lacking)  # bytes without a token: the trainer had not seen them
        self._drops = bool(lacking) and definition.frame["model"].get("unk_token") is None

    @classmethod
    def from_folder(
        cls, path: str | Path, kind: str | None = None, whole: dict[str, Any] | None = None
    ) -> "BpeTokenizer":
        """The tokenizer of a model's folder, in any of the layouts of minigpt/tokenization/bpe_files.py.

        Args:
            kind: how text is cut into words, "gpt2" or "qwen2"; needed only where no file says it.
            whole: what tokenizer.json holds, where it was parsed already: it is megabytes.

        Raises:
            InputError: naming the file, what is wrong with it, and what to do.
        """
        definition = read_folder(Path(path), kind, whole)
        try:
            tokenizer = cls(definition)
            tokenizer._encoding("a 1")  # some damage only shows in use
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
        """Learn merges from texts. The same texts, in any order, give the same tokenizer.

        Ids 0, 1, 2 are `<pad>`, `<|endoftext|>`, `<sep>`; then `special_tokens`, the 256 bytes, the merges.

        Args:
            vocab_size: entries in all; fewer are made if the texts have no more pairs to merge.
            kind: how text is cut into words: "gpt2", which keeps every text, or "qwen2", which composes
                accents (NFC) and takes numbers digit by digit.
            special_tokens: more of them, such as `<|im_start|>`.
            min_frequency: how often a pair must stand in the texts to be merged.
            on_progress: called ten times a second with the stage (1: reading, 2: merging) and how far it is.

        Raises:
            ValueError: if vocab_size is too small for the bytes and special tokens, or kind is unknown.
            InputError: for half a character (a lone surrogate) in a text, or a special token that is none.
        """
        return cls(learn(texts, vocab_size, kind, special_tokens, min_frequency, on_progress))

    @cached_property
    def _bytes(self) -> "_Bytes":
        return _Bytes(self._definition, self._text_of)

    def _require_all_read(self, text: str, ids: list[int]) -> None:
        """The library leaves out bytes that have no token."""
        if self._drops and (unknown := self.unknown_characters(text)):
            raise InputError(f"the tokenizer has no tokens for the bytes of {''.join(unknown[:5])!r}")

    def unknown_characters(self, text: str) -> list[str]:
        """The distinct characters that cannot be encoded: halves of characters (lone surrogates), and those
        whose bytes have no token. [] for nearly every tokenizer and text."""
        if self._lacking:
            for word in self._definition.words:
                text = text.replace(word, "")
            if self._library.normalizer is not None:
                text = self._library.normalizer.normalize_str(text)
        return [
            character
            for character in dict.fromkeys(text)
            if "\ud800" <= character <= "\udfff" or not self._lacking.isdisjoint(character.encode())
        ]

    def _joined(self, ids: list[int]) -> str:
        return b"".join(map(self._bytes.__getitem__, ids)).decode("utf-8", "replace")

    def token_bytes(self, index: SupportsIndex) -> bytes:
        """The bytes of one token: often only part of a character. Raises ValueError as `decode`."""
        return self._bytes[self._checked_id(index, "")]


class _Bytes(dict[int, bytes]):
    """id -> a token's bytes, made when they are first asked for: the first answer needs few of 100,000."""

    _byte_of: ClassVar = {ord(symbol): byte for byte, symbol in enumerate(BYTE_SYMBOLS)}

    def __init__(self, definition: Definition, text_of: dict[int, str]) -> None:
        self._tokens = text_of
        for token, index in (definition.special | definition.words).items():
            self[index] = token.encode("utf-8", "replace")

    def __missing__(self, index: int) -> bytes:
        token = self._tokens.get(index, "")  # "": an id that the vocabulary leaves out
        if self._byte_of.keys() >= set(map(ord, token)):
            found = token.translate(self._byte_of).encode("latin-1")
        else:  # not in byte symbols: no text becomes it, and it stands for itself
            found = token.encode("utf-8", "replace")
        self[index] = found
        return found
