"""Preferences: pairs are read and encoded correctly, and the losses are those of the papers."""

import json
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minigpt.data.batches import encode_conversation
from minigpt.data.chat_encoding import encode_chat_conversation
from minigpt.data.field_names import FieldNames
from minigpt.data.json_values import BadLine
from minigpt.data.preferences import (
    EncodedPreferences,
    PairBatch,
    encode_preferences,
    preference_of,
    read_preferences,
    split_preferences,
)
from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel, new_model
from minigpt.model import GPTConfig
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.training.finetune_config import FinetuneConfig
from minigpt.training.loop import Trainer
from minigpt.training.preference_loss import PreferenceLoss, PreferenceOptions
from minigpt.training.resolve import resolve
from minigpt.training.run import finetune
from minigpt.training.run_data import read_data
from minigpt.weights.pretrained import save_pretrained
from tests.runs import metrics, stop_at, trainer

CPU = torch.device("cpu")
TOKENIZER = Tokenizer.from_word2id(build_vocabulary(["天地玄黄宇宙洪荒日月盈昃系统"]))
SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "preferences"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# -- records -----------------------------------------------------------------------------------------------

ASKED = [("user", "天地")]


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": "天地", "chosen": "玄", "rejected": "黄"}, ASKED),
        ({"问题": "天地", "优选": "玄", "劣选": "黄"}, ASKED),
        ({"question": "天地", "answers": ["玄", "黄"]}, ASKED),
        ({"instruction": "天地", "output": ["玄", "黄"]}, ASKED),
        ({"instruction": "天地", "input": "日", "chosen": "玄", "rejected": "黄"}, [("user", "天地\n日")]),
        ({"instruction": "天地", "input": "", "chosen": "玄", "rejected": "黄"}, ASKED),
        ({"prompt": [user("天地")], "chosen": [assistant("玄")], "rejected": [assistant("黄")]}, ASKED),
        ({"chosen": [user("天地"), assistant("玄")], "rejected": [user("天地"), assistant("黄")]}, ASKED),
        (
            {
                "prompt": "天地",
                "messages": [user("天地"), assistant("玄")],
                "chosen": [user("天地"), assistant("玄")],
                "rejected": [user("天地"), assistant("黄")],
            },
            ASKED,
        ),
        (
            {
                "conversations": [{"from": "system", "value": "系"}, {"from": "human", "value": "天地"}],
                "chosen": {"from": "gpt", "value": "玄"},
                "rejected": {"from": "gpt", "value": "黄"},
            },
            [("system", "系"), *ASKED],
        ),
        (
            {"system": "系", "history": [["日", "月"]], "prompt": "天地", "chosen": "玄", "rejected": "黄"},
            [("system", "系"), ("user", "日"), ("assistant", "月"), *ASKED],
        ),
        (
            {"chosen": "\n\nHuman: 天地\n\nAssistant: 玄", "rejected": "\n\nHuman: 天地\n\nAssistant: 黄"},
            ASKED,
        ),
    ],
)
def test_a_pair_in_each_usual_shape(record: dict[str, Any], prompt: list[tuple[str, str]]) -> None:
    pair = preference_of(record)
    assert [*map(tuple, pair.chosen.turns)] == [*prompt, ("assistant", "玄")]
    assert [*map(tuple, pair.rejected.turns)] == [*prompt, ("assistant", "黄")]
    assert pair.prompt == len(prompt)


def test_answers_that_begin_alike_count_from_their_beginning() -> None:
    first = [user("天"), assistant("地"), user("玄")]
    pair = preference_of({"chosen": [*first, assistant("黄")], "rejected": [*first, assistant("宇")]})
    assert pair.prompt == 3
    # The first answers are equal, but they are answers. So the prompt is the first turn alone.
    short = preference_of({"chosen": first[:2], "rejected": [*first, assistant("宇")]})
    assert short.prompt == 1


def test_numbers_are_answers() -> None:
    pair = preference_of({"prompt": "1+1?", "chosen": 2, "rejected": 2.5})
    assert [one.turns[-1].content for one in (pair.chosen, pair.rejected)] == ["2", "2.5"]


def test_a_plain_text_holds_no_pairs(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("天地玄黄。\n" * 9, encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.txt is plain text, no pairs of answers; known are "):
        read_preferences(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "天", "chosen": "地", "rejected": " 地"}, "chosen equals rejected"),
        ({"prompt": "天", "chosen": " ", "rejected": "地"}, "`chosen` is empty"),
        ({"prompt": "天", "chosen": [], "rejected": "地"}, "`chosen` is neither text nor a list of turns"),
        ({"prompt": "天", "chosen": "地"}, "`rejected` is missing"),
        ({"prompt": "天", "answer": "地"}, "`chosen` is missing"),
        ({"prompt": "", "chosen": "地", "rejected": "玄"}, "`prompt` is empty"),
        ({"chosen": "地", "rejected": "玄"}, "`question` is missing"),
        ({"chosen": [assistant("地")], "rejected": [assistant("玄")]}, "`question` is missing"),
        (
            {"chosen": [user("日"), assistant("地")], "rejected": [user("月"), assistant("地")]},
            "`chosen` does",
        ),
        (["天"], "not an object"),
        ({"text": "天", "chosen": "地", "rejected": "玄"}, "the prompt is missing"),
        ({"messages": [assistant("天")], "chosen": "地", "rejected": "玄"}, "the prompt is missing"),
    ],
)
def test_what_is_no_pair(record: Any, reason: str) -> None:
    with pytest.raises(BadLine) as found:
        preference_of(record)
    assert found.value.reason.startswith(reason)


def written(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    return path


GOOD = {"prompt": "天", "chosen": "地", "rejected": "玄"}


def test_bad_pairs_are_left_out_with_one_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same, empty = {**GOOD, "rejected": "地"}, {**GOOD, "chosen": ""}
    path = written(tmp_path / "pairs.jsonl", [same, GOOD, empty, same])
    pairs, report = read_preferences(path)
    assert [pair.line for pair in pairs] == [2]
    report.print_summary()
    said = " ".join(capsys.readouterr().err.split())
    assert "skipped 2: chosen equals rejected (line 1, 4" in said
    assert "skipped 1: `chosen` is empty (line 3" in said
    with pytest.raises(InputError, match=r"pairs.jsonl:1: chosen equals rejected"):
        read_preferences(path, strict=True)
    with pytest.raises(
        InputError, match=r"no pair.*: chosen equals rejected \(1 record, first: line 1\)\. Known"
    ):
        read_preferences(written(tmp_path / "same.jsonl", [same]))


def test_a_table_and_fields_with_names_of_their_own(tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    table.write_text("Prompt,Chosen,Rejected\n天,地,玄\n日,月,3\n", encoding="utf-8")
    pairs, _ = read_preferences(table)
    assert [(pair.chosen.answer, pair.rejected.answer) for pair in pairs] == [("地", "玄"), ("月", "3")]
    own = written(tmp_path / "own.jsonl", [{"x": "天", "y": "地", "rejected": "玄"}])
    (pair,), _ = read_preferences(own, names=FieldNames("x", "y"))
    assert (pair.chosen.question, pair.chosen.answer, pair.rejected.answer) == ("天", "地", "玄")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the test data beside the project are not there")
@pytest.mark.parametrize(("name", "count"), [("dpo_zh_demo", 283), ("dpo_en_demo", 294)])
def test_files_of_others(name: str, count: int) -> None:
    pairs, report = read_preferences(SHARED / f"{name}.jsonl")
    assert (len(pairs), report.skipped) == (count, [])


def test_pairs_of_one_prompt_go_to_one_side() -> None:
    pairs = [
        preference_of({"prompt": f"{number % 10}", "chosen": f"a{number}", "rejected": "b"}, line=number)
        for number in range(40)
    ]
    train, val = split_preferences(pairs, 0.8, 1)
    prompts = [{pair.chosen.question for pair in part} for part in (train, val)]
    assert not prompts[0] & prompts[1]
    assert sorted(pair.line for pair in (*train, *val)) == [*range(40)]
    assert len(val) == 8  # two of ten prompts


# -- encoding ----------------------------------------------------------------------------------------------

LONG: dict[str, Any] = {
    "prompt": [user("天天天天"), assistant("地地地地"), user("玄")],
    "chosen": [assistant("黄")],
    "rejected": [assistant("宇宙洪荒")],
}


def encoded(records: list[dict[str, Any]], max_length: int = 64) -> EncodedPreferences:
    pairs = [preference_of(record, line=number) for number, record in enumerate(records, 1)]
    return encode_preferences(pairs, TOKENIZER, max_length, encode_conversation)


def rows_of(batch: PairBatch) -> list[tuple[str, str]]:
    """Return the text of each row, and the part of it that counts. <sep> is written as |."""
    ids = torch.cat([batch.input_ids[:, :1], batch.targets], 1)
    shown = []
    for row, real, counts in zip(ids, batch.token_mask, batch.answer_mask):
        texts = [TOKENIZER.decode([int(i)]).replace("<sep>", "|") for i in row]
        kept = [texts[0], *(text for text, one in zip(texts[1:], real) if one)]
        shown.append(("".join(kept), "".join(text for text, one in zip(texts[1:], counts) if one)))
    return shown


def test_only_what_follows_the_prompt_counts() -> None:
    chosen, rejected = rows_of(encoded([LONG]).batch(np.array([0])))
    assert chosen == ("天天天天|地地地地|玄|黄|", "黄|")
    assert rejected == ("天天天天|地地地地|玄|宇宙洪荒|", "宇宙洪荒|")


def test_both_answers_of_a_pair_keep_the_same_prompt() -> None:
    # 15 tokens for the chosen conversation, 18 for the rejected one
    cut = encoded([LONG], max_length=16)
    assert rows_of(cut.batch(np.array([0]))) == [("玄|黄|", "黄|"), ("玄|宇宙洪荒|", "宇宙洪荒|")]
    assert (cut.n_cut, cut.n_without_answer) == (1, 0)
    end = encoded([LONG], max_length=4)
    assert rows_of(end.batch(np.array([0]))) == [("玄|黄|", "黄|"), ("玄|宇宙", "宇宙")]
    left = encoded([LONG, {**GOOD, "prompt": "天地玄黄"}], max_length=4)
    assert (len(left), left.n_without_answer, left.lines.tolist()) == (1, 1, [1])
    with pytest.raises(InputError, match="no pair is left after cutting at max_length=2; raise --max_length"):
        encoded([LONG], max_length=2)


def test_a_chat_template_marks_the_last_answer_alone() -> None:
    tokenizer = BpeTokenizer.train([], 300, special_tokens=["<s>", "</s>"]).with_chat_template(
        "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}"
    )
    record = {"system": "be brief", **LONG, "prompt": [user("a"), assistant("b"), user("c")]}
    pairs = encode_preferences([preference_of(record)], tokenizer, 200, encode_chat_conversation)
    batch = pairs.batch(np.array([0]))
    said = [tokenizer.decode(row[mask].tolist()) for row, mask in zip(batch.targets, batch.answer_mask)]
    assert [text.removesuffix("</s>") for text in said] == ["黄", "宇宙洪荒"]


def test_a_batch_is_shared_out_by_pairs() -> None:
    data = encoded([{**GOOD, "prompt": "天" * n} for n in range(1, 6)])
    batch = data.batch(np.array([3, 0, 4]))
    assert batch.input_ids.shape[0] == 6
    mine = batch.some(slice(1, None, 2))
    assert mine.rows.tolist() == [0]
    assert [text for text, _ in rows_of(mine)] == ["天|地|", "天|玄|"]
    assert [row for each in data.in_order(4) for row in each.rows] == [0, 1, 2, 3, 4]
    assert max(len(each.input_ids) for each in data.in_order(4)) == 4


# -- the loss ----------------------------------------------------------------------------------------------


def tiny(seed: int, dropout: float = 0.0) -> LanguageModel:
    torch.manual_seed(seed)
    model = new_model(
        GPTConfig(
            vocab_size=TOKENIZER.get_vocab_size(),
            n_layer=2,
            n_embd=32,
            n_head=2,
            block_size=32,
            dropout=dropout,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():  # so that answers are neither certain nor equally likely
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


PAIRS: list[dict[str, Any]] = [
    {"prompt": "天", "chosen": "地", "rejected": "玄黄宇宙"},
    {"prompt": "日月盈", "chosen": "昃昃昃昃昃昃", "rejected": "天"},
    LONG,
]


def by_hand(
    model: LanguageModel, reference: LanguageModel, options: PreferenceOptions
) -> tuple[Tensor, list[dict[str, float]]]:
    """Compute the mean loss over PAIRS from the papers' formulas, one answer at a time, in float64."""
    losses, numbers = [], []
    for record in PAIRS:
        pair, logs = preference_of(record), []
        for one in (pair.chosen, pair.rejected):
            ids, said, _ = encode_conversation(one, TOKENIZER, 64)
            answer = len(one.answer) + 1  # with its <sep>, at the end
            assert said[-answer:].all()
            row = torch.from_numpy(ids.astype(np.int64))[None]
            for network in (model, reference):
                table = network(row)[0].log_softmax(-1)
                logs.append(sum(table[t - 1, row[0, t]] for t in range(len(ids) - answer, len(ids))))
            logs.append(torch.tensor(float(answer)))
        w, w_ref, w_len, v, v_ref, v_len = logs  # the winner's and the loser's
        beta = options.beta
        if options.loss_type == "sigmoid":
            z, e = beta * ((w - w_ref) - (v - v_ref)), options.label_smoothing
            loss = -(1 - e) * torch.log(1 / (1 + torch.exp(-z))) - e * torch.log(1 / (1 + torch.exp(z)))
        elif options.loss_type == "ipo":
            loss = ((w - w_ref) / w_len - (v - v_ref) / v_len - 1 / (2 * beta)) ** 2
        elif options.loss_type == "simpo":
            z = beta / w_len * w - beta / v_len * v - options.simpo_gamma
            loss = -torch.log(1 / (1 + torch.exp(-z)))
        else:
            p_w, p_v = torch.exp(w / w_len), torch.exp(v / v_len)
            ratio = (p_w / (1 - p_w)) / (p_v / (1 - p_v))
            loss = -w / w_len - beta * torch.log(1 / (1 + 1 / ratio))
        losses.append(loss)
        w, w_ref, v, v_ref = (each.item() for each in (w, w_ref, v, v_ref))
        gains = (w - w_ref, v - v_ref)
        if options.loss_type in ("simpo", "orpo"):
            gains = (w / w_len.item(), v / v_len.item())
        numbers.append(
            {
                "rewards/chosen": beta * gains[0],
                "rewards/rejected": beta * gains[1],
                "rewards/margins": beta * (gains[0] - gains[1]),
                "rewards/accuracies": float(gains[0] > gains[1]),
                "logps/chosen": w,
                "logps/rejected": v,
            }
        )
    return torch.stack(losses).mean(), numbers


@pytest.mark.parametrize(
    "options",
    [
        PreferenceOptions(),
        PreferenceOptions(beta=0.5, label_smoothing=0.2),
        PreferenceOptions(loss_type="ipo"),
        PreferenceOptions(beta=2.0, loss_type="simpo", simpo_gamma=0.7),
        PreferenceOptions(loss_type="orpo"),
    ],
    ids=str,
)
def test_loss_gradients_and_numbers_are_the_papers(options: PreferenceOptions) -> None:
    data = encoded(PAIRS)
    model = tiny(1)
    loss = PreferenceLoss(model, options, data, data, CPU)
    model.load_state_dict(tiny(2).state_dict())  # training has moved the weights
    batch = data.batch(np.array([0, 1, 2]))
    found = loss(*loss.select(batch)) / loss.count(batch)
    found.backward()
    exact = tiny(2).double()
    expected, numbers = by_hand(exact, tiny(1).double().eval(), options)
    expected.backward()  # type: ignore[no-untyped-call]
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    wanted = dict(exact.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        gradient = wanted[name].grad
        assert gradient is not None
        scale = float(gradient.abs().max())
        torch.testing.assert_close(parameter.grad.double(), gradient, rtol=1e-5, atol=1e-5 * max(1.0, scale))
    report = loss.evaluate(model, data.in_order(2), CPU).metrics()
    assert report["val_loss"] == pytest.approx(expected.item(), rel=1e-5)
    for name in numbers[0]:
        mean = sum(each[name] for each in numbers) / len(numbers)
        assert report[name] == pytest.approx(mean, rel=1e-5, abs=1e-6), name
    tokens = sum(len(preference_of(record).chosen.answer) + 1 for record in PAIRS)
    assert report["val_chosen_loss"] == pytest.approx(-sum(n["logps/chosen"] for n in numbers) / tokens)


def test_parts_of_a_batch_add_up_and_a_blank_one_adds_nothing() -> None:
    data = encoded(PAIRS)
    loss = PreferenceLoss(tiny(1), PreferenceOptions(), data, data, CPU)
    loss.model.load_state_dict(tiny(2).state_dict())
    batch = data.batch(np.array([2, 0, 1]))
    whole = loss(*loss.select(batch))
    parts = [loss(*loss.select(batch.some(slice(first, None, 2)))) for first in (0, 1)]
    torch.testing.assert_close(sum(parts), whole)
    nothing = loss(*loss.select(batch.blank()))
    nothing.backward()
    assert nothing.item() == 0.0
    assert loss.count(batch.blank()) == 0
    grads = [parameter.grad for parameter in loss.model.parameters()]
    assert all(grad is not None and not grad.any() for grad in grads)
    alone = loss.evaluate(loss.model, [batch], CPU)
    with_blank = loss.evaluate(loss.model, [batch, batch.blank()], CPU)
    assert with_blank.sums() == alone.sums()


def test_the_reference_knows_no_dropout_and_draws_no_numbers() -> None:
    data, model = encoded(PAIRS), tiny(1, dropout=0.5)
    model.train()
    before = torch.get_rng_state()
    loss = PreferenceLoss(model, PreferenceOptions(), data, data, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    report = loss.evaluate(model, data.in_order(128), CPU)
    assert report.loss == pytest.approx(math.log(2), rel=1e-12)
    assert report.metrics()["rewards/accuracies"] == 0.0


# -- runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model, and pairs for training and validation."""
    folder = tmp_path_factory.mktemp("preferences")
    save_pretrained(tiny(3, dropout=0.1), folder / "base", TOKENIZER)
    things = "天地玄黄宇宙洪荒"
    pairs = [
        {"prompt": thing, "chosen": f"{other}日", "rejected": f"{other}月"}
        for thing in things
        for other in things
    ]
    written(folder / "train.jsonl", pairs[8:])
    written(folder / "val.jsonl", pairs[:8])
    return folder


def options(folder: Path, output: str, **values: Any) -> dict[str, Any]:
    return {
        "task": "dpo", "model": folder / "base", "output": folder / output, "learning_rate": 3e-3,
        "train_data": folder / "train.jsonl", "val_data": folder / "val.jsonl", "batch_size": 8,
        "max_steps": 8, "eval_steps": 4, "logging_steps": 2, "threads": 1, "device": "cpu", "seed": 5,
        "precision": "float32", "report_to": "none", "warmup_steps": 0, **values,
    }  # fmt: skip


def run_of(given: dict[str, Any]) -> Trainer:
    return trainer(resolve(given, FinetuneConfig))


METHODS: list[dict[str, Any]] = [
    {"method": "full"},
    {"method": "freeze", "train_only": "last:1"},
    {"method": "lora", "lora_dropout": 0.1},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["method"])
def test_a_run_learns_and_resumes_to_the_same_bits(folder: Path, method: dict[str, Any]) -> None:
    name = method["method"]
    straight = options(folder, f"straight-{name}", **method)
    result = finetune(**straight)
    numbers = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
    numbers |= {"logps/chosen", "logps/rejected", "val_loss", "val_chosen_loss"}
    lines = [line for line in metrics(straight["output"]) if "val_loss" in line]
    assert [set(line) - {"step"} for line in lines] == [numbers] * 3
    assert [line["step"] for line in lines] == [0, 4, 8]
    assert lines[0]["val_loss"] == pytest.approx(math.log(2), rel=1e-12)
    assert {key: result[key] for key in numbers} == {key: lines[-1][key] for key in numbers}
    assert result["rewards/accuracies"] == 1.0
    assert result["rewards/margins"] > 0.01

    stop_at(run_of(options(folder, f"stopped-{name}", **method)), 5, signal.SIGTERM)
    finetune(output=folder / f"stopped-{name}", resume=True)
    assert metrics(folder / f"stopped-{name}") == metrics(straight["output"])
    weights = "adapter_model" if name == "lora" else "model"
    for file in (weights, "optimizer", "rng"):
        runs = [folder / f"{kind}-{name}" / "last" for kind in ("straight", "stopped")]
        left, right = (load_file(run / f"{file}.safetensors") for run in runs)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)


def test_a_resume_needs_the_weights_that_are_the_reference(folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_pretrained(tiny(3), base, TOKENIZER)
    given = options(folder, "moved", model=base)
    stop_at(run_of(given), 5)
    for file in base.iterdir():
        file.unlink()
    save_pretrained(tiny(4), base, TOKENIZER)
    with pytest.raises(InputError, match="belongs to other weights than those of"):
        finetune(output=folder / "moved", resume=True)


def test_without_validation_data_some_prompts_are_held_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = options(folder, "held-out", dry_run=True, val_fraction=0.25)
    del given["val_data"]
    data = read_data(resolve(given, FinetuneConfig))
    assert "16 of 56 pairs of answers" in capsys.readouterr().out  # two of the seven prompts, eight each
    assert (len(data.train), len(data.val)) == (40, 16)
    assert finetune(**given)["steps"] == 8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "sft", "beta": 0.2}, "--beta belongs to --task dpo or grpo: got --task sft"),
        ({"loss_on": "all"}, "--task dpo compares answers: leave --loss_on at answer"),
        (
            {"loss_type": "ipo", "label_smoothing": 0.1},
            "--label_smoothing belongs to --loss_type sigmoid or simpo",
        ),
        ({"simpo_gamma": 1.0}, "--simpo_gamma belongs to --loss_type simpo: got sigmoid"),
        ({"loss_type": "kto"}, "loss_type = 'kto': expected"),
        ({"method": "adaptor"}, "method = 'adaptor': expected"),
        ({"beta": 0.0}, "beta"),
    ],
)
def test_options_that_do_not_go_together(folder: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve(options(folder, "none", **values), FinetuneConfig)


@pytest.mark.parametrize(("method", "rate"), [({"method": "full"}, 1e-5), ({"method": "lora"}, 1e-4)])
def test_the_learning_rate_is_a_tenth_of_the_method_s(
    folder: Path, method: dict[str, Any], rate: float
) -> None:
    given = options(folder, "none", **method)
    del given["learning_rate"]
    assert resolve(given, FinetuneConfig).learning_rate == pytest.approx(rate)
    assert resolve({**given, "learning_rate": 0.5}, FinetuneConfig).learning_rate == 0.5
