"""Masked language modelling: hidden tokens, the tokens of the loss, runs, and `minigpt fill`."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from minigpt.data.batches import Batch
from minigpt.data.words import WordFinder
from minigpt.errors import InputError
from minigpt.families.qwen3.model import Qwen3Config
from minigpt.families.registry import LanguageModel, new_model
from minigpt.finetuning.masked_lm import (
    MASK,
    both_ways,
    fill_masks,
    hidden_count,
    mask_token_id,
    mask_tokens,
    with_masks,
)
from minigpt.model import GPTConfig
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenization.wordpiece import WordPieceTokenizer
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.training.finetune_config import FinetuneConfig
from minigpt.training.masked_loss import MaskedTokenLoss
from minigpt.training.resolve import resolve
from minigpt.training.run import finetune
from minigpt.training.run_data import read_data
from minigpt.weights.pretrained import load_model_and_tokenizer, load_tokenizer, save_pretrained
from tests.commands import RunCommand
from tests.runs import identical, stop_at, trainer

CPU = torch.device("cpu")
PROVINCES = {"四川": "成都", "浙江": "杭州", "湖南": "长沙", "山西": "太原"}
SENTENCES = [f"{province}的省会是{city}。\n" for province, city in PROVINCES.items()]


class FewBytes:
    """A byte-level tokenizer without tokens for some bytes."""

    def unknown_characters(self, text: str) -> list[str]:
        return list(text)

    def encode_array(self, text: str) -> Any:
        raise InputError(f"the tokenizer has no tokens for the bytes of {text!r}")


def test_a_tokenizer_that_cannot_encode_the_mask_has_none() -> None:
    assert mask_token_id(FewBytes()) is None


def test_which_tokens_are_hidden_and_how() -> None:
    B, T, mask_id = 400, 100, 5000
    ids = torch.arange(B * T).view(B, T) % mask_id
    real = torch.ones(B, T, dtype=torch.bool)
    real[-1, 40:] = False
    real[0] = False
    keys = [(7, row) for row in range(B)]
    seen, chosen = mask_tokens(ids, real, keys, mask_id, 0.15)
    assert chosen.sum(1).tolist() == [0, *[15] * (B - 2), 6]
    assert not (chosen & ~real).any()
    assert torch.equal(seen[~chosen], ids[~chosen])
    # shares of 5,976 draws: their standard deviation is below 0.0052, four of them below 0.021
    hidden, kept = (seen == mask_id)[chosen], (seen == ids)[chosen]
    assert float(hidden.float().mean()) == pytest.approx(0.8, abs=0.021)
    assert float(kept.float().mean()) == pytest.approx(0.1, abs=0.021)
    others = seen[chosen][~hidden & ~kept]
    assert others.max() < mask_id
    assert len({*others.tolist()}) > 500  # all over the vocabulary
    again, _ = mask_tokens(ids[5:6], real[5:6], keys[5:6], mask_id, 0.15)
    assert torch.equal(again[0], seen[5]), "a row's choice depends on its key alone"
    other, _ = mask_tokens(ids[5:6], real[5:6], [(8, 5)], mask_id, 0.15)
    assert not torch.equal(other[0], seen[5])


def spans(words: npt.NDArray[np.int64], pieces: Sequence[str]) -> list[str]:
    found = [""] * (int(words[-1]) + 1)
    for word, piece in zip(words.tolist(), pieces):
        found[word] += piece
    return found


def test_the_words_of_byte_level_tokens_are_the_tokenizer_s() -> None:
    bpe = BpeTokenizer.train(["hello world, the weather. 四川"] * 3, 290)
    ids = bpe.encode_text("hello worlds, don't 四川")
    words = WordFinder(bpe, "tokenizer").of(ids)
    pieces = [bpe.token_bytes(index).decode("latin-1") for index in ids]
    expected = ["hello", " worlds", ",", " don", "'t", " 四川".encode().decode("latin-1")]
    assert spans(words, pieces) == expected
    # a window that begins and ends inside characters, with a token that ends a text
    end = bpe.eos_token_id
    assert end is not None
    inside = [*bpe.encode_text("鲸")[1:], end, *bpe.encode_text("a 鲸")[:-1]]
    assert WordFinder(bpe, "tokenizer").of(inside).tolist() == [0, 0, 1, 2, 3, 3, 3]
    assert WordFinder(bpe, "tokenizer").of([end, end]).tolist() == [0, 1]


def test_the_words_of_wordpiece_begin_without_its_mark(tmp_path: Path) -> None:
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "四", "川", "low", "##er", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(entries), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    tokenizer = WordPieceTokenizer.from_folder(tmp_path)
    ids = tokenizer.encode_text("四川 lowers low")
    assert WordFinder(tokenizer, "tokenizer").of(ids).tolist() == [0, 1, 2, 3, 3, 3, 4, 5]


def test_chinese_words_of_every_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("rjieba", reason="the segmenter is an optional package")
    text, expected = "四川的省会是成都。", ["四川", "的", "省会", "是", "成都", "。"]
    characters = Tokenizer.from_word2id(build_vocabulary([text, "hello word"]))
    ids = characters.encode_text(text)
    assert spans(WordFinder(characters, "jieba").of(ids), text) == expected
    mixed = "四川 hello"
    assert spans(WordFinder(characters, "jieba").of(characters.encode_text(mixed)), mixed) == [
        "四川",
        " hello",
    ]
    bpe = BpeTokenizer.train([text], 259)
    pieces = [bpe.token_bytes(index).decode("latin-1") for index in bpe.encode_text(text)]
    words = WordFinder(bpe, "jieba").of(bpe.encode_text(text))
    assert spans(words, pieces) == [word.encode().decode("latin-1") for word in expected]
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(text), "low", "##er"])
    )
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    wordpiece = WordPieceTokenizer.from_folder(tmp_path)
    ids = wordpiece.encode_text(text + "lower low")[1:-1]
    words = WordFinder(wordpiece, "jieba").of(ids)
    assert spans(words, [*text, "low", "er", " low"]) == [*expected, "lower", " low"]


def test_whole_words_are_hidden_and_not_more_than_their_share() -> None:
    """The words of the row are numbers of three digits: four tokens with the space after them."""
    ids = torch.arange(400).view(4, 100)
    real = torch.ones(4, 100, dtype=torch.bool)
    real[3, 3:] = False
    keys = [(7, row) for row in range(4)]

    def words(row: Sequence[int]) -> npt.NDArray[np.int64]:
        return np.array(row) // 4

    seen, chosen = mask_tokens(ids, real, keys, 5000, 0.15, lambda row: words(row) - row[0] // 4)
    assert chosen.sum(1).tolist() == [12, 12, 12, 3]  # of 15, 3 words of 4; and one word, if all are too long
    for row in range(3):
        assert len({*(ids[row, chosen[row]] // 4).tolist()}) == 3
    assert torch.equal(seen[~chosen], ids[~chosen])
    again, _ = mask_tokens(ids, real, keys, 5000, 0.15, lambda row: words(row) - row[0] // 4)
    assert torch.equal(again, seen)


@pytest.mark.parametrize(("tokens", "count"), [(0, 0), (1, 1), (3, 1), (10, 2), (100, 15)])
def test_at_least_one_token_is_hidden(tokens: int, count: int) -> None:
    assert hidden_count(tokens, 0.15) == count


def tiny(vocab_size: int = 31, dropout: float = 0.0) -> LanguageModel:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"n_layer": 2, "n_embd": 32, "n_head": 2, "block_size": 16, "dropout": dropout}
    return new_model(GPTConfig(vocab_size=vocab_size, **sizes))


def windows(lengths: list[int], width: int = 12) -> Batch:
    ids = torch.randint(30, (len(lengths), width), generator=torch.Generator().manual_seed(2))
    real = torch.arange(width) < torch.tensor(lengths)[:, None]
    return Batch(ids * real, ids * 0, real, real, np.arange(len(lengths)) * 100)


def test_the_loss_is_that_of_the_hidden_tokens_seen_from_both_sides() -> None:
    model, batch = tiny().double().eval(), windows([12, 12])
    loss = MaskedTokenLoss(model, 30, 0.3, 7, CPU)
    seen, chosen = mask_tokens(batch.input_ids, batch.token_mask, [(7, 0), (7, 100)], 30, 0.3)
    logits = model(seen, both_ways(seen)).log_softmax(-1)
    expected = -sum(logits[b, t, batch.input_ids[b, t]] for b, t in chosen.nonzero().tolist())
    found = loss(*loss.select(batch))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)  # the loss itself is in float32
    assert loss.count(batch) == int(chosen.sum()) == 8
    report = loss.evaluate(model, [batch], CPU)
    assert report.loss == pytest.approx(expected.item() / 8, rel=1e-5)


def test_padding_behind_a_short_window_is_not_seen() -> None:
    loss = MaskedTokenLoss(tiny(), 30, 0.3, 7, CPU)
    long = windows([12, 12, 5])
    ids, targets, real, answers, rows = long.some(slice(2, 3))
    cut = Batch(ids[:, :5], targets[:, :5], real[:, :5], answers[:, :5], rows)
    together = loss.evaluate(loss.model, [long], CPU)
    apart = [loss.evaluate(loss.model, [each], CPU) for each in (long.some(slice(0, 2)), cut)]
    assert together.sums() == pytest.approx([sum(each) for each in zip(*(one.sums() for one in apart))])


def test_a_blank_batch_adds_nothing() -> None:
    loss = MaskedTokenLoss(tiny(), 30, 0.3, 7, CPU)
    blank = windows([12, 12]).blank()
    found = loss(*loss.select(blank))
    found.backward()
    assert (found.item(), loss.count(blank)) == (0.0, 0)
    assert all(p.grad is not None and not p.grad.any() for p in loss.model.parameters())
    loss(*loss.example(CPU)).backward()


# -- runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masked")
    rng = np.random.default_rng(0)
    (folder / "text.txt").write_text("".join(rng.choice(SENTENCES, 300)), encoding="utf-8")
    tokenizer = Tokenizer.from_word2id(build_vocabulary(SENTENCES))
    save_pretrained(tiny(tokenizer.get_vocab_size(), dropout=0.1), folder / "base", tokenizer)
    return folder


def options(folder: Path, output: str, **values: Any) -> dict[str, Any]:
    return {
        "task": "mlm", "model": folder / "base", "output": folder / output, "learning_rate": 1e-2,
        "text": folder / "text.txt", "batch_size": 16, "max_steps": 12, "eval_steps": 6, "threads": 1,
        "device": "cpu", "precision": "float32", "report_to": "none", "logging_steps": 2, **values,
    }  # fmt: skip


def test_a_run_resumes_to_the_same_bits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = finetune(**options(folder, "straight"))
    assert "[" in next(line for line in capsys.readouterr().out.splitlines() if "validation loss" in line)
    assert result["val_loss"] < math.log(30)
    stop_at(trainer(resolve(options(folder, "stopped"), FinetuneConfig)), 7)
    finetune(output=folder / "stopped", resume=True)
    identical(folder / "straight", folder / "stopped")


def test_what_is_learned_is_filled_in(folder: Path, run_command: RunCommand) -> None:
    vocab_size = load_tokenizer(folder / "base").get_vocab_size()
    torch.manual_seed(1)
    base = new_model(Qwen3Config(vocab_size, 32, 64, 2, 2, 2, 16, 32, rope_theta=1e4))
    save_pretrained(base, folder / "qwen3", load_tokenizer(folder / "base"))
    many = {"max_steps": 250, "eval_steps": 250, "optimizer": "muon", "learning_rate": 3e-3}
    finetune(**options(folder, "learned", **many, model=folder / "qwen3"))
    model = folder / "learned" / "best"
    text = "四川的省会是[MASK][MASK]。"
    done = run_command("fill", "--model", model, "--text", text, "--top_k", 3, "--json")
    assert done.code == 0, done.err
    assert "四川的省会是成都。" in done.out
    numbers = json.loads(done.out.splitlines()[-1])
    assert numbers["filled"] == "四川的省会是成都。"
    for candidates in numbers["masks"]:
        shares = [each["probability"] for each in candidates]
        assert len(shares) == 3
        assert shares == sorted(shares, reverse=True)
        assert 0.5 < shares[0] <= 1
        assert sum(shares) <= 1 + 1e-6
    # what stands behind a gap counts: the city tells the province
    network, tokenizer = load_model_and_tokenizer(model)
    mask_id = int(tokenizer.encode_array(MASK)[0])
    ids = tokenizer.encode_array(with_masks("[MASK][MASK]的省会是长沙。")).tolist()
    best = [each[0].token for each in fill_masks(network, ids, mask_id, 1)]
    assert tokenizer.decode(best) == "湖南"

    causal = run_command("generate", "--model", model, "--question", "四川")
    assert (causal.code, "was trained to fill gaps (minigpt fill)" in causal.err) == (0, True)
    measured = run_command("eval", "--model", model, "--text", folder / "text.txt", "--device", "cpu")
    assert (measured.code, "was trained to fill gaps (minigpt fill)" in measured.err) == (0, True)
    none = run_command("fill", "--model", model, "--text", "四川的省会")
    assert (none.code, "there is no [MASK] in the text" in none.err) == (2, True)
    long = run_command("fill", "--model", model, "--text", "[MASK]" * 33)
    assert (long.code, "33 tokens, and the model reads 32" in long.err) == (2, True)
    causal = run_command("fill", "--model", folder / "base", "--text", "[MASK]")
    assert (causal.code, "has no [MASK]: minigpt finetune --task mlm" in causal.err) == (2, True)


def test_byte_level_tokens_have_a_mask_too(tmp_path: Path) -> None:
    tokenizer = BpeTokenizer.train(SENTENCES, 280)
    save_pretrained(tiny(tokenizer.get_vocab_size()), tmp_path / "base", tokenizer)
    (tmp_path / "text.txt").write_text("".join(SENTENCES * 40), encoding="utf-8")
    finetune(**options(tmp_path, "run", max_steps=2, eval_steps=2))
    kept = load_tokenizer(tmp_path / "run" / "best")
    assert kept.encode_array(f"四{MASK}川").tolist().count(tokenizer.get_vocab_size()) == 1
    assert kept.encode_array(SENTENCES[0]).tolist() == tokenizer.encode_array(SENTENCES[0]).tolist()
    assert kept.encode_array("[MASK]").tolist() == tokenizer.encode_array("[MASK]").tolist()


def test_a_run_with_whole_words_resumes_to_the_same_bits(tmp_path: Path) -> None:
    sentences = ["the capital of this province is there. ", "this is the province of that capital. "]
    tokenizer = BpeTokenizer.train(sentences, 290)
    save_pretrained(tiny(tokenizer.get_vocab_size(), dropout=0.1), tmp_path / "base", tokenizer)
    (tmp_path / "text.txt").write_text("".join(sentences * 60), encoding="utf-8")
    more = {"whole_words": "tokenizer", "mlm_probability": 0.3}
    run = trainer(resolve(options(tmp_path, "straight", **more), FinetuneConfig))
    loss, batch = run.step.loss, run.step.batches(0)[0]
    assert isinstance(loss, MaskedTokenLoss)
    hidden, finder = loss.hide(batch), WordFinder(tokenizer, "tokenizer")
    assert loss.count(batch) == int(hidden.token_mask.sum()) > 0
    for ids, chosen in zip(batch.input_ids.tolist(), hidden.token_mask.tolist()):
        words = finder.of(ids).tolist()
        taken = {word for word, is_hidden in zip(words, chosen) if is_hidden}
        assert all(is_hidden == (word in taken) for word, is_hidden in zip(words, chosen))
    run.run()
    stop_at(trainer(resolve(options(tmp_path, "stopped", **more), FinetuneConfig)), 7)
    finetune(output=tmp_path / "stopped", resume=True)
    identical(tmp_path / "straight", tmp_path / "stopped")


def test_words_that_are_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InputError, match="a vocabulary of characters has no words; for Chinese words: --whole"
    ):
        finetune(**options(folder, "none", whole_words="tokenizer"))
    monkeypatch.setitem(sys.modules, "rjieba", None)
    with pytest.raises(InputError, match="--whole_words jieba needs the package rjieba: pip install"):
        finetune(**options(folder, "none", whole_words="jieba"))
    assert not (folder / "none" / "last").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": None}, "--task mlm learns from a text: give --text FILE"),
        ({"method": "lora"}, "--task mlm needs --method full or freeze"),
        ({"parallel": "fsdp"}, "--task mlm does not go with parallel=fsdp"),
        ({"task": "sft", "mlm_probability": 0.3}, "--mlm_probability belongs to --task mlm"),
        ({"task": "sft", "whole_words": "jieba"}, "--whole_words belongs to --task mlm"),
        ({"task": "dpo"}, "--task dpo learns from pairs of answers: give --train_data instead of --text"),
    ],
)
def test_options_that_do_not_go_together(folder: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve(options(folder, "none", **values), FinetuneConfig)


def test_the_mask_is_one_token_behind_the_others(folder: Path) -> None:
    data = read_data(resolve(options(folder, "data"), FinetuneConfig))
    old = load_tokenizer(folder / "base")
    assert data.tokenizer.encode_array(MASK).tolist() == [old.get_vocab_size()]
    assert data.tokenizer.get_vocab_size() == old.get_vocab_size() + 1
