"""Compares training runs: curves, sizes, losses, times, and answers to the same questions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minigpt.console.terminal import seconds
from minigpt.diagnosis.answers import load_best
from minigpt.diagnosis.record import RunRecord, read_record
from minigpt.generation.conversation import QuestionAnswering
from minigpt.generation.generation_config import prompt_format
from minigpt.generation.native import without_warning
from minigpt.generation.options import GenerationOptions
from minigpt.lens.results import NOTHING, Lines, Part, Table, View, shown
from minigpt.lens.words import Say
from minigpt.training.checkpoint import list_checkpoints

__all__ = ["Curve", "Runs", "compare_runs"]

Points = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Curve:
    """The loss curves of a training run, and the answers of its best checkpoint."""

    name: str
    parameters: int
    steps: int
    seconds: float
    best_loss: float
    best_step: int
    train: Points  # (training steps, training loss at each of these steps)
    val: Points
    checkpoints: list[int]
    answers: list[str]

    @property
    def rose(self) -> float:
        """The last validation loss minus the lowest one, in nats; nan without validation losses."""
        return self.val[1][-1] - self.best_loss if self.val[1] else math.nan


@dataclass(frozen=True)
class Runs(View):
    """A view that compares several training runs."""

    runs: list[Curve]
    questions: list[str]

    def parts(self, say: Say) -> list[Part]:
        """Return the tables and charts of this view, translated by `say`."""
        rows = [
            (run.name, f"{run.parameters:,}", f"{run.best_loss:.4f}" if run.val[1] else NOTHING,
             f"{run.best_step:,}" if run.val[1] else NOTHING,
             self._overfit(run, say), seconds(run.seconds))
            for run in self.runs
        ]  # fmt: skip
        columns = (
            say("run"),
            say("parameters"),
            say("best loss"),
            say("at step"),
            say("after that"),
            say("time"),
        )
        found: list[Part] = [Table(say("runs"), columns, rows, (1, 2, 3))]
        for part, title in (("train", say("training loss")), ("val", say("validation loss"))):
            series = {run.name: getattr(run, part) for run in self.runs if getattr(run, part)[0]}
            if series:
                found.append(Lines(title, say("step"), say("loss"), series))
        if self.questions:
            answers = [
                (shown(question) if i == 0 else "", run.name, shown(run.answers[number]) or NOTHING)
                for number, question in enumerate(self.questions)
                for i, run in enumerate(self.runs)
            ]
            found.append(Table(say("answers"), (say("question"), say("run"), say("answer")), answers))
        kept = [(run.name, ", ".join(f"{step:,}" for step in run.checkpoints)) for run in self.runs]
        return [*found, Table(say("checkpoints"), (say("run"), say("steps")), kept)]

    def _overfit(self, run: Curve, say: Say) -> str:
        if not run.val[1]:
            return say("never evaluated")
        if len(run.val[1]) == 1:
            return say("evaluated once")
        if run.best_step == run.val[0][-1]:
            return say("still falling")
        return say("rises by {nats}", nats=f"{run.rose:.4f}")

    def headline(self, say: Say) -> dict[str, str]:
        """Return a summary of this view: one table row, as a dict {column title: cell}."""
        return {run.name: f"{run.best_loss:.4f}" for run in self.runs}


@without_warning()
def compare_runs(folders: Sequence[Path], questions: Sequence[str] = ()) -> Runs:
    """Read the metrics of training runs, and ask the best checkpoint of each run the same questions.

    Raises:
        InputError: if a folder holds no run.
    """
    records = [read_record(folder) for folder in folders]
    return Runs([_curve(record, questions) for record in records], list(questions))


def _curve(record: RunRecord, questions: Sequence[str]) -> Curve:
    train = [point.step for point in record.train], [point.loss for point in record.train]
    val = [point.step for point in record.val], [point.loss for point in record.val]
    best = min(record.val, key=lambda point: point.loss, default=None)
    answers: list[str] = []
    if questions:
        model, tokenizer = load_best(record)
        form = prompt_format(record.folder / "best", tokenizer)
        most = min(48, model.config.max_position_embeddings - 2)
        asking = QuestionAnswering(model, tokenizer, form, GenerationOptions(max_new_tokens=most))
        answers = [answer.text for answer in asking.answers(list(questions))]
    return Curve(
        name=str(record.folder),
        parameters=record.parameters,
        steps=record.steps_done,
        seconds=record.train[-1].seconds if record.train else math.nan,
        best_loss=best.loss if best else math.nan,
        best_step=best.step if best else 0,
        train=train,
        val=val,
        checkpoints=sorted(int(folder.name.rpartition("-")[2]) for folder in list_checkpoints(record.folder)),
        answers=answers,
    )
