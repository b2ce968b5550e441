"""Measures a classifier: loss, accuracy, F1, calibration, confusion matrix, most confident mistakes.

    report = evaluate_classifier(model, encoded.in_order(128))
    print(report.accuracy, report.macro_f1)
    found = predict(model, encoded)               # (N, K) probabilities for N texts and K labels

All measures are computed from sums over texts. So each of several processes can measure a part of the texts.
Then the sums of all processes are added up.
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

from minigpt.console.command_line import show
from minigpt.console.terminal import table
from minigpt.data.labelled import EncodedTexts, LabelledBatch, LabelledText
from minigpt.errors import InputError, Message, printable
from minigpt.finetuning.classification import Labels, SequenceClassifier, probabilities, summed_loss
from minigpt.storage.files import atomic_write

__all__ = [
    "ClassificationReport", "calibration_error", "draw_confusion", "evaluate_classifier", "mistakes",
    "predict", "print_confusion", "report_of",
]  # fmt: skip

_SHOWN = {  # problem_type of the labels -> template of the text that `shown` returns
    "single_label_classification": "accuracy {accuracy:.4f}  macro f1 {macro_f1:.4f}",
    "multi_label_classification": "micro f1 {micro_f1:.4f}  macro f1 {macro_f1:.4f}",
    "regression": "mse {mse:.4f}  pearson {pearson:.4f}",
}
_SHOWN_LABELS = 20  # with more labels, no confusion matrix is printed, and a list of labels is cut
_BINS = 15  # number of bins that the calibration error uses, as in https://arxiv.org/abs/1706.04599

Matrix = npt.NDArray[np.float64]


@dataclass
class ClassificationReport:
    """Sums over texts, and the measures that are computed from them.

    `counts` has one of three shapes, for K labels:

    - one label per text: (K, K), true labels in rows, predicted labels in columns
    - several labels per text: (K, 3), numbers of true positives, false positives and false negatives
    - regression: (1, 6), the number n of texts, and the sums of x, y, x * x, y * y and x * y, with true
      values x and predictions y
    """

    labels: Labels
    loss_sum: float = 0.0
    terms: int = 0  # number of losses that loss_sum adds up; loss_sum / terms is the mean loss
    counts: Matrix = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        K, kind = len(self.labels), self.labels.problem_type
        if not self.counts.size:
            widths = {"single_label_classification": K, "multi_label_classification": 3, "regression": 6}
            self.counts = np.zeros((K, widths[kind]))

    @property
    def loss(self) -> float:
        """Return the mean loss: nats per text (one label), nats per label (several) or MSE (regression)."""
        return self.loss_sum / self.terms if self.terms else math.nan

    @property
    def accuracy(self) -> float:
        """Return the share of texts with the right label."""
        return float(np.trace(self.counts) / max(self.counts.sum(), 1))

    def _hits(self) -> tuple[Matrix, Matrix, Matrix]:
        """Return three arrays (K,): the true positives, false positives and false negatives of each label."""
        if self.labels.problem_type == "multi_label_classification":
            return self.counts[:, 0], self.counts[:, 1], self.counts[:, 2]
        right = np.diag(self.counts)
        return right, self.counts.sum(0) - right, self.counts.sum(1) - right

    @property
    def macro_f1(self) -> float:
        """Return the mean F1 of all labels that occur, true or predicted. F1 = 2 TP / (2 TP + FP + FN)."""
        right, wrong, missed = self._hits()
        occurs = right + wrong + missed > 0
        return float(np.mean((2 * right / np.maximum(2 * right + wrong + missed, 1))[occurs]))

    @property
    def micro_f1(self) -> float:
        """Return F1, computed from TP, FP and FN summed over all labels."""
        right, wrong, missed = (float(each.sum()) for each in self._hits())
        return 2 * right / max(2 * right + wrong + missed, 1)

    @property
    def pearson(self) -> float:
        """Return the correlation of true values and predictions, or nan if either is constant."""
        n, x, y, xx, yy, xy = self.counts[0].tolist()
        spread = max(n * xx - x * x, 0.0) * max(n * yy - y * y, 0.0)
        return (n * xy - x * y) / math.sqrt(spread) if spread > 0 else math.nan

    def add(self, logits: Tensor, batch_labels: Tensor, counted: Tensor) -> None:
        """Add the texts of a batch.

        Args:
            logits: (B, K), for B texts and K labels.
            batch_labels: the field `labels` of a LabelledBatch.
            counted: (B,) bool: False for texts that are left out (their weight is 0).
        """
        kind = self.labels.problem_type
        logits, truth = logits[counted], batch_labels[counted]
        weights = torch.ones(len(logits), device=logits.device)
        self.loss_sum += float(summed_loss(logits, truth, weights, kind))
        self.terms += len(logits) * (1 if kind == "single_label_classification" else len(self.labels))
        self.count(probabilities(logits, kind).cpu().numpy(), truth.cpu().numpy())

    def count(self, found: Matrix, truth: npt.NDArray[Any]) -> None:
        """Add a batch to `counts`: predictions `found` (B, K), and the true labels `truth`."""
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

    # -- the interface of evaluation.loss.Report -----------------------------------------------------------

    def sums(self) -> list[float]:
        """Return the sums of this process, to be added up over all processes."""
        return [self.loss_sum, self.terms, *self.counts.flatten().tolist()]

    def set_sums(self, sums: Sequence[float]) -> None:
        """Replace the sums of this process by the sums over all processes."""
        self.loss_sum, self.terms = sums[0], int(sums[1])
        self.counts = np.array(sums[2:]).reshape(self.counts.shape)

    def metrics(self) -> dict[str, float]:
        """Return the metrics for metrics.jsonl as a dict: name of the metric -> value."""
        kind = self.labels.problem_type
        if kind == "regression":
            return {"val_loss": self.loss, "mse": self.loss, "pearson": self.pearson}
        first = "accuracy" if kind == "single_label_classification" else "micro_f1"
        return {"val_loss": self.loss, first: getattr(self, first), "macro_f1": self.macro_f1}

    def shown(self) -> str:
        """Return all metrics except the loss as text, to be printed in the same line as the loss."""
        return Message(_SHOWN[self.labels.problem_type], **self.metrics())


@torch.inference_mode()
def evaluate_classifier(
    model: SequenceClassifier,
    batches: Iterable[LabelledBatch],
    device: torch.device | str = "cpu",
    finish: Callable[[ClassificationReport], None] | None = None,
) -> ClassificationReport:
    """Measure a classifier on batches, in eval mode. Afterwards, restore the model's mode (train or eval).

    Args:
        finish: a function that is called with the report at the end. If there are several processes, it
            replaces the report's sums by the sums over all processes.
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
    """Compute probabilities (N, K) in the order of the texts; for regression the predicted numbers, (N, 1).

    Args:
        on_progress: called with the number of finished texts.
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
    """Compare predictions with the labels of the texts. `found`: (N, K), the result of `predict`."""
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
    """Compute the expected calibration error (https://arxiv.org/abs/1706.04599).

    The texts are divided into `bins` bins of equal width by the probability of their predicted label. The
    error of a bin is |accuracy - mean probability|. The result is the mean error of all bins, weighted by
    the number of texts in each bin.

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
    """Return at most `most` wrong predictions as dicts (text, right label, ...), the most confident first."""
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
    """Print the confusion matrix: true labels in rows, predicted labels in columns.

    If a text can have several labels, print how often each label was right, wrongly given, and missed.
    """
    names = report.labels.names
    if report.labels.problem_type == "multi_label_classification":
        rows = [[name, *(f"{n:,.0f}" for n in row)] for name, row in zip(names, report.counts)]
        table("labels", ("label", "right", "wrongly given", "missed"), rows[:_SHOWN_LABELS], (1, 2, 3))
    elif report.labels.problem_type == "single_label_classification" and len(names) <= _SHOWN_LABELS:
        rows = [[name, *(f"{n:,.0f}" for n in row)] for name, row in zip(names, report.counts)]
        show("confusion: the right label in rows, the predicted one in columns")
        # `table` translates column names, but not the values in a Message. So labels stay as they are.
        columns = (Message("{label}", label=name) for name in names)
        table("", ("", *columns), rows, range(1, len(names) + 1))


def draw_confusion(report: ClassificationReport, path: Path, font: str | None = None) -> bool:
    """Draw the confusion matrix as a PNG, normalised by row. Return True, or False without matplotlib."""
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
