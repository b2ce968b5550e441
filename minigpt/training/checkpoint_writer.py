"""When and how checkpoints get to the disk: at once or in the background, and what a failure means.

In the background means: the loop copies what it wants kept and goes on; a thread writes it. One save at a
time: the next one waits for it, and so does the end of the run. What the thread does is what would have been
done at once, in the same order, so it is no less safe; the newest checkpoint is only a little older.
"""

import threading
from pathlib import Path
from typing import Literal

import torch

from minigpt.console.terminal import warn
from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel, family_of
from minigpt.training import checkpoint
from minigpt.training.checkpoint import Contents

__all__ = ["Saver", "copied"]


def copied(model: LanguageModel) -> LanguageModel:
    """The model's weights in a model of their own, on the CPU, which further training does not change."""
    family = family_of(model.config)
    copy: LanguageModel = family.on_meta(model.config)
    weights = family.from_hugging_face(family.to_hugging_face(model), model.config, torch.float32)
    family.load_state(copy, weights, assign=True)
    return copy


class Saver:
    """Writes checkpoints, links them, deletes old ones.

    Args:
        output: the run's folder.
        keep: newest checkpoints to keep, besides the best.
        in_background: let a thread write. The contents must then be copies.
        on_error: what a failed save means: "continue" with a warning, or "stop".
    """

    def __init__(
        self, output: Path, keep: int, in_background: bool, on_error: Literal["continue", "stop"]
    ) -> None:
        self._output, self._keep = output, keep
        self._in_background, self._on_error = in_background, on_error
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.newest = -1  # the step of the last save that went well, or is under way; -1: none, or it failed

    def __enter__(self) -> "Saver":
        return self

    def save(self, contents: Contents, best: bool, final: bool) -> bool:
        """Save, and point `last` (and `best`) at it. Waits for an earlier save first.

        Args:
            contents: what to write.
            best: the link `best` moves too.
            final: nothing comes after it: wait until it is written, and let no error pass.

        Returns: False if it, or the save before it, failed and the run is to go on.

        Raises:
            InputError: if it failed, and is final or the run is to stop.
        """
        before = self.wait(final=False)
        self.newest = contents.step
        if not self._in_background:
            self._write(contents, best)
            return self.wait(final) and before
        self._thread = threading.Thread(target=self._write, args=(contents, best), daemon=True)
        self._thread.start()
        return (self.wait(final) if final else True) and before

    def _write(self, contents: Contents, best: bool) -> None:
        try:
            folder = checkpoint.save(self._output, contents)
            checkpoint.set_link(self._output, "last", folder)
            if best:
                checkpoint.set_link(self._output, "best", folder)
            self._prune()
        except BaseException as error:
            if not self._in_background and not isinstance(error, InputError):
                raise
            self._error = error  # the loop's thread hears of it in `wait`

    def _prune(self) -> None:
        try:
            checkpoint.prune(self._output, self._keep)
        except InputError as error:
            if self._on_error == "stop":
                raise
            warn(str(error))  # what was to be saved is saved

    def fail(self, error: InputError, final: bool) -> bool:
        """What belongs to a checkpoint could not be written: as if its save had failed. See `save`."""
        self.wait(final=False)
        self._error = error
        return self.wait(final)

    def wait(self, final: bool = False) -> bool:
        """Wait for the save that is under way. True if all went well; errors as in `save`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is None:
            return True
        self.newest = -1
        if final or self._on_error == "stop" or not isinstance(error, InputError):
            raise error
        warn(
            f"{error}; training goes on, and the next save tries again (--on_save_error stop: it would stop)"
        )
        return False

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is None:
            self.wait(final=True)
        elif not isinstance(
            error, SystemExit
        ):  # a second signal: at once, and the thread dies with the process
            if self._thread is not None:
                self._thread.join()
            if self._error is not None:  # `error` is on its way already
                warn(str(self._error))
