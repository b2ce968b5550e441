"""minigpt.lens: each view's numbers equal a slow, plain computation, for both families."""

import ast
import json
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.cells import cell_len
from torch import Tensor

from minigpt import lens
from minigpt.data.batches import encode_conversations
from minigpt.data.conversation import Conversation, conversation_of_pair
from minigpt.errors import InputError
from minigpt.evaluation.loss import evaluate_loss
from minigpt.families.qwen3.model import Qwen3Config
from minigpt.families.registry import LanguageModel, new_model
from minigpt.finetuning.lora import LoraConfig, apply_lora
from minigpt.generation.cache import cache_bytes
from minigpt.generation.options import GenerationOptions
from minigpt.generation.sampling import apply_temperature, apply_top_k, apply_top_p
from minigpt.lens import reading as lens_reading
from minigpt.lens.curves import Curve, Runs
from minigpt.lens.examples import encode as lens_encode
from minigpt.lens.experiments import EXPERIMENTS
from minigpt.lens.pictures import write_picture
from minigpt.lens.reading import read_question
from minigpt.lens.results import Bars, Heat, Table, View, fragment, in_terminal, longest_bar, page, percent
from minigpt.lens.words import CHINESE, speaker
from minigpt.model import GPTConfig
from minigpt.reference import bpe as plain_bpe
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.training.run_data import PLAIN_TEMPLATE
from minigpt.weights.pretrained import save_pretrained
from minigpt.weights.quantized import set_precision

QUESTION, ANSWER = "四川的省会是哪里？", "成都。"
CHARACTERS = Tokenizer.from_word2id(build_vocabulary([QUESTION + ANSWER + '京<b>&" $x$']))
BPE = BpeTokenizer.train([QUESTION + ANSWER, "low lower lowest", QUESTION] * 3, 300)
KINDS = ["gpt", "gpt-int8", "gpt-lora", "gpt-bpe", "qwen3", "qwen3-int8", "qwen3-lora", "qwen3-bpe"]


def make(kind: str) -> tuple[LanguageModel, Any]:
    """Make a tiny model, with weights large enough to show differences, and its tokenizer."""
    torch.manual_seed(7)
    tokenizer: Any = BPE if kind.endswith("bpe") else CHARACTERS
    size = tokenizer.get_vocab_size()
    config: Any = (
        GPTConfig(n_embd=32, n_head=4, n_layer=3, vocab_size=size, block_size=64, bias=True)
        if kind.startswith("gpt")
        else Qwen3Config(
            vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=False,
        )
    )  # fmt: skip
    model = new_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    if kind.endswith("int8"):
        set_precision(model, "int8")
    if kind.endswith("lora"):
        apply_lora(model, LoraConfig(r=2))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval(), tokenizer


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest) -> tuple[LanguageModel, Any]:
    return make(request.param)


@pytest.fixture(scope="module")
def gpt() -> LanguageModel:
    return make("gpt")[0]


def softmax(row: list[float]) -> list[float]:
    """Return the distribution of a row of logits, computed with Python's numbers."""
    top = max(row)
    powers = [math.exp(value - top) for value in row]
    return [power / sum(powers) for power in powers]


def logits_of(model: LanguageModel, ids: list[int]) -> list[list[float]]:
    with torch.inference_mode():
        rows: list[list[float]] = model(torch.tensor([ids]))[0].double().tolist()
    return rows


# -- the recorder ------------------------------------------------------------------------------------------


def test_all_activations_have_a_name_and_the_stream_is_the_sum_of_its_parts(pair: Any) -> None:
    model, _ = pair
    ids = torch.tensor([[3, 5, 4, 6], [6, 3, 3, 5]])
    seen = lens.record(model, ids)
    assert list(seen) == lens.activation_names(model)
    stream = seen["embeddings"]
    for layer in range(3):
        stream = stream + seen[f"blocks.{layer}.attn"] + seen[f"blocks.{layer}.mlp"]
        torch.testing.assert_close(seen[f"blocks.{layer}"], stream)
        assert seen[f"blocks.{layer}.attn.heads"].shape == (2, 4, 4, 8)
    with torch.inference_mode():
        torch.testing.assert_close(seen["logits"], model(ids))
        torch.testing.assert_close(model.lm_head(seen["norm"]), seen["logits"])


def test_the_model_is_as_before_afterwards(gpt: LanguageModel) -> None:
    ids, hooks = torch.tensor([[3, 4, 5]]), [len(m._forward_hooks) for m in gpt.modules()]
    gpt.train()
    with pytest.raises(InputError, match="has the shape"):
        lens.record(gpt, ids, ["logits"], {"blocks.1": torch.zeros(1)})
    assert gpt.training
    assert [len(m._forward_hooks) for m in gpt.modules()] == hooks
    gpt.eval()


def test_attention_probabilities_equal_a_plain_computation(pair: Any) -> None:
    """The plain computation uses attention's inputs: products, scaling, mask, softmax, number by number."""
    model, _ = pair
    ids = torch.tensor([[3, 5, 4, 6, 7]])
    seen = lens.record(model, ids, ["*.norm_1", "*.attn.probabilities"])
    for layer, block in enumerate(model.blocks):
        queries, keys = queries_and_keys(model, block, seen[f"blocks.{layer}.norm_1"])
        got = seen[f"blocks.{layer}.attn.probabilities"][0]
        for head in range(4):
            for t in range(5):
                scores = [
                    sum(q * k for q, k in zip(queries[head][t], keys[head][s])) / math.sqrt(8)
                    for s in range(t + 1)
                ]
                expected = softmax(scores) + [0.0] * (4 - t)
                # float32's rounding in products of 8 numbers of size 10
                assert got[head, t].tolist() == pytest.approx(expected, abs=2e-5)


@torch.inference_mode()
def queries_and_keys(model: Any, block: Any, x: Tensor) -> tuple[list[Any], list[Any]]:
    """Return queries and keys of one row, (H, T, D) each, as lists."""
    T = x.shape[1]
    if hasattr(block, "attn"):
        parts = block.attn.qkv_proj(x)[0].view(T, 3, 4, 8)
        return parts[:, 0].transpose(0, 1).double().tolist(), parts[:, 1].transpose(0, 1).double().tolist()
    attn, theta = block.self_attn, model.config.rope_theta
    found = []
    for projection, norm in ((attn.q_proj, attn.q_norm), (attn.k_proj, attn.k_norm)):
        heads = norm(projection(x)[0].view(T, -1, 8)).transpose(0, 1).double().tolist()  # (heads, T, D)
        for head in heads:
            for t, vector in enumerate(head):
                for i in range(4):
                    angle = t * theta ** (-2 * i / 8)
                    a, b = vector[i], vector[i + 4]
                    vector[i] = a * math.cos(angle) - b * math.sin(angle)
                    vector[i + 4] = b * math.cos(angle) + a * math.sin(angle)
        found.append(heads)
    queries, keys = found
    return queries, [keys[head // 2] for head in range(4)]  # two query heads share a key head


@pytest.mark.parametrize("kind", ["gpt", "qwen3"])
def test_attention_equals_that_of_transformers(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is an oracle of the tests")
    model, _ = make(kind)
    save_pretrained(model, tmp_path)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids = torch.tensor([[3, 5, 4, 6, 7]])
    with torch.inference_mode():
        theirs = other(ids, output_attentions=True, output_hidden_states=True)
    ours = lens.record(model, ids)
    for layer in range(3):
        weights = ours[f"blocks.{layer}.attn.probabilities"]
        torch.testing.assert_close(weights, theirs.attentions[layer], atol=2e-5, rtol=0)
    torch.testing.assert_close(ours["blocks.1"], theirs.hidden_states[2], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(ours["norm"], theirs.hidden_states[3], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gpt", "qwen3"])
def test_a_head_that_is_switched_off_is_one_whose_output_columns_are_zero(kind: str) -> None:
    model, _ = make(kind)
    ids = torch.tensor([[3, 5, 4, 6]])
    off = lens.record(model, ids, ["logits"], lens.switched_off(model, 1, 2))["logits"]
    layer_off = lens.record(model, ids, ["logits"], lens.switched_off(model, 1))["logits"]
    block = model.blocks[1]
    attn = block.attn if kind == "gpt" else block.self_attn
    out = attn.out_proj if kind == "gpt" else attn.o_proj
    with torch.no_grad():
        out.weight[:, 16:24] = 0
        torch.testing.assert_close(off, model(ids))
        for name, parameter in block.named_parameters():
            if name.split(".")[-2] in ("out_proj", "o_proj", "c_proj", "down_proj"):
                parameter.zero_()
        torch.testing.assert_close(layer_off, model(ids))


def without_head(weights: Tensor) -> Tensor:
    weights = weights.clone()
    weights[:, 2] = 0
    return weights


def test_a_head_that_looks_at_nothing_is_switched_off(pair: Any) -> None:
    model, _ = pair
    ids = torch.tensor([[3, 5, 4, 6], [4, 4, 5, 3]])
    name = "blocks.1.attn.probabilities"
    off = lens.record(model, ids, ["logits"], lens.switched_off(model, 1, 2))["logits"]
    seen = lens.record(model, ids, [name, "logits"], {name: without_head})
    torch.testing.assert_close(seen["logits"], off, rtol=1e-4, atol=1e-4)  # other orders of sums
    assert not torch.allclose(off, model(ids), atol=1e-3)
    assert torch.equal(seen[name], without_head(seen[name]))
    assert seen[name][:, 1].sum() > 7.99, "the other heads look at the same: rows of 1"


def test_probabilities_can_be_patched(pair: Any) -> None:
    """Every token looks at itself alone: each head then takes this token's value, and nothing else."""
    model, _ = pair
    ids = torch.tensor([[3, 5, 4, 6]])
    itself: Any = {
        f"blocks.{layer}.attn.probabilities": torch.eye(4).expand(1, 4, 4, 4) for layer in range(3)
    }
    together = lens.record(model, ids, ["blocks.2.attn.heads"], itself)["blocks.2.attn.heads"]
    positions = torch.arange(4)[:, None]
    with torch.no_grad():  # rows of one token have nothing else to look at
        heads: list[Tensor] = []
        part = "attn.out_proj" if hasattr(model.blocks[2], "attn") else "self_attn.o_proj"
        hook = (
            model.blocks[2]
            .get_submodule(part)
            .register_forward_pre_hook(lambda _, given: heads.append(given[0]))
        )
        model(ids.T, position_ids=positions)
        hook.remove()
    torch.testing.assert_close(together.reshape(4, -1), heads[0].reshape(4, -1), rtol=1e-4, atol=1e-4)
    here, there = torch.tensor([[3, 5, 4, 6]]), torch.tensor([[6, 6, 3, 4]])
    name = "blocks.0.attn.probabilities"
    other = lens.record(model, there, [name])[name]
    patched = lens.record(model, here, [name, "blocks.0.attn"], {name: other})
    assert torch.equal(patched[name], other)
    assert not torch.allclose(patched["blocks.0.attn"], lens.record(model, here)["blocks.0.attn"])


def test_a_wrong_replacement_leaves_nothing_behind(gpt: LanguageModel) -> None:
    ids = torch.tensor([[3, 5, 4, 6]])
    before = gpt(ids)
    wrong = {"blocks.1.attn.probabilities": torch.ones(1, 4, 4, 5)}
    with pytest.raises(InputError, match=r"probabilities has the shape \(1, 4, 4, 4\): got \(1, 4, 4, 5\)"):
        lens.record(gpt, ids, ["logits"], wrong)
    assert torch.equal(gpt(ids), before)
    assert torch.ones(2).softmax(0).sum() == 1


def test_patching_continues_from_the_other_text(pair: Any) -> None:
    model, _ = pair
    here, there = torch.tensor([[3, 5, 4, 6]]), torch.tensor([[6, 6, 3, 4]])
    other = lens.record(model, there)
    patched = lens.record(model, here, ["blocks.2", "logits"], {"blocks.1": other["blocks.1"]})
    torch.testing.assert_close(patched["logits"], other["logits"])
    half = lens.record(
        model, here, changes={"blocks.1": lambda x: torch.cat([other["blocks.1"][:, :2], x[:, 2:]], 1)}
    )
    torch.testing.assert_close(half["logits"][:, :2], other["logits"][:, :2])
    assert not torch.allclose(half["logits"][:, 3], other["logits"][:, 3])


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (["blocks.3.attn"], {}, "unknown activation 'blocks.3.attn'; did you mean 'blocks.2.attn'"),
        (["*"], {"blocks.7.attn.probabilities": torch.zeros_like}, "unknown activation"),
        (["*"], {"nothing": torch.zeros_like}, "unknown activation 'nothing'; known: embeddings"),
    ],
)
def test_unknown_activations(gpt: LanguageModel, names: list[str], changes: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        lens.record(gpt, torch.tensor([[3]]), names, changes)


# -- views of a prediction ---------------------------------------------------------------------------------


def test_loss_equals_a_plain_computation_and_that_of_eval(pair: Any) -> None:
    model, tokenizer = pair
    view = lens.loss(model, tokenizer, QUESTION, ANSWER, others=3)
    reading = read_question(model, tokenizer, QUESTION, ANSWER)
    rows = logits_of(model, reading.ids)[len(reading.prompt) - 1 : -1]
    assert len(view.tokens) == len(reading.answer)
    for token, index, row in zip(view.tokens, reading.answer, rows):
        p = softmax(row)
        assert (token.id, token.rank) == (index, 1 + sum(value > row[index] for value in row))
        assert token.loss == pytest.approx(-math.log(p[index]), rel=1e-5)
        best = sorted((value for i, value in enumerate(p) if i != index), reverse=True)[:3]
        assert [value for _, value in token.others] == pytest.approx(best, rel=1e-5)
    if tokenizer is CHARACTERS:
        encoded = encode_conversations([conversation_of_pair(QUESTION, ANSWER)], tokenizer, 64)
        assert view.mean == pytest.approx(evaluate_loss(model, encoded.in_order(1)).answer.loss, rel=1e-5)


def test_a_chat_model_reads_its_template_and_ends_its_answer() -> None:
    model, _ = make("qwen3-bpe")
    chat = BPE.with_chat_template(PLAIN_TEMPLATE)
    reading = read_question(model, chat, QUESTION, ANSWER)
    assert reading.answer[-1] == chat.eos_token_id
    encoded = lens_encode([conversation_of_pair(QUESTION, ANSWER)], chat, 64)
    assert reading.ids == encoded.ids.tolist()
    hard = lens.data(model, chat, [conversation_of_pair(QUESTION, ANSWER, 1)]).hardest[0]
    assert lens.loss(model, chat, QUESTION, ANSWER).mean == pytest.approx(hard.loss, rel=1e-4)


def test_the_model_s_own_answer_has_no_rows_without_a_token_and_ends_as_it_ended() -> None:
    torch.manual_seed(2)
    size = BPE.get_vocab_size()
    model = new_model(GPTConfig(n_embd=16, n_head=2, n_layer=1, vocab_size=size + 8, block_size=64)).eval()
    eos, sep = BPE.eos_token_id, BPE.sep_token_id
    assert None not in (eos, sep)
    assert eos != sep
    before = read_question(model, BPE, QUESTION).answer
    with torch.no_grad():
        model.lm_head.weight[size:] = 50 * model.lm_head.weight[before[0]]  # now the most likely ones
    assert read_question(model, BPE, QUESTION).answer == before
    for end in (eos, sep):
        with torch.no_grad():
            model.lm_head.weight[[eos, sep]] = 0.0
            model.lm_head.weight[end] = 2 * model.lm_head.weight[before[0]]
        assert read_question(model, BPE, QUESTION).answer == [end]


def test_the_next_token_is_distributed_as_generation_draws_it(pair: Any) -> None:
    model, tokenizer = pair
    options = [
        GenerationOptions(do_sample=True, **one)
        for one in ({"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}, {"repetition_penalty": 2.0})
    ]
    view = lens.next_token(model, tokenizer, QUESTION, options=options)
    ids = read_question(model, tokenizer, QUESTION, "").prompt
    row = logits_of(model, ids)[-1]
    logits = torch.tensor([row])
    penalised = [
        (value / 2 if value > 0 else value * 2) if index in ids else value for index, value in enumerate(row)
    ]
    expected = [
        softmax(row),
        softmax(apply_temperature(logits, 0.5)[0].tolist()),
        softmax([value if value > -math.inf else -1e9 for value in apply_top_k(logits, 3)[0].tolist()]),
        softmax([value if value > -math.inf else -1e9 for value in apply_top_p(logits, 0.6)[0].tolist()]),
        softmax(penalised),
    ]
    order = sorted(range(len(row)), key=lambda index: -row[index])
    for got, p in zip(view.probabilities, expected):
        assert got.tolist() == pytest.approx([p[index] for index in order], abs=1e-6)
    assert view.kept[2] == 3
    assert view.entropy[0] == pytest.approx(-sum(p * math.log(p) for p in expected[0] if p), rel=1e-4)
    assert view.options == ["", "T 0.5", "top_k 3", "top_p 0.6", "penalty 2"]


def test_sampled_answers_are_those_of_generation(gpt: LanguageModel) -> None:
    from minigpt.generation.api import answer_questions

    options = GenerationOptions(do_sample=True, temperature=2.0, max_new_tokens=4)
    view = lens.sampled_answers(gpt, CHARACTERS, QUESTION, [options], count=5, seed=3)
    many = GenerationOptions(
        do_sample=True, temperature=2.0, max_new_tokens=4, num_return_sequences=5, seed=3
    )
    assert view.answers == [[answer.text for answer in answer_questions(gpt, CHARACTERS, [QUESTION], many)]]


def test_the_logit_lens_ends_with_the_model_s_own_prediction(pair: Any) -> None:
    model, tokenizer = pair
    view = lens.logit_lens(model, tokenizer, QUESTION, ANSWER)
    reading = read_question(model, tokenizer, QUESTION, ANSWER)
    start, n = len(reading.prompt) - 1, len(reading.answer)
    rows = [softmax(row) for row in logits_of(model, reading.ids)[start:-1]]
    assert view.layers == ["embeddings", "blocks.0", "blocks.1", "blocks.2"]
    assert view.probabilities[-1].tolist() == pytest.approx(
        [p[i] for p, i in zip(rows, reading.answer)], rel=1e-4
    )
    # a layer in the middle: what the model would say if the later blocks added nothing
    nothing: Any = {f"blocks.2.{part}": torch.zeros_like for part in ("attn", "mlp")}
    cut = lens.record(model, torch.tensor([reading.ids]), ["logits"], nothing)["logits"][0]
    shorter = cut.softmax(-1)[start:-1]
    assert view.best[-2].tolist() == pytest.approx(shorter.max(-1).values.tolist(), rel=1e-4)
    assert len(view.tokens[0]) == n
    for place in range(n):
        known = view.known_after(place)
        ranks = [row[place] for row in view.ranks]
        assert known == next((i for i in range(4) if set(ranks[i:]) == {1}), None)


def test_attention_shows_one_head_and_all_of_them(pair: Any) -> None:
    model, tokenizer = pair
    every = lens.attention(model, tokenizer, QUESTION, ANSWER)
    one = lens.attention(model, tokenizer, QUESTION, ANSWER, layer=1, head=2)
    assert every.probabilities.shape[:2] == (3, 4)
    assert np.allclose(every.probabilities.sum(-1), 1, atol=1e-5)
    assert np.triu(every.probabilities[0, 0], 1).sum() == 0, "no token looks at a later one"
    assert (len(every.chosen), one.chosen) == (12, [(1, 2)])
    table, heat = one.parts(speaker("en"))
    assert isinstance(table, Table)
    assert isinstance(heat, Heat)
    row = table.rows[one.start]
    best = int(every.probabilities[1, 2, one.start].argmax())
    assert str(row[2]).startswith(f"{every.pieces[best]} ")
    assert list(one.as_dict()["probabilities"]) == ["blocks.1.2"]  # type: ignore[call-overload]


def test_charts_of_the_same_things_have_one_scale() -> None:
    charts = [Bars("a", ["x", "y"], [1.0, 0.5]), Bars("b", ["x", "y"], [0.25, 0.0])]
    assert longest_bar(charts) == 1.0
    assert longest_bar(charts[:1]) is None
    assert longest_bar([*charts, Bars("c", ["x"], [9.0])]) is None, "about other things"


def test_a_curve_of_one_point_is_a_number(gpt: LanguageModel) -> None:
    reading = lens_reading.read_text(gpt, CHARACTERS, "四川的省会")
    shown = in_terminal(lens.cache(gpt, CHARACTERS, reading), "en", 40)
    # 3 layers, keys and values, 4 heads of 8 channels, 4 bytes: 768 bytes a token
    assert "bytes 3,840\n" in shown
    assert "→" not in shown
    assert "after the answer" not in shown
    grown = in_terminal(lens.cache(gpt, CHARACTERS, QUESTION, ANSWER), "en", 40)
    assert "7,680 → 9,984" in grown  # 10 tokens of the prompt; 4 of the answer, of which the last is not read


def test_ablation_costs_what_the_loss_says(pair: Any) -> None:
    model, tokenizer = pair
    pairs: list[tuple[str, str | None]] = [(QUESTION, ANSWER), ("川", "成")]
    view = lens.ablate(model, tokenizer, pairs)
    readings = [read_question(model, tokenizer, question, answer) for question, answer in pairs]

    def loss(changes: Any) -> float:
        total = 0.0
        for reading in readings:
            seen = lens.record(model, torch.tensor([reading.ids]), ["logits"], changes)["logits"][0]
            rows = seen[len(reading.prompt) - 1 : -1].double().tolist()
            total -= sum(math.log(softmax(row)[index]) for row, index in zip(rows, reading.answer))
        return total / sum(len(reading.answer) for reading in readings)

    whole = loss({})
    assert view.loss == pytest.approx(whole, rel=1e-5)
    assert view.heads[2, 1] == pytest.approx(loss(lens.switched_off(model, 2, 1)) - whole, abs=1e-4)
    assert view.layers[0] == pytest.approx(loss(lens.switched_off(model, 0)) - whole, abs=1e-4)
    assert view.parts_off["mlp"][1] == pytest.approx(
        loss({"blocks.1.mlp": torch.zeros_like}) - whole, abs=1e-4
    )


def test_the_cache_holds_the_keys_of_each_token_read(pair: Any) -> None:
    model, tokenizer = pair
    view = lens.cache(model, tokenizer, QUESTION, ANSWER)
    reading = read_question(model, tokenizer, QUESTION, ANSWER)
    ids = reading.ids[:-1]
    heads = model.config.num_key_value_heads
    assert view.shape == (3, heads, len(ids), 8)
    assert view.bytes_per_token == cache_bytes(model.config, 1, 1) == 3 * 2 * heads * 8 * 4
    seen = lens.record(model, torch.tensor([ids]), ["blocks.1.norm_1"])["blocks.1.norm_1"]
    _, keys = queries_and_keys(model, model.blocks[1], seen)
    per_head = keys if heads == 4 else keys[::2]
    for t in range(len(ids)):
        norms = [math.sqrt(sum(x * x for x in head[t])) for head in per_head]
        assert view.key_norms[1, t] == pytest.approx(sum(norms) / heads, rel=1e-4)


# -- views of weights, text and data -----------------------------------------------------------------------


def test_neighbours_equal_a_plain_search(pair: Any) -> None:
    model, tokenizer = pair
    view = lens.neighbours(model, tokenizer, "成" if tokenizer is CHARACTERS else "low", count=4)
    size = tokenizer.get_vocab_size()
    index = tokenizer.encode_text("成" if tokenizer is CHARACTERS else "low")[0]
    with torch.inference_mode():
        embedding = next(m for m in model.modules() if type(m).__name__ in ("Embedding", "NarrowEmbedding"))
        rows = embedding(torch.arange(size)).double().tolist()
        head = model.lm_head(torch.eye(32)).T.double()[:size].tolist()  # int8 rounds inputs: 1 stays 1
    for matrix, found in ((rows, view.inputs[0]), (head, view.outputs[0])):
        length = [math.sqrt(sum(x * x for x in row)) for row in matrix]
        cosines = {
            i: sum(a * b for a, b in zip(matrix[index], matrix[i])) / (length[index] * length[i])
            for i in range(size)
            if i != index
        }
        best = sorted(cosines, key=lambda i: -cosines[i])[:4]
        assert [near.cosine for near in found] == pytest.approx([cosines[i] for i in best], abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_counted_and_measured(kind: str) -> None:
    model, _ = make(kind)
    view = lens.weights(model)
    own_head = kind == "gpt-int8"  # a tied lm_head has rounded weights of its own there
    extra = model.config.vocab_size * 32 if own_head else 0
    assert view.count == model.config.parameter_count() + extra
    assert sum(sum(p.number for p in parts) for parts in view.groups().values()) == view.count
    part = next(part for part in view.matrices if ".1." in part.name and len(part.shape) == 2)
    module = model.get_submodule(part.name.removesuffix(".weight"))
    with torch.inference_mode():
        matrix = (module(torch.eye(32)) - module(torch.zeros(1, 32))).T  # the map itself, without its bias
    values = torch.linalg.svdvals(matrix)
    assert part.largest == pytest.approx(float(values[0]), rel=1e-4)
    assert part.rank == pytest.approx(float((values**2).sum() / values[0] ** 2), rel=1e-3)
    assert part.rms == pytest.approx(float(matrix.square().mean().sqrt()), rel=1e-4)


def test_what_training_changed() -> None:
    (new, _), (old, _) = make("gpt"), make("gpt")
    with torch.no_grad():
        new.blocks[1].mlp.c_fc.weight.mul_(1.5)
    changes = {part.name: part.change for part in lens.weights(new, old, "old").matrices}
    assert changes["transformer.blocks.1.mlp.c_fc.weight"] == pytest.approx(0.5, rel=1e-5)
    assert sum(change or 0 for change in changes.values()) == pytest.approx(0.5, rel=1e-5)
    with pytest.raises(InputError, match="the models differ in shape"):
        lens.weights(new, make("qwen3")[0])


def test_characters_and_what_is_unknown() -> None:
    view = lens.tokens(CHARACTERS, "成都😀")
    assert [piece.text for piece in view.pieces] == ["成", "都", "<unk>"]
    assert [piece.id for piece in view.pieces] == CHARACTERS.encode_text("成都😀")
    assert [bytes.fromhex(piece.bytes).decode() for piece in view.pieces] == ["成", "都", "😀"]
    assert [piece.is_unknown for piece in view.pieces] == [False, False, True]
    assert view.unknown == ["😀"]


@pytest.mark.parametrize("text", ["lowest lower", QUESTION + " low", "aaa aaaa", "😀 it's 12"])
def test_merges_end_in_the_tokens_and_follow_the_plain_algorithm(text: str) -> None:
    view = lens.tokens(BPE, text)
    assert [piece.id for piece in view.pieces] == BPE.encode_text(text)
    assert b"".join(bytes.fromhex(piece.bytes) for piece in view.pieces).decode() == text
    steps = BPE.merge_steps(text)
    assert [word for word, _ in steps] == list(plain_bpe.split(text))
    to_bytes = {symbol: bytes([byte]) for byte, symbol in enumerate(_symbols())}
    ranks = {
        tuple(b"".join(to_bytes[c] for c in part) for part in pair): i
        for i, pair in enumerate(BPE.definition.merges)
    }
    for word, states in steps:
        parts = [bytes([byte]) for byte in word.encode()]
        for state in states:
            assert state == parts
            known = [pair for pair in pairwise(parts) if pair in ranks]
            if known:
                parts = plain_bpe._join(parts, min(known, key=ranks.__getitem__))
    assert b"|".join(part for _, states in steps for part in states[-1]) == b"|".join(
        bytes.fromhex(piece.bytes) for piece in view.pieces
    )


def _symbols() -> tuple[str, ...]:
    from minigpt.tokenization.definition import BYTE_SYMBOLS

    return BYTE_SYMBOLS


CONVERSATIONS = [
    conversation_of_pair(question, answer, line)
    for line, (question, answer) in enumerate([(QUESTION, ANSWER), ("京", "是"), ("川的会", "成成都都")], 1)
]


def test_a_batch_is_what_training_reads() -> None:
    view = lens.batch(CONVERSATIONS[:2], CHARACTERS)
    long, short = ([p for p in view.places if p.row == row] for row in (0, 1))
    ids, mask = CHARACTERS.encode(QUESTION, ANSWER, 64, pad_to_max_length=False)
    assert [p.id for p in long] == ids[:-1]
    assert [p.target_id for p in long] == ids[1:]
    assert all(p.is_token for p in long) == all(mask)
    assert [p.counts for p in long] == [False] * len(QUESTION) + [True] * (len(ANSWER) + 1)
    assert [p.is_token for p in short] == [True] * 3 + [False] * (len(long) - 3)
    assert sum(p.counts for p in short) == 2
    everything = lens.batch(CONVERSATIONS[:2], CHARACTERS, loss_on="all")
    assert [p.counts for p in everything.places] == [p.is_token for p in view.places]


def test_the_hardest_examples(pair: Any) -> None:
    model, tokenizer = pair
    view = lens.data(model, tokenizer, CONVERSATIONS, count=99, batch_size=2)
    assert sorted(hard.line for hard in view.hardest) == [1, 2, 3]
    assert [h.loss for h in view.hardest] == sorted((h.loss for h in view.hardest), reverse=True)
    assert sum(cost.total for cost in view.costly) == pytest.approx(
        view.loss * sum(c.number for c in view.costly)
    )
    if tokenizer is CHARACTERS:
        for hard in view.hardest:
            alone = lens.loss(model, tokenizer, hard.question, hard.answer)
            assert hard.loss == pytest.approx(alone.mean, rel=1e-4)
            assert hard.worst == f"{alone.least_sure.text} {alone.least_sure.loss:.1f}"


# -- how a view is shown -----------------------------------------------------------------------------------


def views(model: LanguageModel, tokenizer: Any, question: str = QUESTION) -> dict[str, View]:
    options = [GenerationOptions(do_sample=True, temperature=one) for one in (0.5, 2.0)]
    return {
        "tokens": lens.tokens(tokenizer, question + "😀"),
        "batch": lens.batch(CONVERSATIONS, tokenizer),
        "loss": lens.loss(model, tokenizer, question, ANSWER),
        "own loss": lens.loss(model, tokenizer, question),
        "next": lens.next_token(model, tokenizer, question, options=options),
        "answers": lens.sampled_answers(
            model, tokenizer, question, [GenerationOptions(do_sample=True, max_new_tokens=3)], count=3
        ),
        "attention": lens.attention(model, tokenizer, question, ANSWER),
        "head": lens.attention(model, tokenizer, question, ANSWER, layer=0, head=1),
        "lens": lens.logit_lens(model, tokenizer, question, ANSWER),
        "ablate": lens.ablate(model, tokenizer, [(question, ANSWER)]),
        "neighbours": lens.neighbours(model, tokenizer, "成"),
        "cache": lens.cache(model, tokenizer, question, ANSWER),
        "weights": lens.weights(model, model, "itself"),
        "data": lens.data(model, tokenizer, CONVERSATIONS),
    }


@pytest.mark.parametrize("width", [40, 80])
def test_every_view_fits_the_terminal_in_both_languages(pair: Any, width: int) -> None:
    for name, view in views(*pair).items():
        for language in ("en", "zh"):
            text = in_terminal(view, language, width)
            assert text.strip(), name
            assert "\x1b" not in text, "readable without colour"
            longest = max(text.splitlines(), key=cell_len)
            assert cell_len(longest) <= width, f"{name}, {language}: {longest}"
        json.dumps(view.as_dict(), allow_nan=False)
        assert all(view.headline(speaker("zh")).values()), name


def test_a_page_escapes_whatever_a_text_holds(gpt: LanguageModel) -> None:
    text = '<b>&"'
    for name, view in views(gpt, CHARACTERS, text).items():
        for shown in (fragment(view), view._repr_html_(), page([view], "zh", title=text)):
            assert "<b>" not in shown.replace("<b>loss</b>", "").replace("<figcaption><b>", ""), name
            assert "<script" not in shown
    whole = page([lens.tokens(CHARACTERS, text)], "zh", title=text)
    assert "&lt;b&gt;" in whole
    assert "http" not in whole.replace("http-equiv", ""), "nothing comes from a network"


def test_a_run_says_what_its_evaluations_tell() -> None:
    def curve(steps: list[int], losses: list[float]) -> Curve:
        best = min(losses, default=math.nan)
        step = steps[losses.index(best)] if losses else 0
        return Curve("run", 1, 9, 1.0, best, step, ([1], [1.0]), (steps, losses), [], [])

    told: list[tuple[list[int], list[float]]] = [
        ([], []),
        ([3], [1.0]),
        ([3, 6], [2.0, 1.0]),
        ([3, 6], [1.0, 1.5]),
    ]
    table = Runs([curve(*one) for one in told], []).parts(speaker("en"))[0]
    assert isinstance(table, Table)
    assert [row[4] for row in table.rows] == [
        "never evaluated", "evaluated once", "still falling", "rises by 0.5000",
    ]  # fmt: skip
    assert table.rows[0][2:4] == ("∅", "∅")
    titles = [part.title for part in Runs([curve([], [])], []).parts(speaker("en"))]
    assert titles == ["runs", "training loss", "checkpoints"]  # and no empty chart of a validation loss


def test_invisible_characters_can_be_seen() -> None:
    invisible = "\u202e\u200b\u3000\ufeff\u2066"  # of which the first would turn a whole line of a table
    tokenizer = Tokenizer.from_word2id(build_vocabulary([invisible]))
    text = in_terminal(lens.tokens(tokenizer, invisible))
    assert not set(invisible) & set(text)
    assert all(f"\\u{ord(one):04x}" in text for one in invisible)


@pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)
def test_every_view_becomes_a_picture(
    gpt: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, view in views(gpt, CHARACTERS, "$x$成").items():
        write_picture([view], tmp_path / f"{name}.svg", "zh")
        assert b"<svg" in (tmp_path / f"{name}.svg").read_bytes()[:1000]
    write_picture([views(gpt, CHARACTERS)["head"]], tmp_path / "head.png")
    assert (tmp_path / "head.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)
def test_without_a_chinese_font_one_line_says_so(
    gpt: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from minigpt.console import fonts

    monkeypatch.setattr(fonts, "chinese_font", lambda: None)
    write_picture([lens.loss(gpt, CHARACTERS, QUESTION, ANSWER)], tmp_path / "loss.png", "zh")
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "no font with Chinese characters" in err


def said() -> Iterator[str]:
    """Yield every text that the views pass through `say`."""
    root = Path(__file__).parents[1] / "minigpt"
    for path in (*sorted((root / "lens").glob("*.py")), root / "commands/experiment.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Name(id="say"), args=[ast.Constant(value=str(text)), *_]):
                    yield text
    for about in EXPERIMENTS.values():
        yield from (about.what, about.why)


def test_every_word_has_its_chinese_and_no_other() -> None:
    # group names of weights, and notes that stand in a variable
    by_name = {
        "embedding",
        "final norm",
        "lm_head",
        "({title}: too wide for {width} columns; --plot FILE draws it)",
    }
    assert set(said()) | by_name == set(CHINESE)
    for english, chinese in CHINESE.items():
        fields = [sorted(part for part in text.split("{") if "}" in part) for text in (english, chinese)]
        names = [sorted(part.split("}")[0] for part in parts) for parts in fields]
        assert names[0] == names[1], english


def test_percentages() -> None:
    shown = [percent(value) for value in (1, 0.99987, 0.9949, 0.5, 0.0994, 0.00995, 0.0001, 0.00009, 0)]
    assert shown == ["100%", ">99.9%", "99%", "50%", "9.9%", "1.0%", "0.01%", "<0.01%", "0%"]


# -- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("look", "message"),
    [
        (
            lambda m: lens.attention(m, CHARACTERS, QUESTION, layer=3),
            "layer 3 does not exist: .* layers 0 to 2",
        ),
        (
            lambda m: lens.attention(m, CHARACTERS, QUESTION, layer=0, head=4),
            "head 4 does not exist: .* 0 to 3",
        ),
        (
            lambda m: lens.loss(m, CHARACTERS, "川" * 80, "成"),
            "has 83 tokens, but the model reads at most 64",
        ),
        (lambda m: lens.loss(m, CHARACTERS, "川" * 80), "has 81 tokens, but the model reads at most 64"),
        (lambda m: lens.neighbours(m, CHARACTERS, "你"), "not in the vocabulary, .*: 你"),
        (lambda m: lens.neighbours(m, CHARACTERS, ""), "has no tokens"),
        (lambda m: lens.experiment("no-mask", CONVERSATIONS), "unknown experiment 'no-mask'"),
    ],
)
def test_bad_input_is_one_clear_line(gpt: LanguageModel, look: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        look(gpt)
    assert "\n" not in str(error.value)


# -- experiments -------------------------------------------------------------------------------------------

FACTS = [
    conversation_of_pair(f"{a}{b}{end}", f"{a}{b}是{b}{a}。", line)
    for line, (a, b, end) in enumerate(
        ((a, b, end) for a in "甲乙丙丁" for b in "子丑寅" for end in "？吗呢"), 1
    )
]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_differs_in_one_thing(name: str) -> None:
    result = lens.experiment(name, FACTS, steps=3)
    usual, failing = result.runs
    assert len(usual.train[1]) == len(failing.train[1]) == 3
    assert usual.train[1] != failing.train[1]
    if name not in (
        "no-attention",
        "no-norm",
        "no-positions",
        "no-residual",
        "no-causal-mask",
        "little-data",
    ):
        same = name != "loss-on-all"  # the same weights and batch: only the targets that count differ
        assert (usual.train[1][0] == failing.train[1][0]) == same
    assert result.questions[0] in {each.question for each in FACTS}
    for language in ("en", "zh"):
        assert in_terminal(result, language, 80)


@torch.inference_mode()
def test_the_changes_of_the_model_do_what_they_say() -> None:
    def changed(name: str, n_layer: int = 1) -> Any:
        torch.manual_seed(1)
        config = GPTConfig(n_embd=16, n_head=2, n_layer=n_layer, vocab_size=12, block_size=8)
        model = new_model(config).eval()
        EXPERIMENTS[name].model(model)
        return model

    one, other = torch.tensor([[3, 5, 4, 6]]), torch.tensor([[3, 5, 4, 7]])
    swapped, first = torch.tensor([[5, 3, 4, 6]]), torch.tensor([[9, 5, 4, 6]])

    def moves(name: str, a: Tensor, b: Tensor, place: int) -> bool:
        model = changed(name)
        return not torch.allclose(model(a)[0, place], model(b)[0, place], atol=1e-6)

    assert moves("no-causal-mask", one, other, 0), "the first token sees the last one"
    assert not moves("loss-on-all", one, other, 0), "the usual model does not"
    assert not moves("no-positions", one, swapped, 3), "the order of earlier tokens is lost"
    assert moves("loss-on-all", one, swapped, 3)
    assert not moves("no-attention", one, first, 3), "only the newest token counts"
    assert moves("loss-on-all", one, first, 3)
    for name in ("no-residual", "no-norm"):
        model = changed(name, 2)
        x = model.base_model.wte(one) + model.base_model.wpe(torch.arange(4))
        for block in model.blocks:
            if name == "no-residual":
                x = block.attn(block.ln_1(x), None, None, None)
                x = block.mlp(block.ln_2(x))
            else:
                x = x + block.attn(x, None, None, None)
                x = x + block.mlp(x)
        torch.testing.assert_close(model(one), model.lm_head(model.base_model.ln_f(x)))


def test_conversations_are_kept_as_they_are_where_few_answers_repeat() -> None:
    from minigpt.lens.experiments import _with_few_answers

    different = [conversation_of_pair(f"{i}", f"{i}") for i in range(300)]
    assert _with_few_answers(different) == different
    repeated = [conversation_of_pair(f"{i}", f"{i % 150}") for i in range(900)]
    kept: list[Conversation] = _with_few_answers(repeated)
    assert len({each.answer for each in kept}) == 100
    assert len(kept) == 600
