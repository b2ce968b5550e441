"""One step of training: batches in, loss, gradient, update; and the loss on the validation part.

A step's content is a function of (seed, data, step) and of the state saved with a checkpoint: weights,
optimiser, the random generators (dropout), and `state.Progress`. On a GPU, where sums in attention's gradient
have no fixed order, two runs agree to rounding, not to the bit. Nothing here touches a disk.

On a GPU (`Machine.reads_late`) nobody waits for a step either: whether its numbers are finite is decided and
obeyed on the device, and what they were is read some steps later, all at once. The books are then the same.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple, cast

import torch

from minigpt.data.batches import Batch
from minigpt.devices import pick_device, random_state, seed_everything, set_random_state
from minigpt.errors import InputError
from minigpt.evaluation.loss import LossReport, evaluate_loss
from minigpt.families.registry import new_model
from minigpt.training.activation_checkpointing import recompute_blocks
from minigpt.training.config import Precision, TrainConfig
from minigpt.training.distributed import ALONE, World
from minigpt.training.flops import model_flops
from minigpt.training.mixed_precision import Counted, Machine, pick_precision
from minigpt.training.non_finite import spike_threshold
from minigpt.training.optimizer import make_optimizers, schedule
from minigpt.training.parallel import Parallel, share, whole_tensor
from minigpt.training.run_data import RunData, TextData
from minigpt.training.run_state import Progress
from minigpt.training.stop_request import StopNow, StopRequest

__all__ = ["Stepper"]


class _Work(NamedTuple):
    """What a step is to learn from."""

    step: int  # from 0
    mine: list[Counted]  # this process's batches, on their way to the device
    counted: int  # tokens of all processes that the loss counts
    tokens: int  # that are no padding
    flops: float  # of all processes


class _Taken(NamedTuple):
    """A step that was taken, while its numbers are still on the device."""

    step: int  # from 1
    learning_rate: float
    tokens: int
    flops: float
    measured: torch.Tensor  # (3,): loss, length of the gradient, the loss's scale


class Stepper:
    """A model, its data and its optimisers: `step()` by `step()`, and `evaluate()`."""

    def __init__(self, config: TrainConfig, data: RunData | TextData, world: World = ALONE) -> None:
        self.config, self.data, self.world = config, data, world
        self.device = world.together(lambda: pick_device(world.device(config.device)))
        # what `auto` means for process 0 holds for all, and is written down: a run keeps its arithmetic
        precision = cast(Precision, world.told(pick_precision(config.precision, self.device)))
        self.config = config = dataclasses.replace(config, precision=precision)
        self.machine = world.together(lambda: Machine(config, self.device))
        if config.output.exists() and not config.output.is_dir():
            raise InputError(f"{config.output} is a file; --output needs a folder")
        seed_everything(config.seed)
        self.tokenizer = data.tokenizer
        size = self.tokenizer.get_vocab_size()
        model_config, zero = config.model_config(size), config.zero_projections
        self.model = world.together(lambda: new_model(model_config, zero_projections=zero).to(self.device))
        if config.gradient_checkpointing:
            recompute_blocks(self.model.blocks, config.dropout > 0, self.machine.autocast)
        compiled = config.compile and not config.dry_run  # which computes a little, never compiled
        self.parallel = Parallel(self.model, world, config.parallel, self.machine, compiled)
        self.optimizers = make_optimizers(self.model, config)
        world.seed(config.seed)
        self.plan = data.plan(config)
        per_step = config.gradient_accumulation_steps
        self.total_steps = config.max_steps or max(
            1, math.ceil(config.num_train_epochs * len(self.plan) / per_step)
        )
        self.eval_steps = config.eval_steps or max(1, math.ceil(self.total_steps / 10))
        self.at = Progress()
        self.flops_done = 0.0  # by this process's steps, those of all processes: to be shown
        self.news: list[dict[str, float]] = []  # what has become known of steps in the last call of `step`
        self._ahead: _Work | None = None
        self._unread: list[_Taken] = []
        self.asked = StopRequest(alone=world.size == 1)  # nobody's, until `run` listens to signals

    @property
    def steps_done(self) -> int:
        """Steps up to now; those that were skipped count."""
        return self.at.steps_done

    @property
    def tokens_seen(self) -> int:
        """Real tokens that went through the model and reached the weights."""
        return self.at.tokens_seen

    def batches(self, step: int) -> list[Batch]:
        """The batches of a step, on the CPU: those of all processes, however many these are."""
        per_step = self.config.gradient_accumulation_steps
        pad_to = self.config.max_length if self.config.pad_to_max_length else 0
        numbers = range(step * per_step, (step + 1) * per_step)
        return [self.data.train.batch(self.plan.rows(number), pad_to) for number in numbers]

    def _counted(self, batch: Batch) -> torch.Tensor:
        """The targets that the loss counts, (B, T). No padding mask: padding is every token's future."""
        return batch.answer_mask if self.config.loss_on == "answer" else batch.token_mask

    def _work(self, step: int) -> _Work:
        """A step's batches, a pure function of its number: prepared when it begins, or ahead."""
        batches = self.batches(step)
        # every process has all batches, and so knows without a message how many tokens count
        counts = [
            (int(b.token_mask.sum()), int(self._counted(b).sum()), b.input_ids.shape[1]) for b in batches
        ]
        return _Work(
            step,
            [self.machine.counted(b, self._counted(b)) for b in self.parallel.share(batches)],
            counted=sum(counted for _, counted, _ in counts),
            tokens=sum(tokens for tokens, _, _ in counts),
            flops=sum(model_flops(self.model, *count) for count in counts),
        )

    def loss(self, batch: Batch | Counted) -> torch.Tensor:
        """Summed cross-entropy where the loss counts."""
        if isinstance(batch, Batch):
            batch = self.machine.counted(batch, self._counted(batch))
        with self.machine.autocast():
            return self.parallel.loss(batch)

    def step(self) -> dict[str, float]:
        """Do one step; returns its loss per counted token, gradient norm and learning rate.

        Where loss or gradient is not finite, weights and optimiser stay as they are, and `at.bad_steps`
        counts. `spike_above`, also returned, is the loss above which the step stands out from those before.
        Where numbers are read late, it returns those of the last step that is known, if there are new ones.

        Raises:
            StopNow: when a signal comes while the gradient is computed; all is then as before the step.
        """
        self.news.clear()
        at, late = self.at, self.machine.reads_late
        rate = schedule(self.config, self.steps_done, self.total_steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["peak_lr"]
        ahead, self._ahead = self._ahead, None
        work = ahead if ahead is not None and ahead.step == self.steps_done else self._work(self.steps_done)
        random = random_state(self.device)
        try:
            with self.asked.at_once():
                measured = self._gradient(work)
                known = [] if late else self._known(measured)
        except StopNow:
            self.model.zero_grad()
            set_random_state(self.device, random)
            raise
        found_inf = self._found_inf(measured) if late else torch.tensor(float(not _finite(known)))
        if late or _finite(known):
            for optimizer in self.optimizers:
                optimizer.found_inf = found_inf if late else None  # type: ignore[attr-defined]
                optimizer.step()
        if self.machine.scale is not None:
            self.machine.scale.after(found_inf)
        self.model.zero_grad()
        at.steps_done += 1
        at.evaluated = False
        rate *= self.config.learning_rate
        self._unread.append(_Taken(at.steps_done, rate, work.tokens, work.flops, measured))
        if not late:
            self._write_down([known])
        elif self._reading_is_due():
            self.read()
        else:
            self._ahead = self._work(at.steps_done)  # while the device computes
        return self.news[-1] if self.news else {}

    def _gradient(self, work: _Work) -> torch.Tensor:
        """The gradient, clipped; returns (3,): this process's loss, the length before, the loss's scale."""
        self.model.train()
        total = torch.zeros((), device=self.device)
        scale = None if self.machine.scale is None else self.machine.scale.value
        for number, batch in enumerate(work.mine, 1):
            with self.parallel.synchronizing(number == len(work.mine)):
                # the mean over the whole step, not of means; DDP and FSDP divide the processes' sum by `size`
                loss = self.loss(batch) * self.world.size / work.counted
                (loss if scale is None else loss * scale).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        if scale is not None:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(1 / scale)
        limit = self.config.max_grad_norm or math.inf
        norm = whole_tensor(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        return torch.stack([total, norm, torch.ones_like(total) if scale is None else scale])

    def _known(self, measured: torch.Tensor) -> list[float]:
        """Wait for a step's numbers; the loss is then that of all processes, which also agree on signals."""
        loss, norm, scale = measured.tolist()
        if self.world.size == 1:
            return [loss, norm, scale]
        loss_sum, *asked = self.world.sums([loss, *self.asked.marks()])
        self.asked.agree(asked)
        return [loss_sum / self.world.size, norm, scale]

    def _found_inf(self, measured: torch.Tensor) -> torch.Tensor:
        """The same without waiting for the device: 1.0 there if loss or gradient is not finite, else 0.0."""
        if self.world.size > 1:
            self.world.add_up(measured[:1])
            measured[:1] /= self.world.size
            self.asked.agree(self.world.sums(self.asked.marks()))  # from CPU to CPU
        return 1 - torch.isfinite(measured[:2]).all().float()

    def _reading_is_due(self) -> bool:
        done, config = self.steps_done, self.config
        is_last = done >= self.total_steps or self.asked.agreed is not None
        return is_last or done % config.logging_steps == 0 or done % self.eval_steps == 0

    def read(self) -> None:
        """Wait for all steps that were taken, and write down what became of them: see `news`."""
        if self._unread:
            self._write_down(torch.stack([taken.measured for taken in self._unread]).tolist())

    def _write_down(self, known: list[list[float]]) -> None:
        at, scaled = self.at, self.machine.scale
        for taken, numbers in zip(self._unread, known, strict=True):
            loss, norm, scale = numbers
            spike_above = spike_threshold(at.recent_losses)
            # too large for float16 alone: its scale is halved, nothing is wrong
            overflow = not math.isfinite(norm) and math.isfinite(loss) and scale > 1
            if _finite(numbers):
                at.tokens_seen += taken.tokens
                self.flops_done += taken.flops
                at.bad_steps = 0
            else:
                at.bad_steps += not overflow
                at.skip(taken.step, taken.step)
            if _finite(numbers) or overflow:
                at.add_loss(loss)
            self.news.append(
                {
                    "step": taken.step,
                    "loss": loss,
                    "grad_norm": norm,
                    "learning_rate": taken.learning_rate,
                    "spike_above": spike_above,
                    "bad_steps": at.bad_steps,
                    **({} if scaled is None else {"loss_scale": scale, "overflow": overflow}),
                }
            )
        self._unread.clear()
        if scaled is not None:
            at.loss_scale = scaled.state()

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


def _finite(numbers: list[float]) -> bool:
    return all(map(math.isfinite, numbers))
