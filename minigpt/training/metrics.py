"""What a run writes down about itself: metrics.jsonl, and the same numbers for the trackers asked for."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minigpt.console.terminal import warn
from minigpt.errors import InputError
from minigpt.storage.files import atomic_write
from minigpt.training.trackers import ReportTo, Trackers

__all__ = ["Metrics"]


class Metrics:
    """metrics.jsonl, one object a line, and the same numbers for TensorBoard and Weights & Biases.

    A full disk costs no line: what cannot be written is kept and tried again with the next line, and at the
    end. `flush` says whether all is on the disk, so that no checkpoint is ever ahead of its metrics.

    Args:
        enabled: False: nothing is written; of several processes only one writes.
    """

    def __init__(
        self,
        output: Path,
        steps_done: int,
        report_to: ReportTo = "tensorboard",
        settings: Mapping[str, Any] | None = None,
        enabled: bool = True,
    ) -> None:
        self._enabled = enabled
        self._path = output / "metrics.jsonl"
        self._descriptor = -1
        self._length = 0  # bytes of whole lines
        self._pending = b""
        self._warned = False
        self._steps_done = steps_done
        self._trackers = Trackers(output, steps_done, report_to, settings)

    def __enter__(self) -> "Metrics":
        if not self._enabled:
            return self
        kept = ""
        if self._steps_done and self._path.exists():  # lines behind the checkpoint will be written again
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = "".join(f"{line}\n" for line in lines if _step_of(line) <= self._steps_done)
        atomic_write(self._path, kept)
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        self._length = os.fstat(self._descriptor).st_size
        self._trackers.__enter__()
        return self

    def write(self, step: int, **values: object) -> None:
        """One line: the step and what was measured at it, or what happened (text and lists: no curve).

        NaN and infinities, for which JSON has no words, become null.
        """
        if not self._enabled:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._pending += (json.dumps({"step": step, **finite}, allow_nan=False) + "\n").encode()
        self._write_pending()
        self._trackers.write(step, values)

    def _write_pending(self) -> OSError | None:
        try:
            while self._pending:
                written = os.write(self._descriptor, self._pending)
                self._length += written
                self._pending = self._pending[written:]
        except OSError as error:
            if not self._warned:
                warn(f"cannot write {self._path}: {error.strerror or error}; its lines are kept in memory")
            self._warned = True
            return error
        self._warned = False
        return None

    def flush(self) -> None:
        """See that every line is on the disk.

        Raises:
            InputError: if one is not; it is kept and tried again.
        """
        error = self._write_pending()
        try:
            if error is None:
                os.fsync(self._descriptor)
                return
        except OSError as failure:
            error = failure
        raise InputError(f"cannot write {self._path}: {error.strerror or error}")

    def __exit__(self, *_: object) -> None:
        self._write_pending()
        if self._enabled:
            os.close(self._descriptor)
            self._trackers.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line that was cut off while it was written
        return math.inf
