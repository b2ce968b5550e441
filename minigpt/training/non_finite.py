"""Rolls a run back to its last good checkpoint when numbers are NaN or infinite.

A step whose loss or gradient is not finite is a bad step: it is counted, but does not change the weights.
After several bad steps in a row, or if a weight is not finite, the last good checkpoint is loaded. The step
number does not go back. So the run continues with new data, and does not repeat the data since that
checkpoint, as in PaLM's training (https://arxiv.org/abs/2204.02311, section 5.1).
"""

from collections.abc import Mapping, Sequence

import torch

from minigpt.errors import InputError
from minigpt.families.strict_loading import is_finite
from minigpt.training.checkpointer import Checkpointer
from minigpt.training.config import TrainConfig
from minigpt.training.metrics import Logger
from minigpt.training.optimizer import schedule, state_tensors
from minigpt.training.parallel import local_tensors
from minigpt.training.run_state import StepMetrics
from minigpt.training.step import TrainStep

__all__ = ["NonFiniteGuard", "first_non_finite"]


class NonFiniteGuard:
    """Rolls the run back to the last checkpoint when numbers are not finite.

    Args:
        config: options of the run; after `max_bad_steps` bad steps in a row, the run is rolled back.
        step: the training step, whose model and optimisers are checked.
        checkpointer: loads and saves checkpoints.
        logger: records a rollback.
    """

    def __init__(
        self, config: TrainConfig, step: TrainStep, checkpointer: Checkpointer, logger: Logger
    ) -> None:
        self._config, self._step, self._checkpointer, self._logger = config, step, checkpointer, logger

    def check_steps(self, steps: Sequence[StepMetrics]) -> None:
        """Roll back if there were `max_bad_steps` bad steps in a row."""
        bad = max((step.bad_steps for step in steps), default=0)
        if bad >= self._config.max_bad_steps:
            self.roll_back(f"{bad} steps in a row without a finite loss and gradient")

    def rolled_back_weights(self) -> bool:
        """Roll back if a number in the weights or optimisers is not finite. Return True in this case."""
        model = self._step.model
        state = state_tensors(model, self._step.optimizers)
        name = first_non_finite(local_tensors({**dict(model.named_parameters()), **state}))
        is_bad = self._step.processes.any(bool(name))
        if is_bad:
            self.roll_back(f"{name or 'another process'} holds numbers that are not finite")
        return is_bad

    def roll_back(self, why: str) -> None:
        """Load weights, optimisers and random generators of the last good checkpoint.

        A checkpoint is good if it is undamaged, and was not saved after a bad step. The step number does not
        go back: the loaded state is saved again, as the checkpoint of the current step.

        Args:
            why: the reason, for the log and for error messages.

        Raises:
            InputError: at the second rollback of a run, or if there is no good checkpoint.
        """
        progress, config, step = self._step.progress, self._config, self._step
        self._checkpointer.wait()
        done = progress.steps_done
        positions = step.positions(range(max(0, done - max(1, progress.bad_steps)), done))
        rate = schedule(config, done - 1, step.total_steps) * config.learning_rate
        last = step.data.where(positions, config)
        advice = f"lower --learning_rate (now {rate:.2g}) or see {last}, which came last"
        if progress.rollbacks:
            raise InputError(f"step {done}: {why}, after going back once already; {advice}")
        try:
            snapshot = self._checkpointer.newest(lambda state: not state.get("bad_steps"))
        except InputError:
            raise InputError(f"step {done}: {why}, and no checkpoint to go back to; {advice}") from None
        self._checkpointer.load(snapshot)
        to_step = int(snapshot.state["steps_done"])
        progress.skip(to_step + 1, done)
        progress.rollbacks += 1
        progress.bad_steps, progress.loss_sum, progress.loss_steps, progress.sums = 0, 0.0, 0, []
        self._logger.log_rollback(why, to_step, positions)
        self._checkpointer.save()


def first_non_finite(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the name of the first tensor that holds NaN or infinity, or "" if there is none."""
    return next((name for name, tensor in tensors.items() if not is_finite(tensor)), "")
