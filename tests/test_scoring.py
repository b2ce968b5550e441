"""The log-likelihood of continuations: trees, branches and the slow twin give the same numbers."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.errors import InputError
from minigpt.evaluation import scoring
from minigpt.evaluation.scoring import ContinuationScorer, _common, _in_rows_of_least_work, _Request
from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM
from minigpt.families.registry import LanguageModel
from minigpt.generation.packed_weights import CAN_PACK, PackedWeights
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.weights.quantized import set_precision
from tests.marks import compiled

V, CONTEXT = 19, 24


def model_of(family: str, **changes: Any) -> LanguageModel:
    torch.manual_seed(1)
    if family == "gpt2":
        sizes = {
            "n_embd": 32,
            "n_head": 2,
            "n_layer": 2,
            "block_size": CONTEXT,
            "vocab_size": V,
            "dropout": 0.0,
        }
        model: LanguageModel = GPTLMHeadModel(GPTConfig(**{**sizes, **changes}))
    else:
        sizes = {
            "vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "max_position_embeddings": CONTEXT,
        }  # fmt: skip
        model = Qwen3ForCausalLM(Qwen3Config(**{**sizes, **changes}))
    with torch.no_grad():  # initial weights give nearly equal scores, which hide mistakes
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


MODELS = {family: model_of(family) for family in ("gpt2", "qwen3")}
ids = st.lists(st.integers(0, 2), min_size=1, max_size=CONTEXT - 4)  # few tokens: much is shared
requests = st.lists(
    st.tuples(ids, st.lists(st.integers(0, 2), min_size=1, max_size=4)), min_size=1, max_size=12
)


@torch.inference_mode()
def one_by_one(model: LanguageModel, context: list[int], continuation: list[int]) -> tuple[list[float], bool]:
    """The slow twin: score each request separately."""
    whole = [*context, *continuation]
    logprobs = model(torch.tensor([whole[:-1]]))[0].log_softmax(-1)[-len(continuation) :]
    greedy = logprobs.argmax(-1).tolist() == continuation
    return [float(row[target]) for row, target in zip(logprobs, continuation)], greedy


def check(
    model: LanguageModel, asked: list[tuple[list[int], list[int]]], tolerance: float = 2e-5
) -> ContinuationScorer:
    scorer = ContinuationScorer(model)
    found = scorer.score(asked)
    assert len(found) == len(asked)
    for one, (context, continuation) in zip(found, asked):
        logprobs, greedy = one_by_one(model, context, continuation)
        # float32: products of some dozen terms in another order
        assert one.logprobs == pytest.approx(logprobs, abs=tolerance)
        assert one.is_greedy == greedy
        assert one.n_cut == 0
    return scorer


def test_rows_hold_each_request_once_and_are_shorter_where_attention_counts() -> None:
    lengths = [14, 3, 6, 5, 1, 7, 4, 8]
    batch = [_Request((i, *range(100, 99 + n)), n - 1, (1,), 0) for i, n in enumerate(lengths)]
    batch.insert(1, _Request((*batch[0].read[:10], 50, 51), 11, (1,), 0))  # two new tokens behind a fork
    sizes, found = [14, 2, *lengths[1:]], []
    for channels in (1, 10**6):  # attention is nearly all of the work, or nearly none
        rows = _in_rows_of_least_work(batch, 0, channels)
        assert sorted(i for row in rows for i in row) == list(range(9))
        assert any({0, 1} <= {*row} for row in rows), "what shares a beginning is in one row"
        found.append((len(rows), len(rows) * max(sum(sizes[i] for i in row) for row in rows)))
    (many, _), (few, padded) = found
    assert many > few
    assert padded == sum(sizes), "one row has no padding"


@pytest.mark.parametrize("family", MODELS)
@given(asked=requests, tree=st.sampled_from([1, 3, 8, 256]))
@settings(max_examples=40, deadline=None)
def test_a_tree_scores_as_one_by_one(
    family: str, asked: list[tuple[list[int], list[int]]], tree: int
) -> None:
    scorer = ContinuationScorer(MODELS[family])
    scorer._tokens = tree
    for one, (context, continuation) in zip(scorer.score(asked), asked):
        logprobs, greedy = one_by_one(MODELS[family], context, continuation)
        assert one.logprobs == pytest.approx(logprobs, abs=2e-5)
        assert one.is_greedy == greedy


@pytest.mark.parametrize("family", MODELS)
@torch.inference_mode()
def test_hidden_states_of_some_columns_are_those_of_all(family: str) -> None:
    base, ids = MODELS[family].base_model, torch.arange(14).view(2, 7)
    columns = torch.tensor([[6, 0, 0], [2, 3, 5]])
    found, every = base(ids, columns=columns), base(ids)
    assert found.shape == (2, 3, 32)
    for row in range(2):  # float32: products of 32 terms in another order
        torch.testing.assert_close(found[row], every[row, columns[row]], atol=2e-6, rtol=0)


@pytest.mark.skipif(not CAN_PACK, reason="weights are packed on x86 with oneDNN only")
@pytest.mark.parametrize("family", MODELS)
def test_packed_weights_score_as_plain_ones(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(family, **{"gpt2": {"n_embd": 64}, "qwen3": {"hidden_size": 64}}[family])
    monkeypatch.setattr(scoring, "_TOKENS_TO_PACK", 10)
    scorer = check(model, [([1, 2, 3, 4], [5, 6]), ([1, 2, 3], [7]), ([8, 2, 9], [10, 1, 2])])
    packed = scorer._packed
    assert packed is not None
    with packed.in_use():
        changed = [layer for layer in model.modules() if "forward" in vars(layer)]
        assert len(changed) > model.config.num_hidden_layers
    assert not any("forward" in vars(layer) for layer in model.modules())
    assert ContinuationScorer(model)._packed is None, "a few tokens are not worth it"


@pytest.mark.skipif(not CAN_PACK, reason="weights are packed on x86 with oneDNN only")
def test_packed_weights_are_limited_and_given_back_after_an_error() -> None:
    model = model_of("gpt2", n_embd=64)
    first = next(layer for layer in model.modules() if isinstance(layer, torch.nn.Linear))

    def changed() -> list[torch.nn.Module]:
        return [layer for layer in model.modules() if "forward" in vars(layer)]

    with PackedWeights(model, first.weight.nbytes).in_use():
        assert changed() == [first]
    packed, counted = PackedWeights(model), list[int]()

    def fail() -> None:
        with packed.in_use():
            counted.append(len(changed()))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert counted == [8], "four in each block; lm_head is too small"
    assert not changed()
    with PackedWeights(model.bfloat16()).in_use():
        assert not changed()


def test_a_sliding_window_is_read_branch_by_branch() -> None:
    model = model_of("qwen3", sliding_window=5, layer_types=("sliding_attention",) * 2)
    assert getattr(model.config, "sliding_window", None) == 5
    check(model, [([1, 2, 3] * 5, [4, 5]), ([1, 2, 3] * 5, [6]), ([1, 2, 3] * 5 + [7], [8])])


@compiled
@pytest.mark.parametrize("precision", ["int8", "int4", "bfloat16"])
@pytest.mark.parametrize("family", MODELS)
def test_weights_in_fewer_bits_are_scored_by_c(family: str, precision: Any) -> None:
    model = set_precision(model_of(family), precision)
    asked = [([1, 2, 3, 4], [5, 6]), ([1, 2, 3, 4], [7]), ([1, 2, 9], [10]), ([1, 2, 3, 4], [5, 6, 7])]
    # PyTorch computes int4 and bfloat16 in bfloat16, whose 8 bits leave 2**-8 of logits up to 4
    scorer = check(model, asked, 1e-3 if precision == "int8" else 4 * 2**-7)
    assert scorer.tokens_read < scorer.tokens_asked


def test_what_is_shared_is_read_once() -> None:
    shots = [1, 2, 3, 4, 5, 6]
    asked = [([*shots, question], [letter]) for question in (7, 8, 9) for letter in (10, 11, 12, 13)]
    scorer = check(MODELS["gpt2"], asked)
    assert scorer.tokens_asked == 12 * 7
    assert scorer.tokens_read == 6 + 3  # the shots, and each question


def test_a_long_context_loses_its_beginning() -> None:
    context = [i % V for i in range(40)]
    (one,) = ContinuationScorer(MODELS["gpt2"]).score([(context, [1, 2])])
    logprobs, _ = one_by_one(MODELS["gpt2"], context[-(CONTEXT - 1) :], [1, 2])
    assert one.n_cut == 42 - CONTEXT - 1
    assert one.logprobs == pytest.approx(logprobs, abs=2e-5)


def test_a_continuation_longer_than_the_context_is_scored_in_pieces() -> None:
    """Each token is predicted once, from as many tokens before it as fit in front of its piece."""
    model, continuation = MODELS["gpt2"], [i % V for i in range(2 * CONTEXT + 3)]
    scorer = ContinuationScorer(model)
    long, short = scorer.score([([1, 2], continuation), ([1, 2], [3])])
    whole = [1, 2, *continuation]
    expected: list[float] = []
    for start in range(0, len(continuation), CONTEXT):
        piece = continuation[start : start + CONTEXT]
        before = whole[: 2 + start][-(CONTEXT + 1 - len(piece)) :]
        expected += one_by_one(model, before, piece)[0]
    assert long.logprobs == pytest.approx(expected, abs=2e-5)
    assert (long.pieces, short.pieces) == (3, 1)
    assert (long.n_cut, short.n_cut) == (len(whole) - CONTEXT - 1, 0)
    assert not long.is_greedy


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (([], [1]), "request 1 has an empty context"),
        (([1], []), "request 1 has an empty continuation"),
    ],
)
def test_what_cannot_be_scored_is_refused(asked: tuple[list[int], list[int]], said: str) -> None:
    with pytest.raises(InputError, match=said):
        ContinuationScorer(MODELS["gpt2"]).score([asked])


def test_damaged_weights_are_said() -> None:
    model = model_of("gpt2")
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        ContinuationScorer(model).score([([1], [2])])


@given(st.lists(st.integers(0, 1)), st.lists(st.integers(0, 1)))
def test_common_beginning(a: list[int], b: list[int]) -> None:
    slow = 0
    while slow < min(len(a), len(b)) and a[slow] == b[slow]:
        slow += 1
    assert _common(a, b) == slow
