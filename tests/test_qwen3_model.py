"""Qwen3's model: properties first (causality, padding, cache), then its parts, its numbers and its errors."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt.errors import InputError
from minigpt.families.qwen3.family import FAMILY
from minigpt.families.qwen3.model import (
    MLP,
    Attention,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    RMSNorm,
    rope_tables,
    rotate,
)
from minigpt.families.qwen3.presets import PRESETS, preset
from minigpt.families.registry import new_model, parameter_table
from minigpt.generation.api import GenerationOptions, generate_ids
from minigpt.generation.cache import KeyValueCache

TINY = Qwen3Config(
    vocab_size=29,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,  # not 16 / 4
    max_position_embeddings=16,
    rope_theta=100.0,
)
HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")
PUBLISHED = {  # parameters of the published weights, a tied head counted once
    "0.6B": 596_049_920,
    "1.7B": 1_720_574_976,
    "4B": 4_022_468_096,
    "8B": 8_190_735_360,
    "14B": 14_768_307_200,
    "32B": 32_762_123_264,
}


def tiny_model(config: Qwen3Config = TINY) -> Qwen3ForCausalLM:
    """Make a model in double precision, with weights large enough for attention that is not uniform."""
    torch.manual_seed(1)
    model = Qwen3ForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def random_ids(B: int, T: int, seed: int = 2) -> Tensor:
    return torch.randint(29, (B, T), generator=torch.Generator().manual_seed(seed))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Check that two ways to compute agree to about 1e-13, in double precision. So only the order of
    summation may differ."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def cache_for(config: Qwen3Config, rows: int) -> KeyValueCache:
    return KeyValueCache(config, rows, 16, dtype=torch.float64)


# ----------------------------------------------------------------------------------------- causality, padding


@pytest.mark.parametrize("masked", [False, True], ids=["without mask", "with mask"])
@pytest.mark.parametrize("changed", [0, 1, 6, 11])
def test_a_changed_token_leaves_all_earlier_logits_as_they_were(masked: bool, changed: int) -> None:
    model, ids = tiny_model(), random_ids(2, 12)
    mask = torch.ones_like(ids) if masked else None
    other = ids.clone()
    other[:, changed] = (other[:, changed] + 1) % 29
    before, after = model(ids, mask), model(other, mask)
    assert torch.equal(before[:, :changed], after[:, :changed])  # same shapes, same kernel: the same bits
    assert not torch.allclose(before[:, changed:], after[:, changed:])


def test_a_mask_of_ones_changes_nothing() -> None:
    model, ids = tiny_model(), random_ids(3, 9)
    assert_same(model(ids, torch.ones_like(ids)), model(ids))


@pytest.mark.parametrize("masked", [False, True], ids=["without mask", "with mask"])
def test_right_padding_changes_no_logits_of_real_tokens(masked: bool) -> None:
    model, ids = tiny_model(), random_ids(1, 7)
    mask = F.pad(torch.ones_like(ids), (0, 5)) if masked else None
    assert_same(model(F.pad(ids, (0, 5)), mask)[:, :7], model(ids))


def test_left_padding_with_positions_changes_no_logits_of_real_tokens() -> None:
    model = tiny_model()
    texts = [random_ids(1, length, seed=length) for length in (3, 8, 5)]
    ids = torch.cat([F.pad(text, (8 - text.shape[1], 0)) for text in texts])
    mask = torch.cat([F.pad(torch.ones_like(text), (8 - text.shape[1], 0)) for text in texts])
    logits = model(ids, mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    for row, text in enumerate(texts):
        assert_same(logits[row, 8 - text.shape[1] :], model(text)[0])


def test_what_stands_in_the_padding_does_not_matter() -> None:
    model, ids = tiny_model(), random_ids(2, 8)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1, 1, 0]])
    other = torch.where(mask.bool(), ids, (ids + 7) % 29)
    assert_same(model(ids, mask)[mask.bool()], model(other, mask)[mask.bool()])


@pytest.mark.parametrize("slow", [False, True], ids=["sdpa", "written out"])
def test_rows_of_padding_alone_give_no_nan_in_outputs_and_gradients(slow: bool) -> None:
    model, ids = tiny_model(), random_ids(3, 6)
    mask = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    hidden = model.model(ids, mask, attentions=[] if slow else None)
    assert torch.isfinite(hidden).all()
    model.lm_head(hidden).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


# ------------------------------------------------------------------------------------------------------ cache


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 1, 4, 1], [1, 11]], ids=str)
def test_cached_in_chunks_equals_uncached(chunks: list[int], heads: int) -> None:
    config = replace(TINY, num_key_value_heads=heads)
    model, ids, cache = tiny_model(config), random_ids(2, 12), cache_for(config, 2)
    parts = [
        model(part, past_key_values=cache.view(range(2), [part.shape[1]] * 2))
        for part in torch.split(ids, chunks, dim=1)
    ]
    assert [cache.length(slot) for slot in range(2)] == [12, 12]
    assert cache.bytes == 2 * 2 * 2 * heads * 16 * 6 * 8  # keys and values, L, B, K, tokens, D, bytes
    assert_same(torch.cat(parts, dim=1), model(ids))


def test_cached_equals_uncached_with_left_padding() -> None:
    model, ids, cache = tiny_model(), random_ids(3, 10), cache_for(TINY, 3)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[2, :1] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole, parts = model(ids, mask, positions), []
    for start, end in ((0, 6), (6, 7), (7, 10)):
        view = cache.view(range(3), [end - start] * 3)
        parts.append(model(ids[:, start:end], mask[:, :end], positions[:, start:end], view))
    assert_same(torch.cat(parts, dim=1)[mask.bool()], whole[mask.bool()])


def test_a_left_padded_row_may_be_wider_than_the_limit_if_its_positions_are_not() -> None:
    model = tiny_model(replace(TINY, max_position_embeddings=4))
    ids, mask = random_ids(1, 6), torch.tensor([[0, 0, 1, 1, 1, 1]])
    logits = model(ids, mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    assert_same(logits[:, 2:], model(ids[:, 2:]))


def test_generating_in_a_batch_and_alone_and_without_cache_gives_the_same_ids() -> None:
    model = tiny_model()
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (2, 5, 9)]
    options = GenerationOptions(max_new_tokens=6)
    together = generate_ids(model, prompts, options, eos_token_id=28)
    assert together == [generate_ids(model, [prompt], options, eos_token_id=28)[0] for prompt in prompts]
    assert together == generate_ids(model, prompts, replace(options, use_cache=False), eos_token_id=28)


# ------------------------------------------------------------------------------------------------------ parts


def test_rmsnorm_by_hand() -> None:
    norm = RMSNorm(2, eps=0.5)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 10.0]))
    # the mean of squares is (1 + 49) / 2 = 25; with eps 25.5
    expected = torch.tensor([1 / math.sqrt(25.5), -70 / math.sqrt(25.5)])
    torch.testing.assert_close(norm(torch.tensor([1.0, -7.0])), expected)


def test_rmsnorm_does_not_care_how_long_a_vector_is() -> None:
    norm, x = RMSNorm(8, eps=1e-12).double(), torch.randn(3, 8, dtype=torch.float64)
    assert_same(norm(1000 * x), norm(x))
    assert_same(norm(x).square().mean(-1), torch.ones(3, dtype=torch.float64))


def test_rmsnorm_adds_squares_in_float32_and_keeps_the_dtype() -> None:
    x = torch.full((256,), 100.0, dtype=torch.float16)  # 256 * 100^2 is beyond float16
    normed = RMSNorm(256, eps=1e-6).half()(x)
    assert normed.dtype == torch.float16
    assert torch.equal(normed, torch.ones_like(x))


def test_rmsnorm_s_gradient_by_hand_is_the_one_of_its_parts() -> None:
    norm = RMSNorm(6, eps=1e-3).double()
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)

    def by_hand(x: torch.Tensor, weight: torch.Tensor) -> Any:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    # against differences of the function's own values, and against what autograd makes of the formula
    assert torch.autograd.gradcheck(by_hand, (x, norm.weight))
    written = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    above = torch.randn_like(written)
    wanted = torch.autograd.grad(written, (x, norm.weight), above)
    found = torch.autograd.grad(norm(x), (x, norm.weight), above)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rmsnorm_computes_the_same_bits_with_and_without_a_gradient(dtype: torch.dtype) -> None:
    norm = RMSNorm(160, eps=1e-6)
    nn.init.normal_(norm.weight)
    norm = norm.to(dtype)
    x = torch.randn(4, 7, 160).mul(3).to(dtype).requires_grad_()
    out = norm(x)
    assert "_RMSNorm" in type(out.grad_fn).__name__
    with torch.no_grad():
        assert torch.equal(out, norm(x))
    out.float().sum().backward()
    assert x.grad is not None
    assert norm.weight.grad is not None
    assert (out.dtype, x.grad.dtype, norm.weight.grad.dtype) == (dtype, dtype, dtype)


def test_rmsnorm_of_16_bits_with_weights_of_32() -> None:
    """Under autocast, queries and keys come in bfloat16, and the weight is float32."""
    norm = RMSNorm(32, eps=1e-6)
    nn.init.normal_(norm.weight)
    x = torch.randn(5, 32).bfloat16().requires_grad_()
    exact = x.detach().double().requires_grad_()
    wanted = exact * (exact.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight.detach().double()
    wanted.square().sum().backward()  # type: ignore[no-untyped-call]
    out = norm(x)
    # the norm, the weight and their product are rounded to 8 bits
    assert ((out.double() - wanted.detach()).abs() <= 3.1 * 2**-8 * wanted.detach().abs()).all()
    out.float().square().sum().backward()
    assert x.grad is not None
    assert exact.grad is not None
    assert norm.weight.grad is not None
    # its terms are as large as the largest of them, and each has some of these roundings
    torch.testing.assert_close(
        x.grad.double(), exact.grad, rtol=0, atol=8 * 2**-8 * float(exact.grad.abs().max())
    )
    assert (out.dtype, x.grad.dtype, norm.weight.grad.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )


def test_rope_turns_pairs_of_channels_as_complex_numbers_turn() -> None:
    """The slow twin: channel i is the real part, channel i + D/2 the imaginary part, times exp(i * angle)."""
    x, positions = torch.randn(2, 3, 5, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 7, 11])
    got = rotate(x, *(table.double() for table in rope_tables(positions, TINY)))
    for place, position in enumerate(positions.tolist()):
        for pair in range(3):
            turn = complex(math.cos(angle := position * 100 ** (-2 * pair / 6)), math.sin(angle))
            for row, head in ((0, 0), (1, 2)):
                before = complex(*x[row, head, place, [pair, pair + 3]].tolist())
                after = complex(*got[row, head, place, [pair, pair + 3]].tolist())
                # the tables are float32: an angle up to 11 is right to about 1e-6
                assert after == pytest.approx(turn * before, abs=1e-5)


def test_rope_keeps_lengths_and_leaves_position_0_alone() -> None:
    x = torch.randn(1, 2, 9, 6, dtype=torch.float64)
    tables = [table.double() for table in rope_tables(torch.arange(9), TINY)]
    turned = rotate(x, *tables)
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    # cos^2 + sin^2 of two float32 numbers is 1 to about 1e-7
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)


def test_the_product_of_a_query_and_a_key_depends_on_their_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 6, dtype=torch.float64)

    def score(of_query: int, of_key: int) -> float:
        tables = (rope_tables(torch.tensor([place]), TINY) for place in (of_query, of_key))
        (cos_q, sin_q), (cos_k, sin_k) = ([t.double() for t in both] for both in tables)
        return float((rotate(q, cos_q, sin_q) * rotate(k, cos_k, sin_k)).sum())

    assert score(9, 4) == pytest.approx(score(12, 7), abs=1e-5)  # tables in float32, as above
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-3)


def test_shifted_positions_change_nothing() -> None:
    """In the whole model only distances count, because no positions are learned."""
    model, ids = tiny_model(), random_ids(2, 6)
    shifted = torch.arange(10, 16).expand(2, 6)
    # float32 angles of up to 15 are right to about 1e-6; two layers of weights around 1 amplify that
    torch.testing.assert_close(model(ids, position_ids=shifted), model(ids), rtol=0, atol=1e-4)


def test_rope_tells_far_positions_apart_in_bfloat16_too() -> None:
    """bfloat16 cannot represent 257: tables in the model's dtype would use the angles of 256."""
    config = replace(TINY, max_position_embeddings=1000)
    cos, sin = rope_tables(torch.tensor([256, 257]), config)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos[0, 0, 0].item() == pytest.approx(math.cos(256), abs=1e-4)
    assert cos[0, 1, 0].item() == pytest.approx(math.cos(257), abs=1e-4)
    model = tiny_model(config).bfloat16()
    assert model(random_ids(1, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize("heads", [1, 2])
def test_shared_heads_are_repeated_heads(heads: int) -> None:
    """The slow twin is a model in which every query head has its own copy of keys and values."""
    shared = tiny_model(replace(TINY, num_key_value_heads=heads))
    repeated = tiny_model(replace(TINY, num_key_value_heads=4))
    state = shared.state_dict()
    for name in state:
        if "k_proj" in name or "v_proj" in name:
            one_by_one = state[name].view(heads, 6, 16)
            state[name] = one_by_one.repeat_interleave(4 // heads, dim=0).flatten(0, 1)
    repeated.load_state_dict(state)
    ids, mask = random_ids(2, 7), torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
    assert_same(shared(ids), repeated(ids))
    assert_same(shared(ids, mask), repeated(ids, mask))


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("masked", [False, True], ids=["without mask", "with mask"])
def test_the_whole_model_agrees_with_its_slow_twin(masked: bool, heads: int) -> None:
    model, ids = tiny_model(replace(TINY, num_key_value_heads=heads)), random_ids(2, 6)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]) if masked else None
    fast, slow = model.model(ids, mask), model.model(ids, mask, attentions=[])
    assert_same(fast, slow)
    parameters = list(model.model.parameters())
    for of_fast, of_slow in zip(
        torch.autograd.grad(fast.square().sum(), parameters),
        torch.autograd.grad(slow.square().sum(), parameters),
    ):
        assert_same(of_fast, of_slow)


def test_attentions_are_causal_distributions_that_leave_padding_out() -> None:
    model, ids = tiny_model(), random_ids(2, 5)
    layers = model.attentions(ids, torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]))
    assert [weights.shape for weights in layers] == [(2, 4, 5, 5)] * 2
    for weights in layers:
        assert_same(weights.sum(-1), torch.ones_like(weights[..., 0]))
        assert (weights.triu(1) == 0).all()
        assert (weights[1, :, 2:, :2] == 0).all()  # real tokens do not look at padding
    assert not torch.allclose(layers[0], layers[1])


def test_long_vectors_do_not_sharpen_attention() -> None:
    """The norms of queries and keys: a hundred times larger projections give the same scores."""
    # eps counts for a hundredth of a percent more or less: hence a tiny one here
    attention = Attention(replace(TINY, rms_norm_eps=1e-30)).double()
    x, rope = torch.randn(1, 5, 16, dtype=torch.float64), rope_tables(torch.arange(5), TINY)
    seen: list[Tensor] = []
    for factor in (1, 100):
        with torch.no_grad():
            attention.q_proj.weight *= factor
            attention.k_proj.weight *= factor
        attention(x, tuple(table.double() for table in rope), None, None, seen)
    assert_same(seen[1], seen[0])


def test_swiglu_by_hand() -> None:
    mlp = MLP(replace(TINY, hidden_size=1, intermediate_size=2)).double()
    with torch.no_grad():
        mlp.gate_proj.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        mlp.up_proj.weight.copy_(torch.tensor([[2.0], [3.0]]))
        mlp.down_proj.weight.copy_(torch.tensor([[5.0, 7.0]]))
    sigmoid = 1 / (1 + math.exp(-1))
    # at x = 1: silu(1) = sigmoid, silu(-1) = -(1 - sigmoid)
    expected = 5 * (sigmoid * 2) + 7 * (-(1 - sigmoid) * 3)
    assert_same(mlp(torch.ones(1, 1, dtype=torch.float64)), torch.tensor([[expected]], dtype=torch.float64))


# ------------------------------------------------------------------------------ numbers, names, initial state


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("sizes", [(16, 24, 2, 4, 2, 6), (24, 10, 1, 6, 1, 2), (8, 8, 7, 3, 3, 16)], ids=str)
def test_the_parameter_formula_counts_what_is_there(sizes: tuple[int, ...], tied: bool) -> None:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", *HEADS)
    chosen: dict[str, Any] = dict(zip(names, sizes, strict=True))
    config = replace(TINY, tie_word_embeddings=tied, **chosen)
    model = new_model(config)
    assert isinstance(model, Qwen3ForCausalLM)
    assert config.parameter_count() == sum(parameter.numel() for parameter in model.parameters())
    assert config.parameter_count() == sum(count for _, count in parameter_table(model))


@pytest.mark.parametrize("row", PRESETS, ids=lambda row: row.name)
def test_published_sizes(row: Any) -> None:
    config = row.config()
    assert config.parameter_count() == PUBLISHED[row.name]
    assert sum(parameter.numel() for parameter in FAMILY.on_meta(config).parameters()) == PUBLISHED[row.name]
    assert preset(row.repository.removeprefix("Qwen/")) is row


def test_presets_cover_the_published_sizes_and_the_defaults_are_the_smallest_one() -> None:
    assert [row.name for row in PRESETS] == list(PUBLISHED)
    assert preset("0.6B").config() == Qwen3Config()
    with pytest.raises(InputError, match=r"unknown Qwen3 model '0\.66B'; did you mean '0\.6B'"):
        preset("0.66B")


def test_the_parameter_table_lists_the_parts() -> None:
    C, V, L, q, kv, inner = 16, 29, 2, 4 * 6, 2 * 6, 24
    parts = [
        ("embed_tokens", V * C),
        ("layers.*.input_layernorm", L * C),
        ("layers.*.self_attn.q_proj", L * C * q),
        ("layers.*.self_attn.k_proj", L * C * kv),
        ("layers.*.self_attn.v_proj", L * C * kv),
        ("layers.*.self_attn.o_proj", L * C * q),
        ("layers.*.self_attn.q_norm", L * 6),
        ("layers.*.self_attn.k_norm", L * 6),
        ("layers.*.post_attention_layernorm", L * C),
        ("layers.*.mlp.gate_proj", L * C * inner),
        ("layers.*.mlp.up_proj", L * C * inner),
        ("layers.*.mlp.down_proj", L * C * inner),
        ("norm", C),
    ]
    assert parameter_table(Qwen3ForCausalLM(TINY)) == parts
    untied = Qwen3ForCausalLM(replace(TINY, tie_word_embeddings=False))
    assert parameter_table(untied) == [*parts, ("lm_head", V * C)]


def test_a_tied_head_stays_tied_through_copies_casts_and_state_dicts() -> None:
    model = copy.deepcopy(Qwen3ForCausalLM(TINY)).to(torch.float64)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.load_state_dict(Qwen3ForCausalLM(TINY).state_dict())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = Qwen3ForCausalLM(replace(TINY, tie_word_embeddings=False))
    assert not torch.equal(untied.lm_head.weight, untied.model.embed_tokens.weight)


def test_nothing_but_parameters_is_saved() -> None:
    """cos and sin are not saved, because they follow from the configuration."""
    model = Qwen3ForCausalLM(TINY)
    assert list(model.buffers()) == []
    assert set(model.state_dict()) == {*dict(model.named_parameters()), "lm_head.weight"}


def test_initial_weights_have_gpt2s_spread() -> None:
    torch.manual_seed(5)
    config = Qwen3Config(500, 128, 256, 8, 4, 2, 32, 64, tie_word_embeddings=False)
    for name, parameter in Qwen3ForCausalLM(config).named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        else:
            residual = "o_proj" in name or "down_proj" in name
            expected = 0.02 / math.sqrt(2 * 8) if residual else 0.02
            # 8192 values or more: the standard error of their deviation is 0.8 % at most; 4 % is five of them
            assert parameter.std().item() == pytest.approx(expected, rel=0.04), name
            assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(parameter.numel()), name


def test_the_initial_loss_is_that_of_guessing() -> None:
    torch.manual_seed(6)
    config = Qwen3Config(1000, 64, 96, 3, 4, 2, 16, 64)
    ids, targets = torch.randint(1000, (2, 8, 64))
    loss = F.cross_entropy(Qwen3ForCausalLM(config)(ids).flatten(0, 1), targets.flatten())
    # logits have a spread of 0.02 * sqrt(64) = 0.16, which adds 0.16^2 / 2 = 0.013 to ln V
    assert loss.item() == pytest.approx(math.log(1000), abs=0.05)


def test_training_and_eval_mode_are_the_same() -> None:
    model, ids = tiny_model(), random_ids(2, 8)
    assert torch.equal(model.train()(ids), model.eval()(ids))


def test_int32_ids_and_bool_masks_give_the_same() -> None:
    model, ids = tiny_model(), random_ids(2, 6)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    assert torch.equal(model(ids.int(), mask.bool()), model(ids, mask))


def test_the_model_and_the_head_are_the_whole() -> None:
    model, ids = tiny_model(), random_ids(2, 6)
    assert isinstance(model.base_model, Qwen3Model)
    assert len(model.blocks) == 2
    assert torch.equal(model.lm_head(model.base_model(ids)), model(ids))


def test_mixed_precision_stays_close() -> None:
    model, ids = tiny_model().float(), random_ids(2, 9)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    for given in (None, mask):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model(ids, given)
        exact = model(ids, given)
        # bfloat16 keeps 8 bits: two layers of products are right to some percent of the logits' spread
        assert (rounded - exact).std() < 0.1 * exact.std()
        assert rounded.dtype == torch.bfloat16


def test_it_compiles_into_one_graph_for_all_lengths() -> None:
    torch.compiler.reset()
    model = tiny_model()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=count, fullgraph=True, dynamic=True)
    for T in (5, 9, 16):
        ids = random_ids(2, T)
        mask = torch.ones_like(ids)
        assert_same(compiled(ids), model(ids))
        assert_same(compiled(ids, mask, mask.cumsum(1) - 1), model(ids))
    assert len(graphs) == 2  # with mask and without


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"num_key_value_heads": 3},
            "num_key_value_heads must divide num_attention_heads: "
            "got num_key_value_heads=3, num_attention_heads=16",
        ),
        ({"head_dim": 7}, "head_dim must be even, RoPE turns pairs: got head_dim=7"),
        ({"head_dim": 0}, "head_dim must be a whole number of at least 1: got head_dim=0"),
        ({"vocab_size": -3}, "vocab_size must be a whole number of at least 1: got vocab_size=-3"),
        ({"hidden_size": 64.0}, "hidden_size must be a whole number of at least 1: got hidden_size=64.0"),
        ({"head_dim": True}, "head_dim must be a whole number of at least 1: got head_dim=True"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a finite number above 0: got rms_norm_eps=0"),
        ({"rope_theta": math.inf}, "rope_theta must be a finite number above 0: got rope_theta=inf"),
        ({"rope_theta": 10**50}, f"rope_theta must be a finite number above 0: got rope_theta={10**50}"),
        ({"rope_theta": "1e6"}, "rope_theta must be a finite number above 0: got rope_theta='1e6'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be True or False: got tie_word_embeddings=1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_bad_configuration_is_named(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the whole text is compared
        Qwen3Config(**change)
    assert str(error.value) == text


def test_too_long_a_sequence_names_both_numbers() -> None:
    model, cache = tiny_model(), KeyValueCache(TINY, 1, 20, dtype=torch.float64)
    text = "the model's max_position_embeddings is 16 tokens: got a sequence of {} tokens"
    with pytest.raises(ValueError, match=text.format(17)):
        model(random_ids(1, 17))
    with pytest.raises(ValueError, match=text.format(20)):
        model(random_ids(1, 2), position_ids=torch.tensor([[3, 19]]))
    model(random_ids(1, 16), past_key_values=cache.view([0], [16]))
    with pytest.raises(ValueError, match=text.format(17)):
        model(random_ids(1, 1), past_key_values=cache.view([0]))


def test_inputs_of_a_wrong_kind_are_described() -> None:
    model, ids = tiny_model(), random_ids(2, 5)
    for wrong in (torch.zeros(2, 3), torch.zeros(5, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.int64)):
        with pytest.raises(ValueError, match="input_ids must be int64/int32"):
            model(wrong)
    with pytest.raises(
        ValueError, match=r"attention_mask must be bool or int \(2, 5\): got torch.int64 \(2, 4\)"
    ):
        model(ids, torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"attention_mask .* \(2, 5\): got torch.float32 \(2, 5\)"):
        model(ids, torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"the shape of input_ids, \(2, 5\): got \(5,\)"):
        model(ids, position_ids=torch.arange(5))
