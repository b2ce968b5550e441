"""What all tokenizers of the `tokenizers` library have in common: text -> ids, roles, added tokens, saving.

bpe.py and wordpiece.py say how tokens become text again, which is where they differ.

Text never becomes a special token: the library is not told about them (library.py). With `allow_special`
the ids are those of `transformers`, which reads the text of a special token as the token.
"""

import hashlib
import json
import operator
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from minigpt.tokenization.definition import Definition, write_folder
from minigpt.tokenization.library import in_one_line, library_of, require_whole_characters

__all__ = ["SubwordTokenizer"]


class SubwordTokenizer:
    """Text <-> ids of parts of words.

    Attributes:
        eos_token_id, pad_token_id, sep_token_id, bos_token_id: None where there is no such token.
        special_tokens: text -> id of all tokens that stand for no text, in the order of the ids. Qwen's
            `<think>` is one, too, though its files call it an ordinary token.
        special_ids: the same ids.
        named_tokens: "eos_token" and other roles -> text of the token that has it.
        before_text, after_text: ids that the tokenizer puts around each text, a BOS say; most have none.
        chat_template: the Jinja template that came with the tokenizer, or None.
    """

    def __init__(self, definition: Definition) -> None:
        self._definition = definition
        self._library = library_of(definition)
        self.special_tokens = dict(definition.special)
        self.special_ids = frozenset(self.special_tokens.values())
        self.named_tokens = dict(definition.named)
        self.eos_token_id = self._named("eos_token")
        self.pad_token_id = self._named("pad_token")
        self.sep_token_id = self._named("sep_token")
        self.bos_token_id = self._named("bos_token")
        self.stripping = {  # special tokens that take the white space before them, or behind them
            token["content"]: (token["lstrip"], token["rstrip"])
            for token in definition.frame["added_tokens"]
            if (token["lstrip"] or token["rstrip"]) and token["content"] in self.special_tokens
        }
        self.before_text, self.after_text = list(definition.before), list(definition.after)
        self._size = 1 + max(definition.tokens.values(), default=-1)

    @property
    def definition(self) -> Definition:
        """What decides the ids, as the files have it: for writing it in another format."""
        return self._definition

    @cached_property
    def _text_of(self) -> dict[int, str]:
        """id -> token as the files write it; made when it is first asked for."""
        return {index: text for text, index in self._definition.tokens.items()}

    def _named(self, key: str) -> int | None:
        return self._definition.tokens[self.named_tokens[key]] if key in self.named_tokens else None

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that came with the tokenizer (of several: the one named "default"), or None."""
        template = self._definition.config.get("chat_template")
        if isinstance(template, list):  # older releases: [{"name": ..., "template": ...}, ...]
            named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None

    def get_vocab_size(self) -> int:
        """One more than the highest id, special tokens included. A model may have more rows: Qwen3's has."""
        return self._size

    # -- text -> ids ----------------------------------------------------------------------------------------

    def encode_text(
        self, text: str, *, add_special_tokens: bool = True, allow_special: bool = False
    ) -> list[int]:
        """The ids of a text, as a model reads it that has nothing else to read.

        Args:
            add_special_tokens: put around it what the tokenizer puts around each text; most put nothing.
            allow_special: whether the text of a special token stands for that token. Only for text that no
                user has written: a prompt with such text could pretend to be something else.

        Raises:
            InputError: for half a character (a lone surrogate), naming its position.
        """
        ids: list[int] = self._encoding(text, self._with_special if allow_special else None).ids
        return [*self.before_text, *ids, *self.after_text] if add_special_tokens else ids

    @cached_property
    def _with_special(self) -> Any:
        return library_of(self._definition, with_special=True)

    def _encoding(self, text: str, library: Any = None) -> Any:
        try:
            return (library or self._library).encode(text, add_special_tokens=False)
        except BaseException as error:
            require_whole_characters(text)
            raise in_one_line(error, "the text cannot be encoded") from None

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text, and where each begins and ends in it; parts of a character have its place."""
        encoding = self._encoding(text)
        self._require_all_read(text, encoding.ids)
        return encoding.ids, encoding.offsets

    def encode_array(self, text: str) -> npt.NDArray[np.int32]:
        """The ids of a text and nothing around them, (number of tokens,).

        Raises:
            InputError: as `encode_text`, and for a character that the tokenizer leaves out.
        """
        ids = self._encoding(text).ids
        self._require_all_read(text, ids)
        return np.array(ids, dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts, on all cores; each as `encode_array` gives them. Raises InputError as it."""
        texts = list(texts)
        try:
            rows = [row.ids for row in self._library.encode_batch_fast(texts, add_special_tokens=False)]
        except BaseException as error:
            for number, text in enumerate(texts, 1):
                require_whole_characters(text, f"text {number}, ")
            raise in_one_line(error, "a text cannot be encoded") from None
        for text, ids in zip(texts, rows):
            self._require_all_read(text, ids)
        return rows

    def _require_all_read(self, text: str, ids: list[int]) -> None:
        """Raise an InputError for characters that were left out."""

    def unknown_characters(self, text: str) -> list[str]:
        """The distinct characters of a text that cannot be encoded, in order of appearance."""
        raise NotImplementedError

    @property
    def unknown_read_as(self) -> str:
        """What becomes of these characters, for a message."""
        unknown = self._definition.frame["model"].get("unk_token")
        return "left out" if unknown is None else f"read as {unknown}"

    # -- ids -> text ----------------------------------------------------------------------------------------

    def decode(self, ids: Iterable[SupportsIndex], *, skip_special_tokens: bool = False) -> str:
        """The text of some ids (a list, array or tensor).

        Args:
            skip_special_tokens: leave them out; else they are written out, the end token and padding too.

        Raises:
            ValueError: for an id outside the vocabulary, naming it, its position and the vocabulary's size.
        """
        numbers = [self._checked_id(item, f" at position {position}") for position, item in enumerate(ids)]
        if skip_special_tokens:
            numbers = [number for number in numbers if number not in self.special_ids]
        return self._joined([number for number in numbers if number in self._text_of])

    def _joined(self, ids: list[int]) -> str:
        raise NotImplementedError

    def token_bytes(self, index: SupportsIndex) -> bytes:
        """The bytes of one token in the middle of a text; none for an id that the vocabulary leaves out.

        Raises:
            ValueError: as `decode`.
        """
        raise NotImplementedError

    def _checked_id(self, item: SupportsIndex, where: str) -> int:
        try:
            number = operator.index(item)
        except TypeError:
            raise ValueError(f"ids must be integers: got {item!r}{where}") from None
        if not 0 <= number < self._size:
            raise ValueError(f"id {number}{where} is outside the vocabulary of {self._size} entries")
        return number

    # -- the tokenizer as a whole ---------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `from_folder` and transformers read.

        Raises:
            InputError: if a file cannot be written.
        """
        write_folder(self._definition, Path(folder))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what decides the ids, the same for every layout of the files."""
        definition, model = self._definition, self._definition.frame["model"]
        more = {key: model[key] for key in ("unk_token", "fuse_unk") if model.get(key)}
        if model["type"] != "BPE":
            more = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
        if definition.before or definition.after:
            more |= {"before": definition.before, "after": definition.after}
        decisive = (
            sorted(definition.tokens.items(), key=lambda item: item[1]),
            sorted(definition.special.values()),
            definition.merges,
            _decisive(definition.frame.get("normalizer")),
            _decisive(definition.frame["pre_tokenizer"]),
            bool(model.get("ignore_merges")),
            *([sorted(definition.words.values())] if definition.words else []),
            *([more] if more else []),
        )
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SubwordTokenizer) and self.fingerprint == other.fingerprint


def _decisive(step: Any) -> Any:
    """A step of the preparation without what only places offsets, and with what older files leave out."""
    match step:
        case {"type": "ByteLevel"}:
            return {"use_regex": True, **{k: v for k, v in step.items() if k != "trim_offsets"}}
        case dict():
            return {key: _decisive(value) for key, value in step.items()}
        case list():
            return [_decisive(value) for value in step]
    return step
