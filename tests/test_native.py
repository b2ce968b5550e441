"""The C step compared with the PyTorch modules: both families, four precisions, padding, batches, prompts."""

import ctypes
import functools
import platform
import shlex
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minigpt.errors import InputError
from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM
from minigpt.families.registry import LanguageModel
from minigpt.finetuning.lora import LoraConfig, apply_lora, lora_layers, merge_and_unload
from minigpt.generation import native
from minigpt.generation.api import GenerationOptions, generate_ids
from minigpt.generation.cache import KeyValueCache
from minigpt.generation.model_runner import TorchRunner
from minigpt.generation.native import NativeRunner, runner_for
from minigpt.generation.native_library import FLAGS, Build, build, cache_folder, system_build
from minigpt.generation.sampling import greedy
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.weights.quantized import (
    INPUT_GROUP,
    Precision,
    QuantizedLinear,
    rounded_groups,
    rounded_rows,
    set_precision,
)
from tests.marks import compiled

V, LONGEST = 83, 48
# widths that are no multiples of a vector, of four rows, of a group of 128; several tiles of tokens;
# "panels": multiples of 128, whose products with many tokens are taken in panels
MODELS: dict[str, Callable[[], LanguageModel]] = {
    "gpt": lambda: GPTLMHeadModel(GPTConfig(72, 3, 2, 0.0, LONGEST, V)),
    "gpt2": lambda: GPTLMHeadModel(GPTConfig(76, 2, 2, 0.0, LONGEST, V, bias=True, gelu="tanh")),
    "gpt2-wide": lambda: GPTLMHeadModel(GPTConfig(264, 3, 1, 0.0, LONGEST, V, bias=True, gelu="tanh")),
    "gpt2-panels": lambda: GPTLMHeadModel(GPTConfig(384, 3, 1, 0.0, LONGEST, V, bias=True, gelu="tanh")),
    "one-head": lambda: GPTLMHeadModel(GPTConfig(5, 1, 1, 0.0, LONGEST, V)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(V, 68, 100, 2, 6, 2, 16, LONGEST)),
    "qwen3-wide": lambda: Qwen3ForCausalLM(Qwen3Config(V, 323, 290, 1, 2, 1, 32, LONGEST)),
    "qwen3-panels": lambda: Qwen3ForCausalLM(Qwen3Config(V, 128, 300, 1, 4, 2, 32, LONGEST)),
    "qwen3-untied": lambda: Qwen3ForCausalLM(
        Qwen3Config(V, 64, 33, 1, 2, 2, 10, LONGEST, tie_word_embeddings=False)
    ),
}
CPU_PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "bfloat16", "int8")
WITHOUT = {"without AVX-512": ["-mno-avx512f"], "without AVX2": ["-mno-avx512f", "-mno-avx2"]}


@functools.cache
def built(how: str) -> Build:
    """Return the library, compiled for this processor, for older ones, or by another compiler."""
    if how == "by clang":
        return build(["clang"], cache=cache_folder())
    compiler = shlex.split(system_build().compiler)
    return build(compiler, [*FLAGS, *WITHOUT.get(how, [])], cache_folder())


@pytest.fixture(params=["all of this processor", *WITHOUT, "by clang"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process use each of these libraries."""
    if request.param in WITHOUT and platform.machine() != "x86_64":
        pytest.skip("these instructions are x86's")
    made = built(request.param)
    if request.param == "by clang" and made.library is None:
        pytest.skip(made.reason)
    assert made.library is not None, made.reason
    monkeypatch.setattr(native, "library", lambda: made.library)


def make(name: str, precision: Precision = "float32") -> LanguageModel:
    """Make a model with weights large enough for attention and norms to have an effect."""
    torch.manual_seed(3)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return set_precision(model, precision)


def ids(rows: int, length: int) -> Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(length))


def runner_of(model: LanguageModel) -> NativeRunner:
    runner = runner_for(model)
    assert isinstance(runner, NativeRunner)
    return runner


def read(runner: NativeRunner, given: Tensor, cache: KeyValueCache) -> Tensor:
    """Read the next tokens (n, T) of the first n slots in C. Return a copy of the last logits, (n, V)."""
    return runner._run(given.tolist(), range(len(given)), cache, every=False).clone()


def far(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


# float sums of some hundred terms in another order differ by about 1e-6 of the largest; an input that falls
# on the edge between two whole numbers may round the other way, one step of 127: hence int8's
CLOSE = {"float32": 1e-5, "float16": 1e-5, "bfloat16": 1e-5, "int8": 2e-2}


@compiled
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("precision", CPU_PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_token_by_token_and_at_once_equal_the_modules(name: str, precision: Precision) -> None:
    model, given = make(name, precision), ids(3, 21)
    expected = model(given)  # (3, 21, V)
    runner, cache = runner_of(model), KeyValueCache(model.config, 3, 21)
    for t in range(9):
        assert far(read(runner, given[:, t : t + 1], cache), expected[:, t]) < CLOSE[precision]
    assert far(read(runner, given[:, 9:], cache), expected[:, -1]) < CLOSE[precision]
    assert [cache.length(slot) for slot in range(3)] == [21] * 3


@compiled
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("precision", CPU_PRECISIONS)
@pytest.mark.parametrize("name", ["gpt2", "gpt2-wide", "gpt2-panels", "qwen3", "qwen3-wide", "qwen3-panels"])
@torch.inference_mode()
def test_a_row_has_the_same_bits_alone_and_among_others(name: str, precision: Precision) -> None:
    model, lengths = make(name, precision), (4, 17, 9)
    rows = [ids(1, length + 1)[0].tolist() for length in lengths]
    runner, cache = runner_of(model), KeyValueCache(model.config, 5, 18)
    slots = [4, 0, 3]
    prompt = runner._run([row[:-1] for row in rows], slots, cache, every=False).clone()
    after = runner.decode([row[-1:] for row in rows], slots, cache).clone()
    for row, first, then in zip(rows, prompt, after):
        alone = KeyValueCache(model.config, 1, len(row))
        assert torch.equal(runner._run([row[:-1]], [0], alone, every=False)[0], first)
        assert torch.equal(runner.decode([row[-1:]], [0], alone)[0], then)


@compiled
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("entries", [1, 7, 511, 512, 513, 5000])
@torch.inference_mode()
def test_argmax_is_numpy_s(entries: int) -> None:
    """It returns the first of several equal ones, and a NaN is a row's highest number."""
    random = np.random.default_rng(entries)
    scores = random.integers(-9, 9, (40, entries)).astype(np.float32)  # the highest stands there often
    scores[3] = -np.inf
    scores[4, entries // 2] = np.inf
    places, highest = (ctypes.c_int64 * 40)(), (ctypes.c_float * 40)()
    library = native.library()
    assert library is not None
    library.minigpt_argmax(ctypes.c_void_p(scores.ctypes.data), 40, ctypes.c_int64(entries), places, highest)
    assert places[:] == scores.argmax(axis=1).tolist()
    assert highest[:] == scores.max(axis=1).tolist()
    for place in {0, entries // 2, entries - 1}:
        odd = scores.copy()
        odd[5, place] = np.nan
        library.minigpt_argmax(ctypes.c_void_p(odd.ctypes.data), 40, ctypes.c_int64(entries), places, highest)
        assert [row for row in range(40) if np.isnan(highest[row])] == [5]


@compiled
@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
@torch.inference_mode()
def test_argmax_of_a_call_is_that_of_its_logits(name: str) -> None:
    model, given = make(name), ids(3, 9).tolist()
    runner, cache = runner_of(model), KeyValueCache(model.config, 3, 9)
    for begin, end, every in ((0, 4, False), (4, 5, True), (5, 6, True), (6, 9, True)):
        logits = runner._run([row[begin:end] for row in given], range(3), cache, every)
        assert len(logits) == 3 * (end - begin if every else 1)
        for same in (logits, logits.clone()):  # in C, and by the slow twin
            assert runner.argmax(same) == (greedy(logits).tolist(), logits.amax(dim=-1).tolist())


@compiled
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize(("precision", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
@pytest.mark.parametrize("name", ["gpt2", "one-head", "qwen3", "qwen3-wide"])
@torch.inference_mode()
def test_weights_of_16_bits_give_the_bits_that_they_give_as_float32(
    name: str, precision: Precision, dtype: torch.dtype
) -> None:
    wide, given = make(name).to(dtype).float(), ids(2, 9)
    narrow = set_precision(make(name).to(dtype), precision)
    found = []
    for model in (wide, narrow):
        cache = KeyValueCache(model.config, 2, 9)
        runner = runner_of(model)
        prompt = read(runner, given[:, :8], cache)
        found.append((prompt, read(runner, given[:, 8:], cache)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@compiled
@pytest.mark.parametrize("precision", CPU_PRECISIONS)
@torch.inference_mode()
def test_torch_reads_the_cache_that_it_wrote(precision: Precision) -> None:
    model, given = make("qwen3", precision), ids(2, 12)
    cache = KeyValueCache(model.config, 2, 12)
    read(runner_of(model), given[:, :8], cache)
    logits = model(given[:, 8:], past_key_values=cache.view([0, 1], [4, 4]))
    assert far(logits[:, -1], model(given)[:, -1]) < CLOSE[precision]


@compiled
@torch.inference_mode()
def test_generation_takes_it_and_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [ids(1, n)[0].tolist() for n in (1, 5, 11, 30)]
    options = GenerationOptions(max_new_tokens=12)
    calls: list[int] = []
    original = NativeRunner._run

    def counting(self: NativeRunner, rows: list[list[int]], *more: Any, **named: Any) -> Tensor:
        calls.append(len(rows))
        return original(self, rows, *more, **named)

    monkeypatch.setattr(NativeRunner, "_run", counting)
    for name in MODELS:
        model = make(name).eval()
        calls.clear()
        fast = generate_ids(model, prompts, options, None)
        assert max(calls) == 4
        monkeypatch.setattr(native, "library", lambda: None)
        calls.clear()
        assert generate_ids(model, prompts, options, None) == fast, name
        assert not calls
        monkeypatch.undo()
        monkeypatch.setattr(NativeRunner, "_run", counting)


@compiled
@torch.inference_mode()
def test_values_that_training_changed_are_seen() -> None:
    model, given = make("gpt"), ids(1, 6)
    runner = runner_of(model)
    next(model.parameters()).mul_(1.5)  # the embedding
    got = read(runner, given, KeyValueCache(model.config, 1, 6))
    assert far(got, model(given)[:, -1]) < CLOSE["float32"]


@compiled
@pytest.mark.parametrize("precision", CPU_PRECISIONS)
@torch.inference_mode()
def test_a_damaged_weight_does_not_look_whole(precision: Precision) -> None:
    model, given = make("gpt", precision), ids(1, 6)
    next(model.parameters())[int(given[0, 2])] = float("nan")  # the embedding of a token
    got = read(runner_of(model), given, KeyValueCache(model.config, 1, 6))
    assert not got.isfinite().any()


@compiled
@pytest.mark.parametrize("name", ["gpt", "qwen3"])
def test_adapters_are_not_left_out(name: str) -> None:
    model, prompts, options = make(name), ids(3, 9).tolist(), GenerationOptions(max_new_tokens=9)
    plain = generate_ids(model, prompts, options, None)
    apply_lora(model, LoraConfig(r=4, lora_alpha=64))
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B)
    found = generate_ids(model, prompts, options, None)
    assert isinstance(runner_for(model), TorchRunner)
    assert found != plain
    assert generate_ids(merge_and_unload(model), prompts, options, None) == found
    assert isinstance(runner_for(model), NativeRunner)


class Doubled(torch.nn.Module):
    """A module around another one, with its weight, like the wrappers of other libraries."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.weight, self.eps, self.bias = inner, inner.weight, 1e-5, None

    def forward(self, x: Tensor) -> Tensor:
        doubled: Tensor = 2 * self.inner(x)
        return doubled


@compiled
@pytest.mark.parametrize("name", ["gpt", "qwen3"])
@pytest.mark.parametrize(
    "kind", ["around a norm", "around the head", "hook", "pre-hook", "forward", "a class"]
)
def test_what_c_does_not_know_is_not_left_out(name: str, kind: str) -> None:
    model, prompts, options = make(name), ids(3, 9).tolist(), GenerationOptions(max_new_tokens=9)
    assert isinstance(runner_for(model), NativeRunner)
    block: Any = model.blocks[0]
    norm = "ln_1" if name == "gpt" else "input_layernorm"
    if kind == "around a norm":
        setattr(block, norm, Doubled(getattr(block, norm)))
    elif kind == "around the head":
        model.lm_head = Doubled(model.lm_head)  # type: ignore[assignment]
    elif kind == "hook":
        block.mlp.register_forward_hook(lambda module, given, out: 2 * out)
    elif kind == "pre-hook":
        block.mlp.register_forward_pre_hook(lambda module, given: (2 * given[0],))
    elif kind == "forward":
        block.mlp.forward = lambda x: 0 * x
    else:
        block.mlp.__class__ = type("Other", (type(block.mlp),), {"forward": lambda self, x: 0 * x})
    assert isinstance(runner_for(model), TorchRunner)
    answered = generate_ids(model, prompts, options, None)
    for prompt, answer in zip(prompts, answered):
        text = [*prompt, *answer.ids]
        with torch.inference_mode():
            assert model(torch.tensor([text]))[0, len(prompt) - 1 : -1].argmax(-1).tolist() == list(
                answer.ids
            )


@compiled
@torch.inference_mode()
def test_more_tokens_than_the_cache_holds_are_refused() -> None:
    model = make("gpt")
    cache = KeyValueCache(model.config, 2, 4)
    with pytest.raises(InputError, match=r"room for 4 tokens: got 0 \+ 5 = 5"):
        read(runner_of(model), ids(2, 5), cache)
    assert cache.length(0) == 0


def test_other_activations_are_torch_s() -> None:
    model = make("gpt").double()
    assert isinstance(runner_for(model), TorchRunner)
    assert len(generate_ids(model, [[1, 2]], GenerationOptions(max_new_tokens=3), None)[0].ids) == 3


# -- the numbers themselves ----------------------------------------------------------------------------------


def test_rows_are_off_by_half_a_step_at_most() -> None:
    weight = torch.randn(7, 50) * torch.tensor([1e-6, 1, 1e6, 1, 1, 0, 1])[:, None]
    whole, scale = rounded_rows(weight)
    assert whole.dtype == torch.int8
    assert int(whole.min()) >= -127
    off = (whole * scale[:, None] - weight).abs()
    assert bool((off <= scale[:, None] * 0.5001).all())
    assert torch.equal(whole[5], torch.zeros(50, dtype=torch.int8))


def test_a_large_value_costs_only_its_own_group_precision() -> None:
    x = torch.randn(2, INPUT_GROUP + 9)
    calm = rounded_groups(x)
    assert float((calm - x).abs().max()) <= float(x.abs().max()) / 127 * 0.5001
    x[0, 3] = 1e4
    assert torch.equal(rounded_groups(x)[0, INPUT_GROUP:], calm[0, INPUT_GROUP:])
    assert torch.equal(rounded_groups(x)[1], calm[1])
    assert torch.equal(rounded_groups(torch.zeros(1, 5)), torch.zeros(1, 5))


def test_quantizing_replaces_products_and_keeps_the_rest() -> None:
    model = make("gpt2")
    before = next(model.parameters()).clone()  # the embedding
    set_precision(model, "int8")
    kinds = {type(module) for module in model.modules()}
    assert torch.nn.Linear not in kinds
    assert QuantizedLinear in kinds
    assert torch.equal(next(model.parameters()), before)
    with pytest.raises(InputError, match="the model is stored in int8"):
        set_precision(model, "float16")
    with pytest.raises(InputError, match=r"precision must be one of float32, .*, int4: got 'int3'"):
        set_precision(make("gpt"), "int3")  # type: ignore[arg-type]
