"""The files of a byte-level BPE tokenizer: read in three layouts, checked, written in one.

    tokenizer.json                 one file for everything (the `tokenizers` library)
    vocab.json and merges.txt      GPT-2, Qwen2 and Qwen3 as they are published
    encoder.json and vocab.bpe     GPT-2 as OpenAI released it

The last two do not say how text is cut into words before merging: GPT-2 and Qwen do it differently. That is
read from tokenizer_config.json or config.json beside them, never guessed from a path. A file is checked as a
whole before it is used: the library itself would drop text without a word, or panic, on some damaged ones.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minigpt.errors import InputError
from minigpt.storage.files import atomic_write
from minigpt.tokenization.bpe_definition import NAMED, Definition, checked

__all__ = ["KINDS", "read_folder", "write_folder"]

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
LAYOUTS = {("vocab.json", "merges.txt"): None, ("encoder.json", "vocab.bpe"): "gpt2"}


_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# https://huggingface.co/Qwen/Qwen3-0.6B, tokenizer.json: as GPT-2's, but numbers digit by digit, contractions
# in capitals too, line ends apart, and one symbol in front of a word joins it
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"normalizer": None, "pre_tokenizer": _BYTE_LEVEL},
    "qwen2": {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _QWEN_WORDS}, "behavior": "Isolated", "invert": False},
                {**_BYTE_LEVEL, "use_regex": False},
            ],
        },
    },
}
"""How text is prepared before merging: by GPT-2, and by Qwen2, Qwen2.5 and Qwen3."""

_CLASSES = {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer"}
_KIND_OF_CLASS = {name + end: kind for kind, name in _CLASSES.items() for end in ("", "Fast")}
_KIND_OF_MODEL = {
    "gpt2": "gpt2",
    "qwen2": "qwen2",
    "qwen3": "qwen2",
    "qwen2_moe": "qwen2",
    "qwen3_moe": "qwen2",
}
_QWEN_MARKERS = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}


def read_folder(folder: Path, kind: str | None = None, whole: dict[str, Any] | None = None) -> Definition:
    """The tokenizer of a folder, checked.

    Args:
        kind: "gpt2" or "qwen2", for files that do not say; tokenizer.json always does.
        whole: what tokenizer.json holds, where the caller has parsed it.

    Raises:
        InputError: naming the file, what is wrong with it, and what to do.
    """
    if kind is not None and kind not in KINDS:
        raise InputError(f"kind must be one of {', '.join(KINDS)}: got {kind!r}")
    if not folder.is_dir():
        raise InputError(f"{folder} is no directory: give the one that holds {TOKENIZER} or vocab.json")
    config = _config(folder)
    if (folder / TOKENIZER).exists():
        frame, vocab, merges = _read_whole(folder / TOKENIZER, whole)
        return _assembled(folder / TOKENIZER, frame, vocab, merges, config)
    for (vocab_name, merges_name), layout_kind in LAYOUTS.items():
        if (folder / vocab_name).exists() or (folder / merges_name).exists():
            vocab = _object(folder / vocab_name)
            merges = _read_merges(folder / merges_name)
            kind = kind or layout_kind or _kind(folder, config)
            config.setdefault("tokenizer_class", _CLASSES[kind])
            if kind == "gpt2" and "<|endoftext|>" in vocab:  # its one special token has no other file
                config.setdefault("eos_token", "<|endoftext|>")
            return _assembled(folder / vocab_name, frame_of(kind), vocab, merges, config)
    raise InputError(
        f"{folder} holds no byte-level tokenizer: neither {TOKENIZER}, nor "
        + ", nor ".join(f"{first} with {second}" for first, second in LAYOUTS)
    )


def frame_of(kind: str) -> dict[str, Any]:
    """tokenizer.json without vocabulary, for one of KINDS."""
    empty: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": []}
    steps = {**KINDS[kind], "post_processor": None, "decoder": {**_BYTE_LEVEL, "add_prefix_space": True}}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "ignore_merges": False}
    return {**empty, **steps, "model": model}


def write_folder(definition: Definition, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, each as a whole; the same tokenizer, the same bytes."""
    model = {
        **definition.frame["model"],
        "vocab": definition.vocab,
        "merges": [list(pair) for pair in definition.merges],
    }
    for name, content in ((TOKENIZER, {**definition.frame, "model": model}), (CONFIG, definition.config)):
        atomic_write(folder / name, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


# -- reading -----------------------------------------------------------------------------------------------


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: copy it from where the other files come from") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a directory, not a file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON in UTF-8 ({error}): copy it anew") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object: got {type(content).__name__}")
    return content


def _optional(path: Path) -> dict[str, Any]:
    return _object(path) if path.exists() else {}


def _config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with what older releases keep in files of their own."""
    config = _optional(folder / CONFIG)
    for key, value in _optional(folder / "special_tokens_map.json").items():
        config.setdefault(key, value)
    template = folder / "chat_template.jinja"
    if template.exists():  # newer releases; it wins over the one in the configuration, as in transformers
        try:
            config["chat_template"] = template.read_text(encoding="utf-8")
        except ValueError as error:
            raise InputError(f"{template} is not text in UTF-8: {error}") from None
    added = config.get("added_tokens_decoder", {})
    if not isinstance(added, dict):
        raise InputError(f"{folder / CONFIG}: `added_tokens_decoder` is not an object")
    known = {_text(token, folder / CONFIG, "added_tokens_decoder") for token in added.values()}
    for token, index in _optional(folder / "added_tokens.json").items():
        if token not in known:
            added[str(index)] = {"content": token, "special": True}
    if added:
        config["added_tokens_decoder"] = added
    generation = _optional(folder / "generation_config.json")
    for key in ("eos_token", "pad_token"):
        index = generation.get(f"{key}_id")
        if config.get(key) is None and index is not None:
            config[f"{key}_id"] = index[0] if isinstance(index, list) and index else index
    return config


def _kind(folder: Path, config: dict[str, Any]) -> str:
    by_class = _KIND_OF_CLASS.get(str(config.get("tokenizer_class")))
    by_model = _KIND_OF_MODEL.get(str(_optional(folder / "config.json").get("model_type")))
    contents = {
        _text(token, folder / CONFIG, "added_tokens_decoder")
        for token in config.get("added_tokens_decoder", {}).values()
    }
    kind = by_class or by_model or ("qwen2" if contents >= _QWEN_MARKERS else None)
    if kind is None:
        raise InputError(
            f"{folder}: nothing says how text is cut into words (no known tokenizer_class in {CONFIG}, no "
            f"known model_type in config.json): say kind='gpt2' or kind='qwen2'"
        )
    return kind


def _read_merges(path: Path) -> list[Any]:
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except FileNotFoundError:
        raise InputError(f"{path} is missing: a vocabulary without its merges cannot encode") from None
    except ValueError as error:
        raise InputError(f"{path} is not text in UTF-8 ({error}): copy it anew") from None
    merges = []
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2:
            raise InputError(
                f"{path}, line {number}: a merge is two tokens with a space between: got {line!r}"
            )
        merges.append(pair)
    return merges


def _read_whole(path: Path, frame: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any], list[Any]]:
    frame = _object(path) if frame is None else frame
    model = frame.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise InputError(f"{path} has no `model` with a `vocab`")
    kind = model.get("type", "BPE")  # GPT-2's own file is older than this key
    if kind != "BPE":
        raise InputError(f"{path}: its model is {kind!r}, not 'BPE': this is no byte-level tokenizer")
    if not isinstance(model.get("merges"), list):
        raise InputError(f"{path} has no `merges`: a vocabulary without them cannot encode")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise InputError(
                f"{path}: {key} is {model[key]!r}; GPT-2's and Qwen's kind of tokenizer has none"
            )
    steps = frame.get("pre_tokenizer")
    last = (
        steps.get("pretokenizers") if isinstance(steps, dict) and steps.get("type") == "Sequence" else [steps]
    )
    if (
        not isinstance(last, list)
        or not last
        or not isinstance(last[-1], dict)
        or last[-1].get("type") != "ByteLevel"
    ):
        raise InputError(
            f"{path}: its pre_tokenizer does not end in ByteLevel: this is no byte-level tokenizer"
        )
    if last[-1].get("add_prefix_space", True):
        raise InputError(f"{path}: add_prefix_space is true: decoding would not give back what was encoded")
    rest = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return {**frame, "model": {"type": "BPE", **rest}}, model["vocab"], merges


# -- putting together --------------------------------------------------------------------------------------


def _text(token: object, path: Path, key: str) -> str:
    """A token's text: files give it as such, or in an object with its flags."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str) or not text:
        raise InputError(f"{path}: {key} must be a token's text: got {text!r}")
    return text


def _assembled(
    path: Path, frame: dict[str, Any], vocab: dict[str, Any], merges: list[Any], config: dict[str, Any]
) -> Definition:
    """The definition out of its parts. Special are all added tokens, and those that have a role."""
    beside = path.parent / CONFIG
    if config.get("add_prefix_space"):
        raise InputError(f"{beside}: add_prefix_space is true: decoding would not give back what was encoded")
    tokens: dict[str, dict[str, Any]] = {}
    added = frame.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise InputError(f"{path}: `added_tokens` is not a list of objects")
    for token in added:
        tokens[_text(token, path, "added_tokens")] = dict(token)
    for index, token in config.get("added_tokens_decoder", {}).items():
        text = _text(token, beside, "added_tokens_decoder")
        flags = token if isinstance(token, dict) else {}
        if not index.isdecimal() or tokens.get(text, {}).get("id", int(index)) != int(index):
            raise InputError(
                f"{beside}: {text!r} has id {index}, in {path.name} {tokens.get(text, {}).get('id')}"
            )
        tokens.setdefault(text, {"id": int(index), **flags})
    names = {index: text for text, index in vocab.items() if isinstance(index, int)}
    names |= {token["id"]: text for text, token in tokens.items() if isinstance(token.get("id"), int)}
    for key in ("eos_token", "pad_token"):
        if (index := config.pop(f"{key}_id", None)) is not None:
            if not isinstance(index, int) or index not in names:
                raise InputError(
                    f"{path.parent / 'generation_config.json'}: {key}_id {index!r} is no token's id"
                )
            config[key] = names[index]
    for key, text in _roles(config, beside):
        if text not in tokens:
            if text not in vocab:
                raise InputError(f"{beside}: {key} {text!r} is not in the vocabulary of {path.name}")
            tokens[text] = {"id": vocab[text], "special": True}
    ordered = sorted(tokens.items(), key=lambda item: str(item[1].get("id")).rjust(20))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    frame = {
        **frame,
        "added_tokens": [{"id": t.get("id"), "content": text, **flags, **t} for text, t in ordered],
    }
    special: dict[str, Any] = {text: token.get("id") for text, token in ordered}
    return checked(Definition(vocab, merges, special, frame, config), str(path))


def _roles(config: dict[str, Any], path: Path) -> Iterable[tuple[str, str]]:
    """Which tokens a configuration names for what."""
    for key in NAMED:
        if config.get(key) is not None:
            yield key, _text(config[key], path, key)
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(key) or []
        if not isinstance(more, list | dict):
            raise InputError(f"{path}: {key} must be a list of tokens: got {more!r}")
        for token in more.values() if isinstance(more, dict) else more:
            yield key, _text(token, path, key)
