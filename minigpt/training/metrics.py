"""What a run writes down about itself: metrics.jsonl, and the same numbers for TensorBoard."""

import json
import math
import sys
from pathlib import Path
from typing import IO, Protocol

from minigpt.files import atomic_write

__all__ = ["Metrics"]


class _Writer(Protocol):
    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """metrics.jsonl, one object a line, and the same numbers for TensorBoard where it is installed."""

    def __init__(self, output: Path, steps_done: int) -> None:
        self._path = output / "metrics.jsonl"
        self._file: IO[str] | None = None
        self._board: _Writer | None = None
        self._steps_done = steps_done
        self._folder = output / "tensorboard"

    def __enter__(self) -> "Metrics":
        kept = ""
        if self._steps_done and self._path.exists():  # lines behind the checkpoint will be written again
            lines = self._path.read_text(encoding="utf-8").splitlines()
            kept = "".join(f"{line}\n" for line in lines if _step_of(line) <= self._steps_done)
        atomic_write(self._path, kept)
        self._file = self._path.open("a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print("tensorboard is not installed: the curves are in metrics.jsonl alone", file=sys.stderr)
        else:
            self._board = SummaryWriter(str(self._folder), purge_step=self._steps_done + 1)
        return self

    def write(self, step: int, **values: float) -> None:
        """One line: the step and what was measured at it."""
        assert self._file is not None
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if self._board is not None and name != "seconds":
                self._board.add_scalar(name, value, step)

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.close()
        if self._board is not None:
            self._board.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line that was cut off while it was written
        return math.inf
