"""Sends a run's numbers to TensorBoard and Weights & Biases while it trains. Both are optional.

    minigpt train --report_to all                          # both, if they are installed
    WANDB_MODE=offline minigpt train --report_to wandb     # no network; `wandb sync` sends the numbers later

metrics.jsonl (minigpt.training.metrics) is always written and has all numbers; trackers only show them. So an
error in a tracker never stops a run: it is printed as a warning, and the tracker is switched off.

Weights & Biases reads its own environment variables (WANDB_PROJECT, WANDB_MODE, WANDB_DIR, WANDB_RUN_ID). The
id of its run is kept in a file in the output folder, so that `--resume` continues the same run.
"""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from minigpt.console.terminal import warn
from minigpt.storage.files import atomic_write
from minigpt.storage.regular_files import read_text

__all__ = ["WANDB_ID", "ReportTo", "Trackers"]

ReportTo = Literal["none", "tensorboard", "wandb", "all"]
WANDB_ID = "wandb_run_id"  # file in the output folder with the id of the wandb run


class _Tracker(Protocol):
    """A tool that shows numbers: TensorBoard or Weights & Biases."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """Writes event files into OUTPUT/tensorboard."""

    def __init__(self, output: Path, steps_done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A stopped run may have written points after its last checkpoint. `purge_step` removes them.
        self._writer = SummaryWriter(str(output / "tensorboard"), purge_step=steps_done + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if name != "seconds":
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """Sends numbers to a run of Weights & Biases, online or offline (WANDB_MODE)."""

    def __init__(self, output: Path, steps_done: int, settings: Mapping[str, Any]) -> None:
        import wandb

        path = output / WANDB_ID
        known = read_text(path).strip() if steps_done and path.exists() else None
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "minigpt",
            dir=os.environ.get("WANDB_DIR") or output,
            id=known or os.environ.get("WANDB_RUN_ID") or None,
            resume="allow",  # "allow": continue the run of this id, or start a new run
            config=dict(settings),
            # The run's printed output is not sent, because it shows answers, which may be private. wandb
            # would also break our progress line.
            settings=wandb.Settings(console=os.environ.get("WANDB_CONSOLE") or "off"),
        )
        # Our own step number is the horizontal axis. wandb's step may not go back, but a resumed run repeats
        # the steps after its checkpoint.
        self._run.define_metric("*", step_metric="step")
        atomic_write(path, f"{self._run.id}\n")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class Trackers:
    """The trackers that `report_to` names and that are installed. Use it in a `with` block.

    Args:
        output: folder of the run.
        steps_done: 0, or the number of steps that a resumed run has done.
        report_to: "none", "tensorboard", "wandb" or "all"; a tracker that is not installed is left out.
        settings: the run's options, in types that JSON can hold. The trackers show them beside the curves.
    """

    def __init__(
        self, output: Path, steps_done: int, report_to: ReportTo, settings: Mapping[str, Any] | None = None
    ) -> None:
        self._output, self._steps_done, self._settings = output, steps_done, settings or {}
        self._names = ("tensorboard", "wandb") if report_to == "all" else (report_to,)
        self._trackers: dict[str, _Tracker] = {}

    def __enter__(self) -> "Trackers":
        makers: dict[str, Callable[[], _Tracker]] = {
            "tensorboard": lambda: _TensorBoard(self._output, self._steps_done),
            "wandb": lambda: _Wandb(self._output, self._steps_done, self._settings),
        }
        for name in self._names:
            if name == "none":
                continue
            try:
                self._trackers[name] = makers[name]()
            except ImportError as error:
                # missing: the package is not installed. Otherwise it is installed, but its import fails. The
                # warning about wandb distinguishes these two cases, the warning about tensorboard does not.
                missing = isinstance(error, ModuleNotFoundError) and error.name in (name, None)
                why = "is not installed" if missing or name == "tensorboard" else f"cannot be used: {error}"
                warn(f"{name} {why}: the curves are in metrics.jsonl (pip install 'minigpt[{name}]')")
            except Exception as error:
                self._complain(name, error)
        return self

    def write(self, step: int, values: Mapping[str, object]) -> None:
        """Send the numbers of a step. Values that are not finite numbers (texts, lists, NaN) are left out."""
        if "event" in values:
            return
        numbers = {
            name: value
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        }
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.write(step, numbers)
            except Exception as error:
                del self._trackers[name]
                self._complain(name, error)

    def close(self) -> None:
        """Let each tracker write its remaining numbers, and close it."""
        while self._trackers:
            name, tracker = self._trackers.popitem()
            try:
                tracker.close()
            except Exception as error:
                self._complain(name, error)

    def __exit__(self, *_: object) -> None:
        self.close()

    def _complain(self, name: str, error: Exception) -> None:
        what = " ".join(str(error).split()) or type(error).__name__
        warn(f"{name} failed and gets no more numbers of this run; metrics.jsonl has them all: {what}")
