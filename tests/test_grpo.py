"""Learning from rewards: advantages, losses and sampling are right, and a resumed run is exact."""

import json
import math
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minigpt.data.batches import encode_conversation
from minigpt.data.chat_encoding import encode_chat_conversation
from minigpt.data.conversation import Conversation, Turn, conversation_of_pair
from minigpt.data.field_names import FieldNames
from minigpt.data.prompts import EncodedPrompts, encode_prompts, read_prompts
from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel, new_model
from minigpt.finetuning.grpo import GrpoOptions, group_advantages, token_losses, token_weights
from minigpt.finetuning.lora import LoraConfig, apply_lora, lora_layers
from minigpt.generation.options import GenerationOptions
from minigpt.model import GPTConfig
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.training.estimate import HELD, estimate, memory_needed
from minigpt.training.finetune_config import FinetuneConfig
from minigpt.training.grpo_loss import GrpoLoss, Rollout, Sampling
from minigpt.training.resolve import resolve
from minigpt.training.rewards import Rewards, make_rewards
from minigpt.training.run import finetune
from minigpt.weights.pretrained import save_pretrained
from tests.runs import metrics, stop_at, trainer

CPU = torch.device("cpu")
TOKENIZER = Tokenizer.from_word2id(build_vocabulary(["天地玄黄宇宙洪荒"]))
THINGS = "天地玄黄宇宙洪荒"


def tiny(seed: int, dropout: float = 0.0) -> LanguageModel:
    torch.manual_seed(seed)
    size = TOKENIZER.get_vocab_size()
    model = new_model(
        GPTConfig(vocab_size=size, n_layer=2, n_embd=32, n_head=2, block_size=16, dropout=dropout)
    )
    with torch.no_grad():
        for parameter in model.parameters():  # so that answers are neither certain nor equally likely
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def prompts(pairs: Sequence[tuple[str, str]]) -> EncodedPrompts:
    found = [conversation_of_pair(*pair, line=number) for number, pair in enumerate(pairs, 1)]
    return encode_prompts(found, TOKENIZER, 16, encode_conversation)


DATA = prompts([("天地", "玄"), ("宇", "宙洪荒"), ("黄", "天")])
PLAIN = GrpoOptions()
EXACT = make_rewards(["exact"])


def objective(
    model: LanguageModel, options: GrpoOptions = PLAIN, rewards: Rewards = EXACT, **values: Any
) -> GrpoLoss:
    generation = GenerationOptions(
        do_sample=True, max_new_tokens=5, temperature=values.pop("temperature", 1.0)
    )
    sampling = Sampling(4, generation, 3)
    train, val = values.pop("train", DATA), values.pop("val", DATA)
    return GrpoLoss(model, TOKENIZER, options, sampling, rewards, train, val, CPU, **values)


# -- prompts -----------------------------------------------------------------------------------------------


def test_a_prompt_is_a_conversation_up_to_its_last_answer() -> None:
    turns = [Turn("user", "天"), Turn("assistant", "地"), Turn("user", "玄"), Turn("assistant", "黄")]
    found = encode_prompts([Conversation((*turns,), 7)], TOKENIZER, 16, encode_conversation)
    (one,) = found.prompts
    assert TOKENIZER.decode(one.ids) == "天<sep>地<sep>玄<sep>"
    assert (one.question, one.answer, found.lines.tolist()) == ("玄", "黄", [7])
    assert found.is_answer.tolist() == [False] * 6 + [True, True]
    bpe = BpeTokenizer.train([], 300, special_tokens=["<s>", "</s>"]).with_chat_template(
        "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}"
    )
    found = encode_prompts([Conversation((*turns,), 7)], bpe, 100, encode_chat_conversation)
    assert bpe.decode(found.prompts[0].ids).endswith("user:玄</s><s>assistant:")


def test_an_answer_ends_as_in_the_chat_template() -> None:
    bpe = BpeTokenizer.train([], 300, special_tokens=["<s>", "</s>"]).with_chat_template(
        "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>\n{% endfor %}"
    )
    pairs = [conversation_of_pair("天", "地"), conversation_of_pair("玄", "黄宇", line=2)]
    data = encode_prompts(pairs, bpe, 100, encode_chat_conversation)
    (end,) = data.last_tokens()
    assert bpe.decode([end]) == "</s>"
    size = bpe.get_vocab_size()
    model = new_model(GPTConfig(vocab_size=size, n_layer=1, n_embd=16, n_head=2, block_size=64, dropout=0.0))
    sampling = Sampling(2, GenerationOptions(do_sample=True, max_new_tokens=5), 3)
    loss = GrpoLoss(model, bpe, PLAIN, sampling, EXACT, data, data, CPU)
    assert end in loss._ends
    assert bpe.encode_text("\n")[0] not in loss._ends


def test_a_record_may_lack_the_answer_and_its_fields_reach_the_reward(tmp_path: Path) -> None:
    records = [
        {"prompt": "天地", "size": 1, "answer": "玄"},
        {"prompt": "宇", "SIZE": 2},
        {"instruction": "黄", "input": "天", "answer": None, "size": 3},
        {"messages": [{"role": "user", "content": "地"}, {"role": "assistant", "content": "玄"},
                      {"role": "user", "content": "黄"}]},
        {"conversations": [{"from": "human", "value": "天"}, {"from": "gpt", "value": "地"}], "size": 5},
        {"prompt": [{"role": "system", "content": "洪"}, {"role": "user", "content": "荒"}], "size": 6},
        ["天", "地", "玄"],
        {"size": 8},
        "天地",
    ]  # fmt: skip
    path, function = tmp_path / "prompts.jsonl", tmp_path / "rewards.py"
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    found, report = read_prompts(path)
    assert [line for line, _ in report.skipped] == [8, 9]
    questions = ["天地", "宇", "黄\n天", "黄", "天", "洪\n荒", "玄"]
    assert [(one.question, one.answer) for one in found] == list(
        zip(questions, ["玄", "", "", "", "地", "", ""])
    )
    data = encode_prompts(found, TOKENIZER, 16, encode_conversation)
    assert TOKENIZER.decode(data.prompts[3].ids) == "地<sep>玄<sep>黄<sep>"
    assert data.last_tokens() == {TOKENIZER.sep_token_id}
    assert data.has_answers
    function.write_text("def big(completions, size):\n    return [float(one or -1) for one in size]\n")
    rewards = make_rewards([f"{function}:big"], fields=data.fields)
    fields = [one.fields for one in data.prompts]
    assert rewards([""] * 7, [""] * 7, [""] * 7, fields) == [1.0, -1.0, 3.0, -1.0, 5.0, 6.0, -1.0]
    with pytest.raises(InputError, match="big needs size; it is given completions, prompts, answers, by nam"):
        make_rewards([f"{function}:big"])
    table = tmp_path / "prompts.csv"
    table.write_text("问题,size\n天,4\n地,5\n", encoding="utf-8")
    (first, _), _ = read_prompts(table)
    assert (first.question, first.answer, json.loads(first.raw)["size"]) == ("天", "", "4")
    (first, _), _ = read_prompts(table, names=FieldNames("size", "none"))
    assert (first.question, first.answer) == ("4", "")
    # a template that marks answers: the prompt ends where an answer would begin
    bpe = BpeTokenizer.train([], 300, special_tokens=["<s>", "</s>"]).with_chat_template(
        "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}"
    )
    data = encode_prompts(found[1:2], bpe, 100, encode_chat_conversation)
    assert bpe.decode(data.prompts[0].ids) == "<s>user:宇</s><s>assistant:"
    assert not data.has_answers
    # without answers there is no exact match to speak of
    nothing = prompts([("天地", ""), ("宇", "")])
    loss = objective(tiny(1), rewards=make_rewards(["length"], length=3), train=nothing, val=nothing)
    (rollout,) = loss.sample(0, [nothing.batch(np.arange(2))])
    loss(*loss.select(rollout))
    measured = loss.evaluate(loss.model, nothing.in_order(2), CPU)
    numbers = {**measured.metrics(), **loss.step_metrics(loss.step_sums().tolist())}
    assert numbers["val_reward"] > 0
    assert not [name for name in numbers if "exact" in name]
    assert "exact" not in measured.shown()


def test_what_is_too_long_is_left_out() -> None:
    pairs = [conversation_of_pair("天" * 9, "地" * 9), conversation_of_pair("天", "地", line=2)]
    found = encode_prompts(pairs, TOKENIZER, 10, encode_conversation)
    assert (found.lines.tolist(), found.n_cut) == ([2], 1)
    with pytest.raises(InputError, match="every prompt is longer than max_length=3; raise --max_length"):
        encode_prompts(pairs[:1], TOKENIZER, 3, encode_conversation)


# -- advantages and losses, by hand ------------------------------------------------------------------------


def test_advantages() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 4.0]])
    found = group_advantages(rewards)
    # deviations 0.5: the variance is 4 * 0.25 / 3; deviations 1, 1, 1, 3: it is 12 / 3
    high, low, last = 0.5 / (math.sqrt(1 / 3) + 1e-4), -1 / (2 + 1e-4), 3 / (2 + 1e-4)
    expected = torch.tensor([[high, -high, -high, high], [0.0] * 4, [low, low, low, last]])
    torch.testing.assert_close(found, expected)
    plain = group_advantages(rewards, "none")
    torch.testing.assert_close(plain[2], torch.tensor([-1.0, -1.0, -1.0, 3.0]))


def test_the_rewards_of_a_step_share_a_deviation() -> None:
    groups = [DATA.batch(np.array([0, 1])), DATA.batch(np.array([2]))]
    options, length = GrpoOptions(scale_rewards="batch"), make_rewards(["length"], length=3)
    loss = objective(tiny(1), options, length, num_iterations=2)
    plain = objective(tiny(1), GrpoOptions(scale_rewards="none"), length)
    centred = torch.cat([one.advantages for one in plain.sample(0, groups)])
    texts = [TOKENIZER.decode(one.ids) for one in plain.answers(0, [0, 1, 2])]
    rewards = torch.tensor(length(texts, texts, texts), dtype=torch.float64)
    assert len({*rewards.view(3, 4).std(1).tolist()}) > 1, "the groups differ, so that the deviation matters"
    expected = centred / (rewards.std().float() + 1e-4)
    for step in (0, 1):  # the second step uses the same answers: they are not divided again
        loss.sample(step, groups)
        found = torch.cat([one.advantages for one in loss.sampled_together(list)])
        torch.testing.assert_close(found, expected)
    again = objective(tiny(1), options, length, num_iterations=2)
    again.load_state(loss.state())
    again.sample(1, groups)
    assert torch.equal(torch.cat([one.advantages for one in again.sampled_together(list)]), found)
    # two processes: each has its part of the answers, and the sums of both
    halves = [objective(tiny(1), options, length) for _ in groups]
    for half, group in zip(halves, groups):
        half.sample(0, [group])
    own = list[list[float]]()

    def noted(values: list[float]) -> list[float]:
        own.append(values)
        return values

    for half in halves:
        half.sampled_together(noted)
    sums = [sum(pair) for pair in zip(*own)]
    for half, group in zip(halves, groups):
        half._kept = None
        half.sample(0, [group])
    parts = [one.advantages for half in halves for one in half.sampled_together(lambda _: sums)]
    torch.testing.assert_close(torch.cat(parts), expected)


def test_the_loss_of_a_token_is_clipped_where_it_would_gain() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1])
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0])
    old = torch.full((5,), -1.0)
    logps = (old + ratio.log()).requires_grad_()
    found = token_losses(logps, old, None, advantage, GrpoOptions(epsilon=0.2, epsilon_high=0.3))
    torch.testing.assert_close(found.loss, torch.tensor([-2.6, 3.0, -1.0, 1.6, -2.2]))
    assert found.is_high.tolist() == [True, False, False, False, False]
    assert found.is_low.tolist() == [False, False, False, True, False]
    found.loss.sum().backward()  # type: ignore[no-untyped-call]
    # the derivative of -r A is -r A; a clipped token has none
    assert logps.grad is not None
    torch.testing.assert_close(logps.grad, torch.tensor([0.0, 3.0, -1.0, 0.0, -2.2]))


@pytest.mark.parametrize("corrected", [True, False])
def test_kl_is_estimated_from_the_sampled_token(corrected: bool) -> None:
    logps = torch.tensor([0.25, 0.5]).log().requires_grad_()
    reference, old = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.2, 0.5]).log()
    options = GrpoOptions(beta=0.1, epsilon=9.0, epsilon_high=9.0, use_bias_correction_kl=corrected)
    found = token_losses(logps, old, reference, torch.zeros(2), options)
    # 2 - ln 2 - 1, times 0.25 / 0.2
    kl = (1 - math.log(2)) * (1.25 if corrected else 1.0)
    torch.testing.assert_close(found.kl, torch.tensor([kl, 0.0]))
    torch.testing.assert_close(found.loss, 0.1 * found.kl)
    found.kl[0].backward()  # type: ignore[no-untyped-call]
    # d(exp(g) - g - 1) / dlogp = 1 - exp(g); corrected: the ratio's own derivative is added
    slope = 1.25 * (1 - 2) + kl if corrected else 1.0 - 2.0
    assert logps.grad is not None
    assert logps.grad[0].item() == pytest.approx(slope, rel=1e-5)


def test_the_weights_of_tokens() -> None:
    lengths = torch.tensor([2, 4, 0])
    assert token_weights(lengths, GrpoOptions()).tolist() == [1.0, 1.0, 1.0]
    assert token_weights(lengths, GrpoOptions(loss_type="grpo")).tolist() == [0.5, 0.25, 1.0]
    torch.testing.assert_close(token_weights(lengths, GrpoOptions(loss_type="bnpo")), torch.full((3,), 1 / 6))
    dr = GrpoOptions(loss_type="dr_grpo", max_completion_length=8)
    assert token_weights(lengths, dr).tolist() == [0.125] * 3


def by_hand(
    model: LanguageModel, reference: LanguageModel, rollout: Rollout, options: GrpoOptions, temperature: float
) -> Tensor:
    """Compute the mean loss from the formulas, one answer at a time, in float64."""
    answers, place = [], 0
    for row in range(len(rollout.input_ids)):
        ids, mask = rollout.input_ids[row : row + 1], rollout.answer_mask[row]
        tables = [(one(ids)[0].double() / temperature).log_softmax(-1) for one in (model, reference)]
        terms = []
        for t in mask.nonzero().flatten().tolist():
            p, q = (table[t, rollout.targets[row, t]].exp() for table in tables)
            before = p.detach() if rollout.old is None else rollout.old[place].double().exp()
            ratio, a = p / before, rollout.advantages[row].double()
            clipped = torch.clamp(ratio, 1 - options.epsilon, 1 + options.epsilon_high)
            kl = (q / p - torch.log(q / p) - 1) * (ratio if options.use_bias_correction_kl else 1)
            terms.append(-torch.minimum(ratio * a, clipped * a) + options.beta * kl)
            place += 1
        answers.append(torch.stack(terms))
    if options.loss_type == "grpo":
        return torch.stack([one.mean() for one in answers]).mean()
    total = torch.cat(answers).sum()
    tokens = sum(map(len, answers))
    return total / (
        tokens if options.loss_type in ("dapo", "bnpo") else len(answers) * options.max_completion_length
    )


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        GrpoOptions(),
        GrpoOptions(beta=0.3, loss_type="grpo"),
        GrpoOptions(loss_type="bnpo"),
        GrpoOptions(beta=0.3, loss_type="dr_grpo", max_completion_length=5, use_bias_correction_kl=False),
    ],
    ids=lambda options: options.loss_type,
)
def test_loss_and_gradients_are_the_formulas(options: GrpoOptions, iterations: int) -> None:
    model = tiny(1)
    length = make_rewards(["length"], length=3)
    loss = objective(model, options, length, num_iterations=iterations, temperature=0.7)
    (rollout,) = loss.sample(0, [DATA.batch(np.arange(3))])
    moved = tiny(1)
    if iterations > 1:  # the weights have moved since the answers were sampled
        with torch.no_grad():
            for one, other in zip(moved.parameters(), tiny(2).parameters()):
                one.lerp_(other, 0.3)
        model.load_state_dict(moved.state_dict())
    assert (rollout.old is None) == (iterations == 1)
    found = loss(*loss.select(rollout)) / loss.count(rollout)
    found.backward()
    exact = moved.double().eval()
    expected = by_hand(exact, tiny(1).double().eval(), rollout, options, 0.7)
    expected.backward()  # type: ignore[no-untyped-call]
    assert rollout.advantages.abs().max() > 0.1
    # float32: probabilities to six digits
    assert found.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    wanted = dict(exact.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = wanted[name].grad
        assert parameter.grad is not None
        assert gradient is not None
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(parameter.grad.double(), gradient, rtol=1e-4, atol=1e-5 * scale)


def test_parts_of_a_batch_add_up_and_a_blank_one_adds_nothing() -> None:
    options = GrpoOptions(beta=0.2)
    loss = objective(tiny(1), options, make_rewards(["length"], length=3))
    batch = DATA.batch(np.array([2, 0, 1]))
    (rollout,) = loss.sample(0, [batch])
    whole = loss(*loss.select(rollout))
    halves = objective(tiny(1), options, make_rewards(["length"], length=3))
    parts = halves.sample(0, [batch.some(slice(first, None, 2)) for first in (0, 1)])
    assert sum(map(halves.count, parts)) == loss.count(rollout)
    torch.testing.assert_close(sum(halves(*halves.select(part)) for part in parts), whole)
    sums = loss.step_sums()
    torch.testing.assert_close(halves.step_sums(), sums)
    (nothing,) = loss.sample(1, [batch.blank()])
    found = loss(*loss.select(nothing))
    loss.model.zero_grad()
    found.backward()
    assert (found.item(), loss.count(nothing)) == (0.0, 0)
    assert not any(p.grad is not None and p.grad.any() for p in loss.model.parameters())
    assert not loss.step_sums().any()


# -- sampling ----------------------------------------------------------------------------------------------


def test_answers_depend_on_step_prompt_and_number_alone() -> None:
    loss = objective(tiny(1))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    found = [one.chosen for one in loss.answers(5, [0, 1, 2])]
    assert torch.equal(torch.get_rng_state(), before), "dropout's numbers are not used up"
    assert [one.chosen for one in objective(tiny(1)).answers(5, [2, 0])] == [*found[8:], *found[:4]]
    assert [one.chosen for one in loss.answers(6, [0, 1, 2])] != found
    assert len({tuple(ids) for ids in found}) > 4, "the answers of a group differ"


def test_numbers_of_a_step() -> None:
    loss = objective(tiny(1), GrpoOptions(beta=0.2), make_rewards(["length"], length=3))
    (rollout,) = loss.sample(4, [DATA.batch(np.arange(3))])
    loss(*loss.select(rollout))
    answers = loss.answers(4, [0, 1, 2])
    texts = [TOKENIZER.decode(one.ids) for one in answers]
    rewards = np.array([max(0.0, 1 - abs(len(text) - 3) / 3) for text in texts]).reshape(3, 4)
    found = loss.step_metrics(loss.step_sums().tolist())
    assert found["reward"] == pytest.approx(rewards.mean())
    assert found["reward_std"] == pytest.approx(rewards.std(1, ddof=1).mean())
    assert found["frac_reward_zero_std"] == np.mean([len({*row}) == 1 for row in rewards])
    wanted = [one.answer for one in DATA.prompts for _ in range(4)]
    assert found["exact_match"] == np.mean([a == b for a, b in zip(texts, wanted)])
    assert found["completions/mean_length"] == pytest.approx(np.mean([len(one.chosen) for one in answers]))
    assert found["completions/clipped_ratio"] == np.mean([one.ending is None for one in answers])
    assert found["kl"] == pytest.approx(0.0, abs=1e-6)
    assert found["clip_ratio/region_mean"] == 0.0


def test_answers_that_were_cut_off_can_be_left_out() -> None:
    loss = objective(tiny(1))
    loss.sampling = loss.sampling._replace(mask_truncated_completions=True)
    (rollout,) = loss.sample(0, [DATA.batch(np.arange(3))])
    is_cut = [one.ending is None for one in loss.answers(0, [0, 1, 2])]
    assert True in is_cut
    assert False in is_cut
    assert (~rollout.answer_mask.any(1)).tolist() == is_cut


def test_an_evaluation_takes_the_most_likely_answers() -> None:
    loss = objective(tiny(1), rewards=make_rewards(["length", "exact"], [1.0, 2.0], length=3))
    report = loss.evaluate(loss.model, DATA.in_order(2), CPU)
    reward = exact = 0.0
    for one in DATA.prompts:
        ids: list[int] = []
        while len(ids) < 5 and TOKENIZER.sep_token_id not in ids:
            ids.append(int(loss.model(torch.tensor([[*one.ids, *ids]]))[0, -1].argmax()))
        text = TOKENIZER.decode([token for token in ids if token != TOKENIZER.sep_token_id])
        exact += text == one.answer
        reward += max(0.0, 1 - abs(len(text) - 3) / 3) + 2 * (text == one.answer)
    found = report.metrics()
    assert found["val_reward"] == -found["val_loss"] == pytest.approx(reward / 3)
    assert found["val_exact_match"] == pytest.approx(exact / 3)


def test_the_reference_of_an_adapter_is_the_model_without_it() -> None:
    model = tiny(1)
    apply_lora(model, LoraConfig(r=2))
    loss = objective(model, GrpoOptions(beta=0.5))
    batch = DATA.batch(np.arange(3))
    (first,) = loss.sample(0, [batch])
    with torch.no_grad():
        for _, layer in lora_layers(model):
            for parameter in layer.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3)
    plain = objective(tiny(1), GrpoOptions(beta=0.5))
    assert first.reference is not None
    torch.testing.assert_close(first.reference, plain._logps(plain.model, first))
    (later,) = loss.sample(1, [batch])
    assert later.reference is not None
    torch.testing.assert_close(later.reference, plain._logps(plain.model, later))
    assert (loss._logps(model, later) - later.reference).abs().max() > 0.01


# -- rewards -----------------------------------------------------------------------------------------------


def test_built_in_rewards() -> None:
    def scored(name: str, *texts: str, **values: Any) -> list[float]:
        return make_rewards([name], **values)(texts, ["?"] * len(texts), ["12"] * len(texts))

    assert scored("exact", "12", " 12\n", "112") == [1.0, 1.0, 0.0]
    assert scored("regex", "12", "1 2", regex=r"\d+") == [1.0, 0.0]
    assert scored("json", '{"a": [1]}', "{a: 1}") == [1.0, 0.0]
    assert scored("length", "1234", "12", "123456", "1" * 9, length=4) == [1.0, 0.5, 0.5, 0.0]
    both = make_rewards(["exact", "length"], [2.0, 0.5], length=4)
    assert both(["12", "1234"], ["", ""], ["12", "12"]) == [2.25, 0.5]


def test_a_function_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rewards.py"
    path.write_text(
        "def short(completions):\n    return [-len(text) for text in completions]\n"
        "def all(prompts, completions, answers, **more):\n"
        "    return [p + c == a for p, c, a in zip(prompts, completions, answers)]\n"
    )
    assert make_rewards([f"{path}:short"])(["a", "bb"], ["", ""], ["", ""]) == [-1.0, -2.0]
    assert make_rewards([f"{path}:all"])(["b", "b"], ["a", "b"], ["ab", "ab"]) == [1.0, 0.0]


BAD = {
    "exits": ("def reward(completions): raise SystemExit(3)", "raised SystemExit: 3"),
    "file exits": ("raise SystemExit(3)", "cannot be run: SystemExit: 3"),
    "yields": ("def reward(completions): yield 1 / 0", "raised ZeroDivisionError: division by zero"),
    "in C": ("reward = max", "reward does not say its arguments: write a function"),
    "integer": ("def reward(completions): return [10 ** 400] * 2", "must return finite numbers: got 1000"),
    "object": (
        "class A:\n    def __float__(self): return 1 / 0\n    __repr__ = __float__\n"
        "def reward(completions): return [A()] * 2",
        "must return finite numbers: got a A for the completion",
    ),
    "missing": ("def other(): pass", "has no function reward"),
    "syntax": ("def reward(:", "cannot be run: SyntaxError"),
    "argument": ("def reward(images): return []", "reward needs images; it is given completions, prompts, a"),
    "raises": ("def reward(completions): return [1 / 0]", "raised ZeroDivisionError: division by zero"),
    "nan": ("def reward(completions): return [float('nan')] * 2", "must return finite numbers: got nan for"),
    "none": ("def reward(completions): return [None] * 2", "must return finite numbers: got None for the"),
    "string": (
        "def reward(completions): return ['good'] * 2",
        "finite numbers: got 'good' for the completio",
    ),
    "text": ("def reward(completions): return 'good'", "must return a list of numbers: got 'good'"),
    "number": ("def reward(completions): return 1.0", "must return a list of numbers: got 1.0"),
    "fewer": ("def reward(completions): return [1.0]", "number for each of 2 completions: got 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_reward_is_one_line(name: str, tmp_path: Path) -> None:
    text, message = BAD[name]
    path = tmp_path / "file.py"
    path.write_text(text)
    with pytest.raises(InputError) as found:
        make_rewards([f"{path}:reward"])(["a", "b"], ["", ""], ["", ""])
    assert message in str(found.value)
    assert f"--reward {path}:reward" in str(found.value)
    assert "\n" not in str(found.value)


def test_names_of_rewards(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"known are exact, regex, length, json, and FILE\.py:FUNCTION"):
        make_rewards(["exakt"])
    with pytest.raises(InputError, match="there is no file"):
        make_rewards([f"{tmp_path / 'none.py'}:reward"])
    with pytest.raises(InputError, match="is no regular expression"):
        make_rewards(["regex"], regex="(")
    with pytest.raises(InputError, match="--reward_weights needs a number for each reward: got 1, 2"):
        make_rewards(["exact", "json"], [1.0])
    with pytest.raises(InputError, match="--reward_weights must be finite numbers: got nan"):
        make_rewards(["exact"], [math.nan])
    with pytest.raises(InputError, match=r"gave 1e\+39 for the completion '1': rewards must be from -1e\+30"):
        make_rewards(["exact"], [1e39])(["1"], [""], ["1"])  # infinite in float32


def test_large_rewards_are_compared_in_float64() -> None:
    def far(completions: Sequence[str], *_: object) -> list[float]:
        return [1e25 * len(text) for text in completions]  # the square is infinite in float32

    loss = objective(tiny(3), rewards=Rewards([far], [1.0]))
    (rollout,) = loss.sample(0, [DATA.batch(np.arange(3))])
    assert rollout.advantages.isfinite().all()
    assert rollout.advantages.abs().max() > 0.1


# -- runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model, prompts for training and validation, and a file of rewards."""
    folder = tmp_path_factory.mktemp("grpo")
    save_pretrained(tiny(3, dropout=0.1), folder / "base", TOKENIZER)
    pairs = [{"question": a + b, "answer": a} for a in THINGS for b in THINGS]
    for name, part in (("train", pairs[8:]), ("val", pairs[:8])):
        lines = "".join(json.dumps(pair) + "\n" for pair in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (folder / "rewards.py").write_text(
        "import pathlib\n"
        "def first(completions, prompts):\n"
        "    return [float(c[:1] == p[0]) for c, p in zip(completions, prompts)]\n"
        "def failing(completions, prompts):\n"
        "    flag = pathlib.Path(__file__).with_name('flag')\n"
        "    if flag.exists() and len(completions) == 16:  # the answers of a step; an evaluation has 8\n"
        "        calls = int(flag.read_text())\n"
        "        flag.write_text(str(calls - 1))\n"
        "        assert calls, 'no more'\n"
        "    return first(completions, prompts)\n"
    )
    return folder


def options(folder: Path, output: str, **values: Any) -> dict[str, Any]:
    return {
        "task": "grpo", "model": folder / "base", "output": folder / output, "learning_rate": 3e-3,
        "train_data": folder / "train.jsonl", "val_data": folder / "val.jsonl", "batch_size": 4,
        "max_steps": 8, "eval_steps": 4, "logging_steps": 2, "threads": 1, "device": "cpu", "seed": 5,
        "precision": "float32", "report_to": "none", "warmup_steps": 0, "num_generations": 4,
        "max_completion_length": 4, "reward": (f"{folder / 'rewards.py'}:first",), **values,
    }  # fmt: skip


METHODS: dict[str, dict[str, Any]] = {
    "full": {"beta": 0.1},
    "freeze": {
        "method": "freeze",
        "train_only": "last:1",
        "gradient_accumulation_steps": 2,
        "loss_type": "bnpo",
    },
    "lora": {"method": "lora", "lora_dropout": 0.1, "beta": 0.1, "learning_rate": 1e-2},
    "iterations": {"num_iterations": 3, "beta": 0.1, "loss_type": "grpo", "scale_rewards": "batch"},
}


def same_end(a: Path, b: Path) -> None:
    assert metrics(a) == metrics(b)
    names = sorted(path.name for path in (a / "last").glob("*.safetensors"))
    assert len(names) == 3
    for name in names:
        left, right = load_file(a / "last" / name), load_file(b / "last" / name)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left), name


@pytest.mark.parametrize("name", METHODS)
def test_a_run_learns_and_resumes_to_the_same_bits(folder: Path, name: str) -> None:
    straight = options(folder, f"straight-{name}", **METHODS[name])
    result = finetune(**straight)
    lines = metrics(straight["output"])
    steps = [line for line in lines if "train_loss" in line]
    assert [line["step"] for line in steps] == [2, 4, 6, 8]
    assert {"reward", "reward_std", "exact_match", "completions/mean_length"} <= set(steps[0])
    assert ("kl" in steps[0]) == ("beta" in METHODS[name])
    evaluations = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 4, 8]
    assert result["val_reward"] == max(line["val_reward"] for line in evaluations)
    if name == "full":
        assert steps[-1]["kl"] > 0
    if name == "iterations":
        assert [line["epoch"] for line in steps] == pytest.approx([n / 3 / 14 for n in (2, 4, 6, 8)])

    stop_at(
        trainer(resolve(options(folder, f"stopped-{name}", **METHODS[name]), FinetuneConfig)),
        5,
        signal.SIGTERM,
    )
    finetune(output=folder / f"stopped-{name}", resume=True)
    same_end(folder / f"stopped-{name}", straight["output"])


def test_rewards_rise(folder: Path) -> None:
    values = {
        "batch_size": 14,
        "num_generations": 8,
        "max_steps": 30,
        "learning_rate": 1e-2,
        "eval_steps": 30,
    }
    finetune(**options(folder, "rising", **values))
    rewards = [line["reward"] for line in metrics(folder / "rising") if "reward" in line]
    # the first answer character is right in about one of twelve cases at the start
    assert rewards[0] < 0.3
    assert rewards[-1] > rewards[0] + 0.3


def test_a_reward_that_fails_later_loses_nothing(folder: Path) -> None:
    reward = (f"{folder / 'rewards.py'}:failing",)
    finetune(**options(folder, "undisturbed", reward=reward))
    flag = folder / "flag"
    flag.write_text("5")
    with pytest.raises(InputError) as found:
        finetune(**options(folder, "failed", reward=reward))
    said = str(found.value)
    assert f"{reward[0]} raised AssertionError: no more; step 5 is saved in" in said
    assert "\n" not in said
    assert json.loads((folder / "failed" / "last" / "training_state.json").read_text())["steps_done"] == 5
    flag.unlink()
    finetune(output=folder / "failed", resume=True)
    same_end(folder / "failed", folder / "undisturbed")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss_type": "ipo"}, "--task grpo has the loss types dapo, grpo, bnpo, dr_grpo: got ipo"),
        (
            {"task": "dpo", "loss_type": "dapo"},
            "--task dpo has the loss types sigmoid, ipo, simpo, orpo: got",
        ),
        ({"task": "sft", "num_generations": 4}, "--num_generations belongs to --task grpo: got --task sft"),
        ({"num_generations": 1}, "num_generations must be from 2"),
        ({"reward": ("regex",)}, "--reward regex needs --reward_regex, and only it has that"),
        ({"reward_length": 4}, "--reward length needs --reward_length, and only it has that"),
        ({"parallel": "fsdp"}, "does not go with parallel=fsdp"),
        ({"compile": True}, "does not go with --compile"),
        ({"loss_on": "all"}, "leave --loss_on at answer"),
        ({"simpo_gamma": 1.0}, "--simpo_gamma belongs to --task dpo"),
    ],
)
def test_options_that_do_not_go_together(folder: Path, values: dict[str, Any], message: str) -> None:
    given = options(folder, "none", **values)
    if values.get("task"):
        given = {k: v for k, v in given.items() if k not in ("reward", "max_completion_length")}
        given = {**{k: v for k, v in given.items() if k != "num_generations"}, **values}
    with pytest.raises(InputError, match=message):
        resolve(given, FinetuneConfig)


def test_a_recipe_brings_its_task(folder: Path, tmp_path: Path) -> None:
    given = {key: value for key, value in options(folder, "none").items() if key != "task"}
    config = resolve({**given, "recipe": "grpo"}, FinetuneConfig)
    assert isinstance(config, FinetuneConfig)
    assert (config.task, config.loss_type, config.beta) == ("grpo", "dapo", 0.0)
    with pytest.raises(InputError, match="recipe grpo is for --task grpo: got --task dpo"):
        resolve({**given, "recipe": "grpo", "task": "dpo"}, FinetuneConfig)
    with pytest.raises(
        InputError, match="recipe grpo is for minigpt finetune --task grpo, not for minigpt t"
    ):
        resolve({"recipe": "grpo", "train_data": folder / "train.jsonl"})
    mine = tmp_path / "mine.toml"
    for text in ('base = "grpo"\nbeta = 0.2\n', 'task = "grpo"\nbeta = 0.2\nmax_length = 16\n'):
        mine.write_text(text)
        config = resolve({**given, "recipe": str(mine)}, FinetuneConfig)
        assert isinstance(config, FinetuneConfig)
        assert (config.task, config.loss_type, config.beta) == ("grpo", "dapo", 0.2)
    mine.write_text('base = "classification"\n')
    with pytest.raises(InputError, match="is for --task classification: got --task grpo"):
        resolve({**options(folder, "none"), "recipe": str(mine)}, FinetuneConfig)


def test_an_estimate_counts_the_answers_and_changes_nothing(folder: Path) -> None:
    given = options(folder, "estimated", beta=0.1, num_iterations=2)
    run = trainer(resolve(given, FinetuneConfig))
    before = torch.get_rng_state()
    few = estimate(run)
    assert torch.equal(torch.get_rng_state(), before)
    # the answers that the model writes now, to the prompts of the first step
    (ids, targets, *_), *_ = run.step.prepare(0).mine
    assert ids is not None
    assert targets is not None
    assert few.tokens_per_step == ids.numel()
    many = trainer(resolve({**given, "num_generations": 40}, FinetuneConfig))
    # memory: for the longest answers that are possible, not for those of the file
    assert [one.step.loss.sampled_shape([0, 1]) for one in (run, many)] == [(8, 3 + 4), (80, 3 + 4)]
    longer = trainer(resolve({**given, "max_completion_length": 12}, FinetuneConfig))
    assert longer.step.loss.sampled_shape([0]) == (4, 3 + 12)
    needed = [memory_needed(one) for one in (run, longer, many)]
    assert needed == sorted({*needed})
    assert estimate(many).tokens_per_step > 5 * few.tokens_per_step  # the widths may differ
    assert finetune(**{**given, "dry_run": True})["steps"] == 8
    assert not (folder / "estimated").exists()
    # The reference is a second model in memory. With an adapter, it is the model without the adapter.
    weights = sum(one.nbytes for one in run.model.parameters())
    for method, copies in (("full", 1), ("lora", 0)):
        memory = [
            memory_needed(trainer(resolve({**given, "beta": beta, "method": method}, FinetuneConfig)))
            for beta in (0.1, 0.0)
        ]
        assert memory[0] - memory[1] == pytest.approx(HELD * copies * weights, abs=2)  # rounded to bytes
