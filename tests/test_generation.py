"""Generation in batches, with padding and a cache, gives the same ids as a plain loop over one prompt."""

import dataclasses
import itertools
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import minigpt
from minigpt.data.batches import encode_conversations
from minigpt.data.conversation import conversation_of_pair
from minigpt.errors import InputError
from minigpt.generation import native
from minigpt.generation.api import (
    Completion,
    GenerationOptions,
    answer_questions,
    ends_of_answer,
    eos_of,
    generate,
    generate_ids,
    generate_output,
)
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.tokenizer import Tokenizer, build_vocabulary

V, BLOCK, EOS = 12, 24, 2


def random_model(seed: int, **changes: Any) -> GPTLMHeadModel:
    """Make a model with enlarged initial weights, like those of a trained model, so that its texts vary.

    It computes in double precision, so that rounding decides no comparison of two scores.
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
    """The slow twin: generate for one prompt without padding and cache, and compute all logits."""
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
        minigpt.save_pretrained(model, tmp_path / str(seed), tokenizer)
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
    embeddings = model.transformer.wte.weight.data  # a model that always chooses 5
    embeddings[:] = 0
    model.transformer.ln_f.weight.data[:] = 0
    model.transformer.ln_f.bias.data[:] = 1
    embeddings[5] = 1
    prompts = [[3] * length for length in (4, BLOCK - 4, BLOCK - 3, BLOCK - 1)]
    expected = [([5] * 4, "length"), ([5] * 4, "length"), ([5] * 3, "context"), ([5], "context")]
    assert generate_ids(model, prompts, GenerationOptions(max_new_tokens=4), EOS) == expected
    assert generate_ids(model, prompts, GenerationOptions(max_new_tokens=4), 5) == [([], "eos")] * 4
    # Without max_new_tokens, the answer fills the context.
    assert generate_ids(model, prompts[:1], GenerationOptions(), EOS) == [([5] * (BLOCK - 4), "context")]


def test_finished_rows_leave_the_batch_and_one_position_is_scored() -> None:
    model, prompts = random_model(1), random_prompts(1)
    scored: list[tuple[int, ...]] = []
    inner: list[tuple[int, ...]] = []
    model.transformer.register_forward_hook(lambda _, inputs, output: inner.append(tuple(inputs[0].shape)))
    model.lm_head.register_forward_hook(lambda _, inputs, output: scored.append(tuple(inputs[0].shape)))
    found = generate_ids(model, prompts, GenerationOptions(max_new_tokens=15), EOS)
    # A row takes part in one step for each of its tokens, and in one step for its eos.
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
    found = generate_ids(model, [[4, 7]] * n, options, eos_token_id=None, batch_size=1000)
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


def test_the_most_likely_of_one_is_greedy() -> None:
    model, prompts = random_model(5), random_prompts(5)
    greedy = generate_ids(model, prompts, GenerationOptions(max_new_tokens=8), EOS)
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-6}):
        options = GenerationOptions(max_new_tokens=8, do_sample=True, seed=1, **narrow)
        assert generate_ids(model, prompts, options, EOS) == greedy


# -- options that look back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_batch_says_what_each_prompt_says_alone_whatever_the_options(seed: int, do_sample: bool) -> None:
    """Penalties and forbidden tokens depend on the prompt, but not on its padding or on other prompts."""
    model, prompts = random_model(seed), random_prompts(seed, longest=14)
    options = GenerationOptions(
        max_new_tokens=9, min_new_tokens=3, do_sample=do_sample, temperature=1.4, min_p=0.01, typical_p=0.95,
        repetition_penalty=1.3, no_repeat_ngram_size=2, presence_penalty=0.4, frequency_penalty=0.3,
        logit_bias={0: 1.0, 5: -0.5}, bad_words_ids=[[4], [6, 7], [8, 8, 8]], seed=3,
    )  # fmt: skip
    together = generate_ids(model, prompts, options, [EOS, 1])
    for batch_size, use_cache in itertools.product((1, 5), (True, False)):
        changed = dataclasses.replace(options, use_cache=use_cache)
        assert generate_ids(model, prompts, changed, [EOS, 1], batch_size) == together
    assert together != generate_ids(model, prompts, dataclasses.replace(options, repetition_penalty=1.0), EOS)
    for prompt, (ids, reason) in zip(prompts, together):
        assert not {EOS, 1, 4} & set(ids)
        if reason == "eos":
            assert len(ids) >= 3
        all_ids = prompt + ids
        pairs = list(itertools.pairwise(all_ids))
        for place in range(len(prompt) - 1, len(pairs)):  # those that generation completed
            assert pairs[place] not in pairs[:place]
            assert pairs[place] != (6, 7)


def test_several_ends_and_the_callers_own() -> None:
    for seed in range(6):
        model, prompts = random_model(seed), random_prompts(seed)
        options = GenerationOptions(max_new_tokens=15)
        endless = generate_ids(model, prompts, options, None)
        for eos in ([EOS], [3, EOS, 7], []):
            expected = []
            for ids, reason in endless:
                met = [place for place, token in enumerate(ids) if token in eos]
                expected.append(Completion(ids[: met[0]], "eos") if met else Completion(ids, reason))
            assert generate_ids(model, prompts, options, eos) == expected
            own = dataclasses.replace(options, eos_token_id=eos)
            assert generate_ids(model, prompts, own, 9) == expected


def test_beams_are_the_same_in_any_company() -> None:
    model, prompts = random_model(3), random_prompts(3)
    options = GenerationOptions(max_new_tokens=8, num_beams=3, num_return_sequences=2)
    together = generate_ids(model, prompts, options, EOS)
    assert len(together) == 2 * len(prompts)
    seen: list[int] = []
    for place, prompt in enumerate(prompts):
        assert (
            generate_ids(model, [prompt], options, EOS, 1, seen.append) == together[2 * place : 2 * place + 2]
        )
    assert set(seen) == {2}
    likelier = 0
    for prompt, best in zip(prompts, together[::2]):
        greedy = generate_ids(model, [prompt], GenerationOptions(max_new_tokens=8), EOS)[0]
        mine, theirs = (log_probability(model, prompt, one) for one in (best, greedy))
        assert mine >= theirs - 1e-5  # single precision; length_penalty 1 makes both means over their tokens
        likelier += mine > theirs + 1e-3
    assert likelier >= 3


@torch.inference_mode()
def log_probability(model: GPTLMHeadModel, prompt: list[int], completion: Completion) -> float:
    """Return the mean log-probability of the new tokens, eos included. Beams are ranked by it."""
    ids = completion.ids + [EOS] * (completion.stop_reason == "eos")
    log_p = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float(log_p.gather(-1, torch.tensor(ids)[:, None]).mean())


def test_each_of_several_sequences_has_its_own_draws() -> None:
    model, prompts = random_model(3), random_prompts(3)
    one = generate_ids(model, prompts, SAMPLED, EOS)
    four = generate_ids(model, prompts, dataclasses.replace(SAMPLED, num_return_sequences=4), EOS, 7)
    assert four[::4] == one  # the first is the same, however many follow
    various = [len({tuple(found.ids) for found in four[i : i + 4]}) for i in range(0, len(four), 4)]
    assert sum(count > 2 for count in various) > len(various) / 2  # for some prompts the model is too certain


# -- outputs ------------------------------------------------------------------------------------------------


def test_nothing_that_was_not_asked_for_is_there_or_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    import minigpt.model

    monkeypatch.setattr(minigpt.model, "eager_attention", lambda *_: pytest.fail("weights were computed"))
    model, prompts = random_model(1), random_prompts(1)
    found = generate_output(model, prompts, GenerationOptions(max_new_tokens=15), EOS)
    assert found.completions == generate_ids(model, prompts, GenerationOptions(max_new_tokens=15), EOS)
    for field in dataclasses.fields(found):
        assert (getattr(found, field.name) is None) == (field.name not in ("completions", "sequences"))


def test_outputs_leave_no_hooks_behind() -> None:
    model = random_model(1)
    options = GenerationOptions(max_new_tokens=3, output_hidden_states=True, output_attentions=True)
    found = generate_output(model, [[3, 4]], options, None)
    assert found.hidden_states is not None
    assert found.attentions is not None
    assert [len(step) for step in found.hidden_states] == [3, 3, 3]  # embeddings and two layers
    assert [len(step) for step in found.attentions] == [2, 2, 2]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_log_probabilities_are_the_model_s_own() -> None:
    model, prompts = random_model(4), [[3, 4, 5], [6, 7, 8], [9, 3, 3]]
    options = dataclasses.replace(SAMPLED, logprobs=3, num_return_sequences=2)
    found = generate_output(model, prompts, options, None)
    assert found.logprobs is not None
    assert found.top_logprobs is not None
    assert found.top_ids is not None
    assert found.logprobs.shape == (6, 8)
    assert found.top_ids.shape == found.top_logprobs.shape == (6, 8, 3)
    with torch.inference_mode():
        log_p = model(found.sequences)[:, 2:-1].float().log_softmax(-1)  # (B, steps, V)
    chosen = log_p.gather(-1, found.sequences[:, 3:, None])[..., 0]
    # a few roundings of single precision, of sums in another order
    torch.testing.assert_close(found.logprobs, chosen, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.top_logprobs, log_p.topk(3).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.top_logprobs, log_p.gather(-1, found.top_ids), rtol=1e-5, atol=1e-5)


def test_rows_at_the_end_of_the_context_wait_for_the_others() -> None:
    model = random_model(2)
    prompts = [[3] * (BLOCK - 1), [4, 5], [6] * (BLOCK - 3)]
    options = GenerationOptions(max_new_tokens=15, output_logits=True, output_attentions=True)
    for use_cache in (True, False):
        found = generate_output(model, prompts, dataclasses.replace(options, use_cache=use_cache), None)
        assert found.completions == generate_ids(model, prompts, GenerationOptions(max_new_tokens=15), None)
        assert found.sequences.shape == (3, BLOCK - 1 + 15)
        assert [len(completion.ids) for completion in found.completions] == [1, 15, 3]


# -- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": math.nan}, "temperature must be from 1e-06 to .*: got temperature=nan"),
        ({"temperature": 0.0}, "do_sample=False takes the most likely token.*: got temperature=0.0"),
        ({"temperature": -1.0}, "got temperature=-1.0"),
        ({"temperature": math.inf}, "got temperature=inf"),
        ({"temperature": "1"}, "got temperature='1'"),
        ({"top_k": -1}, "top_k must be from 0 to 1000000000: got top_k=-1"),
        ({"top_k": 2.5}, "top_k must be a whole number from 0 to 1000000000: got top_k=2.5"),
        ({"top_p": 0.0}, "top_p must be from 1e-12 to 1: got top_p=0.0"),
        ({"top_p": 1.5}, "got top_p=1.5"),
        ({"top_p": math.nan}, "got top_p=nan"),
        ({"max_new_tokens": 0}, "max_new_tokens must be from 1 to 1000000000: got max_new_tokens=0"),
        ({"max_new_tokens": True}, "got max_new_tokens=True"),
        ({"seed": -1}, "seed must be from 0 to 9223372036854775807: got seed=-1"),
        ({"typical_p": 0.0}, "typical_p must be from 1e-12 to 1: got typical_p=0.0"),
        ({"min_p": -0.1}, "min_p must be from 0 to 1: got min_p=-0.1"),
        ({"min_p": math.nan}, "got min_p=nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be from 1e-06 to .*: got .*=0.0"),
        ({"repetition_penalty": math.inf}, "got repetition_penalty=inf"),
        ({"presence_penalty": math.nan}, "presence_penalty must be from .*: got presence_penalty=nan"),
        ({"frequency_penalty": "1"}, "frequency_penalty must be a number from .*: got frequency_penalty='1'"),
        ({"length_penalty": math.inf}, "length_penalty must be from -1000 to 1000"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be from 0 to 1000000000"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "got min_new_tokens=5 and max_new_tokens=4"),
        ({"num_beams": 0}, "num_beams must be from 1 to 1000: got num_beams=0"),
        (
            {"num_beams": 2, "do_sample": True},
            "num_beams=2 does not go with do_sample: beam search takes the most likely sequences",
        ),
        ({"num_beams": 2, "output_logits": True}, "num_beams=2 does not go with output_logits: a step"),
        ({"early_stopping": "always"}, """early_stopping must be True, False or "never": got .*='always'"""),
        ({"num_return_sequences": 2}, "num_return_sequences=2 needs do_sample, or at least as many beams"),
        ({"num_return_sequences": 4, "num_beams": 3}, "num_return_sequences=4 needs .*num_beams=3"),
        ({"logit_bias": {3: math.nan}}, "logit_bias must give finite numbers .*: got 3: nan"),
        ({"logit_bias": {"3": 1.0}}, "got '3': 1.0"),
        ({"logit_bias": [3]}, r"logit_bias must be a dictionary, id -> number: got logit_bias=\[3\]"),
        ({"bad_words_ids": [3]}, "bad_words_ids must be a list of lists of ids"),
        ({"bad_words_ids": [[3], []]}, r"none of them empty: got bad_words_ids=\[\[3\], \[\]\]"),
        ({"bad_words_ids": ["ab"]}, "bad_words_ids must be a list of lists of ids"),
        ({"eos_token_id": 1.5}, "eos_token_id must be an id or a list of ids: got eos_token_id=1.5"),
        ({"eos_token_id": [-1]}, r"got eos_token_id=\[-1\]"),
        ({"stop_strings": ""}, "stop_strings must be texts of at least one character: got ''"),
        ({"stop_strings": ["a", ""]}, "got ''"),
        ({"window": 0}, "window must be from 1 to 1000000000: got window=0"),
        ({"sinks": 1}, "sinks are the first tokens of a window, .*: got sinks=1, window=None"),
        ({"window": 4, "sinks": 4}, "got sinks=4, window=4"),
        ({"prompt_lookup_num_tokens": True}, "prompt_lookup_num_tokens must be a whole number"),
        ({"max_matching_ngram_size": 0}, "max_matching_ngram_size must be from 1 to 1000"),
        ({"num_assistant_tokens": 0}, "num_assistant_tokens must be from 1 to 1000"),
        ({"stop_strings": [3]}, "got 3"),
        ({"stop_strings": 3}, "stop_strings must be a text or a list of texts: got stop_strings=3"),
        ({"output_scores": 1}, "output_scores must be True or False: got output_scores=1"),
        ({"logprobs": -1}, "logprobs must be from 0 to 1000000000: got logprobs=-1"),
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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"max_new_tokens": 10_000_000},
            "max_new_tokens=10000000 can never be reached: .*block_size=24 .*most 23",
        ),
        ({"max_new_tokens": BLOCK}, "max_new_tokens=24 can never be reached"),
        ({"min_new_tokens": BLOCK}, "min_new_tokens=24 can never be reached"),
        ({"logit_bias": {V: 1.0}}, "logit_bias has the id 12: the vocabulary's are 0 to 11"),
        ({"bad_words_ids": [[3], [4, 99]]}, "bad_words_ids has the id 99"),
        ({"eos_token_id": [3, V]}, "eos_token_id has the id 12"),
        ({"stop_strings": "a"}, "stop_strings need the tokenizer"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_it_runs(values: dict[str, Any], message: str) -> None:
    model = random_model(0)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    model.base_model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    for ask in (generate_ids, generate_output):
        with pytest.raises(InputError, match=message):
            ask(model, [[3]], GenerationOptions(**values), EOS)
    GenerationOptions(max_new_tokens=BLOCK - 1).check_model(V, BLOCK)  # one less is possible


@pytest.mark.parametrize("token", [-1, V, 10**6])
def test_ids_outside_the_vocabulary_are_refused(token: int) -> None:
    with pytest.raises(InputError, match=f"prompt 2 has the id {token}: the vocabulary's are 0 to 11"):
        generate_ids(random_model(0), [[3], [4, token]], GenerationOptions(), EOS)
    with pytest.raises(InputError, match=f"eos_token_id has the id {token}"):
        generate_ids(random_model(0), [[3]], GenerationOptions(), [EOS, token])


@pytest.mark.parametrize("num_beams", [1, 3])
def test_options_that_leave_no_token_are_refused(num_beams: int) -> None:
    options = GenerationOptions(bad_words_ids=[[token] for token in range(V)], num_beams=num_beams)
    with pytest.raises(InputError, match="the options forbid every token: allow some in logit_bias"):
        generate_ids(random_model(0), [[3]], options, None)
    # transformers: what ends an answer is no bad word
    assert generate_ids(random_model(0), [[3]], options, EOS) == [([], "eos")]


def test_reports_need_a_function_that_returns_them() -> None:
    for values in ({"output_scores": True}, {"logprobs": 0}):
        with pytest.raises(InputError, match="needs return_dict_in_generate=True, or generate_output"):
            generate_ids(random_model(0), [[3]], GenerationOptions(**values), EOS)
    with pytest.raises(InputError, match="logprobs must be at most 12, the vocabulary: got 13"):
        generate_output(random_model(0), [[3]], GenerationOptions(logprobs=V + 1), EOS)
    with pytest.raises(InputError, match="prompts are empty"):
        generate_output(random_model(0), [], GenerationOptions(), EOS)


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
PAIRS = [
    conversation_of_pair(question, answer, line, "")
    for line, (question, answer) in enumerate(LEARNED.items(), 1)
]


@pytest.fixture(scope="module")
def trained() -> tuple[GPTLMHeadModel, Tokenizer]:
    """Make a tiny model that has memorised five pairs."""
    tokenizer = Tokenizer.from_word2id(build_vocabulary(p.question + p.answer for p in PAIRS))
    torch.manual_seed(0)
    config = GPTConfig(n_embd=32, n_head=2, n_layer=2, block_size=20, vocab_size=tokenizer.get_vocab_size())
    model = GPTLMHeadModel(dataclasses.replace(config, dropout=0.0))
    batch = encode_conversations(PAIRS, tokenizer, 20).batch(np.arange(len(PAIRS)))
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


def test_all_outputs_of_one_answer(trained: tuple[GPTLMHeadModel, Tokenizer]) -> None:
    model, tokenizer = trained
    found = generate(
        model,
        tokenizer,
        "天？",
        return_dict_in_generate=True,
        output_scores=True,
        logprobs=1,
        eos_token_id=None,
    )
    assert tokenizer.decode(found.completions[0].ids) == LEARNED["天？"]
    assert found.logprobs is not None
    assert (found.logprobs > math.log(0.5)).all()  # it knows its answers by heart
    for values in ({"output_scores": True}, {"num_return_sequences": 2, "do_sample": True}):
        with pytest.raises(InputError, match="needs return_dict_in_generate=True"):
            generate(model, tokenizer, "天？", **values)
    with pytest.raises(InputError, match="did you mean 'return_dict_in_generate'"):
        generate(model, tokenizer, "天？", return_dict=True)


def test_several_answers_to_each_question(trained: tuple[GPTLMHeadModel, Tokenizer]) -> None:
    options = GenerationOptions(num_beams=2, num_return_sequences=2)
    found = answer_questions(*trained, ["水", "月😀"], options)
    assert found[0].text == LEARNED["水"]
    assert [answer.unknown_characters for answer in found] == [[], [], ["😀"], ["😀"]]


def test_a_stop_string_is_no_part_of_the_answer(trained: tuple[GPTLMHeadModel, Tokenizer]) -> None:
    assert generate(*trained, "水", stop_strings="，") == "水蓝蓝"
    assert generate(*trained, "水", stop_strings=["很蓝", "蓝，"]) == "水蓝"
    (answer,) = answer_questions(*trained, ["水"], GenerationOptions(stop_strings="，"))
    assert answer.stop_reason == "stop_string"


def test_penalties_count_characters(trained: tuple[GPTLMHeadModel, Tokenizer]) -> None:
    model, tokenizer = trained
    assert generate(model, tokenizer, "水") == "水蓝蓝，很蓝"
    for values in ({"no_repeat_ngram_size": 1}, {"presence_penalty": 50.0}, {"frequency_penalty": 50.0}):
        options = GenerationOptions(max_new_tokens=7, **values)
        prompt = [*tokenizer.encode_text("水"), tokenizer.sep_token_id]
        (completion,) = generate_ids(model, [prompt], options, None)
        assert len(set(completion.ids)) == 7


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
    monkeypatch.setattr(native, "library", lambda: None)  # which would do it without the modules
    for use_cache in (True, False):
        assert generate(*trained, "大地呢？", use_cache=use_cache) == "黄。"
    assert widths == {True: [5, 1, 1], False: [5, 6, 7]}


def test_what_ends_a_text_and_what_ends_an_answer() -> None:
    """<sep> follows answers, and eos_token_id follows texts. A text may contain <sep>."""
    both, one = SimpleNamespace(sep_token_id=1, eos_token_id=2), SimpleNamespace(sep_token_id=1)
    tokenizers: list[Any] = [both, one, SimpleNamespace()]
    assert [eos_of(tokenizer) for tokenizer in tokenizers] == [2, 1, None]
    assert [ends_of_answer(tokenizer) for tokenizer in tokenizers] == [[1, 2], [1], []]
