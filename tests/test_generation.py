"""Generation: batched, padded, cached and shrinking, it says what a plain loop over one prompt says."""

import dataclasses
import itertools
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import minigpt
from minigpt.command_line import InputError
from minigpt.data.batches import encode_pairs
from minigpt.data.reader import Pair
from minigpt.inference.generation import (
    Completion,
    GenerationOptions,
    answer_questions,
    generate,
    generate_ids,
)
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.tokenizer import Tokenizer, build_vocabulary

V, BLOCK, EOS = 12, 24, 2


def random_model(seed: int, **changes: Any) -> GPTLMHeadModel:
    """A model that says various things: initial weights made larger, as training makes them.

    In double precision, so that rounding decides no comparison of two scores.
    """
    config = {"n_embd": 16, "n_head": 2, "n_layer": 2, "block_size": BLOCK, "vocab_size": V, "dropout": 0.0}
    torch.manual_seed(seed)
    model = GPTLMHeadModel(GPTConfig(**{**config, **changes})).double().eval()
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            weight.data *= 40 if "wpe" in name else 15
    return model


def random_prompts(seed: int, count: int = 17, longest: int = 12) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, V) for _ in range(draw.randint(1, longest))] for _ in range(count)]


@torch.inference_mode()
def plain_loop(model: GPTLMHeadModel, prompt: list[int], max_new_tokens: int) -> Completion:
    """The slow twin: one prompt, no padding, no cache, all logits."""
    ids = list(prompt)
    while len(ids) < model.config.block_size and len(ids) - len(prompt) < max_new_tokens:
        token = int(model(torch.tensor([ids]))[0, -1].argmax())
        if token == EOS:
            return Completion(ids[len(prompt) :], "eos")
        ids.append(token)
    full = len(ids) - len(prompt) == max_new_tokens
    return Completion(ids[len(prompt) :], "length" if full else "context")


# -- greedy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_a_batch_says_what_each_prompt_says_alone(seed: int) -> None:
    model, prompts = random_model(seed), random_prompts(seed)
    expected = [plain_loop(model, prompt, 15) for prompt in prompts]
    for batch_size, use_cache in itertools.product((1, 5, 64), (True, False)):
        options = GenerationOptions(max_new_tokens=15, use_cache=use_cache)
        assert generate_ids(model, prompts, options, EOS, batch_size) == expected


def test_the_comparison_above_meets_every_case() -> None:
    found = [
        plain_loop(random_model(seed), prompt, 15) for seed in range(6) for prompt in random_prompts(seed)
    ]
    assert {completion.stop_reason for completion in found} == {"eos", "length", "context"}
    assert len({len(completion.ids) for completion in found}) > 8
    assert len({tuple(completion.ids) for completion in found}) > 50


def test_single_precision_is_enough_for_cached_and_uncached_to_agree() -> None:
    for seed in range(4):
        model, prompts = random_model(seed).float(), random_prompts(seed)
        cached, uncached = (
            generate_ids(model, prompts, GenerationOptions(max_new_tokens=12, use_cache=use_cache), EOS)
            for use_cache in (True, False)
        )
        assert cached == uncached


def test_it_says_what_transformers_says(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    words = build_vocabulary([chr(ord("a") + i) for i in range(V - 3)])
    tokenizer = Tokenizer.from_word2id(words)
    for seed in range(3):
        model, prompts = random_model(seed), random_prompts(seed, count=6)
        minigpt.save_pretrained(model, tokenizer, tmp_path / str(seed))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(seed), dtype=torch.float64)
        ours = generate_ids(model, prompts, GenerationOptions(max_new_tokens=10), EOS)
        for prompt, completion in zip(prompts, ours):
            written = theirs.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=10, do_sample=False,
            )  # fmt: skip
            new = written[0, len(prompt) :].tolist()
            assert completion.ids == (new[: new.index(EOS)] if EOS in new else new)


def test_why_it_stopped() -> None:
    model = random_model(0)
    embeddings = model.transformer.wte.weight.data  # a model that always says 5
    embeddings[:] = 0
    model.transformer.ln_f.weight.data[:] = 0
    model.transformer.ln_f.bias.data[:] = 1
    embeddings[5] = 1
    prompts = [[3] * length for length in (4, BLOCK - 4, BLOCK - 3, BLOCK - 1)]
    expected = [([5] * 4, "length"), ([5] * 4, "length"), ([5] * 3, "context"), ([5], "context")]
    assert generate_ids(model, prompts, GenerationOptions(max_new_tokens=4), EOS) == expected
    assert generate_ids(model, prompts, GenerationOptions(max_new_tokens=4), 5) == [([], "eos")] * 4
    # as many tokens as anybody may ask for take no more memory than the model's block_size
    endless = GenerationOptions(max_new_tokens=10**12)
    assert generate_ids(model, prompts[:1], endless, EOS) == [([5] * (BLOCK - 4), "context")]


def test_finished_rows_leave_the_batch_and_one_position_is_scored() -> None:
    model, prompts = random_model(1), random_prompts(1)
    scored: list[tuple[int, ...]] = []
    inner: list[tuple[int, ...]] = []
    model.transformer.register_forward_hook(lambda _, inputs, output: inner.append(tuple(inputs[0].shape)))
    model.lm_head.register_forward_hook(lambda _, inputs, output: scored.append(tuple(inputs[0].shape)))
    found = generate_ids(model, prompts, GenerationOptions(max_new_tokens=15), EOS)
    # a row takes part in a step for each token that it says, and in one for the eos that ends it
    steps = [len(ids) + (reason == "eos") for ids, reason in found]
    alive = [sum(count > step for count in steps) for step in range(max(steps))]
    assert scored == [(rows, 16) for rows in alive]
    assert inner[1:] == [(rows, 1) for rows in alive[1:]]  # with a cache, one column a step
    assert alive[0] == len(prompts) > alive[-1]


def test_progress_is_the_number_of_finished_prompts() -> None:
    model, prompts = random_model(2), random_prompts(2)
    seen: list[int] = []
    generate_ids(model, prompts, GenerationOptions(max_new_tokens=15), EOS, 4, on_progress=seen.append)
    assert seen == sorted(set(seen))
    assert seen[-1] == len(prompts)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_its_mode_and_dropout_is_off(training: bool) -> None:
    model, prompts = random_model(0, dropout=0.5), random_prompts(0)
    expected = [plain_loop(model, prompt, 6) for prompt in prompts]
    model.train(training)
    assert generate_ids(model, prompts, GenerationOptions(max_new_tokens=6), EOS) == expected
    assert all(module.training is training for module in model.modules())


def test_no_prompts_no_answers() -> None:
    assert generate_ids(random_model(0), [], GenerationOptions(), EOS) == []


# -- sampling -----------------------------------------------------------------------------------------------

SAMPLED = GenerationOptions(max_new_tokens=8, do_sample=True, temperature=1.5, top_k=8, top_p=0.95, seed=11)


def test_a_seed_makes_sampling_reproducible() -> None:
    model, prompts = random_model(3), random_prompts(3)
    first = generate_ids(model, prompts, SAMPLED, EOS)
    assert generate_ids(model, prompts, SAMPLED, EOS) == first
    assert generate_ids(model, prompts, dataclasses.replace(SAMPLED, use_cache=False), EOS) == first
    assert generate_ids(model, prompts, dataclasses.replace(SAMPLED, seed=12), EOS) != first


def test_what_is_drawn_does_not_depend_on_neighbours() -> None:
    model, prompts = random_model(3), random_prompts(3)
    together = generate_ids(model, prompts, SAMPLED, EOS)
    for batch_size in (1, 2, 7):
        assert generate_ids(model, prompts, SAMPLED, EOS, batch_size) == together
    others = [prompt if i % 3 else [3] * 11 for i, prompt in enumerate(prompts)]
    among_others = generate_ids(model, others, SAMPLED, EOS)
    assert all(among_others[i] == together[i] for i in range(len(prompts)) if i % 3)
    longer = generate_ids(model, prompts, dataclasses.replace(SAMPLED, max_new_tokens=10), EOS)
    assert all(long.ids[:8] == short.ids for long, short in zip(longer, together))


def test_the_same_prompt_draws_anew_at_each_place() -> None:
    model, n = random_model(4), 3000
    options = GenerationOptions(max_new_tokens=2, do_sample=True, seed=5)
    with torch.inference_mode():
        right = model(torch.tensor([[4, 7]]))[0, -1].softmax(-1)
    found = generate_ids(model, [[4, 7]] * n, options, eos_token_id=-1, batch_size=1000)
    counts = torch.tensor([completion.ids[0] for completion in found]).bincount(minlength=V)
    chi_square = float(((counts - n * right) ** 2 / (n * right)).sum())
    # beyond this bound once in a million seeds (Laurent and Massart 2000, lemma 1; see test_sampling.py)
    d, t = V - 1, math.log(1e6)
    assert chi_square < d + 2 * math.sqrt(d * t) + 2 * t


def test_without_a_seed_torch_s_global_generator_decides() -> None:
    model, prompts = random_model(3), random_prompts(3)
    options = dataclasses.replace(SAMPLED, seed=None)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(generate_ids(model, prompts, options, EOS))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("options", [SAMPLED, GenerationOptions(max_new_tokens=4)])
def test_otherwise_the_global_generator_is_left_alone(options: GenerationOptions) -> None:
    before = torch.get_rng_state()
    generate_ids(random_model(3), [], options, EOS)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model = random_model(3)
    torch.manual_seed(0)
    generate_ids(model, random_prompts(3), options, EOS)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_likeliest_of_one_is_greedy() -> None:
    model, prompts = random_model(5), random_prompts(5)
    greedy = generate_ids(model, prompts, GenerationOptions(max_new_tokens=8), EOS)
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-6}):
        options = GenerationOptions(max_new_tokens=8, do_sample=True, seed=1, **narrow)
        assert generate_ids(model, prompts, options, EOS) == greedy


# -- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": math.nan}, "temperature must be a finite number .*: got temperature=nan"),
        ({"temperature": 0.0}, "do_sample=False takes the likeliest token.*: got temperature=0.0"),
        ({"temperature": -1.0}, "got temperature=-1.0"),
        ({"temperature": math.inf}, "got temperature=inf"),
        ({"temperature": "1"}, "got temperature='1'"),
        ({"top_k": -1}, "top_k must be a whole number of at least 0: got top_k=-1"),
        ({"top_k": 2.5}, "top_k must be a whole number of at least 0: got top_k=2.5"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1: got top_p=0.0"),
        ({"top_p": 1.5}, "got top_p=1.5"),
        ({"top_p": math.nan}, "got top_p=nan"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1: got max_new_tokens=0"),
        ({"max_new_tokens": True}, "got max_new_tokens=True"),
        ({"seed": -1}, "seed must be a whole number of at least 0: got seed=-1"),
    ],
)
def test_options_are_checked_before_anything_is_computed(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GenerationOptions(**values)


def test_prompts_that_leave_no_room_are_named_with_both_numbers() -> None:
    model = random_model(0)
    with pytest.raises(
        InputError, match=f"prompt 2 has {BLOCK} tokens; .*block_size={BLOCK}.*at most {BLOCK - 1}"
    ):
        generate_ids(model, [[3], [3] * BLOCK], GenerationOptions(), EOS)
    with pytest.raises(InputError, match="prompt 1 is empty"):
        generate_ids(model, [[]], GenerationOptions(), EOS)
    with pytest.raises(InputError, match="batch_size must be at least 1: got batch_size=0"):
        generate_ids(model, [[3]], GenerationOptions(), EOS, batch_size=0)


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_damaged_weights_are_noticed(do_sample: bool, value: float) -> None:
    model = random_model(0)
    model.transformer.ln_f.bias.data[3] = value
    with pytest.raises(InputError, match="scores are not finite numbers"):
        generate_ids(model, [[3, 4]], GenerationOptions(do_sample=do_sample, seed=0), EOS)


# -- questions and answers ----------------------------------------------------------------------------------

LEARNED = {
    "天？": "天是黑色。",
    "大地呢？": "黄。",
    "月": "月是白的",
    "山是什么颜色？": "青",
    "水": "水蓝蓝，很蓝",
}
PAIRS = [Pair(question, answer, line, "") for line, (question, answer) in enumerate(LEARNED.items(), 1)]


@pytest.fixture(scope="module")
def trained() -> tuple[GPTLMHeadModel, Tokenizer]:
    """A tiny model that has learned five pairs by heart."""
    tokenizer = Tokenizer.from_word2id(build_vocabulary(p.question + p.answer for p in PAIRS))
    torch.manual_seed(0)
    config = GPTConfig(n_embd=32, n_head=2, n_layer=2, block_size=20, vocab_size=tokenizer.get_vocab_size())
    model = GPTLMHeadModel(dataclasses.replace(config, dropout=0.0))
    batch = encode_pairs(PAIRS, tokenizer, 20).batch(np.arange(len(PAIRS)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        loss = F.cross_entropy(model(batch.input_ids)[batch.answer_mask], batch.targets[batch.answer_mask])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval(), tokenizer


def test_it_answers_in_the_questions_order(trained: tuple[GPTLMHeadModel, Tokenizer]) -> None:
    questions, answers = [p.question for p in PAIRS], [p.answer for p in PAIRS]
    for batch_size in (1, 2, 64):
        found = answer_questions(*trained, questions, batch_size=batch_size)
        assert [answer.text for answer in found] == answers
        assert {answer.stop_reason for answer in found} == {"eos"}
    assert [generate(*trained, question) for question in questions] == answers
    assert minigpt.generate(*trained, "大地呢？", max_new_tokens=1) == "黄"


def test_unknown_characters_are_named(trained: tuple[GPTLMHeadModel, Tokenizer]) -> None:
    known, strange = answer_questions(*trained, ["水", "😀水㐀😀"])
    assert (known.unknown_characters, strange.unknown_characters) == ([], ["😀", "㐀"])


def test_a_typed_sep_is_five_characters(trained: tuple[GPTLMHeadModel, Tokenizer]) -> None:
    (answer,) = answer_questions(*trained, ["水<sep>"], GenerationOptions(max_new_tokens=2))
    assert answer.unknown_characters == ["<", "s", "e", "p", ">"]


def test_a_question_that_is_too_long_is_named(trained: tuple[GPTLMHeadModel, Tokenizer]) -> None:
    longest = "水" * 18  # with its <sep> 19 tokens of 20
    assert answer_questions(*trained, [longest])[0].stop_reason in ("eos", "context")
    with pytest.raises(
        InputError, match=r"question 2 \('水{19}'\) with its <sep> has 20 tokens; .*block_size=20.*at most 19"
    ):
        answer_questions(*trained, ["水", longest + "水"])
    with pytest.raises(InputError, match=r"question 1 \('山{20}\.\.\.'\) .* has 301 tokens"):
        generate(*trained, "山" * 300)


def test_an_unknown_option_names_the_nearest(trained: tuple[GPTLMHeadModel, Tokenizer]) -> None:
    with pytest.raises(InputError, match="unknown option 'temprature'; did you mean 'temperature'"):
        generate(*trained, "水", temprature=0.5)


def test_the_cache_is_used(
    trained: tuple[GPTLMHeadModel, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: dict[bool, list[int]] = {True: [], False: []}
    original = nn.Module.__call__

    def watch(module: nn.Module, *inputs: Any, **named: Any) -> Any:
        if module is trained[0].transformer:
            ids: Tensor = inputs[0]
            widths[use_cache].append(ids.shape[1])
        return original(module, *inputs, **named)

    monkeypatch.setattr(nn.Module, "__call__", watch)
    for use_cache in (True, False):
        assert generate(*trained, "大地呢？", use_cache=use_cache) == "黄。"
    assert widths == {True: [5, 1, 1], False: [5, 6, 7]}
