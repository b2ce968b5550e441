"""Defines `Definition`: everything that decides a tokenizer's ids. Reads files that BPE and WordPiece share.

tokenizer_config.json says which tokens have a role (such as eos_token), which tokens are added, and which
tokens are put around each text. Older releases of transformers wrote some of this into other files. A text
gets the same ids as with transformers' AutoTokenizer, which uses the class that the files name. Three classes
(`CLASSES`) take only vocabulary, merges and post-processor from tokenizer.json. All other classes use the
whole file.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from minigpt.errors import InputError, shown, whole_number
from minigpt.storage.files import atomic_write
from minigpt.storage.json_files import json_text, read_json, read_utf8
from minigpt.storage.regular_files import is_there

__all__ = [
    "BYTE_SYMBOLS", "CLASSES", "CONFIG", "TOKENIZER", "Definition", "assembled", "checked",
    "class_of", "read_config", "require_same_steps", "text_of", "write_folder",
]  # fmt: skip

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# The key in tokenizer_config.json that lists the special tokens without a role: its name in transformers 5,
# and its name in transformers 4.
_EXTRA = ("extra_special_tokens", "additional_special_tokens")

_END = "<|endoftext|>"
# Class of transformers -> {role: token} for the roles that the tokenizer's files do not mention.
CLASSES: dict[str, dict[str, str]] = {
    "GPT2Tokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), _END),
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), _END),
    "BertTokenizer": {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")},
}
_CLASS_OF_MODEL = {"gpt2": "GPT2Tokenizer"} | dict.fromkeys(
    ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe"), "Qwen2Tokenizer"
)
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False}


def _byte_symbols() -> tuple[str, ...]:
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


BYTE_SYMBOLS = _byte_symbols()
"""BYTE_SYMBOLS[byte]: the printable character for a byte in byte-level files. `BYTE_SYMBOLS[32] == "Ġ"`."""


@dataclass(frozen=True)
class Definition:
    """Everything that decides a tokenizer's ids, and other settings that must be kept when it is saved."""

    vocab: dict[str, int]
    """token, spelled as in the files -> id; special tokens may be included, as in GPT-2's vocabulary"""
    merges: list[tuple[str, str]]
    """pairs of tokens that are merged into one; earlier pairs are merged first"""
    special: dict[str, int]
    """text of a special token -> id, ordered by id"""
    words: dict[str, int]
    """added token that is ordinary text -> id"""
    frame: dict[str, Any]
    """the content of tokenizer.json without the vocabulary and the merges"""
    config: dict[str, Any]
    """the content of tokenizer_config.json: the token that ends a text, the chat template, ..."""
    named: dict[str, str] = field(default_factory=dict)
    """role, such as "eos_token" -> text of the token with that role"""
    before: tuple[int, ...] = ()
    """ids that the tokenizer puts before each text, such as BOS"""
    after: tuple[int, ...] = ()
    """ids that the tokenizer puts after each text"""

    @property
    def tokens(self) -> dict[str, int]:
        """Return a dict of all tokens: token, spelled as in the files -> id."""
        return self.vocab | self.words | self.special


def write_folder(definition: Definition, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json atomically. The same tokenizer gives the same bytes."""
    model = {**definition.frame["model"], "vocab": definition.vocab}
    if definition.merges or model["type"] == "BPE":
        model["merges"] = [list(pair) for pair in definition.merges]
    for name, content in ((TOKENIZER, {**definition.frame, "model": model}), (CONFIG, definition.config)):
        atomic_write(folder / name, json_text(content, indent=2) + "\n")


# -- reading the files with roles, added tokens and the template -------------------------------------------


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if is_there(path) else {}


def read_config(folder: Path) -> dict[str, Any]:
    """Read tokenizer_config.json, and add settings that older releases of transformers store in other files.

    Raises:
        InputError: if a file is wrong; the message names the file and the key.
    """
    config = _optional(folder / CONFIG)
    template = folder / "chat_template.jinja"
    if is_there(template):  # newer models have the template in this file, which has priority
        text = read_utf8(template)
        config["chat_template"] = text.replace("\r\n", "\n").replace("\r", "\n")
    # transformers 4.34 and later write all added tokens under this key. If it is there, the two files that
    # older releases wrote are not read.
    if "added_tokens_decoder" in config:
        if not isinstance(config["added_tokens_decoder"], dict):
            raise InputError(f"{folder / CONFIG}: `added_tokens_decoder` is not an object")
        return config
    roles_of = _optional(folder / "special_tokens_map.json")
    config |= {key: value for key, value in roles_of.items() if key != "added_tokens_decoder"}
    added = _optional(folder / "added_tokens.json")
    if added:
        roles = {text_of(token, folder / CONFIG, key) for key, token in _roles(config, folder / CONFIG, {})}
        config["added_tokens_decoder"] = {
            str(index): {"content": token, "special": token in roles, "normalized": token not in roles}
            for token, index in added.items()
        }
    return config


def class_of(folder: Path, config: dict[str, Any]) -> str | None:
    """Return the class that builds the tokenizer, if CLASSES has it. None: tokenizer.json alone defines it.

    As in AutoTokenizer, this is the class that a file names, or else the class of the model's type.
    """
    model = _optional(folder / "config.json")
    name = config.get("tokenizer_class") or model.get("tokenizer_class")
    if name is None:
        return _CLASS_OF_MODEL.get(str(model.get("model_type")))
    name = str(name).removesuffix("Fast")
    return name if name in CLASSES else None


def require_same_steps(path: Path, frame: Mapping[str, Any], built: Mapping[str, Any], name: str) -> None:
    """Check that tokenizer.json prepares text in the same way as the tokenizer's class in transformers.

    (tokenizer_config.json or config.json names this class.) If tokenizer.json and the class differ,
    transformers 5 follows the class, and transformers 4 follows tokenizer.json. As no file says with which
    release the model was trained, a difference is an error.

    Args:
        path: tokenizer.json.
        frame: the content of tokenizer.json without its vocabulary.
        built: the same content, as the class builds it.
        name: the name of the class.

    Raises:
        InputError: if the two differ; the message names the file and the first key that differs.
    """
    for key in ("normalizer", "pre_tokenizer"):
        if _without_switches(frame.get(key)) != _without_switches(built[key]):
            raise InputError(
                f"{path}: its {key} is not {name}'s, the class that {CONFIG} or config.json names: "
                "transformers 5 follows the class, transformers 4 the file. For the file put "
                f'"tokenizer_class": "PreTrainedTokenizerFast" into {CONFIG}'
            )
    if frame["model"].get("ignore_merges"):
        raise InputError(
            f"{path}: ignore_merges is true, which {name}, the class that {CONFIG} or config.json names, "
            f'does not know: for the file put "tokenizer_class": "PreTrainedTokenizerFast" into {CONFIG}'
        )


def _without_switches(step: Any) -> Any:
    """Return a step of tokenizer.json without the settings in which the file and the class may differ.

    Such a difference does no harm: trim_offsets does not change ids, and all releases of transformers take
    the other settings from tokenizer_config.json.
    """
    switches = (
        *("trim_offsets", "add_prefix_space"),
        *("lowercase", "strip_accents", "handle_chinese_chars"),
    )
    match step:
        case {"type": "ByteLevel"}:
            step = {"use_regex": True, **step}
    match step:
        case dict():
            return {k: _without_switches(v) for k, v in step.items() if k not in switches}
        case list():
            return [_without_switches(value) for value in step]
    return step


# -- building a definition ---------------------------------------------------------------------------------


def text_of(token: object, path: Path, key: str) -> str:
    """Return a token's text. Files store it as a string, or as an object with flags."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str) or not text:
        raise InputError(f"{path}: {key} must be a token's text: got {shown(text)}")
    return text


def assembled(
    path: Path, frame: dict[str, Any], vocab: dict[str, Any],
    merges: list[tuple[str, str]], config: dict[str, Any], name: str | None,
    around: tuple[str, str] | None = None,
) -> Definition:  # fmt: skip
    """Build a definition from its parts, and check it.

    Every added token becomes a special token, except those for which `_is_word` returns True.

    Args:
        path: the file of the vocabulary.
        frame: tokenizer.json without vocabulary and merges.
        vocab: token -> id.
        merges: pairs of tokens.
        config: tokenizer_config.json, as `read_config` returns it.
        name: the class of transformers that builds the tokenizer, or None.
        around: keys of `config`, such as "cls_token" and "sep_token", for the tokens before and after each
            text. None: the frame's post_processor defines these tokens.

    Raises:
        InputError: if a file is wrong; the message names the file and what to do.
    """
    beside = path.parent / CONFIG
    roles = list(_roles(config, beside, CLASSES.get(name or "", {})))
    named = {key: text_of(token, beside, key) for key, token in roles if key not in _EXTRA}
    texts = {text_of(token, beside, key) for key, token in roles}
    tokens = _with_ids(_listed(path, frame, config, name), [token for _, token in roles], vocab, path)
    ordered = sorted(tokens.values(), key=lambda token: str(token["id"]).rjust(20))
    made = _made(merges, tokens)
    words = {token["content"]: token["id"] for token in ordered if _is_word(token, texts, made)}
    special = {token["content"]: token["id"] for token in ordered if token["content"] not in words}
    frame = {**frame, "added_tokens": ordered}
    # In `config`, a role's token may be an object with flags. Keep only its text: `frame` has the flags, too.
    config |= {key: named[key] for key in named if isinstance(config.get(key), dict)}
    # This key tells transformers how to read the files that minigpt writes.
    config.setdefault("tokenizer_class", name or "PreTrainedTokenizerFast")
    definition = checked(Definition(vocab, merges, special, words, frame, config, named), str(path))
    if around is not None:
        frame["post_processor"] = _template(around, definition)
    before, after = _around(frame.get("post_processor"), path)
    return replace(definition, before=tuple(before), after=tuple(after))


def _roles(
    config: dict[str, Any], path: Path, defaults: Mapping[str, str]
) -> Iterator[tuple[str, str | dict[str, Any]]]:
    """Yield (role, token) in the order in which transformers adds new tokens.

    Args:
        config: tokenizer_config.json.
        path: path of that file, for error messages.
        defaults: role -> token, for roles that `config` does not have. If `config` has null for a role, no
            token has this role.
    """
    more = {key: config[key] for key in config if key.endswith("_token") and key not in NAMED}
    more = {key: value for key, value in more.items() if isinstance(value, str | dict)}
    if isinstance(config.get(_EXTRA[0]), dict):
        more |= config[_EXTRA[0]]
    named = {key: config.get(key, defaults.get(key)) for key in NAMED} | more
    yield from ((key, value) for key, value in named.items() if value is not None)
    key = next((key for key in _EXTRA if config.get(key)), _EXTRA[0])
    unnamed = config.get(key) or []
    if not isinstance(unnamed, list | dict):
        raise InputError(f"{path}: {key} must be a list of tokens: got {unnamed!r:.80}")
    yield from ((key, token) for token in unnamed if isinstance(unnamed, list))


def _listed(
    path: Path, frame: dict[str, Any], config: dict[str, Any], name: str | None
) -> Iterator[dict[str, Any]]:
    """Yield the added tokens that the files list, in the order in which transformers adds them."""
    beside = path.parent / CONFIG
    added, decoder = frame.get("added_tokens") or [], config.get("added_tokens_decoder", {})
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise InputError(f"{path}: `added_tokens` is not a list of objects")
    stated = {}
    for token in added:
        text = text_of(token, path, "added_tokens")
        stated[text] = token.get("id")
        if name is None or not decoder:
            yield {**token, "content": text, "id": token.get("id")}
    for index in decoder:
        text = text_of(decoder[index], beside, "added_tokens_decoder")
        number = whole_number(index)
        if number is None:
            raise InputError(f"{beside}: the id of {shown(text)} is {shown(index)}, not a whole number")
        if stated.get(text, number) != number:
            raise InputError(f"{beside}: {shown(text)} has id {index}, in {path.name} {stated.get(text)}")
    for index in sorted(decoder, key=int):
        token = decoder[index]
        flags = token if isinstance(token, dict) else {}
        yield {**flags, "content": text_of(token, beside, "added_tokens_decoder"), "id": int(index)}


def _with_ids(
    listed: Iterable[dict[str, Any]],
    roles: Iterable[str | dict[str, Any]],
    vocab: Mapping[str, Any],
    path: Path,
) -> dict[str, dict[str, Any]]:
    """Return text -> flags and id of each added token.

    The `tokenizers` library ignores the ids that the files give to added tokens. A token that is in the
    vocabulary keeps its id there, any other token gets the next free id. If a file gives a different id, this
    is an error: the file was changed by hand, or belongs to other weights.
    """
    tokens: dict[str, dict[str, Any]] = {}
    highest = -1
    flagged = (
        {"content": token} if isinstance(token, str) else {**token, "special": True} for token in roles
    )
    for token, is_listed in (*((token, True) for token in listed), *((token, False) for token in flagged)):
        text = token["content"]
        if text in tokens and not is_listed:
            continue
        index = vocab.get(text, tokens.get(text, {}).get("id", max(highest + 1, len(vocab))))
        stated = token.get("id", index)
        if text in vocab and stated != index:
            raise InputError(f"{path}: {shown(text)} has the ids {index} and {stated}")
        if stated is not None and stated != index and type(stated) is int:
            raise InputError(
                f"{path.parent}: the added token {shown(text)} has id {stated}, but {index} is the next one: "
                "programs would give it that id"
            )
        special = bool(token.get("special", True))
        defaults = {"id": None, "content": text, **_FLAGS, "normalized": not special, "special": special}
        tokens[text] = {**defaults, **token, "id": stated}
        if isinstance(index, int):
            highest = max(highest, index)
    return tokens


def _made(merges: Iterable[tuple[str, str]], texts: Collection[str]) -> set[str]:
    """Return the texts in `texts` that are the result of a merge."""
    return {first + second for first, second in merges if first + second in texts}


def _is_word(token: dict[str, Any], roles: set[str], made: set[str]) -> bool:
    """Return True if an added token is ordinary text: a word, white space, or the result of a merge.

    Markup such as `<think>` is not ordinary text, although Qwen's files call it an ordinary token.
    """
    text = token["content"]
    if not text.strip() or text in BYTE_SYMBOLS or text in made:
        return True
    is_markup = re.fullmatch(r"[<\[|].*[>\]|]", text, re.DOTALL)
    return token["special"] is False and text not in roles and not is_markup


def _template(roles: tuple[str, str], definition: Definition) -> dict[str, Any] | None:
    """Return the post_processor that puts a token before and after each text; None if there is neither."""
    first, last = (definition.named.get(role) for role in roles)
    single, second = (
        [
            *([{"SpecialToken": {"id": first, "type_id": number}}] if first else []),
            {"Sequence": {"id": name, "type_id": number}},
            *([{"SpecialToken": {"id": last, "type_id": number}}] if last else []),
        ]
        for number, name in enumerate("AB")
    )
    if len(single) == 1:
        return None
    ids = definition.tokens
    known = {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in (first, last) if text}
    pair = [*single, *second]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": known}


def _around(step: Any, path: Path) -> tuple[list[int], list[int]]:
    """Return the ids that a post_processor puts before and after a text."""
    match step:
        case None | {"type": "ByteLevel"}:  # ByteLevel adds no token here, only changes offsets
            return [], []
        case {"type": "BertProcessing" | "RobertaProcessing", "cls": [_, int(first)], "sep": [_, int(last)]}:
            return [first], [last]
        case {"type": "Sequence", "processors": [*parts]}:
            before: list[int] = []
            after: list[int] = []
            for part in parts:
                outer = _around(part, path)
                before, after = outer[0] + before, after + outer[1]
            return before, after
        case {"type": "TemplateProcessing", "single": [*pieces]}:
            known = step.get("special_tokens")
            sides: tuple[list[int], list[int]] = ([], [])
            texts = 0
            for piece in pieces:
                match piece:
                    case {"Sequence": {"id": "A"}}:
                        texts += 1
                    case {"SpecialToken": {"id": str(token)}}:
                        match known.get(token) if isinstance(known, dict) else None:
                            case {"ids": [*ids]} if all(type(one) is int for one in ids):
                                sides[texts > 0].extend(ids)
                            case _:
                                texts = 2
                    case _:
                        texts = 2
            if texts == 1:
                return sides
    raise InputError(f"{path}: its post_processor is not understood: {json.dumps(step)[:100]}")


def checked(definition: Definition, source: str) -> Definition:
    """Check a definition, and order its vocabulary by id.

    The `tokenizers` library checks only the merges. If an id or token is wrong, it would silently drop text.

    Raises:
        InputError: if an id is not a number or occurs twice, or if a special token is ordinary text.
    """
    tokens, made = definition.tokens, _made(definition.merges, definition.special)
    for text, index in tokens.items():
        if type(index) is not int or index < 0:
            raise InputError(
                f"{source}: the id of {shown(text)} is {shown(index)}, not a whole number of at least 0"
            )
    for text in definition.special:
        if not text.strip() or text in BYTE_SYMBOLS or text in made:
            raise InputError(f"{source}: the special token {shown(text)} is text, which anybody may write")
    ordered = sorted(tokens, key=tokens.__getitem__)
    for left, right in pairwise(ordered):
        if tokens[left] == tokens[right]:
            raise InputError(
                f"{source}: id {tokens[left]} is given twice, to {shown(left)} and {shown(right)}"
            )
    vocab = definition.vocab
    return replace(definition, vocab={text: vocab[text] for text in ordered if text in vocab})
