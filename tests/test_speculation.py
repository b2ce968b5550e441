"""Speculative decoding: guesses change the number of steps, not the result."""

import dataclasses
import functools
import math
import random
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from minigpt.errors import InputError
from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM
from minigpt.families.registry import LanguageModel
from minigpt.generation import native, speculative_decoding
from minigpt.generation.api import GenerationOptions, generate_ids, generate_output
from minigpt.generation.loop import decode
from minigpt.generation.output import Completion
from minigpt.generation.sequence import Sequence, base_seed, check_request, row_seed
from minigpt.generation.speculative_decoding import (
    Draft,
    Drafter,
    ModelDrafter,
    NgramDrafter,
    Speculation,
    accept,
)
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.weights.quantized import set_precision
from tests.marks import compiled

V, BLOCK, EOS = 14, 64, 2


def gpt(seed: int, scale: float = 0.3, block: int = BLOCK, vocab_size: int = V) -> LanguageModel:
    torch.manual_seed(seed)
    model = GPTLMHeadModel(GPTConfig(24, 2, 2, 0.1, block, vocab_size))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, scale)
    return model.eval()


def qwen3(seed: int) -> LanguageModel:
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(V, 24, 40, 2, 4, 2, 8, BLOCK))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    return model.eval()


def near(model: LanguageModel, noise: float) -> LanguageModel:
    """Make a model whose answers are similar to another model's."""
    torch.manual_seed(99)
    other = gpt(0)
    other.load_state_dict(model.state_dict())
    for parameter in other.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return other


def prompts_of(seed: int, count: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, V) for _ in range(draw.randint(1, 12))] for _ in range(count)]


@dataclass(frozen=True)
class Speculated:
    """The result, and the numbers of steps and guesses."""

    completion: Completion
    drafted: int
    accepted: int
    steps: int


def speculate(
    model: LanguageModel, prompt: list[int], options: GenerationOptions, eos: int | None,
    drafter: Callable[[], Drafter], count: int = 4,
) -> Speculated:  # fmt: skip
    """Do the same as generate_ids, with any drafter."""
    request, seed = check_request(model, [prompt], options, eos, None), base_seed(options)
    limit = options.limit(len(prompt), model.config.max_position_embeddings)
    sequence = Sequence(prompt, request, limit, None if seed is None else row_seed(seed, 0, 0))
    speculation = Speculation(drafter(), count)
    sequence.speculation = speculation
    steps = sum(1 for _ in decode(model, [sequence], 1))
    return Speculated(sequence.completion(), speculation.drafted, speculation.accepted, steps)


class Wild:
    """A drafter that guesses any ids, also eos, or nothing."""

    def __init__(self) -> None:
        self._random = random.Random(7)

    def draft(self, sequence: Sequence, count: int) -> Draft:
        return Draft([self._random.randrange(V) for _ in range(self._random.randint(0, count))])


# -- the same ids -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_torch", [False, True])
@pytest.mark.parametrize("family", ["gpt", "qwen3"])
@pytest.mark.parametrize("drafter", ["ngram", "model", "itself", "wild"])
def test_the_most_likely_tokens_are_the_same(
    drafter: str, family: str, in_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_torch:
        monkeypatch.setattr(native, "library", lambda: None)
    accepted = steps = 0
    for seed in range(3):
        model = gpt(seed) if family == "gpt" else qwen3(seed)
        if in_torch:  # PyTorch rounds several tokens in another order than one
            model = model.double()
        small = model if drafter == "itself" else gpt(seed + 1)
        guessers: dict[str, Callable[[], Drafter]] = {"ngram": NgramDrafter, "wild": Wild}
        guesser = guessers.get(drafter, functools.partial(ModelDrafter, small))
        for number, prompt in enumerate(prompts_of(seed, 4)):
            options = GenerationOptions(max_new_tokens=25)
            found = speculate(model, prompt, options, EOS, guesser, 1 + number)
            assert found.completion == generate_ids(model, [prompt], options, EOS)[0]
            assert 0 <= found.accepted <= found.drafted
            accepted, steps = accepted + found.accepted, steps + found.steps
            if drafter == "itself" and found.completion.stop_reason != "eos":
                assert found.accepted == found.drafted
                new = len(found.completion.ids)
                assert found.steps == 1 + math.ceil((new - 1) / (2 + number))
    if drafter != "model":
        assert accepted > 0


@pytest.mark.parametrize("in_torch", [False, True])
def test_guesses_that_are_no_draws_leave_the_drawn_ids_as_they_are(
    in_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_torch:
        monkeypatch.setattr(native, "library", lambda: None)
    model = gpt(3, 0.2).double() if in_torch else gpt(3, 0.2)
    options = GenerationOptions(
        max_new_tokens=30, do_sample=True, temperature=0.9, top_p=0.9, repetition_penalty=0.8, seed=5,
        no_repeat_ngram_size=4, min_new_tokens=3, presence_penalty=-0.2,
    )  # fmt: skip
    accepted = 0
    for number, prompt in enumerate(prompts_of(4, 10)):
        for drafter in (NgramDrafter, Wild):
            found = speculate(model, prompt, options, EOS, drafter, 3)
            assert found.completion == generate_ids(model, [prompt], options, EOS)[0], number
            accepted += found.accepted
    assert accepted > 0


@compiled
@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_quantised_weights_too(precision: Any) -> None:
    model = set_precision(qwen3(1), precision)
    options = GenerationOptions(max_new_tokens=25)
    for prompt in prompts_of(5, 6):
        found = speculate(model, prompt, options, EOS, NgramDrafter, 6)
        assert found.completion == generate_ids(model, [prompt], options, EOS)[0]


@pytest.mark.parametrize("length", [1, BLOCK - 9, BLOCK - 2, BLOCK - 1])
def test_up_to_the_last_place_of_the_context(length: int) -> None:
    model, short, prompt = gpt(5), gpt(6, block=BLOCK // 2), [3 + i % 3 for i in range(length)]
    for options in (GenerationOptions(eos_token_id=[]), GenerationOptions(max_new_tokens=1)):
        for drafter in (NgramDrafter, lambda: ModelDrafter(model), lambda: ModelDrafter(short)):
            found = speculate(model, prompt, options, EOS, drafter, 5)
            assert found.completion == generate_ids(model, [prompt], options, EOS)[0]


def test_what_repeats_is_guessed_right() -> None:
    model = gpt(0)
    for name, parameter in model.named_parameters():  # a model that says what it has just read, plus one
        parameter.data.zero_()
        if name.endswith("ln_f.weight"):
            parameter.data.fill_(1)
    assert isinstance(model, GPTLMHeadModel)
    model.transformer.wte.weight.data[:, :V] = torch.eye(V)
    shifted = torch.eye(V, 24).roll(-1, dims=0)
    model.lm_head.weight = torch.nn.Parameter(shifted)  # untied: token t says the one whose row is t's
    options = GenerationOptions(max_new_tokens=40)
    plain = generate_ids(model, [[3]], options, None)[0]
    found = speculate(model, [3], options, None, NgramDrafter, 6)
    assert found.completion == plain
    assert len(set(plain.ids)) == V  # it goes through the vocabulary, again and again
    assert found.accepted == found.drafted
    assert found.steps == V + math.ceil((40 - V) / 7)  # once round, then seven tokens a step


def test_the_rate_without_guesses() -> None:
    found = speculate(gpt(0), [3], GenerationOptions(max_new_tokens=1), None, NgramDrafter)
    assert found == Speculated(found.completion, 0, 0, 1)


# -- the same distribution ----------------------------------------------------------------------------------


def chi_square_is_small(counts: torch.Tensor, right: torch.Tensor) -> bool:
    """Return True unless the counts exceed a bound that true samples exceed for one in a million seeds."""
    n, possible = int(counts.sum()), right > 0
    assert int(counts[~possible].sum()) == 0
    expected = n * right[possible]
    chi_square = float(((counts[possible] - expected) ** 2 / expected).sum())
    d, t = int(possible.sum()) - 1, math.log(1e6)
    return chi_square < d + 2 * math.sqrt(d * t) + 2 * t


@pytest.mark.parametrize("case", ["near", "far", "disjoint", "same", "one"])
def test_the_rule_draws_from_p_whatever_q(case: str) -> None:
    generator = torch.Generator().manual_seed(1)
    p, q = torch.rand((2, 8), generator=generator, dtype=torch.float64)
    if case == "near":
        q = p + 0.1 * q
    if case == "disjoint":
        p[:4], q[4:] = 0, 0
    if case == "one":
        q[:] = 0
        q[2] = 1
    if case == "same":
        q = p
    p, q = p / p.sum(), q / q.sum()
    draw, n = np.random.default_rng(2), 20000
    guesses = draw.choice(8, size=n, p=q.numpy())
    numbers = draw.random((n, 2))
    found = torch.tensor([accept(p, q, int(guess), *pair) for guess, pair in zip(guesses, numbers.tolist())])
    assert chi_square_is_small(found.bincount(minlength=8), p)
    kept = float((found.numpy() == guesses).mean())
    # kept with probability sum(min(p, q)), or redrawn by chance, never: what is redrawn has q < p
    share = float(torch.minimum(p, q).sum())
    assert abs(kept - share) <= 5 * math.sqrt(0.25 / n)  # five standard deviations of a share of n


def test_the_comparison_above_notices_a_wrong_rule() -> None:
    right = torch.tensor([0.5, 0.3, 0.2])
    assert chi_square_is_small(torch.tensor([10000, 6000, 4000]), right)
    assert not chi_square_is_small(torch.tensor([10500, 5700, 3800]), right)
    with pytest.raises(AssertionError):
        chi_square_is_small(torch.tensor([9999, 1]), torch.tensor([1.0, 0.0]))


@torch.inference_mode()
def test_texts_with_a_drawn_draft_are_distributed_as_without() -> None:
    """Compare all texts of three tokens, from a vocabulary of four, with their exact probabilities."""
    model, prompt, n = gpt(1, 0.25, vocab_size=4), [1, 3], 500
    filters: dict[str, Any] = {"do_sample": True, "temperature": 1.2, "top_k": 3}
    small = gpt(2, 0.25, vocab_size=4)
    right = torch.zeros(4, 4, 4, dtype=torch.float64)

    def distribution(ids: list[int]) -> torch.Tensor:
        scores: torch.Tensor = model(torch.tensor([ids]))[0, -1].double() / 1.2
        return scores.masked_fill(scores < scores.topk(3).values[-1], -math.inf).softmax(-1)

    for a in range(4):
        for b in range(4):
            right[a, b] = distribution([*prompt, a, b])
            right[a, b] *= distribution([*prompt, a])[b] * distribution(prompt)[a]
    counts = torch.zeros(64, dtype=torch.int64)
    drafted = accepted = 0
    for seed in range(n):
        options = GenerationOptions(max_new_tokens=3, seed=seed, **filters)
        found = speculate(model, prompt, options, None, lambda: ModelDrafter(small), 2)
        a, b, c = found.completion.ids
        counts[16 * a + 4 * b + c] += 1
        drafted, accepted = drafted + found.drafted, accepted + found.accepted
    assert chi_square_is_small(counts, right.flatten())
    assert 0.1 < accepted / drafted < 0.95  # some were right, some were not: both ways were taken


def test_a_drawn_draft_by_the_model_itself_is_always_right() -> None:
    model = gpt(3)
    options = GenerationOptions(max_new_tokens=20, do_sample=True, seed=1, eos_token_id=[])
    found = speculate(model, [3, 4], options, None, lambda: ModelDrafter(model), 4)
    assert found.accepted == found.drafted == 15
    near_by = speculate(model, [3, 4], options, None, lambda: ModelDrafter(near_gpt(model)), 4)
    assert 0 < near_by.accepted <= near_by.drafted
    assert speculate(model, [3, 4], options, None, lambda: ModelDrafter(model), 4) == found  # a seed decides


def near_gpt(model: LanguageModel) -> LanguageModel:
    return near(model, 0.01)


def test_what_looks_back_is_obeyed_whatever_the_draft_guesses() -> None:
    model = gpt(4, 0.2)
    options = GenerationOptions(
        max_new_tokens=12, do_sample=True, temperature=1.5, seed=3, no_repeat_ngram_size=1, eos_token_id=[],
        bad_words_ids=[[5]],
    )  # fmt: skip
    for prompt in ([3], [4]):
        ids = speculate(model, prompt, options, None, lambda: ModelDrafter(model), 3).completion.ids
        assert len({*prompt, *ids}) == 13
        assert 5 not in ids


# -- what is refused ----------------------------------------------------------------------------------------


def test_bad_input() -> None:
    with pytest.raises(InputError, match="max_matching_ngram_size must be at least 1: got 0"):
        NgramDrafter(0)


def test_generate_takes_guesses_as_options() -> None:
    """Each row has the seed that it has in a batch."""
    model, small = gpt(0), gpt(1)
    prompts = [[3, 4, 5, 3, 4], [6], [7, 8, 7, 8, 7]]
    for values in ({}, {"do_sample": True, "seed": 5, "num_return_sequences": 2}):
        options = GenerationOptions(max_new_tokens=12, **dict[str, Any](values))
        expected = generate_ids(model, prompts, options, EOS)
        guessing = dataclasses.replace(options, prompt_lookup_num_tokens=3, max_matching_ngram_size=2)
        finished: list[int] = []
        assert generate_ids(model, prompts, guessing, EOS, on_progress=finished.append) == expected
        assert finished == list(range(1, len(expected) + 1))
        if not values:  # what a model has drawn is distributed as without guesses, but drawn otherwise
            assert generate_ids(model, prompts, options, EOS, assistant_model=small) == expected
    other = gpt(0, vocab_size=V + 1)
    with pytest.raises(InputError, match="the assistant model has vocab_size=15, the model 14"):
        generate_ids(model, prompts, GenerationOptions(), EOS, assistant_model=other)
    with pytest.raises(InputError, match="num_beams=2 does not go with assistant_model: a guess follows one"):
        generate_ids(model, prompts, GenerationOptions(num_beams=2), EOS, assistant_model=small)
    with pytest.raises(InputError, match="num_beams=2 does not go with prompt_lookup_num_tokens: a guess"):
        GenerationOptions(num_beams=2, prompt_lookup_num_tokens=3)
    looking_up = GenerationOptions(prompt_lookup_num_tokens=3)
    with pytest.raises(InputError, match="assistant_model does not go with prompt_lookup_num_tokens: both"):
        generate_ids(model, prompts, looking_up, EOS, assistant_model=small)


def test_an_assistant_takes_memory_only_while_its_sequence_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    made, counts = list[weakref.ref[Any]](), list[int]()

    def watched(make: Callable[..., Any]) -> Callable[..., Any]:
        def making(*arguments: Any) -> Any:
            new = make(*arguments)
            made.append(weakref.ref(new))
            return new

        return making

    for name in ("KeyValueCache", "runner_for"):
        monkeypatch.setattr(speculative_decoding, name, watched(getattr(speculative_decoding, name)))

    def note(finished: int) -> None:
        counts.append(sum(one() is not None for one in made))

    options, prompts = GenerationOptions(max_new_tokens=6, eos_token_id=[]), prompts_of(0, 5)
    generate_ids(gpt(0), prompts, options, EOS, 2, note, assistant_model=gpt(1))
    assert (len(made), len(counts)) == (10, 5)
    assert max(counts) <= 2  # of the other one that is running


@pytest.mark.parametrize("more", [{"prompt_lookup_num_tokens": 3}, {}])
@pytest.mark.parametrize("use_cache", [True, False])
def test_reports_of_guessed_tokens_are_those_without_guesses(more: dict[str, Any], use_cache: bool) -> None:
    model = gpt(0).double()
    options = GenerationOptions(
        max_new_tokens=12, use_cache=use_cache, output_scores=True, output_logits=True, logprobs=2,
        output_hidden_states=use_cache, output_attentions=use_cache, repetition_penalty=1.1,
    )  # fmt: skip
    prompts = [[3, 4, 5, 3, 4], [6], [7, 8, 7, 8, 7]]
    plain = generate_output(model, prompts, options, EOS)
    guessing = dataclasses.replace(options, **more)
    found = generate_output(model, prompts, guessing, EOS, assistant_model=None if more else gpt(1).double())
    assert found.completions == plain.completions
    for field in dataclasses.fields(plain):
        if field.name != "completions":  # double precision, rounded in another order, then turned into single
            mine, theirs = getattr(found, field.name), getattr(plain, field.name)
            assert (mine is None) == (theirs is None), field.name
            if mine is not None:
                torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
