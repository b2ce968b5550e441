"""The error that a user sees, and functions for its message. This module imports nothing from minigpt.

It also checks numbers: `check_ranges` compares the fields of a class with its table `RANGES`.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["InputError", "check_ranges", "printable", "printable_lines", "shown", "unknown_name"]


class InputError(ValueError):
    """Bad input or usage. The message is one line for the user: what, where, what to do."""


# name of an option in other programs -> names of the same option here
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
    "layers": "n_layer",
    "lr": "learning_rate",
    "max_len": "max_length",
    "max_seq_len": "max_length block_size",
    "max_tokens": "max_new_tokens",
    "min_lr": "min_lr_ratio",
    "model_name_or_path": "model",
    "model_path": "model",
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
    """Return the message about an unknown flag, key or recipe. It suggests the most similar known name.

    >>> unknown_name("flag", "--n_layers", ["--n_layer", "--n_head"])
    "unknown flag '--n_layers'; did you mean '--n_layer'?"
    >>> unknown_name("flag", "--lr", ["--n_layer", "--learning_rate"])
    "unknown flag '--lr'; did you mean '--learning_rate'?"
    """
    names = list(known)
    short = SHORT_NAMES.get(name.lstrip("-").replace("-", "_"), "").split()
    bare = {one.lstrip("-"): one for one in names}  # without the dashes, which all flags share
    alike = difflib.get_close_matches(name.lstrip("-"), bare, n=1)
    near = [one for one in names if one.lstrip("-") in short] or [bare[one] for one in alike]
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
    if not near and kind == "flag" and len(names) > 12:
        hint = "--help lists the flags"
    return f"unknown {kind} {shown(name)}; {hint}"


def check_ranges(owner: type, values: Mapping[str, Any]) -> None:
    """Check numbers against the table RANGES of a class and of its base classes.

    RANGES maps a field to its least and greatest value: two ints for an integer, two floats for any number.
    A third entry is advice for the message. None is allowed if it is the field's default. If a field has
    several numbers, each of them is checked.

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
            given = values[name]
            if given is None and getattr(owner, name, 0) is None:
                continue
            for value in given if isinstance(given, tuple | list) else (given,):
                _check_number(name, value, low, high, *advice)


def _check_number(name: str, value: object, low: float, high: float, advice: str = "") -> None:
    is_whole = isinstance(low, int)
    is_number = isinstance(value, int if is_whole else int | float) and not isinstance(value, bool)
    if is_number and low <= value <= high:  # type: ignore[operator]  # NaN fails this comparison
        return
    kind = "" if is_number else "a whole number " if is_whole else "a number "
    ends = " to ".join(f"{end}" if is_whole else f"{end:g}" for end in (low, high))
    hint = f" ({advice})" if advice else ""
    raise InputError(f"{name} must be {kind}from {ends}{hint}: got {name}={shown(value)}")


def shown(value: object) -> str:
    """Return a value as text for a message, with at most some hundred characters.

    >>> shown("a"), shown(10**5000), len(shown("a" * 10**6))
    ("'a'", 'a number of 16610 bits', 83)
    """
    if isinstance(value, int) and value.bit_length() > 200:  # Python refuses to print very long integers
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}..."


def printable(text: str) -> str:
    r"""Return text that is safe to print in one line: line ends, terminal codes and surrogates are escaped.

    >>> print(printable("四川\n\x1b[31m\udc80"))
    四川\n\x1b[31m\udc80
    """
    unsafe = r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
    return re.sub(unsafe, lambda found: found[0].encode("unicode_escape").decode(), text)


def printable_lines(text: str) -> str:
    r"""Return the same as `printable`, but keep line ends and tabs, for texts of several lines.

    >>> print(printable_lines("四川\n\x1b[31m"))
    四川
    \x1b[31m
    """
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))
