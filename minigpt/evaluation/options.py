"""What may be asked of an evaluation. This module needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

__all__ = ["EvaluationOptions"]


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The numbers of an evaluation, each with its range."""

    RANGES: ClassVar[Mapping[str, tuple[int, int]]] = {
        "batch_size": (1, 10**6),
        "max_length": (0, 10**7),
        "max_new_tokens": (1, 10**9),
    }

    # How
    batch_size: int = 64
    """pairs measured, and questions answered, at once"""
    max_length: int = 0
    """tokens of a pair that the loss is measured on, or of a window of --text; 0: the model's block_size"""
    max_new_tokens: int | None = None
    """tokens of an answer, at most; left out: up to 128, fewer if the model's context is full before"""
