"""Scores on tasks (files of test questions), measured at each evaluation of a training run: `--eval_task`.

    tasks = TaskScores(config.eval_task)
    tasks.of(model, tokenizer)                # {"arc/acc": 0.25, ...}: for metrics.jsonl and TensorBoard

The tasks' files are read before the first step, so that an error in a file is reported early. Measuring draws
no random number and changes no weight. So a run gets the same weights with and without tasks.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minigpt.evaluation.options import TaskOptions
from minigpt.evaluation.task_results import LoadedModel, run_task
from minigpt.evaluation.tasks import read_tasks
from minigpt.generation.loop import evaluating
from minigpt.weights.pretrained import AnyTokenizer

__all__ = ["TaskScores"]

_QUESTIONS = 100  # a longer task is measured on this many of its questions, so that evaluations stay short


class TaskScores:
    """Measures the model of a training run on tasks.

    Args:
        paths: files and folders of the tasks.
        encoding: encoding of the files; "": detect it.
        reads_text: True if the run learns plain text. The model then gets the questions without <sep>.

    Raises:
        InputError: if a task cannot be read.
    """

    def __init__(self, paths: Sequence[str], reads_text: bool = False, encoding: str = "") -> None:
        self._options = TaskOptions(prompt_format="text" if reads_text else None)
        tasks = read_tasks([Path(path) for path in paths], encoding=encoding)
        self._tasks = [task.limited(_QUESTIONS) for task in tasks]

    def of(self, model: Any, tokenizer: AnyTokenizer) -> dict[str, float]:
        """Measure the tasks. Return each task's main metric. The model's mode (train or eval) is restored.

        Raises:
            InputError: if a task does not fit the model: for example, a classifier lacks the task's labels.
        """
        found = {}
        with evaluating(model):
            for task in self._tasks:
                result = run_task(LoadedModel(model, tokenizer), task, self._options)
                value = result.metrics[result.main].value
                if math.isfinite(value):
                    found[f"{task.name}/{result.main}"] = value
        return found
