"""How large a model and how many steps: arithmetic, without a clock."""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.dial import fit
from minigpt.data.ngrams import ngram_losses
from minigpt.errors import InputError
from minigpt.training import estimate as report
from minigpt.training import sizing
from minigpt.training.config import TrainConfig, read_recipe
from minigpt.training.measuring import LAW_RECIPES, Machine, facts_of, law_settings
from minigpt.training.run_data import read_data
from minigpt.training.sizing import LAWS, Candidate, Facts, Law, choose, parse_size, worth
from tests.runs import config, trainer, write_data

quick = settings(derandomize=True, deadline=None, max_examples=60)
FACTS = Facts(
    kind="text",
    unique=1_000_000,
    steps_per_epoch=500,
    tokens_per_step=2000,
    vocab_size=65,
    yardstick=1.6,
    unigram=3.3,
    epochs=16.0,
)
# on a machine that does a step of the n-th shape in n hundredths of a second
MACHINE = [
    Candidate(shape, 12 * shape.n_layer * shape.n_embd**2, step=0.01 * n, evaluation=0.1 * n)
    for n, shape in enumerate(sizing.LADDER, 1)
]
MINUTES = parse_size("10min")


# -- what cannot be asked for -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0min", "size must be above 0 and at most 720h: got size=0min"),
        ("-3", "size must be small, base, large, a time"),
        ("-3min", "size must be small, base, large, a time"),
        ("banana", "got size=banana"),
        ("10", "size=10 has no unit: write 10min, 10h or 10GFLOP"),
        ("1e30GFLOP", "at most 1e15GFLOP: got size=1e30GFLOP"),
        ("1e999GFLOP", "at most 1e15GFLOP"),
        ("1e-999s", "above 0"),
        ("nanmin", "got size=nanmin"),
        ("10 parsecs", "got size=10 parsecs"),
        ("1_0min", "got size=1_0min"),
        ("١min", "got size=١min"),
        ("9999h", "at most 720h"),
    ],
)
def test_a_bad_size_is_named(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_size(text)
    with pytest.raises(InputError, match=message):
        TrainConfig(size=text)


def test_sizes() -> None:
    forms = (("10min", "10m", "600s", "10 MIN"), ("2h", "120min"))
    same = [{parse_size(text).amount for text in texts} for texts in forms]
    assert same == [{600.0}, {7200.0}]
    assert parse_size("2e6GFLOP").amount == parse_size("2PFLOP").amount == 2e15
    assert [parse_size(name).unit for name in ("small", "Base", "large")] == ["name"] * 3


def test_a_budget_for_less_than_some_steps_is_none() -> None:
    assert choose(MINUTES, 0.0, FACTS, MACHINE) is None
    assert choose(MINUTES, -5.0, FACTS, MACHINE) is None
    # 20 steps of the smallest shape are 0.2 s, its evaluation 0.1 s
    assert choose(MINUTES, 0.29, FACTS, MACHINE) is None
    plan = choose(MINUTES, 0.31, FACTS, MACHINE)
    assert plan is not None
    assert (plan.shape, plan.steps) == (sizing.LADDER[0], 21)


# -- the choice ---------------------------------------------------------------------------------------------


@quick
@given(st.floats(0.5, 1e7), st.integers(50, 10**8))
def test_the_choice_is_the_best_that_the_budget_pays(budget: float, unique: int) -> None:
    facts = dataclasses.replace(FACTS, unique=unique, steps_per_epoch=max(1.0, unique / 2000))
    plan = choose(MINUTES, budget, facts, MACHINE)
    assert plan is not None
    costs = {c.shape: c for c in MACHINE}
    evaluations = math.ceil(plan.steps / plan.eval_steps)
    cost = plan.steps * costs[plan.shape].step + evaluations * costs[plan.shape].evaluation
    assert cost == pytest.approx(plan.cost)
    assert cost <= budget * (1 + 1e-9)
    assert 1 <= evaluations <= sizing.EVALUATIONS
    assert plan.steps <= sizing.most_steps(facts)
    assert plan.parameters <= max(32 * unique, MACHINE[0].parameters)
    # each shape for itself: none has a lower expected loss
    alone = [p for c in MACHINE if c.parameters <= 32 * unique and (p := choose(MINUTES, budget, facts, [c]))]
    law = LAWS["text"]
    losses = [law.loss(facts, p.parameters, p.tokens) for p in alone]
    assert law.loss(facts, plan.parameters, plan.tokens) <= min(losses, default=math.inf)


def test_more_time_never_means_a_smaller_model_or_fewer_tokens_of_it() -> None:
    plans = [choose(MINUTES, 2.0**n, FACTS, MACHINE) for n in range(14)]
    for less, more in itertools.pairwise(plans):
        assert less is not None
        assert more is not None
        assert more.parameters >= less.parameters
        if more.parameters == less.parameters:
            assert more.steps >= less.steps


def test_data_limits_the_steps() -> None:
    plan = choose(parse_size("1000GFLOP"), 1e9, FACTS, MACHINE)
    assert plan is not None
    assert plan.limited_by_data
    assert (plan.steps, plan.epochs) == (16 * 500, 16.0)


def test_a_name_is_its_shape_and_twenty_tokens_a_parameter() -> None:
    shape = sizing.NAMED["small"]
    plan = choose(parse_size("small"), 0.0, FACTS, [Candidate(shape, 100_000, 1.0, 1.0)])
    assert plan is not None
    assert (plan.shape, plan.steps, plan.eval_steps) == (shape, 20 * 100_000 // 2000, 100)
    given_steps = choose(parse_size("small"), 0.0, FACTS, [Candidate(shape, 100_000, 1.0, 1.0)], steps=70_000)
    assert given_steps is not None
    assert given_steps.steps == 70_000
    assert not given_steps.limited_by_data


def test_no_number_without_a_basis() -> None:
    law = LAWS["text"]
    inside = Candidate(sizing.LADDER[1], int(law.parameters[0] * 1.5), 1.0, 0.1)
    steps = round(law.tokens[0] * 1.5 / FACTS.tokens_per_step)

    def expected(facts: Facts, steps: int) -> sizing.Plan:
        plan = choose(parse_size("small"), 0.0, facts, [inside], steps=steps)
        assert plan is not None
        return plan

    plan = expected(FACTS, steps)
    assert plan.loss is not None
    assert plan.low == pytest.approx(plan.loss * (1 - law.error))
    assert plan.high == pytest.approx(plan.loss * (1 + law.error))
    further = expected(FACTS, round(law.tokens[1] * 4 / FACTS.tokens_per_step))
    assert further.loss is not None
    assert further.high is not None
    assert further.high / further.loss - 1 > law.error * 1.9  # two doublings: half as much again each
    assert "times beyond" in further.basis
    assert expected(FACTS, round(law.tokens[1] * 100 / FACTS.tokens_per_step)).loss is None
    assert expected(dataclasses.replace(FACTS, no_law="other rates"), steps).basis == "other rates"
    templates = expected(dataclasses.replace(FACTS, yardstick=0.1), steps)
    assert (templates.loss, templates.low, templates.high) == (None, None, None)
    assert "more regular" in templates.basis


# -- the law ------------------------------------------------------------------------------------------------


def test_what_a_repetition_is_worth() -> None:
    assert worth(100, 1000) == 100
    assert worth(1000, 1000) == 1000
    assert worth(2000, 1000) == pytest.approx(1968, abs=1)  # by hand: 1 + 15.4 (1 - exp(-1 / 15.4)) = 1.968
    assert worth(1e12, 1000) == pytest.approx(16_400)
    values = [worth(tokens, 1000) for tokens in range(100, 50_000, 100)]
    assert values == sorted(values)


def test_the_fit_finds_the_law_that_made_the_rows() -> None:
    truth = Law(0.8, 0.05, 0.4, 0.02, 0.6, 0.5, 0.0, (1e5, 3e6), (1e5, 3e6), (0.5, 0.8))
    rows: list[dict[str, Any]] = []
    for yardstick, vocab_size in ((1.6, 65), (2.4, 4000)):
        facts = dataclasses.replace(FACTS, yardstick=yardstick, vocab_size=vocab_size)
        for N, D in itertools.product((1e5, 5e5, 3e6), (1e5, 5e5, 3e6)):
            row = {
                "kind": "text",
                "parameters": N,
                "tokens": D,
                "unique": facts.unique,
                "unigram": facts.unigram,
            }
            rows.append(
                {**row, "yardstick": yardstick, "vocab_size": vocab_size, "loss": truth.loss(facts, N, D)}
            )
    found = fit(rows)
    assert (found.floor, found.alpha, found.beta, found.gamma) == (0.8, 0.4, 0.6, 0.5)
    assert (found.a, found.b) == pytest.approx((0.05, 0.02), abs=1e-5)  # exact rows; a law of five digits
    assert found.error < 1e-3


# -- n-grams ------------------------------------------------------------------------------------------------


def test_ngrams_against_dictionaries() -> None:
    random = np.random.default_rng(0)
    train, val = random.integers(5, size=300), random.integers(6, size=80)  # 5 stands in val alone

    def probability(context: tuple[int, ...], token: int) -> float:
        """Witten and Bell, written out."""
        n = len(context)
        padded = [-1] * n + train.tolist()
        seen = [padded[i + n] for i in range(len(train)) if tuple(padded[i : i + n]) == context]
        shorter = 1 / 6 if n == 0 else probability(context[1:], token)
        if not seen:
            return shorter
        return (seen.count(token) + len(set(seen)) * shorter) / (len(seen) + len(set(seen)))

    counted = random.random(80) < 0.5
    got = ngram_losses(train, val, 6, counted, orders=3)
    padded = [-1, -1, *val.tolist()]
    for order, loss in enumerate(got, 1):
        terms = [
            -math.log(probability(tuple(padded[i + 3 - order : i + 2]), padded[i + 2]))
            for i in np.flatnonzero(counted)
        ]
        assert loss == pytest.approx(np.mean(terms), rel=1e-9)
    assert len(got) >= 2


# -- facts and costs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt", "qwen3"])
def test_counted_costs_are_those_of_the_model(tmp_path: Path, family: str) -> None:
    write_data(tmp_path)
    settings = config(tmp_path, family=family, dropout=0.0, loss_on="answer")
    run = trainer(settings)
    found = Machine(settings, run.data).counted(sizing.Shape(2, 32, 2))
    matrices = sum(p.numel() for p in run.model.blocks.parameters() if p.dim() == 2)
    vectors = sum(p.numel() for p in run.model.parameters() if p.dim() < 2)
    assert matrices <= found.parameters <= matrices + vectors
    shapes = run.data.shapes(run.step.plan, 0)
    share = run.data.train.answer_share
    flops = sum(report.batch_flops(run, rows, width - 1, share) for rows, width in shapes) / len(shapes)
    assert found.step == pytest.approx(flops, rel=6 * vectors / (6 * matrices))


@pytest.mark.parametrize("kind", ["text", "answers"])
def test_laws_hold_for_the_recipes_that_the_dial_takes(kind: sizing.Kind) -> None:
    taken = dataclasses.replace(read_recipe(LAW_RECIPES[kind]), family="qwen3")
    assert sizing.LAW_SETTINGS[kind] == law_settings(taken), "fit the law again: benchmarks/dial.py"


def test_facts_of_questions_and_answers(tmp_path: Path) -> None:
    write_data(tmp_path)
    settings = config(tmp_path)
    data = read_data(settings)
    facts = facts_of(settings, data)
    assert facts.unique == sum(len(data.train.batch(np.array([row])).input_ids[0]) for row in range(8))
    assert facts.steps_per_epoch * facts.tokens_per_step == pytest.approx(facts.unique)
    halved = facts_of(dataclasses.replace(settings, gradient_accumulation_steps=2), data)
    assert halved.tokens_per_step == pytest.approx(2 * facts.tokens_per_step)
    assert "batch_size=64, here 4" in facts.no_law
    like: dict[str, Any] = {**sizing.LAW_SETTINGS["answers"], "block_size": 32, "dropout": 0.0}
    same = dataclasses.replace(settings, **like)
    assert facts_of(same, data).no_law == ""
    assert facts_of(dataclasses.replace(same, learning_rate=0.5), data).no_law.endswith("here 0.5")
