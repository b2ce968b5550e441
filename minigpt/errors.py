"""Defines the error that a user sees, and functions for its message. Imports nothing from minigpt.

The module also checks numbers: `check_ranges` compares the fields of a class with its table `RANGES`.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = [
    "InputError", "Message", "check_ranges", "one_line", "printable", "printable_json", "printable_lines",
    "shown", "unknown_name", "whole_number",
]  # fmt: skip


class InputError(ValueError):
    """Bad input or usage. The message is the one line that a user sees: what, where, what to do.

    The message is always one line of limited length, even if it quotes names and values of a hostile file.
    """

    def __init__(self, message: str = "") -> None:
        line = one_line(message)
        # A Message that is one line already is passed on as it is, because only a Message can be translated.
        super().__init__(message if line == message else line)


class Message(str):
    """An English text that keeps its template and values, so that a terminal can show it in another language.

    >>> Message("{path} does not exist", path="a.txt")
    'a.txt does not exist'
    """

    template: str
    values: dict[str, object]

    def __new__(cls, template: str, /, **values: object) -> "Message":
        """Fill the values into the template."""
        self = super().__new__(cls, template.format(**values))
        self.template, self.values = template, values
        return self

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, object]]:
        """Return the arguments of `__new__` with which pickle makes an equal Message in another process."""
        return (self.template,), self.values


# Name of an option in other programs (lr) -> names of the same option in minigpt (learning_rate).
SHORT_NAMES = {
    "accumulation": "gradient_accumulation_steps",
    "amp": "precision",
    "batch": "batch_size",
    "beams": "num_beams",
    "bf16": "precision",
    "bs": "batch_size",
    "ckpt": "model",
    "checkpoint": "model checkpoint",
    "clip": "max_grad_norm",
    "context_length": "block_size",
    "ctx": "block_size",
    "d_model": "n_embd",
    "data": "train_data",
    "dim": "n_embd",
    "dtype": "precision dtype",
    "epochs": "num_train_epochs",
    "fp16": "precision",
    "gpu": "device",
    "grad_accum": "gradient_accumulation_steps",
    "grad_clip": "max_grad_norm",
    "heads": "n_head",
    "hidden_size": "n_embd",
    "init_from": "model",
    "layers": "n_layer",
    "lr": "learning_rate",
    "max_len": "max_length",
    "max_seq_len": "max_length block_size",
    "max_tokens": "max_new_tokens",
    "min_lr": "min_lr_ratio",
    "model": "init_from",
    "model_name_or_path": "model init_from",
    "model_path": "model init_from",
    "ngl": "device",
    "num_epochs": "num_train_epochs",
    "num_heads": "n_head",
    "num_layers": "n_layer",
    "out": "output output_dir",
    "output_dir": "output",
    "per_device_train_batch_size": "batch_size",
    "q": "question",
    "seq_len": "max_length block_size",
    "steps": "max_steps",
    "temp": "temperature",
    "tokens": "max_new_tokens n_tokens_to_generate",
    "val_file": "val_data",
    "vocab": "vocab_path",
    "warmup": "warmup_steps",
    "wd": "weight_decay",
}


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the message about an unknown flag, key or recipe, with a suggestion.

    If `name` is an option of other programs, such as --lr, the message suggests minigpt's name of this
    option. Otherwise it suggests the most similar known name. If no name is similar, it lists the known
    names, or points to --help.

    >>> unknown_name("flag", "--n_layers", ["--n_layer", "--n_head"])
    "unknown flag '--n_layers'; did you mean '--n_layer'?"
    >>> unknown_name("flag", "--lr", ["--n_layer", "--learning_rate"])
    "unknown flag '--lr'; did you mean '--learning_rate'?"
    """
    names = list(known)
    short = SHORT_NAMES.get(name.lstrip("-").replace("-", "_"), "").split()
    bare = {one.lstrip("-"): one for one in names}  # compare without dashes, which all flags share
    alike = difflib.get_close_matches(name.lstrip("-"), bare, n=1)
    near = [one for one in names if one.lstrip("-") in short] or [bare[one] for one in alike]
    if near:
        hint = Message("did you mean {name!r}?", name=near[0])
    elif kind == "flag" and len(names) > 12:
        hint = Message("--help lists the flags")
    else:
        hint = Message("known: {names}", names=", ".join(names))
    return Message("unknown {kind} {name}; {hint}", kind=Message(kind), name=shown(name), hint=hint)


def check_ranges(owner: type, values: Mapping[str, Any]) -> None:
    """Check numbers against the table RANGES of a class and of its base classes.

    RANGES maps a field's name to (least value, greatest value). If these are ints, the field's value must be
    an integer; if they are floats, it may be any number. A third entry is advice for the message. The value
    None is allowed if it is the field's default. If the default is a tuple, each number of the value is
    checked.

    Args:
        owner: the class with RANGES.
        values: field -> value; absent fields are not checked.

    Raises:
        InputError: for the first value outside its range; the message has the range and the value.

    >>> class Options:
    ...     RANGES = {"max_length": (3, 10**6)}
    >>> check_ranges(Options, {"max_length": 2})
    Traceback (most recent call last):
    minigpt.errors.InputError: max_length must be from 3 to 1000000: got max_length=2
    """
    for base in owner.__mro__:
        for name, (low, high, *advice) in vars(base).get("RANGES", {}).items():
            if name not in values:
                continue
            given, default = values[name], getattr(owner, name, 0)
            if given is None and default is None:
                continue
            are_several = isinstance(default, tuple) and isinstance(given, tuple | list)
            for value in given if are_several else (given,):
                _check_number(name, value, low, high, *advice)


def _check_number(name: str, value: object, low: float, high: float, advice: str = "") -> None:
    is_whole = isinstance(low, int)
    is_number = isinstance(value, int if is_whole else int | float) and not isinstance(value, bool)
    if is_number and low <= value <= high:  # type: ignore[operator]  # NaN fails this comparison
        return
    kind = Message("" if is_number else "a whole number " if is_whole else "a number ")
    first, last = (f"{end}" if is_whole else f"{end:g}" for end in (low, high))
    text = "{name} must be {kind}from {first} to {last}{hint}: got {name}={value}"
    hint = Message(" ({advice})", advice=Message(advice)) if advice else ""
    raise InputError(
        Message(text, name=name, kind=kind, first=first, last=last, hint=hint, value=shown(value))
    )


def whole_number(text: str) -> int | None:
    """Return the value of a text of 1 to 18 decimal digits; None for any other text.

    `int` raises errors for "²", which `isdigit` accepts, and for more than 4300 digits.

    >>> whole_number("12"), whole_number("²"), whole_number("9" * 5000)
    (12, None, None)
    """
    return int(text) if text.isdecimal() and len(text) <= 18 else None


def shown(value: object) -> str:
    """Return a value as text for a message, of at most 100 characters.

    >>> shown("a"), shown(10**5000), len(shown("a" * 10**6))
    ("'a'", 'a number of 16610 bits', 83)
    """
    if isinstance(value, int) and value.bit_length() > 200:  # Python refuses to print very long integers
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}..."


# Characters that are not printed as they are: control characters, line breaks, surrogates, and marks that
# change the order in which a terminal shows text. With such marks, one file name could look like another.
_UNSAFE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    r"""Return text that is safe to print in one line.

    Line breaks, terminal codes, marks of direction, invisible tags and lone surrogates are escaped.

    >>> print(printable("四川\n\x1b[31m\udc80\u202eabc"))
    四川\n\x1b[31m\udc80\u202eabc
    """
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def printable_json(line: str) -> str:
    r"""Return JSON that is safe to print in one line: what `printable` escapes becomes an escape of JSON.

    >>> print(printable_json('{"text": "‮abc"}'))
    {"text": "\u202eabc"}
    """
    return _UNSAFE.sub(lambda found: json.dumps(found[0])[1:-1], line)


def one_line(text: str, limit: int = 3000) -> str:
    """Return a message as one printable line. If it has more than `limit` characters, its middle is left out.

    >>> one_line("no such file:\\n  a.txt")
    'no such file: a.txt'
    """
    if _LINE_END.search(text):
        text = " ".join(text.split())
    text = printable(text)
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[5 - limit // 2 :]}"


_LINE_END = re.compile(r"[\n\r\t\v\f]")


def printable_lines(text: str) -> str:
    r"""Return the same as `printable`, but keep line breaks and tabs, for texts of several lines.

    >>> print(printable_lines("四川\n\x1b[31m"))
    四川
    \x1b[31m
    """
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))
