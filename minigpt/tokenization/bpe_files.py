"""The files of a byte-level BPE tokenizer. Three layouts are read; one is written.

    tokenizer.json                 one file for everything (the `tokenizers` library)
    vocab.json and merges.txt      GPT-2, Qwen2 and Qwen3 as they are published
    encoder.json and vocab.bpe     GPT-2 as OpenAI released it

The last two layouts do not say how text is split into words before merging, and GPT-2 and Qwen do this
differently. tokenizer_config.json or config.json in the folder decides; the folder's name does not.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minigpt.errors import InputError
from minigpt.storage.files import atomic_write
from minigpt.storage.json_files import read_json

__all__ = ["BYTE_SYMBOLS", "KINDS", "NAMED", "Definition", "checked", "read_folder", "write_folder"]

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
LAYOUTS = {("vocab.json", "merges.txt"): None, ("encoder.json", "vocab.bpe"): "gpt2"}
NAMED = ("eos_token", "pad_token", "sep_token", "bos_token", "unk_token", "cls_token", "mask_token")


def _byte_symbols() -> tuple[str, ...]:
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


BYTE_SYMBOLS = _byte_symbols()
"""BYTE_SYMBOLS[byte]: the printable character for a byte in the files. `BYTE_SYMBOLS[32] == "Ġ"`."""

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# https://huggingface.co/Qwen/Qwen3-0.6B, tokenizer.json. Differences from GPT-2's: each digit is a word; also
# contractions in capitals; line ends are words of their own; one symbol before a word belongs to it.
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
    "gpt2": {"normalizer": None, "pre_tokenizer": _BYTE_LEVEL},  # ByteLevel itself splits text by GPT2_WORDS
    "qwen2": {"normalizer": {"type": "NFC"}, "pre_tokenizer": split_by(QWEN_WORDS)},
}
"""The preparation of text before merging: "gpt2" for GPT-2, "qwen2" for Qwen2, Qwen2.5 and Qwen3."""

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


@dataclass(frozen=True)
class Definition:
    """Everything that decides a tokenizer's ids, and everything else that its files must keep."""

    vocab: dict[str, int]
    """token, written in byte symbols -> id; GPT-2's vocabulary includes its special token"""
    merges: list[tuple[str, str]]
    """pairs of tokens that are merged into one; earlier pairs are merged first"""
    special: dict[str, int]
    """text of a special token -> id, ordered by id"""
    words: dict[str, int]
    """added token that is an ordinary word of the text -> id"""
    frame: dict[str, Any]
    """tokenizer.json without the vocabulary, the merges and the ids of special tokens"""
    config: dict[str, Any]
    """tokenizer_config.json: the token that ends a text, the chat template, ..."""

    @property
    def tokens(self) -> dict[str, int]:
        """All tokens, as the files write them -> id."""
        return self.vocab | self.words | self.special


def read_folder(folder: Path, kind: str | None = None, whole: dict[str, Any] | None = None) -> Definition:
    """Read and check the tokenizer of a folder.

    Args:
        folder: the folder.
        kind: "gpt2" or "qwen2", for files that do not say it; tokenizer.json always does.
        whole: the parsed tokenizer.json, if the caller has it.

    Raises:
        InputError: if a file is missing or wrong; the message names the file and what to do.
    """
    if kind is not None and kind not in KINDS:
        raise InputError(f"kind must be one of {', '.join(KINDS)}: got {kind!r}")
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give the one that holds {TOKENIZER} or vocab.json")
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
            if kind == "gpt2" and "<|endoftext|>" in vocab:  # GPT-2's files do not name its special token
                config.setdefault("eos_token", "<|endoftext|>")
            return _assembled(folder / vocab_name, frame_of(kind), vocab, merges, config)
    raise InputError(
        f"{folder} holds no byte-level tokenizer: neither {TOKENIZER}, nor "
        + ", nor ".join(f"{first} with {second}" for first, second in LAYOUTS)
    )


def frame_of(kind: str) -> dict[str, Any]:
    """Return a tokenizer.json without vocabulary, for one of KINDS."""
    empty: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": []}
    steps = {**KINDS[kind], "post_processor": None, "decoder": {**_BYTE_LEVEL, "add_prefix_space": True}}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "ignore_merges": False}
    return {**empty, **steps, "model": model}


def write_folder(definition: Definition, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json atomically. Equal tokenizers give equal bytes."""
    model = {
        **definition.frame["model"],
        "vocab": definition.vocab,
        "merges": [list(pair) for pair in definition.merges],
    }
    for name, content in ((TOKENIZER, {**definition.frame, "model": model}), (CONFIG, definition.config)):
        atomic_write(folder / name, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


# -- reading -----------------------------------------------------------------------------------------------


def _object(path: Path) -> dict[str, Any]:
    return read_json(path, missing="copy it from where the other files come from")


def _optional(path: Path) -> dict[str, Any]:
    return _object(path) if path.exists() else {}


def _config(folder: Path) -> dict[str, Any]:
    """Read tokenizer_config.json, and add what older releases store in separate files."""
    config = _optional(folder / CONFIG)
    for key, value in _optional(folder / "special_tokens_map.json").items():
        config.setdefault(key, value)
    template = folder / "chat_template.jinja"
    if template.exists():  # newer models have this file; as in transformers, it has priority
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


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except FileNotFoundError:
        raise InputError(f"{path} is missing: a vocabulary without its merges cannot encode") from None
    except ValueError as error:
        raise InputError(f"{path} is not text in UTF-8 ({error}): copy it again") from None
    lines = [line.rstrip("\r") for line in lines]
    return _pairs([line for line in lines[lines[0].startswith("#version") :] if line], path)


def _pairs(merges: list[Any], path: Path) -> list[tuple[str, str]]:
    """Convert merges, written as "a b" or as ["a", "b"], to pairs."""
    pairs = []
    for number, merge in enumerate(merges, 1):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise InputError(f"{path}: merge {number} is {merge!r}, not two tokens")
        pairs.append((parts[0], parts[1]))
    return pairs


def _read_whole(
    path: Path, frame: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any], list[tuple[str, str]]]:
    """Read a tokenizer.json. Returns the frame (see Definition), the vocabulary and the merges."""
    frame = _object(path) if frame is None else frame
    model: Any = frame.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise InputError(f"{path} has no `model` with a `vocab`")
    kind = model.get("type", "BPE")  # "BPE" by default, because GPT-2's published file lacks this key
    if kind != "BPE":
        raise InputError(f"{path}: its model is {kind!r}, not 'BPE': this is not a byte-level tokenizer")
    if not isinstance(model.get("merges"), list):
        raise InputError(f"{path} has no `merges`: a vocabulary without them cannot encode")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if value := model.get(key):
            raise InputError(f"{path}: {key} is {value!r}; GPT-2's and Qwen's kind of tokenizer has none")
    last: Any
    match frame.get("pre_tokenizer"):
        case {"type": "ByteLevel"} as last:
            pass
        case {"type": "Sequence", "pretokenizers": [*_, {"type": "ByteLevel"} as last]}:
            pass
        case _:
            raise InputError(f"{path}: its pre_tokenizer does not end in ByteLevel: it is not byte-level")
    if last.get("add_prefix_space", True):
        raise InputError(f"{path}: add_prefix_space is true: decoding would not give back what was encoded")
    rest = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
    return {**frame, "model": {"type": "BPE", **rest}}, model["vocab"], _pairs(model["merges"], path)


# -- the definition ----------------------------------------------------------------------------------------


def _text(token: object, path: Path, key: str) -> str:
    """Return a token's text. Files store it as a string, or as an object with flags."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str) or not text:
        raise InputError(f"{path}: {key} must be a token's text: got {text!r}")
    return text


def _assembled(
    path: Path, frame: dict[str, Any], vocab: dict[str, Any],
    merges: list[tuple[str, str]], config: dict[str, Any],
) -> Definition:  # fmt: skip
    """Build the definition from its parts. All added tokens, and all tokens with a role, are special."""
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
                    f"{path.parent / 'generation_config.json'}: {key}_id {index!r} is not the id of a token"
                )
            config[key] = names[index]
    for key, text in _roles(config, beside):
        if text not in tokens:
            if text not in vocab:
                raise InputError(f"{beside}: {key} {text!r} is not in the vocabulary of {path.name}")
            tokens[text] = {"id": vocab[text], "special": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ordered = [
        {"id": None, "content": text, **flags, **token}
        for text, token in sorted(tokens.items(), key=lambda item: str(item[1].get("id")).rjust(20))
    ]
    roles = {text for _, text in _roles(config, beside)}
    words = {token["content"]: token["id"] for token in ordered if _is_word(token, roles)}
    special = {token["content"]: token["id"] for token in ordered if token["content"] not in words}
    plain = {token: index for token, index in vocab.items() if token not in words}
    frame = {**frame, "added_tokens": ordered}
    return checked(Definition(plain, merges, special, words, frame, config), str(path))


def _is_word(token: dict[str, Any], roles: set[str]) -> bool:
    """Return True if an added token is an ordinary word. Markup such as Qwen's `<think>` is not one."""
    text = token["content"]
    is_markup = re.fullmatch(r"[<\[|].*[>\]|]", text, re.DOTALL)
    return token["special"] is False and text not in roles and not is_markup


def checked(definition: Definition, source: str) -> Definition:
    """Check a definition, and order its vocabulary by id.

    The `tokenizers` library checks only the merges. With other errors it would silently drop text.

    Raises:
        InputError: if an id is not a number, given twice or missing; if an entry is not written in byte
            symbols; if a special token is blank, or equals a byte that a text may contain.
    """
    vocab, special = definition.vocab, definition.special
    tokens = definition.tokens
    for text, index in tokens.items():
        if type(index) is not int or index < 0:
            raise InputError(f"{source}: the id of {text!r} is {index!r}, not a whole number of at least 0")
    for text, index in special.items():
        if vocab.get(text, index) != index:
            raise InputError(f"{source}: {text!r} has the ids {vocab[text]} and {index}")
        if not text.strip():
            raise InputError(f"{source}: the added token {text!r} is plain text")
        if text in BYTE_SYMBOLS:
            raise InputError(f"{source}: the special token {text!r} is a byte, which any text may hold")
    ordered = sorted(tokens, key=tokens.__getitem__)
    for number, text in enumerate(ordered):
        if tokens[text] < number:
            twice = f"{ordered[number - 1]!r} and {text!r}"
            raise InputError(f"{source}: id {tokens[text]} is given twice, to {twice}")
        if tokens[text] > number:
            raise InputError(f"{source}: id {number} is missing among {len(tokens)} entries")
    plain = vocab.keys() - special.keys()
    if "" in plain or not set("".join(plain)) <= set(BYTE_SYMBOLS):
        wrong = min(text for text in plain if not text or not set(text) <= set(BYTE_SYMBOLS))
        raise InputError(f"{source}: entry {wrong!r} is not written in the symbols that stand for bytes")
    return replace(definition, vocab={text: vocab[text] for text in ordered if text in vocab})


def _roles(config: dict[str, Any], path: Path) -> Iterable[tuple[str, str]]:
    """Yield (role, text) of each token that the configuration gives a role."""
    for key in NAMED:
        if config.get(key) is not None:
            yield key, _text(config[key], path, key)
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(key) or []
        if not isinstance(more, list | dict):
            raise InputError(f"{path}: {key} must be a list of tokens: got {more!r}")
        for token in more.values() if isinstance(more, dict) else more:
            yield key, _text(token, path, key)
