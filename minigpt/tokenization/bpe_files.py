"""Reads the files of a byte-level BPE tokenizer, in three layouts.

    tokenizer.json                 one file for everything (the `tokenizers` library)
    vocab.json and merges.txt      GPT-2, Qwen2 and Qwen3 as they are published
    encoder.json and vocab.bpe     GPT-2 as OpenAI released it

The last two layouts do not say how text is split into words before merging, and GPT-2 and Qwen do this
differently. tokenizer_config.json or config.json in the folder decides; the folder's name does not.
"""

import copy
from pathlib import Path
from typing import Any

from minigpt.errors import InputError, shown
from minigpt.storage.json_files import read_json, read_utf8
from minigpt.tokenization.definition import (
    CONFIG,
    TOKENIZER,
    Definition,
    assembled,
    class_of,
    read_config,
    require_same_steps,
    text_of,
)

__all__ = ["GPT2_WORDS", "KINDS", "QWEN_WORDS", "byte_level_of", "frame_of", "read_folder", "split_by"]

LAYOUTS = {("vocab.json", "merges.txt"): None, ("encoder.json", "vocab.bpe"): "gpt2"}

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Qwen's rule for splitting a text into words, from tokenizer.json of https://huggingface.co/Qwen/Qwen3-0.6B.
# Differences from GPT-2's rule: each digit is a word; contractions may be in capitals; a word ends after
# newlines; a word of letters may begin with any one symbol, not only with a space.
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def split_by(*expressions: str) -> dict[str, Any]:
    """Return a pre_tokenizer that splits text by each expression in turn, and then into bytes."""
    steps = [
        {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
        for expression in expressions
    ]
    return {"type": "Sequence", "pretokenizers": [*steps, {**_BYTE_LEVEL, "use_regex": False}]}


KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"normalizer": None, "pre_tokenizer": _BYTE_LEVEL},  # ByteLevel splits text by GPT-2's rule
    "qwen2": {"normalizer": {"type": "NFC"}, "pre_tokenizer": split_by(QWEN_WORDS)},
}
"""The preparation of text before merging: "gpt2" for GPT-2, "qwen2" for Qwen2, Qwen2.5 and Qwen3."""

_KIND_OF_CLASS = {"GPT2Tokenizer": "gpt2", "Qwen2Tokenizer": "qwen2"}
_CLASS_OF_KIND = {kind: name for name, kind in _KIND_OF_CLASS.items()}
_QWEN_MARKERS = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}


def read_folder(folder: Path, kind: str | None = None, whole: dict[str, Any] | None = None) -> Definition:
    """Read and check the tokenizer of a folder.

    Args:
        folder: the folder.
        kind: rule for splitting text into words, "gpt2" or "qwen2". None: the files define it. A
            tokenizer.json has priority over `kind`.
        whole: the parsed tokenizer.json, if the caller has parsed it already.

    Raises:
        InputError: if a file is missing or wrong; the message names the file and what to do.
    """
    if kind is not None and kind not in KINDS:
        raise InputError(f"kind must be one of {', '.join(KINDS)}: got {kind!r:.80}")
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give the one that holds {TOKENIZER} or vocab.json")
    config = read_config(folder)
    name = class_of(folder, config)
    name = name if name in _KIND_OF_CLASS else None
    path = folder / TOKENIZER
    if path.exists():
        frame, vocab, merges = _read_whole(path, whole)
        if name is None:
            _require_byte_level(path, frame)
        else:
            built = frame_of(_KIND_OF_CLASS[name], config)
            require_same_steps(path, frame, built, name)
            frame = built | {key: frame.get(key) for key in ("added_tokens", "post_processor")}
        return assembled(path, frame, vocab, merges, config, name)
    for (vocab_name, merges_name), layout_kind in LAYOUTS.items():
        if (folder / vocab_name).exists() or (folder / merges_name).exists():
            vocab = _object(folder / vocab_name)
            merges = _read_merges(folder / merges_name)
            kind = kind or layout_kind or _kind(folder, config, name)
            name = _CLASS_OF_KIND[kind]
            frame = frame_of(kind, config)
            bos, eos = (f"{role}_token" if config.get(f"add_{role}_token") else "" for role in ("bos", "eos"))
            return assembled(folder / vocab_name, frame, vocab, merges, config, name, (bos, eos))
    raise InputError(
        f"{folder} holds no byte-level tokenizer: neither {TOKENIZER}, nor "
        + ", nor ".join(f"{first} with {second}" for first, second in LAYOUTS)
    )


def frame_of(kind: str, config: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the content of a tokenizer.json without vocabulary and merges.

    Args:
        kind: a key of KINDS: "gpt2" or "qwen2".
        config: the content of tokenizer_config.json, from which add_prefix_space is copied.
    """
    empty: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": []}
    steps = {**KINDS[kind], "post_processor": None, "decoder": {**_BYTE_LEVEL, "add_prefix_space": True}}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "ignore_merges": False}
    if (config or {}).get("add_prefix_space"):
        steps["pre_tokenizer"] = copy.deepcopy(steps["pre_tokenizer"])
        byte_level_of(steps["pre_tokenizer"])["add_prefix_space"] = True
    return {**empty, **steps, "model": model}


def byte_level_of(pre_tokenizer: Any) -> dict[str, Any]:
    """Return the ByteLevel step at the end of a pre_tokenizer, or {} if there is no such step."""
    last: dict[str, Any] = {}
    match pre_tokenizer:
        case {"type": "ByteLevel"}:
            last = pre_tokenizer
        case {"type": "Sequence", "pretokenizers": [*_, {"type": "ByteLevel"} as step]}:
            last = step
    return last


# -- reading the files -------------------------------------------------------------------------------------


def _object(path: Path) -> dict[str, Any]:
    return read_json(path, missing="copy it from where the other files come from")


def _kind(folder: Path, config: dict[str, Any], name: str | None) -> str:
    """Return the rule for splitting text into words, for a folder without tokenizer.json."""
    if name is not None:
        return _KIND_OF_CLASS[name]
    contents = {
        text_of(token, folder / CONFIG, "added_tokens_decoder")
        for token in config.get("added_tokens_decoder", {}).values()
    }
    if contents >= _QWEN_MARKERS:
        return "qwen2"
    raise InputError(
        f"{folder}: nothing says how text is cut into words (no known tokenizer_class in {CONFIG}, no "
        f"known model_type in config.json): say kind='gpt2' or kind='qwen2'"
    )


def _read_merges(path: Path) -> list[tuple[str, str]]:
    text = read_utf8(path, missing="a vocabulary without its merges cannot encode")
    lines = [line.rstrip("\r") for line in text.split("\n")]
    return _pairs([line for line in lines[lines[0].startswith("#version") :] if line], path)


def _pairs(merges: list[Any], path: Path) -> list[tuple[str, str]]:
    """Convert merges, written as "a b" or as ["a", "b"], to pairs."""
    pairs = []
    for number, merge in enumerate(merges, 1):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise InputError(f"{path}: merge {number} is {shown(merge)}, not two tokens")
        pairs.append((parts[0], parts[1]))
    return pairs


def _read_whole(
    path: Path, frame: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any], list[tuple[str, str]]]:
    """Read a tokenizer.json. Return (content without vocabulary and merges, vocabulary, merges)."""
    frame = _object(path) if frame is None else frame
    model: Any = frame.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise InputError(f"{path} has no `model` with a `vocab`")
    kind = model.get("type", "BPE")  # "BPE" by default, because GPT-2's published file lacks this key
    if kind != "BPE":
        raise InputError(f"{path}: its model is {kind!r}, not 'BPE': this is not a byte-level tokenizer")
    if not isinstance(model.get("merges"), list):
        raise InputError(f"{path} has no `merges`: a vocabulary without them cannot encode")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if value := model.get(key):
            raise InputError(f"{path}: {key} is {value!r}; GPT-2's and Qwen's kind of tokenizer has none")
    rest = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
    return {**frame, "model": {"type": "BPE", **rest}}, model["vocab"], _pairs(model["merges"], path)


def _require_byte_level(path: Path, frame: dict[str, Any]) -> None:
    if dropout := frame["model"].get("dropout"):
        raise InputError(f"{path}: dropout is {dropout!r}: the ids of a text would depend on chance")
    if not byte_level_of(frame.get("pre_tokenizer")):
        raise InputError(f"{path}: its pre_tokenizer does not end in ByteLevel: it is not byte-level")
    match frame.get("decoder"):
        case {"type": "ByteLevel"} | {"type": "Sequence", "decoders": [{"type": "ByteLevel"}]}:
            pass
        case None:
            raise InputError(
                f"{path}: it has no decoder, so transformers prints its tokens as they are spelled, such as "
                'Ġcat, and not the text: put `"decoder": {"type": "ByteLevel", "add_prefix_space": '
                'true, "trim_offsets": true, "use_regex": true}` into it'
            )
        case other:
            raise InputError(f"{path}: its decoder changes the text after ByteLevel: got {other!r:.80}")
