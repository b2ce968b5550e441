"""The training loop: steps, evaluations, checkpoints, signals.

A run that was stopped and resumed gives the same bits as a run that was never stopped.

`Trainer` builds the parts of a run; `Trainer.run` is the loop. The parts are:

    TrainStep        one step                           step.py
    Logger           metrics.jsonl, trackers, progress  metrics.py
    Checkpointer     saves and loads the run            checkpointer.py
    NonFiniteGuard   rolls back after NaN or infinity   non_finite.py
    StopRequest      Ctrl-C and SIGTERM                 stop_request.py
    Processes        communication between processes    distributed.py

A checkpoint holds everything that the rest of a run depends on. Speed and time are measured, but a run's
results do not depend on them.
"""

import dataclasses
import math
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import minigpt
from minigpt.devices import pick_device, seed_everything
from minigpt.errors import InputError, Message
from minigpt.evaluation.loss import Report
from minigpt.storage.files import atomic_write, make_folder
from minigpt.storage.json_files import json_text
from minigpt.training import checkpoint
from minigpt.training.checkpointer import Checkpointer
from minigpt.training.config import RUN_FILE, TrainConfig
from minigpt.training.distributed import SINGLE_PROCESS, Processes
from minigpt.training.loss import Objective
from minigpt.training.metrics import Logger
from minigpt.training.mixed_precision import pick_precision
from minigpt.training.model_files import ModelFiles
from minigpt.training.non_finite import NonFiniteGuard
from minigpt.training.objective import make_objective
from minigpt.training.rewards import RewardError
from minigpt.training.run_data import AnyData
from minigpt.training.step import TrainStep
from minigpt.training.stop_request import StopNow, Stopped

if TYPE_CHECKING:
    from minigpt.training.task_scores import TaskScores

__all__ = ["RunFinishedError", "Trainer"]


class RunFinishedError(InputError):
    """Raised when a run is resumed that has already done all its steps."""


class Trainer:
    """A training run. `run()` does the whole run. To continue an earlier run, call `resume()` before `run()`.

    Args:
        config: options of the run.
        data: training and validation data.
        processes: the processes that train together.
        objective: the model with its loss, and the format of its files. None: they are built as `config`
            says. Parameters that do not require gradients are not trained.

    Raises:
        InputError: if the model's sizes do not fit together, or this machine lacks the device or precision.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: AnyData,
        processes: Processes = SINGLE_PROCESS,
        objective: tuple[Objective, ModelFiles] | None = None,
    ) -> None:
        with processes.shared_errors():
            device = pick_device(processes.device(config.device))
        # Process 0 decides for all processes what `auto` means. The decision is written to run.json, so that
        # a resumed run has the same precision.
        precision = processes.broadcast(pick_precision(config.precision, device))
        config = dataclasses.replace(config, precision=precision)
        if config.output.exists() and not config.output.is_dir():
            raise InputError(f"{config.output} is a file; --output needs a folder")
        if config.threads:
            torch.set_num_threads(config.threads)
        seed_everything(config.seed)
        self.config, self.data, self.processes, self.device = config, data, processes, device
        with processes.shared_errors():
            self.tasks = _tasks(config)
        self.notes: Mapping[str, Any] = {}  # further entries for run.json
        with processes.shared_errors():
            loss, files = objective or make_objective(config, data, device)
        self.step = TrainStep(config, loss, data, device, processes)
        self.eval_steps = config.eval_steps or max(1, math.ceil(self.step.total_steps / 10))
        self.model, self.progress, self.stop_request = loss.model, self.step.progress, self.step.stop_request
        # If training begins with existing weights, they are evaluated before the first step.
        self.progress.evaluated = config.starts_from is None
        processes.seed(config.seed)
        self.logger = Logger(config, self.step)
        self.checkpointer = Checkpointer(config, self.step, self.logger, files)
        self.guard = NonFiniteGuard(config, self.step, self.checkpointer, self.logger)

    # -- the run ---------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train to the end, or until a signal asks to stop.

        Returns: the dict that `--json` prints: steps, best validation loss, seconds, path of the best model.

        Raises:
            Stopped: after SIGINT, SIGTERM, SIGUSR1 or SIGHUP, once the state is saved.
            InputError: if the last checkpoint cannot be written, or if loss, gradients or weights become NaN
                or infinite after the run has been rolled back once.
        """
        self._prepare_folder()
        with self.stop_request.listening(), self.logger.open(), self.checkpointer:
            try:
                while not self.is_finished():
                    if self.evaluation_is_due():
                        self.evaluate_and_save()
                    else:
                        self.step()
                        if self.metrics_are_due():
                            self.log_metrics()
                    if self.stop_request.agreed is not None and not self.is_finished():
                        raise StopNow
            except StopNow:
                raise self._saved_and_stopped() from None
            except RewardError as error:
                raise self._saved_after(error) from None
        more: dict[str, Any] = {}
        if self.processes.is_main and math.isfinite(self.progress.best_val_loss):
            more = self.step.loss.conclude(self.data, self.config.output / "best")
        return {
            **more,
            "steps": self.progress.steps_done,
            **self.progress.best_metrics,
            "val_loss": self.progress.best_val_loss,
            "best_step": self.progress.best_step,
            "seconds": round(self.progress.train_seconds, 1),
            "tokens": self.progress.tokens_seen,
            "trained_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "model": str(self.config.output / "best"),
        }

    def is_finished(self) -> bool:
        """Return True if all steps and the last evaluation are done."""
        return self.progress.steps_done >= self.step.total_steps and self.progress.evaluated

    def evaluation_is_due(self) -> bool:
        """Return True if an evaluation belongs after the current step, but was not done yet.

        Evaluations are done every `eval_steps` steps, every `keep_every` steps, and after the last step.
        """
        done, keep_every = self.progress.steps_done, self.config.keep_every
        is_due = done % self.eval_steps == 0 or done >= self.step.total_steps
        is_due = is_due or (keep_every > 0 and done % keep_every == 0)
        return is_due and not self.progress.evaluated

    def metrics_are_due(self) -> bool:
        """Return True if it is time to read and log the metrics of the last steps.

        It is time every `logging_steps` steps, before an evaluation, and when a signal asks the run to stop.
        On a CPU or MPS, it is also time after a bad step (loss or gradient not finite), and once per second
        for the progress line. On CUDA, these two cases are left out, because reading the metrics makes the
        CPU wait for the GPU.
        """
        is_logging_step = self.progress.steps_done % self.step.logging_steps == 0
        if is_logging_step or self.evaluation_is_due() or self.stop_request.agreed is not None:
            return True
        if self.step.asynchronous:
            return False
        return time.monotonic() > self._last_read + 1 or bool(self.step.pending_metrics[-1].found_inf)

    def log_metrics(self) -> None:
        """Log the metrics of all steps since the last call. Roll back after too many bad steps in a row."""
        self._last_read = time.monotonic()
        sizes = [each.sizes for each in self.step.pending_metrics]
        steps = self.step.read_metrics()
        self.logger.log_steps(steps, sizes)
        self.guard.check_steps(steps)

    def evaluate(self) -> Report:
        """Measure the model on all validation data."""
        return self.step.parallel.evaluate(self.data.val.in_order(128), self.stop_request)

    def evaluate_and_save(self) -> None:
        """Measure the validation loss, save a checkpoint, and print a sample of the model's output."""
        began, progress = time.monotonic(), self.progress
        # If weights are not finite, earlier weights are loaded. The loop's next iteration evaluates them.
        if self.guard.rolled_back_weights():
            return
        report = self.evaluate()
        self.logger.log_evaluation(report, self._task_scores())
        if not math.isfinite(report.loss):  # even finite weights can give NaN or infinity
            self.guard.roll_back("the validation loss is not a finite number")
            return
        self.checkpointer.wait()  # if a save in the background failed, `wait` resets best_val_loss
        is_best = report.loss < progress.best_val_loss
        if is_best:
            progress.best_val_loss, progress.best_step = report.loss, progress.steps_done
            progress.best_metrics = {k: v for k, v in report.metrics().items() if math.isfinite(v)}
        progress.evaluated = True
        self.checkpointer.save(is_best, final=self.is_finished())
        self.logger.show_evaluation(report, is_best, self._sample(), began)

    def _task_scores(self) -> dict[str, float]:
        """Measure the tasks of --eval_task in process 0. A sharded model is not measured."""
        if self.tasks is None or not self.processes.is_main or self.step.parallel.is_sharded:
            return {}
        return self.tasks.of(self.model, self.data.tokenizer)

    def _sample(self) -> str:
        """Return a sample of the model's output. If sampling fails, return the error as a text."""
        if not self.processes.is_main or self.step.parallel.is_sharded:
            return ""
        try:
            return self.data.sample(self.model, self.progress.steps_done // self.eval_steps)
        except Exception as error:
            return Message("  no sample: {why}", why=" ".join(str(error).split()))

    # -- start, resume, stop ---------------------------------------------------------------------------------

    def _prepare_folder(self) -> None:
        output, self._last_read = self.config.output, -math.inf
        contents = {"minigpt": minigpt.__version__, "config": self.config.as_dict(), **self.notes}
        with self.processes.shared_errors():
            if self.processes.is_main:
                make_folder(output)
                checkpoint.clear_leftovers(output)
                atomic_write(output / RUN_FILE, json_text(contents, indent=2) + "\n")

    def resume(self) -> Path:
        """Load the newest checkpoint that is complete and undamaged. Returns its folder.

        Raises:
            InputError: if there is no such checkpoint; if it belongs to other data, vocabulary or model; or
                if all steps are done already.
        """
        folder = self.checkpointer.resume()
        if self.is_finished():
            raise RunFinishedError(
                f"{folder}: the run is finished ({self.progress.steps_done} steps); "
                "raise --num_train_epochs or --max_steps to continue"
            )
        return folder

    def _saved_after(self, error: RewardError) -> InputError:
        """Save the run after an error in the user's own reward function. Return the error to raise."""
        if not self.progress.steps_done:
            return error
        self.log_metrics()
        if not self.checkpointer.is_saved():
            self.checkpointer.save(final=True)
        self.checkpointer.wait(final=True)
        done, output = self.progress.steps_done, self.config.output
        return InputError(f"{error}; step {done} is saved in {output / 'last'}: mend it, then --resume")

    def _saved_and_stopped(self) -> Stopped:
        number = self.stop_request.agreed
        assert number is not None
        self.log_metrics()  # the metrics of all finished steps; the interrupted step has none
        self.guard.rolled_back_weights()
        if not self.checkpointer.is_saved():
            self.checkpointer.save(final=True)
        self.checkpointer.wait(final=True)
        name, done, output = signal.Signals(number).name, self.progress.steps_done, self.config.output
        where, again = output / "last", f"--output {output} --resume"
        text = "{name}: saved step {done} in {where}; continue with {again}"
        return Stopped(128 + number, Message(text, name=name, done=done, where=where, again=again))


def _tasks(config: TrainConfig) -> "TaskScores | None":
    """Read the tasks of --eval_task."""
    if not config.eval_task:
        return None
    from minigpt.training.task_scores import TaskScores  # here, because it imports all of minigpt.generation

    return TaskScores(config.eval_task, config.text is not None, config.encoding)
