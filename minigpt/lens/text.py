"""Shows the tokens of a text, each with its text, id and bytes, and how BPE merges each word step by step."""

from dataclasses import dataclass
from typing import NamedTuple

from minigpt.generation.conversation import token_text
from minigpt.lens.results import Bars, Part, Table, View, shown
from minigpt.lens.words import Say
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenization.subword import SubwordTokenizer
from minigpt.weights.pretrained import AnyTokenizer

__all__ = ["Merges", "Tokens", "tokens"]


class Piece(NamedTuple):
    """A token of a text."""

    text: str  # the token's text, with visible signs for spaces and other invisible characters
    id: int
    bytes: str  # bytes of the token, or of an unknown character, in hexadecimal
    is_unknown: bool


class Merges(NamedTuple):
    """The BPE merges of one word. `steps`: the word's bytes, then its parts after each merge."""

    word: str
    steps: list[list[str]]


@dataclass(frozen=True)
class Tokens(View):
    """A view of a text as tokens."""

    text: str
    pieces: list[Piece]
    unknown: list[str]  # distinct characters that the vocabulary lacks
    vocab_size: int
    merges: list[Merges]  # merges of each word; empty for a tokenizer without merges

    def parts(self, say: Say) -> list[Part]:
        """Return the tables and charts of this view, translated by `say`."""
        title = say(
            "{count} characters, {tokens} tokens of {entries} in the vocabulary",
            count=len(self.text),
            tokens=len(self.pieces),
            entries=f"{self.vocab_size:,}",
        )
        rows = [
            (shown(piece.text), f"{piece.id}", piece.bytes, say("unknown") if piece.is_unknown else "")
            for piece in self.pieces
        ]
        found: list[Part] = [Table(title, (say("token"), "id", say("bytes"), ""), rows, (1,))]
        if any(len(each.steps) > 1 for each in self.merges):
            steps = [
                (shown(each.word) if number == 0 else "", number, " ".join(parts))
                for each in self.merges
                for number, parts in enumerate(each.steps)
            ]
            found.append(
                Table(say("merges, step by step"), (say("word"), say("step"), say("parts")), steps, (1,))
            )
        labels = [shown(piece.text) for piece in self.pieces]
        lengths = [len(piece.bytes.split()) for piece in self.pieces]
        return [*found, Bars(say("bytes of each token"), labels, lengths)]

    def headline(self, say: Say) -> dict[str, str]:
        """Return a summary of this view: one table row, as a dict {column title: cell}."""
        return {say("tokens"): "|".join(shown(piece.text) for piece in self.pieces)}


def tokens(tokenizer: AnyTokenizer, text: str) -> Tokens:
    """Return a view of the tokens of a text. No special tokens are added.

    Raises:
        InputError: with a SubwordTokenizer, if the text contains a lone surrogate (half of a UTF-16 pair);
            with a BpeTokenizer that has no unknown token, also if a byte of the text has no token.
    """
    if isinstance(tokenizer, SubwordTokenizer):
        ids, spans = tokenizer.encode_with_offsets(text)
        unknown_id = None
        name = tokenizer.definition.frame["model"].get("unk_token")
        if name is not None:
            unknown_id = tokenizer.definition.tokens.get(name)
        pieces = []
        for index, (start, end) in zip(ids, spans):
            is_unknown = index == unknown_id and token_text(tokenizer, index) != text[start:end]
            raw = text[start:end].encode() if is_unknown else tokenizer.token_bytes(index)
            pieces.append(Piece(token_text(tokenizer, index), index, raw.hex(" "), is_unknown))
    else:
        unknown_id = tokenizer.unk_token_id
        pieces = [
            Piece(
                tokenizer.id2word[index],
                index,
                raw.encode("utf-8", "surrogatepass").hex(" "),
                index == unknown_id,
            )
            for raw, index in zip(text, tokenizer.encode_text(text))
        ]
    merges = []
    if isinstance(tokenizer, BpeTokenizer):
        for word, steps in tokenizer.merge_steps(text):
            named = [[part.decode("utf-8", "backslashreplace") for part in parts] for parts in steps]
            merges.append(Merges(word, [[shown(part) for part in parts] for parts in named]))
    return Tokens(text, pieces, tokenizer.unknown_characters(text), tokenizer.get_vocab_size(), merges)
