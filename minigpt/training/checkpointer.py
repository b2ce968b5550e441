"""Saves and loads the checkpoints of a run. Saves may run in the background.

With `save_async`, a save runs in the background: the training loop copies the state and continues, and a
thread writes the copy. Only one save runs at a time: the next save, and the end of the run, wait for it. The
thread does the same work in the same order as a save in the foreground, so a crash does no more harm.
"""

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from minigpt.console.command_line import show
from minigpt.console.terminal import warn
from minigpt.devices import random_state, set_random_state
from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel
from minigpt.training import checkpoint
from minigpt.training.checkpoint import Contents, Snapshot
from minigpt.training.config import TrainConfig
from minigpt.training.metrics import Logger
from minigpt.training.model_files import ModelFiles
from minigpt.training.optimizer import blank_state, load_state, state_tensors
from minigpt.training.parallel import ShardedSave, read_shards
from minigpt.training.run_state import changes, training_state
from minigpt.training.step import TrainStep

__all__ = ["Checkpointer"]


class Checkpointer:
    """Saves and loads the checkpoints of a run. The end of its `with` block waits for a running save.

    Args:
        config: options of the run, among them the output folder, `save_async` and `on_save_error`.
        step: the TrainStep object, whose model, optimisers, progress and data fingerprints are saved.
        logger: writes metrics.jsonl to the disk before each save, so that a checkpoint is never newer than
            its metrics.
        files: reads and writes the model's files in a checkpoint.
    """

    def __init__(self, config: TrainConfig, step: TrainStep, logger: Logger, files: ModelFiles) -> None:
        self._config, self._step, self._logger, self._files = config, step, logger, files
        self._processes = step.processes
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None  # error of the last save; `_join` raises or prints it
        self._newest = -1  # step of the last save; -1: there was none, or it failed
        # loss, step and metrics of the best model whose save is known to have succeeded
        self._confirmed: tuple[Any, ...] = (math.inf, 0, {})

    def __enter__(self) -> "Checkpointer":
        self._confirm(True)
        return self

    # -- saving ----------------------------------------------------------------------------------------------

    def save(self, best: bool = False, final: bool = False) -> None:
        """Wait for a running save. Then save the current step, and move the link `last` to its checkpoint.

        If a save fails and the run continues, the best loss, step and metrics in `progress` are set back to
        those of the best model that was really saved.

        Args:
            best: move the link `best`, too.
            final: the last save of the run: wait until it is written, and raise any error.

        Raises:
            InputError: if a save failed, and `final` is true or `on_save_error` is "stop".
        """
        step, processes, saved = self._step, self._processes, True
        rng = {**random_state(step.device), **step.loss.state()}
        model = step.parallel.full_model()
        rngs = processes.all_gather(safetensors.torch.save(rng))
        optimizer = state_tensors(step.model, step.optimizers)
        shards = ShardedSave(processes, optimizer) if step.parallel.is_sharded else None
        with processes.shared_errors():
            if processes.is_main:
                try:
                    saved = self._save(best, final, model, optimizer, [rng, *rngs[1:]], shards)
                finally:
                    if shards is not None:
                        shards.end()
            elif shards is not None:
                shards.follow()
        self._confirm(processes.broadcast(saved))

    def _save(
        self,
        best: bool,
        final: bool,
        model: LanguageModel,
        optimizer: dict[str, torch.Tensor],
        rngs: list[Any],
        shards: ShardedSave | None,
    ) -> bool:
        """Wait for the previous save, then save. Only process 0 calls this method.

        Returns: False if the previous save or this save has failed, but the run continues; otherwise True. A
        save that still runs in the background counts as successful here; the next `_join` reports its error.
        """
        config, step, before = self._config, self._step, self._join(final=False)
        try:
            self._logger.flush()
        except InputError as error:
            self._error = error
            return self._join(final) and before
        background = config.save_async
        contents = Contents(
            step=step.progress.steps_done,
            write_model=self._files.writer(model, step.data.tokenizer, background),
            optimizer={k: v.clone() for k, v in optimizer.items()} if background else optimizer,
            rng=rngs[0],
            state={
                **training_state(
                    config, step.data, step.device, step.total_steps, step.progress, self._processes.size
                ),
                **self._files.facts(),
            },
            other_rngs=rngs[1:],
            shards=shards,
        )
        self._newest = contents.step
        if not background:
            self._write(contents, best)
            return self._join(final) and before
        self._thread = threading.Thread(target=self._write, args=(contents, best), daemon=True)
        self._thread.start()
        return (self._join(final) if final else True) and before

    def _write(self, contents: Contents, best: bool) -> None:
        output = self._config.output
        try:
            folder = checkpoint.save(output, contents)
            checkpoint.set_link(output, "last", folder)
            if best:
                checkpoint.set_link(output, "best", folder)
            self._prune()
        except BaseException as error:
            if not self._config.save_async and not isinstance(error, InputError):
                raise
            self._error = error  # `_join` raises or prints this error in the main thread

    def _prune(self) -> None:
        try:
            checkpoint.prune(self._config.output, self._config.save_total_limit, self._config.keep_every)
        except InputError as error:
            if self._config.on_save_error == "stop":
                raise
            warn(str(error))  # only the deletion of old checkpoints has failed, so the run continues

    def _join(self, final: bool) -> bool:
        """Wait for a running save. Raises the same errors as `save`.

        Returns: False if the last save has failed, but the run continues; otherwise True.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is None:
            return True
        self._newest = -1
        if final or self._config.on_save_error == "stop" or not isinstance(error, InputError):
            raise error
        warn(
            f"{error}; training continues, and the next save tries again "
            "(--on_save_error stop: it would stop)"
        )
        return False

    def wait(self, final: bool = False) -> None:
        """Wait for a save in the background. For `final` and errors, see `save`."""
        saved = True
        with self._processes.shared_errors():
            saved = self._join(final)  # True in the other processes, which have no thread to wait for
        self._confirm(self._processes.broadcast(saved))

    def is_saved(self) -> bool:
        """Return True if the current step is saved, or is being saved."""
        return self._processes.broadcast(self._newest == self._step.progress.steps_done)

    def _confirm(self, saved: bool) -> None:
        progress = self._step.progress
        if saved:
            self._confirmed = (progress.best_val_loss, progress.best_step, progress.best_metrics)
        else:
            progress.best_val_loss, progress.best_step, progress.best_metrics = self._confirmed

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is None:
            self._join(final=True)
        elif not isinstance(error, SystemExit):
            if self._thread is not None:
                self._thread.join()
            if self._error is not None:  # the `with` block raises another error: only print the save's error
                warn(str(self._error))
        # A second Ctrl-C raises SystemExit. Then do not wait for the thread; it ends with the process.

    # -- loading ---------------------------------------------------------------------------------------------

    def newest(self, acceptable: Callable[[dict[str, Any]], bool] = lambda _: True) -> Snapshot:
        """Find the newest undamaged checkpoint. Process 0 chooses it, and all processes read it.

        Raises:
            InputError: if no checkpoint is `acceptable` (see `checkpoint.read_newest`).
        """
        output, found = self._config.output, None
        with self._processes.shared_errors():
            if self._processes.is_main:
                found, passed_over = checkpoint.read_newest(output, acceptable)
                for sentence in passed_over:
                    warn(sentence)
        folder = output / self._processes.broadcast(found.folder.name if found else "")
        return found or checkpoint.read(folder, self._processes.rank)

    def load(self, snapshot: Snapshot) -> None:
        """Load weights, optimisers and random generators from a checkpoint. The progress does not change.

        Raises:
            InputError: if the checkpoint belongs to another model or optimiser.
        """
        step, optimizer = self._step, snapshot.optimizer
        step.forget_prepared()
        with self._processes.shared_errors():
            step.parallel.load(snapshot.folder, self._files)
        if optimizer is None:
            optimizer = blank_state(step.model, step.optimizers)
            read_shards(snapshot.folder, optimizer)
        with self._processes.shared_errors():
            load_state(step.model, step.optimizers, optimizer)
        step.loss.load_state(snapshot.rng)
        if snapshot.rng:
            set_random_state(step.device, snapshot.rng)
        else:  # the saved run had fewer processes, so it has no random state for this process
            self._processes.seed(self._config.seed, int(snapshot.state["steps_done"]))

    def resume(self) -> Path:
        """Load the newest undamaged checkpoint and its progress. Returns the checkpoint's folder.

        Raises:
            InputError: if there is no such checkpoint; if it belongs to other data, vocabulary or model.
        """
        config, step, output = self._config, self._step, self._config.output
        if self._processes.is_main:
            checkpoint.clear_leftovers(output)
        snapshot = self.newest()
        with self._processes.shared_errors():
            now = (config, step.data, step.device, step.total_steps, snapshot.folder, self._processes.size)
            found = changes(snapshot.state, *now)
            for key, value in self._files.facts().items():
                if key not in snapshot.state:
                    lacking = "--teacher" if key == "teacher_fingerprint" else "a reference model (--beta 0)"
                    raise InputError(
                        f"{snapshot.folder} was made without {lacking}: leave the flag out, or begin another "
                        "run with --output"
                    )
                if snapshot.state[key] != value:
                    folder = config.teacher if key == "teacher_fingerprint" else config.starts_from
                    raise InputError(
                        f"{snapshot.folder} belongs to other weights than those of {folder} now: "
                        "give the model back that the run began with"
                    )
        self.load(snapshot)
        for sentence in found.rounding:
            warn(sentence)
        for sentence in found.settings:
            show(f"changed on resume: {sentence}")
        self._logger.changed = found.settings
        progress = step.progress
        progress.load(snapshot.state)
        if step.precision.scale is not None:
            step.precision.scale.load(progress.loss_scale)
        best, has_best = output / f"step-{progress.best_step:08d}", False
        with self._processes.shared_errors():
            if self._processes.is_main:
                checkpoint.set_link(output, "last", snapshot.folder)
                is_known = math.isfinite(progress.best_val_loss) and not found.measure
                has_best = is_known and checkpoint.verifies(best)
                # The process that saved may have died before it moved the link `best`. So move the link now.
                if has_best:
                    checkpoint.set_link(output, "best", best)
        if not self._processes.broadcast(has_best):
            # The best checkpoint is missing or damaged, or its loss was measured in another way. So the next
            # evaluation counts as the best.
            progress.best_val_loss, progress.best_step, progress.best_metrics = math.inf, 0, {}
        return snapshot.folder
