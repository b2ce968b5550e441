"""The step of CUDA graphs, run eagerly on a CPU, gives the same ids as generate_ids."""

import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from minigpt.errors import InputError
from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM
from minigpt.families.registry import LanguageModel
from minigpt.generation import native, sampling
from minigpt.generation.api import Completion, GenerationOptions, generate_ids
from minigpt.generation.cache import KeyValueCache, cache_bytes
from minigpt.generation.cuda_graph import (
    NOTHING,
    GraphDecoder,
    _GroupedQueries,
    can_choose,
    capacity,
    sizes,
)
from minigpt.generation.engine import Engine, EngineThread, RequestHandle
from minigpt.generation.sequence import Request, Sequence
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.weights.quantized import set_precision

V, BLOCK, EOS = 40, 200, 2


WINDOWS = {"sliding_window": 7, "layer_types": ("sliding_attention", "full_attention")}
MORE: dict[str, dict[str, Any]] = {"qwen3-windows": WINDOWS}


def make(name: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Make a model with enlarged initial weights, like those of a trained model, so that its texts vary."""
    torch.manual_seed(0)
    model: LanguageModel = (
        GPTLMHeadModel(GPTConfig(32, 2, 2, 0.1, BLOCK, V))
        if name == "gpt"
        else Qwen3ForCausalLM(Qwen3Config(V, 32, 40, 2, 4, 2, 8, BLOCK, **MORE.get(name, {})))
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    return model.to(dtype)


def requests_of(seed: int, count: int) -> Iterator[tuple[list[int], GenerationOptions]]:
    """Yield prompts of mixed lengths, with all kinds of options that the device supports."""
    draw = random.Random(seed)
    kinds: tuple[dict[str, Any], ...] = (
        {},
        {"do_sample": True, "temperature": 1.3},
        {"do_sample": True, "top_k": 5},
        {"do_sample": True, "top_p": 0.8, "temperature": 0.7},
        {"do_sample": True, "min_p": 0.05, "top_k": 20, "top_p": 0.95},
    )
    for number in range(count):
        prompt = [draw.randrange(3, V) for _ in range(draw.choice([1, 2, 9, 33, 70]))]
        kind = kinds[number % len(kinds)]
        seeded = {"seed": draw.randrange(1000)} if kind else {}
        yield prompt, GenerationOptions(max_new_tokens=draw.randint(1, 90), **kind, **seeded)  # type: ignore[arg-type]


# -- the same tokens -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *((name, kind) for name in ("gpt", "qwen3") for kind in ("float32", "int8")),
        ("qwen3-windows", "float32"),
    ],
)
def test_a_thousand_tokens_are_those_of_generate_ids(
    name: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "library", lambda: None)  # int8 in C sums in another order
    model = set_precision(make(name), precision)  # type: ignore[arg-type]
    # in int8 fewer: its twin in floats multiplies the weights out for each token
    asked = list(requests_of(1, 45 if precision == "float32" else 12))
    expected = [generate_ids(model, [prompt], options, EOS)[0] for prompt, options in asked]
    least = 1000 if precision == "float32" else 200
    assert sum(len(completion.ids) for completion in expected) >= least
    assert {completion.stop_reason for completion in expected} == {"eos", "length"}
    engine = Engine(model, max_rows=6, chunk=16, max_waiting=50, prefix_mib=0.1, cuda_graph=True)
    draw = random.Random(2)
    handles = []
    for prompt, options in asked:  # requests join while others are running
        handles.append(engine.submit(prompt, options, EOS))
        for _ in range(draw.randint(0, 2)):
            engine.step()
    engine.run()
    assert [handle.result() for handle in handles] == expected
    assert engine.cache.n_free == engine.cache.slots
    assert engine.statistics.tokens_written == sum(len(completion.ids) for completion in expected)


@pytest.mark.parametrize("burst", [1, 3, 8])
def test_it_gives_way_to_requests_that_the_host_must_choose_for(burst: int) -> None:
    model, asked = make("qwen3"), list(requests_of(3, 16))
    asked[4::5] = [
        (prompt, GenerationOptions(max_new_tokens=12, repetition_penalty=1.3)) for prompt, _ in asked[4::5]
    ]
    asked[3] = (asked[3][0], GenerationOptions(max_new_tokens=9, do_sample=True, seed=1, typical_p=0.7))
    expected = [generate_ids(model, [prompt], o, EOS, tokenizer=Letters())[0] for prompt, o in asked]
    engine = Engine(model, max_rows=3, cuda_graph=True, burst=burst)
    handles = [engine.submit(prompt, options, EOS, Letters()) for prompt, options in asked]
    engine.run()
    assert [handle.result() for handle in handles] == expected


class Letters:
    """A tokenizer whose ids are letters."""

    eos_token_id = EOS

    def encode_text(self, text: str) -> list[int]:
        return [ord(letter) - 90 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(90 + token) for token in ids)

    def unknown_characters(self, text: str) -> list[str]:
        return []


def test_a_row_gets_the_same_from_a_thread_token_by_token() -> None:
    model, asked = make("gpt"), list(requests_of(4, 8))
    expected = [generate_ids(model, [prompt], options, EOS)[0].ids for prompt, options in asked]
    with EngineThread(Engine(model, max_rows=4, cuda_graph=True)) as engine:
        handles = [engine.submit(prompt, options, EOS) for prompt, options in asked]
        assert [list(handle) for handle in handles] == expected


def test_bfloat16_is_what_it_is_without_static_memory() -> None:
    model = make("qwen3", torch.bfloat16)
    asked = [(prompt, GenerationOptions(max_new_tokens=6)) for prompt, _ in requests_of(5, 4)]
    found = []
    for static in (False, True):
        engine = Engine(model, max_rows=1, cuda_graph=static)
        handles = [engine.submit(prompt, options) for prompt, options in asked]
        engine.run()
        found.append([handle.result().ids for handle in handles])
    # bf16 has 8 bits: two orders of summing may disagree about two tokens that are nearly as likely
    same = sum(a == b for x, y in zip(*found) for a, b in zip(x, y))
    assert same >= 18, found


# -- the end of a row ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("burst", [1, 4, 8])
def test_nothing_follows_a_stop_that_is_read_late(burst: int) -> None:
    model = make("gpt")
    prompts = [prompt for prompt, _ in requests_of(6, 12)]
    plain = [
        generate_ids(model, [prompt], GenerationOptions(max_new_tokens=40), None)[0] for prompt in prompts
    ]
    tokenizer = Letters()
    asked = [  # each stops at some two letters that it says somewhere in the middle, wherever in a burst
        GenerationOptions(max_new_tokens=40, stop_strings=tokenizer.decode(answer.ids[5 + n : 7 + n]))
        for n, answer in enumerate(plain)
    ]
    expected = [generate_ids(model, [p], o, None, tokenizer=tokenizer)[0] for p, o in zip(prompts, asked)]
    assert {completion.stop_reason for completion in expected} == {"stop_string"}
    engine = Engine(model, max_rows=3, cuda_graph=True, burst=burst)
    handles = [engine.submit(prompt, o, None, tokenizer) for prompt, o in zip(prompts, asked)]
    engine.run()
    assert [list(handle) for handle in handles] == [completion.ids for completion in expected]
    assert [handle.result() for handle in handles] == expected
    assert engine.statistics.tokens_written == sum(len(completion.ids) for completion in expected)


def test_behind_an_eos_or_the_last_token_the_device_writes_nothing() -> None:
    model = make("gpt").eval()
    cache = KeyValueCache(model.config, 2, capacity(BLOCK, BLOCK))
    step = GraphDecoder(model, cache, BLOCK)
    first = generate_ids(model, [[5]], GenerationOptions(max_new_tokens=8), None)[0].ids
    last = first.index(first[3])  # where the token that is made its eos comes first
    step.start(0, Sequence([5], Request(GenerationOptions(), [first[3]]), limit=8))
    step.start(1, Sequence([5], Request(GenerationOptions(), []), limit=2))
    written = step.run(2, BLOCK, 8).tokens()
    assert [ids[0] for ids in written] == [*first[: last + 1], *[NOTHING] * (7 - last)]
    assert [ids[1] for ids in written] == [*first[:2], *[NOTHING] * 6]
    assert step.run(2, BLOCK, 2).tokens() == [[NOTHING, NOTHING]] * 2


def test_a_cancelled_request_frees_its_slot_for_one_that_does_not_notice() -> None:
    model = make("qwen3")
    (long, _), (other, options) = list(requests_of(7, 2))
    everything = generate_ids(model, [long], GenerationOptions(max_new_tokens=100), None)[0].ids
    engine = Engine(model, max_rows=1, cuda_graph=True, burst=4)
    first = engine.submit(long, GenerationOptions(max_new_tokens=100))
    tokens = iter(first)
    taken = [next(tokens) for _ in range(10)]
    second = engine.submit(other, options, EOS)
    first.cancel()
    completion = first.result()
    assert completion.stop_reason == "cancelled"
    assert completion.ids == everything[: len(completion.ids)]
    assert completion.ids[:10] == taken
    assert second.result() == generate_ids(model, [other], options, EOS)[0]
    assert engine.cache.n_free == 1
    assert engine.is_idle


def test_damaged_weights_end_a_request_with_the_words_of_generate_ids() -> None:
    model = make("gpt")
    next(iter(model.blocks)).mlp.c_fc.weight.data[0, 0] = torch.nan
    handle = Engine(model, cuda_graph=True).submit([5, 6], GenerationOptions(max_new_tokens=4))
    with pytest.raises(InputError, match="not finite numbers"):
        handle.result()


@pytest.mark.parametrize("values", [{"burst": 0}, {"max_rows": 0}])
def test_sizes_that_make_no_sense_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(InputError, match="must be at least 1"):
        Engine(make("gpt"), cuda_graph=True, **values)  # type: ignore[arg-type]


# -- what makes it a graph -----------------------------------------------------------------------------------


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records operations: names, shapes, addresses of buffers, numbers that come from the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        def shown(value: object) -> object:
            if isinstance(value, torch.Tensor):
                return value.dtype, tuple(value.shape), value.stride()
            return [shown(item) for item in value] if isinstance(value, list | tuple) else repr(value)

        self.calls.append((str(func), shown(args), shown(list((kwargs or {}).items()))))
        return func(*args, **(kwargs or {}))


class Faithful:
    """A backend with the conditions of a graph: equal keys have equal operations. It warms up each time."""

    def __init__(self) -> None:
        self.records: dict[object, list[object]] = {}
        self.steps = 0

    def __call__(self, key, step, prepare) -> None:  # type: ignore[no-untyped-def]
        prepare()
        self.steps += 1
        with Recording() as recording:
            step()
        first = self.records.setdefault(key, recording.calls)
        assert first == recording.calls


@pytest.mark.parametrize("name", ["gpt", "qwen3"])
def test_a_step_does_the_same_each_time_and_waits_for_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = make(name), list(requests_of(8, 8))
    expected = [generate_ids(model, [prompt], options, EOS)[0] for prompt, options in asked]
    engine = Engine(model, max_rows=4, cuda_graph=True)
    assert engine.pipeline is not None
    backend = Faithful()
    monkeypatch.setattr(engine.pipeline.step, "_backend", backend)
    handles = [engine.submit(prompt, options, EOS) for prompt, options in asked]
    engine.run()
    assert [handle.result() for handle in handles] == expected
    names = [call[0] for calls in backend.records.values() for call in calls]  # type: ignore[index]
    # The model looks at positions on a CPU, and there alone (minigpt.model.check_inputs): once in a step.
    waits = [
        name for name in names if any(w in name for w in ("item", "local_scalar", "nonzero", "_to_copy"))
    ]
    n_records, n_steps = len(backend.records), backend.steps
    assert waits == ["aten.item.default"] * n_records
    # rows 1, 2, 4; columns 128 and 200; what was asked for together: few, however many steps
    assert {key[:2] for key in backend.records} <= {(r, c) for r in (1, 2, 4) for c in (128, 200)}  # type: ignore[index]
    assert n_records < n_steps / 4


def test_the_host_reads_once_in_a_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("gpt")
    engine = Engine(model, max_rows=2, cuda_graph=True, burst=8)
    assert engine.pipeline is not None
    step, reads, ahead = engine.pipeline.step, [], []
    run = step.run

    def watched(rows: int, columns: int, steps: int) -> object:
        burst = run(rows, columns, steps)
        tokens = burst.tokens
        burst.tokens = lambda: (reads.append(steps), ahead.append(engine.pipeline.ahead), tokens())[-1]  # type: ignore
        return burst

    monkeypatch.setattr(step, "run", watched)
    handles = [engine.submit([5, 6], GenerationOptions(max_new_tokens=97)) for _ in range(2)]
    engine.run()
    assert [len(handle.tokens) for handle in handles] == [97, 97]
    assert reads == [1, *[8] * 12]  # the first token at once
    assert ahead == [*[1] * 12, 0]  # read while the next burst is being computed


def test_memory_is_taken_once_and_reported() -> None:
    model = make("qwen3")
    engine = Engine(model, max_rows=4, max_length=100, cuda_graph=True)
    columns = 112  # 100, up to a multiple of 16
    assert engine.cache.bytes == cache_bytes(model.config, 4, columns)
    before = engine.bytes
    # drawn numbers: 4 rows of 100 doubles; all else is a few numbers for each row and burst
    assert 0 < before - engine.cache.bytes - 4 * 100 * 8 < 4 * 300
    for prompt, _ in requests_of(9, 6):
        engine.submit(prompt[:40], GenerationOptions(max_new_tokens=50))
    engine.run()
    assert engine.bytes == before
    with pytest.raises(InputError, match="max_cache_mib"):
        Engine(model, max_rows=4, max_length=100, cuda_graph=True, max_cache_mib=0.01)


def test_torch_compile_sees_a_step_as_one_graph() -> None:
    model = make("qwen3")
    engine = Engine(model, max_rows=1, cuda_graph=True)
    assert engine.pipeline is not None
    step = engine.pipeline.step
    # "eager": traced as for any compiler, and then run as it is; nothing is generated
    step._logits = torch.compile(step._model_logits, dynamic=False, fullgraph=True, backend="eager")
    options = GenerationOptions(max_new_tokens=5)
    assert engine.submit([5, 6], options).result() == generate_ids(model, [[5, 6]], options, None)[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here to record graphs on")
@pytest.mark.parametrize("name", ["gpt", "qwen3"])
def test_graphs_write_what_eager_writes(name: str) -> None:
    model, asked = make(name).cuda(), list(requests_of(10, 20))
    expected = [generate_ids(model, [prompt], options, EOS)[0] for prompt, options in asked]
    engine = Engine(model, max_rows=4)
    assert engine.pipeline is not None
    handles: list[RequestHandle] = [engine.submit(prompt, options, EOS) for prompt, options in asked]
    engine.run()
    found: list[Completion] = [handle.result() for handle in handles]
    assert found == expected


# -- its parts -----------------------------------------------------------------------------------------------


def test_shared_heads_of_keys_give_the_same_without_copies() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 6, 1, 8), torch.randn(3, 2, 12, 8), torch.randn(3, 2, 12, 8)
    mask = torch.rand(3, 1, 1, 12) < 0.7
    mask[..., -1] = True
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    with _GroupedQueries():
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        alone = F.scaled_dot_product_attention(q[:, :2], k, v, attn_mask=mask)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(alone, F.scaled_dot_product_attention(q[:, :2], k, v, attn_mask=mask))


def test_filters_row_by_row_are_those_of_each_row() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 30).round(decimals=1)  # with ties
    rows = [(1.0, 0, 1.0, 0.0), (0.5, 3, 1.0, 0.0), (1.7, 0, 0.6, 0.0), (1.0, 30, 0.9, 0.1)]
    rows += [(2.0, 99, 0.3, 0.0), (1.0, 1, 1.0, 0.5)]
    names = ("temperature", "top_k", "top_p", "min_p")
    values: dict[str, Any] = {name: torch.tensor(column)[:, None] for name, column in zip(names, zip(*rows))}
    expected = [sampling.filtered(line[None], *row)[0] for line, row in zip(logits, rows)]
    torch.testing.assert_close(sampling.filtered(logits, **values), torch.stack(expected), rtol=0, atol=0)


def test_who_chooses() -> None:
    def is_device(options: GenerationOptions, eos: list[int]) -> bool:
        return can_choose(Sequence([5], Request(options, eos), limit=4))

    assert is_device(GenerationOptions(do_sample=True, top_k=5, top_p=0.5, min_p=0.1, temperature=2.0), [2])
    values: list[dict[str, Any]] = [
        {"repetition_penalty": 1.1}, {"typical_p": 0.5}, {"logit_bias": {3: 1.0}}, {"window": 9},
        {"use_cache": False}, {"regex": "a"},
    ]  # fmt: skip
    for one in values:
        assert not is_device(GenerationOptions(**one), [2])
    assert not is_device(GenerationOptions(), list(range(9)))


def test_sizes_are_few_and_the_largest_is_one() -> None:
    for largest in (1, 7, 128, 200, 1024):
        found = sizes(largest, 1)
        assert found == sorted(set(found))
        assert found[-1] == largest
        assert all(b <= 2 * a for a, b in pairwise(found))
    assert capacity(100, 200) == 112
    assert capacity(199, 200) == 200
