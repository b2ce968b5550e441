"""Logs the numbers of a run: in metrics.jsonl, TensorBoard, Weights & Biases and on the progress line."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt.console.terminal import ProgressLine, seconds, warn
from minigpt.errors import InputError, Message
from minigpt.evaluation.loss import Report
from minigpt.storage.files import atomic_write
from minigpt.storage.json_files import parse_json
from minigpt.storage.regular_files import read_text
from minigpt.training.config import TrainConfig
from minigpt.training.flops import model_flops, peak_flops
from minigpt.training.run_state import BatchSize, StepMetrics
from minigpt.training.step import TrainStep
from minigpt.training.trackers import ReportTo, Trackers

__all__ = ["Logger", "Metrics"]


class Logger:
    """Logs training steps and evaluations, and measures their time. Only process 0 writes.

    Args:
        config: options of the run.
        step: the TrainStep object, which holds the run's progress and data.
    """

    def __init__(self, config: TrainConfig, step: TrainStep) -> None:
        self._config, self._step, self._progress = config, step, step.progress
        self._peak = peak_flops(step.device, config.precision) * step.processes.size
        # if the run is resumed: a sentence for each option that has another value than before
        self.changed: Sequence[str] = ()
        self._loss_shown = Message("")
        self._evaluating = 0.0  # total seconds of all evaluations

    def open(self) -> "Logger":
        """Prepare logging, and return self, for a `with` block. The start of this block opens the files."""
        config, progress, is_main = self._config, self._progress, self._step.processes.is_main
        # A fine-tuning run evaluates the given weights before the first step. So even a run that was stopped
        # before its first step may have metrics to keep.
        resumed = progress.steps_done > 0 or (config.starts_from is not None and progress.evaluated)
        self._metrics = Metrics(
            config.output, progress.steps_done, config.report_to, config.as_dict(), is_main, resumed
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
        """Show steps on the progress line. Report unusual steps. Every `logging_steps` steps, write metrics.

        Args:
            steps: metrics of consecutive steps.
            sizes: for each step, the BatchSize of each of its batches.
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
        own = self._step.loss.step_metrics(progress.sums) if progress.sums else {}
        more = self._loss_shown
        if "reward" in own:
            more = Message("reward {reward:.3f}  {more}", reward=own["reward"], more=more)
        text = "loss {loss:.3f}  {more}{speed:,.0f} tokens/s  {use}{left} left"
        values = {"loss": last.loss, "more": more, "speed": speed, "use": use, "left": seconds(left)}
        self._line.update(progress.steps_done, Message(text, **values))
        for step in steps:
            self._log_event(step)
        if progress.steps_done % self._step.logging_steps == 0 and progress.loss_steps:
            blocks_done = progress.steps_done / self._step.loss.num_iterations
            batches_done = blocks_done * self._config.gradient_accumulation_steps
            self._metrics.write(
                progress.steps_done,
                train_loss=progress.loss_sum / progress.loss_steps,
                learning_rate=last.learning_rate,
                **({} if last.is_overflow else {"grad_norm": last.grad_norm}),
                **({} if last.loss_scale is None else {"loss_scale": last.loss_scale}),
                **own,
                epoch=batches_done / len(self._step.plan),
                tokens_per_second=round(speed),
                **({} if math.isnan(mfu) else {"mfu": round(mfu, 4)}),
                seconds=round(progress.train_seconds, 3),
            )
            progress.loss_sum, progress.loss_steps, progress.sums = 0.0, 0, []

    def _utilisation(self, sizes: Sequence[BatchSize]) -> float:
        """Return the model FLOP utilisation (MFU) since the last call. The time of evaluations is left out.

        Returns nan if the device's peak FLOP/s is unknown. The mean is not taken since the start of the run,
        because that would hide a slow hour.
        """
        if math.isnan(self._peak):
            return math.nan
        now = time.monotonic() - self._evaluating
        elapsed, self._mfu_since = max(now - self._mfu_since, 1e-9), now
        return sum(model_flops(self._step.model, *size) for size in sizes) / elapsed / self._peak

    def _log_event(self, step: StepMetrics) -> None:
        """Report a step if its loss is a spike, or if it was skipped because a number is not finite.

        A step that was skipped because of a float16 overflow is normal, so it is not reported.
        """
        is_spike = step.is_finite and step.loss > step.spike_threshold
        if step.is_overflow or (step.is_finite and not is_spike):
            return
        event = Message("spike" if is_spike else "skipped")
        positions = self._step.positions([step.step - 1])
        usual = Message(", above {limit:.4g}", limit=step.spike_threshold) if is_spike else Message("")
        text = "step {step:>6}  {event}: loss {loss:.4g}{usual}, gradient norm {norm:.4g}; {where}"
        values = {"step": step.step, "event": event, "loss": step.loss, "norm": step.grad_norm}
        where = self._step.data.where(positions, self._config)
        self._line.write(Message(text, **values, usual=usual, where=where))
        self._metrics.write(
            step.step,
            event=event,
            loss=step.loss,
            grad_norm=step.grad_norm,
            **{self._step.data.unit: positions},
        )

    def log_evaluation(self, report: Report, tasks: Mapping[str, float]) -> None:
        """Write the numbers of an evaluation, and the scores of its tasks, to metrics.jsonl."""
        self._metrics.write(self._progress.steps_done, **report.metrics(), **tasks)

    def show_evaluation(self, report: Report, is_best: bool, sample: str, began: float) -> None:
        """Print a line about an evaluation. `began` is the time at its start, from time.monotonic()."""
        star = "*" if is_best else " "
        text = "step {step:>6}  validation loss {loss:.4f}{star} {report}{sample}"
        values = {"step": self._progress.steps_done, "loss": report.loss, "star": star}
        self._line.write(Message(text, **values, report=report.shown(), sample=sample))
        self._loss_shown = Message("val {loss:.3f}  ", loss=report.loss)
        self._evaluating += time.monotonic() - began

    def log_rollback(self, reason: str, to_step: int, positions: Sequence[int]) -> None:
        """Report that the run has gone back to the weights of step `to_step`.

        positions: places in the training data (lines or window starts) of the rows of the last bad steps.
        """
        step = self._progress.steps_done
        self._metrics.write(
            step, event="rollback", reason=reason, to_step=to_step, **{self._step.data.unit: positions}
        )
        warn(
            f"step {step}: {reason}; back to the weights of step {to_step}, and on with the data of "
            f"step {step + 1}"
        )

    def flush(self) -> None:
        """Flush metrics.jsonl to the disk.

        Raises:
            InputError: if the flush fails. Lines that could not be written are written with the next line.
        """
        self._metrics.flush()


class Metrics:
    """Writes metrics.jsonl, one JSON object per line, and sends the same numbers to the trackers.

    If the disk is full, no line is lost: lines are kept in memory, and written with the next line or at the
    end. `flush` is called before each checkpoint, and fails if a line is not on the disk. So a checkpoint
    never has steps whose metrics are missing.

    Args:
        output: folder of the run.
        steps_done: 0, or the number of steps that a resumed run has done.
        report_to: the trackers to use.
        settings: options of the run, for the trackers.
        enabled: True in process 0. In the other processes nothing is written.
        resumed: True: keep the lines of an earlier file up to step `steps_done`. False: begin a new file.
            Default: True if `steps_done` is not 0.
    """

    def __init__(
        self,
        output: Path,
        steps_done: int,
        report_to: ReportTo = "tensorboard",
        settings: Mapping[str, Any] | None = None,
        enabled: bool = True,
        resumed: bool | None = None,
    ) -> None:
        self._enabled = enabled
        self._path = output / "metrics.jsonl"
        self._descriptor = -1
        self._length = 0  # size of the file in bytes
        self._pending = b""
        self._warned = False
        self._steps_done = steps_done
        self._resumed = steps_done > 0 if resumed is None else resumed
        self._trackers = Trackers(output, steps_done, report_to, settings)

    def __enter__(self) -> "Metrics":
        if not self._enabled:
            return self
        kept = ""
        # Delete the lines of steps after the checkpoint: the resumed run repeats these steps and their lines.
        if self._resumed and self._path.exists():
            lines = read_text(self._path, errors="replace").splitlines()
            kept = "".join(f"{line}\n" for line in lines if _step_of(line) <= self._steps_done)
        atomic_write(self._path, kept)
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        self._length = os.fstat(self._descriptor).st_size
        self._trackers.__enter__()
        return self

    def write(self, step: int, **values: object) -> None:
        """Write one line: the step number and its values. NaN and infinity become null."""
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
        """Flush all lines to the disk.

        Raises:
            InputError: if the flush fails. Lines that could not be written are written with the next line.
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
        return float(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError):  # an incomplete line: the process was killed while it wrote
        return math.inf
