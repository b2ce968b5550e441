"""Reads --keyword_weight: keywords, and how much a sample with such a keyword counts in the loss."""

import math

from minigpt.errors import InputError

__all__ = ["parse_keyword_weights"]


def parse_keyword_weights(text: str) -> dict[str, float]:
    """Return a dict: keyword -> weight.

    Raises:
        InputError: if the text does not have the form of the example, or a weight is negative.

    >>> parse_keyword_weights("plt:3, pd:0.5")
    {'plt': 3.0, 'pd': 0.5}
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        keyword, colon, number = part.strip().rpartition(":")
        try:
            weight = float(number) if colon and keyword else math.nan
        except ValueError:
            weight = math.nan
        if not 0 <= weight < 1e6:
            raise InputError(
                "keyword_weight must be keywords with weights of at least 0, such as plt:3,pd:2: got "
                f"{part!r}"
            )
        if keyword in found:
            raise InputError(f"keyword_weight names {keyword!r} twice")
        found[keyword] = weight
    return found
