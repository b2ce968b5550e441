"""Builds the `tokenizers` library's object from a Definition, and converts its errors to InputError."""

import json
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Library
from tokenizers.models import BPE

from minigpt.errors import InputError
from minigpt.tokenization.bpe_files import Definition

__all__ = ["in_one_line", "library_of", "prepared", "require_whole_characters"]


def library_of(definition: Definition) -> Library:
    """Build the library's object that encodes text. It knows no special tokens, so no text can become one.

    Raises:
        InputError: if the library does not accept the definition.
    """
    library = prepared(definition.frame)
    plain = {token: index for token, index in definition.vocab.items() if token not in definition.special}
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    try:
        library.model = BPE(
            # added words are part of the vocabulary, so that they keep their ids
            vocab=plain | definition.words,
            merges=definition.merges,
            ignore_merges=bool(definition.frame["model"].get("ignore_merges")),
        )
        for token in definition.frame["added_tokens"]:
            if token["content"] in definition.words:
                library.add_tokens([AddedToken(token["content"], **{flag: token[flag] for flag in flags})])
    except BaseException as error:
        raise in_one_line(error, "its vocabulary and merges do not fit together") from None
    return library


def prepared(frame: dict[str, Any]) -> Library:
    """Build the library's object with an empty vocabulary. It normalises text and splits it into words."""
    steps = {key: frame.get(key) for key in ("normalizer", "pre_tokenizer")}
    empty = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    try:
        return Library.from_str(json.dumps({**empty, **steps}))
    except BaseException as error:
        problem = "the tokenizer's normalizer or pre_tokenizer is not understood"
        raise in_one_line(error, problem) from None


def in_one_line(error: BaseException, problem: str) -> BaseException:
    """Convert an error of the library to an InputError. (A panic of the library is not an Exception.)"""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        return error  # KeyboardInterrupt and the like are no errors of the library
    return InputError(f"{problem}: {' '.join(str(error).split())}")


def require_whole_characters(text: str, where: str = "") -> None:
    """Raise an InputError for a lone surrogate (half a character); the library's TypeError is unclear."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}position {error.start}: U+{ord(text[error.start]):04X} is half a character (a lone "
            f"surrogate), which no UTF-8 file can hold; remove it"
        ) from None
