"""Reads and writes classifiers in the formats of transformers (...ForSequenceClassification) and PEFT.

    model, tokenizer = load_classifier("output/best")
    save_classifier(model, Path("mine"), tokenizer)

PEFT's adapter folders do not hold the names of the labels. So minigpt also writes the classifier's
config.json, which holds them, into an adapter's folder.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from minigpt.data.labelled import EncodedTexts, LabelledText, encode_labelled
from minigpt.errors import InputError, Message
from minigpt.families.registry import is_classifier
from minigpt.finetuning.adapters import ADAPTER_CONFIG, adapter_folder, is_adapter, load_adapter
from minigpt.finetuning.classification import (
    Labels,
    SequenceClassifier,
    classifier_config,
    classifier_family,
    labels_of,
)
from minigpt.storage.files import MANIFEST, ManifestCheck
from minigpt.storage.json_files import read_json
from minigpt.storage.regular_files import is_there
from minigpt.storage.safetensors_files import WeightFiles, write_weights
from minigpt.tokenizer import Tokenizer
from minigpt.weights.pretrained import (
    CONFIG,
    AnyTokenizer,
    body_config,
    load_model,
    load_tokenizer,
    model_folder,
    save_tokenizer,
    write_json,
)
from minigpt.weights.quantized import is_quantised, prepare_training

__all__ = [
    "classifier_labels",
    "config_json", "encode_texts", "load_classifier", "load_classifier_weights", "save_classifier",
    "start_classifier",
]  # fmt: skip


def pad_token_of(tokenizer: AnyTokenizer) -> int | None:
    """Return the id for padding: the tokenizer's padding token, or else its end-of-text token."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _pad_token(folder: Path, content: Mapping[str, Any], usual: int | None) -> int | None:
    """Return pad_token_id from a config.json, or `usual` if the key is missing."""
    pad = content.get("pad_token_id", usual)
    if pad is not None and type(pad) is not int:
        raise InputError(f"{folder / CONFIG}: pad_token_id must be a whole number or null: got {pad!r:.80}")
    return pad


def start_classifier(folder: Path, labels: Labels, tokenizer: AnyTokenizer) -> SequenceClassifier:
    """Build a classifier from the weights of a folder, which holds a language model or a classifier.

    If the folder holds a classifier with the same labels, its head is used. Otherwise the head gets new
    random weights.

    Raises:
        InputError: if a file is missing or wrong; the message names the file.
    """
    path, pad = model_folder(folder), pad_token_of(tokenizer)
    if not is_classifier(
        read_json(path / CONFIG, missing=Message("{path} is not a model directory", path=path))
    ):
        model = load_model(path)
        if is_quantised(model):
            prepare_training(model)
        return SequenceClassifier(model.config, labels, pad, model.base_model)
    found = _read(path, pad)
    if found.labels == labels:
        found.pad_token_id = pad if found.pad_token_id is None else found.pad_token_id
        return found
    return SequenceClassifier(found.config, labels, pad, found.base_model)


def classifier_labels(path: str | Path) -> Labels | None:
    """Return the labels of a folder's classifier, or None if the folder holds a language model.

    Raises:
        InputError: if a file is missing or wrong; the message names the file.
    """
    folder = model_folder(path)
    content = read_json(folder / CONFIG, missing=Message("{path} is not a model directory", path=folder))
    return _labels(folder, content) if is_classifier(content) else None


def _labels(folder: Path, content: Mapping[str, Any]) -> Labels:
    """Return the labels in the content of a config.json. An error names the file."""
    try:
        return labels_of(content)
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from None


def load_classifier(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[SequenceClassifier, AnyTokenizer]:
    """Load a classifier in eval mode, and its tokenizer. The folder may hold an adapter of a base model.

    Raises:
        InputError: if a file is missing or wrong, or the folder holds a language model.
    """
    has_adapter = any(map(is_adapter, (Path(path), Path(path) / "best", Path(path) / "last")))
    folder = adapter_folder(Path(path)) if has_adapter else model_folder(path)
    tokenizer = load_tokenizer(folder)
    if has_adapter:
        return _read_adapted(folder, tokenizer).to(device).eval(), tokenizer
    return _read(folder, pad_token_of(tokenizer)).to(device).eval(), tokenizer


def _read(folder: Path, pad_token_id: int | None) -> SequenceClassifier:
    content = read_json(folder / CONFIG, missing=Message("{path} is not a model directory", path=folder))
    if not is_classifier(content):
        raise InputError(
            f"{folder} is a language model without a head that classifies; to train one: minigpt finetune "
            f"--task classification --model {folder} --train_data FILE"
        )
    config = body_config(folder, content)
    labels = _labels(folder, content)
    pad = _pad_token(folder, content, pad_token_id)
    family = classifier_family(config, labels, pad)
    with ManifestCheck(folder):
        files = WeightFiles(folder)
        try:
            weights = family.from_hugging_face(files, config)
        except InputError as error:
            where = "" if str(error).startswith(str(folder)) else f"{files.path}: "
            raise InputError(f"{where}{error}") from None
    model: SequenceClassifier = family.on_meta(config)
    family.load_state(model, weights, assign=True)
    return model


def _read_adapted(folder: Path, tokenizer: AnyTokenizer) -> SequenceClassifier:
    content = read_json(
        folder / CONFIG,
        missing=Message("{path} has no {name} with the labels' names", path=folder, name=CONFIG),
    )
    if not is_classifier(content):
        raise InputError(f"{folder} is an adapter for a language model, without a head that classifies")
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not is_there(base):
        raise InputError(
            f"{folder / ADAPTER_CONFIG}: the base model {base!r} is not there, seen from {Path.cwd()}"
        )
    model = start_classifier(Path(base), _labels(folder, content), tokenizer)
    model.pad_token_id = _pad_token(folder, content, model.pad_token_id)
    load_adapter(model, folder)  # type: ignore[arg-type]
    return model


def load_classifier_weights(model: SequenceClassifier, folder: Path) -> None:
    """Copy the weights of a folder into an existing classifier, for example to resume training.

    Raises:
        InputError: if the weights belong to another model.
    """
    family = classifier_family(model.config, model.labels, model.pad_token_id)
    weights = family.from_hugging_face(WeightFiles(folder), model.config)
    family.load_state(model, weights, assign=False)


def save_classifier(model: SequenceClassifier, folder: Path, tokenizer: AnyTokenizer) -> None:
    """Write a folder that AutoModelForSequenceClassification and `load_classifier` can read.

    Raises:
        InputError: if a weight is not finite, or a file cannot be written.
    """
    if is_there(folder / MANIFEST):
        raise InputError(f"{folder} is a finished checkpoint with a {MANIFEST}: choose another directory")
    family = classifier_family(model.config, model.labels, model.pad_token_id)
    weights = family.to_hugging_face(model)
    write_json(folder / CONFIG, config_json(model, tokenizer))
    save_tokenizer(tokenizer, folder, model.config.max_position_embeddings)
    write_weights(folder, weights, "5GB")


def config_json(model: SequenceClassifier, tokenizer: AnyTokenizer) -> dict[str, Any]:
    """Return the content of a classifier's config.json."""
    return classifier_config(model, tokenizer.eos_token_id)


def encode_texts(
    texts: Sequence[LabelledText],
    tokenizer: AnyTokenizer,
    labels: Labels,
    max_length: int,
    where: str,
    weights: Mapping[str, float] | None = None,
) -> EncodedTexts:
    """Encode texts with labels. transformers gives the same ids with the same tokenizer.

    With a character tokenizer, <sep> stands after each text, and before it if `tokenizer.sep_before_text`.
    """
    begin = end = None
    if isinstance(tokenizer, Tokenizer):
        end = tokenizer.sep_token_id
        begin = end if tokenizer.sep_before_text else None
    return encode_labelled(
        texts,
        tokenizer,
        labels.names,
        labels.problem_type,
        max_length,
        where,
        begin=begin,
        end=end,
        pad_token_id=pad_token_of(tokenizer) or 0,
        weights=weights,
    )
