"""Rows of the vocabulary without a token: generation never chooses one, in any way."""

import dataclasses
from typing import Any

import pytest
import torch

from minigpt.families.registry import LanguageModel
from minigpt.generation import loop
from minigpt.generation.api import (
    GenerationOptions,
    answer_questions,
    generate_ids,
    generate_output,
    stream_ids,
)
from minigpt.generation.engine import Engine
from minigpt.generation.sequence import Sequence
from minigpt.model import GPTConfig, GPTLMHeadModel

V, TOKENS, EOS = 24, 20, 2
GREEDY = GenerationOptions(max_new_tokens=12)
DRAWN = GenerationOptions(max_new_tokens=12, do_sample=True, seed=1, temperature=2.0)


class Letters:
    """A tokenizer of 20 letters."""

    eos_token_id = EOS

    def encode_text(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + token) for token in ids)

    def unknown_characters(self, text: str) -> list[str]:
        return []

    def get_vocab_size(self) -> int:
        return TOKENS


TOKENIZER, PROMPT = Letters(), [5, 9, 4]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """Make a model that prefers rows without a token."""
    torch.manual_seed(0)
    net = GPTLMHeadModel(GPTConfig(32, 2, 2, 0.0, 64, V)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
        net.transformer.ln_f.weight.mul_(3)
        net.transformer.wte.weight[TOKENS:] *= 4
    return net


@pytest.fixture(scope="module")
def narrow(model: Any) -> LanguageModel:
    """Return the same model without those rows, which gives the expected ids."""
    net = GPTLMHeadModel(GPTConfig(32, 2, 2, 0.0, 64, TOKENS)).eval()
    state = {
        name: tensor[:TOKENS] if tensor.shape[0] == V else tensor
        for name, tensor in model.state_dict().items()
    }
    net.load_state_dict(state)
    return net


def test_without_a_tokenizer_such_rows_come(model: LanguageModel) -> None:
    assert max(generate_ids(model, [PROMPT], GREEDY, EOS)[0].ids) >= TOKENS


def test_rows_without_a_token_do_not_tell_sequences_of_unlike_lengths_apart(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(Sequence, "history", lambda self: pytest.fail("the text so far does not matter"))
    original = loop.choose

    def counting(group: list[Sequence], *rest: Any, **more: Any) -> None:
        sizes.append(len(group))
        original(group, *rest, **more)

    monkeypatch.setattr(loop, "choose", counting)
    prompts = [[5] * 54, [5] * 60, [5] * 62]  # there is room for 10, 4 and 2 tokens
    generate_ids(model, prompts, GenerationOptions(eos_token_id=[]), None, 2, tokenizer=TOKENIZER)
    # two at once; the third one's prompt, beside a token of the first; both once more; the first alone
    assert sizes == [2] * 4 + [1, 1] + [2] + [1] * 4


@pytest.mark.parametrize("options", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_with_one_they_never_do(
    model: LanguageModel, narrow: LanguageModel, options: GenerationOptions
) -> None:
    expected = generate_ids(narrow, [PROMPT], options, EOS)[0].ids
    engine, graph = Engine(model, cuda_graph=False), Engine(model, cuda_graph=True)

    def written(more: dict[str, Any]) -> list[int]:
        chosen = dataclasses.replace(options, **more)
        return generate_ids(model, [PROMPT], chosen, EOS, tokenizer=TOKENIZER)[0].ids

    ways = {
        "batch": generate_ids(model, [PROMPT, [3]], options, EOS, tokenizer=TOKENIZER)[0].ids,
        "output": generate_output(model, [PROMPT], options, EOS, TOKENIZER).completions[0].ids,
        "engine": engine.submit(PROMPT, options, EOS, TOKENIZER).result().ids,
        "graph": graph.submit(PROMPT, options, EOS, TOKENIZER).result().ids,
        "window": written({"window": 20}),
        "n-grams": written({"prompt_lookup_num_tokens": 4}),
        "streamed": TOKENIZER.encode_text("".join(stream_ids(model, TOKENIZER, PROMPT, options))),
        "question": TOKENIZER.encode_text(answer_questions(model, TOKENIZER, ["fje"], options)[0].text),
    }
    assert ways == dict.fromkeys(ways, expected)


def test_nor_with_beams_or_an_assistant_that_prefers_them(model: LanguageModel) -> None:
    beams = GenerationOptions(max_new_tokens=8, num_beams=3, num_return_sequences=3)
    for completion in generate_ids(model, [PROMPT], beams, EOS, tokenizer=TOKENIZER):
        assert completion.ids
        assert max(completion.ids) < TOKENS
    for options in (GREEDY, DRAWN):  # the assistant guesses such rows; they are never accepted
        (found,) = generate_ids(model, [PROMPT], options, EOS, tokenizer=TOKENIZER, assistant_model=model)
        assert max(found.ids) < TOKENS


def test_a_vocabulary_without_such_rows_is_left_alone(narrow: LanguageModel) -> None:
    output = generate_output(
        narrow, [PROMPT], GenerationOptions(max_new_tokens=2, output_scores=True), EOS, TOKENIZER
    )
    assert output.scores is not None
    assert all(scores.isfinite().all() for scores in output.scores)
