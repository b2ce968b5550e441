"""Sampling: the filters equal transformers' to the bit, and drawn tokens follow the distribution."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from minigpt.generation.sampling import (
    apply_min_p,
    apply_temperature,
    apply_top_k,
    apply_top_p,
    apply_typical_p,
    filtered,
    greedy,
    sample,
)

INF = math.inf


def random_logits(seed: int, B: int = 5, V: int = 60) -> Tensor:
    return 3 * torch.randn(B, V, generator=torch.Generator().manual_seed(seed))


def logits_with_ties(seed: int, B: int = 5, V: int = 60) -> Tensor:
    return torch.randint(-4, 5, (B, V), generator=torch.Generator().manual_seed(seed)).float()


@pytest.fixture(scope="module")
def theirs() -> Any:
    return pytest.importorskip(
        "transformers.generation.logits_process", reason="transformers is the oracle here"
    )


def all_but_one_forbidden(seed: int, B: int = 5, V: int = 60) -> Tensor:
    logits = torch.full((B, V), -INF)
    logits[torch.arange(B), torch.randint(0, V, (B,), generator=torch.Generator().manual_seed(seed))] = 2.0
    return logits


def flat_logits(seed: int, B: int = 5, V: int = 60) -> Tensor:
    return torch.full((B, V), float(seed))


NO_IDS = torch.empty(5, 0, dtype=torch.int64)
CASES = [
    *map(random_logits, range(5)), *map(logits_with_ties, range(5)), all_but_one_forbidden(0), flat_logits(3),
]  # fmt: skip
BOTH = pytest.mark.parametrize("logits", CASES)


@BOTH
@pytest.mark.parametrize("temperature", [0.01, 0.7, 1.0, 3.0])
def test_temperature_is_transformers(theirs: Any, logits: Tensor, temperature: float) -> None:
    expected = theirs.TemperatureLogitsWarper(temperature)(NO_IDS, logits)
    assert torch.equal(apply_temperature(logits, temperature), expected)


@BOTH
@pytest.mark.parametrize("top_k", [1, 2, 7, 59, 60, 1000])
def test_top_k_is_transformers(theirs: Any, logits: Tensor, top_k: int) -> None:
    assert torch.equal(apply_top_k(logits, top_k), theirs.TopKLogitsWarper(top_k)(NO_IDS, logits))


@BOTH
@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.999999, 1.0])
def test_top_p_is_transformers(theirs: Any, logits: Tensor, top_p: float) -> None:
    assert torch.equal(apply_top_p(logits, top_p), theirs.TopPLogitsWarper(top_p)(NO_IDS, logits))


@BOTH
@pytest.mark.parametrize("min_p", [1e-9, 0.05, 0.3, 1.0])
def test_min_p_is_transformers(theirs: Any, logits: Tensor, min_p: float) -> None:
    assert torch.equal(apply_min_p(logits, min_p), theirs.MinPLogitsWarper(min_p)(NO_IDS, logits))


@BOTH
@pytest.mark.parametrize("typical_p", [1e-9, 0.1, 0.5, 0.9, 0.999999])
def test_typical_p_is_transformers(theirs: Any, logits: Tensor, typical_p: float) -> None:
    expected = theirs.TypicalLogitsWarper(typical_p)(NO_IDS, logits)
    assert torch.equal(apply_typical_p(logits, typical_p), expected)


@BOTH
def test_all_together_in_transformers_order(theirs: Any, logits: Tensor) -> None:
    expected = logits
    for warper in (
        theirs.TemperatureLogitsWarper(0.6), theirs.TopKLogitsWarper(30), theirs.TopPLogitsWarper(0.9),
        theirs.MinPLogitsWarper(0.03), theirs.TypicalLogitsWarper(0.8),
    ):  # fmt: skip
        expected = warper(NO_IDS, expected)
    found = filtered(logits, temperature=0.6, top_k=30, top_p=0.9, min_p=0.03, typical_p=0.8)
    assert torch.equal(found, expected)
    assert filtered(logits) is logits  # the defaults change nothing


def test_filters_by_hand() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    assert apply_top_k(logits, 2).isfinite().tolist() == [[False, True, False, True]]
    # 0.4 + 0.3 reach 0.6; 0.4 alone does not
    assert apply_top_p(logits, 0.6).isfinite().tolist() == [[False, True, False, True]]
    assert apply_top_p(logits, 0.75).isfinite().tolist() == [[False, True, True, True]]
    # half of the most likely one's 0.4 is 0.2: a little more than half is more than the third has
    assert apply_min_p(logits, 0.501).isfinite().tolist() == [[False, True, False, True]]
    # The entropy is 1.28; -log p are 2.3, 0.92, 1.61, 1.2: nearest is 0.3, then 0.2, then 0.4.
    assert apply_typical_p(logits, 0.2).isfinite().tolist() == [[False, False, False, True]]
    assert apply_typical_p(logits, 0.45).isfinite().tolist() == [[False, False, True, True]]
    tied = torch.tensor([[1.0, 2.0, 1.0, 0.0]])
    assert apply_top_k(tied, 2).isfinite().tolist() == [[True, True, True, False]]  # both that tie stay


@pytest.mark.parametrize("seed", range(3))
def test_one_token_always_stays(seed: int) -> None:
    for logits in (random_logits(seed), torch.zeros(5, 60)):
        kept = filtered(logits, 1e-6, top_k=1, top_p=1e-12, min_p=1.0, typical_p=1e-12).isfinite().sum(dim=-1)
        assert (kept >= 1).all()


def test_greedy_takes_the_most_likely() -> None:
    assert greedy(torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 0.0]])).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("u", "token"),
    [(0.0, 1), (0.2499, 1), (0.25, 2), (0.7499, 2), (0.75, 4), (1 - 2**-53, 4)],
)
def test_sample_inverts_the_cumulative_distribution(u: float, token: int) -> None:
    # 0, 1/4, 1/2, 0, 1/4, 0: tokens of no probability stand in front, between and behind
    logits = torch.tensor([[-INF, 0.0, math.log(2.0), -INF, 0.0, -INF]], dtype=torch.float64)
    assert sample(logits, torch.tensor([u], dtype=torch.float64)).tolist() == [token]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_last_number_below_one_never_draws_what_is_filtered_out(dtype: torch.dtype) -> None:
    below = 1 - torch.finfo(dtype).eps / 2
    for seed in range(50):
        logits = apply_top_k(random_logits(seed), 3)
        tokens = sample(logits, torch.full((5,), below, dtype=dtype))
        assert logits.gather(-1, tokens[:, None]).isfinite().all()


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def test_what_is_drawn_follows_the_distribution() -> None:
    n, V, kept = 200_000, 12, 9
    logits = apply_top_k(random_logits(3, B=1, V=V) / 2, kept)
    generator = torch.Generator().manual_seed(7)
    uniform = torch.rand(n, generator=generator, dtype=torch.float64)
    counts = sample(logits.expand(n, V), uniform).bincount(minlength=V).double()
    allowed = logits[0].isfinite()
    assert counts[~allowed].sum() == 0
    # A chi-square of d degrees of freedom passes d + 2 sqrt(d t) + 2 t with probability e^-t at most
    # (Laurent and Massart 2000, lemma 1): with t = ln(1e6), once in a million seeds.
    d, t = kept - 1, math.log(1e6)
    bound = d + 2 * math.sqrt(d * t) + 2 * t
    right = logits.double().softmax(-1)[0]
    assert chi_square(counts[allowed], right[allowed]) < bound
    # The test can fail: for a temperature that is 10 % off, the same counts are far beyond the bound.
    wrong = (logits.double() / 1.1).softmax(-1)[0]
    assert chi_square(counts[allowed], wrong[allowed]) > 5 * bound
