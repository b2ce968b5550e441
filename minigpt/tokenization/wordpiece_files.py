"""Reads the files of a WordPiece tokenizer (see wordpiece.py), in two layouts.

vocab.txt         one token per line; tokenizer_config.json has the settings
tokenizer.json    one file for everything (the `tokenizers` library)
"""

from pathlib import Path
from typing import Any

from minigpt.errors import InputError
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

__all__ = ["VOCABULARY", "read_folder"]

VOCABULARY = "vocab.txt"
_CLASS = "BertTokenizer"
# The `tokenizers` library removes this white space at the end of each line of vocab.txt. Python's rstrip
# would remove more.
_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)


def read_folder(folder: Path, whole: dict[str, Any] | None = None) -> Definition:
    """Read and check the tokenizer of a folder.

    Args:
        folder: the folder.
        whole: the parsed tokenizer.json, if the caller has it.

    Raises:
        InputError: if a file is missing or wrong; the message names the file and what to do.
    """
    config = read_config(folder)
    name = class_of(folder, config)
    path = folder / TOKENIZER
    if path.exists():
        frame, vocab = _read_whole(path, read_json(path) if whole is None else whole)
        if name == _CLASS:
            require_same_steps(path, frame, _frame(config), name)
            frame = _frame(config) | {"added_tokens": frame.get("added_tokens")}
    else:
        path = folder / VOCABULARY
        if name != _CLASS:
            raise InputError(
                f"{folder / CONFIG}: no tokenizer_class says how {VOCABULARY} is read: put "
                f'"tokenizer_class": "{_CLASS}" there, if it is BERT\'s'
            )
        frame, vocab = _frame(config), _read_lines(path)
    if name != _CLASS:
        return assembled(path, frame, vocab, [], config, None)
    return assembled(path, frame, vocab, [], config, name, ("cls_token", "sep_token"))


def _frame(config: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a tokenizer.json without its vocabulary.

    The class of transformers (BertTokenizer) makes the same content from tokenizer_config.json.
    """
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": config.get("tokenize_chinese_chars", True),
            "strip_accents": config.get("strip_accents"),
            "lowercase": config.get("do_lower_case", True),
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": None,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": text_of(config.get("unk_token", "[UNK]"), Path(CONFIG), "unk_token"),
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
        },
    }


def _read_whole(path: Path, frame: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check a tokenizer.json. Return its content without the vocabulary, and the vocabulary."""
    model: Any = frame.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise InputError(f"{path} has no `model` with a `vocab`")
    match frame.get("decoder"):
        case {"type": "WordPiece", "prefix": "##"}:
            pass
        case other:
            raise InputError(
                f"{path}: its decoder is not BERT's, 'WordPiece' with the prefix '##': got {other!r:.80}"
            )
    rest = {key: value for key, value in model.items() if key != "vocab"}
    unknown = rest.get("unk_token")
    is_known = isinstance(unknown, str) and unknown in model["vocab"]
    if rest.get("continuing_subword_prefix", "##") != "##" or not is_known:
        raise InputError(f"{path}: its model has no prefix '##', or an unk_token that its vocabulary lacks")
    return {**frame, "model": rest}, model["vocab"]


def _read_lines(path: Path) -> dict[str, int]:
    """Read vocab.txt. A token's id is its line number, from 0; for a repeated token, the last line counts."""
    lines = read_utf8(path).split("\n")
    if lines[-1] == "":
        lines.pop()
    return {line.rstrip(_WHITE_SPACE): number for number, line in enumerate(lines)}
