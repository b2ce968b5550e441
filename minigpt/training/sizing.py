"""How large a model, and how many steps: arithmetic from facts about data, machine and budget.

No clock, no torch, no file: facts in, a plan out. `minigpt.training.measuring` collects the facts.

The question is that of Hoffmann et al. (https://arxiv.org/abs/2203.15556): of a budget, how much goes into
parameters N, how much into tokens D? Theirs is answered by a law, loss = E + A / N^alpha + B / D^beta, and so
is ours; but here data is small and read many times over. A token's further readings are worth less and less
(https://arxiv.org/abs/2305.16264), and E differs from one small corpus to another: losses are measured on a
scale between those of counted single tokens and of n-grams (`minigpt.data.ngrams`). The law is tried on a
ladder of shapes; the best wins.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from minigpt.errors import InputError

__all__ = [
    "EPOCHS_OF_TEXT", "EVALUATIONS", "EVALUATION_SHARE", "LADDER", "LAWS", "LAW_SETTINGS", "LEAST_STEPS",
    "NAMED", "Candidate", "Facts", "Kind", "Law", "Plan", "Shape", "Size",
    "choose", "flops_per_token", "heads", "most_steps", "parse_size", "worth",
]  # fmt: skip

Kind = Literal["text", "answers"]

_FORMS = "small, base, large, a time (10min, 2h) or an amount of arithmetic (2e6GFLOP)"
_UNITS = {
    **dict.fromkeys(("s", "sec", "second", "seconds"), ("seconds", 1.0)),
    **dict.fromkeys(("m", "min", "minute", "minutes"), ("seconds", 60.0)),
    **dict.fromkeys(("h", "hour", "hours"), ("seconds", 3600.0)),
    **dict.fromkeys(("gflop", "gflops"), ("flops", 1e9)),
    **dict.fromkeys(("tflop", "tflops"), ("flops", 1e12)),
    **dict.fromkeys(("pflop", "pflops"), ("flops", 1e15)),
}
_MOST = {"seconds": (30 * 86400.0, "720h"), "flops": (1e24, "1e15GFLOP")}  # beyond: surely a slip

# A fifth of a step's rate is not a run: fewer steps than this are refused (Muon has hardly left its warm-up).
LEAST_STEPS = 20
# Evaluations: ten of a run, as without the dial, but no more than this share of the budget.
EVALUATIONS, EVALUATION_SHARE = 10, 0.1
# Hoffmann et al.'s tokens for each parameter, for the named sizes; the budgets follow the law below.
_TOKENS_PER_PARAMETER = 20
# Muennighoff et al.: the 15th repetition of a token is worth 1 / e of a new one.
_REPETITIONS = 15.4
EPOCHS_OF_TEXT = 16.0  # ... and beyond hardly anything was gained; of questions the recipe says how many
# More weights than this for each token to learn from are not offered. 22 learned the built-in corpus well
# (LOG.md: recipe qa-cpu, 3.1M in its blocks, 143,000 tokens); nothing larger was tried.
_PARAMETERS_PER_TOKEN = 32


@dataclass(frozen=True)
class Size:
    """What --size asks for."""

    unit: Literal["name", "seconds", "flops"]
    amount: float  # 0 for a name
    text: str


def parse_size(text: str) -> Size:
    """`small`, `base`, `large`, `10min`, `10m`, `2h`, `90s`, `2e6GFLOP`, ... -> Size.

    Raises:
        InputError: for anything else, an amount of 0, one without a unit, or one that no machine will do.

    >>> parse_size("10min").amount, parse_size("2e6GFLOP").amount
    (600.0, 2000000000000000.0)
    """
    plain = text.strip().lower()
    if plain in NAMED:
        return Size("name", 0.0, plain)
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?) *([a-z]*)", plain)
    if not found or (found[2] and found[2] not in _UNITS):
        raise InputError(f"size must be {_FORMS}: got size={text}")
    if not found[2]:
        raise InputError(f"size={text} has no unit: write {text}min, {text}h or {text}GFLOP")
    unit, factor = _UNITS[found[2]]
    amount = float(found[1]) * factor
    most, written = _MOST[unit]
    if not 0 < amount <= most:
        raise InputError(f"size must be above 0 and at most {written}: got size={text}")
    return Size("seconds" if unit == "seconds" else "flops", amount, text.strip())


@dataclass(frozen=True)
class Shape:
    """Layers, channels and heads of a model."""

    n_layer: int
    n_embd: int
    n_head: int

    def __str__(self) -> str:
        return f"{self.n_layer} x {self.n_embd}"


def heads(n_embd: int) -> int:
    """Heads of 32 channels, from a width of 256 on 64, as in the recipes; else the next number that divides.

    >>> heads(128), heads(512), heads(100)
    (4, 8, 2)
    """
    wanted = max(1, n_embd // (32 if n_embd < 256 else 64))
    return next((n for n in range(wanted, 0, -1) if n_embd % (2 * n) == 0), 1)


def _shape(n_layer: int, n_embd: int) -> Shape:
    return Shape(n_layer, n_embd, heads(n_embd))


LADDER = tuple(
    _shape(*sizes)
    for sizes in (
        *((2, 64), (3, 96), (4, 128), (4, 192), (4, 256), (6, 256), (6, 320), (6, 384), (8, 512), (12, 768)),
    )
)
NAMED = {"small": _shape(4, 128), "base": _shape(6, 256), "large": _shape(8, 512)}


def flops_per_token(parameters: int, shape: Shape, T: float, counted: float, vocab_size: int) -> float:
    """Forward and backward of a token: 6 a weight, attention to T tokens, lm_head where the loss counts.

    As `report.batch_flops`, for a model that is not there yet.

    Args:
        parameters: of the blocks, without embedding and lm_head.
        shape: layers and channels.
        T: tokens of a row.
        counted: share of the tokens that the loss counts.
        vocab_size: entries of the vocabulary.
    """
    return 6 * parameters + 12 * shape.n_layer * shape.n_embd * T + counted * 6 * vocab_size * shape.n_embd


# -- the law -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Law:
    """What is left of the way from single tokens' loss down to floor * n-grams' loss, and where that held.

    left = a (1e6 / N)^alpha + b (1e6 V^gamma / D)^beta for N weights in the blocks, D tokens, V entries of
    the vocabulary: the more of these, the longer it takes until each has been seen often enough.
    """

    floor: float
    a: float
    alpha: float
    b: float
    beta: float
    gamma: float
    error: float  # relative: of the range that is promised
    parameters: tuple[float, float]  # N, least and most that were measured
    tokens: tuple[float, float]  # D, likewise
    regularity: tuple[float, float]  # n-grams' loss / single tokens' loss, likewise

    def left(self, parameters: float, tokens: float, vocab_size: int) -> float:
        """The share of the way that is left after that many tokens, each of them new."""
        needed = 1e6 * vocab_size**self.gamma
        lack_of_weights = self.a * math.exp(self.alpha * math.log(1e6 / parameters))
        return lack_of_weights + self.b * math.exp(self.beta * math.log(needed / max(tokens, 1)))

    def loss(self, facts: "Facts", parameters: float, tokens: float) -> float:
        """Nats a token on held-out data after reading `tokens`, repeated ones too."""
        lowest = self.floor * facts.yardstick
        left = self.left(parameters, worth(tokens, facts.unique), facts.vocab_size)
        return lowest + (facts.unigram - lowest) * left

    def stretch(self, parameters: float, tokens: float) -> float:
        """How many times further than what was measured this is; 1 within."""
        outside = 1.0
        for value, (least, most) in ((parameters, self.parameters), (tokens, self.tokens)):
            outside = max(outside, least / max(value, 1e-9), value / most)
        return outside


def worth(tokens: float, unique: float) -> float:
    """How many new tokens as many readings of `unique` ones are worth (Muennighoff et al., equation 5).

    >>> worth(500, 1000), round(worth(4000, 1000)), round(worth(1e9, 1000))
    (500, 3726, 16400)
    """
    if tokens <= unique:
        return tokens
    repeated = tokens / unique - 1
    return unique + unique * _REPETITIONS * (1 - math.exp(-repeated / _REPETITIONS))


# python benchmarks/dial.py --rows benchmarks/results/2026-11-21-dial.json
# Runs of 2026-11-21, one thread of a busy AMD EPYC: tinyshakespeare, songci; two sets of Chinese questions
# and answers, with the medians of benchmarks/chinese_qa.py on one of them. Sixteen short runs of text and
# nineteen of answers, which their law meets within 1.2 and 5.5 % (nine of ten of them). `error` is what a
# user's own corpus has to fear: the mean error on one corpus of the law that was fitted to the other alone,
# in the worse direction.
LAWS: dict[Kind, Law] = {
    "text": Law(
        floor=0.7,
        a=0.04491,
        alpha=0.3,
        b=0.08804,
        beta=0.3,
        gamma=0.5,
        error=0.22,
        parameters=(97_728, 3_140_352),
        tokens=(100_283, 999_762),
        regularity=(0.509, 0.75),
    ),
    "answers": Law(
        floor=0.7,
        a=0.02426,
        alpha=0.7,
        b=0.00287,
        beta=0.5,
        gamma=1.0,
        error=0.11,
        parameters=(97_728, 3_140_352),
        tokens=(99_587, 2_942_447),
        regularity=(0.447, 0.497),
    ),
}
# So much more regular than all that was measured may data be. Templates (data/data.jsonl: 0.15) are learned
# by heart, and end far below what n-grams let expect.
_REGULAR = 0.8
# What the laws were measured with; under other settings there is no basis for a number.
_BOTH: dict[str, object] = {
    "gradient_accumulation_steps": 1,
    "optimizer": "muon",
    "learning_rate": 1e-2,
    "muon_learning_rate": 0.02,
    "lr_scheduler_type": "wsd",
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "tokenizer": "char",
    "family": "qwen3",
    "zero_projections": True,
    "min_lr_ratio": 0.0,
}
LAW_SETTINGS: dict[Kind, dict[str, object]] = {
    "text": _BOTH
    | {"batch_size": 16, "tokens_per_batch": 0, "loss_on": "all", "block_size": 64}
    | {"decay_ratio": 0.7, "muon_weight_decay": 0.01},
    "answers": _BOTH
    | {"batch_size": 64, "tokens_per_batch": 2048, "loss_on": "answer", "block_size": 256}
    | {"decay_ratio": 0.8, "muon_weight_decay": 0.1},
}
_FURTHEST = 10.0  # times beyond what was measured; from there on no loss is predicted


# -- facts in, a plan out ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What the dial knows about the data, under the recipe's batches."""

    kind: Kind
    unique: int  # tokens to learn from, once through
    steps_per_epoch: float
    tokens_per_step: float  # real ones, without padding
    vocab_size: int
    yardstick: float  # nats a token of the best counted n-gram on the validation part
    unigram: float  # nats a token of the counted frequencies alone
    epochs: float  # at most: the recipe's, or where repeating gains hardly anything
    no_law: str = ""  # why the law does not hold here; empty: it does


@dataclass(frozen=True)
class Candidate:
    """A shape and what it costs, in the budget's unit (seconds or FLOPs) or seconds for a name."""

    shape: Shape
    parameters: int  # N: of the blocks
    step: float  # cost of a step
    evaluation: float  # cost of one evaluation
    memory: int = 0  # bytes; 0: not known


@dataclass(frozen=True)
class Plan:
    """What was chosen, and what is expected of it."""

    shape: Shape
    parameters: int
    steps: int
    eval_steps: int
    tokens: float  # read, repeated ones too
    epochs: float
    cost: float  # of steps and evaluations, in the candidate's unit
    limited_by_data: bool  # more steps would repeat the data more often than helps
    loss: float | None  # expected; None: there is no basis for a number
    low: float | None
    high: float | None
    basis: str  # where the expectation comes from, or why there is none


def most_steps(facts: Facts) -> int:
    """Steps after which more would only repeat the data."""
    return max(1, math.floor(facts.epochs * facts.steps_per_epoch))


def choose(
    size: Size, budget: float, facts: Facts, candidates: Sequence[Candidate], steps: int = 0
) -> Plan | None:
    """The candidate with the lowest expected loss within the budget; None where none can do enough steps.

    Args:
        size: what was asked for.
        budget: seconds or FLOPs that may be spent; of no meaning for a name.
        facts: of the data.
        candidates: of a name exactly one; in the budget's unit.
        steps: of a name, if they are given; 0: they are not.
    """
    fitting = [c for c in candidates if c.parameters <= _PARAMETERS_PER_TOKEN * facts.unique] or candidates[
        :1
    ]
    plans = [plan for c in fitting if (plan := _plan(size, budget, facts, c, steps))]
    law = LAWS[facts.kind]  # a ranking needs less than a number: it is made even where none is printed
    return min(
        plans,
        key=lambda plan: (law.loss(facts, plan.parameters, plan.tokens), plan.parameters),
        default=None,
    )


def _plan(size: Size, budget: float, facts: Facts, candidate: Candidate, given: int) -> Plan | None:
    most = given or most_steps(facts)
    if size.unit == "name":
        wanted = given or math.ceil(_TOKENS_PER_PARAMETER * candidate.parameters / facts.tokens_per_step)
        evaluations = EVALUATIONS
    else:
        affordable = EVALUATION_SHARE * budget / max(candidate.evaluation, 1e-12)
        evaluations = max(1, min(EVALUATIONS, math.floor(affordable)))
        wanted = math.floor((budget - evaluations * candidate.evaluation) / candidate.step)
    if wanted < min(LEAST_STEPS, most):
        return None
    steps = min(wanted, most)
    eval_steps = math.ceil(steps / evaluations)
    tokens = steps * facts.tokens_per_step
    loss, low, high, basis = _expected(facts, candidate, tokens)
    return Plan(
        shape=candidate.shape,
        parameters=candidate.parameters,
        steps=steps,
        eval_steps=eval_steps,
        tokens=tokens,
        epochs=steps / facts.steps_per_epoch,
        cost=steps * candidate.step + math.ceil(steps / eval_steps) * candidate.evaluation,
        limited_by_data=wanted > most,
        loss=loss,
        low=low,
        high=high,
        basis=basis,
    )


def _expected(
    facts: Facts, candidate: Candidate, tokens: float
) -> tuple[float | None, float | None, float | None, str]:
    if facts.no_law:
        return None, None, None, facts.no_law
    law = LAWS[facts.kind]
    regularity = facts.yardstick / facts.unigram
    if not _REGULAR * law.regularity[0] <= regularity <= law.regularity[1] / _REGULAR:
        than = "more regular" if regularity < law.regularity[0] else "less regular"
        return None, None, None, f"this data is {than} than all that was measured"
    stretch = law.stretch(candidate.parameters, tokens)
    if stretch > _FURTHEST:
        return None, None, None, f"{stretch:,.0f} times beyond what was measured"
    loss = law.loss(facts, candidate.parameters, tokens)
    # each doubling of the distance is trusted half as much again; beyond what was measured nothing is known
    error = law.error * (1 + 0.5 * math.log2(stretch))
    basis = (
        "small runs on several corpora" if stretch == 1 else f"{stretch:.1f} times beyond what was measured"
    )
    return loss, loss * (1 - error), loss * (1 + error), basis
