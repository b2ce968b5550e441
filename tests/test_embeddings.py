"""Prompts as vectors: the embedding's vectors of some ids give the same result as the ids."""

import dataclasses
from typing import Any

import pytest
import torch

from minigpt.errors import InputError
from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM
from minigpt.families.registry import LanguageModel
from minigpt.generation import native
from minigpt.generation.api import GenerationOptions, generate_ids, generate_output
from minigpt.generation.inputs_embeds import token_embedding
from minigpt.model import GPTConfig, GPTLMHeadModel

V, BLOCK, EOS = 30, 40, 2
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [4, 4, 3]]


def make(family: str) -> LanguageModel:
    torch.manual_seed(1)
    model: LanguageModel = (
        GPTLMHeadModel(GPTConfig(24, 2, 2, 0.1, BLOCK, V))
        if family == "gpt"
        else Qwen3ForCausalLM(Qwen3Config(V, 24, 40, 2, 4, 2, 8, BLOCK))
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.4)
    return model


def vectors_of(model: LanguageModel, prompts: list[list[int]]) -> list[torch.Tensor]:
    return [token_embedding(model).weight.detach()[prompt] for prompt in prompts]


@pytest.mark.parametrize("values", [{}, {"window": 12}])
def test_searches_in_one_batch_do_not_mix_their_beams(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    """PyTorch reads adjacent slots. When a search ends, the beams of others move and change their order."""
    monkeypatch.setattr(native, "library", lambda: None)
    model = make("gpt").double()
    prompts = [*PROMPTS, *(prompt[::-1] for prompt in PROMPTS)]
    options = GenerationOptions(num_beams=3, num_return_sequences=2, max_new_tokens=25, **values)
    alone = [one for prompt in prompts for one in generate_ids(model, [prompt], options, EOS)]
    assert len({len(one.ids) for one in alone}) > 2, "the searches end at different times"
    assert generate_ids(model, prompts, options, EOS, 64) == alone


@pytest.mark.parametrize("family", ["gpt", "qwen3"])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"do_sample": True, "seed": 3, "num_return_sequences": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 2},
        {"num_beams": 3, "use_cache": False},
        {"num_beams": 3, "window": 12, "max_new_tokens": 45},
        {"num_beams": 2, "window": 12, "sinks": 2, "use_cache": False, "max_new_tokens": 45},
    ],
)
def test_vectors_of_ids_are_the_ids(family: str, values: dict[str, Any]) -> None:
    model = make(family)
    options, vectors = GenerationOptions(**{"max_new_tokens": 9, **values}), vectors_of(model, PROMPTS)
    expected = generate_ids(model, PROMPTS, options, EOS)
    assert len({tuple(completion.ids) for completion in expected}) > 2
    for batch_size in (1, 3, 64):
        assert generate_ids(model, [], options, EOS, batch_size, inputs_embeds=vectors) == expected
    whole = generate_output(model, PROMPTS, options, EOS)
    found = generate_output(model, [], options, EOS, inputs_embeds=vectors)
    assert found.completions == whole.completions
    assert torch.equal(found.sequences, whole.sequences[:, 10:])  # the new ids alone
    assert not any(module._forward_hooks for module in model.modules())


def test_other_vectors_lead_elsewhere_and_what_looks_back_sees_new_ids_only() -> None:
    model = make("gpt")
    options = GenerationOptions(max_new_tokens=V - 1, eos_token_id=[], no_repeat_ngram_size=1)
    vectors = vectors_of(model, [[0, 0]])
    found = generate_ids(model, [], options, None, inputs_embeds=vectors)[0]
    assert len(set(found.ids)) == V - 1
    plain = dataclasses.replace(options, no_repeat_ngram_size=0)
    one, other = (
        generate_ids(model, [], plain, None, inputs_embeds=[v])[0] for v in (vectors[0], -vectors[0])
    )
    assert one != other


@pytest.mark.parametrize(
    ("prompts", "vectors", "values", "message"),
    [
        ([[3]], torch.zeros(2, 24), {}, "prompts and inputs_embeds both say what to continue"),
        (
            [],
            torch.zeros(2, 23),
            {},
            r"inputs_embeds 1 must be floats of shape \(tokens, 24\): got .*\(2, 23\)",
        ),
        ([], torch.zeros(24), {}, r"got torch.float32 \(24,\)"),
        ([], torch.zeros(2, 24, dtype=torch.int64), {}, "got torch.int64"),
        ([], torch.full((2, 24), torch.nan), {}, "inputs_embeds 1 has values that are not finite"),
        ([], torch.zeros(0, 24), {}, "prompt 1 is empty"),
        ([], torch.zeros(BLOCK, 24), {}, f"prompt 1 has {BLOCK} tokens"),
    ],
)
def test_what_is_refused(
    prompts: list[list[int]], vectors: torch.Tensor, values: dict[str, Any], message: str
) -> None:
    for function in (generate_ids, generate_output):
        with pytest.raises(InputError, match=message):
            function(make("gpt"), prompts, GenerationOptions(**values), EOS, inputs_embeds=[vectors])
