"""The options of an evaluation. This module does not need torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

__all__ = ["EvaluationOptions"]


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The options of an evaluation that are numbers, with their ranges."""

    RANGES: ClassVar[Mapping[str, tuple[int, int]]] = {
        "batch_size": (1, 10**6),
        "max_length": (0, 10**7),
        "max_new_tokens": (1, 10**9),
    }

    # Numbers
    batch_size: int = 64
    """number of pairs that are measured, and of questions that are answered, in one batch"""
    max_length: int = 0
    """most tokens of a pair, or of a window of --text, for the loss; 0: as in training, else block_size"""
    max_new_tokens: int | None = None
    """most tokens of an answer; without it: 128, or fewer if the model's context is full"""
