"""What a caller may ask of generation: one frozen dataclass, checked when it is made.

    GenerationOptions(max_new_tokens=32, do_sample=True, top_p=0.9, stop_strings=["\\n"])

Names and meanings are those of Hugging Face's `generate`, where it has one. `presence_penalty`,
`frequency_penalty`, `logit_bias` and `logprobs` are OpenAI's and vLLM's; `seed`, `window` and `sinks` are
ours. Four defaults differ from Hugging Face's: `top_k` is 0, that is off, where theirs is 50, so that plain
sampling draws from what the model says; `max_new_tokens` is up to 128 where theirs is up to 20 tokens, prompt
included; `max_matching_ngram_size` is 3 (theirs 2), and `num_assistant_tokens` 4 (theirs 20).
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from minigpt.errors import InputError

__all__ = ["DEFAULT_NEW_TOKENS", "GenerationOptions", "check_ids", "id_list"]

DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True)
class GenerationOptions:
    """How to choose tokens, how many, when to stop, and what to report.

    Raises:
        InputError: for a value that makes no sense, or two that contradict each other.
    """

    max_new_tokens: int | None = None  # tokens of an answer, at most; None: up to 128, fewer if no more fit
    min_new_tokens: int = 0  # eos cannot come before that many
    do_sample: bool = False  # False: always the likeliest token, whatever the next five say
    temperature: float = 1.0  # divides the scores; below 1 the likely tokens gain
    top_k: int = 0  # draw among the k likeliest only; 0: off
    top_p: float = 1.0  # draw among the likeliest whose probabilities add up to this; 1: off
    min_p: float = 0.0  # draw among those at least this times as likely as the likeliest; 0: off
    typical_p: float = 1.0  # draw among the least surprising whose probabilities add up to this; 1: off
    repetition_penalty: float = 1.0  # above 1: tokens of prompt and answer become less likely; 1: off
    no_repeat_ngram_size: int = 0  # no n tokens in a row come twice, prompt included; 0: off
    presence_penalty: float = 0.0  # taken from the score of each token that the answer has; 0: off
    frequency_penalty: float = 0.0  # the same, times how often the answer has it; 0: off
    logit_bias: Mapping[int, float] | None = None  # id -> number added to its score
    bad_words_ids: Sequence[Sequence[int]] = ()  # sequences of ids that must not come
    eos_token_id: int | Sequence[int] | None = None  # what ends an answer; None: the tokenizer's own
    stop_strings: str | Sequence[str] = ()  # texts that end an answer, and do not belong to it
    choices: Sequence[str] = ()  # the answer is one of these
    regex: str | None = None  # the answer is a text that the expression matches as a whole
    json_schema: Mapping[str, Any] | str | None = None  # the answer is JSON that fits the schema
    num_beams: int = 1  # above 1: beam search, that many beginnings are followed at once
    length_penalty: float = 1.0  # beams are ranked by log-probability / length ** this
    early_stopping: bool | Literal["never"] = False  # True: num_beams finished beams are enough
    num_return_sequences: int = 1  # answers to each prompt
    seed: int | None = None  # decides what is drawn; None: torch's global generator does
    window: int | None = None  # when the context is full, keep that many tokens and go on; None: end there
    sinks: int = 0  # of the window's tokens, that many are the text's first ones
    prompt_lookup_num_tokens: int | None = None  # guess so many that once followed the last few; None: off
    max_matching_ngram_size: int = 3  # with the one above: so many last tokens are looked for first
    num_assistant_tokens: int = 4  # with assistant_model: guesses at a time
    use_cache: bool = True  # False computes all positions anew for each token: slow, for comparison
    cache_implementation: Literal["static", "quantized"] = (
        "static"  # quantized: int8, a quarter of the memory
    )
    max_cache_mib: float | None = None  # refuse a batch whose keys and values take more MiB; None: no limit
    output_scores: bool = False  # report the scores that a token was chosen by, as all of the above made them
    output_logits: bool = False  # report the model's own scores
    output_hidden_states: bool = False  # report what each layer hands on
    output_attentions: bool = False  # report who looks at whom
    logprobs: int | None = None  # report log-probabilities: of the chosen tokens and the n likeliest

    def __post_init__(self) -> None:
        for name, least in _WHOLE.items():
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{name} must be a whole number of at least {least}: got {name}={value!r}")
        # The lower end is where scores in single precision stay finite: 1e-6 is greedy to all intents.
        if not (_is_number(self.temperature) and 1e-6 <= self.temperature < math.inf):
            raise InputError(
                "temperature must be a finite number of at least 1e-6 (do_sample=False takes the likeliest "
                f"token): got temperature={self.temperature!r}"
            )
        for name in ("top_p", "typical_p"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 < value <= 1):
                raise InputError(f"{name} must be above 0 and at most 1: got {name}={value!r}")
        if not (_is_number(self.min_p) and 0 <= self.min_p <= 1):
            raise InputError(f"min_p must be at least 0 and at most 1: got min_p={self.min_p!r}")
        if not (_is_number(self.repetition_penalty) and 0 < self.repetition_penalty < math.inf):
            raise InputError(
                "repetition_penalty must be a finite number above 0: got "
                f"repetition_penalty={self.repetition_penalty!r}"
            )
        for name in ("presence_penalty", "frequency_penalty", "length_penalty"):
            value = getattr(self, name)
            if not (_is_number(value) and math.isfinite(value)):
                raise InputError(f"{name} must be a finite number: got {name}={value!r}")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be True or False: got {name}={getattr(self, name)!r}")
        early = self.early_stopping
        if not (isinstance(early, bool) or early == "never"):
            raise InputError(f'early_stopping must be True, False or "never": got early_stopping={early!r}')
        if self.cache_implementation not in _CACHES:
            raise InputError(
                f"cache_implementation must be one of {', '.join(_CACHES)}: got "
                f"cache_implementation={self.cache_implementation!r}"
            )
        limit = self.max_cache_mib
        if limit is not None and not (_is_number(limit) and 0 < limit < math.inf):
            raise InputError(f"max_cache_mib must be a finite number above 0: got max_cache_mib={limit!r}")
        self._check_ids()
        self._check_stop_strings()
        self._check_constraint()
        self._check_together()

    def _check_ids(self) -> None:
        bias = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(bias, Mapping):
            raise InputError(f"logit_bias must be a dictionary, id -> number: got logit_bias={bias!r}")
        for token, value in bias.items():
            if not (_is_id(token) and _is_number(value) and value < math.inf):  # NaN is not below, either
                raise InputError(
                    f"logit_bias must give finite numbers (or -inf) to ids: got {token!r}: {value!r}"
                )
        if not _is_list(self.bad_words_ids) or not all(
            _is_list(word) and word and all(map(_is_id, word)) for word in self.bad_words_ids
        ):
            raise InputError(
                "bad_words_ids must be a list of lists of ids, none of them empty: got "
                f"bad_words_ids={self.bad_words_ids!r}"
            )
        eos: Any = self.eos_token_id
        if eos is not None and not (_is_id(eos) or (_is_list(eos) and all(map(_is_id, eos)))):
            raise InputError(f"eos_token_id must be an id or a list of ids: got eos_token_id={eos!r}")

    def _check_stop_strings(self) -> None:
        if not isinstance(self.stop_strings, str) and not _is_list(self.stop_strings):
            raise InputError(
                f"stop_strings must be a text or a list of texts: got stop_strings={self.stop_strings!r}"
            )
        for text in self.stops:
            if not isinstance(text, str) or not text:
                raise InputError(
                    f"stop_strings must be texts of at least one character: got {text!r} "
                    "(an answer that ends at once needs no model)"
                )

    def _check_constraint(self) -> None:
        if len(given := self._constraints()) > 1:
            raise InputError(f"{given[0]} and {given[1]} both say what the answer is: give one of them")
        if not _is_list(self.choices) or not all(isinstance(text, str) and text for text in self.choices):
            raise InputError(
                f"choices must be a list of texts, none of them empty: got choices={self.choices!r}"
            )
        if not isinstance(self.regex, str | None):
            raise InputError(f"regex must be a text: got regex={self.regex!r}")
        if not isinstance(self.json_schema, Mapping | str | None):
            raise InputError(
                f"json_schema must be a dictionary, or its JSON as text: got json_schema={self.json_schema!r}"
            )

    def _check_together(self) -> None:
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise InputError(
                f"min_new_tokens must be at most max_new_tokens: got min_new_tokens={self.min_new_tokens} "
                f"and max_new_tokens={self.max_new_tokens}"
            )
        if self.num_beams > 1 and self.do_sample:
            raise InputError(
                f"num_beams={self.num_beams} follows the likeliest beginnings and draws nothing: leave out "
                "do_sample, or num_beams"
            )
        if self.sinks and (self.window is None or self.sinks >= self.window):
            raise InputError(
                "sinks are the first tokens of a window, and fewer than it has: got "
                f"sinks={self.sinks}, window={self.window}"
            )
        if self.special:
            others = ["window"] if self.special != "window" and self.window is not None else []
            others += ["num_beams"] if self.num_beams > 1 else []
            others += [] if self.use_cache else ["use_cache"]
            for name in [*others, *self.reports]:
                raise InputError(
                    f"{name}={getattr(self, name)} does not go with {self.special}: leave out one"
                )
        if self.num_beams > 1 and self.reports:
            raise InputError(
                f"{self.reports[0]} is not available with num_beams={self.num_beams}: sequences_scores is"
            )
        if (
            self.num_return_sequences > 1
            and not self.do_sample
            and self.num_return_sequences > self.num_beams
        ):
            raise InputError(
                f"num_return_sequences={self.num_return_sequences} needs do_sample, or at least as many "
                f"beams: the likeliest tokens make one sequence, num_beams={self.num_beams}"
            )

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, whether one or several were given."""
        return (self.stop_strings,) if isinstance(self.stop_strings, str) else tuple(self.stop_strings)

    @property
    def constraint(self) -> str | None:
        """Which of choices, regex and json_schema says what the answer is."""
        return next(iter(self._constraints()), None)

    def _constraints(self) -> list[str]:
        return [name for name in _CONSTRAINTS if getattr(self, name) not in (None, (), [])]

    @property
    def special(self) -> str | None:
        """Which option makes rows be written one by one: guesses, or else a window."""
        names = ("prompt_lookup_num_tokens", "window")
        return next((name for name in names if getattr(self, name) is not None), None)

    @property
    def reports(self) -> list[str]:
        """The names of the outputs that were asked for."""
        asked = [name for name in _SWITCHES if name.startswith("output_") and getattr(self, name)]
        return asked if self.logprobs is None else [*asked, "logprobs"]

    @property
    def wanted(self) -> int:
        """New tokens, at most, where the model has room for them."""
        return DEFAULT_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens

    def limit(self, prompt_length: int, context: int) -> int:
        """New tokens that this prompt may get, at most, from a model that reads `context` tokens."""
        return self.wanted if self.window is not None else min(self.wanted, context - prompt_length)

    def check_model(self, vocab_size: int, context: int) -> None:
        """Raise InputError where the options do not fit a model's vocabulary or its longest sequence."""
        for name in ("max_new_tokens", "min_new_tokens"):
            value = getattr(self, name)
            if value is not None and value >= context and self.window is None:
                raise InputError(
                    f"{name}={value} can never be reached: the model reads block_size={context} tokens, "
                    f"prompt included, so at most {context - 1} can be new"
                )
        if self.window is not None and self.window >= context:
            raise InputError(
                f"window must be fewer tokens than the model reads, block_size={context}: got "
                f"window={self.window}"
            )
        if self.logprobs is not None and self.logprobs > vocab_size:
            raise InputError(f"logprobs must be at most {vocab_size}, the vocabulary: got {self.logprobs}")
        check_ids("logit_bias", self.logit_bias or (), vocab_size)
        for word in self.bad_words_ids:
            check_ids("bad_words_ids", word, vocab_size)
        if self.eos_token_id is not None:
            check_ids("eos_token_id", id_list(self.eos_token_id), vocab_size)


_WHOLE = {  # name -> the least value
    "max_new_tokens": 1, "min_new_tokens": 0, "top_k": 0, "no_repeat_ngram_size": 0, "num_beams": 1,
    "num_return_sequences": 1, "seed": 0, "logprobs": 0, "window": 1, "sinks": 0,
    "prompt_lookup_num_tokens": 1, "max_matching_ngram_size": 1, "num_assistant_tokens": 1,
}  # fmt: skip
_CACHES = ("static", "quantized")
_CONSTRAINTS = ("choices", "regex", "json_schema")
_MAY_BE_NONE = ("max_new_tokens", "seed", "logprobs", "window", "prompt_lookup_num_tokens")
_SWITCHES = (
    "do_sample", "use_cache", "output_scores", "output_logits", "output_hidden_states", "output_attentions",
)  # fmt: skip


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def id_list(ids: int | Sequence[int] | None) -> list[int]:
    """One id, several, or none, as a list."""
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


def check_ids(name: str, ids: Collection[Any], vocab_size: int) -> None:
    """Raise InputError for an id that the vocabulary does not have."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise InputError(f"{name} has the id {token}: the vocabulary's are 0 to {vocab_size - 1}")
