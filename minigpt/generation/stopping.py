"""What has been written, and when it ends: ids, and text without half characters, up to a stop string.

`Written` takes the new ids of one prompt, one by one, and knows why they end. `TextSoFar` makes text of ids
while they come. What its `push` returns is final: later ids do not change it, and no stop string begins in
it. So pieces can be shown at once, and joined they are the text.

It knows nothing about models.
"""

from collections.abc import Callable, Sequence

from minigpt.generation.options import GenerationOptions
from minigpt.generation.output import Completion, StopReason
from minigpt.generation.request import Request

__all__ = ["TextSoFar", "Written", "cut"]

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoding makes of bytes that are no whole character


class Written:
    """The new ids of one prompt.

    Args:
        limit: of them, at most.
    """

    def __init__(self, limit: int, options: GenerationOptions, request: Request) -> None:
        self.limit = limit
        self.ids: list[int] = []  # without the eos that ended them
        self.stop_reason: StopReason | None = None  # why they have ended; None: they have not
        self.eos = request.eos
        self._at_limit: StopReason = "length" if limit == options.wanted else "context"
        self._text = TextSoFar(request.decode, options.stops) if request.decode else None

    def push(self, token: int) -> bool:
        """Take the next id; returns whether it is one of the new ids: all but the ending eos are."""
        assert self.stop_reason is None, "it has ended"
        if token in self.eos:
            self.stop_reason = "eos"
            return False
        self.ids.append(token)
        if self._text is not None:
            self._text.push(token)
            if self._text.stopped:
                self.stop_reason = "stop_string"
                return True
        if len(self.ids) == self.limit:
            self.stop_reason = self._at_limit
        return True

    def completion(self) -> Completion:
        """What they have become."""
        assert self.stop_reason is not None, "it has not ended"
        return Completion(list(self.ids), self.stop_reason)


class TextSoFar:
    r"""The text of the ids so far, cut where the first stop string begins.

    A token of a byte-level vocabulary may end inside a character, which then decodes as U+FFFD; and the end
    of the text may be the beginning of a stop string. Both are held back until what follows decides.

    >>> text = TextSoFar(lambda ids: "".join(map(chr, ids)), stop_strings=["\n\n"])
    >>> [text.push(ord(character)) for character in "a\nb\n\n"], text.stopped
    (['a', '', '\nb', '', ''], True)

    Args:
        decode: ids -> text. Of ids that begin and end at whole characters, the texts may be joined.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop_strings: Sequence[str] = ()) -> None:
        self.stopped = False  # a stop string has come
        self._decode, self._stops = decode, stop_strings
        self._ids: list[int] = []  # not decoded for good
        self._taken = 0  # characters of theirs that are
        self._held = ""  # decoded, but perhaps the beginning of a stop string

    def push(self, token: int) -> str:
        """Take the next id; returns what has become final, often one character, at times nothing."""
        self._ids.append(token)
        text = self._decode(self._ids)
        # Of several U+FFFD only the last can still become a character: those before it were followed by bytes
        # that did not complete them.
        whole = text.removesuffix(REPLACEMENT)
        fresh, self._taken = whole[self._taken :], len(whole)
        if whole == text:
            self._ids, self._taken = [], 0
        return self._release(fresh, at_end=False)

    def finish(self) -> str:
        """No more ids come; returns what was held back."""
        fresh = self._decode(self._ids)[self._taken :] if self._ids else ""
        self._ids, self._taken = [], 0
        return self._release(fresh, at_end=True)

    def _release(self, fresh: str, at_end: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + fresh
        if any(stop in text for stop in self._stops):
            self.stopped, self._held = True, ""
            return cut(text, self._stops)
        end = len(text) if at_end else len(text) - self._open_end(text)
        self._held = text[end:]
        return text[:end]

    def _open_end(self, text: str) -> int:
        """The length of the longest end of a text with which a stop string begins."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops if len(stop) > length):
                return length
        return 0


def cut(text: str, stop_strings: Sequence[str]) -> str:
    """The text up to where the first stop string begins.

    >>> cut("1. 天\\n2. 地", ["2.", "\\n"])
    '1. 天'
    """
    return text[: min((place for place in map(text.find, stop_strings) if place >= 0), default=len(text))]
