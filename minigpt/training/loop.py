"""The one loop: batches in, steps, evaluation, checkpoints; resumes to the same bits.

A step's content is a function of (seed, data, step) and of the state saved with a checkpoint: weights,
optimiser, torch's random generator (dropout), the sums that the next line of metrics needs. Everything else
(speed, time left) is only shown. On a GPU, where sums in attention's gradient have no fixed order, two runs
agree to rounding, not to the bit.
"""

import json
import math
import platform
import signal
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

import minigpt
from minigpt.command_line import InputError
from minigpt.data.batches import Batch
from minigpt.devices import pick_device, random_state, set_random_state
from minigpt.evaluation.loss import LossReport, evaluate_loss
from minigpt.families import new_model
from minigpt.files import atomic_write
from minigpt.pretrained import load_weights
from minigpt.terminal import ProgressLine, seconds, warn
from minigpt.training import checkpoint
from minigpt.training.chunked_loss import summed_cross_entropy
from minigpt.training.config import RUN_FILE, TrainConfig
from minigpt.training.metrics import Metrics
from minigpt.training.optimizer import load_state, make_optimizers, schedule, state_tensors
from minigpt.training.run_data import RunData, TextData
from minigpt.training.signals import StopRequest, stop_requests

__all__ = ["Stopped", "Trainer"]


class Stopped(Exception):  # noqa: N818 -- not an error: the run was asked to stop, and has saved itself
    """Training was interrupted by a signal, after saving. `code` is the exit code."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Trainer:
    """A training run, step by step. `run()` is the whole of it; benchmarks call `step()` themselves."""

    def __init__(self, config: TrainConfig, data: RunData | TextData) -> None:
        self.config, self.data = config, data
        self.device = pick_device(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        if config.output.exists() and not config.output.is_dir():
            raise InputError(f"{config.output} is a file; --output needs a folder")
        torch.manual_seed(config.seed)
        self.tokenizer = data.tokenizer
        self.model = new_model(config.model_config(self.tokenizer.get_vocab_size())).to(self.device)
        self.optimizers = make_optimizers(self.model, config)
        self.plan = data.plan(config)
        per_step = config.gradient_accumulation_steps
        self.total_steps = config.max_steps or max(
            1, math.ceil(config.num_train_epochs * len(self.plan) / per_step)
        )
        self.eval_steps = config.eval_steps or max(1, math.ceil(self.total_steps / 10))
        self.steps_done = 0
        self.tokens_seen = 0  # real tokens that went through the model
        self.best_val_loss = math.inf
        self.best_step = 0
        self._loss_sum, self._loss_steps = 0.0, 0  # since the last line of metrics
        self._train_seconds = 0.0

    # -- one step -------------------------------------------------------------------------------------------

    def autocast(self) -> AbstractContextManager[Any]:
        """Matrix products in bfloat16 where the configuration asks for it."""
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def batches(self, step: int) -> list[Batch]:
        """The batches of a step, on the CPU."""
        per_step = self.config.gradient_accumulation_steps
        pad_to = self.config.max_length if self.config.pad_to_max_length else 0
        numbers = range(step * per_step, (step + 1) * per_step)
        return [self.data.train.batch(self.plan.rows(number), pad_to) for number in numbers]

    def loss(self, batch: Batch) -> torch.Tensor:
        """Summed cross-entropy where the loss counts. No padding mask: padding lies in every token's future.

        lm_head, the largest product of a small model, is computed at the counted positions only.
        """
        counted = batch.answer_mask if self.config.loss_on == "answer" else batch.token_mask  # (B, T)
        with self.autocast():
            hidden = self.model.base_model(batch.input_ids)[counted]  # (B, T, C) -> (positions, C)
            return summed_cross_entropy(self.model.lm_head, hidden, batch.targets[counted])

    def step(self) -> dict[str, float]:
        """Do one step; returns its loss per counted token, gradient norm and learning rate.

        Raises:
            InputError: if the loss or the gradient is not finite; the weights are then as before the step.
        """
        share = schedule(self.config, self.steps_done, self.total_steps)
        rate = share * self.config.learning_rate
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * group["peak_lr"]
        batches = self.batches(self.steps_done)
        answers = self.config.loss_on == "answer"
        counted = sum(int((b.answer_mask if answers else b.token_mask).sum()) for b in batches)
        self.model.train()
        total = torch.zeros((), device=self.device)
        for batch in batches:
            loss = self.loss(batch.to(self.device)) / counted  # the mean over the whole step, not of means
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        limit = self.config.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        mean, length = float(total), float(norm)
        if not (math.isfinite(mean) and math.isfinite(length)):
            self.model.zero_grad()
            raise InputError(
                f"step {self.steps_done + 1}: loss {mean}, gradient norm {length}; weights untouched. "
                f"Lower --learning_rate (now {rate:.2g}) or see "
                f"{self.data.where(batches[0], self.config)}"
            )
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad()
        self.steps_done += 1
        self.tokens_seen += sum(int(b.token_mask.sum()) for b in batches)
        self._loss_sum += mean
        self._loss_steps += 1
        return {"loss": mean, "grad_norm": length, "learning_rate": rate}

    def evaluate(self) -> LossReport:
        """Loss over the whole validation part."""
        return evaluate_loss(self.model, self.data.val.in_order(128), self.device)

    # -- the run --------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train to the end, or until a signal asks to stop.

        Returns: what `--json` prints: steps, best validation loss, seconds, where the best checkpoint lies.

        Raises:
            Stopped: after SIGINT or SIGTERM, once the state is saved.
        """
        output = self.config.output
        output.mkdir(parents=True, exist_ok=True)
        checkpoint.clear_leftovers(output)
        text = json.dumps(
            {"minigpt": minigpt.__version__, "config": self.config.as_dict()}, ensure_ascii=False, indent=2
        )
        atomic_write(output / RUN_FILE, text + "\n")
        began, before = time.monotonic(), self._train_seconds
        with (
            stop_requests() as asked,
            Metrics(output, self.steps_done) as metrics,
            ProgressLine("training", self.total_steps) as progress,
        ):
            first, tokens = self.steps_done, self.tokens_seen
            evaluating = 0.0
            val_loss = math.nan
            while self.steps_done < self.total_steps:
                numbers = self.step()
                elapsed = time.monotonic() - began
                speed = (self.tokens_seen - tokens) / max(elapsed - evaluating, 1e-9)
                left = (self.total_steps - self.steps_done) * elapsed / (self.steps_done - first)
                shown = "" if math.isnan(val_loss) else f"val {val_loss:.3f}  "
                progress.update(
                    self.steps_done,
                    f"loss {numbers['loss']:.3f}  {shown}{speed:,.0f} tokens/s  {seconds(left)} left",
                )
                self._train_seconds = before + elapsed
                if self.steps_done % self.config.logging_steps == 0:
                    metrics.write(
                        self.steps_done,
                        train_loss=self._loss_sum / self._loss_steps,
                        learning_rate=numbers["learning_rate"],
                        grad_norm=numbers["grad_norm"],
                        epoch=self.steps_done * self.config.gradient_accumulation_steps / len(self.plan),
                        tokens_per_second=round(speed),
                        seconds=round(self._train_seconds, 3),
                    )
                    self._loss_sum, self._loss_steps = 0.0, 0
                stop = asked.signal is not None
                if self.steps_done % self.eval_steps == 0 or self.steps_done == self.total_steps:
                    start = time.monotonic()
                    val_loss = self._evaluate_and_save(metrics, progress)
                    evaluating += time.monotonic() - start
                    stop = asked.signal is not None  # whatever came meanwhile: all is saved
                elif stop:
                    self._save()
                if stop and self.steps_done < self.total_steps:
                    raise self._stopped(asked)
        self._train_seconds = before + time.monotonic() - began
        return {
            "steps": self.steps_done,
            "val_loss": self.best_val_loss,
            "best_step": self.best_step,
            "seconds": round(self._train_seconds, 1),
            "tokens": self.tokens_seen,
            "model": str(output / "best"),
        }

    def _evaluate_and_save(self, metrics: Metrics, progress: ProgressLine) -> float:
        report = self.evaluate()
        counted = report.answer if self.config.loss_on == "answer" else report.all
        metrics.write(
            self.steps_done,
            val_loss=counted.loss,
            val_answer_loss=report.answer.loss,
            val_all_loss=report.all.loss,
        )
        best = counted.loss < self.best_val_loss
        if best:
            self.best_val_loss, self.best_step = counted.loss, self.steps_done
        self._save(best)
        sample = self.data.sample(self.model, self.steps_done // self.eval_steps)
        star = "*" if best else " "
        progress.write(
            f"step {self.steps_done:>6}  validation loss {counted.loss:.4f}{star} "
            f"perplexity {counted.perplexity:.2f}{sample}"
        )
        return counted.loss

    # -- state ----------------------------------------------------------------------------------------------

    def _surroundings(self) -> dict[str, Any]:
        """What the bits depend on besides the configuration and the data."""
        return {
            "torch": str(torch.__version__),
            "device": self.device.type,
            "threads": torch.get_num_threads(),
        }

    def _save(self, best: bool = False) -> None:
        output = self.config.output
        rng = random_state(self.device)
        state = {
            "minigpt": minigpt.__version__,
            "platform": platform.platform(),
            **self._surroundings(),
            "steps_done": self.steps_done,
            "total_steps": self.total_steps,
            "tokens_seen": self.tokens_seen,
            "best_val_loss": self.best_val_loss if math.isfinite(self.best_val_loss) else None,
            "best_step": self.best_step,
            "loss_sum": self._loss_sum,
            "loss_steps": self._loss_steps,
            "train_seconds": self._train_seconds,
            "train_fingerprint": self.data.train.fingerprint,
            "val_fingerprint": self.data.val.fingerprint,
            "vocabulary_fingerprint": self.tokenizer.fingerprint,
            "config": self.config.as_dict(),
        }
        tensors = state_tensors(self.model, self.optimizers)
        folder = checkpoint.save(output, self.steps_done, self.model, self.tokenizer, tensors, rng, state)
        checkpoint.set_link(output, "last", folder)
        if best:
            checkpoint.set_link(output, "best", folder)
        checkpoint.prune(output, self.config.save_total_limit)

    def resume(self) -> Path:
        """Take the state of the newest checkpoint that verifies; returns its folder.

        Raises:
            InputError: if there is none, or the data, the vocabulary, the model or the run's length differ.
        """
        snapshot, passed_over = checkpoint.read_newest(self.config.output)
        for sentence in passed_over:
            warn(sentence)
        state = snapshot.state
        train, val, vocabulary = self.data.names(self.config)
        for key, now, what in (
            ("train_fingerprint", self.data.train.fingerprint, f"training data ({train})"),
            ("val_fingerprint", self.data.val.fingerprint, f"validation data ({val})"),
            ("vocabulary_fingerprint", self.tokenizer.fingerprint, f"vocabulary ({vocabulary})"),
        ):
            if state[key] != now:
                raise InputError(
                    f"{snapshot.folder} was made with another {what}; give that run's files, or train anew"
                )
        for key, value in self._surroundings().items():
            if state.get(key, value) != value:
                warn(f"{key} was {state[key]} before, is {value} now: sums are rounded differently")
        load_weights(self.model, snapshot.folder)
        load_state(self.model, self.optimizers, snapshot.optimizer)
        set_random_state(self.device, snapshot.rng)
        checkpoint.set_link(self.config.output, "last", snapshot.folder)
        self.steps_done, self.tokens_seen = state["steps_done"], state["tokens_seen"]
        self.best_val_loss = math.inf if state["best_val_loss"] is None else state["best_val_loss"]
        self.best_step = state["best_step"]
        best = self.config.output / f"step-{self.best_step:08d}"
        if best.is_dir():  # a kill between saving and linking left the link behind
            checkpoint.set_link(self.config.output, "best", best)
        else:  # none yet; or it gave way to a newer one, which was damaged: the next one is the best there is
            self.best_val_loss, self.best_step = math.inf, 0
        self._loss_sum, self._loss_steps = state["loss_sum"], state["loss_steps"]
        self._train_seconds = state["train_seconds"]
        if self.steps_done >= self.total_steps:
            raise InputError(
                f"{snapshot.folder}: the run is finished ({self.steps_done} steps); "
                "raise --num_train_epochs or --max_steps to go on"
            )
        return snapshot.folder

    def _stopped(self, asked: StopRequest) -> Stopped:
        assert asked.signal is not None
        name = signal.Signals(asked.signal).name
        where = self.config.output / "last"
        again = f"--output {self.config.output} --resume"
        return Stopped(
            128 + asked.signal, f"{name}: saved step {self.steps_done} in {where}; go on with {again}"
        )
