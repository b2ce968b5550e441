"""One step of training: batches in, loss, gradient, update; and the loss on the validation part.

A step's content is a function of (seed, data, step) and of the state saved with a checkpoint: weights,
optimiser, the random generators (dropout), and `state.Progress`. On a GPU, where sums in attention's gradient
have no fixed order, two runs agree to rounding, not to the bit. Nothing here touches a disk.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from minigpt.command_line import InputError
from minigpt.data.batches import Batch
from minigpt.devices import pick_device, random_state, seed_everything, set_random_state
from minigpt.evaluation.loss import LossReport, evaluate_loss
from minigpt.families import new_model
from minigpt.training.config import TrainConfig
from minigpt.training.distributed import ALONE, World
from minigpt.training.guard import spike_threshold
from minigpt.training.optimizer import make_optimizers, schedule
from minigpt.training.parallel import Parallel, share, whole_tensor
from minigpt.training.run_data import RunData, TextData
from minigpt.training.signals import StopNow, StopRequest
from minigpt.training.state import Progress

__all__ = ["Stepper"]


class Stepper:
    """A model, its data and its optimisers: `step()` by `step()`, and `evaluate()`."""

    def __init__(self, config: TrainConfig, data: RunData | TextData, world: World = ALONE) -> None:
        self.config, self.data, self.world = config, data, world
        self.device = world.together(lambda: pick_device(world.device(config.device)))
        if config.threads:
            torch.set_num_threads(config.threads)
        if config.output.exists() and not config.output.is_dir():
            raise InputError(f"{config.output} is a file; --output needs a folder")
        seed_everything(config.seed)
        self.tokenizer = data.tokenizer
        size = self.tokenizer.get_vocab_size()
        model_config, zero = config.model_config(size), config.zero_projections
        self.model = world.together(lambda: new_model(model_config, zero_projections=zero).to(self.device))
        self.parallel = Parallel(self.model, world, config.parallel, self.device)
        self.optimizers = make_optimizers(self.model, config)
        world.seed(config.seed)
        self.plan = data.plan(config)
        per_step = config.gradient_accumulation_steps
        self.total_steps = config.max_steps or max(
            1, math.ceil(config.num_train_epochs * len(self.plan) / per_step)
        )
        self.eval_steps = config.eval_steps or max(1, math.ceil(self.total_steps / 10))
        self.at = Progress()
        self.asked = StopRequest(alone=world.size == 1)  # nobody's, until `run` listens to signals

    @property
    def steps_done(self) -> int:
        """Steps up to now; those that were skipped count."""
        return self.at.steps_done

    @property
    def tokens_seen(self) -> int:
        """Real tokens that went through the model and reached the weights."""
        return self.at.tokens_seen

    def autocast(self) -> AbstractContextManager[Any]:
        """Matrix products in bfloat16 where the configuration asks for it."""
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def batches(self, step: int) -> list[Batch]:
        """The batches of a step, on the CPU: those of all processes, however many these are."""
        per_step = self.config.gradient_accumulation_steps
        pad_to = self.config.max_length if self.config.pad_to_max_length else 0
        numbers = range(step * per_step, (step + 1) * per_step)
        return [self.data.train.batch(self.plan.rows(number), pad_to) for number in numbers]

    def loss(self, batch: Batch) -> torch.Tensor:
        """Summed cross-entropy where the loss counts. No padding mask: padding is every token's future."""
        counted = batch.answer_mask if self.config.loss_on == "answer" else batch.token_mask  # (B, T)
        with self.autocast():
            return self.parallel.loss(batch, counted)

    def step(self) -> dict[str, float]:
        """Do one step; returns its loss per counted token, gradient norm and learning rate.

        Where loss or gradient is not finite, weights and optimiser stay as they are, and `at.bad_steps`
        counts. `spike_above`, also returned, is the loss above which the step stands out from those before.

        Raises:
            StopNow: when a signal comes while the gradient is computed; all is then as before the step.
        """
        share = schedule(self.config, self.steps_done, self.total_steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * group["peak_lr"]
        batches = self.batches(self.steps_done)
        random = random_state(self.device)
        try:
            with self.asked.at_once():
                loss, norm = self._gradient(batches)
        except StopNow:
            self.model.zero_grad()
            set_random_state(self.device, random)
            raise
        at = self.at
        numbers = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": share * self.config.learning_rate,
            "spike_above": spike_threshold(at.recent_losses),
        }
        at.steps_done += 1
        at.evaluated = False
        if math.isfinite(loss) and math.isfinite(norm):
            for optimizer in self.optimizers:
                optimizer.step()
            at.tokens_seen += sum(int(b.token_mask.sum()) for b in batches)
            at.add_loss(loss)
            at.bad_steps = 0
        else:
            at.bad_steps += 1
            at.skip(at.steps_done, at.steps_done)
        self.model.zero_grad()
        return numbers

    def _gradient(self, batches: list[Batch]) -> tuple[float, float]:
        """The loss of a step, and the length of its gradient before clipping."""
        answers = self.config.loss_on == "answer"
        # every process has all batches, and so knows without a message how many tokens count
        counted = sum(int((b.answer_mask if answers else b.token_mask).sum()) for b in batches)
        self.model.train()
        total = torch.zeros((), device=self.device)
        mine, size = self.parallel.share(batches), self.world.size
        for number, batch in enumerate(mine, 1):
            with self.parallel.synchronizing(number == len(mine)):
                # the mean over the whole step, not of means; DDP and FSDP divide the processes' sum by `size`
                loss = self.loss(batch.to(self.device)) * size / counted
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        limit = self.config.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        norm = whole_tensor(norm)
        if size == 1:
            return float(total), float(norm)
        loss_sum, *asked = self.world.sums([float(total), *self.asked.marks()])
        self.asked.agree(asked)
        return loss_sum / size, float(norm)

    def evaluate(self) -> LossReport:
        """Loss over the whole validation part.

        Raises:
            StopNow: when a signal comes meanwhile.
        """
        batches = self.data.val.in_order(128)
        with self.asked.at_once():
            if self.world.size == 1:
                return evaluate_loss(self.model, batches, self.device)
            try:
                return evaluate_loss(self.parallel.measured, self._mine(batches), self.device, self._over_all)
            finally:
                self.parallel.rest()

    def _mine(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """This process's rows; all have as many batches, and stop together."""
        for number, batch in enumerate(batches):
            if number % 8 == 0:
                self.asked.agree(self.world.sums(self.asked.marks()))
                if self.asked.agreed is not None:
                    raise StopNow
            yield share(batch, self.world)

    def _over_all(self, report: LossReport) -> None:
        """The sums of one process become those of all."""
        parts = (report.all, report.answer)
        sums = self.world.sums([value for part in parts for value in (part.nll, part.count)])
        for part, nll, count in zip(parts, sums[::2], sums[1::2]):
            part.nll, part.count = nll, int(count)

    def places(self, steps: Iterable[int]) -> list[int]:
        """Where the batches of some steps (from 0) stand in the training data: see `data.unit`."""
        return [place for s in steps for batch in self.batches(s) for place in self.data.places(batch)]
