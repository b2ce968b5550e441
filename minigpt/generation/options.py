"""All options of generation: one frozen dataclass, which checks its values.

    GenerationOptions(max_new_tokens=32, do_sample=True, top_p=0.9, stop_strings=["\\n"])

Names and meanings are as in Hugging Face's `generate`, if it has the option. `presence_penalty`,
`frequency_penalty`, `logit_bias` and `logprobs` come from OpenAI and vLLM; `seed`, `window` and `sinks`
are minigpt's own. Four defaults differ from Hugging Face's:

- `top_k` is 0 (off), not 50, so that plain sampling draws from the model's distribution;
- without `max_new_tokens`, an answer has at most 128 tokens (Hugging Face: 20 tokens, prompt included);
- `max_matching_ngram_size` is 3, not 2;
- `num_assistant_tokens` is 4, not 20.
"""

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NoReturn

from minigpt.errors import InputError, check_ranges

__all__ = ["DEFAULT_NEW_TOKENS", "PAIRS", "GenerationOptions", "check_ids", "id_list", "refuse_pair"]

DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True)
class GenerationOptions:
    """Options of generation: how tokens are chosen, how many, when to stop, and what is returned.

    Raises:
        InputError: if a value is out of range, or two options contradict each other.
    """

    RANGES: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "max_new_tokens": (1, 10**9),
        "min_new_tokens": (0, 10**9),
        # The lowest temperature, 1e-6: scores divided by it are still finite in float32. At this temperature,
        # sampling nearly always takes the most likely token.
        "temperature": (1e-6, 1e6, "do_sample=False takes the most likely token"),
        "top_k": (0, 10**9),
        "top_p": (1e-12, 1.0),
        "min_p": (0.0, 1.0),
        "typical_p": (1e-12, 1.0),
        "repetition_penalty": (1e-6, 1e6),
        "no_repeat_ngram_size": (0, 10**9),
        "presence_penalty": (-1e6, 1e6),
        "frequency_penalty": (-1e6, 1e6),
        "num_beams": (1, 1000),
        "length_penalty": (-1000.0, 1000.0),
        "num_return_sequences": (1, 10**5),
        "seed": (0, 2**63 - 1),
        "window": (1, 10**9),
        "sinks": (0, 10**9),
        "prompt_lookup_num_tokens": (1, 1000),
        "max_matching_ngram_size": (1, 1000),
        "num_assistant_tokens": (1, 1000),
        "max_cache_mib": (1e-6, 1e12),
        "logprobs": (0, 10**9),
    }

    # Number of tokens
    max_new_tokens: int | None = None
    """tokens of an answer, at most; left out: up to 128, fewer if the model has no room for more"""
    min_new_tokens: int = 0
    """tokens of an answer, at least"""

    # Greedy or sampled tokens
    do_sample: bool = False
    """draw each token at random; without, the most likely one is taken"""

    # Sampling, with do_sample
    temperature: float = 1.0
    """below 1 likely tokens gain, above 1 they lose"""
    top_k: int = 0
    """draw among the k most likely tokens only; 0: among all"""
    top_p: float = 1.0
    """draw among the most likely tokens whose probabilities add up to this"""
    min_p: float = 0.0
    """draw among tokens at least this times as likely as the most likely one; 0: off"""
    typical_p: float = 1.0
    """draw among the least surprising tokens whose probabilities add up to this"""

    # Penalties
    repetition_penalty: float = 1.0
    """above 1: tokens that the question or the answer has become less likely"""
    no_repeat_ngram_size: int = 0
    """that many tokens in a row never come twice, question included; 0: off"""
    presence_penalty: float = 0.0
    """taken from the score of each token that the answer has"""
    frequency_penalty: float = 0.0
    """the same, times how often the answer has it"""

    # Preferred, forbidden and ending tokens
    logit_bias: Mapping[int, float] | None = None
    """id -> number that is added to the score of this id"""
    bad_words_ids: Sequence[Sequence[int]] = ()
    """sequences of ids that must not come"""
    eos_token_id: int | Sequence[int] | None = None
    """ids that end an answer; None: the tokenizer's own"""
    stop_strings: str | Sequence[str] = ()
    """texts that end an answer, and do not belong to it: one or several"""
    choices: Sequence[str] = ()
    """the answer is one of these texts"""
    regex: str | None = None
    """the answer is a text that this regular expression matches as a whole"""
    json_schema: Mapping[str, Any] | str | None = None
    """the answer is JSON that fits this JSON Schema"""

    # Several answers
    num_beams: int = 1
    """above 1: beam search, which follows that many beginnings at once"""
    length_penalty: float = 1.0
    """with num_beams: above 1 favours long answers, below 1 short ones"""
    early_stopping: bool | Literal["never"] = False
    """with num_beams: stop as soon as that many answers are finished"""
    num_return_sequences: int = 1
    """with do_sample or num_beams: that many answers to each question, a line each"""
    seed: int | None = None
    """with do_sample: same seed, same answers"""

    # Context, speed and memory
    window: int | None = None
    """when the model's context is full: keep that many tokens and continue; left out: end there"""
    sinks: int = 0
    """with window: that many of its tokens are the text's first ones"""
    prompt_lookup_num_tokens: int | None = None
    """same answers, sooner where they repeat the question or themselves: guess so many tokens from there"""
    max_matching_ngram_size: int = 3
    """with prompt_lookup_num_tokens: so many last tokens are looked for first, then fewer"""
    num_assistant_tokens: int = 4
    """with assistant_model: guesses at a time"""
    use_cache: bool = True
    """keep the keys and values of earlier tokens; without, all is computed anew, in one layer's memory"""
    max_cache_mib: float | None = None
    """refuse to start where keys and values of one batch take more MiB; left out: no limit"""

    # Outputs besides the ids
    output_scores: bool = False
    """the scores from which each token was chosen, after penalties, filters and constraints"""
    output_logits: bool = False
    """the model's own scores"""
    output_hidden_states: bool = False
    """the output of each layer"""
    output_attentions: bool = False
    """the attention weights of each layer"""
    logprobs: int | None = None
    """log-probabilities: of the chosen tokens and of the n most likely ones"""

    def __post_init__(self) -> None:
        check_ranges(type(self), vars(self))
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be True or False: got {name}={getattr(self, name)!r}")
        early = self.early_stopping
        if not (isinstance(early, bool) or early == "never"):
            raise InputError(f'early_stopping must be True, False or "never": got early_stopping={early!r}')
        self._check_ids()
        self._check_stop_strings()
        self._check_constraint()
        self._check_pairs()

    def _check_ids(self) -> None:
        bias = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(bias, Mapping):
            raise InputError(f"logit_bias must be a dictionary, id -> number: got logit_bias={bias!r}")
        for token, value in bias.items():
            # NaN < inf is False, so this also refuses NaN
            if not (_is_id(token) and _is_number(value) and value < math.inf):
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

    def _check_pairs(self) -> None:
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise InputError(
                f"min_new_tokens must be at most max_new_tokens: got min_new_tokens={self.min_new_tokens} "
                f"and max_new_tokens={self.max_new_tokens}"
            )
        if self.sinks and (self.window is None or self.sinks >= self.window):
            raise InputError(
                "sinks are the first tokens of a window, and fewer than it has: got "
                f"sinks={self.sinks}, window={self.window}"
            )
        if self.num_beams > 1:
            others = ["do_sample"] if self.do_sample else []
            others += [] if self.prompt_lookup_num_tokens is None else ["prompt_lookup_num_tokens"]
            for name in [*others, *self.reports]:
                refuse_pair("num_beams", self.num_beams, name)
        most = self.num_return_sequences
        if most > 1 and not self.do_sample and most > self.num_beams:
            raise InputError(
                f"num_return_sequences={most} needs do_sample, or at least as many beams: the most likely "
                f"tokens make one sequence, num_beams={self.num_beams}"
            )

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop_strings,) if isinstance(self.stop_strings, str) else tuple(self.stop_strings)

    @property
    def constraint(self) -> str | None:
        """Name of the option that constrains the answer: choices, regex or json_schema; or None."""
        return next(iter(self._constraints()), None)

    def _constraints(self) -> list[str]:
        return [name for name in _CONSTRAINTS if getattr(self, name) not in (None, (), [])]

    @functools.cached_property
    def changes_scores(self) -> bool:
        """True if penalties, biases or forbidden tokens change the scores."""
        # `or None`: an empty list or dictionary means the same as None
        return any((getattr(self, name) or None) != (off or None) for name, off in _PROCESSORS.items())

    @property
    def reports(self) -> list[str]:
        """Names of the additional outputs that the options select, such as "output_scores"."""
        asked = [name for name in _REPORTS if getattr(self, name)]
        return asked if self.logprobs is None else [*asked, "logprobs"]

    @property
    def wanted(self) -> int:
        """Number of new tokens that the options allow, even if the model's context is too short for them."""
        return DEFAULT_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens

    def limit(self, prompt_length: int, context: int) -> int:
        """Return the largest number of new tokens for a prompt, in a model with `context` positions.

        If the option `window` is set, the context does not limit the number.
        """
        return self.wanted if self.window is not None else min(self.wanted, context - prompt_length)

    def check_model(self, vocab_size: int, context: int) -> None:
        """Raise InputError if the options do not fit a model's vocabulary or context."""
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


_CONSTRAINTS = ("choices", "regex", "json_schema")
_PROCESSORS = {  # option that changes scores (logits_processors.py) -> the value that switches it off
    name: getattr(GenerationOptions, name)
    for name in (
        *("min_new_tokens", "repetition_penalty", "no_repeat_ngram_size", "presence_penalty"),
        *("frequency_penalty", "logit_bias", "bad_words_ids"),
    )
}
_REPORTS = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")
_SWITCHES = ("do_sample", "use_cache", *_REPORTS)
# Two options that cannot be used together -> the reason. "guesses" and "reports" stand for several options
# each (see refuse_pair). docs/sampling.md has the same table.
PAIRS = {
    ("num_beams", "do_sample"): "beam search takes the most likely sequences and draws nothing",
    ("num_beams", "guesses"): "a guess follows one sequence, beams compare several",
    ("num_beams", "reports"): "a step of beam search belongs to several sequences; sequences_scores is there",
    ("assistant_model", "prompt_lookup_num_tokens"): "both guess the same tokens",
}


def refuse_pair(name: str, value: object, other: str) -> NoReturn:
    """Raise InputError for two options that cannot be used together. The message says why."""
    kind = "guesses" if other in ("prompt_lookup_num_tokens", "assistant_model") else "reports"
    reason = PAIRS.get((name, other)) or PAIRS[name, kind]
    shown = name if value is None else f"{name}={value}"
    raise InputError(f"{shown} does not go with {other}: {reason}; leave out one")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def id_list(ids: int | Sequence[int] | None) -> list[int]:
    """Convert one id, several ids, or None (no id) to a list of ids."""
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


def check_ids(name: str, ids: Collection[Any], vocab_size: int) -> None:
    """Raise InputError if an id is not in the vocabulary."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise InputError(f"{name} has the id {token}: the vocabulary's are 0 to {vocab_size - 1}")
