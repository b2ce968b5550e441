"""Describes a model's prompt format for the JavaScript program in an HTML file (see html_file.py).

A chat template is a program, which a page does not run. But most templates write a conversation of user and
assistant as fixed pieces between the messages:

    head, user, between[0], answer, between[1], user, ..., user, tail

A piece is a list of texts and ids of special tokens. To find the pieces, this module renders a conversation
with marks in place of the messages, and cuts the rendered text at the marks. Then it checks the pieces with a
longer conversation. If a template has no such pieces, the page asks each question without the earlier ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from minigpt.errors import InputError
from minigpt.tokenization.chat_template import encode_chat
from minigpt.tokenization.subword import SubwordTokenizer
from minigpt.weights.pretrained import AnyTokenizer

__all__ = ["describe_prompt"]

_Piece = list[str | int]
_THOUGHTS_END = "</think>"


def describe_prompt(
    tokenizer: AnyTokenizer, form: Literal["chat", "question", "text"]
) -> tuple[dict[str, Any], list[str]]:
    """Return the description of the prompt format, and sentences about differences from minigpt.

    Raises:
        InputError: if the tokenizer lacks a token or template that the format needs, or its template fails.
    """
    found: dict[str, Any] = {"separator": tokenizer.sep_token_id, "chat": None}
    if form == "question" and tokenizer.sep_token_id is None:
        raise InputError("the prompt format question needs a tokenizer with <sep>")
    if form != "chat":
        return found, []
    if not isinstance(tokenizer, SubwordTokenizer) or tokenizer.chat_template is None:
        raise InputError("the prompt format chat needs a tokenizer with a chat_template")
    template = _Template(tokenizer)
    found["chat"] = template.description()
    notes = []
    if found["chat"]["between"] is None:
        notes.append("the chat template is not of the kind that the page knows: it asks each question alone")
    if found["chat"]["trims"] is None:
        notes.append("the chat template changes the white space around a message; the page leaves it alone")
    return found, notes


@dataclass
class _Listener:
    """Takes the place of a tokenizer in `encode_chat`, to collect the texts that it would encode."""

    special_tokens: dict[str, int]
    named_tokens: dict[str, str]
    chat_template: str
    texts: list[str] = field(default_factory=list)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Store the text in `texts`. Return one id that stands for it: -1 for the first text, then -2, ..."""
        self.texts.append(text)
        return ([-len(self.texts)], [(0, len(text))]) if text else ([], [])


class _Template:
    def __init__(self, tokenizer: SubwordTokenizer) -> None:
        self._tokenizer = tokenizer
        self._answer = 1 + max(tokenizer.special_tokens.values(), default=0) + tokenizer.get_vocab_size()

    def description(self) -> dict[str, Any]:
        """Return the fixed pieces of the chat template and its other properties, for JSON."""
        head, tail = self._cut(self._rendered(["u1"]), ["u1"])
        between = self._between(head, tail)
        tails: dict[str, _Piece | None] = {"on": tail, "off": None}
        if "enable_thinking" in (self._tokenizer.chat_template or ""):
            quiet = self._cut(self._rendered(["u1"], enable_thinking=False), ["u1"])
            tails["off"] = quiet[1] if quiet[0] == head and quiet[1] != tail else None
        return {
            "head": head,
            "between": between,
            "tails": tails,
            "trims": self._trims(head, tail),
            "thoughtsEnd": self._thoughts_end(head, between, tail),
        }

    def _trims(self, head: _Piece, tail: _Piece) -> bool | None:
        """Return True if the template strips messages like str.strip(), False if it does not strip them.

        Returns None if it strips them in another way, such as at one end only.
        """
        probes = [" u ", "\n\nu", "u\n\n", "\n u\n"]
        found = [self._rendered([probe], add=False) for probe in probes]
        for trims in (False, True):
            if found == [_joined([*head, one.strip() if trims else one, *tail]) for one in probes]:
                return trims
        return None

    def _between(self, head: _Piece, tail: _Piece) -> list[_Piece] | None:
        """Return [piece before an answer, piece after it]; None if these differ from answer to answer."""
        try:
            first = self._cut(self._rendered(["u1", "a", "u2"]), ["u1", "a", "u2"])
            longer = self._rendered(["u1", "a", "u2", "a", "u3"])
        except InputError:
            return None
        _, before, after, _ = first
        expected: _Piece = [*head, "<u1>", *before, self._answer, *after, "<u2>", *before, self._answer]
        expected += [*after, "<u3>", *tail]
        good = first[0] == head and first[3] == tail and _joined(expected) == longer
        return [before, after] if good else None

    def _thoughts_end(self, head: _Piece, between: list[_Piece] | None, tail: _Piece) -> str | None:
        """Return "</think>" if the template removes the thoughts of earlier answers, or else None."""
        if between is None or _THOUGHTS_END not in (self._tokenizer.chat_template or ""):
            return None
        thought = {"role": "assistant", "content": f"<think>\nt\n{_THOUGHTS_END}\n\nkept"}
        user = {"role": "user", "content": "<u1>"}
        found = self._pieces([user, thought, user])
        expected = _joined([*head, "<u1>", *between[0], "kept", *between[1], "<u1>", *tail])
        return _THOUGHTS_END if found == expected else None

    def _rendered(self, turns: Sequence[str], add: bool = True, **options: Any) -> _Piece:
        """Render a conversation with the chat template.

        Args:
            turns: the messages in order: "a" stands for an answer, any other text is a user's message.
            add: put each user's message between the marks < and >, so that `_cut` can find it.
        """
        messages: list[Mapping[str, Any]] = []
        for turn in turns:
            if turn == "a":
                messages.append({"role": "assistant", "content": "<a>", "token_ids": [self._answer]})
            else:
                messages.append({"role": "user", "content": f"<{turn}>" if add else turn})
        return self._pieces(messages, **options)

    def _pieces(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> _Piece:
        own = self._tokenizer
        assert own.chat_template is not None
        listener = _Listener(dict(own.special_tokens), dict(own.named_tokens), own.chat_template)
        ids = encode_chat(listener, messages, add_generation_prompt=True, **options)
        return _joined([listener.texts[-one - 1] if one < 0 else one for one in ids])

    def _cut(self, pieces: _Piece, turns: Sequence[str]) -> list[_Piece]:
        """Cut a rendered conversation at its messages. Return the pieces around them.

        Each message must occur exactly once.
        """
        found: list[_Piece] = [[]]
        marks: list[str | int] = [self._answer if turn == "a" else f"<{turn}>" for turn in turns]
        for piece in pieces:
            rest: str | int = piece
            while marks and isinstance(rest, str) and isinstance(marks[0], str) and marks[0] in rest:
                left, rest = rest.split(marks.pop(0), 1)  # type: ignore[arg-type]
                found[-1] += [left] if left else []
                found.append([])
            if marks and rest == marks[0]:
                marks.pop(0)
                found.append([])
            elif rest != "":
                found[-1].append(rest)
        if marks:
            raise InputError(
                "the chat template leaves out or repeats what a user says: the page cannot use it"
            )
        return found


def _joined(pieces: Sequence[str | int]) -> _Piece:
    """Join texts that are neighbours in the list into one text. Ids stay as they are."""
    found: _Piece = []
    for piece in pieces:
        if isinstance(piece, str) and found and isinstance(found[-1], str):
            found[-1] += piece
        elif piece != "":
            found.append(piece)
    return found
