"""Penalties and forbidden tokens equal transformers' to the bit, for any ids, and ignore padding."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minigpt.generation.logits_processors import (
    NO_TOKEN,
    add_bias,
    apply_frequency_penalty,
    apply_presence_penalty,
    apply_repetition_penalty,
    forbid,
    forbid_repeated_ngrams,
    forbid_words,
    make_processors,
)
from minigpt.generation.options import GenerationOptions

INF = math.inf
B, V = 4, 7  # few tokens, so that they repeat


def random_case(seed: int, S: int = 12) -> tuple[Tensor, Tensor]:
    """Return logits (B, V), of which some are -inf (in one row all except one), and ids (B, S)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(B, V, generator=generator)
    logits[0, torch.randperm(V, generator=generator)[: V - 1]] = -INF
    logits[1, 2:4] = -INF
    return logits, torch.randint(0, V, (B, S), generator=generator)


@pytest.fixture(scope="module")
def theirs() -> Any:
    return pytest.importorskip(
        "transformers.generation.logits_process", reason="transformers is the oracle here"
    )


SEEDS = pytest.mark.parametrize("seed", range(8))
LENGTHS = pytest.mark.parametrize("S", [1, 2, 12])


# -- against transformers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [{}, {"bad_words_ids": []}, {"logit_bias": {}}, {"min_new_tokens": 0}, {"repetition_penalty": 1}],
)
def test_options_that_ask_for_nothing_change_no_scores(values: dict[str, Any]) -> None:
    assert not GenerationOptions(**values).changes_scores  # a GPU chooses the token then
    assert GenerationOptions(**{**values, "presence_penalty": -0.5}).changes_scores


@SEEDS
@LENGTHS
@pytest.mark.parametrize("penalty", [0.5, 1.3, 5.0])
def test_repetition_penalty_is_transformers(theirs: Any, seed: int, S: int, penalty: float) -> None:
    logits, ids = random_case(seed, S)
    expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    assert torch.equal(apply_repetition_penalty(logits, ids, penalty), expected)


@SEEDS
@LENGTHS
@pytest.mark.parametrize("size", [1, 2, 3, 13])
def test_no_repeated_ngrams_is_transformers(theirs: Any, seed: int, S: int, size: int) -> None:
    logits, ids = random_case(seed, S)
    expected = theirs.NoRepeatNGramLogitsProcessor(size)(ids, logits)
    assert torch.equal(forbid_repeated_ngrams(logits, ids, size), expected)


@SEEDS
@LENGTHS
@pytest.mark.parametrize(
    "words", [[[3]], [[3], [1], [3]], [[0, 1], [1, 0], [2, 2, 2]], [[5], [5, 6], [4] * 13]]
)
def test_bad_words_are_transformers(theirs: Any, seed: int, S: int, words: list[list[int]]) -> None:
    logits, ids = random_case(seed, S)
    expected = theirs.NoBadWordsLogitsProcessor(words)(ids, logits)
    assert torch.equal(forbid_words(logits, ids, words), expected)


@SEEDS
@pytest.mark.parametrize("bias", [{3: 2.5}, {0: -100.0, 6: 0.25, 2: -INF}])
def test_bias_is_transformers(theirs: Any, seed: int, bias: dict[int, float]) -> None:
    logits, ids = random_case(seed)
    expected = theirs.SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])(
        ids, logits
    )
    (process,) = make_processors(GenerationOptions(logit_bias=bias), [], V, torch.device("cpu"))
    assert torch.equal(process(logits, ids, 0), expected)


@SEEDS
@pytest.mark.parametrize("eos", [[1], [1, 4, 6]])
@pytest.mark.parametrize("new", [0, 2, 3, 9])
def test_min_new_tokens_is_transformers(theirs: Any, seed: int, eos: list[int], new: int) -> None:
    logits, ids = random_case(seed)
    expected = theirs.MinNewTokensLengthLogitsProcessor(12 - new, 3, eos)(ids, logits)
    (process,) = make_processors(GenerationOptions(min_new_tokens=3), eos, V, torch.device("cpu"))
    assert torch.equal(process(logits, ids, new), expected)


def test_the_comparisons_above_meet_what_they_compare() -> None:
    """Otherwise equal results could be unchanged ones: in many cases, more tokens must be forbidden."""
    cases = [random_case(seed) for seed in range(8)]
    changes: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
        lambda logits, ids: forbid_repeated_ngrams(logits, ids, 2),
        lambda logits, ids: forbid_words(logits, ids, [[0, 1], [1, 0], [2, 2, 2]]),
        lambda logits, ids: apply_repetition_penalty(logits, ids, 1.3),
    )
    for change in changes:
        assert sum(not torch.equal(change(*case), case[0]) for case in cases) >= 4


# -- by hand ------------------------------------------------------------------------------------------------


def test_penalties_by_hand() -> None:
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0, 0.0]])
    ids = torch.tensor([[0, 1, 1, 0, 0]])
    assert apply_repetition_penalty(logits, ids, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0, 0.0]]
    assert apply_presence_penalty(logits, ids, 0.5).tolist() == [[1.5, -2.5, 2.0, -2.0, 0.0]]
    assert apply_frequency_penalty(logits, ids, 0.5).tolist() == [[0.5, -3.0, 2.0, -2.0, 0.0]]
    assert apply_frequency_penalty(logits, ids, -1.0).tolist() == [[5.0, 0.0, 2.0, -2.0, 0.0]]
    assert add_bias(logits, torch.tensor([0.0, 1.0, 0.0, 0.0, -INF])).tolist() == [
        [2.0, -1.0, 2.0, -2.0, -INF]
    ]
    assert forbid(logits, [1, 4]).isfinite().tolist() == [[True, False, True, True, False]]
    assert forbid(logits, []).equal(logits)
    # 0 1 1 0 0: what followed 0 were 1 and 0, what followed 0 0 is not known
    assert forbid_repeated_ngrams(logits, ids, 2).isfinite().tolist() == [[False, False, True, True, True]]
    assert forbid_repeated_ngrams(logits, ids, 3).isfinite().all()


@SEEDS
def test_presence_and_frequency_count_the_answer_alone(seed: int) -> None:
    logits, ids = random_case(seed)
    for name in ("presence_penalty", "frequency_penalty"):
        values: dict[str, Any] = {name: 0.5}
        (process,) = make_processors(
            dataclasses.replace(GenerationOptions(), **values), [], V, torch.device("cpu")
        )
        assert process(logits, ids, 0).equal(logits)
        for new in (1, 5, 12):
            expected = logits.clone()
            for row, column in ((row, column) for row in range(B) for column in range(V)):
                count = ids[row, 12 - new :].tolist().count(column)
                expected[row, column] -= 0.5 * (count if name == "frequency_penalty" else min(count, 1))
            assert process(logits, ids, new).equal(expected)


# -- padding and order --------------------------------------------------------------------------------------

ALL = GenerationOptions(
    max_new_tokens=9, min_new_tokens=5, repetition_penalty=1.3, no_repeat_ngram_size=2, presence_penalty=0.3,
    frequency_penalty=0.2, logit_bias={2: 1.5}, bad_words_ids=[[3], [0, 1], [4, 4, 4, 4, 4, 4]],
)  # fmt: skip


@SEEDS
def test_a_padded_row_is_treated_as_alone(seed: int) -> None:
    logits, ids = random_case(seed)
    padded = ids.clone()
    lengths = [12, 7, 3, 1]
    for row, length in enumerate(lengths):
        padded[row, : 12 - length] = NO_TOKEN
    for process in make_processors(ALL, [6], V, torch.device("cpu")):
        together = process(logits, padded, 1)
        for row, length in enumerate(lengths):
            alone = process(logits[row : row + 1], ids[row : row + 1, 12 - length :], 1)
            assert together[row].equal(alone[0])


@SEEDS
def test_the_order_is_transformers(theirs: Any, seed: int) -> None:
    """The order is that of transformers' generate: bias, repetition, n-grams, bad words, minimum length."""
    logits, ids = random_case(seed)
    options = GenerationOptions(
        min_new_tokens=5, repetition_penalty=1.3, no_repeat_ngram_size=2, logit_bias={2: 1.5, 0: -0.7},
        bad_words_ids=[[3], [0, 1], [6]],
    )  # fmt: skip
    expected = logits
    for processor in (
        theirs.SequenceBiasLogitsProcessor([[[2], 1.5], [[0], -0.7]]),
        theirs.RepetitionPenaltyLogitsProcessor(1.3),
        theirs.NoRepeatNGramLogitsProcessor(2),
        theirs.NoBadWordsLogitsProcessor([[3], [0, 1], [6]], eos_token_id=6),
        theirs.MinNewTokensLengthLogitsProcessor(10, 5, 6),
    ):
        expected = processor(ids, expected)
    found = logits
    for process in make_processors(options, [6], V, torch.device("cpu")):
        found = process(found, ids, 2)
    assert found.equal(expected)
    assert (
        make_processors(GenerationOptions(), [6], V, torch.device("cpu")) == []
    )  # the defaults cost nothing
