"""A request, and the sequences that it becomes: prompt, new tokens, and why they end.

    request = check_request(model, prompts, options, eos_token_id, tokenizer)
    sequence = Sequence(prompts[0], request, limit=20)
    while sequence.stop_reason is None:
        sequence.push(token)                 # from minigpt.generation.loop
    sequence.completion()

`check_request` refuses what cannot work, before anything is computed. `StopChecker` takes the new ids of one
prompt, one by one, and knows why they end. `IncrementalDetokenizer` makes text of ids while they come: what
its `push` returns is final, so that pieces can be shown at once, and joined they are the text.

No model runs here.
"""

from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel
from minigpt.generation.constraints import State, make_constraint
from minigpt.generation.logits_processors import NO_TOKEN, Processor, make_processors
from minigpt.generation.options import GenerationOptions, check_ids, id_list
from minigpt.generation.output import Completion, Recorder, StopReason

__all__ = [
    "IncrementalDetokenizer", "Request", "Sequence", "StopChecker", "TextTokenizer", "bare_ids", "base_seed",
    "check_prompt", "check_request", "cut", "row_seed",
]  # fmt: skip

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoding makes of bytes that are no whole character


class TextTokenizer(Protocol):
    """What generation needs of a tokenizer; minigpt.generation.api's `prompt_ids` and `eos_of` need more."""

    def encode_text(self, text: str, /) -> list[int]:
        """The ids of a text, with `before_text` and `after_text` around it, if the tokenizer has these."""

    def decode(self, ids: list[int], /) -> str:
        """The text of some ids."""

    def unknown_characters(self, text: str, /) -> list[str]:
        """The characters of a text that cannot be encoded."""


def bare_ids(tokenizer: TextTokenizer, text: str) -> list[int]:
    """The ids of a text and nothing around it."""
    ids = tokenizer.encode_text(text)
    before, after = (len(getattr(tokenizer, name, ())) for name in ("before_text", "after_text"))
    return ids[before : len(ids) - after]


@dataclass(frozen=True)
class Request:
    """Options, and what was made of them once for all prompts."""

    options: GenerationOptions
    eos: list[int]  # ids that end an answer
    decode: Callable[[list[int]], str] | None = None  # ids -> text, where there are stop strings
    constraint: State | None = None  # the state before the first new token
    tokens: int | None = None  # ids from here on have no token; None: each id may come
    processors: Ids[Processor] = ()  # what changes scores before a token is chosen, in order


def check_request(
    model: LanguageModel,
    prompts: Ids[Ids[int]],
    options: GenerationOptions,
    eos_token_id: int | Ids[int] | None,
    tokenizer: TextTokenizer | None,
) -> Request:
    """Refuse what cannot work before anything is computed, with an InputError.

    With a tokenizer, ids that it has no token for never come: a published model may have more rows than
    tokens (Qwen3: 151,936 for 151,669), whose scores nothing has trained. transformers lets them come.
    """
    vocab_size = model.config.vocab_size
    options.check_model(vocab_size, model.config.max_position_embeddings)
    eos = id_list(eos_token_id if options.eos_token_id is None else options.eos_token_id)
    check_ids("eos_token_id", eos, vocab_size)
    for number, prompt in enumerate(prompts, 1):
        check_prompt(f"prompt {number}", prompt, model, options)
        check_ids(f"prompt {number}", prompt, vocab_size)
    if options.stops and tokenizer is None:
        raise InputError("stop_strings need the tokenizer: pass tokenizer=...")
    decode = tokenizer.decode if tokenizer is not None and options.stops else None
    size = getattr(tokenizer, "get_vocab_size", None)
    tokens = min(vocab_size, size()) if size else vocab_size
    constraint = None if options.constraint is None else make_constraint(options, tokenizer, eos)
    processors: list[Processor] = []
    if options.changes_scores or tokens < vocab_size:
        processors = make_processors(options, eos, vocab_size, next(model.parameters()).device, tokens)
    return Request(options, eos, decode, constraint, tokens if tokens < vocab_size else None, processors)


def check_prompt(name: str, prompt: Ids[int], model: LanguageModel, options: GenerationOptions) -> None:
    """Refuse a prompt that is empty, or as long as the context where no window slides over it."""
    limit = model.config.max_position_embeddings
    if len(prompt) > limit - 1 and options.window is None:
        raise InputError(
            f"{name} has {len(prompt)} tokens; the model reads block_size={limit}, answer included: "
            f"at most {limit - 1} are possible"
        )
    if not prompt:
        raise InputError(f"{name} is empty: the model needs a token to start from")


def base_seed(options: GenerationOptions) -> int | None:
    """The seed from which all sequences' generators are made; None without sampling."""
    if not options.do_sample:
        return None
    return (
        int(torch.randint(2**62, ())) if options.seed is None else options.seed
    )  # torch.manual_seed decides


def row_seed(seed: int, prompt: int, copy: int) -> list[int]:
    """The seed of one sequence: the first answer to a prompt is the same, however many follow."""
    return [seed, prompt, copy] if copy else [seed, prompt]


class Guesses(Protocol):
    """See minigpt.generation.speculative_decoding."""

    def draft(self, sequence: "Sequence", most: int) -> list[int]:
        """Guesses at the next tokens."""

    def take(self, sequence: "Sequence", logits: Tensor) -> None:
        """Push what the logits behind the last token and the guesses say."""


class Beams(Protocol):
    """See minigpt.generation.beam_search."""

    def take(self, beams: "list[Sequence]", logits: Tensor, loop: Any) -> "list[Sequence]":
        """Continue all beams of a search; returns those that are there afterwards."""


class StopChecker:
    """The new ids of one prompt.

    Args:
        limit: of them, at most.
    """

    def __init__(self, limit: int, request: Request) -> None:
        self.limit, self.request, self.eos = limit, request, request.eos
        self.ids: list[int] = []  # without the eos that ended them
        self.ending: int | None = None  # the eos that ended them
        self.stop_reason: StopReason | None = None  # why they have ended; None: they have not
        self._at_limit: StopReason = "length" if limit == request.options.wanted else "context"
        self._text = IncrementalDetokenizer(request.decode, request.options.stops) if request.decode else None

    @property
    def chosen(self) -> list[int]:
        """The new ids, and the eos that ended them."""
        return self.ids if self.ending is None else [*self.ids, self.ending]

    def push(self, token: int) -> None:
        """Take the next id."""
        assert self.stop_reason is None, "it has ended"
        if token in self.eos:
            self.stop_reason, self.ending = "eos", token
            return
        self.ids.append(token)
        if self._text is not None:
            self._text.push(token)
        if self._text is not None and self._text.stopped:
            self.stop_reason = "stop_string"
        elif len(self.ids) == self.limit:
            self.stop_reason = self._at_limit

    def completion(self) -> Completion:
        """The new ids, and why they ended."""
        assert self.stop_reason is not None, "it has not ended"
        return Completion(list(self.ids), self.stop_reason)


class Sequence(StopChecker):
    """A prompt and its new tokens, while they are generated.

    Args:
        seed: what its random numbers begin with (`row_seed`); None: the most likely tokens are chosen.
        embeds: (T, C), the prompt as vectors; `prompt` then holds as many placeholders.

    Attributes:
        context: the tokens that the model has in view: all, or a window's and what followed.
        slot: its slot of the cache.
        error: why it failed.
    """

    def __init__(
        self,
        prompt: Ids[int],
        request: Request,
        limit: int,
        seed: Ids[int] | None = None,
        embeds: Tensor | None = None,
    ) -> None:
        super().__init__(limit, request)
        self.prompt, self.seed, self.embeds = list(prompt), seed, embeds
        self.context, self.context_embeds = list(prompt), embeds
        self.slot = -1
        self._history: npt.NDArray[np.int64] | None = None
        self._n_known = 0  # new ids that it has
        self.error: Exception | None = None
        self.constraint = request.constraint
        self.uniform: npt.NDArray[np.float64] | None = None  # (limit,)  a random number for each new token
        if seed is not None:
            self.uniform = np.random.default_rng(list(seed)).random(limit)
        self.recorder: Recorder | None = None
        self.watcher: Recorder | None = None  # a recorder of the model's states: the sequence is read alone
        self.speculation: Guesses | None = None
        self.beams: Beams | None = None
        options = request.options
        self.restarts = options.window is not None or not options.use_cache  # its slot is emptied at times
        # Tokens of sequences of one kind are chosen together; None: the most likely one, of the logits alone.
        is_plain = seed is None and not request.processors and request.constraint is None
        self.kind: object = None if is_plain else id(request)

    @property
    def is_plain(self) -> bool:
        """Does it get one token at a time, and keep its slot's tokens?"""
        return self.speculation is None and self.beams is None and not self.restarts

    @property
    def has_ended(self) -> bool:
        """Does no token follow?"""
        return self.stop_reason is not None or self.error is not None

    @property
    def n_cached_at_first(self) -> int:
        """Tokens before the one that is read when the first new token is chosen."""
        return len(self.prompt) - 1

    def push(self, token: int) -> None:
        """Take the next token."""
        super().push(token)
        if self.stop_reason is None:
            self.follow(token)

    def follow(self, token: int) -> None:
        """Put a token behind the context and the constraint. What the constraint raises is the error."""
        self.context.append(token)
        if self.constraint is not None:
            try:
                self.constraint = self.constraint.after(token)
            except InputError as error:
                self.error = error

    def allowed(self) -> Ids[int]:
        """The ids that the constraint allows next; none where it raises an error, which is the sequence's."""
        assert self.constraint is not None, "something says what is allowed"
        try:
            return self.constraint.allowed()
        except InputError as error:
            self.error = error
            return []

    def fail(self, problem: str) -> None:
        """No token can follow. An error that it has already says more."""
        self.error = self.error or InputError(problem)

    def history(self) -> npt.NDArray[np.int64]:
        """Prompt and new ids, (S,), to be used before the next call; a prompt of vectors has no ids."""
        start = len(self.prompt)
        if self._history is None:
            self._history = np.full(start + self.limit, NO_TOKEN, dtype=np.int64)
            if self.embeds is None:
                self._history[:start] = self.prompt
        known = 0 if self.beams is not None else self._n_known  # a beam may become another one's copy
        self._history[start + known : start + len(self.ids)] = self.ids[known:]
        self._n_known = len(self.ids)
        return self._history[: start + len(self.ids)]

    def slide(self, max_length: int) -> bool:
        """Cut a full context down to the window; returns whether the context was full."""
        options = self.request.options
        if options.window is None or len(self.context) < max_length:
            return False
        text = [*self.prompt, *self.ids]
        first_of_tail = len(text) - options.window + options.sinks
        kept = [*range(options.sinks), *range(first_of_tail, len(text))]
        self.context = [text[place] for place in kept]
        if self.embeds is not None:
            self.context_embeds = self.embeds[[place for place in kept if place < len(self.prompt)]]
        return True


class IncrementalDetokenizer:
    r"""The text of the ids so far, cut where the first stop string begins.

    A token of a byte-level vocabulary may end inside a character, which then decodes as U+FFFD; and the end
    of the text may be the beginning of a stop string. Both are held back until what follows decides.

    >>> text = IncrementalDetokenizer(lambda ids: "".join(map(chr, ids)), stop_strings=["\n\n"])
    >>> [text.push(ord(character)) for character in "a\nb\n\n"], text.stopped
    (['a', '', '\nb', '', ''], True)

    Args:
        decode: ids -> text. Texts of ids that begin and end at whole characters may be joined, but for those
            of a tokenizer whose `joins` is False (WordPiece): spaces there depend on other tokens.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop_strings: Ids[str] = ()) -> None:
        self.stopped = False  # a stop string has come
        self._decode, self._stops = decode, stop_strings
        self._joins = getattr(getattr(decode, "__self__", None), "joins", True)
        self._ids: list[int] = []  # their text is not final
        self._taken = 0  # characters of it that are
        self._held = ""  # final, but perhaps the beginning of a stop string

    def push(self, token: int) -> str:
        """Take the next id; returns the text that has become final, often one character, perhaps none."""
        self._ids.append(token)
        text = self._decode(self._ids)
        # Of several U+FFFD only the last can still become a character: bytes that follow the others did not
        # complete them.
        whole = text.removesuffix(REPLACEMENT)
        if not self._joins:  # the last three words may still be joined: " n ' t" becomes "n't"
            start = text.rsplit(" ", 3)[0] if text.count(" ") > 2 else ""
            whole = max(start, text[: self._taken], key=len)
        fresh, self._taken = whole[self._taken :], len(whole)
        if whole == text and self._joins:
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


def cut(text: str, stop_strings: Ids[str]) -> str:
    """The text up to where the first stop string begins.

    >>> cut("1. 天\\n2. 地", ["2.", "\\n"])
    '1. 天'
    """
    return text[: min((place for place in map(text.find, stop_strings) if place >= 0), default=len(text))]
