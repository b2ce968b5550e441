"""Builds a `tokenizers.Tokenizer` (Hugging Face) from a Definition. `tokenizers` errors become InputError."""

import contextlib
import json
import math
import os
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Library
from tokenizers.models import BPE, WordPiece

from minigpt.errors import InputError
from minigpt.tokenization.definition import Definition

__all__ = ["in_one_line", "library_of", "panics_without_trace", "prepared", "require_whole_characters"]

# `tokenizers` panics (crashes in Rust) with some damaged files, whatever text it encodes. This text is
# encoded when a tokenizer is loaded, to notice such damage early.
_PROBE = "A word, 2 words. 你好"
_ONE_AT_A_TIME = threading.Lock()
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def library_of(definition: Definition, with_special: bool = False) -> Library:
    """Build the `tokenizers.Tokenizer` (Hugging Face) that encodes text.

    Args:
        definition: the tokenizer's definition.
        with_special: True: the text of a special token becomes this token. False: it stays ordinary text,
            because the `tokenizers.Tokenizer` does not have the special tokens.

    Raises:
        InputError: if `tokenizers` does not accept the definition.
    """
    with panics_without_trace():
        return _library_of(definition, with_special)


def _library_of(definition: Definition, with_special: bool) -> Library:
    library = _prepared(definition.frame)
    added = definition.words | (definition.special if with_special else {})
    # Added words are put into the vocabulary: otherwise `tokenizers` would give them new ids.
    vocab = {
        text: index for text, index in definition.vocab.items() if text not in definition.special
    } | added
    try:
        library.model = _model(definition, vocab)
        for token in definition.frame["added_tokens"]:
            if token["content"] in added:
                flags = {flag: token[flag] for flag in _FLAGS}
                library.add_tokens([AddedToken(token["content"], **flags)])
    except BaseException as error:
        raise in_one_line(error, "its vocabulary and merges do not fit together") from None
    try:
        library.encode(_PROBE, add_special_tokens=False)
    except BaseException as error:
        raise in_one_line(error, f"it cannot encode {_PROBE!r}") from None
    return library


@contextlib.contextmanager
def panics_without_trace() -> Iterator[None]:
    """Hide the stack trace that `tokenizers` writes to standard error when it panics (crashes in Rust).

    Text that other threads write to standard error appears only at the end of the `with` block. This text is
    lost if the block raises an error.
    """
    with _ONE_AT_A_TIME, contextlib.ExitStack() as stack:
        try:
            written, stderr = stack.enter_context(tempfile.TemporaryFile()), os.dup(2)
        except OSError:  # no folder for temporary files, or standard error is closed
            yield
            return
        os.dup2(written.fileno(), 2)
        is_panic = False
        try:
            yield
        except BaseException:
            is_panic = True
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            written.seek(0)
            if not is_panic and (said := written.read()):
                with contextlib.suppress(OSError):
                    os.write(2, said)


def _model(definition: Definition, vocab: dict[str, int]) -> Any:
    settings = definition.frame["model"]
    unknown = settings.get("unk_token")
    if unknown is not None and unknown in definition.tokens:
        vocab = {**vocab, unknown: definition.tokens[unknown]}
    if settings["type"] == "WordPiece":
        keys = ("unk_token", "max_input_chars_per_word", "continuing_subword_prefix")
        return WordPiece(vocab=vocab, **{key: settings[key] for key in keys if key in settings})
    return BPE(
        vocab=vocab,
        merges=definition.merges,
        unk_token=unknown,
        fuse_unk=bool(settings.get("fuse_unk")),
        ignore_merges=bool(settings.get("ignore_merges")),
    )


def prepared(frame: dict[str, Any]) -> Library:
    """Build a `tokenizers.Tokenizer` without vocabulary: it can only normalise texts and split them."""
    with panics_without_trace():
        return _prepared(frame)


_MOST_GROWTH = 100.0  # a normalizer may make a text at most 100 times as long


def _growth(step: Any) -> float:
    """Return the largest factor by which the replacements of a normalizer can make a text longer."""
    match step:
        case {"type": "Sequence", "normalizers": [*steps]}:
            return math.prod(map(_growth, steps))
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if old:
            return max(1.0, len(new) / len(old))
        case {"type": "Replace", "content": str(new)}:
            return 1.0 + len(new)  # the worst case: a regular expression that matches between all characters
    return 1.0


def _prepared(frame: dict[str, Any]) -> Library:
    if _growth(frame.get("normalizer")) > _MOST_GROWTH:
        raise InputError(
            f"the tokenizer's normalizer may make a text over {_MOST_GROWTH:.0f} times as long, which is "
            "not supported"
        )
    steps = {key: frame.get(key) for key in ("normalizer", "pre_tokenizer")}
    empty = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    try:
        return Library.from_str(json.dumps({**empty, **steps}))
    except BaseException as error:
        problem = "the tokenizer's normalizer or pre_tokenizer is not understood"
        raise in_one_line(error, problem) from None


def in_one_line(error: BaseException, problem: str) -> BaseException:
    """Return an error of `tokenizers` as an InputError. Return other errors, such as Ctrl-C, unchanged.

    A panic (a crash in Rust) arrives as PanicException, which is a BaseException but no Exception.
    """
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        return error  # for example KeyboardInterrupt, which is no error of `tokenizers`
    return InputError(f"{problem}: {' '.join(str(error).split())}")


def require_whole_characters(text: str, where: str = "") -> None:
    """Raise an InputError if a text has a lone surrogate (half a character)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}position {error.start}: U+{ord(text[error.start]):04X} is half a character (a lone "
            f"surrogate), which no UTF-8 file can hold; remove it"
        ) from None
