"""Streaming: the joined pieces equal the text of `generate`, for tokens of characters and of bytes."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from minigpt.errors import InputError
from minigpt.generation.api import (
    GenerationOptions,
    TextTokenizer,
    generate,
    generate_ids,
    prompt_ids,
    stream,
    stream_ids,
)
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenizer import Tokenizer, build_vocabulary

BLOCK = 40


class ByteTokenizer:
    """A byte-level vocabulary without merges, with some bytes of Chinese text."""

    eos_token_id = 0
    alphabet = b"\x00ab\n" + bytes(range(0xE4, 0xE8)) + bytes(range(0xB8, 0xC0))

    def encode_text(self, text: str) -> list[int]:
        return [self.alphabet.index(byte) for byte in text.encode()]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(self.alphabet[index] for index in ids).decode("utf-8", "replace")

    def unknown_characters(self, text: str) -> list[str]:
        return [character for character in text if not set(character.encode()) <= set(self.alphabet)]


CHARACTERS = Tokenizer.from_word2id(build_vocabulary(["四川的省会是成都，吗？ab\n。"]))
BYTES = ByteTokenizer()


def random_model(seed: int, vocab_size: int) -> GPTLMHeadModel:
    torch.manual_seed(seed)
    config = GPTConfig(n_embd=16, n_head=2, n_layer=2, block_size=BLOCK, vocab_size=vocab_size, dropout=0.1)
    model = GPTLMHeadModel(config).double()
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            weight.data *= 40 if "wpe" in name else 12
    return model


CASES: list[tuple[TextTokenizer, int, str]] = [
    (CHARACTERS, CHARACTERS.get_vocab_size(), "四川？"), (BYTES, len(BYTES.alphabet), "ab丸"),
]  # fmt: skip
BOTH = pytest.mark.parametrize(("tokenizer", "size", "prompt"), CASES, ids=["characters", "bytes"])
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 30}


@BOTH
@pytest.mark.parametrize("stops", [[], ["\n"], ["是", "b\n", "aa", "b\ufffd"]])
def test_pieces_joined_are_the_answer(
    tokenizer: TextTokenizer, size: int, prompt: str, stops: list[str]
) -> None:
    texts, lengths = set(), set()
    for seed in range(12):
        model = random_model(seed, size)
        options: dict[str, Any] = {**SAMPLED, "seed": seed, "stop_strings": stops}
        pieces = list(stream(model, tokenizer, prompt, **options))
        assert "" not in pieces
        text = generate(model, tokenizer, prompt, **options)
        assert "".join(pieces) == text
        assert not any(stop in text for stop in stops)
        texts.add(text)
        lengths.add(len(pieces))
    assert len(texts) > 4
    assert len(lengths) > 2


@BOTH
def test_each_step_gives_its_piece_at_once(tokenizer: TextTokenizer, size: int, prompt: str) -> None:
    model = random_model(1, size)
    steps = 0

    def count(*_: object) -> None:
        nonlocal steps
        steps += 1

    model.lm_head.register_forward_hook(count)
    shown = ""
    for piece in stream(model, tokenizer, prompt, max_new_tokens=12, eos_token_id=[]):
        shown += piece
        if steps < 12:
            options = GenerationOptions(max_new_tokens=steps)
            prompts = [prompt_ids(tokenizer, prompt)]
            ids = generate_ids(random_model(1, size), prompts, options, None)[0].ids
            assert shown == tokenizer.decode(ids).removesuffix("\ufffd")
    assert steps == 12


def test_stop_strings_end_generation_and_are_cut_off() -> None:
    found = 0
    for seed in range(20):
        model = random_model(seed, len(BYTES.alphabet))
        options = GenerationOptions(seed=seed, stop_strings=["a\n", "\nb", "\n\n", "aa", "亸"], **SAMPLED)
        prompts = [BYTES.encode_text(text) for text in ("ab", "b\nb", "丸a", "丸")]
        plain = generate_ids(model, prompts, dataclasses.replace(options, stop_strings=()), 0)
        stopped = generate_ids(model, prompts, options, 0, tokenizer=BYTES)
        for before, after in zip(plain, stopped):
            text = BYTES.decode(before.ids)
            if after.stop_reason != "stop_string":
                assert after == before
                assert not any(stop in text for stop in options.stops)
                continue
            found += 1
            assert before.ids[: len(after.ids)] == after.ids
            assert any(BYTES.decode(after.ids).endswith(stop) for stop in options.stops)  # of single bytes
            assert not any(stop in BYTES.decode(after.ids[:-1]) for stop in options.stops)
    assert found > 10


def test_beams_stop_at_stop_strings_too() -> None:
    found = 0
    for seed in range(20):
        model = random_model(seed, len(BYTES.alphabet))
        options = GenerationOptions(num_beams=3, max_new_tokens=12, stop_strings=["a\n", "b", "丸"])
        for completion in generate_ids(model, [BYTES.encode_text("ab")], options, 0, tokenizer=BYTES):
            stops = any(stop in BYTES.decode(completion.ids) for stop in options.stops)
            assert stops == (completion.stop_reason == "stop_string")
            assert not any(stop in BYTES.decode(completion.ids[:-1]) for stop in options.stops)
            found += stops
    assert found > 3


def test_the_model_is_in_eval_mode_meanwhile_and_left_as_it_was() -> None:
    model = random_model(0, CHARACTERS.get_vocab_size()).train()
    expected = generate(model, CHARACTERS, "四川？", max_new_tokens=5, eos_token_id=[])
    pieces = stream(model, CHARACTERS, "四川？", max_new_tokens=5, eos_token_id=[])
    assert model.training
    first = next(pieces)
    assert not model.training
    assert first + "".join(pieces) == expected
    assert model.training
    closed = stream_ids(model, CHARACTERS, [3, 4], GenerationOptions(max_new_tokens=5))
    next(closed)
    closed.close()
    assert model.training


def test_it_says_why_it_stopped() -> None:
    model = random_model(0, CHARACTERS.get_vocab_size())
    options = GenerationOptions(max_new_tokens=3, eos_token_id=[])
    pieces = stream_ids(model, CHARACTERS, [3, 4], options)
    for _ in range(3):
        next(pieces)
    with pytest.raises(StopIteration) as stop:
        next(pieces)
    assert stop.value.value == "length"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 3}, "num_beams=3 cannot be streamed"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2 cannot be streamed"),
        ({"output_scores": True}, "output_scores cannot be streamed"),
        ({"temprature": 1.0}, "unknown option 'temprature'; did you mean 'temperature'"),
        ({"stop_strings": [""]}, "stop_strings must be texts of at least one character: got ''"),
        (
            {"max_new_tokens": 10_000_000},
            "max_new_tokens=10000000 can never be reached.*block_size=40.*at most 39",
        ),
        ({"max_cache_mib": 1e-5}, "max_cache_mib=1e-05 is too little"),
    ],
)
def test_what_is_refused_is_refused_before_the_first_piece(options: dict[str, Any], message: str) -> None:
    model = random_model(0, CHARACTERS.get_vocab_size())
    with pytest.raises(InputError, match=message):
        stream(model, CHARACTERS, "四川？", **options)


def test_an_empty_prompt_is_refused() -> None:
    model = random_model(0, len(BYTES.alphabet))
    with pytest.raises(InputError, match="prompt 1 is empty"):
        stream(model, BYTES, "")
    with pytest.raises(InputError, match=r"question 1 \(''\) is empty"):
        generate(model, BYTES, "")


def test_a_learned_byte_level_vocabulary() -> None:
    """Tokens have several bytes, and begin and end inside characters."""
    texts = ["四川的省会是成都，吗？", "重庆的省会是哪里？没有。"] * 3
    tokenizer = BpeTokenizer.train(texts, vocab_size=290)
    for seed in range(8):
        model = random_model(seed, tokenizer.get_vocab_size())
        options = {**SAMPLED, "max_new_tokens": 20, "seed": seed, "stop_strings": ["的省", "。"]}
        text = generate(model, tokenizer, "四川", **options)
        assert "".join(stream(model, tokenizer, "四川", **options)) == text
        for answer in ("成都", "重庆，没有"):
            assert generate(model, tokenizer, "四川", choices=[answer]) == answer
