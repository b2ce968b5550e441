"""The static step, in eager on a CPU: what a CUDA graph would record writes what generate_ids writes."""

import random
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from minigpt.command_line import InputError
from minigpt.families import LanguageModel
from minigpt.inference import native, sampling
from minigpt.inference.background import Background
from minigpt.inference.cache import cache_bytes
from minigpt.inference.engine import Engine, Handle
from minigpt.inference.generation import Completion, GenerationOptions, generate_ids
from minigpt.inference.slots import SlotCache
from minigpt.inference.static_step import (
    NOTHING,
    Start,
    StaticStep,
    _GroupedQueries,
    can_choose,
    capacity,
    sizes,
)
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.quantized import quantize
from minigpt.qwen3.model import Qwen3Config, Qwen3ForCausalLM

V, BLOCK, EOS = 40, 200, 2


def make(name: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A model that says various things: initial weights made larger, as training makes them."""
    torch.manual_seed(0)
    model: LanguageModel = (
        GPTLMHeadModel(GPTConfig(32, 2, 2, 0.1, BLOCK, V))
        if name == "gpt"
        else Qwen3ForCausalLM(Qwen3Config(V, 32, 40, 2, 4, 2, 8, BLOCK))
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    return model.to(dtype)


def requests_of(seed: int, count: int) -> Iterator[tuple[list[int], GenerationOptions]]:
    """Prompts of mixed length, and of every kind what the device chooses by."""
    draw = random.Random(seed)
    kinds = (
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


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("name", ["gpt", "qwen3"])
def test_a_thousand_tokens_are_those_of_generate_ids(
    name: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "library", lambda: None)  # int8 in C sums in another order
    model = quantize(make(name), precision)  # type: ignore[arg-type]
    asked = list(requests_of(1, 45))
    expected = [generate_ids(model, [prompt], options, EOS)[0] for prompt, options in asked]
    assert sum(len(completion.ids) for completion in expected) >= 1000
    assert {completion.stop_reason for completion in expected} == {"eos", "length"}
    engine = Engine(model, max_rows=6, chunk=16, max_waiting=50, prefix_mib=0.1, static=True)
    draw = random.Random(2)
    handles = []
    for prompt, options in asked:  # they come while others are written
        handles.append(engine.submit(prompt, options, EOS))
        for _ in range(draw.randint(0, 2)):
            engine.step()
    engine.run()
    assert [handle.result() for handle in handles] == expected
    assert engine.cache.free == engine.cache.slots
    assert engine.statistics.tokens_written == sum(len(completion.ids) for completion in expected)
