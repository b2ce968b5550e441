"""A request and its sequences: prompt, new tokens and stop reason.

    request = check_request(model, prompts, options, eos_token_id, tokenizer)
    sequence = Sequence(prompts[0], request, limit=20)       # at most 20 new tokens
    while sequence.stop_reason is None:
        sequence.push(token)                 # `token`: the next token, which minigpt.generation.loop chooses
    sequence.completion()

`check_request` refuses wrong input before anything is computed. `StopChecker` takes the new ids of one
prompt, one by one, and decides when they end. `IncrementalDetokenizer` turns new ids into text. Its `push`
returns only text that later ids cannot change, so pieces can be shown immediately. Joined, the pieces are the
whole text.

This module runs no model.
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

# decoding gives this character for bytes that are not a whole character
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextTokenizer(Protocol):
    """The methods of a tokenizer that generation needs."""

    def encode_text(self, text: str, /) -> list[int]:
        """Return the ids of a text.

        Some tokenizers put special ids, such as BOS, around the text's ids. The result then begins with the
        ids of the tokenizer's attribute `before_text`, and ends with the ids of `after_text`.
        """

    def decode(self, ids: list[int], /) -> str:
        """Return the text of some ids."""

    def unknown_characters(self, text: str, /) -> list[str]:
        """Return the characters of a text that cannot be encoded."""


def bare_ids(tokenizer: TextTokenizer, text: str) -> list[int]:
    """Return the ids of a text, without the tokenizer's `before_text` and `after_text`."""
    ids = tokenizer.encode_text(text)
    before, after = (len(getattr(tokenizer, name, ())) for name in ("before_text", "after_text"))
    return ids[before : len(ids) - after]


@dataclass(frozen=True)
class Request:
    """The options of one call, such as generate_ids(...), and objects made from the options. All sequences of
    the call share one Request."""

    options: GenerationOptions
    eos: list[int]  # ids that end an answer
    # function from ids to text; only needed for stop strings
    decode: Callable[[list[int]], str] | None = None
    # state of the constraint (such as a JSON schema) before the first new token
    constraint: State | None = None
    # ids from this number on have no token and are never chosen; None: every id has a token
    tokens: int | None = None
    processors: Ids[Processor] = ()  # functions that change the scores, in order, before a token is chosen


def check_request(
    model: LanguageModel,
    prompts: Ids[Ids[int]],
    options: GenerationOptions,
    eos_token_id: int | Ids[int] | None,
    tokenizer: TextTokenizer | None,
) -> Request:
    """Check prompts and options before anything is computed. Return the Request that all sequences share.

    With a tokenizer, ids without a token are never chosen. A published model may have scores for more ids
    than there are tokens (Qwen3: 151,936 scores, 151,669 tokens). The scores of the additional ids are
    untrained.

    Raises:
        InputError: if a prompt or an option is wrong.
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
    """Raise InputError if a prompt is empty, or if it fills the context and option `window` is not set."""
    limit = model.config.max_position_embeddings
    if len(prompt) > limit - 1 and options.window is None:
        raise InputError(
            f"{name} has {len(prompt)} tokens; the model reads block_size={limit}, answer included: "
            f"at most {limit - 1} are possible"
        )
    if not prompt:
        raise InputError(f"{name} is empty: the model needs a token to start from")


def base_seed(options: GenerationOptions) -> int | None:
    """Return the seed from which each sequence's seed is made, or None if nothing is sampled."""
    if not options.do_sample:
        return None
    # without the option `seed`, torch's random generator (torch.manual_seed) gives the seed
    return int(torch.randint(2**62, ())) if options.seed is None else options.seed


def row_seed(seed: int, prompt: int, copy: int) -> list[int]:
    """Return the seed of one sequence, for answer number `copy` to prompt number `prompt`.

    Copy 0 has the seed [seed, prompt], other copies have [seed, prompt, copy].
    """
    return [seed, prompt, copy] if copy else [seed, prompt]


class Guesses(Protocol):
    """The methods of a Speculation (speculative_decoding.py) that the loop uses."""

    def draft(self, sequence: "Sequence", most: int) -> list[int]:
        """Return at most `most` guesses at the next tokens."""

    def take(self, sequence: "Sequence", logits: Tensor) -> None:
        """Add tokens to the sequence, chosen from the logits after its last token and after each guess."""


class Beams(Protocol):
    """The method of a BeamSearch (beam_search.py) that the loop uses."""

    def take(self, beams: "list[Sequence]", logits: Tensor, loop: Any) -> "list[Sequence]":
        """Do one step of the search. Return the beams of the next step, or [] if the search has ended."""


class StopChecker:
    """Holds the new ids of one prompt, and decides when they end.

    Args:
        limit: largest number of new ids.
    """

    def __init__(self, limit: int, request: Request) -> None:
        self.limit, self.request, self.eos = limit, request, request.eos
        self.ids: list[int] = []  # new ids, without the eos that ended them
        self.ending: int | None = None  # the eos that ended the ids
        self.stop_reason: StopReason | None = None  # None: the ids have not ended
        self._at_limit: StopReason = "length" if limit == request.options.wanted else "context"
        self._text = IncrementalDetokenizer(request.decode, request.options.stops) if request.decode else None

    @property
    def chosen(self) -> list[int]:
        """The new ids, including the eos that ended them."""
        return self.ids if self.ending is None else [*self.ids, self.ending]

    def push(self, token: int) -> None:
        """Add the next id, and check whether the ids have ended."""
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
        """Return the new ids and the stop reason."""
        assert self.stop_reason is not None, "it has not ended"
        return Completion(list(self.ids), self.stop_reason)


class Sequence(StopChecker):
    """A prompt and its new tokens, while they are generated.

    Args:
        seed: seed of the sequence's random numbers (`row_seed`); None: the most likely tokens are chosen.
        embeds: (T, C), the prompt as T vectors of C channels. `prompt` then holds T placeholder ids.

    Attributes:
        context: tokens that the model sees: all tokens, or with the option `window` only some of them.
        slot: index of the sequence's row in the KV cache; -1 before the sequence has a row.
        error: error with which the sequence failed, or None.
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
        self._n_known = 0  # number of new ids that are already in _history
        self.error: Exception | None = None
        # names of the sequence's adapters; None: the adapters that are active in the model
        self.adapters: tuple[str, ...] | None = None
        self.constraint = request.constraint
        self.uniform: npt.NDArray[np.float64] | None = None  # (limit,)  a random number for each new token
        if seed is not None:
            self.uniform = np.random.default_rng(list(seed)).random(limit)
        self.recorder: Recorder | None = None
        # collects the model's hidden states, so this sequence must be alone in its batch; None: no collecting
        self.watcher: Recorder | None = None
        self.speculation: Guesses | None = None
        self.beams: Beams | None = None
        options = request.options
        # True: sometimes this sequence's KV cache is emptied, and the model reads the whole context again
        self.restarts = options.window is not None or not options.use_cache
        # The next tokens of sequences with equal `kind` can be chosen together. If each token is the argmax
        # of the unchanged logits, `kind` is None.
        is_plain = seed is None and not request.processors and request.constraint is None
        self.kind: object = None if is_plain else id(request)

    @property
    def is_plain(self) -> bool:
        """True if each step gives one token and the cache keeps all tokens: no guesses, beams or restarts."""
        return self.speculation is None and self.beams is None and not self.restarts

    @property
    def has_ended(self) -> bool:
        """True if the sequence gets no more tokens."""
        return self.stop_reason is not None or self.error is not None

    @property
    def n_cached_at_first(self) -> int:
        """Number of tokens in the cache when CUDA graphs begin to decode: all prompt tokens but the last."""
        return len(self.prompt) - 1

    def push(self, token: int) -> None:
        """Add the next token, and check whether the sequence has ended."""
        super().push(token)
        if self.stop_reason is None:
            self.follow(token)

    def follow(self, token: int) -> None:
        """Add a token to the context and to the constraint's state. If the constraint fails, set `error`."""
        self.context.append(token)
        if self.constraint is not None:
            try:
                self.constraint = self.constraint.after(token)
            except InputError as error:
                self.error = error

    def allowed(self) -> Ids[int]:
        """Return the ids that the constraint allows next. If it fails, set `error` and return []."""
        assert self.constraint is not None, "something says what is allowed"
        try:
            return self.constraint.allowed()
        except InputError as error:
            self.error = error
            return []

    def fail(self, problem: str) -> None:
        """Set `error`, because no token can follow. An earlier error stays, because it is the cause."""
        self.error = self.error or InputError(problem)

    def history(self) -> npt.NDArray[np.int64]:
        """Return the ids of the prompt and the new ids as one array. The next call changes this array.

        For a prompt of vectors, NO_TOKEN takes the place of each prompt id.
        """
        start = len(self.prompt)
        if self._history is None:
            self._history = np.full(start + self.limit, NO_TOKEN, dtype=np.int64)
            if self.embeds is None:
                self._history[:start] = self.prompt
        # beams copy each other's ids, so for a beam all ids are written again
        known = 0 if self.beams is not None else self._n_known
        self._history[start + known : start + len(self.ids)] = self.ids[known:]
        self._n_known = len(self.ids)
        return self._history[: start + len(self.ids)]

    def slide(self, max_length: int) -> bool:
        """If `window` is set and the context is full (max_length tokens), drop old tokens from the context.

        Return True if tokens were dropped.
        """
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
    r"""Turns ids into text, one id at a time. The text ends before the first stop string.

    `push` holds back two kinds of text at the end, until later ids decide about them:

    - an incomplete character: a token of a byte-level vocabulary may end inside a character, which then
      decodes as U+FFFD
    - text that may be the beginning of a stop string

    >>> text = IncrementalDetokenizer(lambda ids: "".join(map(chr, ids)), stop_strings=["\n\n"])
    >>> [text.push(ord(character)) for character in "a\nb\n\n"], text.stopped
    (['a', '', '\nb', '', ''], True)

    Args:
        decode: function from ids to text. Ids whose text is complete are not decoded again. But if the
            tokenizer's `joins` is False (WordPiece), all ids are decoded each time, because the spaces
            around a token depend on other tokens.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop_strings: Ids[str] = ()) -> None:
        self.stopped = False  # True: a stop string has occurred
        self._decode, self._stops = decode, stop_strings
        self._joins = getattr(getattr(decode, "__self__", None), "joins", True)
        self._ids: list[int] = []  # ids whose text may still change
        # number of characters of the text of `_ids`, from its start, that `push` has already processed
        self._taken = 0
        self._held = ""  # text that cannot change, but may be the beginning of a stop string

    def push(self, token: int) -> str:
        """Add the next id. Return the new text that can no longer change: often one character, perhaps ""."""
        self._ids.append(token)
        text = self._decode(self._ids)
        # Later ids can turn a U+FFFD at the end into a character. An earlier U+FFFD is final, because other
        # text already follows it.
        whole = text.removesuffix(REPLACEMENT)
        if not self._joins:
            # leave out the last three words, because WordPiece may still join them: " n ' t" becomes "n't"
            start = text.rsplit(" ", 3)[0] if text.count(" ") > 2 else ""
            whole = max(start, text[: self._taken], key=len)
        fresh, self._taken = whole[self._taken :], len(whole)
        if whole == text and self._joins:
            self._ids, self._taken = [], 0
        return self._release(fresh, at_end=False)

    def finish(self) -> str:
        """Return the text that `push` still holds back. Call it after the last id."""
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
        """Return how many characters at the end of a text may be the beginning of a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops if len(stop) > length):
                return length
        return 0


def cut(text: str, stop_strings: Ids[str]) -> str:
    """Return the text before the first stop string.

    >>> cut("1. 天\\n2. 地", ["2.", "\\n"])
    '1. 天'
    """
    return text[: min((place for place in map(text.find, stop_strings) if place >= 0), default=len(text))]
