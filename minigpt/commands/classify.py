"""Labels texts with a classifier of `minigpt finetune --task classification` or of transformers.

    minigpt classify --model output/reviews/best --text "房间很大，早餐也好"
    minigpt classify --model output/reviews/best --file new.csv --output labelled.jsonl
    minigpt classify --model output/reviews/best --file test.csv      # with labels: accuracy and F1, too

A file is a table, JSON Lines, a workbook, or plain text with one text per line.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.console import command_line
from minigpt.console.language import say
from minigpt.errors import InputError
from minigpt.storage.json_files import json_text

if TYPE_CHECKING:
    from minigpt.data.labelled import EncodedTexts, LabelledText
    from minigpt.evaluation.classification import Matrix
    from minigpt.finetuning.classification import Labels


@dataclass(frozen=True, kw_only=True)
class Options(command_line.MachineOptions):
    """Label texts: the most probable label and the probability of each."""

    RANGES = {"show": (0, 10**6), "batch_size": (1, 10**6)}

    # The model
    model: Path = Path("finetuned/best")
    """folder of a classifier: of `minigpt finetune --task classification`, of transformers, or PEFT"""

    # The texts
    text: tuple[str, ...] = ()
    """one text, or several"""
    file: Path | None = None
    """a file of texts; where it has labels, too, the classifier is measured on them"""
    text_field: str = ""
    """name of the text's field or column; left out: the usual names are known"""
    label_field: str = ""
    """name of the label's field or column; left out: the usual names are known"""
    encoding: str = ""
    """encoding of the file, such as gb18030; left out: found out"""
    strict: bool = False
    """stop at the first bad record instead of skipping it"""
    batch_size: int = 64
    """texts that are computed together"""

    # The results
    output: Path | None = None
    """JSON Lines file for all of them: text, label, score, and the probability of each label"""
    show: int = 10
    """texts to show"""


def main(options: Options) -> dict[str, Any]:
    """Read and label texts, and print the results."""
    if bool(options.text) == bool(options.file):
        raise InputError("give texts: either --text TEXT or --file FILE")
    if not options.model.exists():
        raise InputError(
            f"{options.model} does not exist: train a classifier first (minigpt finetune --task "
            "classification), or name its folder with --model"
        )
    import torch

    from minigpt.console.terminal import ProgressLine, warn
    from minigpt.data.labelled import LabelledText, read_labelled
    from minigpt.devices import pick_device
    from minigpt.evaluation.classification import predict, print_confusion, report_of
    from minigpt.storage.files import atomic_write
    from minigpt.weights.classifiers import encode_texts, load_classifier

    if options.threads:
        torch.set_num_threads(options.threads)
    model, tokenizer = load_classifier(options.model, pick_device(options.device))
    labels, name, skipped = model.labels, "--text", 0
    if options.file is not None:
        texts, reading = read_labelled(options.file, _reading(options, labels))
        reading.print_summary()
        name, skipped = str(options.file), len(reading.skipped)
    else:
        texts = [LabelledText(text, None, number) for number, text in enumerate(options.text, 1)]
        if not all(text.strip() for text in options.text):
            raise InputError("--text is empty")
    has_labels = all(each.labels is not None for each in texts)
    plain = texts if has_labels else [each._replace(labels=None) for each in texts]
    length = model.config.max_position_embeddings
    encoded = encode_texts(plain, tokenizer, labels, length, name)
    with ProgressLine("labelling, texts", len(texts), patience=2.0) as progress:
        found = predict(model, encoded, options.batch_size, progress.update)
    results = [_result(each, labels, row) for each, row in zip(texts, found.tolist())]
    _show(results[: options.show], labels)
    measured: dict[str, Any] = {}
    if has_labels:
        report = report_of(labels, found, encoded)
        print_confusion(report)
        print(say("loss {loss:.4f}  {report}", loss=report.loss, report=report.shown()))
        measured = {key.replace("val_", ""): value for key, value in report.metrics().items()}
        measured |= _calibration(labels, found, encoded)
    if encoded.n_cut:
        warn(f"{name}: {encoded.n_cut:,} texts are longer than the model's {length} tokens and were cut")
    if options.output is not None:
        lines = "".join(json_text(each) + "\n" for each in results)
        atomic_write(options.output, lines)
        command_line.show(f"{len(results):,} labelled texts are in {options.output}")
    kept = {} if options.output is not None else {"results": results}
    return {"texts": len(texts), "skipped": skipped, "cut": encoded.n_cut, **measured, **kept}


def _reading(options: Options, labels: "Labels") -> Any:
    from minigpt.data.labelled import LabelledOptions

    return LabelledOptions(
        text_field=options.text_field,
        label_field=options.label_field,
        problem_type=labels.problem_type,
        encoding=options.encoding,
        strict=options.strict,
        needs_labels=False,
        known=labels.names,
    )


def _result(each: "LabelledText", labels: "Labels", row: list[float]) -> dict[str, Any]:
    """Return a dict of a text, its label or labels, and all probabilities; for regression, text and value."""
    if labels.problem_type == "regression":
        return {"text": each.text, "value": row[0]}
    every = {name: round(value, 6) for name, value in zip(labels.names, row)}
    if labels.problem_type == "multi_label_classification":
        given = [name for name, value in zip(labels.names, row) if value > 0.5]
        return {"text": each.text, "labels": given, "probabilities": every}
    best = max(range(len(row)), key=row.__getitem__)
    return {
        "text": each.text,
        "label": labels.names[best],
        "score": round(row[best], 6),
        "probabilities": every,
    }


def _show(results: list[dict[str, Any]], labels: "Labels") -> None:
    from minigpt.console.terminal import shortened, table

    if not results:
        return
    kind = labels.problem_type
    rows: list[list[object]] = []
    for each in results:
        short = shortened(" ".join(each["text"].split()), 60)
        if kind == "regression":
            rows.append([short, f"{each['value']:.4g}"])
        elif kind == "multi_label_classification":
            chosen = [f"{name} {each['probabilities'][name]:.2f}" for name in each["labels"]]
            rows.append([short, ", ".join(chosen) or say("none")])
        else:
            rows.append([short, each["label"], f"{each['score']:.4f}"])
    columns = ("text", "label", "probability") if kind.startswith("single") else ("text", "result")
    table("labelled", columns, rows, (2,) if kind.startswith("single") else ())


def _calibration(labels: "Labels", found: "Matrix", encoded: "EncodedTexts") -> dict[str, float]:
    from minigpt.evaluation.classification import calibration_error

    if labels.problem_type != "single_label_classification":
        return {}
    error = calibration_error(found, encoded.labels)
    command_line.show(f"expected calibration error {error:.4f}")
    return {"calibration_error": error}


if __name__ == "__main__":
    command_line.run(Options, main)
