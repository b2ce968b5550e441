"""Model directories as Hugging Face's libraries write and read them.

    model, tokenizer = load_model_and_tokenizer("output/best")
    save_pretrained(model, tokenizer, "my-model")  # AutoModelForCausalLM.from_pretrained("my-model") reads it

A directory holds config.json, model.safetensors, generation_config.json, tokenizer.json and
tokenizer_config.json. Weights are read from safetensors only: a pickle can run code. Nothing is fetched from
the network. Training state is `minigpt.training`'s affair, the manifest `minigpt.files`'s.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from minigpt.bpe import BpeTokenizer
from minigpt.command_line import InputError
from minigpt.families import LanguageModel, ModelConfig, naming, naming_of
from minigpt.files import MANIFEST, atomic_write, verify_manifest
from minigpt.tokenizer import Tokenizer

__all__ = [
    "AnyTokenizer",
    "load_model",
    "load_model_and_tokenizer",
    "load_tokenizer",
    "load_weights",
    "save_pretrained",
]

AnyTokenizer: TypeAlias = Tokenizer | BpeTokenizer

CONFIG, WEIGHTS, GENERATION = "config.json", "model.safetensors", "generation_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


def load_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> LanguageModel:
    """The model of a directory, in eval mode.

    Args:
        path: a directory with config.json and model.safetensors, or a run's folder with such a `best`, or
            else such a `last`, in it.
        dtype: what to compute in; None is float32 whatever the file holds. (On most CPUs bfloat16 is slower.)

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    return _read_model(_checked_folder(path), device, dtype)


def load_tokenizer(path: str | Path) -> AnyTokenizer:
    """The tokenizer of a directory, characters or byte-level BPE, or of a vocab.json file.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    return Tokenizer(path) if Path(path).is_file() else _read_tokenizer(_checked_folder(path))


def load_model_and_tokenizer(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[LanguageModel, Tokenizer]:
    """Both from one directory, checked to belong together.

    Raises:
        InputError: as `load_model`, if the two vocabularies differ in size, or for byte-level tokens.
    """
    folder = _checked_folder(path)
    model, tokenizer = _read_model(folder, device, dtype), _read_tokenizer(folder)
    if not isinstance(tokenizer, Tokenizer):
        raise InputError(f"{folder}: a model of plain text with byte-level tokens answers no questions")
    _require_same_vocabulary(model, tokenizer, f"{folder}: ")
    return model, tokenizer


def load_weights(model: LanguageModel, path: str | Path) -> None:
    """Copy a directory's weights into a model that exists already, as training does when it resumes.

    The parameters stay the same objects, on their device and in their dtype. Dropout may differ.

    Raises:
        InputError: as `load_model`, and if the directory's model is another one, naming what differs.
    """
    folder = _checked_folder(path)
    config, expected = _read_config(folder), model.config
    differing = [
        f"{field.name}={getattr(config, field.name)!r} instead of {getattr(expected, field.name)!r}"
        for field in fields(config)
        if field.name != "dropout" and getattr(config, field.name) != getattr(expected, field.name)
    ]
    if differing:
        raise InputError(f"{folder / CONFIG}: the weights are for another model, {', '.join(differing)}")
    weights = _read_weights(folder, expected, torch.float32)
    naming_of(expected).fill(model, weights, assign=False)


def save_pretrained(model: LanguageModel, tokenizer: AnyTokenizer, directory: str | Path) -> None:
    """Write a directory that transformers, and `load_model`, read. The same weights give the same bytes.

    Each file is replaced as a whole. A directory that has a manifest, a finished checkpoint, is left alone.

    Raises:
        InputError: if the vocabularies differ in size, a weight is not finite, or a file cannot be written.
    """
    folder = Path(directory)
    if (folder / MANIFEST).exists():
        raise InputError(f"{folder} is a finished checkpoint with a {MANIFEST}: choose another directory")
    _require_same_vocabulary(model, tokenizer)
    weights = safetensors.torch.save(
        naming_of(model.config).to_hugging_face(model), metadata={"format": "pt"}
    )
    end = tokenizer.eos_token_id if isinstance(tokenizer, BpeTokenizer) else tokenizer.sep_token_id
    special_ids = {"eos_token_id": end, "pad_token_id": tokenizer.pad_token_id}
    settings: dict[str, Any] = {
        CONFIG: naming_of(model.config).config_to_hugging_face(model.config, **special_ids),
        GENERATION: {key: index for key, index in special_ids.items() if index is not None},
    }
    if isinstance(tokenizer, BpeTokenizer):
        tokenizer.save(folder)
    else:
        settings[TOKENIZER] = _tokenizer_json(tokenizer)
        settings[TOKENIZER_CONFIG] = _tokenizer_config(tokenizer, model.config.max_position_embeddings)
    try:
        texts = {
            name: (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()
            for name, content in settings.items()
        }
    except UnicodeEncodeError as error:
        raise InputError(f"an entry of the vocabulary is no character of Unicode: {error.reason}") from None
    for name, text in texts.items():
        atomic_write(folder / name, text)
    atomic_write(folder / WEIGHTS, weights)


def _require_same_vocabulary(model: LanguageModel, tokenizer: AnyTokenizer, where: str = "") -> None:
    entries, rows = tokenizer.get_vocab_size(), model.config.vocab_size
    if entries != rows:
        raise InputError(
            f"{where}model and tokenizer do not belong together: "
            f"the model has vocab_size={rows}, the tokenizer {entries} entries"
        )


def _checked_folder(path: str | Path) -> Path:
    """The model directory meant by a path, verified if it has a manifest."""
    folder = Path(path)
    if not folder.exists():
        raise InputError(f"{folder} does not exist: give a directory that `minigpt train` wrote")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file: give the directory with {CONFIG} and {WEIGHTS}")
    if not (folder / WEIGHTS).exists():
        for name in ("best", "last"):  # a run that was stopped before it was ever measured has no `best`
            if (folder / name).is_dir():
                folder = (folder / name).resolve()  # at once: training may point it elsewhere meanwhile
                break
    if (folder / MANIFEST).exists():
        verify_manifest(folder)
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {path.parent} is not a model directory") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object: got {type(content).__name__}")
    return content


def _read_config(folder: Path) -> ModelConfig:
    content = _read_json(folder / CONFIG)
    try:
        config: ModelConfig = naming(content).config_from_hugging_face(content)
        return config
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from None


def _read_weights(folder: Path, config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise InputError(f"{path} is missing: weights are read from this one file, never from a pickle")
    try:
        return naming_of(config).from_hugging_face(safetensors.torch.load_file(path), config, dtype)
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is damaged or no safetensors file: {error}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _read_model(folder: Path, device: str | torch.device, dtype: torch.dtype | None) -> LanguageModel:
    config = _read_config(folder)
    weights = _read_weights(folder, config, dtype or torch.float32)
    names = naming_of(config)
    model: LanguageModel = names.unfilled(config)
    names.fill(model, weights, assign=True)
    return model.to(device).eval()


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The character vocabulary as the `tokenizers` library runs it: each code point is a word of its own."""
    names = {index: word for word, index in tokenizer.word2id.items()}
    specials = sorted({tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.sep_token_id})
    sep = names[tokenizer.sep_token_id]
    first, second, end = (
        {"Sequence": {"id": "A", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 0}},
        {"SpecialToken": {"id": sep, "type_id": 0}},
    )
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": names[index], **flags} for index in specials],
        "normalizer": None,
        # [\s\S] rather than a dot: a dot matches no newline
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": r"[\s\S]"},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, end],
            "pair": [first, end, second, end],
            "special_tokens": {sep: {"id": sep, "ids": [tokenizer.sep_token_id], "tokens": [sep]}},
        },
        "decoder": {"type": "Fuse"},  # joins without spaces
        "model": {
            "type": "WordLevel",
            "vocab": {names[index]: index for index in sorted(names)},
            "unk_token": names[tokenizer.unk_token_id],
        },
    }


def _tokenizer_config(tokenizer: Tokenizer, model_max_length: int) -> dict[str, Any]:
    names = {index: word for word, index in tokenizer.word2id.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model_max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "pad_token": names[tokenizer.pad_token_id],
        "unk_token": names[tokenizer.unk_token_id],
        "sep_token": names[tokenizer.sep_token_id],
        "eos_token": names[tokenizer.sep_token_id],
        "split_special_tokens": True,  # "<sep>" typed by a user stays five characters
        "clean_up_tokenization_spaces": False,
    }


def _read_tokenizer(folder: Path) -> AnyTokenizer:
    path = folder / TOKENIZER
    content = _read_json(path).get("model")
    kind = content.get("type") if isinstance(content, dict) else None
    vocabulary = content.get("vocab") if isinstance(content, dict) else None
    if kind == "BPE":
        return BpeTokenizer.from_folder(folder)
    if kind != "WordLevel" or not isinstance(vocabulary, dict):
        raise InputError(f"{path} holds no character vocabulary: its model is {kind!r}, not 'WordLevel'")
    try:
        return Tokenizer.from_word2id(vocabulary)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
