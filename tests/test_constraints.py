"""Constrained answers: whatever a random model prefers, its answer is permitted."""

import builtins
import json
import re
from typing import Any

import pytest
import torch

from minigpt.errors import InputError
from minigpt.generation.api import GenerationOptions, answer_questions, generate, generate_ids, stream
from minigpt.generation.constraints import allow_only, make_constraint
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.tokenizer import Tokenizer, build_vocabulary

CHARACTERS = Tokenizer.from_word2id(build_vocabulary(['红色绿蓝的是吗？0123456789abc{}":,. \n']))


class MergedBytes:
    """A byte-level vocabulary: all bytes, some pieces of words, and one that ends inside a character."""

    eos_token_id = 0
    special_ids = frozenset({0})
    tokens = (
        b"<|end|>",
        *(bytes([byte]) for byte in range(256)),
        b"ab",
        "红".encode(),
        "红色".encode(),
        b"\xe7\xbb",
    )

    def get_vocab_size(self) -> int:
        return len(self.tokens)

    def token_bytes(self, index: int) -> bytes:
        return self.tokens[index]

    def encode_text(self, text: str) -> list[int]:
        return [1 + byte for byte in text.encode()]

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.tokens[index] for index in ids).decode("utf-8", "replace")

    def unknown_characters(self, text: str) -> list[str]:
        return []


BYTES = MergedBytes()
BOTH = pytest.mark.parametrize("tokenizer", [CHARACTERS, BYTES], ids=["characters", "bytes"])


def random_model(seed: int, tokenizer: Any) -> GPTLMHeadModel:
    torch.manual_seed(seed)
    size = tokenizer.get_vocab_size() + 3  # a model may have more rows than its tokenizer has entries
    config = GPTConfig(n_embd=16, n_head=2, n_layer=1, block_size=96, vocab_size=size, dropout=0.0)
    model = GPTLMHeadModel(config).eval()
    model.base_model.wte.weight.data *= 10
    return model


CHOICES = ["红", "红色", "绿色的", "蓝ab", "a", "ab"]


@BOTH
def test_each_choice_comes_and_nothing_else(tokenizer: Any) -> None:
    model = random_model(0, tokenizer)
    options = GenerationOptions(choices=CHOICES, do_sample=True, temperature=9.0, seed=0, max_new_tokens=20)
    answers = answer_questions(model, tokenizer, ["是吗？"] * 300, options)
    assert {answer.text for answer in answers} == set(CHOICES)
    assert {answer.stop_reason for answer in answers} == {"eos"}
    assert "".join(stream(model, tokenizer, "是吗？", choices=CHOICES)) in CHOICES
    greedy = generate(model, tokenizer, "是吗？", choices=CHOICES)
    assert generate(model, tokenizer, "是吗？", choices=CHOICES, num_beams=4) in CHOICES
    assert generate(model, tokenizer, "是吗？", choices=[greedy]) == greedy


def test_beams_find_the_likeliest_choice() -> None:
    """If there are as many beams as choices, and sums instead of means, the search is exact."""
    model = random_model(1, CHARACTERS)
    prompt = [*CHARACTERS.encode_text("是吗？"), CHARACTERS.sep_token_id]

    @torch.inference_mode()
    def log_probability(choice: str) -> float:
        ids = [*CHARACTERS.encode_text(choice), CHARACTERS.sep_token_id]
        log_p = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1].log_softmax(-1)
        return float(log_p.gather(-1, torch.tensor(ids)[:, None]).sum())

    options: dict[str, Any] = {"num_beams": len(CHOICES), "length_penalty": 0.0, "early_stopping": "never"}
    best = generate(model, CHARACTERS, "是吗？", choices=CHOICES, **options)
    assert best == max(CHOICES, key=log_probability)


def test_all_ways_to_write_a_choice_are_open() -> None:
    state = make_constraint(GenerationOptions(choices=["红色"]), BYTES, [0])
    assert state is not None
    scores = allow_only(torch.zeros(1, BYTES.get_vocab_size()), [state.allowed()])
    first = scores[0].isfinite().nonzero()[:, 0].tolist()
    assert {BYTES.tokens[index] for index in first} == {"红".encode()[:1], "红".encode(), "红色".encode()}


@BOTH
@pytest.mark.parametrize("expression", ["[0-9]{2,4}", "(红|绿|蓝)色(的)?", "a+b?|c"])
def test_answers_match_the_expression(tokenizer: Any, expression: str) -> None:
    pytest.importorskip("llguidance", reason="expressions are its work")
    model = random_model(2, tokenizer)
    options = GenerationOptions(regex=expression, do_sample=True, temperature=3.0, seed=1, max_new_tokens=40)
    answers = answer_questions(model, tokenizer, ["是吗？"] * 20, options)
    assert sum(answer.stop_reason == "eos" for answer in answers) > 10
    assert len({answer.text for answer in answers}) > 1
    for answer in answers:
        assert answer.stop_reason != "eos" or re.fullmatch(expression, answer.text)
    beams = generate(model, tokenizer, "是吗？", regex="[0-9]{2,4}", num_beams=3)
    assert re.fullmatch("[0-9]{2,4}", beams)


@BOTH
def test_answers_fit_the_schema(tokenizer: Any) -> None:
    pytest.importorskip("llguidance", reason="JSON Schema is its work")
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["红", "蓝"]}, "b": {"type": "integer", "minimum": 10, "maximum": 99}},
        "required": ["a", "b"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},  # or a random model writes spaces for ever
    }
    model = random_model(3, tokenizer)
    for given in (schema, json.dumps(schema)):
        options = GenerationOptions(json_schema=given, do_sample=True, seed=1, max_new_tokens=60)
        for answer in answer_questions(model, tokenizer, ["是吗？"] * 5, options):
            assert answer.stop_reason == "eos"
            value = json.loads(answer.text)
            assert set(value) == {"a", "b"}
            assert value["a"] in ("红", "蓝")
            assert value["b"] in range(10, 100)


# -- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"choices": [""]}, r"choices must be a list of texts, none of them empty: got choices=\[''\]"),
        ({"choices": "ab"}, "choices must be a list of texts"),
        ({"choices": ["a"], "regex": "a"}, "choices and regex both say what the answer is: give one of them"),
        ({"regex": 3}, "regex must be a text: got regex=3"),
        ({"json_schema": ["a"]}, "json_schema must be a dictionary, or its JSON as text"),
        ({"choices": ["红", "紫色"]}, "choices: '紫色' cannot be written: '紫' is not in the vocabulary"),
        ({"choices": ["红"], "eos_token_id": []}, "choices needs an eos_token_id"),
    ],
)
def test_bad_constraints(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(random_model(0, CHARACTERS), CHARACTERS, "是吗？", **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"regex": "("}, "regex is not understood: .*unclosed group"),
        ({"json_schema": {"type": "nothing"}}, "json_schema is not understood: "),
        ({"json_schema": "{"}, "json_schema is not understood: "),
        ({"regex": "紫"}, "^regex cannot be written: '紫' is not in the vocabulary$"),
        ({"regex": "红紫+"}, "^regex cannot be written: '紫' is not in the vocabulary$"),
        ({"json_schema": {"const": "紫"}}, "^json_schema cannot be written: '紫' is not in the vocabulary$"),
    ],
)
def test_what_the_library_refuses(values: dict[str, Any], message: str) -> None:
    pytest.importorskip("llguidance", reason="expressions are its work")
    with pytest.raises(InputError, match=message) as refusal:
        generate(random_model(0, CHARACTERS), CHARACTERS, "是吗？", **values)
    assert "\n" not in str(refusal.value)


def test_the_tokenizer_is_needed() -> None:
    with pytest.raises(InputError, match="choices needs the tokenizer"):
        generate_ids(random_model(0, CHARACTERS), [[3]], GenerationOptions(choices=["红"]), 2)


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name == "llguidance":
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(
        InputError, match=r'regex needs the library llguidance: pip install "minigpt\[constrained\]"'
    ):
        generate(random_model(0, CHARACTERS), CHARACTERS, "是吗？", regex="a")
