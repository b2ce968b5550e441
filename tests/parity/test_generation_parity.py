"""Generation compared with `transformers`: with the same weights and options, ids, scores and shapes agree.

The models compute in double precision, so that rounding decides no comparison of two scores. Both sides
convert the last position's logits to single precision before the options change them.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minigpt.generation.api import GenerationOptions, generate_ids, generate_output
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.weights.pretrained import save_pretrained

transformers = pytest.importorskip("transformers", reason="transformers, the oracle here, is not installed")

V, BLOCK = 14, 32
N_MODELS = 3
Models = list[tuple[GPTLMHeadModel, Any]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Return our model and transformers', with enlarged initial weights, so that their texts vary."""
    tokenizer = Tokenizer.from_word2id(build_vocabulary(chr(ord("a") + i) for i in range(V - 3)))
    found = []
    for seed in range(N_MODELS):
        torch.manual_seed(seed)
        config = GPTConfig(n_embd=16, n_head=2, n_layer=2, block_size=BLOCK, vocab_size=V, dropout=0.0)
        ours = GPTLMHeadModel(config).double().eval()
        for name, weight in ours.named_parameters():
            if weight.dim() == 2:
                weight.data *= 30 if "wpe" in name else 9
        ours = ours.float().double()  # a checkpoint holds single precision
        folder: Path = tmp_path_factory.mktemp("parity") / str(seed)
        save_pretrained(ours, folder, tokenizer)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        theirs.generation_config = transformers.GenerationConfig()
        found.append((ours, theirs))
    return found


def random_options(seed: int) -> tuple[dict[str, Any], list[int], list[int]]:
    """Return options under Hugging Face's names, a prompt, and the eos ids."""
    draw = random.Random(seed)
    options: dict[str, Any] = {"max_new_tokens": draw.randint(1, 14)}
    if draw.random() < 0.5:
        options["min_new_tokens"] = draw.randint(1, options["max_new_tokens"])
    if draw.random() < 0.5:
        options["repetition_penalty"] = draw.choice([0.8, 1.2, 1.7])
    if draw.random() < 0.4:
        options["no_repeat_ngram_size"] = draw.choice([2, 3])
    if draw.random() < 0.5:
        words = [[draw.randrange(3, V) for _ in range(draw.choice([1, 2, 2, 3]))] for _ in range(4)]
        options["bad_words_ids"] = words
    if draw.random() < 0.3:
        options["logit_bias"] = {token: draw.uniform(-3, 3) for token in draw.sample(range(V), 3)}
    prompt = [draw.randrange(3, V) for _ in range(draw.randint(1, 12))]
    eos = draw.sample(range(V), draw.choice([1, 1, 2, 3]))
    return options, prompt, eos


def their_generate(model: Any, prompts: list[list[int]], eos: list[int], options: dict[str, Any]) -> Any:
    options = dict(options)
    if bias := options.pop("logit_bias", None):
        options["sequence_bias"] = [[[token], value] for token, value in bias.items()]
    return model.generate(
        torch.tensor(prompts), attention_mask=torch.ones(len(prompts), len(prompts[0]), dtype=torch.int64),
        eos_token_id=eos, pad_token_id=eos[0], return_dict_in_generate=True, output_scores=True,
        **{"top_k": 0, **options},
    )  # fmt: skip


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Check that the same scores are -inf, and the others agree up to a few roundings in single precision."""
    assert ours.shape == theirs.shape
    assert torch.equal(ours == -torch.inf, theirs == -torch.inf)
    finite = ours.isfinite()
    torch.testing.assert_close(ours[finite], theirs[finite].to(ours.dtype), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("seed", range(60))
def test_greedy_with_all_options_together(models: Models, seed: int) -> None:
    ours, theirs = models[seed % N_MODELS]
    options, prompt, eos = random_options(seed)
    expected = their_generate(theirs, [prompt], eos, options)
    found = generate_output(ours, [prompt], GenerationOptions(output_scores=True, **options), eos)
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert found.scores is not None
    assert len(found.scores) == len(expected.scores)
    for mine, their in zip(found.scores, expected.scores):
        assert_close(mine, their)
    completion = generate_ids(ours, [prompt], GenerationOptions(**options), eos)[0]
    assert completion == found.completions[0]
    new = expected.sequences[0, len(prompt) :].tolist()
    assert completion.ids == (new[:-1] if new[-1] in eos else new)


@pytest.mark.parametrize("num_beams", [2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(60))
def test_beams_with_all_options_together(models: Models, seed: int, num_beams: int) -> None:
    ours, theirs = models[seed % N_MODELS]
    options, prompt, eos = random_options(seed)
    draw = random.Random(seed + 1000 * num_beams)
    options |= {
        "num_beams": num_beams,
        "num_return_sequences": draw.randint(1, num_beams),
        "length_penalty": draw.choice([1.0, 1.0, 0.0, 2.0, -0.5]),
        "early_stopping": draw.choice([False, True, "never"]),
    }
    expected = their_generate(theirs, [prompt], eos, options)
    for use_cache in (True, False):
        found = generate_output(ours, [prompt], GenerationOptions(use_cache=use_cache, **options), eos)
        assert found.sequences.tolist() == expected.sequences.tolist()
        assert found.sequences_scores is not None
        torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, rtol=1e-5, atol=1e-5)


def test_the_comparisons_above_meet_every_case(models: Models) -> None:
    reasons, lengths = [], set()
    for seed in range(60):
        options, prompt, eos = random_options(seed)
        options["num_beams"] = 3
        (completion,) = generate_ids(models[seed % N_MODELS][0], [prompt], GenerationOptions(**options), eos)
        (greedy,) = generate_ids(
            models[seed % N_MODELS][0], [prompt], GenerationOptions(**options | {"num_beams": 1}), eos
        )
        reasons.append((completion.stop_reason, greedy == completion))
        lengths.add(len(completion.ids))
    assert min(reasons.count((reason, same)) for reason in ("eos", "length") for same in (True, False)) >= 5
    assert len(lengths) >= 10


@pytest.mark.parametrize("seed", range(12))
def test_the_scores_that_are_drawn_from(models: Models, seed: int) -> None:
    """In each step of a sampled answer, scores equal those of transformers' generate after the same ids."""
    ours, theirs = models[seed % N_MODELS]
    draw = random.Random(seed)
    options: dict[str, Any] = {
        "temperature": draw.choice([0.7, 1.0, 1.8]), "top_k": draw.choice([0, 3, 9, 50]),
        "top_p": draw.choice([1.0, 0.9, 0.6]), "min_p": draw.choice([0.0, 0.02, 0.2]),
        "typical_p": draw.choice([1.0, 0.9, 0.5]), "repetition_penalty": draw.choice([1.0, 1.3]),
    }  # fmt: skip
    prompt = [3, 7, 5]
    chosen = GenerationOptions(max_new_tokens=8, do_sample=True, seed=seed, output_scores=True, **options)
    found = generate_output(ours, [prompt], chosen, [0])
    assert found.scores is not None
    for step, scores in enumerate(found.scores):
        ids = found.sequences[0, : len(prompt) + step].tolist()
        expected = their_generate(theirs, [ids], [0], {**options, "do_sample": True, "max_new_tokens": 1})
        assert_close(scores, expected.scores[0])


def test_logits_states_and_attentions_have_hugging_face_s_shapes_and_values(models: Models) -> None:
    ours, theirs = models[0]
    theirs.set_attn_implementation("eager")  # only this implementation returns attention weights
    prompts, eos = [[3, 7, 5, 5], [9, 4, 8, 3], [6, 6, 10, 4]], [1]
    names = ("logits", "hidden_states", "attentions")
    asked = {f"output_{name}": True for name in names}
    for use_cache in (True, False):
        options: dict[str, Any] = {"max_new_tokens": 5, "use_cache": use_cache, **asked}
        expected = their_generate(theirs, prompts, eos, options)
        found = generate_output(ours, prompts, GenerationOptions(output_scores=True, **options), eos)
        assert found.sequences.tolist() == expected.sequences.tolist()
        torch.testing.assert_close(found.logits, expected.logits, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(found.scores, expected.scores, rtol=2e-6, atol=2e-6)
        # tuples of tuples: shapes and values; some roundings of double precision after each other
        torch.testing.assert_close(found.hidden_states, expected.hidden_states, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.attentions, expected.attentions, rtol=1e-9, atol=1e-9)
    theirs.set_attn_implementation("sdpa")


def test_rows_of_unlike_length_end_at_their_own_time(models: Models) -> None:
    """A padded batch in transformers gives the same ids. There, finished rows continue with padding."""
    ours, theirs = models[1]
    prompts, eos = [[3, 7, 5, 5, 9], [9, 4], [6], [8, 11, 12]], [4, 9]
    width = max(map(len, prompts))
    padded = torch.tensor([[eos[0]] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    expected = theirs.generate(
        padded, attention_mask=mask, max_new_tokens=12, eos_token_id=eos, pad_token_id=eos[0],
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    found = generate_output(ours, prompts, GenerationOptions(max_new_tokens=12, output_logits=True), eos)
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert len({len(completion.ids) for completion in found.completions}) > 1
    assert found.logits is not None
    for step, (mine, their) in enumerate(zip(found.logits, expected.logits, strict=True)):
        live = [row for row, completion in enumerate(found.completions) if step <= len(completion.ids)]
        assert_close(mine[live], their[live])
