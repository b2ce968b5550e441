"""Saves the losses of a finished run as a reference curve, and compares other runs with it.

    save_curve(record, Path("minigpt/training/recipes/curves/qa-cpu.jsonl"))
    found = compare(record, read_curve(path))

A curve is a JSONL file. The first line describes the run: recipe, SHA-256 of the encoded data and of the
vocabulary, settings, steps, tokens. Each further line is a point: step, share (of the run's steps), tokens
(seen so far), and train_loss or val_loss. Two runs are compared after the same number of tokens, and only if
data and vocabulary are the same, because losses on other data cannot be compared.
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import minigpt
from minigpt.diagnosis.findings import Finding, finding
from minigpt.diagnosis.record import RunRecord
from minigpt.errors import InputError
from minigpt.storage.files import atomic_write
from minigpt.storage.json_files import json_text, parse_json
from minigpt.storage.regular_files import read_text
from minigpt.training.config import PER_CALL, RECIPES

__all__ = ["Curve", "compare", "compare_with_recipe", "read_curve", "save_curve"]

# Another seed or machine gives slightly different losses. A difference that is more than 15 % and more than
# 0.02 nats has another cause.
BEHIND_TIMES, BEHIND_NATS = 1.15, 0.02
# An unfinished run is compared only if the planned tokens of this run and of the reference differ by a factor
# of at most 1.25. Otherwise the learning rates of the two runs fall at different times.
UNLIKE_LENGTH = 1.25

_FORMAT = 1
# Options that a curve does not record, because they hardly change a loss: paths, reports, seed, machine.
_OF_NO_EFFECT = {
    *PER_CALL,
    *("recipe", "train_data", "val_data", "vocab_path", "text", "val_text", "shards", "output", "resume"),
    *(
        "strict",
        "eval_steps",
        "logging_steps",
        "save_total_limit",
        "keep_every",
        "save_async",
        "on_save_error",
    ),
    *("max_bad_steps", "report_to", "seed", "device", "precision", "threads", "workers", "parallel"),
}


@dataclass(frozen=True)
class Curve:
    """The losses of a finished run."""

    recipe: str
    fingerprints: dict[str, str]  # SHA-256 of the encoded data and of the vocabulary
    settings: dict[str, Any]
    tokens: int  # number of tokens that the whole run trains on
    val: list[tuple[float, float]]  # (tokens seen, validation loss) of each evaluation, in order

    def loss_at(self, tokens: float) -> float:
        """Return the validation loss after a number of tokens, interpolated between two evaluations.

        The result is nan before the first evaluation, and the last loss after the last evaluation.
        """
        if tokens < self.val[0][0]:
            return math.nan
        for (left, before), (right, after) in itertools.pairwise(self.val):
            if tokens <= right:
                return before + (after - before) * (tokens - left) / (right - left)
        return self.val[-1][1]


def _tokens_per_step(record: RunRecord) -> float:
    """Return the mean number of tokens per step; nan if no checkpoint has recorded tokens and steps."""
    tokens, steps = record.state.get("tokens_seen"), record.state.get("steps_done")
    if not (isinstance(tokens, int) and isinstance(steps, int) and tokens > 0 and steps > 0):
        return math.nan
    return tokens / steps


def save_curve(record: RunRecord, path: Path) -> int:
    """Write the curve of a finished run. Returns the number of points.

    Raises:
        InputError: if the run is not finished or has no evaluation; if the file cannot be written.
    """
    per_step, total = _tokens_per_step(record), record.total_steps
    if not record.is_finished or not math.isfinite(per_step):
        raise InputError(
            f"{record.folder} is not a finished run (step {record.steps_done} of {total or 'unknown'}): only "
            "the curve of a finished run can be a reference"
        )
    points: list[dict[str, float]] = [
        {"step": point.step, "train_loss": point.loss} for point in record.train if math.isfinite(point.loss)
    ]
    points += [
        {"step": point.step, "val_loss": point.loss} for point in record.val if math.isfinite(point.loss)
    ]
    if not any("val_loss" in point for point in points):
        raise InputError(f"{record.folder / 'metrics.jsonl'} has no evaluation: nothing to compare with")
    head = {
        "format": _FORMAT,
        "minigpt": minigpt.__version__,
        "recipe": record.config.recipe,
        "fingerprints": record.fingerprints,
        "settings": {
            name: value for name, value in record.config.as_dict().items() if name not in _OF_NO_EFFECT
        },
        "total_steps": total,
        "tokens": round(per_step * total),
    }
    for point in points:
        point["share"] = round(point["step"] / total, 6)
        point["tokens"] = round(point["step"] * per_step)
    # `sort` keeps the order of points with equal steps, so a training point stays before a validation point.
    points.sort(key=lambda point: point["step"])
    lines = [json_text(line) for line in (head, *points)]
    atomic_write(path, "".join(f"{line}\n" for line in lines))
    return len(points)


def read_curve(path: Path) -> Curve:
    """Read a curve that `save_curve` wrote.

    Raises:
        InputError: if the file cannot be read or is not a curve.
    """
    try:
        head, *points = [parse_json(line) for line in read_text(path).splitlines()]
        if head["format"] != _FORMAT:
            raise InputError(f"{path} has format {head['format']!r}; this minigpt knows {_FORMAT}")
        val = [(float(p["tokens"]), float(p["val_loss"])) for p in points if "val_loss" in p]
        fingerprints = {str(name): str(value) for name, value in head["fingerprints"].items()}
        curve = Curve(str(head["recipe"]), fingerprints, dict(head["settings"]), int(head["tokens"]), val)
        increasing = all(left < right for (left, _), (right, _) in itertools.pairwise(val))
        if not val or not increasing or not all(0 < loss < math.inf for _, loss in val):
            raise ValueError
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist; `minigpt doctor RUN --save_curve FILE` writes one"
        ) from None
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        raise InputError(f"{path} is not a reference curve of `minigpt doctor --save_curve`") from None
    return curve


def compare_with_recipe(record: RunRecord, folder: Path = RECIPES / "curves") -> Finding:
    """Compare a run with the curve that belongs to its recipe, if there is one.

    Raises:
        InputError: if the curve is damaged.
    """
    recipe = record.config.recipe
    path = folder / f"{recipe}.jsonl"
    if not recipe or recipe.endswith(".toml") or not path.is_file():
        return finding("no_reference", recipe=recipe)
    return compare(record, read_curve(path))


def compare(record: RunRecord, curve: Curve) -> Finding:
    """Compare a run's validation loss with a curve, after the same number of tokens."""
    # A run's fingerprints are in its checkpoint. Without fingerprints, it is unknown which data the run used.
    if not record.fingerprints:
        return finding("reference_too_early", steps=record.steps_done)
    if record.fingerprints != curve.fingerprints:
        return finding("reference_other_data")
    val = [point for point in record.val if math.isfinite(point.loss)]
    per_step = _tokens_per_step(record)
    if not val or not math.isfinite(per_step):
        return finding("reference_too_early", steps=record.steps_done)
    longer = per_step * record.total_steps / curve.tokens
    if not record.is_finished and not 1 / UNLIKE_LENGTH <= longer <= UNLIKE_LENGTH:
        return finding("reference_too_early", steps=record.steps_done)
    # A finished run is compared by its best evaluation, because the checkpoint of this evaluation is kept. An
    # unfinished run is compared by its last evaluation.
    point = min(val, key=lambda one: one.loss) if record.is_finished else val[-1]
    tokens = round(per_step * (record.total_steps if record.is_finished else point.step))
    reference = curve.loss_at(tokens)
    if math.isnan(reference):
        return finding("reference_too_early", steps=record.steps_done)
    numbers = {"tokens": tokens, "loss": point.loss, "reference": reference}
    if point.loss <= max(BEHIND_TIMES * reference, reference + BEHIND_NATS):
        return finding("near_reference", **numbers)
    ours = record.config.as_dict()
    different = [
        f"{name} {ours[name]} (reference {theirs})"
        for name, theirs in curve.settings.items()
        if name in ours and ours[name] != theirs
    ]
    return finding(
        "behind_reference",
        **numbers,
        times=point.loss / reference,
        differences=", ".join(different) or "none",
    )
