"""WordPiece: the tokenizer of BERT and of most published Chinese GPT-2 models.

    tokenizer = WordPieceTokenizer.from_folder("gpt2-chinese")     # with vocab.txt
    tokenizer.encode_text("你好")                                  # [101, 872, 1962, 102]: [CLS] 你 好 [SEP]

A text is normalised: lower case and no accents, if the files say so. It is split at white space, punctuation
and Chinese characters. Each word is split into the longest pieces that the vocabulary has; all pieces of a
word except the first begin with ## (https://arxiv.org/abs/1609.08144, section 4.1). If the vocabulary has no
piece for a part of a word, the whole word becomes [UNK]. White space is lost: decoding puts a space before
each word, as `transformers` does.
"""

from pathlib import Path
from typing import Any, SupportsIndex

from minigpt.errors import InputError
from minigpt.tokenization.definition import Definition
from minigpt.tokenization.subword import SubwordTokenizer
from minigpt.tokenization.wordpiece_files import read_folder

__all__ = ["WordPieceTokenizer"]

# Decoding puts a space before each word and each punctuation mark. These replacements, made in this order,
# remove the spaces that English does not have.
_JOINED = (
    *((f" {sign}", sign) for sign in ".?!,"),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    # As in transformers, this replacement is made in the text of each single token, but not in the whole
    # decoded text. As hardly any token contains " do not", it rarely has an effect.
    (" do not", " don't"),
    *((f" '{end}", f"'{end}") for end in ("s", "ve", "re")),
)


class WordPieceTokenizer(SubwordTokenizer):
    """Converts text to ids of words and parts of words, and back. Make one with `from_folder`."""

    # False: the decoded text is not just the joined texts of the single tokens, because the spaces around a
    # token depend on its neighbours.
    joins = False

    def __init__(self, definition: Definition) -> None:
        super().__init__(definition)
        self._unknown = definition.tokens[definition.frame["model"]["unk_token"]]
        self._cleans_tokens = bool(definition.frame["decoder"].get("cleanup", True))
        self._cleans_text = bool(definition.config.get("clean_up_tokenization_spaces"))

    @classmethod
    def from_folder(cls, path: str | Path, whole: dict[str, Any] | None = None) -> "WordPieceTokenizer":
        """Read the tokenizer of a model folder. minigpt/tokenization/wordpiece_files.py lists the layouts.

        Args:
            path: the folder.
            whole: the parsed tokenizer.json, if the caller has it.

        Raises:
            InputError: if a file is missing or wrong; the message names the file and what to do.
        """
        definition = read_folder(Path(path), whole)
        try:
            tokenizer = cls(definition)
            tokenizer._encoding("a 1")  # some damaged files give an error only when a text is encoded
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        return tokenizer

    def unknown_characters(self, text: str) -> list[str]:
        """Return the distinct characters of the words that become [UNK], in order of appearance."""
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
        """Return the bytes that a token adds in the middle of a text. There, a word begins with a space."""
        number = self._checked_id(index, "")
        return self._piece(number).encode("utf-8", "replace") if number in self._text_of else b""


def _cleaned(text: str, *changes: tuple[str, str]) -> str:
    for spaced, joined in changes:
        text = text.replace(spaced, joined)
    return text
