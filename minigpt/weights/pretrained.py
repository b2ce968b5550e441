"""Reads and writes model folders in Hugging Face's format.

    model, tokenizer = load_model_and_tokenizer("output/best")
    save_pretrained(model, "my-model", tokenizer)  # AutoModelForCausalLM.from_pretrained("my-model") reads it

A folder holds config.json, model.safetensors (or shards of it), generation_config.json and the tokenizer's
files (characters, byte-level BPE or WordPiece). Weights are read only from safetensors, because a pickle can
run code. Nothing is downloaded. The state of a training run is read and written by `minigpt.training`, the
manifest by `minigpt.storage.files`.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from minigpt.errors import InputError, Message
from minigpt.families.checks import MAX_LAYERS
from minigpt.families.registry import (
    LanguageModel,
    ModelConfig,
    family_of,
    family_of_json,
    is_classifier,
)
from minigpt.families.strict_loading import cast
from minigpt.finetuning.adapters import advice, is_adapter, load_adapter
from minigpt.finetuning.layers import adapter_names, is_mergeable, merge_and_unload, set_adapter
from minigpt.storage.files import MANIFEST, ManifestCheck, atomic_write, verify_manifest
from minigpt.storage.json_files import json_text, read_json
from minigpt.storage.read_ahead import WEIGHTS, ReadAhead, folder_of_weights
from minigpt.storage.regular_files import is_there
from minigpt.storage.safetensors_files import WeightFiles, parse_size, write_weights
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenization.subword import SubwordTokenizer
from minigpt.tokenization.wordpiece import WordPieceTokenizer
from minigpt.tokenization.wordpiece_files import VOCABULARY
from minigpt.tokenizer import Tokenizer
from minigpt.weights.quantized_folders import config_of, is_quantized, read_quantized

__all__ = [
    "AnyTokenizer",
    "body_config",
    "load_model",
    "load_model_and_tokenizer",
    "load_tokenizer",
    "load_weights",
    "model_folder",
    "read_config",
    "save_pretrained",
    "save_tokenizer",
    "write_json",
]

AnyTokenizer: TypeAlias = Tokenizer | SubwordTokenizer
Adapters: TypeAlias = str | Path | Sequence[str | Path] | Mapping[str, str | Path]

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"

_STORED = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | Literal["stored"] | None = None,
    adapter: Adapters | None = None,
) -> LanguageModel:
    """Load the model of a folder, in eval mode.

    While the model is loaded, at most two tensors of the file are in memory besides the model.

    Args:
        path: a folder with config.json and model.safetensors or its shards; or the folder of a run, of which
            `best` is loaded, or `last` if there is no `best`.
        device: device of the model.
        dtype: dtype of the parameters. None: float32, whatever the file has (most CPUs are slower in
            bfloat16). "stored": float16 or bfloat16 if all weights have this dtype in the file, else float32.
        adapter: one adapter or several. One adapter: its folder. It is merged into the weights, unless the
            weights are int8 or int4, or it is a bottleneck adapter. Several adapters: a dict name -> folder,
            or a list of folders, whose names become the adapters' names. They are not merged, and only the
            first one is active. See minigpt.finetuning.layers.

    Raises:
        InputError: if a file is missing or wrong; the message names it.
    """
    folder = model_folder(path)
    with ManifestCheck(folder):
        model = _model_reader(folder, device, dtype)()
    return _adapted(model, adapter)


def load_tokenizer(path: str | Path) -> AnyTokenizer:
    """Load the tokenizer of a folder, or the character tokenizer of a vocab.json file.

    tokenizer.json decides the kind of tokenizer. Without it, vocab.json and merges.txt are byte-level BPE, as
    in the folders of GPT-2 and Qwen, and vocab.txt is WordPiece, as in BERT's folder.

    Raises:
        InputError: if a file is missing or wrong; the message names it.
    """
    path = Path(path)
    if path.is_file():
        return Tokenizer(path)
    # an adapter's folder can hold its own tokenizer, because training may have added tokens
    folder = path if is_adapter(path) else model_folder(path)
    if is_there(folder / MANIFEST):
        verify_manifest(folder, weights=False)
    return _read_tokenizer(folder)


def load_model_and_tokenizer(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | Literal["stored"] | None = None,
    ahead: ReadAhead | None = None,
    adapter: Adapters | None = None,
) -> tuple[LanguageModel, AnyTokenizer]:
    """Load model and tokenizer of a folder, and check that they belong together.

    Args:
        path: as in `load_model`.
        device: as in `load_model`.
        dtype: as in `load_model`.
        ahead: a ReadAhead that is already reading the weights of the same folder. If their dtype does not
            change, the model uses this object's memory. Otherwise file and model are in memory together for
            a short time.
        adapter: as in `load_model`.

    Raises:
        InputError: as `load_model`; also if model and tokenizer have different vocabulary sizes. (With
            byte-level BPE, the model may have more rows: Qwen3 has 151,936 rows for 151,669 tokens.)
    """
    folder = model_folder(path)
    with ahead.check if ahead and ahead.check and ahead.check.folder == folder else ManifestCheck(folder):
        read_model = _model_reader(folder, device, dtype, ahead)
        # A second thread makes the tokenizer in Python, while torch copies the weights in this thread. The
        # two can run at the same time, because torch releases the GIL while it copies.
        with ThreadPoolExecutor(1) as beside:
            later = beside.submit(_read_tokenizer, folder)
            model = read_model()  # called before `later.result()`: an error of the model is raised first
            tokenizer = later.result()
    _require_same_vocabulary(model, tokenizer, f"{folder}: ")
    return _adapted(model, adapter), tokenizer


def _adapted(model: LanguageModel, adapter: Adapters | None) -> LanguageModel:
    if isinstance(adapter, str | Path):
        load_adapter(model, Path(adapter))
        return merge_and_unload(model) if is_mergeable(model) else model
    if isinstance(adapter, Mapping):
        several = list(adapter.items())
    else:
        several = [(Path(one).name, one) for one in adapter or ()]
    for name, folder in several:
        load_adapter(model, Path(folder), name)
    if several:
        set_adapter(model, several[0][0])
    return model


def load_weights(model: LanguageModel, path: str | Path) -> None:
    """Copy the weights of a folder into an existing model, for example to resume training.

    The parameters stay the same objects, with their device and dtype. The dropout in the folder's config.json
    may differ from the model's.

    Raises:
        InputError: as `load_model`; also if the folder holds a different model.
    """
    folder = model_folder(path)
    with ManifestCheck(folder):
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
    """Write a folder that transformers and `load_model` can read. Equal weights give equal bytes.

    Each file is replaced atomically. A folder with a manifest is a finished checkpoint: it is an error to
    write into it.

    Args:
        model: the model, not quantised.
        directory: the folder.
        tokenizer: if given, it is saved in the same folder.
        max_shard_size: a number of bytes, or text such as "500MB". Larger weights are split into several
            files with an index.
        dtype: dtype in the file: torch.float32, float16 or bfloat16. Default: the model's dtype, or float32
            if the model is float64 or has several dtypes.

    Raises:
        InputError: if model and tokenizer have different vocabulary sizes, a weight is not finite, or a file
            cannot be written.
    """
    folder = Path(directory)
    if adapter_names(model):
        raise InputError("the model has adapters beside its weights: merge_and_unload them, or save_adapter")
    if not isinstance(model.lm_head, nn.Linear):
        raise InputError("a quantised model cannot be saved here: `minigpt quantize` writes such folders")
    if is_there(folder / MANIFEST):
        raise InputError(f"{folder} is a finished checkpoint with a {MANIFEST}: choose another directory")
    parse_size(max_shard_size)  # raise its error now, before a file is written
    if tokenizer is not None:
        _require_same_vocabulary(model, tokenizer)
    stored = _stored_dtype(model, dtype)
    weights = _converted(family_of(model.config).to_hugging_face(model), stored)
    special_ids = {name: getattr(tokenizer, name, None) for name in ("eos_token_id", "pad_token_id")}
    for name, index in special_ids.items():
        # the tokenizer has this special token, but the model's embedding has no row for its id: leave it out
        if index is not None and index >= model.config.vocab_size:
            special_ids[name] = None
    config = family_of(model.config).config_to_hugging_face(model.config, **special_ids)
    write_json(folder / CONFIG, {**config, "dtype": _STORED[stored]})
    write_json(folder / GENERATION, {name: index for name, index in special_ids.items() if index is not None})
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder, model.config.max_position_embeddings)
    write_weights(folder, weights, max_shard_size)


def save_tokenizer(tokenizer: AnyTokenizer, folder: Path, max_length: int) -> None:
    """Write a tokenizer's files in a form that transformers reads.

    Args:
        max_length: largest number of tokens that the model can read.

    Raises:
        InputError: if an entry of a character vocabulary is longer than one character, or a file cannot be
            written.
    """
    if isinstance(tokenizer, SubwordTokenizer):
        tokenizer.save(folder)
        return
    try:
        write_json(folder / TOKENIZER, _tokenizer_json(tokenizer))
    except UnicodeEncodeError as error:
        raise InputError(f"an entry of the vocabulary is not a Unicode character: {error.reason}") from None
    write_json(folder / TOKENIZER_CONFIG, _tokenizer_config(tokenizer, max_length))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file with the same formatting as Hugging Face's libraries."""
    atomic_write(path, (json_text(content, indent=2) + "\n").encode())


def _stored_dtype(model: LanguageModel, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None and dtype not in _STORED:
        raise InputError(f"dtype must be one of {', '.join(_STORED.values())}: got {dtype}")
    present = {parameter.dtype for parameter in model.parameters()}
    own = present.pop() if len(present) == 1 else torch.float32
    return dtype or (own if own in _STORED else torch.float32)


def _converted(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Convert the weights in the dict to another dtype. Old tensors are freed one by one, to save memory."""
    if dtype != torch.float32:
        for name in weights:
            weights[name] = cast(name, weights[name], dtype)
    return weights


def _require_same_vocabulary(model: LanguageModel, tokenizer: AnyTokenizer, where: str = "") -> None:
    entries, rows = tokenizer.get_vocab_size(), model.config.vocab_size
    if isinstance(tokenizer, SubwordTokenizer):
        # Count without added tokens: an added token that occurs in no text, such as a padding token, may have
        # an id for which the model has no row.
        entries = 1 + max(tokenizer.definition.vocab.values(), default=-1)
    if entries > rows or (entries < rows and isinstance(tokenizer, Tokenizer)):
        raise InputError(
            f"{where}model and tokenizer do not belong together: "
            f"the model has vocab_size={rows}, the tokenizer {entries} entries"
        )


def model_folder(path: str | Path) -> Path:
    """Return `path` if it is a model's folder. If it is a run's folder, return its folder `best` or `last`.

    The folder's files are not compared with its manifest.

    Raises:
        InputError: if there is no model folder.
    """
    folder = Path(path)
    if not folder.exists():
        raise InputError(
            Message("{folder} does not exist: give a directory that `minigpt train` wrote", folder=folder)
        )
    if not folder.is_dir():
        raise InputError(f"{folder} is a file: give the directory with {CONFIG} and {WEIGHTS}")
    folder = folder_of_weights(folder)
    if is_adapter(folder):
        raise InputError(advice(folder))
    return folder


def read_config(path: str | Path) -> ModelConfig:
    """Read the configuration of a folder's model. For a classifier, this is the model without its head.

    Raises:
        InputError: if a file is missing or wrong; the message names it.
    """
    folder = model_folder(path)
    content = read_json(folder / CONFIG, missing=Message("{path} is not a model directory", path=folder))
    return config_of(folder / CONFIG, content)[0] if is_quantized(content) else body_config(folder, content)


def _read_config(folder: Path) -> ModelConfig:
    return _config_of(
        folder, read_json(folder / CONFIG, missing=Message("{path} is not a model directory", path=folder))
    )


def _config_of(folder: Path, content: Mapping[str, Any]) -> ModelConfig:
    if is_classifier(content):
        raise InputError(
            f"{folder} is a classifier, which writes no text: minigpt classify --model {folder} --text TEXT"
        )
    return body_config(folder, content)


def body_config(folder: Path, content: Mapping[str, Any]) -> ModelConfig:
    """Convert the content of a config.json to a configuration. A classifier's head is ignored.

    Raises:
        InputError: if a value is wrong; the message names the file.
    """
    if is_classifier(content):
        content = {**content, "architectures": None}
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
    """Build the model's modules immediately, and return a function that reads their weights later.

    Building makes about a thousand short calls into torch, and each call releases the GIL. If a second thread
    ran Python code, each call would wait to get the GIL back. So call this function before you start such a
    thread.
    """
    content = read_json(folder / CONFIG, missing=Message("{path} is not a model folder", path=folder))
    if is_quantized(content):
        if dtype not in (None, "stored"):
            raise InputError(f"{folder} is quantised, its arithmetic is fixed: got dtype={dtype}")
        return lambda: read_quantized(folder, content).to(device)
    config = _config_of(folder, content)
    family = family_of(config)
    made: LanguageModel | None = None
    # If a configuration has too many layers, it is damaged. Then build nothing here (it could be a billion
    # modules): the returned function will raise the error.
    if config.num_hidden_layers <= MAX_LAYERS:
        with contextlib.suppress(InputError):  # the returned function raises it again, with the file's name
            made = family.on_meta(config)
            family.parameter_shapes(config)

    def read() -> LanguageModel:
        weights = _read_weights(folder, config, dtype or torch.float32, ahead)
        model: LanguageModel = family.on_meta(config) if made is None else made
        family.load_state(model, weights, assign=True)
        return model.to(device).eval()

    return read


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the character vocabulary as a tokenizer.json, for the `tokenizers` library."""
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
        # [\s\S] matches every character; a dot would not match a newline
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": r"[\s\S]"},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [end, first, end] if tokenizer.sep_before_text else [first, end],
            "pair": [first, end, second, end],
            "special_tokens": {sep: {"id": sep, "ids": [tokenizer.sep_token_id], "tokens": [sep]}},
        },
        "decoder": {"type": "Fuse"},  # joins the tokens without spaces
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
        "split_special_tokens": True,  # tells transformers to read "<sep>" in a text as five characters
        "clean_up_tokenization_spaces": False,
    }


def _read_tokenizer(folder: Path) -> AnyTokenizer:
    path = folder / TOKENIZER
    if not path.exists():
        if (folder / VOCABULARY).exists():
            return WordPieceTokenizer.from_folder(folder)
        if (folder / "merges.txt").exists():
            return BpeTokenizer.from_folder(folder)
    whole = read_json(path, missing=Message("{path} has no tokenizer", path=folder))
    content = whole.get("model")
    kind = content.get("type", "BPE") if isinstance(content, dict) else None
    if kind == "BPE":
        return BpeTokenizer.from_folder(folder, whole=whole)
    if kind == "WordPiece":
        return WordPieceTokenizer.from_folder(folder, whole)
    vocabulary = content.get("vocab") if isinstance(content, dict) else None
    if kind != "WordLevel" or not isinstance(vocabulary, dict):
        raise InputError(
            f"{path}: its model is {kind!r}; supported are byte-level 'BPE', 'WordPiece', and 'WordLevel' of "
            "single characters"
        )
    try:
        tokenizer = Tokenizer.from_word2id(vocabulary)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    tokenizer.sep_before_text = True
    ours = _tokenizer_json(tokenizer)
    tokenizer.sep_before_text = whole.get("post_processor") == ours["post_processor"]
    for key in ("normalizer", "pre_tokenizer"):
        if whole.get(key) != ours[key]:
            raise InputError(
                f"{path}: its {key} is not that of a character vocabulary, in which each character is a token"
            )
    return tokenizer
