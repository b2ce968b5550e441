"""The model: properties first (causality, padding, cache), then its slow twin, its numbers and its errors."""

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from minigpt.families.qwen3.model import Qwen3Config
from minigpt.families.registry import ModelConfig, family_of, new_model, parameter_table
from minigpt.model import (
    CausalSelfAttention,
    GPTConfig,
    GPTLMHeadModel,
    KeyValueCache,
    Transformer,
    causal_mask,
    eager_attention,
)

GPT2_SIZES = {
    "gpt2": (768, 12, 12, 124_439_808),
    "gpt2-medium": (1024, 16, 24, 354_823_168),
    "gpt2-large": (1280, 20, 36, 774_030_080),
    "gpt2-xl": (1600, 25, 48, 1_557_611_200),
}  # the counts that Hugging Face's GPT2LMHeadModel has for the published weights


class ListCache:
    """The simplest KeyValueCache: it concatenates keys and values of each layer."""

    def __init__(self) -> None:
        self.length = 0
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.layers:
            k = torch.cat([self.layers[layer][0], k], dim=2)
            v = torch.cat([self.layers[layer][1], v], dim=2)
        self.layers[layer] = k, v
        return k, v

    def advance(self, tokens: int) -> None:
        self.length += tokens


def tiny_config(
    n_embd: int = 16, n_head: int = 4, n_layer: int = 2, block_size: int = 16, bias: bool = False
) -> GPTConfig:
    return GPTConfig(n_embd, n_head, n_layer, dropout=0.1, block_size=block_size, vocab_size=29, bias=bias)


def tiny_model(config: GPTConfig | None = None) -> GPTLMHeadModel:
    """Make a model in double precision, with weights large enough for attention that is not uniform."""
    torch.manual_seed(1)
    model = GPTLMHeadModel(config or tiny_config()).double().eval()
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
    padded = F.pad(ids, (0, 5), value=0)
    mask = F.pad(torch.ones_like(ids), (0, 5)) if masked else None
    assert_same(model(padded, mask)[:, :7], model(ids))


def test_left_padding_with_positions_changes_no_logits_of_real_tokens() -> None:
    model = tiny_model()
    texts = [random_ids(1, length, seed=length) for length in (3, 8, 5)]
    ids = torch.cat([F.pad(text, (8 - text.shape[1], 0)) for text in texts])
    mask = torch.cat([F.pad(torch.ones_like(text), (8 - text.shape[1], 0)) for text in texts])
    logits = model(ids, mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    for row, text in enumerate(texts):
        assert_same(logits[row, 8 - text.shape[1] :], model(text)[0])


def test_a_mask_of_queries_and_keys_is_the_whole_answer() -> None:
    model, ids = tiny_model(), random_ids(2, 7)
    causal = torch.ones(2, 7, 7, dtype=torch.bool).tril()
    assert_same(model(ids, causal), model(ids))
    assert_same(model(ids, causal.long()), model(ids))
    both_ways = torch.ones(2, 7, 7, dtype=torch.bool)
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % model.config.vocab_size
    assert (model(ids, both_ways)[:, 0] != model(changed, both_ways)[:, 0]).any()  # the first sees the last
    prefix = causal.clone()
    prefix[:, :4, :4] = True  # a prefix that sees itself both ways; what follows is causal
    assert torch.equal(model(ids, prefix)[:, :6], model(changed, prefix)[:, :6])
    for weights in model.attentions(ids, prefix):
        assert (weights[:, :, ~prefix[0]] == 0).all()
        assert (weights[:, :, prefix[0]] > 0).all()
    cache = ListCache()
    model(ids[:, :4], prefix[:, :4, :4], past_key_values=cache)
    assert_same(model(ids[:, 4:], prefix[:, 4:], past_key_values=cache), model(ids, prefix)[:, 4:])
    with pytest.raises(ValueError, match=r"got torch.bool \(1, 7, 7\)"):
        model(ids, both_ways[:1])


def test_what_stands_in_the_padding_does_not_matter() -> None:
    model, ids = tiny_model(), random_ids(2, 8)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1, 1, 0]])
    other = torch.where(mask.bool(), ids, (ids + 7) % 29)
    assert_same(model(ids, mask)[mask.bool()], model(other, mask)[mask.bool()])


@pytest.mark.parametrize("slow", [False, True], ids=["sdpa", "written out"])
def test_rows_of_padding_alone_give_no_nan_in_outputs_and_gradients(slow: bool) -> None:
    model, ids = tiny_model(), random_ids(3, 6)
    mask = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    hidden = model.transformer(ids, mask, attentions=[] if slow else None)
    assert torch.isfinite(hidden).all()
    model.lm_head(hidden).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


# -------------------------------------------------------------------------------------------------- attention


def test_with_zero_queries_attention_is_the_mean_of_what_it_sees() -> None:
    v = torch.tensor([[[[1.0, 0.0], [3.0, 4.0], [5.0, 8.0]]]], dtype=torch.float64)
    out, weights = eager_attention(torch.zeros_like(v), torch.randn_like(v), v)
    third = 1 / 3
    seen = [[[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [third, third, third]]]]
    assert_same(weights, torch.tensor(seen, dtype=torch.float64))
    assert_same(out, torch.tensor([[[[1.0, 0.0], [2.0, 2.0], [3.0, 4.0]]]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("past", "T", "mask"),
    [
        (0, 7, None),
        (0, 1, None),
        (5, 1, None),
        (5, 4, None),
        (0, 4, [[0, 0, 1, 1], [1, 1, 1, 0]]),
        (3, 2, [[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]),
    ],
)
def test_sdpa_and_its_slow_twin_agree_in_outputs_and_gradients(
    past: int, T: int, mask: list[list[int]] | None
) -> None:
    torch.manual_seed(3)
    q = torch.randn(2, 3, T, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 3, past + T, 4, dtype=torch.float64, requires_grad=True) for _ in "kv")
    visible = causal_mask(past, T, None if mask is None else torch.tensor(mask), q.device)
    if visible is None and T > 1:
        fast = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        fast = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    slow, weights = eager_attention(q, k, v, visible)
    assert_same(fast, slow)
    assert_same(weights.sum(-1), torch.ones_like(weights[..., 0]))
    for of_fast, of_slow in zip(
        torch.autograd.grad(fast.square().sum(), (q, k, v)),
        torch.autograd.grad(slow.square().sum(), (q, k, v)),
    ):
        assert_same(of_fast, of_slow)


def test_no_mask_is_made_where_none_is_needed() -> None:
    device = torch.device("cpu")
    assert causal_mask(0, 7, None, device) is None  # SDPA's own causal path
    assert causal_mask(5, 1, None, device) is None  # one new token sees everything
    assert causal_mask(5, 2, None, device) is not None


@pytest.mark.parametrize("masked", [False, True], ids=["without mask", "with mask"])
def test_the_whole_model_agrees_with_its_slow_twin(masked: bool) -> None:
    model, ids = tiny_model(tiny_config(bias=True)), random_ids(2, 6)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]) if masked else None
    fast, slow = model.transformer(ids, mask), model.transformer(ids, mask, attentions=[])
    assert_same(fast, slow)
    parameters = list(model.transformer.parameters())
    for of_fast, of_slow in zip(
        torch.autograd.grad(fast.square().sum(), parameters),
        torch.autograd.grad(slow.square().sum(), parameters),
    ):
        assert_same(of_fast, of_slow)


def test_attentions_are_causal_distributions_that_leave_padding_out() -> None:
    model, ids = tiny_model(), random_ids(2, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    layers = model.attentions(ids, mask)
    assert [weights.shape for weights in layers] == [(2, 4, 5, 5)] * 2
    for weights in layers:
        assert_same(weights.sum(-1), torch.ones_like(weights[..., 0]))
        assert (weights.triu(1) == 0).all()
        assert (weights[1, :, 2:, :2] == 0).all()  # real tokens do not look at padding
        assert (weights[0].tril() > 0)[:, 4].all()
    assert not torch.allclose(layers[0], layers[1])


def test_attentions_stay_distributions_while_dropout_acts_on_a_copy() -> None:
    torch.manual_seed(4)
    q = k = v = torch.randn(1, 2, 6, 4, dtype=torch.float64)
    plain, _ = eager_attention(q, k, v)
    dropped, weights = eager_attention(q, k, v, dropout=0.5)
    assert_same(weights.sum(-1), torch.ones(1, 2, 6, dtype=torch.float64))
    assert not torch.allclose(plain, dropped)


# ------------------------------------------------------------------------------------------------------ cache


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 1, 4, 1], [1, 11], [6, 6]], ids=str)
def test_cached_in_chunks_equals_uncached(chunks: list[int]) -> None:
    model, ids = tiny_model(), random_ids(2, 12)
    cache: KeyValueCache = ListCache()
    parts = [model(part, past_key_values=cache) for part in torch.split(ids, chunks, dim=1)]
    assert cache.length == 12
    assert_same(torch.cat(parts, dim=1), model(ids))


def test_cached_equals_uncached_with_left_padding() -> None:
    model, ids = tiny_model(), random_ids(3, 10)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[2, :1] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = model(ids, mask, positions)
    cache, parts = ListCache(), []
    for start, end in ((0, 6), (6, 7), (7, 10)):
        parts.append(model(ids[:, start:end], mask[:, :end], positions[:, start:end], cache))
    assert_same(torch.cat(parts, dim=1)[mask.bool()], whole[mask.bool()])


def test_a_left_padded_row_may_be_wider_than_block_size_if_its_positions_are_not() -> None:
    model = tiny_model(tiny_config(block_size=4))
    ids, mask = random_ids(1, 6), torch.tensor([[0, 0, 1, 1, 1, 1]])
    logits = model(ids, mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    assert_same(logits[:, 2:], model(ids[:, 2:]))


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"n_embd": 32, "n_head": 7}, "n_head must divide n_embd: got n_head=7, n_embd=32"),
        ({"n_layer": 0}, "n_layer must be a whole number of at least 1: got n_layer=0"),
        ({"vocab_size": -3}, "vocab_size must be a whole number of at least 1: got vocab_size=-3"),
        ({"n_embd": 64.0}, "n_embd must be a whole number of at least 1: got n_embd=64.0"),
        ({"block_size": True}, "block_size must be a whole number of at least 1: got block_size=True"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1: got dropout=1.0"),
        ({"dropout": -0.1}, "dropout must be at least 0 and below 1: got dropout=-0.1"),
        ({"dropout": math.nan}, "dropout must be at least 0 and below 1: got dropout=nan"),
        ({"gelu": "relu"}, 'gelu must be "exact" or "tanh": got gelu=\'relu\''),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_configuration_is_named(change: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the whole text is compared
        GPTConfig(**change)  # type: ignore[arg-type]
    assert str(error.value) == text


def test_too_long_a_sequence_names_both_numbers() -> None:
    model, cache = tiny_model(), ListCache()
    text = "the model's block_size is 16 tokens: got a sequence of {} tokens"
    with pytest.raises(ValueError, match=text.format(17)):
        model(random_ids(1, 17))
    with pytest.raises(ValueError, match=text.format(20)):
        model(random_ids(1, 2), position_ids=torch.tensor([[3, 19]]))
    model(random_ids(1, 16), past_key_values=cache)
    with pytest.raises(ValueError, match=text.format(17)):
        model(random_ids(1, 1), past_key_values=cache)


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        (torch.zeros(2, 3), "got torch.float32 (2, 3)"),
        (torch.zeros(5, dtype=torch.int64), "got torch.int64 (5,)"),
        (torch.zeros(2, 0, dtype=torch.int64), "got torch.int64 (2, 0)"),
        (torch.zeros(2, 3, dtype=torch.bool), "got torch.bool (2, 3)"),
    ],
    ids=str,
)
def test_input_ids_of_a_wrong_kind_are_described(ids: Tensor, text: str) -> None:
    with pytest.raises(ValueError, match="input_ids must be int64/int32") as error:
        tiny_model()(ids)
    assert str(error.value).endswith(text)


def test_a_mask_or_positions_of_a_wrong_shape_show_both_shapes() -> None:
    model, ids, cache = tiny_model(), random_ids(2, 5), ListCache()
    with pytest.raises(
        ValueError, match=r"attention_mask must be bool or int \(2, 5\): got torch.int64 \(2, 4\)"
    ):
        model(ids, torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"attention_mask .* \(2, 5\): got torch.float32 \(2, 5\)"):
        model(ids, torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"the shape of input_ids, \(2, 5\): got \(5,\)"):
        model(ids, position_ids=torch.arange(5))
    model(ids, past_key_values=cache)
    with pytest.raises(
        ValueError, match=r"attention_mask must be bool or int \(2, 6\): got torch.int64 \(2, 1\)"
    ):
        model(ids[:, :1], torch.ones(2, 1, dtype=torch.int64), past_key_values=cache)


# ------------------------------------------------------------------------------ numbers, names, initial state


@pytest.mark.parametrize("bias", [False, True], ids=["bias=False", "bias=True"])
@pytest.mark.parametrize("sizes", [(16, 4, 2, 16), (24, 3, 1, 5), (8, 1, 7, 33)], ids=str)
def test_the_parameter_formula_counts_what_is_there(sizes: tuple[int, int, int, int], bias: bool) -> None:
    n_embd, n_head, n_layer, block_size = sizes
    config = tiny_config(n_embd, n_head, n_layer, block_size, bias)
    model = GPTLMHeadModel(config)
    assert config.parameter_count() == sum(parameter.numel() for parameter in model.parameters())
    assert config.parameter_count() == sum(count for _, count in parameter_table(model))


@pytest.mark.parametrize("name", GPT2_SIZES)
def test_published_gpt2_sizes(name: str) -> None:
    n_embd, n_head, n_layer, count = GPT2_SIZES[name]
    config = GPTConfig(n_embd, n_head, n_layer, block_size=1024, vocab_size=50257, bias=True, gelu="tanh")
    assert config.parameter_count() == count
    with torch.device("meta"):
        model = GPTLMHeadModel(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_the_documents_model_has_46_4_million_parameters() -> None:
    config = GPTConfig()
    assert (config.n_embd, config.n_head, config.n_layer, config.vocab_size) == (768, 8, 6, 4825)
    assert (config.dropout, config.block_size, config.bias, config.gelu) == (0.1, 256, False, "exact")
    assert f"{config.parameter_count() / 1e6:.1f}M" == "46.4M"


def test_the_parameter_table_lists_the_parts() -> None:
    C, V, T, L = 16, 29, 16, 2
    assert parameter_table(GPTLMHeadModel(tiny_config())) == [
        ("wte", V * C),
        ("wpe", T * C),
        ("blocks.*.ln_1", L * 2 * C),
        ("blocks.*.attn.qkv_proj", L * (3 * C * C + 3 * C)),
        ("blocks.*.attn.out_proj", L * C * C),
        ("blocks.*.ln_2", L * 2 * C),
        ("blocks.*.mlp.c_fc", L * 4 * C * C),
        ("blocks.*.mlp.c_proj", L * 4 * C * C),
        ("ln_f", 2 * C),
    ]


@pytest.mark.parametrize("bias", [False, True])
def test_parameter_names_are_the_documents(bias: bool) -> None:
    names = {name for name, _ in GPTLMHeadModel(tiny_config(n_layer=1, bias=bias)).named_parameters()}
    block = {
        "ln_1.weight",
        "ln_1.bias",
        "ln_2.weight",
        "ln_2.bias",
        "attn.qkv_proj.weight",
        "attn.qkv_proj.bias",
    }
    block |= {"attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
    if bias:
        block |= {"attn.out_proj.bias", "mlp.c_fc.bias", "mlp.c_proj.bias"}
    outside = {"wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"}
    assert names == {f"transformer.{name}" for name in outside | {f"blocks.0.{name}" for name in block}}


def test_the_head_stays_tied_through_copies_casts_and_state_dicts() -> None:
    model = copy.deepcopy(GPTLMHeadModel(tiny_config())).to(torch.float64)
    assert model.lm_head.weight is model.transformer.wte.weight
    model.load_state_dict(GPTLMHeadModel(tiny_config()).state_dict())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "lm_head.weight" in model.state_dict()


def test_initial_weights_have_gpt2s_spread() -> None:
    torch.manual_seed(5)
    config = GPTConfig(n_embd=128, n_head=4, n_layer=8, vocab_size=500, block_size=64, bias=True)
    for name, parameter in GPTLMHeadModel(config).named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif ".ln_" in name:
            assert (parameter == 1).all(), name
        else:
            residual = "out_proj" in name or "c_proj" in name
            expected = 0.02 / math.sqrt(2 * 8) if residual else 0.02
            # 8192 values or more: the standard error of their deviation is 0.8 % at most; 4 % is five of them
            assert parameter.std().item() == pytest.approx(expected, rel=0.04), name
            assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(parameter.numel()), name


def test_the_initial_loss_is_that_of_guessing() -> None:
    torch.manual_seed(6)
    config = GPTConfig(n_embd=64, n_head=4, n_layer=3, vocab_size=1000, block_size=64, dropout=0.0)
    ids, targets = torch.randint(1000, (2, 8, 64))
    loss = F.cross_entropy(GPTLMHeadModel(config)(ids).flatten(0, 1), targets.flatten())
    # logits have a spread of 0.02 * sqrt(64) = 0.16, which adds 0.16^2 / 2 = 0.013 to ln V
    assert loss.item() == pytest.approx(math.log(1000), abs=0.05)


@pytest.mark.parametrize("slow", [False, True], ids=["sdpa", "written out"])
@pytest.mark.parametrize("masked", [False, True], ids=["without mask", "with mask"])
def test_dropout_acts_in_training_only_and_in_four_places(slow: bool, masked: bool) -> None:
    ids = random_ids(2, 8)
    mask = torch.ones_like(ids) if masked else None
    model = tiny_model().train()

    def differs() -> bool:
        once, again = (model.transformer(ids, mask, attentions=[] if slow else None) for _ in range(2))
        return not torch.equal(once, again)

    dropouts = {
        name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)
    }
    attentions = [module for module in model.modules() if isinstance(module, CausalSelfAttention)]
    assert len(dropouts) == 1 + 2 * 2  # embeddings; in each block after attention and after the MLP
    assert len(attentions) == 2  # the weights: not a module but an argument of SDPA
    assert all(module.p == 0.1 for module in [*dropouts.values()])
    assert all(module.dropout == 0.1 for module in attentions)
    for module in dropouts.values():
        module.p = 0.0
    assert differs()  # by attention's own
    for attention in attentions:
        attention.dropout = 0.0
    assert not differs()
    for module in dropouts.values():
        module.p = 0.5
        assert differs()
        module.p = 0.0
    model = tiny_model().eval()
    assert not differs()


def test_int32_ids_and_bool_masks_give_the_same() -> None:
    model, ids = tiny_model(), random_ids(2, 6)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    assert torch.equal(model(ids.int(), mask.bool()), model(ids, mask))


def test_the_two_gelus_differ_by_at_most_5e_4() -> None:
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    by_definition = [0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in x.tolist()]
    assert_same(F.gelu(x), torch.tensor(by_definition, dtype=torch.float64))
    assert 4e-4 < (F.gelu(x) - F.gelu(x, approximate="tanh")).abs().max().item() < 5e-4
    torch.manual_seed(7)
    exact_model, tanh_model = (
        GPTLMHeadModel(GPTConfig(16, 4, 1, vocab_size=29, block_size=8, gelu=gelu)).eval()
        for gelu in ("exact", "tanh")
    )
    tanh_model.load_state_dict(exact_model.state_dict())
    assert not torch.equal(exact_model(random_ids(1, 8)), tanh_model(random_ids(1, 8)))


def test_the_transformer_and_the_head_are_the_model() -> None:
    model, ids = tiny_model(), random_ids(2, 6)
    assert isinstance(model.transformer, Transformer)
    assert torch.equal(model.lm_head(model.transformer(ids)), model(ids))


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


@pytest.mark.parametrize(
    "config",
    [
        GPTConfig(n_embd=24, n_head=3, n_layer=2, vocab_size=31, block_size=9, bias=True),
        Qwen3Config(31, 24, 40, 3, 4, 2, 6, 9),
        Qwen3Config(31, 24, 40, 3, 4, 2, 6, 9, tie_word_embeddings=False),
    ],
    ids=lambda config: type(config).__name__,
)
def test_a_family_s_arithmetic_is_that_of_its_model(config: ModelConfig) -> None:
    family, model = family_of(config), new_model(config)
    matrices = [parameter for parameter in model.blocks.parameters() if parameter.dim() == 2]
    found = dict(family.matrix_parameters(model))
    assert list(map(id, found)) == list(map(id, matrices))
    for parameter, parts in found.items():  # a stacked matrix is `parts` square ones here
        assert parts == (3 if parameter.shape == (72, 24) else 1)
    assert family.block_weights(config) == sum(parameter.numel() for parameter in matrices)
    # 6 for each weight of a matrix; queries times keys, weights times values: 2 * 2 H D T forward, and three
    # times that with the backward pass
    width = config.num_attention_heads * config.head_dim
    attention = 3 * 4 * width * 9 * config.num_hidden_layers
    expected = 7 * (6 * family.block_weights(config) + attention) + 5 * 6 * model.lm_head.weight.numel()
    assert family.flops(config, 7, 5, 9) == expected
