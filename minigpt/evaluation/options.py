"""Defines the options of an evaluation. This module does not import torch, so `--help` is quick."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

__all__ = ["EvaluationOptions", "TaskOptions"]


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Options of an evaluation that are numbers, with their allowed ranges."""

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


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """The options for asking the questions of a task."""

    RANGES: ClassVar[Mapping[str, tuple[int, int]]] = {
        "shots": (0, 10**4),
        "shots_seed": (0, 2**63 - 1),
        "limit": (0, 10**9),
        "stride": (0, 10**7),
    }

    # Tasks
    shots: int = 0
    """examples with their answers before each question"""
    shots_seed: int | None = None
    """draw the shots at random with this seed; left out: the first ones of the dev part"""
    dev: Path | None = None
    """file or folder to take shots from; left out: the dev part beside the task"""
    instruction: str = ""
    """text before the shots"""
    score: Literal["letter", "text"] | None = None
    """what is scored of a choice; left out: letters where the choices are listed"""
    prompt_format: Literal["chat", "question", "text"] | None = None
    """plain text, question <sep> answer, or chat template; left out: <sep> if trained so, otherwise text"""
    limit: int = 0
    """most questions of a task, spread evenly over it; 0: all"""
    stride: int = 0
    """new tokens in each window of a text, behind the others; 0: windows do not overlap"""
