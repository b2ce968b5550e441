"""Describes a tokenizer for the JavaScript program in an HTML file (see html_file.py).

This program supports tokenizers of single characters, byte-level BPE, and WordPiece.
"""

from typing import Any

from minigpt.errors import InputError
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenization.bpe_files import GPT2_WORDS, KINDS, QWEN_WORDS, byte_level_of
from minigpt.tokenization.definition import BYTE_SYMBOLS
from minigpt.tokenization.subword import SubwordTokenizer
from minigpt.tokenization.wordpiece import WordPieceTokenizer
from minigpt.tokenizer import Tokenizer
from minigpt.weights.pretrained import AnyTokenizer

__all__ = ["describe_tokenizer"]

# The characters that \s matches in the `tokenizers` library: white space as Unicode defines it. JavaScript's
# \s is not the same: it lacks U+0085 and has U+FEFF.
_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# Regular expression of the tokenizer -> the same expression for JavaScript with the flag u. Older browsers do
# not support (?i:...), so all forms of each letter are listed. (?i:s) also matches U+017F, an old form of s.
_PATTERNS = {
    GPT2_WORDS: GPT2_WORDS,
    QWEN_WORDS: QWEN_WORDS.replace(
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"'[sS\u017f]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]",
    ),
}


def describe_tokenizer(tokenizer: AnyTokenizer) -> dict[str, Any]:
    """Return everything that the page needs to compute the tokenizer's ids, as a dict for JSON.

    Raises:
        InputError: if the page's program does not support the tokenizer.
    """
    if isinstance(tokenizer, Tokenizer):
        return {
            "kind": "characters",
            "words": tokenizer.id2word,
            "unknown": tokenizer.unk_token_id,
            "padding": tokenizer.pad_token_id,
            "special": [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.sep_token_id],
        }
    if isinstance(tokenizer, WordPieceTokenizer):
        return _word_pieces(tokenizer)
    if not isinstance(tokenizer, BpeTokenizer):
        raise InputError("the page knows tokenizers of characters, byte-level BPE and WordPiece, no other")
    definition = tokenizer.definition
    frame = definition.frame
    expression, nfc = _cut(frame)
    if any(symbol not in definition.vocab for symbol in BYTE_SYMBOLS):
        raise InputError("the tokenizer has no token for some bytes: the page cannot leave out text")
    flags = {token["content"]: token for token in frame["added_tokens"]}
    for word in definition.words:
        if any(flags[word].get(flag) for flag in ("single_word", "lstrip", "rstrip")) or (
            nfc and flags[word].get("normalized")
        ):
            raise InputError(f"the added token {word!r} has flags that the page's tokenizer does not know")
    ids = {token: index for token, index in definition.tokens.items() if token not in definition.special}
    merges = [
        number
        for left, right in definition.merges
        if left in ids and right in ids and left + right in ids
        for number in (ids[left], ids[right], ids[left + right])
    ]
    return {
        "kind": "bpe",
        "tokens": _by_id(tokenizer),
        "merges": merges,
        "pattern": _in_javascript(expression),
        "nfc": nfc,
        "prefixSpace": bool(byte_level_of(frame["pre_tokenizer"]).get("add_prefix_space")),
        "ignoreMerges": bool(frame["model"].get("ignore_merges")),
        "words": definition.words,
        "special": [[token, index] for token, index in definition.special.items()],
        "before": tokenizer.before_text,
        "after": tokenizer.after_text,
    }


def _by_id(tokenizer: SubwordTokenizer) -> list[str | None]:
    tokens: list[str | None] = [None] * tokenizer.get_vocab_size()
    for token, index in tokenizer.definition.tokens.items():
        tokens[index] = token
    return tokens


def _word_pieces(tokenizer: WordPieceTokenizer) -> dict[str, Any]:
    definition = tokenizer.definition
    frame, model = definition.frame, definition.frame["model"]
    match frame.get("normalizer"), frame.get("pre_tokenizer"):
        case {"type": "BertNormalizer", **steps}, {"type": "BertPreTokenizer"} if not definition.words:
            pass
        case _:
            raise InputError(
                "the tokenizer cuts or changes text by a rule that the page does not know: not BERT's"
            )
    lowers, strips = bool(steps.get("lowercase", True)), steps.get("strip_accents")
    unknown = definition.tokens[model["unk_token"]]
    return {
        "kind": "wordpiece",
        "tokens": _by_id(tokenizer),
        "special": [index for index in definition.special.values() if index != unknown],
        "unknown": unknown,
        "longest": model.get("max_input_chars_per_word", 100),
        "cleans": bool(steps.get("clean_text", True)),
        "separatesChinese": bool(steps.get("handle_chinese_chars", True)),
        "stripsAccents": lowers if strips is None else bool(strips),
        "lowers": lowers,
        "cleansTokens": bool(frame["decoder"].get("cleanup", True)),
        "cleansText": bool(definition.config.get("clean_up_tokenization_spaces")),
        "before": tokenizer.before_text,
        "after": tokenizer.after_text,
    }


def _cut(frame: dict[str, Any]) -> tuple[str, bool]:
    """Return the regular expression that cuts text into words, and True if text is normalised to NFC first.

    NFC joins a letter and its accent into one character.
    """
    steps = frame.get("pre_tokenizer") or {}
    switches = ("add_prefix_space", "trim_offsets")
    bare = _without({"use_regex": True, **steps} if steps.get("type") == "ByteLevel" else steps, switches)
    known = {
        GPT2_WORDS: _without(KINDS["gpt2"]["pre_tokenizer"], switches),
        QWEN_WORDS: _without(KINDS["qwen2"]["pre_tokenizer"], switches),
    }
    expression = next((key for key, one in known.items() if one == bare), None)
    normalizer = frame.get("normalizer")
    if expression is None or normalizer not in (None, {"type": "NFC"}):
        raise InputError(
            "the tokenizer cuts or changes text by a rule that the page does not know: it knows those of "
            "GPT-2 and Qwen"
        )
    if expression == QWEN_WORDS and byte_level_of(steps).get("add_prefix_space"):
        raise InputError("the tokenizer puts a space before each word (add_prefix_space): the page does not")
    return expression, normalizer is not None


def _without(step: Any, keys: tuple[str, ...]) -> Any:
    match step:
        case dict():
            return {key: _without(value, keys) for key, value in step.items() if key not in keys}
        case list():
            return [_without(value, keys) for value in step]
    return step


def _in_javascript(expression: str) -> str:
    found = _PATTERNS[expression].replace(r"(?!\S)", f"(?![^{_SPACE}])")
    for inside in (r"[^\s", r"[^\r\n"):
        found = found.replace(inside, inside.replace(r"\s", _SPACE))
    return found.replace(r"\s+", f"[{_SPACE}]+").replace(r"\s*", f"[{_SPACE}]*")
