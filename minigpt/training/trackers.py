"""Where a run's numbers are shown while it runs: TensorBoard and Weights & Biases, both optional.

    minigpt train --report_to all                          # whichever of the two is installed
    WANDB_MODE=offline minigpt train --report_to wandb     # no network; `wandb sync` sends it later

metrics.jsonl (minigpt.training.metrics) is always written and is the truth; this is a copy of it for the eye.
So nothing here may stop a run: the first failure of a tracker is one warning, and that tracker is left out.

Weights & Biases is steered by its own environment variables (WANDB_PROJECT, WANDB_MODE, WANDB_DIR,
WANDB_RUN_ID, ...). The id of its run lies in the run's folder, so that `--resume` continues the same one.
"""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from minigpt.console.terminal import warn
from minigpt.storage.files import atomic_write

__all__ = ["WANDB_ID", "ReportTo", "Trackers"]

ReportTo = Literal["none", "tensorboard", "wandb", "all"]
WANDB_ID = "wandb_run_id"  # file in the run's folder


class _Tracker(Protocol):
    """One of the two."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """Event files in OUTPUT/tensorboard."""

    def __init__(self, output: Path, steps_done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # what was written behind the checkpoint that a resume begins at disappears from the curves
        self._writer = SummaryWriter(str(output / "tensorboard"), purge_step=steps_done + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if name != "seconds":
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run of Weights & Biases, online or offline, as the environment says."""

    def __init__(self, output: Path, steps_done: int, settings: Mapping[str, Any]) -> None:
        import wandb

        path = output / WANDB_ID
        known = path.read_text(encoding="utf-8").strip() if steps_done and path.exists() else None
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "minigpt",
            dir=os.environ.get("WANDB_DIR") or output,
            id=known or os.environ.get("WANDB_RUN_ID") or None,
            resume="allow",  # the run of that id if there is one, else a new one
            config=dict(settings),
            # what is printed holds answers, that is, people's data; and wandb would wrap our progress bar
            settings=wandb.Settings(console=os.environ.get("WANDB_CONSOLE") or "off"),
        )
        # Our own step is the horizontal axis. wandb's must not go back, and a resumed run does: the steps
        # behind its checkpoint are done again, to the same numbers.
        self._run.define_metric("*", step_metric="step")
        atomic_write(path, f"{self._run.id}\n")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class Trackers:
    """Those that `report_to` asks for and that are installed. Used as a context manager.

    Args:
        output: the run's folder.
        steps_done: 0, or the steps that a resumed run has done.
        report_to: Hugging Face's name. "tensorboard" uses it if it is installed, as "all" does with both.
        settings: the run's configuration, JSON-ready, to be shown beside its curves.
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
                # an installed one can fail to import, too; then its own words help
                missing = isinstance(error, ModuleNotFoundError) and error.name in (name, None)
                why = "is not installed" if missing or name == "tensorboard" else f"cannot be used: {error}"
                warn(f"{name} {why}: the curves are in metrics.jsonl (pip install 'minigpt[{name}]')")
            except Exception as error:
                self._complain(name, error)
        return self

    def write(self, step: int, values: Mapping[str, object]) -> None:
        """Show what was measured at a step. Text, lists, numbers that are not finite, events are no curve."""
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
        """Let each write what it still holds."""
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
