"""WordPiece, the tokenizer of BERT, which most published Chinese GPT-2s have.

    tokenizer = WordPieceTokenizer.from_folder("gpt2-chinese")     # with vocab.txt
    tokenizer.encode_text("你好")                                  # [101, 872, 1962, 102]: [CLS] 你 好 [SEP]

A text is normalised (lower case, no accents, as the files say), cut at white space, punctuation and Chinese
characters, and each word into the longest pieces that the vocabulary has; those inside a word begin with ##
(https://arxiv.org/abs/1609.08144, section 4.1). A word with a part that the vocabulary lacks becomes [UNK] as
a whole. White space is not kept: decoding puts a space before each word, as `transformers` does.
"""

from pathlib import Path
from typing import Any, SupportsIndex

from minigpt.errors import InputError
from minigpt.tokenization.definition import Definition
from minigpt.tokenization.subword import SubwordTokenizer
from minigpt.tokenization.wordpiece_files import read_folder

__all__ = ["WordPieceTokenizer"]

# What decoding changes, in this order: English punctuation and contractions
_JOINED = (
    *((f" {sign}", sign) for sign in ".?!,"),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" do not", " don't"),  # of tokens only
    *((f" '{end}", f"'{end}") for end in ("s", "ve", "re")),
)


class WordPieceTokenizer(SubwordTokenizer):
    """Text <-> ids of words and their parts. Make one with `from_folder`."""

    joins = False  # the text of some tokens depends on those before them

    def __init__(self, definition: Definition) -> None:
        super().__init__(definition)
        self._unknown = definition.tokens[definition.frame["model"]["unk_token"]]
        self._cleans_tokens = bool(definition.frame["decoder"].get("cleanup", True))
        self._cleans_text = bool(definition.config.get("clean_up_tokenization_spaces"))

    @classmethod
    def from_folder(cls, path: str | Path, whole: dict[str, Any] | None = None) -> "WordPieceTokenizer":
        """The tokenizer of a model's folder, in either layout of minigpt/tokenization/wordpiece_files.py.

        Args:
            whole: what tokenizer.json holds, where it was parsed already.

        Raises:
            InputError: naming the file, what is wrong with it, and what to do.
        """
        definition = read_folder(Path(path), whole)
        try:
            tokenizer = cls(definition)
            tokenizer._encoding("a 1")  # some damage only shows in use
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        return tokenizer

    def unknown_characters(self, text: str) -> list[str]:
        """The distinct characters of the words that become [UNK], in order of appearance."""
        encoding = self._encoding(text)
        spans = [span for index, span in zip(encoding.ids, encoding.offsets) if index == self._unknown]
        return list(dict.fromkeys(character for start, stop in spans for character in text[start:stop]))

    def _joined(self, ids: list[int]) -> str:
        pieces = [self._piece(index) for index in ids]
        if ids:
            pieces[0] = self._cleaned(self._text_of[ids[0]])
        text = "".join(pieces)
        return _cleaned(text, *_JOINED[:-4], *_JOINED[-3:]) if self._cleans_text else text

    def _piece(self, index: int) -> str:
        token = self._text_of.get(index, "")
        return self._cleaned(token[2:] if token.startswith("##") else f" {token}")

    def _cleaned(self, token: str) -> str:
        return _cleaned(token, *_JOINED) if self._cleans_tokens else token

    def token_bytes(self, index: SupportsIndex) -> bytes:
        """The bytes of one token in the middle of a text, where a word begins with a space."""
        number = self._checked_id(index, "")
        return self._piece(number).encode("utf-8", "replace") if number in self._text_of else b""


def _cleaned(text: str, *changes: tuple[str, str]) -> str:
    for spaced, joined in changes:
        text = text.replace(spaced, joined)
    return text
