"""Weights in fewer bits with inputs in full precision: stored values, loading, and a model's answers."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from minigpt.errors import InputError
from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM
from minigpt.families.registry import LanguageModel
from minigpt.generation.api import GenerationOptions, generate_ids
from minigpt.generation.engine import Engine
from minigpt.generation.inputs_embeds import token_embedding
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.weights.quantized import (
    WEIGHT_GROUP,
    Int4Linear,
    Precision,
    QuantizedLinear,
    precision_of,
    rounded_to_int4,
    set_precision,
)
from minigpt.weights.quantized_folders import quantized_weights


def make(name: str) -> LanguageModel:
    torch.manual_seed(0)
    model: LanguageModel = (
        GPTLMHeadModel(GPTConfig(32, 2, 2, 0.0, 32, 40, bias=True))
        if name == "gpt"
        else Qwen3ForCausalLM(Qwen3Config(40, 32, 88, 2, 4, 2, 8, 32))
    )
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (None, "int3", "precision must be one of float32, float16, bfloat16, int8, int4: got 'int3'"),
        ("int8", "int4", "the model is stored in int8: take its unquantised folder for int4"),
        ("float16", "bfloat16", "the model is stored in float16"),
        ("int4", "float32", "the model is stored in int4: take its unquantised folder for float32"),
        ("int4", "int8", "the model is stored in int4: take its unquantised folder for int8"),
    ],
)
def test_what_is_refused(first: Any, then: Any, message: str) -> None:
    model = set_precision(make("gpt"), first)
    with pytest.raises(InputError, match=message):
        set_precision(model, then)


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_int4_is_off_by_half_a_step(offset: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 3 * WEIGHT_GROUP) + offset
    weight[0] = 0.0
    weight[1] = 0.25
    numbers, scales = rounded_to_int4(weight)
    assert (int(numbers.min()), int(numbers.max())) == (0, 15)
    scale, zero = scales.float().permute(2, 1, 0).repeat_interleave(WEIGHT_GROUP, dim=-1)  # (N, K) each
    found = (numbers.float() - 8) * scale + zero
    # half a step; and the ends move by what bfloat16's 8 bits make of offset and scale
    allowed = 0.501 * scale + (zero.abs() + 15 * scale) / 2**8
    assert ((found - weight).abs() <= allowed).all()
    torch.testing.assert_close(found[:2], weight[:2], rtol=2**-7, atol=1e-6)


def test_int4_reads_as_torch_s_own_kernel_does() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(2 * WEIGHT_GROUP, 32).bfloat16()
    x = torch.randn(3, 5, 2 * WEIGHT_GROUP).bfloat16()
    layer = Int4Linear.of(linear)
    numbers, scales = rounded_to_int4(linear.weight)
    packed = torch._convert_weight_to_int4pack_for_cpu(numbers.int(), 1)
    kernel = torch._weight_int4pack_mm_for_cpu(x.view(15, -1), packed, WEIGHT_GROUP, scales).view(3, 5, 32)
    # the kernel multiplies out in float32, we in bfloat16: 8 bits of each of 128 products
    torch.testing.assert_close(layer(x), kernel + linear.bias, rtol=0.03, atol=0.1)
    assert torch.equal(layer.dequantized().view(32, -1), layer.dequantized())
    assert layer.weight.nbytes == 32 * WEIGHT_GROUP  # two in a byte


@pytest.mark.parametrize("width", [WEIGHT_GROUP, 40])  # 40: padded
def test_int4_is_the_product_with_what_is_stored(width: int) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(width, 12), torch.randn(4, width)
    layer = Int4Linear.of(linear)
    expected = F.linear(x, layer.dequantized()[:, :width].float(), linear.bias)
    torch.testing.assert_close(layer(x), expected)


def test_int8_has_the_whole_numbers_of_a_folder() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(40, 12), torch.randn(4, 40)
    folder = QuantizedLinear.of(linear, "int8")
    layer = QuantizedLinear.of(linear, "int8", rounds_inputs=False)
    assert torch.equal(layer.weight, folder.weight)
    torch.testing.assert_close(layer(x), F.linear(x, folder.dequantized(), linear.bias))
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert not torch.equal(layer(x), folder(x))  # a CPU's inputs are rounded, too


@pytest.mark.parametrize("name", ["gpt", "qwen3"])
def test_a_model_in_fewer_bits_says_about_the_same(name: str) -> None:
    ids = torch.randint(0, 40, (4, 30), generator=torch.Generator().manual_seed(1))
    exact = make(name)(ids).detach().log_softmax(dim=-1)
    distance = {}
    for precision, dtype in (("bfloat16", torch.float32), ("int4", torch.bfloat16)):
        model = set_precision(make(name), precision)  # type: ignore[arg-type]
        assert next(model.parameters()).dtype == dtype  # of activations, on a CPU
        found = model(ids).detach().float().log_softmax(dim=-1)
        distance[precision] = float((exact.exp() * (exact - found)).sum(dim=-1).mean())  # KL divergence
    # less than a tenth of what two unrelated models of this kind are apart; and bits cost something
    other = (exact.exp() * (exact - exact.roll(1, dims=0))).sum(dim=-1).mean()
    assert 0 < distance["bfloat16"] < distance["int4"] < float(other) / 10


@pytest.mark.parametrize("name", ["gpt", "qwen3"])
def test_int4_writes_alone_and_in_an_engine(name: str) -> None:
    model, options = set_precision(make(name), "int4"), GenerationOptions(max_new_tokens=12)
    alone = generate_ids(model, [[5, 6, 7]], options, None)[0]
    for cuda_graph in (False, True):
        found = Engine(model, max_rows=1, cuda_graph=cuda_graph).submit([5, 6, 7], options).result()
        # bfloat16: near ties may fall otherwise in another order of sums; the first token hardly can
        assert (found.ids[0], len(found.ids)) == (alone.ids[0], 12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here with a kernel that reads int4")
def test_int4_of_a_folder_is_put_in_the_kernel_s_order_on_its_way_there() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(100, 16).bfloat16(), torch.randn(5, 100).bfloat16().cuda()
    read_from_a_file = Int4Linear.of(linear)
    moved, there = read_from_a_file.cuda(), Int4Linear.of(linear.cuda())
    assert moved.uses_kernel
    assert there.uses_kernel
    assert torch.equal(moved.weight, there.weight)
    assert torch.equal(moved.cuda()(x), there(x)), "once is enough"


def test_a_cpu_s_precisions_keep_activations_in_float32() -> None:
    ids = torch.arange(10)[None]
    precisions: tuple[Precision, ...] = ("float16", "bfloat16", "int8")
    for precision in precisions:
        model = set_precision(make("gpt"), precision)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert model(ids).dtype == torch.float32
        assert precision_of(model) == precision
    assert set_precision(model := make("gpt"), None) is model


@pytest.mark.parametrize("name", ["gpt", "qwen3"])
@pytest.mark.parametrize(("dtype", "stored"), [(torch.float16, "float16"), (torch.bfloat16, "bfloat16")])
@torch.inference_mode()
def test_what_was_published_in_16_bits_stays_so_and_loses_nothing(
    name: str, dtype: torch.dtype, stored: str
) -> None:
    ids = torch.arange(10)[None]
    exact = make(name).to(dtype).float()
    expected = exact(ids)
    model = set_precision(make(name).to(dtype), None)
    assert precision_of(model) == stored
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}  # norms and positions
    table = token_embedding(model)
    assert (table.weight.dtype, table(ids).dtype) == (dtype, torch.float32)
    assert table.weight.data_ptr() == model.lm_head.weight.data_ptr()  # still one
    assert torch.equal(model(ids), expected)
    plain = set_precision(make(name).to(dtype), "float32")
    assert precision_of(plain) == "float32"
    assert torch.equal(plain(ids), expected)
    assert plain.lm_head.weight is next(plain.parameters())  # still tied
    fewer = set_precision(make(name).to(dtype), "int8")
    assert torch.equal(fewer(ids), set_precision(exact, "int8")(ids))
    assert token_embedding(fewer).weight.dtype == dtype
    assert {tensor.dtype for tensor in quantized_weights(fewer).values()} == {torch.int8, torch.float32}
    with pytest.raises(InputError, match=f"the model is stored in {stored}"):
        set_precision(model, "int8")
