"""Data, loss and checkpoint format of `--task classification`.

The training loop is the same as for language models. The checkpoint with the lowest validation loss is the
best. Accuracy and F1 are also measured. Class weights change the training loss only.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minigpt.console.command_line import show
from minigpt.console.fonts import chinese_font
from minigpt.console.language import translated
from minigpt.console.terminal import note, shortened, table
from minigpt.data.batches import BatchPlan
from minigpt.data.labelled import (
    EncodedTexts,
    LabelledBatch,
    LabelledOptions,
    LabelledText,
    class_weights,
    hold_out,
    label_names,
    read_labelled,
)
from minigpt.errors import Message
from minigpt.evaluation.classification import (
    ClassificationReport,
    calibration_error,
    draw_confusion,
    evaluate_classifier,
    mistakes,
    predict,
    print_confusion,
    report_of,
)
from minigpt.finetuning.classification import (
    SCORE,
    Labels,
    SequenceClassifier,
    classifier_family,
    summed_loss,
)
from minigpt.finetuning.embeddings import resize_token_embeddings
from minigpt.finetuning.freezing import train_only
from minigpt.finetuning.layers import add_adapter
from minigpt.tokenizer import Tokenizer
from minigpt.training.finetune_config import FinetuneConfig
from minigpt.training.loss import Finish, Objective
from minigpt.training.model_files import AdapterFiles, ModelFiles, adapter_config, require_trainable
from minigpt.training.run_data import HELD_OUT, shown_lines, with_more_tokens
from minigpt.weights.classifiers import (
    classifier_labels,
    config_json,
    encode_texts,
    load_classifier,
    load_classifier_weights,
    save_classifier,
    start_classifier,
)
from minigpt.weights.pretrained import CONFIG, AnyTokenizer, load_tokenizer, read_config, write_json

__all__ = ["ClassificationData", "ClassificationLoss", "labelled_parts", "make_classifier", "read_data"]

_CONFUSION = "confusion.png"  # file in the output folder with a picture of the confusion matrix


# -- data --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassificationData:
    """Texts with labels for training and validation, with the methods of `run_data.AnyData`."""

    tokenizer: AnyTokenizer
    train: EncodedTexts
    val: EncodedTexts
    val_texts: list[LabelledText]
    labels: Labels
    warnings: tuple[str, ...] = ()  # about cut texts and unknown characters; the run prints them

    @property
    def sentence(self) -> str:
        """Return a sentence with the sizes of the training and the validation data."""
        kinds = Message("numbers")
        if self.labels.problem_type != "regression":
            kinds = Message("{count} labels", count=len(self.labels))
        text = "{train:,} texts with {kinds} to learn from, {val:,} to measure on"
        return Message(text, train=len(self.train), kinds=kinds, val=len(self.val))

    def plan(self, config: Any) -> BatchPlan:
        """Plan which texts are in which batch."""
        return BatchPlan(
            self.train,
            batch_size=config.batch_size,
            tokens_per_batch=config.tokens_per_batch,
            pad_to=config.max_length if config.pad_to_max_length else 0,
            by_length=config.by_length,
            seed=config.seed,
        )

    def shapes(self, plan: Any, pad_to: int) -> list[tuple[int, int]]:
        """Return (rows, tokens per row + 1) of each batch of an epoch.

        The callers expect the shapes of next-token prediction, in which each row has one more token: its last
        target. So 1 is added here.
        """
        return [(rows, width + 1) for rows, width in plan.shapes(self.train, pad_to)]

    def names(self, config: Any) -> tuple[str, str, str]:
        """Return the names of training data, validation data and vocabulary, as messages show them."""
        val = f"a part of {config.train_data}" if config.val_data == HELD_OUT else str(config.val_data)
        return str(config.train_data), val, f"the tokenizer of {config.starts_from}"

    unit = "lines"  # `positions` returns line numbers

    def positions(self, batch: LabelledBatch) -> list[int]:
        """Return the line numbers, in the training file, of a batch's rows."""
        return [int(line) for line in self.train.lines[batch.rows]]

    def where(self, positions: Sequence[int], config: Any) -> str:
        """Describe some lines of the training data in words, for a message."""
        return Message("{lines} of {path}", lines=shown_lines(positions), path=config.train_data)

    def sample(self, model: Any, number: int) -> str:
        """Classify a validation text, and return text and predicted label."""
        i = number % len(self.val)
        batch = self.val.batch(np.array([i])).to(next(model.parameters()).device)
        was_training = model.training
        with torch.inference_mode():
            logits = model.eval()(batch.input_ids, last=batch.last)[0]  # (K,): one for each label
        model.train(was_training)
        text = " ".join(self.val_texts[i].text.split())
        if self.labels.problem_type == "regression":
            found = f"{float(logits[0]):.3g}"
        elif self.labels.problem_type == "multi_label_classification":
            found = ", ".join(n for n, value in zip(self.labels.names, logits) if value > 0) or translated(
                "none"
            )
        else:
            found = self.labels.names[int(logits.argmax())]
        right = ", ".join(self.val_texts[i].labels or ())
        verdict = Message("right") if found == right else Message("it is {label}", label=right)
        return Message(
            "  {text!r}: {found} ({verdict})", text=shortened(text, 30), found=found, verdict=verdict
        )


def labelled_options(config: FinetuneConfig) -> LabelledOptions:
    """Return the options that decide how the files with labels are read."""
    return LabelledOptions(
        text_field=config.text_field,
        label_field=config.label_field,
        problem_type=config.problem_type,
        encoding=config.encoding,
        strict=config.strict,
    )


def labelled_parts(config: FinetuneConfig) -> tuple[list[LabelledText], list[LabelledText]]:
    """Read the texts for training and validation. Print the numbers of skipped and held-out texts."""
    options = labelled_options(config)
    texts, report = read_labelled(config.train_data, options)
    report.print_summary()
    if config.problem_type != "regression":
        label_names(texts, str(config.train_data))  # raises an error if there are fewer than two labels
    if config.val_data == HELD_OUT:
        train, val = hold_out(texts, config.val_fraction, config.seed)
        show(
            f"no --val_data: {len(val):,} of {len(texts):,} texts of {config.train_data} are measured on and "
            "not learned from"
        )
        return train, val
    val, report = read_labelled(config.val_data, options)
    report.print_summary()
    return texts, val


def read_data(config: FinetuneConfig) -> ClassificationData:
    """Read the training and the validation data. Print how many texts were skipped.

    Raises:
        InputError: if a file cannot be read, or a label is not valid; the message names the file.
    """
    train, val = labelled_parts(config)
    kind = config.problem_type
    names = ("LABEL_0",) if kind == "regression" else label_names(train, str(config.train_data))
    names = _known_order(config.model, Labels(names, kind)).names
    given = load_tokenizer(config.model)
    tokenizer = with_more_tokens(given, config, (each.text for each in train))
    if isinstance(given, Tokenizer) and isinstance(tokenizer, Tokenizer):
        # A new classifier, made from a language model, reads <sep> before each text. If the folder already
        # holds a classifier, its texts begin as they did when it was trained: with <sep>, or without.
        tokenizer.sep_before_text = given.sep_before_text or classifier_labels(config.model) is None
    weights = class_weights(train) if config.class_weights == "balanced" else None
    length = min(config.max_length, read_config(config.model).max_position_embeddings)
    encoded: list[EncodedTexts] = []
    warnings: list[str] = []
    for path, part in ((config.train_data, train), (config.val_data, val)):
        where = config.train_data if path == HELD_OUT else path
        one = encode_texts(
            part, tokenizer, Labels(names, kind), length, str(where), None if encoded else weights
        )
        if one.n_cut:
            text = "{path}: {cut:,} of {count:,} texts are longer than {length} tokens and were cut"
            warnings.append(Message(text, path=where, cut=one.n_cut, count=len(part), length=length))
        unknown = int((one.ids == tokenizer.unk_token_id).sum()) if isinstance(tokenizer, Tokenizer) else 0
        if unknown:
            text = (
                "{path}: {count:,} characters are not in the tokenizer of {model} and became <unk>; "
                "--add_tokens from-data adds those of the training data"
            )
            warnings.append(Message(text, path=where, count=unknown, model=config.model))
        encoded.append(one)
    return ClassificationData(tokenizer, encoded[0], encoded[1], val, Labels(names, kind), tuple(warnings))


def _known_order(folder: Path, labels: Labels) -> Labels:
    """Return the labels. If `folder` holds a classifier with the same labels, return them in its order.

    The run can then use that classifier's output layer. If the classifier has other labels, print a note.
    """
    known = classifier_labels(folder)
    if known is None or known == labels:
        return labels
    if known.problem_type == labels.problem_type and set(known.names) == set(labels.names):
        return known
    note(
        f"{folder} is a classifier of other labels ({', '.join(known.names)[:80]}): the new one's head is new"
    )
    return labels


# -- the loss ----------------------------------------------------------------------------------------------


class LossTexts(NamedTuple):
    """The tensors of a batch that the loss needs."""

    input_ids: Tensor  # (B, T) int64
    last: Tensor  # (B,) int64: position of each row's last token
    # One label per text: (B,) int64, its index. Several: (B, number of labels) float32, 1 or 0 per label.
    # Regression: (B, 1) float32, the number to predict.
    labels: Tensor
    weights: Tensor  # (B,) float32: factor of each row's loss


class ClassificationLoss(Objective):
    """Cross-entropy for one label, binary cross-entropy for several, squared error for a number.

    Args:
        model: the classifier. Its parameters that require gradients are trained.
        token_dropout: probability with which a token is hidden in training. The last token of a text is never
            hidden, because the model reads the label from its position.
        hidden_id: id that stands in place of a hidden token.
    """

    model: SequenceClassifier  # type: ignore[assignment]

    def __init__(self, model: SequenceClassifier, token_dropout: float = 0.0, hidden_id: int = 0) -> None:
        super().__init__()
        self.model, self._token_dropout, self._hidden_id = model, token_dropout, hidden_id

    def count(self, batch: LabelledBatch) -> int:
        """Return the number of losses that are summed: one for each row.

        If a text may have several labels, there is one loss for each row and label.
        """
        is_single = self.model.labels.problem_type == "single_label_classification"
        return len(batch.rows) * (1 if is_single else len(self.model.labels))

    def select(self, batch: LabelledBatch) -> LossTexts:
        """Return the tensors of a batch that the loss needs."""
        return LossTexts(batch.input_ids, batch.last, batch.labels, batch.weights)

    def example(self, device: torch.device) -> LossTexts:
        """Return a batch of the smallest possible size: one text of one token."""
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        is_single = self.model.labels.problem_type == "single_label_classification"
        labels = zero if is_single else torch.zeros((1, len(self.model.labels)), device=device)
        return LossTexts(zero[None], zero, labels, torch.ones(1, device=device))

    def forward(self, input_ids: Tensor, last: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Return the sum of the losses of a batch, a tensor without dimensions."""
        if self._token_dropout and self.model.training:
            hidden = torch.rand(input_ids.shape, device=input_ids.device) < self._token_dropout
            input_ids = input_ids.masked_fill(hidden.scatter(1, last[:, None], False), self._hidden_id)
        return summed_loss(self.model(input_ids, last=last), labels, weights, self.model.labels.problem_type)

    def evaluate(
        self,
        model: Any,
        batches: Iterable[LabelledBatch],
        device: torch.device,
        finish: Finish | None = None,
    ) -> ClassificationReport:
        """Measure loss, accuracy and F1 on the validation data."""
        return evaluate_classifier(model, batches, device, finish)

    def conclude(self, data: Any, best: Path) -> dict[str, Any]:
        """Measure the best checkpoint on the validation data, and print where it is wrong.

        With one label per text: the confusion matrix (of at most 20 labels), the calibration error, and the
        wrong predictions with the highest probabilities. With several labels per text: how often each label
        was right, wrongly given or missed. For regression, nothing is printed.

        Returns: the measured values for --json.
        """
        model, _ = load_classifier(best, next(self.model.parameters()).device)
        found = predict(model, data.val)
        report = report_of(model.labels, found, data.val)
        print_confusion(report)
        if model.labels.problem_type != "single_label_classification":
            return {"confusion": report.counts.tolist()} if len(model.labels) > 1 else {}
        error = calibration_error(found, data.val.labels)
        show(f"expected calibration error {error:.4f}")
        wrong = mistakes(model.labels, found, data.val, data.val_texts)
        if wrong:
            rows = [
                (
                    each["line"],
                    shortened(" ".join(each["text"].split()), 60),
                    *(str(each[key]) for key in _MISTAKE),
                )
                for each in wrong
            ]
            table("surest mistakes", ("line", "text", "label", "predicted", "probability"), rows, (0, 4))
        picture = best.parent / _CONFUSION
        font = None if "".join(model.labels.names).isascii() else chinese_font()
        if draw_confusion(report, picture, font):
            show(f"the same as a picture: {picture}")
        return {
            "labels": list(model.labels.names),
            "confusion": report.counts.astype(int).tolist(),
            "calibration_error": error,
            "mistakes": wrong,
        }


_MISTAKE = ("label", "predicted", "probability")


# -- the model, and its files ------------------------------------------------------------------------------


class ClassifierFiles(ModelFiles):
    """Reads and writes a whole classifier: config.json with labels, model.safetensors, the tokenizer."""

    def writer(self, model: Any, tokenizer: AnyTokenizer, in_background: bool) -> Callable[[Path], None]:
        """Return a function that writes the classifier into a folder."""
        kept = _copied(model) if in_background else model
        return lambda folder: save_classifier(kept, folder, tokenizer)

    def load(self, model: Any, folder: Path) -> None:
        """Copy the weights of a checkpoint into the classifier, in place."""
        load_classifier_weights(model, folder)


class ClassifierAdapterFiles(AdapterFiles):
    """Reads and writes adapter and output layer in PEFT's format, with a config.json that has the labels."""

    task_type = "SEQ_CLS"

    def writer(self, model: Any, tokenizer: AnyTokenizer, in_background: bool) -> Callable[[Path], None]:
        """Return a function that writes the adapter into a folder."""
        write, content = super().writer(model, tokenizer, in_background), config_json(model, tokenizer)

        def write_both(folder: Path) -> None:
            write(folder)
            write_json(folder / CONFIG, content)

        return write_both


def _copied(model: SequenceClassifier) -> SequenceClassifier:
    """Return a copy of a classifier, on the CPU. Further training does not change the copy."""
    family = classifier_family(model.config, model.labels, model.pad_token_id)
    copy: SequenceClassifier = family.on_meta(model.config)
    weights = family.from_hugging_face(family.to_hugging_face(model), model.config)
    family.load_state(copy, weights, assign=True)
    return copy


def make_classifier(
    config: FinetuneConfig, data: ClassificationData, device: torch.device
) -> tuple[Objective, ModelFiles]:
    """Return the loss (it holds the classifier) and the object that writes the classifier's files.

    The output layer is usually new, so it is trained with every method, also with an adapter.
    """
    model = start_classifier(config.model, data.labels, data.tokenizer).train()
    require_trainable(model, config, config.model)
    lacking = data.tokenizer.get_vocab_size() > model.config.vocab_size
    if lacking:
        resize_token_embeddings(model, data.tokenizer.get_vocab_size(), config.new_rows)  # type: ignore[arg-type]
    files: ModelFiles = ClassifierFiles()
    if config.method == "freeze":
        train_only(model, config.train_only)  # type: ignore[arg-type]
        model.score.requires_grad_(True)
    elif config.has_adapter:
        options = config.adapter_options()
        saved = dict.fromkeys([*options["modules_to_save"], SCORE])
        adapter = adapter_config(config.method, {**options, "modules_to_save": tuple(saved)})
        add_adapter(model, adapter)  # type: ignore[arg-type]
        files = ClassifierAdapterFiles(model, adapter, config.model)  # type: ignore[arg-type]
    unknown = (
        data.tokenizer.unk_token_id if isinstance(data.tokenizer, Tokenizer) else data.train.pad_token_id
    )
    return ClassificationLoss(model.to(device), config.token_dropout, unknown), files
