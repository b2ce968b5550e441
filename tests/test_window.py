"""Beyond the context, each token is what the model predicts after the window, read as a separate text."""

import dataclasses
from typing import Any

import pytest
import torch

from minigpt.errors import InputError
from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM
from minigpt.families.registry import LanguageModel
from minigpt.generation.api import Completion, GenerationOptions, generate_ids, generate_output
from minigpt.generation.inputs_embeds import token_embedding
from minigpt.model import GPTConfig, GPTLMHeadModel

V, BLOCK = 30, 20


def kept(ids: list[int], window: int, sinks: int) -> list[int]:
    """Return the tokens that stay: the first ones (sinks) and the last ones."""
    return ids[:sinks] + ids[sinks - window :]


def slid(model: LanguageModel, prompt: list[int], window: int, sinks: int = 0, **values: Any) -> Completion:
    options = GenerationOptions(window=window, sinks=sinks, **values)
    return generate_ids(model, [prompt], options, None)[0]


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
    return model.double()


@pytest.mark.parametrize("family", ["gpt", "qwen3"])
@pytest.mark.parametrize("length", [1, BLOCK - 2, BLOCK - 1, BLOCK, 3 * BLOCK])
@pytest.mark.parametrize(("window", "sinks"), [(8, 0), (12, 3), (BLOCK - 1, BLOCK - 2)])
@pytest.mark.parametrize("more", [{}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3}])
def test_each_token_is_what_follows_the_window(
    family: str, length: int, window: int, sinks: int, more: dict[str, Any]
) -> None:
    model, prompt = make(family), [(7 * place) % V for place in range(length)]
    found = slid(model, prompt, window, sinks, max_new_tokens=45, **more)
    assert found.stop_reason == "length"
    held = list(prompt) if length < BLOCK else kept(prompt, window, sinks)
    for place, token in enumerate(found.ids):
        if len(held) == BLOCK:
            held = kept([*prompt, *found.ids[:place]], window, sinks)
            assert held[:sinks] == [*prompt, *found.ids][:sinks]
            assert len(held) == window
        with torch.inference_mode():
            assert token == int(model.eval()(torch.tensor([held]))[0, -1].argmax())
        held.append(token)
    assert len(found.ids) == 45


def test_what_fits_is_as_without() -> None:
    model = make("gpt")
    values: list[dict[str, Any]] = [
        {"max_new_tokens": 10}, {"max_new_tokens": 10, "do_sample": True, "seed": 3, "top_k": 5}
    ]  # fmt: skip
    for one in values:
        for eos in ([], [4, 9]):
            expected = generate_ids(model, [[3, 4, 5]], GenerationOptions(**one), eos)
            assert generate_ids(model, [[3, 4, 5]], GenerationOptions(window=8, **one), eos) == expected


def test_with_an_assistant_beams_vectors_and_reports() -> None:
    model, small, prompt = make("gpt"), make("qwen3"), [3, 4, 5]
    options = GenerationOptions(max_new_tokens=45, window=8, sinks=2)
    (plain,) = generate_ids(model, [prompt], options, None)
    assert generate_ids(model, [prompt], options, None, assistant_model=small) == [plain]
    vectors = [token_embedding(model).weight.detach()[prompt]]
    assert generate_ids(model, [], options, None, inputs_embeds=vectors) == [plain]
    reported = dataclasses.replace(options, output_logits=True, output_attentions=True)
    found = generate_output(model, [prompt], reported, None)
    assert found.completions == [plain]
    assert found.logits is not None
    assert found.attentions is not None
    assert [int(step[0].argmax()) for step in found.logits] == plain.ids
    assert max(step[0].shape[-1] for step in found.attentions) == BLOCK - 1  # the context is never exceeded


@pytest.mark.parametrize("more", [{}, {"use_cache": False}])
def test_beams_slide_together(more: dict[str, Any]) -> None:
    """One step behind the slide is what a search behind the window alone begins with."""
    model, prompt = make("gpt"), [(7 * place) % V for place in range(3 * BLOCK)]
    for new in (1, 4):
        beams = GenerationOptions(max_new_tokens=new, num_beams=3, num_return_sequences=3, **more)
        expected = generate_ids(model, [kept(prompt, 8, 2)], beams, None)
        windowed = dataclasses.replace(beams, window=8, sinks=2)
        assert generate_ids(model, [prompt], windowed, None) == expected
    longer = dataclasses.replace(beams, max_new_tokens=40, window=8, sinks=2)
    found = generate_ids(model, [prompt], longer, None)
    assert [len(completion.ids) for completion in found] == [40] * 3


def test_the_whole_text_counts_for_what_looks_back() -> None:
    found = slid(make("gpt"), [3], 6, max_new_tokens=V - 1, no_repeat_ngram_size=1)
    assert len({3, *found.ids}) == V


def test_bad_windows_and_prompts() -> None:
    model = make("gpt")
    with pytest.raises(InputError, match="fewer tokens than the model reads, block_size=20: got window=20"):
        slid(model, [3], BLOCK)
    with pytest.raises(InputError, match="prompt 1 is empty"):
        slid(model, [], 8)
    for prompt in ([V], [*[3] * 50, V], [V, *[3] * 50], [*[3] * 25, V, *[3] * 25]):
        with pytest.raises(InputError, match=f"prompt 1 has the id {V}"):
            slid(model, prompt, 8)
    # without a window it is an error, as always
    with pytest.raises(InputError, match="max_new_tokens=100 can never be reached"):
        generate_ids(model, [[3]], GenerationOptions(max_new_tokens=100), None)


def test_windows_slide_side_by_side() -> None:
    model, prompts = make("gpt"), [[3] * (2 * BLOCK), [4, 5]]
    options = GenerationOptions(max_new_tokens=30, window=8, sinks=2)
    assert generate_ids(model, prompts, options, None) == [
        generate_ids(model, [prompt], options, None)[0] for prompt in prompts
    ]
    drawn = GenerationOptions(
        max_new_tokens=10, window=8, do_sample=True, seed=3, num_return_sequences=2, temperature=2.0
    )
    without = GenerationOptions(
        max_new_tokens=10, do_sample=True, seed=3, num_return_sequences=2, temperature=2.0
    )
    fitting = [[4, 5], [6, 7, 8]]
    assert generate_ids(model, fitting, drawn, None) == generate_ids(model, fitting, without, None)
