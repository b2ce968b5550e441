"""Shows how a view changes during training: the same view for each checkpoint that the run has kept.

along(Path("output"), lambda model, tokenizer: loss(model, tokenizer, "你好", "你好！"))
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel
from minigpt.finetuning.adapters import is_adapter
from minigpt.lens.results import Lines, Part, Table, View
from minigpt.lens.words import Say
from minigpt.storage.json_files import read_json
from minigpt.training.checkpoint import list_checkpoints
from minigpt.weights.pretrained import AnyTokenizer, load_model_and_tokenizer, load_tokenizer

__all__ = ["Along", "along", "kept_checkpoints"]


@dataclass(frozen=True)
class Along(View):
    """A view that holds one view for each checkpoint that a run has kept."""

    run: str
    steps: list[int]
    views: list[View]

    def as_dict(self) -> dict[str, object]:
        """Return the numbers of this view as a dict for JSON."""
        return {"run": self.run, "steps": self.steps, "views": [view.as_dict() for view in self.views]}

    def parts(self, say: Say) -> list[Part]:
        """Return the tables and charts of this view, translated by `say`."""
        lines = [view.headline(say) for view in self.views]
        rows = [(f"{step:,}", *line.values()) for step, line in zip(self.steps, lines)]
        found: list[Part] = [Table(say("along {run}", run=self.run), (say("step"), *lines[0]), rows, (0,))]
        means = [getattr(view, "mean", None) for view in self.views]
        if None not in means:
            found.append(Lines(say("loss"), say("step"), say("loss"), {say("loss"): (self.steps, means)}))  # type: ignore[dict-item]
        return found


def kept_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints in a run's folder, in the order of their training steps.

    Raises:
        InputError: if there is no such folder, or it holds no checkpoint.
    """
    folders = list_checkpoints(run)[::-1]
    if not run.is_dir():
        raise InputError(
            f"{run} does not exist: give the folder of a run, which `minigpt train --output` made"
        )
    if not folders:
        raise InputError(f"{run} holds no checkpoint: train with --keep_every N, then each N-th step is kept")
    return folders


def along(
    run: Path,
    look: Callable[[LanguageModel, AnyTokenizer], View],
    device: torch.device | str = "cpu",
    on_progress: Callable[[int], None] = lambda done: None,
) -> Along:
    """Make the same view for each kept checkpoint of a run.

    Args:
        run: folder of the run.
        look: function of model and tokenizer that makes the view.
        device: device of the models.
        on_progress: called with the number of checkpoints finished so far.

    Raises:
        InputError: if the run has no checkpoints, or a checkpoint cannot be read.
    """
    folders = kept_checkpoints(run)
    views = []
    for folder in folders:
        views.append(look(*_loaded(folder, device)))
        on_progress(len(views))
    return Along(str(run), _steps(folders), views)


def _steps(folders: Sequence[Path]) -> list[int]:
    return [int(folder.name.rpartition("-")[2]) for folder in folders]


def _loaded(folder: Path, device: torch.device | str) -> tuple[LanguageModel, AnyTokenizer]:
    """Load a checkpoint. If it is an adapter, also load the base model named in adapter_config.json."""
    if not is_adapter(folder):
        return load_model_and_tokenizer(folder, device)
    base = Path(str(read_json(folder / "adapter_config.json").get("base_model_name_or_path")))
    model, _ = load_model_and_tokenizer(base, device, adapter=folder)
    return model, load_tokenizer(folder)
