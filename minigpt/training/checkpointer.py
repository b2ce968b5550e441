"""Saves and loads a run: what goes into a checkpoint, at once or in the background, and what a failure means.

In the background means: the loop copies what is saved and continues; a thread writes it. There is one save at
a time: the next one waits for it, and so does the end of the run. The thread does what would have been done
at once, in the same order, so it is no less safe; the newest checkpoint is only a little older.
"""

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from minigpt.console.terminal import warn
from minigpt.devices import random_state, set_random_state
from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel, family_of
from minigpt.training import checkpoint
from minigpt.training.checkpoint import Contents, Snapshot
from minigpt.training.config import TrainConfig
from minigpt.training.metrics import Logger
from minigpt.training.optimizer import blank_state, load_state, state_tensors
from minigpt.training.parallel import ShardedSave, read_shards
from minigpt.training.run_state import changes, training_state
from minigpt.training.step import TrainStep

__all__ = ["Checkpointer", "copied"]


class Checkpointer:
    """The checkpoints of a run. As a context manager it waits for a save in the background.

    Args:
        config: of the run: where to, how many, in the background or not, what a failed save means.
        step: its model, optimisers, progress and the fingerprints of its data are saved.
        logger: no checkpoint is ahead of its metrics.
    """

    def __init__(self, config: TrainConfig, step: TrainStep, logger: Logger) -> None:
        self._config, self._step, self._logger = config, step, logger
        self._processes = step.processes
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._newest = -1  # the step of the last save that went well, or is under way; -1: none, or it failed
        self._confirmed = (math.inf, 0)  # best loss and its step, on the disk

    def __enter__(self) -> "Checkpointer":
        self._confirm(True)
        return self

    # -- saving ----------------------------------------------------------------------------------------------

    def save(self, best: bool = False, final: bool = False) -> None:
        """Save this step, and let `last` (and `best`) point at it. Waits for an earlier save first.

        If it, or the save before it, failed and the run continues, the best loss is again that on the disk.

        Args:
            best: the link `best` moves too.
            final: nothing comes after it: wait until it is written, and let no error pass.

        Raises:
            InputError: if it failed, and is final or the run is to stop.
        """
        step, processes, saved = self._step, self._processes, True
        rng, model = random_state(step.device), step.parallel.full_model()
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
        """In process 0. Returns: False if it, or the save before it, failed and the run is to continue."""
        config, step, before = self._config, self._step, self._join(final=False)
        try:
            self._logger.flush()
        except InputError as error:
            self._error = error
            return self._join(final) and before
        background = config.save_async
        contents = Contents(
            step=step.progress.steps_done,
            model=copied(model) if background else model,
            tokenizer=step.data.tokenizer,
            optimizer={k: v.clone() for k, v in optimizer.items()} if background else optimizer,
            rng=rngs[0],
            state=training_state(
                config, step.data, step.device, step.total_steps, step.progress, self._processes.size
            ),
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
            self._error = error  # the loop's thread learns of it in `_join`

    def _prune(self) -> None:
        try:
            checkpoint.prune(self._config.output, self._config.save_total_limit)
        except InputError as error:
            if self._config.on_save_error == "stop":
                raise
            warn(str(error))  # the checkpoint itself is saved

    def _join(self, final: bool) -> bool:
        """Wait for the save that is under way. True if all went well; errors as in `save`."""
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
        """Wait for a save in the background; see `save`."""
        saved = True
        with self._processes.shared_errors():
            saved = self._join(final)  # only process 0 has one
        self._confirm(self._processes.broadcast(saved))

    def is_saved(self) -> bool:
        """Whether this step is saved, or is being saved."""
        return self._processes.broadcast(self._newest == self._step.progress.steps_done)

    def _confirm(self, saved: bool) -> None:
        progress = self._step.progress
        if saved:
            self._confirmed = (progress.best_val_loss, progress.best_step)
        else:
            progress.best_val_loss, progress.best_step = self._confirmed

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is None:
            self._join(final=True)
        elif not isinstance(error, SystemExit):
            if self._thread is not None:
                self._thread.join()
            if self._error is not None:  # `error` is on its way already
                warn(str(self._error))
        # a second signal: at once, and the thread dies with the process

    # -- loading ---------------------------------------------------------------------------------------------

    def newest(self, acceptable: Callable[[dict[str, Any]], bool] = lambda _: True) -> Snapshot:
        """The newest checkpoint that verifies. Process 0 chooses it; the others read the same one.

        Raises:
            InputError: if there is none.
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
        """Put back weights, optimisers and random generators; the progress stays.

        Raises:
            InputError: if they belong to another model or optimiser.
        """
        step, optimizer = self._step, snapshot.optimizer
        with self._processes.shared_errors():
            step.parallel.load(snapshot.folder)
        if optimizer is None:
            optimizer = blank_state(step.model, step.optimizers)
            read_shards(snapshot.folder, optimizer)
        with self._processes.shared_errors():
            load_state(step.model, step.optimizers, optimizer)
        if snapshot.rng:
            set_random_state(step.device, snapshot.rng)
        else:  # there were fewer processes
            self._processes.seed(self._config.seed, int(snapshot.state["steps_done"]))

    def resume(self) -> Path:
        """Load the newest checkpoint that verifies, and its progress; returns its folder.

        Raises:
            InputError: if there is none; if data, vocabulary or model differ.
        """
        config, step, output = self._config, self._step, self._config.output
        if self._processes.is_main:
            checkpoint.clear_leftovers(output)
        snapshot = self.newest()
        with self._processes.shared_errors():
            now = (config, step.data, step.device, step.total_steps, snapshot.folder, self._processes.size)
            found = changes(snapshot.state, *now)
        self.load(snapshot)
        for sentence in found.rounding:
            warn(sentence)
        for sentence in found.settings:
            print(f"changed on resume: {sentence}")
        self._logger.changed = found.settings
        progress = step.progress
        progress.load(snapshot.state)
        if step.precision.scale is not None:
            step.precision.scale.load(progress.loss_scale)
        best, has_best = output / f"step-{progress.best_step:08d}", False
        with self._processes.shared_errors():
            if self._processes.is_main:
                checkpoint.set_link(output, "last", snapshot.folder)
                has_best = progress.best_step > 0 and not found.validation_data and checkpoint.verifies(best)
                if has_best:  # a kill between saving and linking left the link behind
                    checkpoint.set_link(output, "best", best)
        if not self._processes.broadcast(has_best):
            # none yet, none that is complete, or measured on other data: the next one is the best
            progress.best_val_loss, progress.best_step = math.inf, 0
        return snapshot.folder


def copied(model: LanguageModel) -> LanguageModel:
    """The model's weights in a model of their own, on the CPU, which further training does not change."""
    family = family_of(model.config)
    copy: LanguageModel = family.on_meta(model.config)
    weights = family.from_hugging_face(family.to_hugging_face(model), model.config, torch.float32)
    family.load_state(copy, weights, assign=True)
    return copy
