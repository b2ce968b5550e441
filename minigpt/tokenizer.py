"""The character tokenizer: one token per Unicode code point. The vocabulary is a JSON file.

    >>> tokenizer = Tokenizer.from_word2id(build_vocabulary(["你好吗", "我很好"]))
    >>> tokenizer.encode("你好", "很好", max_length=8)
    ([3, 5, 2, 6, 5, 2, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0])

Ids 0, 1, 2 are `<pad>`, `<unk>`, `<sep>`; the characters follow in code-point order. If a user types `<sep>`
in a question, it is read as five characters, not as the special token. A text is encoded by one NumPy table
look-up, not by a loop (benchmarks/tokenizer_speed.py). The tokenizer does not normalise text.
"""

import hashlib
import operator
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from minigpt.errors import InputError, Message
from minigpt.storage.files import atomic_write
from minigpt.storage.json_files import json_text, read_json

__all__ = ["SPECIAL_TOKENS", "Tokenizer", "build_vocabulary"]

SPECIAL_TOKENS = ("<pad>", "<unk>", "<sep>")

_REMEDY = "make it with: minigpt vocab --data DATA --output VOCAB"


def build_vocabulary(texts: Iterable[str]) -> dict[str, int]:
    """Build a vocabulary from texts: the special tokens, then every character in code-point order.

    A lone surrogate (half a character, which a UTF-8 file cannot hold) gets no id.

    >>> build_vocabulary(["ba", "好"])
    {'<pad>': 0, '<unk>': 1, '<sep>': 2, 'a': 3, 'b': 4, '好': 5}
    """
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    ordered = sorted(c for c in characters if not _is_surrogate(c))
    return {token: i for i, token in enumerate((*SPECIAL_TOKENS, *ordered))}


def _is_surrogate(character: str) -> bool:
    return "\ud800" <= character <= "\udfff"


class Tokenizer:
    """Converts characters to ids and back.

    Args:
        vocab_path: a vocab.json with `word2id` and `id2word`, as `minigpt vocab` writes it.

    Raises:
        InputError: if the file is not such a vocabulary; the message says what is wrong with it.
    """

    def __init__(self, vocab_path: str | Path) -> None:
        self._set(_read_vocabulary(Path(vocab_path)))

    @classmethod
    def from_word2id(cls, word2id: Mapping[str, int]) -> "Tokenizer":
        """Make a tokenizer from a vocabulary in memory. Raises InputError as the constructor does."""
        tokenizer = cls.__new__(cls)
        tokenizer._set(_checked(word2id, "the vocabulary"))
        return tokenizer

    def _set(self, word2id: dict[str, int]) -> None:
        self.word2id = word2id
        self.id2word = list(word2id)  # entry i is the token with id i, because word2id is ordered by id
        self.pad_token_id, self.unk_token_id, self.sep_token_id = (word2id[token] for token in SPECIAL_TOKENS)
        characters = self.id2word[len(SPECIAL_TOKENS) :]
        highest = max(map(ord, characters), default=0)
        # _table[c] is the id of the character with code point c. The last entry is the id of <unk>. It is
        # used for every code point above the highest one in the vocabulary.
        self._table = np.full(highest + 2, self.unk_token_id, dtype=np.int32)
        self._table[[ord(c) for c in characters]] = np.arange(len(SPECIAL_TOKENS), len(word2id))

    # True: a classifier reads <sep>, text, <sep>, so a text begins as in pretraining. False: text, <sep>.
    sep_before_text = False
    unknown_read_as = "read as <unk>"  # for warnings: what happens to unknown characters

    @property
    def eos_token_id(self) -> int:
        """The id that ends a text: <sep>. (In minigpt's other tokenizers it may be another id, or None.)"""
        return self.sep_token_id

    def with_tokens(self, characters: Iterable[str]) -> "Tokenizer":
        """Return the same vocabulary with more characters at its end. Known characters are skipped.

        Raises:
            InputError: for a text that is not one character.
        """
        new = [character for character in dict.fromkeys(characters) if character not in self.word2id]
        return Tokenizer.from_word2id({word: i for i, word in enumerate([*self.id2word, *new])})

    def get_vocab_size(self) -> int:
        """Return the number of vocabulary entries, special tokens included."""
        return len(self.word2id)

    def encode_array(self, text: str) -> npt.NDArray[np.int32]:
        """Return the ids of a text's characters, (len(text),). Unknown characters become <unk>."""
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        ids: npt.NDArray[np.int32] = self._table.take(points, mode="clip")
        return ids

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a text's characters. No separator is added."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def encode(
        self, question: str, answer: str | None, max_length: int = 128, pad_to_max_length: bool = True
    ) -> tuple[list[int], list[int]]:
        """Encode question <sep> answer <sep>, or question <sep> if `answer` is None.

        Returns: ids and attention mask (1: token, 0: padding), both cut to max_length entries. With padding,
        both have exactly max_length entries.

        Raises:
            ValueError: if max_length is less than 1.
        """
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1: got {max_length}")
        ids = [*self.encode_text(question), self.sep_token_id]
        if answer is not None:
            ids += [*self.encode_text(answer), self.sep_token_id]
        ids = ids[:max_length]
        padding = max_length - len(ids) if pad_to_max_length else 0
        return ids + [self.pad_token_id] * padding, [1] * len(ids) + [0] * padding

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Return the text of ids (a list, array or tensor). <pad> is skipped; <unk> and <sep> are written.

        Raises:
            ValueError: for an id outside the vocabulary; the message names the id and its position.
        """
        words = []
        for position, item in enumerate(ids):
            try:
                number = operator.index(item)
            except TypeError:
                raise ValueError(f"ids must be integers: got {item!r:.80} at position {position}") from None
            if not 0 <= number < len(self.id2word):
                raise ValueError(
                    f"id {number} at position {position} is outside the vocabulary "
                    f"of {len(self.id2word)} entries"
                )
            if number != self.pad_token_id:
                words.append(self.id2word[number])
        return "".join(words)

    def unknown_characters(self, text: str) -> list[str]:
        """Return the distinct characters of a text that the vocabulary lacks, in order of appearance."""
        return list(dict.fromkeys(c for c in text if c not in self.word2id))

    def save(self, path: str | Path) -> None:
        """Write vocab.json, one entry per line. If writing fails, the old file does not change."""
        vocabulary = {"word2id": self.word2id, "id2word": dict(enumerate(self.id2word))}
        atomic_write(path, json_text(vocabulary, indent=4))

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of the entries in order. Equal vocabularies have equal fingerprints."""
        return hashlib.sha256("\0".join(self.id2word).encode("utf-8", "surrogatepass")).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.id2word == other.id2word


def _read_vocabulary(path: Path) -> dict[str, int]:
    folder = path.parent if path.name == "tokenizer.json" else path
    if (folder / "tokenizer.json").exists():
        raise InputError(
            f"{path} is a tokenizer of longer tokens, no vocabulary of characters: `minigpt train` "
            f"takes it as --tokenizer {folder}"
        )
    try:
        content = read_json(path)
    except InputError as error:
        raise InputError(Message("{error}; {remedy}", error=error.args[0], remedy=Message(_REMEDY))) from None
    if not isinstance(content.get("word2id"), dict):
        raise InputError(f"{path} has no object `word2id`; {_REMEDY}")
    word2id = _checked(content["word2id"], str(path))
    if "id2word" in content:  # optional, because it can be computed from word2id
        _require_agreement(word2id, content["id2word"], path)
    return word2id


def _require_agreement(word2id: dict[str, int], id2word: object, path: Path) -> None:
    if not isinstance(id2word, dict):
        raise InputError(f"{path}: `id2word` is not an object; {_REMEDY}")
    expected = {str(number): word for word, number in word2id.items()}
    for number in [*expected, *id2word]:
        if id2word.get(number) != expected.get(number):
            raise InputError(
                f"{path}: word2id and id2word disagree about id {number}: "
                f"{expected.get(number, 'no entry')!r} and {id2word.get(number, 'no entry')!r}; {_REMEDY}"
            )


def _checked(word2id: Mapping[str, int], source: str) -> dict[str, int]:
    """Check a vocabulary, and return it ordered by id. Raises InputError."""
    for word, number in word2id.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise InputError(
                f"{source}: the id of {word!r} is {number!r}, not a whole number of at least 0; {_REMEDY}"
            )
    for number, token in enumerate(SPECIAL_TOKENS):
        if word2id.get(token) != number:
            what = f"has id {word2id[token]}" if token in word2id else "is missing"
            raise InputError(f"{source}: {token} must have id {number}, but {what}; {_REMEDY}")
    ordered = sorted(word2id, key=lambda word: word2id[word])
    for number, word in enumerate(ordered):
        if word2id[word] < number:
            twice = f"{ordered[number - 1]!r} and {word!r}"
            raise InputError(f"{source}: id {word2id[word]} is given twice, to {twice}; {_REMEDY}")
        if word2id[word] > number:
            raise InputError(f"{source}: id {number} is missing among {len(word2id)} entries; {_REMEDY}")
        if number >= len(SPECIAL_TOKENS) and (len(word) != 1 or _is_surrogate(word)):
            raise InputError(f"{source}: entry {word!r} (id {number}) is not one character; {_REMEDY}")
    return {word: number for number, word in enumerate(ordered)}
