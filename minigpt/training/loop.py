"""The one loop: steps, evaluation, checkpoints, signals; resumes to the same bits.

Everything that decides the rest of a run is in its checkpoints; speed and time left are only shown.

The cursor is one integer, `steps_done`. A step whose loss or gradient is not finite counts but leaves no
trace; after several in a row the last checkpoint's weights come back and the cursor stays where it is, so
that the data in between is passed over, as PaLM's training did (https://arxiv.org/abs/2204.02311, 5.1).
"""

import json
import math
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch

import minigpt
from minigpt.console.terminal import ProgressLine, seconds, warn
from minigpt.devices import random_state, set_random_state
from minigpt.errors import InputError
from minigpt.storage.files import atomic_write, make_folder
from minigpt.training import checkpoint
from minigpt.training.checkpoint_writer import Saver, copied
from minigpt.training.config import RUN_FILE
from minigpt.training.flops import peak_flops
from minigpt.training.metrics import Metrics
from minigpt.training.non_finite import first_non_finite
from minigpt.training.optimizer import blank_state, load_state, schedule, state_tensors
from minigpt.training.parallel import ShardedSave, local_tensors, read_shards
from minigpt.training.run_state import Progress, changes, described
from minigpt.training.step import Stepper
from minigpt.training.stop_request import StopNow, stop_requests

__all__ = ["Stopped", "Trainer"]


class Stopped(Exception):  # noqa: N818 -- not an error: the run was asked to stop, and has saved itself
    """Training was interrupted by a signal, after saving. `code` is the exit code."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Trainer(Stepper):
    """A training run: `run()` is the whole of it, `resume()` before it goes on with an earlier one."""

    notes: Mapping[str, Any] = {}  # what else run.json is to hold

    # -- the run --------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train to the end, or until a signal asks to stop.

        Returns: what `--json` prints: steps, best validation loss, seconds, where the best checkpoint lies.

        Raises:
            Stopped: after SIGINT, SIGTERM or SIGUSR1, once the state is saved.
            InputError: if the last checkpoint cannot be written; if training has gone back once and again
                meets numbers that are not finite.
        """
        config, output = self.config, self.config.output
        self.world.decided(self._begin)
        with (
            stop_requests(alone=self.world.size == 1) as self.asked,
            Metrics(
                output, self.steps_done, config.report_to, config.as_dict(), enabled=self.world.is_main
            ) as self._metrics,
            Saver(output, config.save_total_limit, config.save_async, config.on_save_error) as self._saver,
            ProgressLine("training", self.total_steps) as self._progress,
        ):
            self._confirmed = (self.at.best_val_loss, self.at.best_step)
            self._clock = _Clock(self.at)
            self._peak = peak_flops(self.device, self.config.precision)
            try:
                while not self.is_finished():
                    if self._evaluation_is_due():
                        self._evaluate_and_save()
                    else:
                        self._train()
                    if self.asked.agreed is not None and not self.is_finished():
                        raise StopNow
            except StopNow:
                raise self._saved_and_stopped() from None
        return {
            "steps": self.steps_done,
            "val_loss": self.at.best_val_loss,
            "best_step": self.at.best_step,
            "seconds": round(self.at.train_seconds, 1),
            "tokens": self.tokens_seen,
            "model": str(output / "best"),
        }

    def _begin(self) -> bool:
        output = self.config.output
        make_folder(output)
        checkpoint.clear_leftovers(output)
        contents = {"minigpt": minigpt.__version__, "config": self.config.as_dict(), **self.notes}
        text = json.dumps(contents, ensure_ascii=False, indent=2)
        atomic_write(output / RUN_FILE, text + "\n")
        return True

    def is_finished(self) -> bool:
        """All steps are done, and the last evaluation."""
        return self.steps_done >= self.total_steps and self.at.evaluated

    def _evaluation_is_due(self) -> bool:
        due = self.steps_done % self.eval_steps == 0 or self.steps_done >= self.total_steps
        return due and not self.at.evaluated

    def _train(self) -> None:
        """One step, and what is to be said about those that became known."""
        self.step()
        self._tell()

    def _tell(self) -> None:
        """What became of the steps that were read; after several bad ones, back to the last checkpoint."""
        if not self.news:
            return
        news, at = [*self.news], self.at
        self.news.clear()
        speed, left = self._clock.tick(at, self.total_steps)
        mfu = self._clock.use(self.flops_done) / (self._peak * self.world.size)
        val = "" if math.isnan(self._clock.val_loss) else f"val {self._clock.val_loss:.3f}  "
        use = "" if math.isnan(mfu) else f"MFU {mfu:.0%}  "
        last = news[-1]
        shown = f"loss {last['loss']:.3f}  {val}{speed:,.0f} tokens/s  {use}{seconds(left)} left"
        self._progress.update(at.steps_done, shown)
        for numbers in news:
            self._tell_event(numbers)
        if at.steps_done % self.config.logging_steps == 0 and at.loss_steps:
            self._metrics.write(
                at.steps_done,
                train_loss=at.loss_sum / at.loss_steps,
                learning_rate=last["learning_rate"],
                **({} if last.get("overflow") else {"grad_norm": last["grad_norm"]}),
                **({"loss_scale": last["loss_scale"]} if "loss_scale" in last else {}),
                epoch=at.steps_done * self.config.gradient_accumulation_steps / len(self.plan),
                tokens_per_second=round(speed),
                **({} if math.isnan(mfu) else {"mfu": round(mfu, 4)}),
                seconds=round(at.train_seconds, 3),
            )
            at.loss_sum, at.loss_steps = 0.0, 0
        bad = max(int(numbers["bad_steps"]) for numbers in news)
        if bad >= self.config.max_bad_steps:
            self._roll_back(f"{bad} steps in a row without a finite loss and gradient")

    def _tell_event(self, numbers: dict[str, float]) -> None:
        """A step that was skipped, or whose loss stands out."""
        loss, above, step = numbers["loss"], numbers["spike_above"], int(numbers["step"])
        event = "skipped" if numbers["bad_steps"] else "spike" if loss > above else ""
        if not event or numbers.get("overflow"):
            return
        places = self.places([step - 1])
        usual = f", above {above:.4g}" if event == "spike" else ""
        self._progress.write(
            f"step {step:>6}  {event}: loss {loss:.4g}{usual}, gradient norm "
            f"{numbers['grad_norm']:.4g}; {self.data.where(places, self.config)}"
        )
        measured = {key: numbers[key] for key in ("loss", "grad_norm")}
        self._metrics.write(step, event=event, **measured, **{self.data.unit: places})

    def _evaluate_and_save(self) -> None:
        start, at = time.monotonic(), self.at
        if self._rolled_back_from_bad_weights():  # there is nothing to measure; next time round there is
            return
        report = self.evaluate()
        counted = report.answer if self.config.loss_on == "answer" else report.all
        self._metrics.write(
            at.steps_done,
            val_loss=counted.loss,
            val_answer_loss=report.answer.loss,
            val_all_loss=report.all.loss,
        )
        self._settle()  # a save in the background may have lost the best one
        best = counted.loss < at.best_val_loss
        if best:
            at.best_val_loss, at.best_step = counted.loss, at.steps_done
        at.evaluated = True
        self._save(best, final=self.is_finished())
        sample = ""
        if self.world.is_main and not self.parallel.is_sharded:
            sample = self.data.sample(self.model, at.steps_done // self.eval_steps)
        star = "*" if best else " "
        self._progress.write(
            f"step {at.steps_done:>6}  validation loss {counted.loss:.4f}{star} "
            f"perplexity {counted.perplexity:.2f}{sample}"
        )
        self._clock.val_loss = counted.loss
        self._clock.evaluating += time.monotonic() - start

    # -- numbers that are not finite ------------------------------------------------------------------------

    def _rolled_back_from_bad_weights(self) -> bool:
        """Look at weights and optimiser; where a number is not finite, go back."""
        state = state_tensors(self.model, self.optimizers)
        name = first_non_finite(local_tensors({**dict(self.model.named_parameters()), **state}))
        is_bad = self.world.any(bool(name))
        if is_bad:
            self._roll_back(f"{name or 'another process'} holds numbers that are not finite")
        return is_bad

    def _roll_back(self, why: str) -> None:
        """Weights, optimiser and random state of the last good checkpoint; data in between is passed over.

        Raises:
            InputError: the second time, or where there is nothing to go back to.
        """
        at, config = self.at, self.config
        self._settle()
        places = self.places(range(max(0, at.steps_done - max(1, at.bad_steps)), at.steps_done))
        rate = schedule(config, at.steps_done - 1, self.total_steps) * config.learning_rate
        last = self.data.where(places, config)
        advice = f"lower --learning_rate (now {rate:.2g}) or see {last}, which came last"
        if at.rollbacks:
            raise InputError(f"step {at.steps_done}: {why}, after going back once already; {advice}")
        try:
            snapshot = self._newest(lambda state: not state.get("bad_steps"))
        except InputError:
            raise InputError(
                f"step {at.steps_done}: {why}, and no checkpoint to go back to; {advice}"
            ) from None
        self._load(snapshot)
        went_to = int(snapshot.state["steps_done"])
        at.skip(went_to + 1, at.steps_done)
        at.rollbacks, at.bad_steps, at.loss_sum, at.loss_steps = at.rollbacks + 1, 0, 0.0, 0
        self._metrics.write(
            at.steps_done, event="rollback", reason=why, to_step=went_to, **{self.data.unit: places}
        )
        warn(
            f"step {at.steps_done}: {why}; back to the weights of step {went_to}, and on with the data of "
            f"step {at.steps_done + 1}"
        )
        self._save()

    # -- state ----------------------------------------------------------------------------------------------

    def _save(self, best: bool = False, final: bool = False) -> None:
        """A checkpoint of this step; a failure is fatal, or taken back, as the configuration says."""
        rng, model = random_state(self.device), self.parallel.whole()
        rngs = self.world.gathered(safetensors.torch.save(rng))
        optimizer = state_tensors(self.model, self.optimizers)
        shards = ShardedSave(self.world, optimizer) if self.parallel.is_sharded else None

        def write() -> bool:
            try:
                self._metrics.flush()  # no checkpoint is ahead of its metrics
            except InputError as error:
                return self._saver.fail(error, final)
            background = self.config.save_async
            contents = checkpoint.Contents(
                step=self.steps_done,
                model=copied(model) if background else model,
                tokenizer=self.tokenizer,
                optimizer={k: v.clone() for k, v in optimizer.items()} if background else optimizer,
                rng=rng,
                state=self._described(),
                other_rngs=rngs[1:],
                shards=shards,
            )
            return self._saver.save(contents, best, final)

        if shards is not None and not self.world.is_main:
            shards.follow()
        self._take_back_unless(self.world.decided(write, shards.end if shards else None))

    def _described(self) -> dict[str, Any]:
        return described(self.config, self.data, self.device, self.total_steps, self.at, self.world.size)

    def _settle(self, final: bool = False) -> None:
        """Wait for a save in the background."""
        self._take_back_unless(self.world.decided(lambda: self._saver.wait(final)))

    def _take_back_unless(self, saved: bool) -> None:
        at = self.at
        if saved:
            self._confirmed = (at.best_val_loss, at.best_step)
        else:  # what is on the disk is the best
            at.best_val_loss, at.best_step = self._confirmed

    def _newest(self, acceptable: Callable[[dict[str, Any]], bool] = lambda _: True) -> checkpoint.Snapshot:
        """Process 0 chooses and verifies; the others read the same one."""
        found: list[checkpoint.Snapshot] = []

        def choose() -> bool:
            snapshot, passed_over = checkpoint.read_newest(self.config.output, acceptable)
            for sentence in passed_over:
                warn(sentence)
            found.append(snapshot)
            return True

        self.world.decided(choose)
        folder = self.config.output / self.world.told(found[0].folder.name if found else "")
        return found[0] if found else checkpoint.read(folder, self.world.rank)

    def _load(self, snapshot: checkpoint.Snapshot) -> None:
        self.world.together(lambda: self.parallel.load(snapshot.folder))
        optimizer = snapshot.optimizer
        if optimizer is None:
            optimizer = blank_state(self.model, self.optimizers)
            read_shards(snapshot.folder, optimizer)
        self.world.together(lambda: load_state(self.model, self.optimizers, optimizer))
        if snapshot.rng:
            set_random_state(self.device, snapshot.rng)
        else:  # there were fewer processes
            self.world.seed(self.config.seed, int(snapshot.state["steps_done"]))

    def resume(self) -> Path:
        """Take the state of the newest checkpoint that verifies; returns its folder.

        Raises:
            InputError: if there is none; if data, vocabulary or model differ; if nothing is left to do.
        """
        config, output = self.config, self.config.output
        if self.world.is_main:
            checkpoint.clear_leftovers(output)
        snapshot = self._newest()
        now = (config, self.data, self.device, self.total_steps, snapshot.folder, self.world.size)
        found = self.world.together(lambda: changes(snapshot.state, *now))
        self._load(snapshot)
        for sentence in found.rounding:
            warn(sentence)
        for sentence in found.settings:
            print(f"changed on resume: {sentence}")
        self.at = at = Progress.from_dict(snapshot.state)
        if self.machine.scale is not None:
            self.machine.scale.load(at.loss_scale)
        best = output / f"step-{at.best_step:08d}"

        def link() -> bool:
            checkpoint.set_link(output, "last", snapshot.folder)
            if not (at.best_step and not found.validation_data and checkpoint.verifies(best)):
                return False
            checkpoint.set_link(output, "best", best)  # a kill between saving and linking left it behind
            return True

        if not self.world.decided(
            link
        ):  # none yet, none that is whole, or measured on other data: the next one is the best there is
            at.best_val_loss, at.best_step = math.inf, 0
        if self.is_finished():
            raise InputError(
                f"{snapshot.folder}: the run is finished ({self.steps_done} steps); "
                "raise --num_train_epochs or --max_steps to go on"
            )
        return snapshot.folder

    def _saved_and_stopped(self) -> Stopped:
        number = self.asked.agreed
        assert number is not None
        self.read()  # of a step that the signal broke off nothing is left
        self._tell()
        self._rolled_back_from_bad_weights()
        if not self.world.decided(lambda: self._saver.newest == self.steps_done):
            self._save(final=True)
        self._settle(final=True)
        name = signal.Signals(number).name
        where = self.config.output / "last"
        again = f"--output {self.config.output} --resume"
        return Stopped(128 + number, f"{name}: saved step {self.steps_done} in {where}; go on with {again}")


class _Clock:
    """Speed and time left; nothing of it decides anything."""

    def __init__(self, at: Progress) -> None:
        self._began, self._before = time.monotonic(), at.train_seconds
        self._first, self._tokens = at.steps_done, at.tokens_seen
        self.evaluating = 0.0  # seconds
        self.val_loss = math.nan  # the last one measured
        self._used_until, self._flops = self._began, 0.0

    def tick(self, at: Progress, total_steps: int) -> tuple[float, float]:
        """After a step: tokens per second, and seconds left."""
        elapsed = time.monotonic() - self._began
        at.train_seconds = self._before + elapsed
        speed = (at.tokens_seen - self._tokens) / max(elapsed - self.evaluating, 1e-9)
        return speed, (total_steps - at.steps_done) * elapsed / (at.steps_done - self._first)

    def use(self, flops_done: float) -> float:
        """FLOP/s since the last call, less the time of evaluations: of an hour's mean nobody sees a fall."""
        until = time.monotonic() - self.evaluating
        flops, elapsed = flops_done - self._flops, until - self._used_until
        self._used_until, self._flops = until, flops_done
        return flops / max(elapsed, 1e-9)
