"""The base class of the BPE and WordPiece tokenizers: encoding, roles of tokens, added tokens, saving.

Both use the `tokenizers` library. They differ in decoding; see bpe.py and wordpiece.py.

If a text contains the characters of a special token, such as <|endoftext|>, they do not become that token,
because the text is encoded by a `tokenizers.Tokenizer` without the special tokens (library.py). With
`allow_special`, the text is encoded by a second `tokenizers.Tokenizer`, which has the special tokens. Then
the ids equal transformers' ids.
"""

import hashlib
import json
import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self, SupportsIndex

import numpy as np
import numpy.typing as npt

from minigpt.errors import InputError
from minigpt.tokenization.definition import Definition, write_folder
from minigpt.tokenization.library import in_one_line, library_of, require_whole_characters

__all__ = ["SubwordTokenizer"]


class SubwordTokenizer:
    """Converts text to ids of parts of words and back.

    Attributes:
        eos_token_id, pad_token_id, sep_token_id, bos_token_id: ids; None if there is no such token.
        special_tokens: a dict from the text of each special token to its id, ordered by id. It includes
            Qwen's `<think>`, although Qwen's files call it an ordinary token.
        special_ids: the ids of the special tokens.
        named_tokens: role, such as "eos_token" -> text of the token with that role.
        before_text, after_text: ids that the tokenizer puts around each text, such as BOS. Often empty.
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
        # Special token -> (lstrip, rstrip): does the token remove white space before it, and after it?
        self.stripping = {
            token["content"]: (token["lstrip"], token["rstrip"])
            for token in definition.frame["added_tokens"]
            if (token["lstrip"] or token["rstrip"]) and token["content"] in self.special_tokens
        }
        self.before_text, self.after_text = list(definition.before), list(definition.after)
        self._size = 1 + max(definition.tokens.values(), default=-1)

    @property
    def definition(self) -> Definition:
        """Return the content of the tokenizer's files, for writing it in another format."""
        return self._definition

    @cached_property
    def _text_of(self) -> dict[int, str]:
        """Return a dict: id -> token, in the spelling of the files. The dict is made at its first use."""
        return {index: text for text, index in self._definition.tokens.items()}

    def _named(self, key: str) -> int | None:
        return self._definition.tokens[self.named_tokens[key]] if key in self.named_tokens else None

    @property
    def chat_template(self) -> str | None:
        """Return the Jinja template, or None. If there are several, return the one named "default"."""
        template = self._definition.config.get("chat_template")
        if isinstance(template, list):  # older files have a list: [{"name": ..., "template": ...}, ...]
            named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None

    def get_vocab_size(self) -> int:
        """Return the highest id plus 1. (A model's embedding may have more rows, as Qwen3's does.)"""
        return self._size

    def word_starts(self, text: str) -> list[int]:
        """Return the indices of the characters at which words begin. (Each word is later cut into tokens.)"""
        return [start for _, (start, _) in self._words(text)]

    def _normalized(self, text: str) -> str:
        """Return the text as the normalizer changes it. The normalizer runs before the split into words."""
        normalizer = self._library.normalizer
        try:
            return text if normalizer is None else str(normalizer.normalize_str(text))
        except BaseException as error:
            require_whole_characters(text)
            raise in_one_line(error, "the text cannot be encoded") from None

    def _words(self, text: str) -> list[tuple[str, tuple[int, int]]]:
        """Cut a text into words. Return (word, (start, end)) for each; start and end count characters."""
        cutter = self._library.pre_tokenizer
        try:
            return [(text, (0, len(text)))] if cutter is None else cutter.pre_tokenize_str(text)
        except BaseException as error:
            require_whole_characters(text)
            raise in_one_line(error, "the text cannot be encoded") from None

    def with_chat_template(self, template: str) -> Self:
        """Return the same tokenizer with another chat template."""
        config = {**self._definition.config, "chat_template": template}
        return type(self)(replace(self._definition, config=config))

    def with_eos_token(self, text: str) -> Self:
        """Return the same tokenizer with one of its special tokens as the eos_token, which ends a text."""
        old = self._definition
        assert text in old.special
        named, config = {**old.named, "eos_token": text}, {**old.config, "eos_token": text}
        return type(self)(replace(old, named=named, config=config))

    def with_tokens(self, texts: Iterable[str]) -> Self:
        """Return the same tokenizer with a new token for each text that is not yet a single token.

        Wherever one of these texts occurs in a longer text, it becomes the new token. The new ids follow the
        old ids.

        Raises:
            InputError: for a lone surrogate (half a character), or if the tokenizer's ids have gaps.
        """
        old = self._definition
        new = [text for text in dict.fromkeys(texts) if text and not self._is_token(text)]
        # The first new id. It is the id that `tokenizers` would give to the next added token.
        first = max(len(old.vocab), *(1 + token["id"] for token in old.frame["added_tokens"]), 0)
        if new and first < self._size:
            raise InputError(
                f"the tokenizer's ids have gaps: it has {len(old.tokens):,} tokens, and the highest id is "
                f"{self._size - 1:,}; no token can be added"
            )
        ids = {text: index for index, text in enumerate(new, first)}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        config = dict(old.config)
        # If the config has this key, transformers ignores the added tokens in tokenizer.json. So the new
        # tokens go into both lists.
        if listed := config.get("added_tokens_decoder"):
            more = {str(index): {"content": text, **flags} for text, index in ids.items()}
            config["added_tokens_decoder"] = {**listed, **more}
        tokens = [{"id": index, "content": text, **flags} for text, index in ids.items()]
        frame = {**old.frame, "added_tokens": [*old.frame["added_tokens"], *tokens]}
        words = old.words | ids
        return type(self)(replace(old, words=words, frame=frame, config=config))

    def _is_token(self, text: str) -> bool:
        if text in self._definition.tokens:
            return True
        ids = self.encode_text(text, add_special_tokens=False)
        return len(ids) == 1 and not self.unknown_characters(text)

    # -- text -> ids ----------------------------------------------------------------------------------------

    def encode_text(
        self, text: str, *, add_special_tokens: bool = True, allow_special: bool = False
    ) -> list[int]:
        """Return the ids of a text; by default with `before_text` and `after_text` around them.

        Args:
            text: the text.
            add_special_tokens: put `before_text` and `after_text` around the ids.
            allow_special: convert the text of a special token to that token. Do not use it for text that a
                user has written: such text could imitate the special tokens of a chat template.

        Raises:
            InputError: for a lone surrogate (half a character); the message names its position.
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
        """Return the ids of a text, and for each token its start and end in the text (in characters)."""
        encoding = self._encoding(text)
        self._require_all_read(text, encoding.ids)
        return encoding.ids, encoding.offsets

    def encode_array(self, text: str) -> npt.NDArray[np.int32]:
        """Return the ids of a text as an array, (number of tokens,), without `before_text` and `after_text`.

        Raises:
            InputError: for a lone surrogate (half a character), or a character that the ids would leave out.
        """
        ids = self._encoding(text).ids
        self._require_all_read(text, ids)
        return np.array(ids, dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of many texts, computed on all cores. Ids and errors are as in `encode_array`."""
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
        """Do nothing. A subclass may raise InputError here if `ids` leave out characters of the text."""

    def unknown_characters(self, text: str) -> list[str]:
        """Return the distinct characters of a text that cannot be encoded, in order of appearance."""
        raise NotImplementedError

    @property
    def unknown_read_as(self) -> str:
        """Return in words what the tokenizer does with characters that it cannot encode."""
        unknown = self._definition.frame["model"].get("unk_token")
        return "left out" if unknown is None else f"read as {unknown}"

    # -- ids -> text ----------------------------------------------------------------------------------------

    def decode(self, ids: Iterable[SupportsIndex], *, skip_special_tokens: bool = False) -> str:
        """Return the text of ids (a list, array or tensor).

        Args:
            ids: the ids.
            skip_special_tokens: leave special tokens out. By default their text is included.

        Raises:
            ValueError: for an id outside the vocabulary; the message names the id and its position.
        """
        numbers = [self._checked_id(item, f" at position {position}") for position, item in enumerate(ids)]
        if skip_special_tokens:
            numbers = [number for number in numbers if number not in self.special_ids]
        return self._joined([number for number in numbers if number in self._text_of])

    def _joined(self, ids: list[int]) -> str:
        raise NotImplementedError

    def token_bytes(self, index: SupportsIndex) -> bytes:
        """Return the bytes that a token adds in the middle of a text; b"" for an id without a token.

        Raises:
            ValueError: for an id outside the vocabulary.
        """
        raise NotImplementedError

    def _checked_id(self, item: SupportsIndex, where: str) -> int:
        try:
            number = operator.index(item)
        except TypeError:
            raise ValueError(f"ids must be integers: got {item!r:.80}{where}") from None
        if not 0 <= number < self._size:
            raise ValueError(f"id {number}{where} is outside the vocabulary of {self._size} entries")
        return number

    # -- the tokenizer as a whole ---------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, for `from_folder` and transformers.

        Raises:
            InputError: if a file cannot be written.
        """
        write_folder(self._definition, Path(folder))

    @cached_property
    def fingerprint(self) -> str:
        """Return the SHA-256 of everything that decides the ids.

        It is the same whether the tokenizer is stored in tokenizer.json, or in vocab.json and merges.txt.
        """
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
    """Return a normalizer or pre-tokenizer step without the settings that do not change ids."""
    match step:
        case {"type": "ByteLevel"}:
            return {"use_regex": True, **{k: v for k, v in step.items() if k != "trim_offsets"}}
        case dict():
            return {key: _decisive(value) for key, value in step.items()}
        case list():
            return [_decisive(value) for value in step]
    return step
