"""What a run logs: metrics.jsonl, the same numbers for the trackers, and the progress line."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt.console.terminal import ProgressLine, seconds, warn
from minigpt.errors import InputError
from minigpt.evaluation.loss import LossSum
from minigpt.storage.files import atomic_write
from minigpt.training.config import TrainConfig
from minigpt.training.flops import model_flops, peak_flops
from minigpt.training.run_state import BatchSize, StepMetrics
from minigpt.training.step import TrainStep
from minigpt.training.trackers import ReportTo, Trackers

__all__ = ["Logger", "Metrics"]


class Logger:
    """Logs steps and evaluations. It measures time, which decides nothing about the training.

    Args:
        config: of the run.
        step: its progress, and where its data comes from. Process 0 alone writes.
    """

    def __init__(self, config: TrainConfig, step: TrainStep) -> None:
        self._config, self._step, self._progress = config, step, step.progress
        self._peak = peak_flops(step.device, config.precision) * step.processes.size
        self.changed: Sequence[str] = ()  # by a resume
        self._loss_shown = ""
        self._evaluating = 0.0  # seconds

    def open(self) -> "Logger":
        """Begin, or resume, the files of the run. The result is a context manager."""
        config, progress, is_main = self._config, self._progress, self._step.processes.is_main
        self._metrics = Metrics(
            config.output, progress.steps_done, config.report_to, config.as_dict(), is_main
        )
        self._line = ProgressLine("training", self._step.total_steps)
        self._start = self._mfu_since = time.monotonic()
        self._first, self._first_tokens = progress.steps_done, progress.tokens_seen
        self._before = progress.train_seconds
        return self

    def __enter__(self) -> "Logger":
        self._metrics.__enter__()
        if self.changed:
            self._metrics.write(self._progress.steps_done, event="changed", what=list(self.changed))
        return self

    def __exit__(self, *error: Any) -> None:
        self._line.__exit__(*error)
        self._metrics.__exit__(*error)

    def log_steps(self, steps: Sequence[StepMetrics], sizes: Sequence[Sequence[BatchSize]]) -> None:
        """Show what became of steps, name those that stand out, and write a line where one is due.

        Args:
            steps: in their order.
            sizes: of the batches of each.
        """
        if not steps:
            return
        progress, last = self._progress, steps[-1]
        elapsed = time.monotonic() - self._start
        progress.train_seconds = self._before + elapsed
        speed = (progress.tokens_seen - self._first_tokens) / max(elapsed - self._evaluating, 1e-9)
        left = (self._step.total_steps - progress.steps_done) * elapsed / (progress.steps_done - self._first)
        mfu = self._utilisation([size for s, some in zip(steps, sizes) if s.is_finite for size in some])
        use = "" if math.isnan(mfu) else f"MFU {mfu:.0%}  "
        shown = f"loss {last.loss:.3f}  {self._loss_shown}{speed:,.0f} tokens/s  {use}{seconds(left)} left"
        self._line.update(progress.steps_done, shown)
        for step in steps:
            self._log_event(step)
        if progress.steps_done % self._step.logging_steps == 0 and progress.loss_steps:
            batches_done = progress.steps_done * self._config.gradient_accumulation_steps
            self._metrics.write(
                progress.steps_done,
                train_loss=progress.loss_sum / progress.loss_steps,
                learning_rate=last.learning_rate,
                **({} if last.is_overflow else {"grad_norm": last.grad_norm}),
                **({} if last.loss_scale is None else {"loss_scale": last.loss_scale}),
                epoch=batches_done / len(self._step.plan),
                tokens_per_second=round(speed),
                **({} if math.isnan(mfu) else {"mfu": round(mfu, 4)}),
                seconds=round(progress.train_seconds, 3),
            )
            progress.loss_sum, progress.loss_steps = 0.0, 0

    def _utilisation(self, sizes: Sequence[BatchSize]) -> float:
        """Model FLOP utilisation since the last call, less the time of evaluations; nan: no known peak.

        (In the mean since the start a slower hour would hardly show.)
        """
        if math.isnan(self._peak):
            return math.nan
        now = time.monotonic() - self._evaluating
        elapsed, self._mfu_since = max(now - self._mfu_since, 1e-9), now
        return sum(model_flops(self._step.model, *size) for size in sizes) / elapsed / self._peak

    def _log_event(self, step: StepMetrics) -> None:
        """A step that was skipped, or whose loss stands out."""
        is_spike = step.is_finite and step.loss > step.spike_threshold
        if step.is_overflow or (step.is_finite and not is_spike):
            return
        event = "spike" if is_spike else "skipped"
        positions = self._step.positions([step.step - 1])
        usual = f", above {step.spike_threshold:.4g}" if is_spike else ""
        self._line.write(
            f"step {step.step:>6}  {event}: loss {step.loss:.4g}{usual}, gradient norm "
            f"{step.grad_norm:.4g}; {self._step.data.where(positions, self._config)}"
        )
        self._metrics.write(
            step.step,
            event=event,
            loss=step.loss,
            grad_norm=step.grad_norm,
            **{self._step.data.unit: positions},
        )

    def log_losses(self, counted: LossSum, answer: LossSum, everything: LossSum) -> None:
        """The losses of an evaluation."""
        self._metrics.write(
            self._progress.steps_done,
            val_loss=counted.loss,
            val_answer_loss=answer.loss,
            val_all_loss=everything.loss,
        )

    def show_evaluation(self, counted: LossSum, is_best: bool, sample: str, began: float) -> None:
        """One line for an evaluation that began at `began`."""
        star = "*" if is_best else " "
        self._line.write(
            f"step {self._progress.steps_done:>6}  validation loss {counted.loss:.4f}{star} "
            f"perplexity {counted.perplexity:.2f}{sample}"
        )
        self._loss_shown = f"val {counted.loss:.3f}  "
        self._evaluating += time.monotonic() - began

    def log_rollback(self, reason: str, to_step: int, positions: Sequence[int]) -> None:
        """The weights of an earlier step have come back."""
        step = self._progress.steps_done
        self._metrics.write(
            step, event="rollback", reason=reason, to_step=to_step, **{self._step.data.unit: positions}
        )
        warn(
            f"step {step}: {reason}; back to the weights of step {to_step}, and on with the data of "
            f"step {step + 1}"
        )

    def flush(self) -> None:
        """See that every line of metrics.jsonl is on the disk.

        Raises:
            InputError: if one is not; it is kept and tried again.
        """
        self._metrics.flush()


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
