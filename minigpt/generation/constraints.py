"""Constrains answers to a list of choices, to a regular expression, or to JSON that fits a schema.

The state of a constraint says which tokens may come next. `make_constraint` returns the state before the
first token, and each token leads to the next state. eos is forbidden until the text is complete. So an answer
that ends with eos is a permitted text. An answer that is cut by max_new_tokens is the beginning of such a
text. A token is treated as a sequence of bytes, because it may be only a part of a character.

This module itself handles lists of choices. Regular expressions and JSON Schema need llguidance, a library
without dependencies (`pip install "minigpt[constrained]"`; https://github.com/guidance-ai/llguidance).

Letters in shapes: B rows, S tokens so far, V entries of the vocabulary.
"""

import json
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from minigpt.errors import InputError
from minigpt.generation.options import GenerationOptions
from minigpt.tokenizer import Tokenizer

__all__ = ["State", "allow_only", "make_constraint"]


class State(Protocol):
    """The state of a constraint after some tokens. A state never changes, so sequences can share it."""

    def allowed(self) -> Sequence[int]:
        """Return the ids that may come next, including eos if the text may end here."""

    def after(self, token: int) -> "State":
        """Return the state after `token`, which must be one of the allowed tokens."""


def make_constraint(options: GenerationOptions, tokenizer: Any, eos_token_ids: Sequence[int]) -> State | None:
    """Return the constraint's state before the first token, or None if the options permit every text.

    One of three options gives the constraint: `choices`, `regex` or `json_schema`.

    Args:
        tokenizer: the character Tokenizer, or a tokenizer with `token_bytes(id)`, `special_ids` and
            `get_vocab_size()`.

    Raises:
        InputError: if there is no eos, a choice has a character that is not in the vocabulary, llguidance
            rejects the regex or the schema, or llguidance is not installed.
    """
    name = options.constraint
    if name is None:
        return None
    if tokenizer is None:
        raise InputError(f"{name} needs the tokenizer: pass tokenizer=...")
    if not eos_token_ids:
        raise InputError(f"{name} needs an eos_token_id: it is how an answer ends where it is complete")
    if not getattr(tokenizer, "joins", True):
        raise InputError(
            f"{name} does not work with a WordPiece vocabulary: its tokens are no parts of a text"
        )
    tokens = _token_bytes(tokenizer)
    if options.choices:
        for choice in options.choices:
            if unknown := tokenizer.unknown_characters(choice):
                raise InputError(
                    f"choices: {choice!r} cannot be written: {unknown[0]!r} is not in the vocabulary"
                )
        rests = tuple(choice.encode() for choice in options.choices)
        start: State = _Choice(tokens, _ids_of(tokens), rests, eos_token_ids)
    else:
        start = _Grammar.start(options, tokenizer, tokens, eos_token_ids)
    return start


def allow_only(scores: Tensor, allowed: Sequence[Sequence[int]]) -> Tensor:
    """Set the scores (B, V) of all tokens but the allowed ones to -inf. allowed[i]: allowed ids of row i."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)  # (B, V)  True: the token is allowed
    for row, ids in enumerate(allowed):
        mask[row, torch.tensor(ids, dtype=torch.int64)] = True
    return scores.masked_fill(~mask.to(scores.device), -math.inf)


class _Choice:
    """The state of the constraint `choices`: the remaining bytes of each choice that is still possible."""

    def __init__(
        self,
        tokens: list[bytes],
        ids_of: dict[bytes, list[int]],
        rests: tuple[bytes, ...],
        eos: Sequence[int],
    ) -> None:
        self._tokens, self._ids_of, self._rests, self._eos = tokens, ids_of, rests, eos

    def allowed(self) -> list[int]:
        beginnings = {rest[:length] for rest in self._rests for length in range(1, len(rest) + 1)}
        found = [token for beginning in beginnings for token in self._ids_of.get(beginning, ())]
        return [*found, *self._eos] if b"" in self._rests else found

    def after(self, token: int) -> "_Choice":
        text = self._tokens[token]
        rests = tuple(rest[len(text) :] for rest in self._rests if rest.startswith(text))
        return _Choice(self._tokens, self._ids_of, rests, self._eos)


class _Grammar:
    """The state of the constraint `regex` or `json_schema`. It wraps an LLMatcher of llguidance."""

    def __init__(self, matcher: Any, name: str, words: "_Words") -> None:
        self._matcher, self._name, self._words = matcher, name, words

    @classmethod
    def start(
        cls, options: GenerationOptions, tokenizer: Any, tokens: list[bytes], eos: Sequence[int]
    ) -> "_Grammar":
        name = options.constraint or ""
        try:
            from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
        except ImportError:
            raise InputError(
                f'{name} needs the library llguidance: pip install "minigpt[constrained]"'
            ) from None
        words = _Words(tokenizer, tokens, eos[0])
        wrapped = LLTokenizer(TokenizerWrapper(words), eos_token=list(eos))
        # LLTokenizer has just encoded a test word. Forget the unknown characters of this word, because an
        # error message must name only those that the grammar needs.
        words.lacking = []
        if options.regex is not None:
            grammar = LLMatcher.grammar_from_regex(options.regex)
        else:
            schema = options.json_schema
            grammar = LLMatcher.grammar_from_json_schema(
                schema if isinstance(schema, str) else json.dumps(schema)
            )
        # without log_level=0, llguidance writes to standard error
        return cls(LLMatcher(wrapped, grammar, log_level=0), name, words)._checked()

    def _checked(self) -> "_Grammar":
        if self._matcher.is_error() and self._words.lacking:
            lacking = ", ".join(map(repr, self._words.lacking))
            raise InputError(f"{self._name} cannot be written: {lacking} is not in the vocabulary")
        if self._matcher.is_error():
            raise InputError(f"{self._name} is not understood: {' '.join(self._matcher.get_error().split())}")
        return self

    def allowed(self) -> list[int]:
        bits = np.unpackbits(
            np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little"
        )
        self._checked()
        found: list[int] = np.flatnonzero(bits).tolist()
        return found

    def after(self, token: int) -> "_Grammar":
        matcher = self._matcher.deep_copy()
        matcher.consume_token(token)
        return _Grammar(matcher, self._name, self._words)._checked()


class _Words:
    """Wraps a tokenizer, so that llguidance can use it."""

    bos_token_id = None

    def __init__(self, tokenizer: Any, tokens: list[bytes], eos_token_id: int) -> None:
        self._tokenizer, self.eos_token_id = tokenizer, eos_token_id
        # characters that the grammar needs but the vocabulary lacks; for the error message
        self.lacking: list[str] = []
        # llguidance needs different bytes for each token. A special token has no text, so it gets bytes that
        # occur in no UTF-8 text.
        self.tokens = [token or b"\xff<%d>" % index for index, token in enumerate(tokens)]
        self.special_token_ids = [index for index, token in enumerate(tokens) if not token]

    def __call__(self, given: str | bytes) -> list[int]:
        """Return the ids of a text. llguidance calls this if the grammar permits only one text next."""
        text = given if isinstance(given, str) else given.decode("utf-8", "replace")
        self.lacking = self._tokenizer.unknown_characters(text) or self.lacking
        ids: list[int] = self._tokenizer.encode_text(text)
        before, after = (len(getattr(self._tokenizer, name, ())) for name in ("before_text", "after_text"))
        return ids[before : len(ids) - after]


def _token_bytes(tokenizer: Any) -> list[bytes]:
    """Return the bytes of each id. Special tokens have no bytes."""
    if isinstance(tokenizer, Tokenizer):
        special = {tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.sep_token_id}
        return [b"" if index in special else word.encode() for index, word in enumerate(tokenizer.id2word)]
    size = tokenizer.get_vocab_size()
    return [b"" if index in tokenizer.special_ids else tokenizer.token_bytes(index) for index in range(size)]


def _ids_of(tokens: list[bytes]) -> dict[bytes, list[int]]:
    found: dict[bytes, list[int]] = {}
    for index, token in enumerate(tokens):
        if token:
            found.setdefault(token, []).append(index)
    return found
