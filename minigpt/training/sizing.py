"""Parses the values of `--size`: a name, a time, or an amount of arithmetic (FLOPs)."""

import re
from dataclasses import dataclass
from typing import Literal

from minigpt.errors import InputError

__all__ = ["NAMES", "Size", "parse_size"]

NAMES = ("small", "base", "large")
_FORMS = "small, base, large, a time (10min, 2h) or an amount of arithmetic (2e6GFLOP)"
_UNITS = {
    **dict.fromkeys(("s", "sec", "second", "seconds"), ("seconds", 1.0)),
    **dict.fromkeys(("m", "min", "minute", "minutes"), ("seconds", 60.0)),
    **dict.fromkeys(("h", "hour", "hours"), ("seconds", 3600.0)),
    **dict.fromkeys(("gflop", "gflops"), ("flops", 1e9)),
    **dict.fromkeys(("tflop", "tflops"), ("flops", 1e12)),
    **dict.fromkeys(("pflop", "pflops"), ("flops", 1e15)),
}
# Unit -> largest amount that --size allows, as a number and as text for the error message.
_MOST = {"seconds": (30 * 86400.0, "720h"), "flops": (1e24, "1e15GFLOP")}


@dataclass(frozen=True)
class Size:
    """A parsed value of --size."""

    unit: Literal["name", "seconds", "flops"]
    amount: float  # number of seconds or FLOPs; 0 for a name
    text: str


def parse_size(text: str) -> Size:
    """Parse a size: `small`, `base`, `large`, `10min`, `10m`, `2h`, `90s`, `2e6GFLOP`, ...

    Raises:
        InputError: for any other text, an amount without a unit, an amount of 0, or a too large amount.

    >>> parse_size("10min").amount, parse_size("2e6GFLOP").amount
    (600.0, 2000000000000000.0)
    """
    plain = text.strip().lower()
    if plain in NAMES:
        return Size("name", 0.0, plain)
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?) *([a-z]*)", plain)
    if not found or (found[2] and found[2] not in _UNITS):
        raise InputError(f"size must be {_FORMS}: got size={text}")
    if not found[2]:
        raise InputError(f"size={text} has no unit: write {text}min, {text}h or {text}GFLOP")
    unit, factor = _UNITS[found[2]]
    amount = float(found[1]) * factor
    most, written = _MOST[unit]
    if not 0 < amount <= most:
        raise InputError(f"size must be above 0 and at most {written}: got size={text}")
    return Size("seconds" if unit == "seconds" else "flops", amount, text.strip())
