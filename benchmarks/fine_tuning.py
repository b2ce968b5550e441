"""Fine-tuning on questions and answers: minigpt compared with transformers' Trainer, from the same weights.

    python benchmarks/fine_tuning.py --data data/data.jsonl --output benchmarks/results/NAME.json
    python benchmarks/fine_tuning.py --data data/data.jsonl --toy

Both start from the same checkpoint, of the size of `qa-cpu`. It is made here: `--epochs_before` epochs of
minigpt on the questions and answers as plain sequences, or random weights with 0. Both learn the same pairs,
with the loss on the answers only. `transformers` is used in the usual way: Trainer, AdamW with the same rate,
betas and decay, a cosine with the same warm-up, and a collator that pads to the longest pair of the batch and
sets labels outside of answers to -100. The arms:

- `transformers`: batches of `--batch_size` pairs in random order;
- `minigpt, same steps`: the same batch size and AdamW with the same rate, so only the computation differs
  (pairs of similar length in a batch, lm_head only where the loss counts);
- `minigpt, qa-cpu`: the recipe, with Muon and its own batches.

The arms take turns, epoch by epoch. Time is training only. The loss is in nats per answer token over the
whole validation part, computed for all by minigpt's evaluation. `seconds_to_equal` is the time to
transformers' last loss, interpolated between epochs. The last line is JSON. The script needs transformers and
accelerate; without them only minigpt runs.
"""

import sys
from pathlib import Path

# run as a script: import minigpt from this checkout, and the other files of this folder
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import dataclasses
import importlib.util
import tempfile
import threading
import time
from typing import Any

import numpy as np
import torch

from benchmarks.turns import (
    Runner,
    add_flags,
    finish,
    prepared_data,
    seconds_to,
    shown_spread,
    spread,
    surroundings,
)
from minigpt.console.terminal import table
from minigpt.data.batches import EncodedExamples
from minigpt.evaluation.loss import evaluate_loss
from minigpt.training.config import TrainConfig, read_recipe
from minigpt.training.loop import Trainer
from minigpt.training.run_data import RunData, read_data
from minigpt.weights.pretrained import load_model, load_weights, save_pretrained

PEER = "transformers"


class Ours:
    """A minigpt run from a checkpoint. A turn is an epoch."""

    def __init__(self, name: str, config: TrainConfig, data: RunData, checkpoint: Path) -> None:
        self.name, self.trainer = name, Trainer(config, data)
        load_weights(self.trainer.model, checkpoint)
        self.seconds = 0.0
        self.rows: list[dict[str, Any]] = [self.row()]

    def row(self) -> dict[str, Any]:
        """Return a row of the result: time and loss so far."""
        trainer = self.trainer
        loss = trainer.evaluate().metrics()["val_answer_loss"]
        return {"arm": self.name, "seed": trainer.config.seed, "steps": trainer.progress.steps_done} | {
            "seconds": round(self.seconds, 3),
            "answer_loss": round(loss, 4),
        }

    def run(self, slice_seconds: float) -> bool:
        """Train for an epoch. `slice_seconds` is ignored."""
        trainer, began = self.trainer, time.perf_counter()
        epoch = len(trainer.step.plan) // trainer.config.gradient_accumulation_steps
        for _ in range(min(epoch, trainer.step.total_steps - trainer.progress.steps_done)):
            trainer.step()
        self.seconds += time.perf_counter() - began
        self.rows.append(self.row())
        print(self.rows[-1], flush=True)
        return trainer.progress.steps_done < trainer.step.total_steps


class Theirs:
    """transformers' Trainer in a thread that waits between epochs. A turn is an epoch."""

    def __init__(self, config: TrainConfig, data: RunData, checkpoint: Path, work: Path, epochs: int) -> None:
        assert isinstance(data.train, EncodedExamples)
        self.config, self.data, self.work, self.pairs = config, data, work, data.train
        self.rows: list[dict[str, Any]] = []
        self.seconds, self.done = 0.0, False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._checkpoint = checkpoint
        trainer = self.make(epochs)
        self.note(0)
        self._thread = threading.Thread(target=self._work, args=(trainer,), daemon=True)
        self._thread.start()

    def make(self, epochs: int) -> Any:
        """Make the Trainer in the usual way."""
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        config, outer = self.config, self
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            self._checkpoint, dtype=torch.float32, attn_implementation="sdpa"
        )
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            setattr(self.model.config, name, 0.0)
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0

        class Turns(transformers.TrainerCallback):  # type: ignore[misc]
            """Waits at the begin of each epoch, and measures time."""

            def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                outer._go.acquire()
                outer._began = time.perf_counter()

            def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                outer.seconds += time.perf_counter() - outer._began
                outer.note(state.global_step)
                outer.done = state.epoch is not None and round(state.epoch) >= epochs
                outer._back.release()

        arguments = transformers.TrainingArguments(
            output_dir=str(self.work),
            num_train_epochs=epochs,
            per_device_train_batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            max_grad_norm=config.max_grad_norm,
            lr_scheduler_type="cosine",
            warmup_steps=config.warmup_steps,
            seed=config.seed,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        return transformers.Trainer(
            model=self.model,
            args=arguments,
            train_dataset=Pairs(self.pairs),
            data_collator=padded,
            callbacks=[Turns()],
        )

    _began = 0.0

    def note(self, steps: int) -> None:
        """Measure the loss with minigpt's evaluation, on a minigpt model with these weights."""
        folder = self.work / "weights"
        self.model.save_pretrained(folder)
        report = evaluate_loss(load_model(folder), self.data.val.in_order(128))
        self.rows.append(
            {"arm": PEER, "seed": self.config.seed, "steps": steps, "seconds": round(self.seconds, 3)}
            | {"answer_loss": round(report.answer.loss, 4)}
        )

    def _work(self, trainer: Any) -> None:
        torch.set_num_threads(self.config.threads)  # torch's thread count is a setting of each thread
        try:
            trainer.train()
        except BaseException as error:  # `run` raises it in the main thread
            self._error = error
            self._back.release()

    def run(self, slice_seconds: float) -> bool:
        """Train for an epoch."""
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error
        print(self.rows[-1], flush=True)
        if self.done:
            self._thread.join()
        return not self.done


class Pairs(torch.utils.data.Dataset[dict[str, list[int]]]):
    """The encoded pairs as a Dataset for Trainer."""

    def __init__(self, pairs: EncodedExamples) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        pairs = self.pairs
        row = slice(pairs.starts[index], pairs.starts[index + 1])
        ids = pairs.ids[row]
        return {"input_ids": ids.tolist(), "labels": np.where(pairs.is_answer[row], ids, -100).tolist()}


def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Collate: pad to the longest row of the batch; labels that do not count are -100."""
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100}
    batch = {
        key: torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])
        for key, value in fill.items()
    }
    lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
    return {**batch, "attention_mask": (torch.arange(width) < lengths).long()}


def main() -> None:
    """Run all arms in turns. Print the table, the machine, and one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="JSONL file of questions and answers")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument(
        "--epochs_before", type=float, default=1, help="of the checkpoint that all start from"
    )
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the order of the data")
    parser.add_argument("--split_seed", type=int, default=42)
    add_flags(parser)
    options = parser.parse_args()
    if options.toy:
        options.seeds, options.epochs = options.seeds[:1], 2
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        numbers = measure(options, Path(folder))
    shown = [
        [arm["arm"], *(shown_spread(arm[k]) for k in ("seconds_an_epoch", "last_loss", "seconds_to_equal"))]
        for arm in numbers["summary"]
    ]
    title = f"{options.epochs} epochs, median of {len(options.seeds)} seeds (least to most)"
    columns = ("", "seconds an epoch", "last loss", "seconds to transformers' last loss")
    table(title, columns, shown, (1, 2, 3))
    if numbers["left_out"]:
        print(f"left out: {'; '.join(numbers['left_out'])}")
    finish(numbers, options.output)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make the checkpoint; all arms take turns, seed by seed."""
    paths = {**prepared_data(options.data, folder, options.split_seed), "threads": options.threads}
    size: dict[str, Any] = {"n_layer": 1, "n_embd": 32, "n_head": 2} if options.toy else {}
    recipe = dataclasses.replace(
        read_recipe("qa-cpu"), **paths, **size, device="cpu", num_train_epochs=float(options.epochs)
    )
    if recipe.family == "gpt":  # both models have biases, as GPT-2 in transformers
        recipe = dataclasses.replace(recipe, bias=True)
    same = dataclasses.replace(
        recipe,
        optimizer="adamw",
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        precision="float32",
        tokens_per_batch=0,
        min_lr_ratio=0.0,
        warmup_steps=min(recipe.warmup_steps, 10),
    )
    data = read_data(recipe)
    assert isinstance(data, RunData)
    checkpoint = folder / "before"
    make_checkpoint(recipe, data, checkpoint, options.epochs_before)
    left_out = [
        f"{PEER}: {name} is not installed"
        for name in ("transformers", "accelerate")
        if importlib.util.find_spec(name) is None
    ]
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        arms: list[Runner] = [
            Ours("minigpt, same steps", dataclasses.replace(same, seed=seed), data, checkpoint),
            Ours("minigpt, qa-cpu", dataclasses.replace(recipe, seed=seed), data, checkpoint),
        ]
        if not left_out:
            work = folder / f"transformers-{seed}"
            arms.append(Theirs(dataclasses.replace(same, seed=seed), data, checkpoint, work, options.epochs))
        running = list(arms)
        while running:
            running = [arm for arm in running if arm.run(0)]
        rows += [row for arm in arms for row in arm.rows]
    return {
        **surroundings("fine_tuning", options.data, options.threads, ("transformers", "accelerate")),
        "toy": options.toy,
        "seeds": options.seeds,
        "epochs": options.epochs,
        "pairs": {"train": len(data.train), "val": len(data.val)},
        "parameters": recipe.model_config(data.tokenizer.get_vocab_size()).parameter_count(),
        "left_out": left_out,
        **summary(rows, options),
        "rows": rows,
    }


def make_checkpoint(recipe: TrainConfig, data: RunData, folder: Path, epochs: float) -> None:
    """Train the checkpoint that all arms start from: some epochs with the loss on all tokens."""
    config = dataclasses.replace(recipe, loss_on="all", num_train_epochs=epochs or 1.0)
    trainer = Trainer(config, data)
    for _ in range(trainer.step.total_steps if epochs else 0):
        trainer.step()
    save_pretrained(trainer.model, folder, data.tokenizer)


def summary(rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Return for each arm, over the seeds: seconds per epoch, last loss, time to transformers' last loss."""
    found, ratios = [], {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        epochs, lasts, equal, faster = [], [], [], []
        for seed in options.seeds:
            curve = curve_of(rows, arm, seed)
            peer = curve_of(rows, PEER, seed)
            epochs.append(curve[-1][0] / options.epochs)
            lasts.append(curve[-1][1])
            if peer and (seconds := seconds_to(peer[-1][1], curve)):
                equal.append(seconds)
                faster.append(peer[-1][0] / seconds)
        found.append(
            {
                "arm": arm,
                "seconds_an_epoch": spread(epochs),
                "last_loss": spread(lasts),
                "seconds_to_equal": spread(equal) if equal else None,
                "reached": len(equal),
            }
        )
        if faster and arm != PEER:
            ratios[arm] = spread(faster)
    return {"summary": found, "ratio": ratios}


def curve_of(rows: list[dict[str, Any]], arm: str, seed: int) -> list[tuple[float, float]]:
    """Return the (seconds, loss) points of a run."""
    return [(r["seconds"], r["answer_loss"]) for r in rows if (r["arm"], r["seed"]) == (arm, seed)]


if __name__ == "__main__":
    main()
