"""Byte-level byte-pair encoding (BPE): GPT-2's tokenizer, Qwen's, or one trained on your own texts.

    >>> tokenizer = BpeTokenizer.train(["low lower lowest", "new newer newest"] * 2, vocab_size=265)
    >>> ids = tokenizer.encode_text("lowest 你")
    >>> [tokenizer.token_bytes(index) for index in ids[:3]]
    [b'lo', b'we', b'st']
    >>> tokenizer.decode(ids)
    'lowest 你'

A text is a sequence of UTF-8 bytes, so no character is unknown. Frequent pairs of neighbours are merged into
longer tokens (https://aclanthology.org/P16-1162, and section 2.2 of GPT-2's paper). The `tokenizers` library
does the merging; minigpt/reference/bpe.py does the same in plain Python, for reading.

The text of a special token never becomes that token: the library does not know the special tokens, so no
setting can be wrong. Damaged files are refused when they are read (minigpt/tokenization/bpe_files.py).
"""

import dataclasses
import functools
import hashlib
import json
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, SupportsIndex

import numpy as np
import numpy.typing as npt

from minigpt.errors import InputError
from minigpt.tokenization.bpe_files import BYTE_SYMBOLS, NAMED, Definition, read_folder, write_folder
from minigpt.tokenization.bpe_library import in_one_line, library_of, require_whole_characters
from minigpt.tokenization.bpe_training import learn

__all__ = ["BpeTokenizer"]


class BpeTokenizer:
    """Converts text to ids of byte-level tokens and back. Make one with `from_folder` or `train`.

    Attributes:
        eos_token_id, pad_token_id, sep_token_id: None if there is no such token.
        special_tokens: text -> id of all tokens that are not ordinary text, ordered by id. It includes Qwen's
            `<think>`, although Qwen's files call it an ordinary token.
        special_ids: the ids of the special tokens.
        named_tokens: role, such as "eos_token" -> text of the token with that role.
        chat_template: the Jinja template that came with the tokenizer, or None.
    """

    def __init__(self, definition: Definition) -> None:
        self._definition = definition
        self._library = library_of(definition)
        self.special_tokens = dict(definition.special)
        self.special_ids = frozenset(self.special_tokens.values())
        self.named_tokens = {
            key: _token_text(definition.config[key]) for key in NAMED if definition.config.get(key)
        }
        self.eos_token_id = self._named("eos_token")
        self.pad_token_id = self._named("pad_token")
        self.sep_token_id = self._named("sep_token")
        self._size = len(definition.tokens)
        added = [
            token for token in definition.frame["added_tokens"] if token["content"] in self.special_tokens
        ]
        # longest first, because of several special tokens at one place the longest counts
        added.sort(key=lambda token: len(token["content"]), reverse=True)
        self._special = re.compile("|".join(map(_expression, added)) or "(?!)")
        lacking = [byte for byte, symbol in enumerate(BYTE_SYMBOLS) if symbol not in definition.vocab]
        self._lacking = frozenset(lacking)  # bytes for which the vocabulary has no token

    @classmethod
    def from_folder(
        cls, path: str | Path, kind: str | None = None, whole: dict[str, Any] | None = None
    ) -> "BpeTokenizer":
        """Read the tokenizer of a model folder, in any layout of minigpt/tokenization/bpe_files.py.

        Args:
            path: the folder.
            kind: rule for splitting text into words, "gpt2" or "qwen2". Needed only if no file says it.
            whole: the parsed tokenizer.json, if the caller has it (parsing megabytes takes time).

        Raises:
            InputError: if a file is missing or wrong; the message names the file and what to do.
        """
        definition = read_folder(Path(path), kind, whole)
        try:
            tokenizer = cls(definition)
            tokenizer._encoding("a 1", may_drop=True)  # encode something, because some damage shows only then
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

        Ids 0, 1, 2 are `<pad>`, `<|endoftext|>`, `<sep>`. Then come `special_tokens`, 256 bytes, and merges.

        Args:
            texts: the texts to learn from.
            vocab_size: number of entries; fewer if the texts have no more pairs to merge.
            kind: rule for splitting text into words. "gpt2" changes no text. "qwen2" composes accents (NFC)
                and splits numbers into digits.
            special_tokens: further special tokens, such as `<|im_start|>`.
            min_frequency: least number of times that a pair must occur to be merged.
            on_progress: called ten times per second with the stage (1: reading, 2: merging) and a text.

        Raises:
            ValueError: if vocab_size is too small for bytes and special tokens, or kind is unknown.
            InputError: for a lone surrogate (half a character) in a text, or an invalid special token.
        """
        return cls(learn(texts, vocab_size, kind, special_tokens, min_frequency, on_progress))

    @property
    def definition(self) -> Definition:
        """The content of the tokenizer's files, for writing it in another format."""
        return self._definition

    @functools.cached_property
    def _bytes(self) -> "_Bytes":
        return _Bytes(self._definition)

    def _named(self, key: str) -> int | None:
        return self.special_tokens[self.named_tokens[key]] if key in self.named_tokens else None

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's Jinja template (of several, the one named "default"), or None."""
        template = self._definition.config.get("chat_template")
        if isinstance(template, list):  # older files have a list: [{"name": ..., "template": ...}, ...]
            named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None

    def with_chat_template(self, template: str) -> "BpeTokenizer":
        """The same tokenizer with another chat template."""
        config = {**self._definition.config, "chat_template": template}
        return BpeTokenizer(dataclasses.replace(self._definition, config=config))

    def with_tokens(self, texts: Iterable[str]) -> "BpeTokenizer":
        """The same tokenizer with more tokens, each for a text of its own; those that it has are left out.

        A text becomes its token wherever it stands. The new ids follow the old ones.

        Raises:
            InputError: for half a character.
        """
        old = self._definition
        words = dict(old.words)
        first = max(old.tokens.values()) + 1
        for text in dict.fromkeys(texts):
            if not text or len(self._encode(text)) == 1 or text in old.tokens:
                continue
            require_whole_characters(text)
            words[text] = first
            first += 1
        flags = {
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": False,
        }
        new = [{"id": words[text], "content": text, **flags} for text in words if text not in old.words]
        frame = {**old.frame, "added_tokens": [*old.frame["added_tokens"], *new]}
        return BpeTokenizer(dataclasses.replace(old, words=words, frame=frame))

    def get_vocab_size(self) -> int:
        """Return the number of ids, special tokens included. (A model may have more rows, as Qwen3 does.)"""
        return self._size

    def encode_text(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Return the ids of a text. No end token is added.

        Args:
            text: the text.
            allow_special: convert the text of a special token to that token. Use it only for text that no
                user has written: with such text, a prompt could pretend to be part of the template.

        Raises:
            InputError: for a lone surrogate (half a character); the message says where it is.
        """
        if not allow_special:
            return self._encode(text)
        ids: list[int] = []
        start = 0
        for match in self._special.finditer(text):
            ids += self._encode(text[start : match.start()])
            ids.append(self.special_tokens[match[match.lastindex or 0]])
            start = match.end()
        return ids + self._encode(text[start:])

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._encoding(text).ids
        return ids

    def _encoding(self, text: str, may_drop: bool = False) -> Any:
        try:
            encoding = self._library.encode(text, add_special_tokens=False)
        except BaseException as error:
            require_whole_characters(text)
            raise in_one_line(error, "the text cannot be encoded") from None
        if self._lacking and not may_drop:
            self._require_nothing_dropped(text, encoding.ids)
        return encoding

    def _require_nothing_dropped(self, text: str, ids: list[int]) -> None:
        """Raise InputError if the library has left out bytes, which happens to bytes without a token."""
        normalizer = self._library.normalizer
        whole = (normalizer.normalize_str(text) if normalizer else text).encode()
        if sum(len(self._bytes[index]) for index in ids) != len(whole):
            unknown = self.unknown_characters(text)
            raise InputError(f"the tokenizer has no tokens for the bytes of {''.join(unknown[:5])!r}")

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a text, and for each token its start and end in the text (in characters)."""
        encoding = self._encoding(text)
        return encoding.ids, encoding.offsets

    def encode_array(self, text: str) -> npt.NDArray[np.int32]:
        """Return the ids of a text as an array, (number of tokens,). Raises InputError as `encode_text`."""
        return np.array(self._encode(text), dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of many texts, computed on all cores. Raises InputError as `encode_text`."""
        texts = list(texts)
        if self._lacking:
            return [self._encode(text) for text in texts]
        try:
            return [row.ids for row in self._library.encode_batch_fast(texts, add_special_tokens=False)]
        except BaseException as error:
            for number, text in enumerate(texts, 1):
                require_whole_characters(text, f"text {number}, ")
            raise in_one_line(error, "a text cannot be encoded") from None

    def decode(self, ids: Iterable[SupportsIndex], *, skip_special_tokens: bool = False) -> str:
        """Return the text of ids (a list, array or tensor). Invalid UTF-8 becomes U+FFFD.

        Args:
            ids: the ids.
            skip_special_tokens: leave special tokens out. By default their text is included.

        Raises:
            ValueError: for an id outside the vocabulary; the message names the id and its position.
        """
        numbers = [self._checked_id(item, f" at position {position}") for position, item in enumerate(ids)]
        if skip_special_tokens:
            numbers = [number for number in numbers if number not in self.special_ids]
        return b"".join(map(self._bytes.__getitem__, numbers)).decode("utf-8", "replace")

    def token_bytes(self, index: SupportsIndex) -> bytes:
        """Return the bytes of one token, often only part of a character. Raises ValueError as `decode`."""
        return self._bytes[self._checked_id(index, "")]

    def _checked_id(self, item: SupportsIndex, where: str) -> int:
        try:
            number = operator.index(item)
        except TypeError:
            raise ValueError(f"ids must be integers: got {item!r}{where}") from None
        if not 0 <= number < self._size:
            raise ValueError(f"id {number}{where} is outside the vocabulary of {self._size} entries")
        return number

    def unknown_characters(self, text: str) -> list[str]:
        """Return the distinct characters of a text that cannot be encoded; [] for nearly every text.

        These are lone surrogates (halves of characters) and characters with a byte that has no token.
        """
        return [
            character
            for character in dict.fromkeys(text)
            if "\ud800" <= character <= "\udfff" or not self._lacking.isdisjoint(character.encode())
        ]

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, for `from_folder` and transformers.

        Raises:
            InputError: if a file cannot be written.
        """
        write_folder(self._definition, Path(folder))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the ids. It is the same for all layouts of the files."""
        definition = self._definition
        decisive = (
            sorted(definition.tokens.items(), key=lambda item: item[1]),
            sorted(definition.special.values()),
            definition.merges,
            _decisive(definition.frame.get("normalizer")),
            _decisive(definition.frame["pre_tokenizer"]),
            bool(definition.frame["model"].get("ignore_merges")),
            *([sorted(definition.words.values())] if definition.words else []),
        )
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BpeTokenizer) and self.fingerprint == other.fingerprint


class _Bytes(dict[int, bytes]):
    """A dict: id -> bytes of the token. Computed on first use: an answer needs few of 100,000 tokens."""

    _byte_of: ClassVar = {ord(symbol): byte for byte, symbol in enumerate(BYTE_SYMBOLS)}

    def __init__(self, definition: Definition) -> None:
        self._tokens = {index: token for token, index in definition.vocab.items()}
        for token, index in (definition.special | definition.words).items():
            self[index] = token.encode("utf-8", "replace")

    def __missing__(self, index: int) -> bytes:
        self[index] = found = self._tokens[index].translate(self._byte_of).encode("latin-1")
        return found


def _expression(token: dict[str, Any]) -> str:
    """Return a regular expression that finds a special token in a text."""
    around = r"(?<!\w){}(?!\w)" if token["single_word"] else "{}"
    text = around.format(f"({re.escape(token['content'])})")
    return r"\s*" * bool(token["lstrip"]) + text + r"\s*" * bool(token["rstrip"])


def _token_text(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _decisive(step: Any) -> Any:
    """Return a normalizer or pre-tokenizer step without the settings that do not change ids."""
    match step:
        case {"type": "ByteLevel"}:
            return {"use_regex": True, **{k: v for k, v in step.items() if k != "trim_offsets"}}
        case dict():
            return {key: _decisive(value) for key, value in step.items()}
        case list():
            return [_decisive(value) for value in step]
    return step
