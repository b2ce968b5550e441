"""How well a classifier labels texts: loss, accuracy, F1, calibration, confusion, and its worst mistakes.

    report = evaluate_classifier(model, encoded.in_order(128))
    print(report.accuracy, report.macro_f1)
    found = predict(model, encoded)               # (N, K) probabilities in the order of the texts

All numbers follow from sums, so that several processes add up theirs.
"""

import importlib.util
import io
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minigpt.console.terminal import table
from minigpt.data.labelled import EncodedTexts, LabelledBatch, LabelledText
from minigpt.errors import InputError, printable
from minigpt.finetuning.classification import Labels, SequenceClassifier, probabilities, summed_loss
from minigpt.storage.files import atomic_write

__all__ = [
    "ClassificationReport", "calibration_error", "draw_confusion", "evaluate_classifier", "mistakes",
    "predict", "print_confusion", "report_of",
]  # fmt: skip

_SHOWN_LABELS = 20  # of a confusion matrix in the terminal
_BINS = 15  # as in https://arxiv.org/abs/1706.04599

Matrix = npt.NDArray[np.float64]


@dataclass
class ClassificationReport:
    """Sums over texts, and what follows from them.

    `counts` is (K, K), the right label in rows and the predicted one in columns; of several labels (K, 3):
    right, wrongly given, missed; of a number (1, 6): the sums n, x, y, xx, yy, xy of truth x, prediction y.
    """

    labels: Labels
    loss_sum: float = 0.0
    terms: int = 0  # of that sum
    counts: Matrix = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        K, kind = len(self.labels), self.labels.problem_type
        if not self.counts.size:
            widths = {"single_label_classification": K, "multi_label_classification": 3, "regression": 6}
            self.counts = np.zeros((K, widths[kind]))

    @property
    def loss(self) -> float:
        """Nats a text (one label), nats a text and label (several), or the mean squared error."""
        return self.loss_sum / self.terms if self.terms else math.nan

    @property
    def accuracy(self) -> float:
        """The share of texts whose label is right."""
        return float(np.trace(self.counts) / max(self.counts.sum(), 1))

    def _hits(self) -> tuple[Matrix, Matrix, Matrix]:
        """Of each label: right, wrongly given, missed."""
        if self.labels.problem_type == "multi_label_classification":
            return self.counts[:, 0], self.counts[:, 1], self.counts[:, 2]
        right = np.diag(self.counts)
        return right, self.counts.sum(0) - right, self.counts.sum(1) - right

    @property
    def macro_f1(self) -> float:
        """The mean over labels of 2 right / (2 right + wrong + missed), without labels that never occur."""
        right, wrong, missed = self._hits()
        occurs = right + wrong + missed > 0
        return float(np.mean((2 * right / np.maximum(2 * right + wrong + missed, 1))[occurs]))

    @property
    def micro_f1(self) -> float:
        """The same of all labels' sums."""
        right, wrong, missed = (float(each.sum()) for each in self._hits())
        return 2 * right / max(2 * right + wrong + missed, 1)

    @property
    def pearson(self) -> float:
        """The correlation of truth and prediction; nan if one of them never varies."""
        n, x, y, xx, yy, xy = self.counts[0].tolist()
        spread = max(n * xx - x * x, 0.0) * max(n * yy - y * y, 0.0)
        return (n * xy - x * y) / math.sqrt(spread) if spread > 0 else math.nan

    def add(self, logits: Tensor, batch_labels: Tensor, counted: Tensor) -> None:
        """Add texts.

        Args:
            logits: (B, K).
            batch_labels: as LabelledBatch has them.
            counted: (B,) bool: the texts that count.
        """
        kind = self.labels.problem_type
        logits, truth = logits[counted], batch_labels[counted]
        weights = torch.ones(len(logits), device=logits.device)
        self.loss_sum += float(summed_loss(logits, truth, weights, kind))
        self.terms += len(logits) * (1 if kind == "single_label_classification" else len(self.labels))
        self.count(probabilities(logits, kind).cpu().numpy(), truth.cpu().numpy())

    def count(self, found: Matrix, truth: npt.NDArray[Any]) -> None:
        """Add predictions (B, K) and right labels to `counts`."""
        kind = self.labels.problem_type
        if kind == "single_label_classification":
            np.add.at(self.counts, (truth, found.argmax(1)), 1)
        elif kind == "multi_label_classification":
            given, right = found > 0.5, truth > 0.5
            columns = (given & right, given & ~right, ~given & right)
            self.counts += np.stack([each.sum(0) for each in columns], axis=1)
        else:
            x, y = truth.astype(np.float64), found
            sums = [np.ones_like(x), x, y, x * x, y * y, x * y]
            self.counts += np.stack([each.sum(0) for each in sums], axis=1)

    # -- as evaluation.loss.Report -------------------------------------------------------------------------

    def sums(self) -> list[float]:
        """See `Report`."""
        return [self.loss_sum, self.terms, *self.counts.flatten().tolist()]

    def set_sums(self, sums: Sequence[float]) -> None:
        """See `Report`."""
        self.loss_sum, self.terms = sums[0], int(sums[1])
        self.counts = np.array(sums[2:]).reshape(self.counts.shape)

    def metrics(self) -> dict[str, float]:
        """See `Report`."""
        kind = self.labels.problem_type
        if kind == "regression":
            return {"val_loss": self.loss, "mse": self.loss, "pearson": self.pearson}
        first = "accuracy" if kind == "single_label_classification" else "micro_f1"
        return {"val_loss": self.loss, first: getattr(self, first), "macro_f1": self.macro_f1}

    def shown(self) -> str:
        """See `Report`."""
        values = {name: value for name, value in self.metrics().items() if name != "val_loss"}
        return "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items())


@torch.inference_mode()
def evaluate_classifier(
    model: SequenceClassifier,
    batches: Iterable[LabelledBatch],
    device: torch.device | str = "cpu",
    finish: Callable[[ClassificationReport], None] | None = None,
) -> ClassificationReport:
    """Measure a classifier on batches. Dropout is off meanwhile; its mode is as before afterwards.

    Args:
        finish: called with the sums: where each of several processes has some of the batches, it adds up.
    """
    report, device, was_training = ClassificationReport(model.labels), torch.device(device), model.training
    model.eval()
    try:
        for batch in batches:
            here = batch.to(device)
            report.add(model(here.input_ids, last=here.last), here.labels, here.weights > 0)
    finally:
        model.train(was_training)
    if finish is not None:
        finish(report)
    if not report.terms:
        raise InputError("there is no text to measure the classifier on")
    return report


@torch.inference_mode()
def predict(
    model: SequenceClassifier,
    texts: EncodedTexts,
    batch_size: int = 64,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Matrix:
    """Probabilities (N, K) of texts in their order; of a regression the numbers (N, 1).

    Args:
        on_progress: called with the number of texts that are done.
    """
    done = 0
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    found = np.empty((len(texts), len(model.labels)))
    for batch in texts.in_order(batch_size):
        here = batch.to(device)
        logits = model(here.input_ids, last=here.last)
        found[batch.rows] = probabilities(logits, model.labels.problem_type).cpu().numpy()
        done += len(batch.rows)
        on_progress(done)
    model.train(was_training)
    return found


def report_of(labels: Labels, found: Matrix, texts: EncodedTexts) -> ClassificationReport:
    """The report of predictions (N, K): as `evaluate_classifier`, whose logits are no longer needed."""
    report = ClassificationReport(labels)
    report.count(found, texts.labels)
    truth, kind = texts.labels, labels.problem_type
    tiny = np.finfo(np.float64).tiny
    if kind == "single_label_classification":
        terms = -np.log(np.maximum(found[np.arange(len(found)), truth], tiny))
    elif kind == "multi_label_classification":
        terms = -np.log(np.maximum(np.where(truth > 0.5, found, 1 - found), tiny))
    else:
        terms = (found - truth) ** 2
    report.loss_sum, report.terms = float(terms.sum()), terms.size
    return report


def calibration_error(found: Matrix, truth: npt.NDArray[np.int64], bins: int = _BINS) -> float:
    """Expected calibration error: how far the highest probability is from the share of right answers.

    https://arxiv.org/abs/1706.04599: texts are put into `bins` of equal width by the probability of the
    predicted label; the mean of |accuracy - mean probability| over the bins, weighted by their texts.

    >>> round(calibration_error(np.array([[0.8, 0.2], [0.7, 0.3], [0.4, 0.6]]), np.array([0, 1, 1]), 2), 4)
    0.0333
    """
    confidence, right = found.max(1), found.argmax(1) == truth
    place = np.minimum(np.ceil(confidence * bins).astype(int) - 1, bins - 1)
    gaps = [abs(right[place == one].sum() - confidence[place == one].sum()) for one in np.unique(place)]
    return float(sum(gaps) / len(found))


def mistakes(
    labels: Labels, found: Matrix, texts: EncodedTexts, source: Sequence[LabelledText], most: int = 5
) -> list[dict[str, Any]]:
    """The texts with a wrong label that the classifier was surest of."""
    given, sure = found.argmax(1), found.max(1)
    wrong = np.flatnonzero(given != texts.labels)
    wrong = wrong[np.argsort(-sure[wrong], kind="stable")][:most]
    return [
        {
            "line": int(texts.lines[i]),
            "text": source[int(i)].text,
            "label": labels.names[texts.labels[i]],
            "predicted": labels.names[given[i]],
            "probability": round(float(sure[i]), 4),
        }
        for i in wrong
    ]


def print_confusion(report: ClassificationReport) -> None:
    """Print how often which label (rows) was taken for which (columns)."""
    names = report.labels.names
    if report.labels.problem_type == "multi_label_classification":
        rows = [[name, *(f"{n:,.0f}" for n in row)] for name, row in zip(names, report.counts)]
        table("labels", ("label", "right", "wrongly given", "missed"), rows[:_SHOWN_LABELS], (1, 2, 3))
    elif report.labels.problem_type == "single_label_classification" and len(names) <= _SHOWN_LABELS:
        rows = [[name, *(f"{n:,.0f}" for n in row)] for name, row in zip(names, report.counts)]
        print("confusion: the right label in rows, the predicted one in columns")
        table("", ("", *names), rows, range(1, len(names) + 1))


def draw_confusion(report: ClassificationReport, path: Path, font: str | None = None) -> bool:
    """Draw the same as a PNG, rows as shares; returns False, and draws nothing, without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [printable(name)[:24].replace("$", r"\$") for name in report.labels.names]
    share = report.counts / np.maximum(report.counts.sum(1, keepdims=True), 1)
    size = 3 + 0.45 * len(names)
    picture = io.BytesIO()
    families = ["DejaVu Sans"] if font is None else [font, "DejaVu Sans"]
    with mpl.rc_context({"font.family": families}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(size, size), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        ticks = range(len(names))
        axes.set_xticks(ticks, names, rotation=45, ha="right")
        axes.set_yticks(ticks, names)
        axes.set(xlabel="predicted", ylabel="right")
        if len(names) <= _SHOWN_LABELS:
            for (row, column), count in np.ndenumerate(report.counts):
                colour = "white" if share[row, column] > 0.5 else "black"
                axes.text(column, row, f"{count:.0f}", ha="center", va="center", color=colour)
        figure.savefig(picture, format="png")
    atomic_write(path, picture.getvalue())
    return True
