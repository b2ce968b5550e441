"""Model directories as Hugging Face's libraries write and read them.

    model, tokenizer = load_model_and_tokenizer("output/best")
    save_pretrained(model, "my-model", tokenizer)  # AutoModelForCausalLM.from_pretrained("my-model") reads it

A directory holds config.json, model.safetensors (or shards of it), generation_config.json and a tokenizer's
files: characters, byte-level BPE, or WordPiece. Weights are read from safetensors only: a pickle can run
code. Nothing is fetched from the network. `minigpt.training` keeps training state, `minigpt.storage.files`
the manifest.
"""

import contextlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from minigpt.errors import InputError
from minigpt.families.checks import MAX_LAYERS
from minigpt.families.registry import LanguageModel, ModelConfig, family_of, family_of_json
from minigpt.families.strict_loading import cast
from minigpt.storage.files import MANIFEST, atomic_write, verify_manifest
from minigpt.storage.json_files import read_json
from minigpt.storage.read_ahead import WEIGHTS, ReadAhead, folder_of_weights
from minigpt.storage.safetensors_files import WeightFiles, parse_size, write_weights
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenization.subword import SubwordTokenizer
from minigpt.tokenization.wordpiece import WordPieceTokenizer
from minigpt.tokenization.wordpiece_files import VOCABULARY
from minigpt.tokenizer import Tokenizer
from minigpt.weights.quantized_folders import is_quantized, read_quantized

__all__ = [
    "AnyTokenizer",
    "load_model",
    "load_model_and_tokenizer",
    "load_tokenizer",
    "load_weights",
    "model_folder",
    "save_pretrained",
]

AnyTokenizer: TypeAlias = Tokenizer | SubwordTokenizer

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"

_STORED = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | Literal["stored"] | None = None,
) -> LanguageModel:
    """The model of a directory, in eval mode.

    Args:
        path: a directory with config.json and model.safetensors or its shards, or a run's folder with such a
            `best`, or else such a `last`, in it.
        dtype: of its parameters. None is float32, whatever the file holds (most CPUs compute more slowly in
            bfloat16); "stored" is float16 or bfloat16 if the file holds nothing else, and else float32.

    Besides the model itself, it needs memory for two tensors as the file stores them.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    return _model_reader(model_folder(path), device, dtype)()


def load_tokenizer(path: str | Path) -> AnyTokenizer:
    """The tokenizer of a directory, or the character tokenizer of a vocab.json file.

    A directory's tokenizer.json says which kind it has; without one, vocab.json and merges.txt are byte-level
    BPE, as in GPT-2's and Qwen's folders, and vocab.txt is WordPiece, as in BERT's.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    return Tokenizer(path) if Path(path).is_file() else _read_tokenizer(model_folder(path))


def load_model_and_tokenizer(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | Literal["stored"] | None = None,
    ahead: ReadAhead | None = None,
) -> tuple[LanguageModel, AnyTokenizer]:
    """Both from one directory, checked to belong together.

    Args:
        ahead: of the same directory, started before. Where the dtype stays, its bytes become the model's;
            elsewhere all of them may be in memory beside the model for a moment.

    Raises:
        InputError: as `load_model`, and if the model's vocabulary and the tokenizer differ in size. (For
            byte-level BPE the model may have more rows: Qwen3 has 151,936 for 151,669 tokens.)
    """
    folder = model_folder(path)
    read_model = _model_reader(folder, device, dtype, ahead)
    # Python makes the tokenizer while torch, which releases Python, copies the weights.
    with ThreadPoolExecutor(1) as beside:
        later = beside.submit(_read_tokenizer, folder)
        model = read_model()  # its errors come first
        tokenizer = later.result()
    _require_same_vocabulary(model, tokenizer, f"{folder}: ")
    return model, tokenizer


def load_weights(model: LanguageModel, path: str | Path) -> None:
    """Copy a directory's weights into an existing model, as training does when it resumes.

    The parameters stay the same objects, on their device and in their dtype. Dropout may differ.

    Raises:
        InputError: as `load_model`, and if the directory's model is another one, naming what differs.
    """
    folder = model_folder(path)
    config, expected = _read_config(folder), model.config
    differing = [
        f"{field.name}={getattr(config, field.name)!r} instead of {getattr(expected, field.name)!r}"
        for field in fields(config)
        if field.name != "dropout" and getattr(config, field.name) != getattr(expected, field.name)
    ]
    if differing:
        raise InputError(f"{folder / CONFIG}: the weights are for another model, {', '.join(differing)}")
    weights = _read_weights(folder, expected, torch.float32)
    family_of(expected).load_state(model, weights, assign=False)


def save_pretrained(
    model: LanguageModel,
    directory: str | Path,
    tokenizer: AnyTokenizer | None = None,
    *,
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | None = None,
) -> None:
    """Write a directory that transformers, and `load_model`, read. The same weights give the same bytes.

    Each file is replaced as a whole. A directory with a manifest, a finished checkpoint, is never written to.

    Args:
        tokenizer: goes into the same directory; without one it holds the model alone.
        max_shard_size: bytes, or "500MB"; weights that take more are written in several files and an index.
        dtype: what to write, torch.float32, float16 or bfloat16; None is what the model has. (A float64
            model, or one of several dtypes, is written in float32.)

    Raises:
        InputError: if the vocabularies do not fit, a weight is not finite, or a file cannot be written.
    """
    folder = Path(directory)
    if not isinstance(model.lm_head, nn.Linear):
        raise InputError("a quantised model cannot be saved here: `minigpt quantize` writes such folders")
    if (folder / MANIFEST).exists():
        raise InputError(f"{folder} is a finished checkpoint with a {MANIFEST}: choose another directory")
    parse_size(max_shard_size)  # its error comes before anything is written
    if tokenizer is not None:
        _require_same_vocabulary(model, tokenizer)
    stored = _stored_dtype(model, dtype)
    weights = _converted(family_of(model.config).to_hugging_face(model), stored)
    special_ids = {name: getattr(tokenizer, name, None) for name in ("eos_token_id", "pad_token_id")}
    for name, index in special_ids.items():
        if index is not None and index >= model.config.vocab_size:  # of a token that was added without a row
            special_ids[name] = None
    config = family_of(model.config).config_to_hugging_face(model.config, **special_ids)
    settings = {
        CONFIG: {**config, "dtype": _STORED[stored]},
        GENERATION: {name: index for name, index in special_ids.items() if index is not None},
    }
    if isinstance(tokenizer, Tokenizer):
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
    if isinstance(tokenizer, SubwordTokenizer):
        tokenizer.save(folder)
    write_weights(folder, weights, max_shard_size)


def _stored_dtype(model: LanguageModel, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None and dtype not in _STORED:
        raise InputError(f"dtype must be one of {', '.join(_STORED.values())}: got {dtype}")
    present = {parameter.dtype for parameter in model.parameters()}
    own = present.pop() if len(present) == 1 else torch.float32
    return dtype or (own if own in _STORED else torch.float32)


def _converted(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same in another dtype, each tensor freed as soon as it is converted."""
    if dtype != torch.float32:
        for name in weights:
            weights[name] = cast(name, weights[name], dtype)
    return weights


def _require_same_vocabulary(model: LanguageModel, tokenizer: AnyTokenizer, where: str = "") -> None:
    entries, rows = tokenizer.get_vocab_size(), model.config.vocab_size
    if isinstance(tokenizer, SubwordTokenizer):
        # Added tokens may lie beyond the model's rows: a padding token, say, that no text has.
        entries = 1 + max(tokenizer.definition.vocab.values(), default=-1)
    if entries > rows or (entries < rows and isinstance(tokenizer, Tokenizer)):
        raise InputError(
            f"{where}model and tokenizer do not belong together: "
            f"the model has vocab_size={rows}, the tokenizer {entries} entries"
        )


def model_folder(path: str | Path) -> Path:
    """The model directory of a path, which may be a run's folder; verified if it has a manifest.

    Raises:
        InputError: if there is none, or a file does not match the manifest.
    """
    folder = Path(path)
    if not folder.exists():
        raise InputError(f"{folder} does not exist: give a directory that `minigpt train` wrote")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file: give the directory with {CONFIG} and {WEIGHTS}")
    folder = folder_of_weights(folder)
    if (folder / MANIFEST).exists():
        verify_manifest(folder)
    return folder


def _read_config(folder: Path) -> ModelConfig:
    content = read_json(folder / CONFIG, missing=f"{folder} is not a model directory")
    try:
        config: ModelConfig = family_of_json(content).config_from_hugging_face(content)
        return config
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from None


def _read_weights(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype | Literal["stored"],
    ahead: ReadAhead | None = None,
) -> dict[str, Tensor]:
    weights = WeightFiles(folder, ahead)
    if dtype == "stored":
        stored = {form.dtype for form in weights.described.values() if form.is_floating_point()}
        dtype = stored.pop() if stored in ({torch.float16}, {torch.bfloat16}) else torch.float32
    try:
        return family_of(config).from_hugging_face(weights, config, dtype)
    except InputError as error:
        where = "" if str(error).startswith(str(folder)) else f"{weights.path}: "
        raise InputError(f"{where}{error}") from None


def _model_reader(
    folder: Path,
    device: str | torch.device,
    dtype: torch.dtype | Literal["stored"] | None,
    ahead: ReadAhead | None = None,
) -> Callable[[], LanguageModel]:
    """A function that reads a directory's weights. The model's shapes are made now, before it is called.

    They are a thousand short calls into torch, and each of them releases Python: beside a thread that is busy
    in Python every one would wait for its turn.
    """
    content = read_json(folder / CONFIG, missing=f"{folder} is not a model directory")
    if is_quantized(content):
        if dtype not in (None, "stored"):
            raise InputError(f"{folder} is quantised, its arithmetic is fixed: got dtype={dtype}")
        return lambda: read_quantized(folder, content).to(device)
    config = _read_config(folder)
    family = family_of(config)
    made: LanguageModel | None = None
    if config.num_hidden_layers <= MAX_LAYERS:  # a billion: first see what the file has
        with contextlib.suppress(InputError):  # raised again below, with the file's name
            made = family.on_meta(config)
            family.parameter_shapes(config)

    def read() -> LanguageModel:
        weights = _read_weights(folder, config, dtype or torch.float32, ahead)
        model: LanguageModel = family.on_meta(config) if made is None else made
        family.load_state(model, weights, assign=True)
        return model.to(device).eval()

    return read


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
    if not path.exists():
        if (folder / VOCABULARY).exists():
            return WordPieceTokenizer.from_folder(folder)
        if (folder / "merges.txt").exists():
            return BpeTokenizer.from_folder(folder)
    whole = read_json(path, missing=f"{folder} has no tokenizer")
    content = whole.get("model")
    kind = content.get("type", "BPE") if isinstance(content, dict) else None
    if kind == "BPE":
        return BpeTokenizer.from_folder(folder, whole=whole)
    if kind == "WordPiece":
        return WordPieceTokenizer.from_folder(folder, whole)
    vocabulary = content.get("vocab") if isinstance(content, dict) else None
    if kind != "WordLevel" or not isinstance(vocabulary, dict):
        raise InputError(
            f"{path}: its model is {kind!r}: read are byte-level 'BPE', 'WordPiece', and 'WordLevel' of "
            "single characters"
        )
    try:
        tokenizer = Tokenizer.from_word2id(vocabulary)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    ours = _tokenizer_json(tokenizer)
    for key in ("normalizer", "pre_tokenizer"):
        if whole.get(key) != ours[key]:
            raise InputError(
                f"{path}: its {key} is not that of a character vocabulary: each is a token there"
            )
    return tokenizer
