"""Beyond the context: each token is what the model says behind the window, read as a text of its own."""

from typing import Any

import pytest
import torch

from minigpt.errors import InputError
from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM
from minigpt.families.registry import LanguageModel
from minigpt.generation.api import GenerationOptions, generate_ids
from minigpt.generation.sliding_window import Window, slide_ids
from minigpt.model import GPTConfig, GPTLMHeadModel

V, BLOCK = 30, 20


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
@pytest.mark.parametrize("window", [Window(8), Window(12, 3), Window(BLOCK - 1, BLOCK - 2)])
def test_each_token_is_what_follows_the_window(family: str, length: int, window: Window) -> None:
    model, prompt = make(family), [(7 * place) % V for place in range(length)]
    found = slide_ids(model, prompt, GenerationOptions(max_new_tokens=45), None, window)
    assert found.stop_reason == "length"
    held = list(prompt) if length < BLOCK else window.of(prompt)
    for place, token in enumerate(found.ids):
        if len(held) == BLOCK:
            held = window.of([*prompt, *found.ids[:place]])
            assert held[: window.sinks] == [*prompt, *found.ids][: window.sinks]
            assert len(held) == window.tokens
        with torch.inference_mode():
            assert token == int(model.eval()(torch.tensor([held]))[0, -1].argmax())
        held.append(token)
    assert len(found.ids) == 45


def test_what_fits_is_as_without() -> None:
    model = make("gpt")
    values: list[dict[str, Any]] = [
        {"max_new_tokens": 10}, {"max_new_tokens": 10, "do_sample": True, "seed": 3, "top_k": 5}
    ]  # fmt: skip
    for options in (GenerationOptions(**one) for one in values):
        for eos in ([], [4, 9]):
            expected = generate_ids(model, [[3, 4, 5]], options, eos)[0]
            assert slide_ids(model, [3, 4, 5], options, eos, Window(8)) == expected


def test_the_whole_text_counts_for_what_looks_back() -> None:
    options = GenerationOptions(max_new_tokens=V - 1, no_repeat_ngram_size=1)
    found = slide_ids(make("gpt"), [3], options, None, Window(6))
    assert len({3, *found.ids}) == V


def test_bad_windows_and_prompts() -> None:
    model, options = make("gpt"), GenerationOptions(max_new_tokens=100)
    for values in ({"tokens": 0}, {"tokens": 4, "sinks": 4}, {"tokens": 4, "sinks": -1}):
        with pytest.raises(InputError, match="sinks must be at least 0 and fewer than the window's tokens"):
            Window(**values)
    with pytest.raises(InputError, match="fewer than the model reads, block_size=20: got tokens=20"):
        slide_ids(model, [3], options, None, Window(BLOCK))
    with pytest.raises(InputError, match="prompt 1 is empty"):
        slide_ids(model, [], options, None, Window(8))
    for prompt in ([V], [*[3] * 50, V], [V, *[3] * 50], [*[3] * 25, V, *[3] * 25]):
        with pytest.raises(InputError, match=f"prompt 1 has the id {V}"):
            slide_ids(model, prompt, options, None, Window(8))
    with pytest.raises(InputError, match="num_beams=2 does not go with a sliding window"):
        slide_ids(model, [3], GenerationOptions(num_beams=2), None, Window(8))
    # without a window it is an error, as ever
    with pytest.raises(InputError, match="max_new_tokens=100 can never be reached"):
        generate_ids(model, [[3]], options, None)


def test_generate_takes_a_window_as_options() -> None:
    model, prompts = make("gpt"), [[3] * (2 * BLOCK), [4, 5]]
    options = GenerationOptions(max_new_tokens=30, window=8, sinks=2)
    plain = GenerationOptions(max_new_tokens=30)
    assert generate_ids(model, prompts, options, None) == [
        slide_ids(model, prompt, plain, None, Window(8, 2)) for prompt in prompts
    ]
    drawn = GenerationOptions(
        max_new_tokens=10, window=8, do_sample=True, seed=3, num_return_sequences=2, temperature=2.0
    )
    without = GenerationOptions(
        max_new_tokens=10, do_sample=True, seed=3, num_return_sequences=2, temperature=2.0
    )
    fitting = [[4, 5], [6, 7, 8]]
    assert generate_ids(model, fitting, drawn, None) == generate_ids(model, fitting, without, None)
