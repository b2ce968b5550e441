"""Weights of samples: the field `weight`, keywords, the loss by hand, and runs."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minigpt.data.batches import Batch, encode_conversations
from minigpt.data.conversation import conversation_of_pair
from minigpt.data.reader import read_conversations
from minigpt.data.sample_weights import parse_keyword_weights
from minigpt.data.split import split_conversations, write_split
from minigpt.errors import InputError
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.training.config import TrainConfig
from minigpt.training.finetune_config import FinetuneConfig
from minigpt.training.weighted_loss import KeywordWeights, WeightedTokenLoss
from minigpt.weights.pretrained import save_pretrained
from tests.runs import config, identical, metrics, one_step, stop_at, trainer, write_data

CPU = torch.device("cpu")


# -- keywords ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plt", "plt"), ("plt:", "plt:"), (":3", ":3"), ("plt:x", "plt:x"), ("plt:-1", "plt:-1"),
        ("plt:nan", "plt:nan"), ("plt:inf", "plt:inf"), ("plt:3,", "''"),
        ("plt:3,plt:2", "names 'plt' twice"),
    ],
)  # fmt: skip
def test_bad_keywords_are_one_line(text: str, shown: str) -> None:
    for kind in (TrainConfig, FinetuneConfig):
        with pytest.raises(InputError, match="keyword_weight ") as caught:
            kind(keyword_weight=text)
        assert shown in str(caught.value)
        assert "\n" not in str(caught.value)
    assert parse_keyword_weights("a:b:2,c:0") == {"a:b": 2.0, "c": 0.0}


def test_keywords_in_characters_and_in_byte_level_tokens() -> None:
    texts = ["plt.show(pd)", "plt pltplt", "update", "p", ""]
    characters = Tokenizer.from_word2id(build_vocabulary(texts))
    expected = {"plt:3,pd:2": [1 + 3 + 2, 1 + 9, 1 + 2, 1, 1], "tpl:0.5": [1, 1.5, 1, 1, 1]}
    for text, weights in expected.items():
        found = KeywordWeights(text, characters).of(rows(characters, texts))
        assert found.tolist() == weights
    with pytest.raises(InputError, match="the vocabulary lacks 'x' of the keyword 'xy'"):
        KeywordWeights("xy:1", characters)
    bpe = BpeTokenizer.train(["import plt pd update plt pd update"] * 30, 300)
    assert bpe.encode_text("plt pd") == [*bpe.encode_text("plt"), *bpe.encode_text(" pd")]
    texts = ["plt pd", " plt", "update", "import plt"]
    # `pd` inside the word `update` is no token of its own
    assert KeywordWeights("plt:3,pd:2", bpe).of(rows(bpe, texts)).tolist() == [1 + 3 + 2, 4, 1, 4]
    counts = KeywordWeights("plt:3,pd:2,update:1", bpe).counts(
        np.array(bpe.encode_text(text)) for text in texts
    )
    assert counts["plt"] == (3, 3)
    assert counts["pd"] == (1, 1)
    some = KeywordWeights("plt:3,tpl:1", characters).counts(
        np.array(characters.encode_text(text), dtype=np.int64)
        for text in ("plt.show(pd)", "plt pltplt", "p", "")
    )
    assert some == {"plt": (4, 2), "tpl": (1, 1)}


def rows(tokenizer: Any, texts: list[str]) -> Any:
    ids = [tokenizer.encode_text(text) for text in texts]
    width = max(map(len, ids))
    return np.array([[*row, *[-1] * (width - len(row))] for row in ids])


# -- the loss ----------------------------------------------------------------------------------------------


def model_of(vocab_size: int) -> GPTLMHeadModel:
    return GPTLMHeadModel(GPTConfig(24, 3, 1, 0.0, 32, vocab_size)).double()


def batch_of(tokenizer: Tokenizer, pairs: list[tuple[str, str]]) -> Batch:
    conversations = [conversation_of_pair(*pair) for pair in pairs]
    return encode_conversations(conversations, tokenizer, 30).batch(np.arange(len(pairs)))


@pytest.mark.parametrize("loss_on", ["answer", "all"])
def test_a_sample_s_mean_times_its_weight(loss_on: Any) -> None:
    """The loss of two samples of different lengths is computed by hand, token by token."""
    tokenizer = Tokenizer.from_word2id(build_vocabulary(["天地玄黄"]))
    model = model_of(tokenizer.get_vocab_size())
    batch = batch_of(tokenizer, [("天", "地"), ("玄黄天", "黄地黄天")])
    keywords = KeywordWeights("黄:0.5", tokenizer)
    loss = WeightedTokenLoss(model, loss_on, CPU, np.array([2.0, 0.25]), keywords)
    # 黄 is in the second sample three times: 0.25 * (1 + 3 * 0.5)
    assert loss.weights_of(batch).tolist() == [2.0, 0.625]
    mask = batch.answer_mask if loss_on == "answer" else batch.token_mask
    assert mask.sum(1).tolist() == ([2, 5] if loss_on == "answer" else [3, 8])
    scores = model(batch.input_ids).detach().log_softmax(-1)
    expected = 0.0
    for row, weight in enumerate((2.0, 0.625)):
        places = mask[row].nonzero().flatten().tolist()
        each = [-float(scores[row, place, batch.targets[row, place]]) for place in places]
        expected += weight * sum(each) / len(each)
    # the cross-entropy is computed in float32
    assert loss(*loss.select(batch)).item() == pytest.approx(expected, rel=1e-5)
    assert loss.count(batch) == 2


def test_it_is_the_course_s_loss_where_each_keyword_weighs_one() -> None:
    """The course's loss: the mean over a sample's tokens, times 1 + its key tokens, averaged over samples."""
    tokenizer = Tokenizer.from_word2id(build_vocabulary(["天地玄黄"]))
    model = model_of(tokenizer.get_vocab_size())
    inputs = torch.randint(3, tokenizer.get_vocab_size(), (4, 9))
    keys = tokenizer.encode_text("天黄")
    full = torch.ones(4, 8, dtype=torch.bool)
    batch = Batch(inputs[:, :-1], inputs[:, 1:], full, full, np.arange(4))
    loss = WeightedTokenLoss(model, "all", CPU, None, KeywordWeights("天:1,黄:1", tokenizer))
    found = loss(*loss.select(batch)) / loss.count(batch)
    expected = course_loss(inputs, model(inputs), keys)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = [torch.autograd.grad(one, model.lm_head.weight)[0] for one in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def course_loss(inputs: Tensor, logits: Tensor, keys: list[int]) -> Tensor:
    each = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), inputs[:, 1:], reduction="none")
    counts = torch.stack([(inputs == key).sum(1) for key in keys]).sum(0)
    return (each.mean(1) * (1 + counts)).mean()


def test_many_logits_are_computed_in_pieces_and_a_blank_batch_adds_nothing() -> None:
    tokenizer = Tokenizer.from_word2id(build_vocabulary(["天地玄黄"]))
    model = model_of(tokenizer.get_vocab_size())
    batch = batch_of(tokenizer, [("天", "地"), ("玄黄天", "黄地黄天")])
    loss = WeightedTokenLoss(model, "answer", CPU, np.array([2.0, 0.25]), None)
    whole = loss(*loss.select(batch))
    loss._limit = 2 * tokenizer.get_vocab_size()
    assert loss(*loss.select(batch)).item() == pytest.approx(whole.item(), rel=1e-6)
    blank = loss(*loss.select(batch.blank()))
    blank.backward()
    assert (blank.item(), loss.count(batch.blank())) == (0.0, 0)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    loss(*loss.example(CPU)).backward()


# -- files and runs ----------------------------------------------------------------------------------------


def with_weights(folder: Path) -> None:
    """Write the data of `write_data`, with the weights 0.5, 1, 1.5, ..."""
    write_data(folder)
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [{**json.loads(line), "weight": (number + 1) / 2} for number, line in enumerate(lines)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(text, encoding="utf-8")


def test_a_weight_is_read_from_every_format_and_stays_in_a_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.csv"
    path.write_text("question,answer,weight\n天？,蓝,2\n地？,黄,\n日？,红,0\n月？,白,-1\n山？,青,5kg\n")
    found, report = read_conversations(path)
    assert [each.weight for each in found] == [2.0, 1.0, 0.0, 1.0]
    report.print_summary()
    printed = capsys.readouterr().err
    assert "the `weight` of 1 records is no number, so they count as 1 (line 6)" in printed
    assert "skipped 1: `weight` is no number from 0 to 1e6 (line 5: it is '-1')" in printed
    with pytest.raises(InputError, match=r"data\.csv:5: `weight` is no number from 0 to 1e6: it is '-1'"):
        read_conversations(path, strict=True)
    write_split(split_conversations(found, 0.7, 1), report, tmp_path, train_ratio=0.7, seed=1)
    again = [one for name in ("train", "val") for one in read_conversations(tmp_path / f"{name}.jsonl")[0]]
    assert {one.question: one.weight for one in again} == {"天？": 2.0, "地？": 1.0, "日？": 0.0, "山？": 1.0}
    turns = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert read_conversations([{**turns, "weight": 3}])[0][0].weight == 3.0


def test_a_run_counts_samples_and_resumes_to_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_weights(tmp_path)
    more = {"keyword_weight": "红:2,黑:0.5", "dropout": 0.0}
    run = trainer(config(tmp_path, "straight", **more))
    said = capsys.readouterr()
    assert f"weights of {tmp_path / 'train.jsonl'}: 0.5 to 4, mean 2.25" in said.out
    pairs = [
        run.data.tokenizer.decode(run.data.train.ids[a:b].tolist())
        for a, b in itertools.pairwise(run.data.train.starts.tolist())
    ]
    reds = sum(text.count("红") for text in pairs), sum("红" in text for text in pairs)
    assert f"keywords in {len(pairs):,} samples: 红 {reds[0]} times in {reds[1]}, 黑 " in said.out
    assert ("no sample has the keyword" in said.err) == (not any("黑" in text for text in pairs))
    batch = run.step.batches(0)[0]
    model = run.model
    # the step's loss by hand: the mean over its samples
    scores, expected = model(batch.input_ids).detach().log_softmax(-1), list[float]()
    texts = [run.data.tokenizer.decode(row.tolist()) for row in batch.input_ids]
    for row, text in enumerate(texts):
        weight = run.data.train.weights[batch.rows[row]] * (1 + 2 * text.count("红") + 0.5 * text.count("黑"))
        places = batch.answer_mask[row].nonzero().flatten()
        each = -scores[row, places, batch.targets[row, places]]
        expected.append(float(weight * each.mean()))
    assert one_step(run).loss == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    run.run()
    stop_at(trainer(config(tmp_path, "stopped", **more)), 7)
    again = trainer(config(tmp_path, "stopped", **more))
    again.resume()
    again.run()
    identical(tmp_path / "straight", tmp_path / "stopped")
    plain = trainer(config(tmp_path, "plain", dropout=0.0))
    plain.run()
    first, other = (metrics(tmp_path / name)[0] for name in ("straight", "plain"))
    assert first["train_loss"] != other["train_loss"]
    write_data(tmp_path)  # without weights it is other data
    with pytest.raises(InputError, match="was made with another training data"):
        trainer(config(tmp_path, "stopped", **more)).resume()


def test_fine_tuning_and_windows_of_text_have_keywords_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_weights(tmp_path)
    tokenizer = Tokenizer(tmp_path / "vocab.json")
    base = GPTLMHeadModel(GPTConfig(24, 3, 1, 0.0, 32, tokenizer.get_vocab_size()))
    save_pretrained(base, tmp_path / "base", tokenizer)
    shared: dict[str, Any] = {
        "train_data": tmp_path / "train.jsonl", "model": tmp_path / "base", "threads": 1, "device": "cpu",
        "output": tmp_path / "run", "max_steps": 2, "max_length": 32, "block_size": 32,
    }  # fmt: skip
    run = trainer(FinetuneConfig(**shared, keyword_weight="红:2"))
    assert isinstance(run.step.loss, WeightedTokenLoss)
    with pytest.raises(InputError, match="--keyword_weight belongs to --task sft: got --task dpo"):
        FinetuneConfig(**shared, keyword_weight="红:2", task="dpo")
    (tmp_path / "text.txt").write_text("天是蓝的。地是黄的。" * 50, encoding="utf-8")
    text = config(tmp_path, text=tmp_path / "text.txt", keyword_weight="蓝的:3", loss_on="all", block_size=16)
    loss = trainer(text).step.loss
    assert isinstance(loss, WeightedTokenLoss)
    capsys.readouterr()
    trainer(dataclasses.replace(text, keyword_weight="蓝的:3,蓝蓝:1,黄黄:2"))
    said = capsys.readouterr()
    assert "warning: no sample has the keyword '蓝蓝', '黄黄': its weight changes nothing\n" in said.err
    assert ", 蓝蓝 0 times in 0, " in said.out
    batch = trainer(text).step.batches(0)[0]
    whole = torch.cat([batch.input_ids, batch.targets[:, -1:]], 1)
    decoded = [trainer(text).data.tokenizer.decode(row.tolist()) for row in whole]
    assert loss.weights_of(batch).tolist() == [1 + 3 * one.count("蓝的") for one in decoded]
