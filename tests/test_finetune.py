"""Fine-tuning: the trained weights, the content of checkpoints, exact resume, new tokens, bad input."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import minigpt
from minigpt.data.batches import encode_conversation
from minigpt.data.chat_encoding import encode_chat_conversation
from minigpt.data.conversation import Conversation, Turn
from minigpt.errors import InputError
from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM, RopeScaling
from minigpt.families.registry import LanguageModel
from minigpt.finetuning.adapters import load_adapter
from minigpt.finetuning.embeddings import resize_token_embeddings
from minigpt.finetuning.freezing import hugging_face_names, train_only
from minigpt.finetuning.layers import pattern_of
from minigpt.generation.api import ends_of_answer
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenization.wordpiece import WordPieceTokenizer
from minigpt.tokenizer import Tokenizer
from minigpt.training import checkpoint
from minigpt.training.config import read_run
from minigpt.training.finetune_config import FinetuneConfig
from minigpt.training.loop import Trainer
from minigpt.training.optimizer import make_optimizers
from minigpt.training.resolve import resolve
from minigpt.training.run import finetune, train
from minigpt.training.run_data import PLAIN_TEMPLATE, read_data
from minigpt.weights.pretrained import load_model, load_tokenizer, save_pretrained
from tests.commands import RunCommand
from tests.runs import stop_at, write_data

METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "freeze": {"method": "freeze", "train_only": "last:1"},
    "lora": {"method": "lora", "r": 3, "lora_dropout": 0.1},
    "dora": {"method": "lora", "r": 2, "use_dora": True, "modules_to_save": ("lm_head",)},
    "adapter": {"method": "adapter", "bottleneck_size": 5},
    "ia3": {"method": "ia3", "learning_rate": 0.5},  # few weights, and a base that knows nothing
}
ADAPTERS = ("lora", "dora", "adapter", "ia3")
FAMILIES: dict[str, Callable[[int], LanguageModel]] = {
    "gpt": lambda V: GPTLMHeadModel(GPTConfig(24, 3, 2, 0.0, 32, V)),
    "qwen3": lambda V: Qwen3ForCausalLM(Qwen3Config(V, 24, 40, 2, 4, 2, 8, 32, tie_word_embeddings=False)),
}
# settings that only folders of other tools have
FOREIGN: dict[str, Callable[[int], LanguageModel]] = {
    "gpt-untied": lambda V: GPTLMHeadModel(GPTConfig(24, 3, 2, 0.0, 32, V, tie_word_embeddings=False)),
    "qwen3-all": lambda V: Qwen3ForCausalLM(
        Qwen3Config(
            V,
            24,
            40,
            2,
            4,
            2,
            8,
            32,
            attention_bias=True,
            sliding_window=5,
            layer_types=("full_attention", "sliding_attention"),
            rope_scaling=RopeScaling("linear", factor=2.0),
        )
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make two base models, gpt and qwen3, and data with two characters that they do not know."""
    folder = tmp_path_factory.mktemp("made")
    write_data(folder)
    tokenizer = Tokenizer(folder / "vocab.json")
    for name, make in FAMILIES.items():
        torch.manual_seed(3)
        save_pretrained(make(tokenizer.get_vocab_size()), folder / name, tokenizer)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """Return a copy of these models and data."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def settings(folder: Path, model: str = "qwen3", output: str = "run", **values: Any) -> FinetuneConfig:
    """Return the configuration of a tiny run from one of the base models."""
    given = {
        "model": folder / model,
        "train_data": folder / "train.jsonl",
        "val_data": folder / "val.jsonl",
        "output": folder / output,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": 8,
        "eval_steps": 4,
        "logging_steps": 1,
        "threads": 1,
        "device": "cpu",
        "precision": "float32",
        "report_to": "none",
        **values,
    }
    config = resolve(given, FinetuneConfig)
    assert isinstance(config, FinetuneConfig)
    return config


def trainer(config: FinetuneConfig) -> Trainer:
    return Trainer(config, read_data(config))


def parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def logits(model: LanguageModel) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model.eval()(torch.arange(12).view(2, 6) % model.config.vocab_size)
    return found


# -- what is trained ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_only_what_is_trained_changes_and_the_loss_falls(folder: Path, family: str, method: str) -> None:
    run = trainer(settings(folder, family, **METHODS[method]))
    before = parameters(run.model)
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    first = run.evaluate().loss
    result = run.run()
    assert result["val_loss"] < first - 0.01
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_does_not_draw_the_factors_of_ia3_to_zero(folder: Path, optimizer: str) -> None:
    more: dict[str, Any] = {"optimizer": optimizer, "weight_decay": 0.5, "modules_to_save": ("o_proj",)}
    run = trainer(settings(folder, method="ia3", **more))
    decayed = {
        id(parameter)
        for each in make_optimizers(run.model, run.config)
        for group in each.param_groups
        if group["weight_decay"]
        for parameter in group["params"]
    }
    trained = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    assert {id(p) for name, p in trained.items() if "o_proj" in name} == decayed
    assert sum(name.endswith(".ia3_l") for name in trained) == 3 * run.model.config.num_hidden_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_are_measured_before_the_first_step(folder: Path, family: str) -> None:
    base = load_model(folder / family)
    config = settings(folder, family)
    expected = Trainer(config, read_data(config)).step.loss
    first = expected.evaluate(base, read_data(config).val.in_order(8), torch.device("cpu")).loss
    trainer(config).run()
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    measured = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    assert measured[0] == (0, pytest.approx(first, rel=1e-6))
    assert [step for step, _ in measured] == [0, 4, 8]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ADAPTERS)
def test_a_checkpoint_of_an_adapter_holds_nothing_else(folder: Path, family: str, method: str) -> None:
    run = trainer(settings(folder, family, **METHODS[method]))
    run.run()
    last = folder / "run" / "last"
    assert not (last / "model.safetensors").exists()
    model = load_model(folder / family)
    load_adapter(model, last)
    assert torch.equal(logits(model), logits(run.model))
    assert load_tokenizer(last) == load_tokenizer(folder / family)


def test_parts_of_a_model_by_name() -> None:
    model = FAMILIES["gpt"](20)

    def chosen(which: str) -> set[str]:
        train_only(model, which)
        return {name for name, p in hugging_face_names(model).items() if p.requires_grad}

    assert all(".mlp." in name for name in chosen("mlp"))
    assert len(chosen("mlp")) == 2 * 2  # c_fc and c_proj of two blocks, without biases
    assert all(".attn." in name for name in chosen("attention"))
    assert {name.split(".")[-2] for name in chosen("norms")} == {"ln_1", "ln_2", "ln_f"}
    assert chosen("embeddings") >= {"transformer.wte.weight", "transformer.wpe.weight"}
    assert not any(".h.0." in name or "wpe" in name for name in chosen("last:1"))
    assert any(".h.1." in name for name in chosen("last:1"))
    assert chosen(r"transformer\.h\.0\.ln_1\.weight") == {"transformer.h.0.ln_1.weight"}
    for which, message in (
        ("last:3", "the model has 2 blocks"),
        ("nothing", "matches no parameter"),
        ("(", "no regular expression"),
    ):
        with pytest.raises(InputError, match=message):
            train_only(model, which)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "(a+)+!",
            "(a|b|.)*!",
            ".*" * 11 + "!",
            "(a?){50}",
            "(.|.)" * 25,
            "((((a{9}){9}){9}){9})",
            "a?" * 40,
        ),
        *("a{99999999999}", "(" * 5000 + ")" * 5000, "["),
    ],
)
def test_a_pattern_that_would_take_hours_is_refused(text: str) -> None:
    with pytest.raises(
        InputError, match=r"^k=.* (could match a name in too many ways|is no regular expression)"
    ):
        pattern_of(text, "k")


@pytest.mark.parametrize(
    "text",
    [
        r".*\.(q_proj|v_proj)",
        r"(?!.*vision).*(?:self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|ffn).*?(?:q|k|v|o|gate|up|down)_proj.*?)",
        r"(model\.)?layers\.[0-9]{1,2}\.[^.]+\.[\w]+",
        r"transformer\.h\.(0|1|2|3|4|5|6|7|8|9|10|11)\.attn\.c_attn",
    ],
)
def test_patterns_as_they_are_used_are_allowed(text: str) -> None:
    assert pattern_of(text, "k").pattern == text


# -- resume ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_with_the_same_bits(folder: Path, method: str) -> None:
    trainer(settings(folder, output="whole", **METHODS[method])).run()
    for step in (1, 5):
        run = folder / f"run-{step}"
        stop_at(trainer(settings(folder, output=run.name, **METHODS[method])), step)
        config = read_run(run, FinetuneConfig)
        assert isinstance(config, FinetuneConfig)
        again = trainer(config)
        again.resume()
        again.run()
        name = "adapter_model.safetensors" if method in ADAPTERS else "model.safetensors"
        for file in (name, "optimizer.safetensors"):
            ended, expected = load_file(run / "last" / file), load_file(folder / "whole/last" / file)
            assert ended.keys() == expected.keys()
            assert all(torch.equal(ended[key], expected[key]) for key in ended), (step, file)


def test_an_adapter_is_not_resumed_on_other_weights(folder: Path) -> None:
    stop_at(trainer(settings(folder, **METHODS["lora"])), 3)
    model = load_model(folder / "qwen3")
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    save_pretrained(model, folder / "qwen3", load_tokenizer(folder / "qwen3"))
    config = read_run(folder / "run", FinetuneConfig)
    assert isinstance(config, FinetuneConfig)
    with pytest.raises(InputError, match="belongs to other weights than those of"):
        trainer(config).resume()


def test_each_command_resumes_its_own_runs(folder: Path, run_command: RunCommand) -> None:
    finetune(**{**settings(folder).as_dict(), "max_steps": 1})
    result = run_command("train.py", f"--output={folder / 'run'}", "--resume")
    assert result.code == 2
    assert "holds a run of `minigpt finetune`: continue it with that command" in result.err
    result = run_command("finetune", f"--output={folder / 'run'}", "--resume", "--max_steps=2")
    assert result.code == 0, result.err
    assert "resumed from" in result.out


# -- data --------------------------------------------------------------------------------------------------


def test_without_validation_data_a_part_is_held_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(settings(folder), val_data=Path(), val_fraction=0.25)
    data = read_data(config)
    assert (len(data.train), len(data.val)) == (6, 2)
    assert "no --val_data: 2 of 8 conversations" in capsys.readouterr().out


TALK = Conversation(
    (
        Turn("system", "说中文"),
        Turn("user", "天是什么颜色？"),
        Turn("assistant", "黑色。"),
        Turn("user", "地呢？"),
        Turn("assistant", "土黄。"),
    )
)


@pytest.fixture(scope="module")
def bpe() -> BpeTokenizer:
    return BpeTokenizer.train(["天是什么颜色？黑色。", "地呢？土黄。说中文"] * 3, vocab_size=280)


def test_byte_level_tokens_without_a_template_get_the_plain_form(bpe: BpeTokenizer) -> None:
    templated = bpe.with_chat_template(PLAIN_TEMPLATE)
    ids, said, cut = encode_chat_conversation(TALK, templated, 100)
    # the same with <|endoftext|> in the place of <sep>
    plain, is_answer, _ = encode_conversation(TALK, bpe, 100)
    end = bpe.eos_token_id
    assert [end if index == bpe.sep_token_id else index for index in plain.tolist()] == ids.tolist()
    assert said.tolist() == is_answer.tolist()
    assert not cut


def test_what_is_too_long_loses_its_oldest_questions(bpe: BpeTokenizer) -> None:
    templated = bpe.with_chat_template(PLAIN_TEMPLATE)
    whole, _, _ = encode_chat_conversation(TALK, templated, 100)
    ids, said, cut = encode_chat_conversation(TALK, templated, len(whole) - 1)
    shorter = dataclasses.replace(TALK, turns=(TALK.turns[0], *TALK.turns[3:]))
    expected, expected_said, _ = encode_chat_conversation(shorter, templated, 100)
    assert (ids.tolist(), said.tolist(), cut) == (expected.tolist(), expected_said.tolist(), True)
    ids, said, cut = encode_chat_conversation(shorter, templated, len(expected) - 2)
    assert (ids.tolist(), said.tolist()) == (expected[:-2].tolist(), expected_said[:-2].tolist())
    assert cut


def test_questions_and_answers_with_byte_level_tokens(folder: Path, bpe: BpeTokenizer) -> None:
    bpe.save(folder / "bpe")
    options: dict[str, Any] = {
        "train_data": folder / "train.jsonl",
        "val_data": folder / "val.jsonl",
        "output": folder / "new",
        "n_layer": 1,
        "n_embd": 16,
        "n_head": 2,
        "block_size": 64,
        "max_length": 64,
    }
    train(recipe="document", tokenizer=str(folder / "bpe"), max_steps=2, threads=1, **options)
    tokenizer = load_tokenizer(folder / "new" / "best")
    assert isinstance(tokenizer, BpeTokenizer)
    assert tokenizer.chat_template == PLAIN_TEMPLATE
    answer = minigpt.generate(
        load_model(folder / "new" / "best"), tokenizer, "天是什么颜色？", max_new_tokens=3
    )
    assert isinstance(answer, str)


def test_wordpiece_without_an_end_token_ends_turns_with_its_separator(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As published Chinese GPT-2s are: BertTokenizer, no eos_token. Training, folder and answers agree."""
    text = (folder / "train.jsonl").read_text(encoding="utf-8")
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({c for c in text if c.strip()})]
    base = folder / "bert"
    base.mkdir()
    (base / "vocab.txt").write_text("\n".join(entries), encoding="utf-8")
    (base / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "BertTokenizer", "do_lower_case": false}'
    )
    wordpiece = WordPieceTokenizer.from_folder(base)
    assert (wordpiece.eos_token_id, wordpiece.sep_token_id) == (None, 3)
    torch.manual_seed(0)
    model = FAMILIES["gpt"](len(entries))
    save_pretrained(model, folder / "base", wordpiece)
    options: dict[str, Any] = {
        "train_data": folder / "train.jsonl",
        "val_data": folder / "val.jsonl",
        "max_length": 32,
        "max_steps": 1,
        "threads": 1,
        "report_to": "none",
    }
    finetune(output=folder / "tuned", model=folder / "base", **options)
    assert "its sep_token '[SEP]' ends each question and each answer" in capsys.readouterr().err
    tuned = folder / "tuned" / "best"
    tokenizer = load_tokenizer(tuned)
    assert isinstance(tokenizer, WordPieceTokenizer)
    assert tokenizer.eos_token_id == tokenizer.sep_token_id == 3
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tuned / name).read_text())["eos_token_id"] == 3
    ids, said, _ = encode_chat_conversation(TALK, tokenizer, 100)
    plain, is_answer, _ = encode_conversation(TALK, wordpiece, 100)  # `train` takes the separator, too
    assert (ids.tolist(), said.tolist()) == (plain.tolist(), is_answer.tolist())
    assert [bool(mark) for index, mark in zip(ids, said) if index == 3] == [False, True, False, True]
    assert ends_of_answer(tokenizer) == [3]
    # from the folder, nothing is said again, and the ids stay the same
    finetune(output=folder / "again", model=tuned, **options)
    assert "sep_token" not in capsys.readouterr().err
    assert load_tokenizer(folder / "again" / "best") == tokenizer
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tuned)
    rendered = theirs.apply_chat_template(TALK.messages(), return_dict=False)
    assert rendered == ids.tolist()


# -- more tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, *FOREIGN])
@pytest.mark.parametrize("new_rows", ["mean", "zeros", "sampled"])
def test_new_rows_leave_the_old_logits(family: str, new_rows: Any) -> None:
    torch.manual_seed(0)
    model = {**FAMILIES, **FOREIGN}[family](20)
    before = logits(model)
    is_tied = model.lm_head.weight is next(model.parameters())
    resize_token_embeddings(model, 23, new_rows)
    with torch.inference_mode():
        after = model.eval()(torch.arange(12).view(2, 6) % 20)
    assert after.shape[-1] == model.config.vocab_size == 23
    assert torch.equal(after[..., :20], before)
    assert (model.lm_head.weight is next(model.parameters())) == is_tied
    embedding = next(model.parameters()).detach()
    if new_rows != "sampled":
        expected = embedding[:20].double().mean(0).float() if new_rows == "mean" else torch.zeros(24)
        assert torch.equal(embedding[20:], expected.expand(3, -1))
    else:
        assert len(torch.unique(embedding[20:], dim=0)) == 3
    with pytest.raises(InputError, match="they cannot become 5"):
        resize_token_embeddings(model, 5)


def test_sampled_rows_have_the_mean_and_covariance_of_the_old_ones() -> None:
    torch.manual_seed(1)
    model = FAMILIES["gpt"](50)
    old = next(model.parameters()).detach().double()
    resize_token_embeddings(model, 50 + 40_000, "sampled")
    new = next(model.parameters()).detach()[50:].double()
    deviation = old.std(dim=0)
    # With 40,000 draws, the error of a mean is 1/200 of the deviation; that of a covariance is similar.
    assert ((new.mean(0) - old.mean(0)) / deviation).abs().max() < 5 / 200
    scale = deviation[:, None] * deviation[None, :]
    assert ((torch.cov(new.T) - torch.cov(old.T, correction=0)) / scale).abs().max() < 5 / 200


@pytest.mark.parametrize("family", FAMILIES)
def test_characters_that_the_vocabulary_lacks(
    folder: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"question": "鲸是什么颜色？", "answer": "蓝鲸是蓝色。"}
    with (folder / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
    (warning,) = read_data(settings(folder, family)).warnings
    assert "--add_tokens from-data adds them" in warning
    finetune(**{**settings(folder, family).as_dict(), "add_tokens": "from-data", "max_steps": 1})
    printed = capsys.readouterr()
    assert "--add_tokens from-data adds them" not in printed.err  # they were added
    assert "add_tokens: 1 new tokens" in printed.out  # 蓝 is known, from 天蓝
    tokenizer = load_tokenizer(folder / "run" / "last")
    assert tokenizer.encode_text("鲸") == [load_tokenizer(folder / family).get_vocab_size()]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "run" / "last")
    assert theirs.config.vocab_size == tokenizer.get_vocab_size()
    ids = torch.tensor([tokenizer.encode_text("蓝鲸")])
    with torch.inference_mode():
        difference = theirs(ids).logits - load_model(folder / "run" / "last")(ids)
    assert difference.abs().max() < 1e-5


def test_words_as_tokens_of_a_byte_level_tokenizer(bpe: BpeTokenizer, tmp_path: Path) -> None:
    larger = bpe.with_tokens(["matplotlib", "颜色", "matplotlib"])
    size = bpe.get_vocab_size()
    assert larger.get_vocab_size() == size + 1 + (len(bpe.encode_text("颜色")) > 1)
    assert larger.encode_text("a matplotlib b")[-3:-1] != bpe.encode_text("a matplotlib b")[-3:-1]
    assert larger.encode_text("matplotlib") == [size]
    assert larger.decode(larger.encode_text("用matplotlib画")) == "用matplotlib画"
    larger.save(tmp_path)
    assert BpeTokenizer.from_folder(tmp_path).encode_text("matplotlib") == [size]


def test_words_as_tokens_where_the_configuration_lists_the_added_tokens(
    bpe: BpeTokenizer, tmp_path: Path
) -> None:
    """Qwen's folders are of this kind: transformers does not read the list in their tokenizer.json."""
    BpeTokenizer.train(["天是什么颜色？黑色。"] * 3, 280, kind="qwen2").save(tmp_path)
    added = {str(index): {"content": text, "special": True} for text, index in bpe.special_tokens.items()}
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    larger = BpeTokenizer.from_folder(tmp_path).with_tokens(["matplotlib"])
    larger.save(tmp_path / "larger")
    text = "a matplotlib b"
    assert larger.get_vocab_size() - 1 in larger.encode_text(text)
    assert BpeTokenizer.from_folder(tmp_path / "larger") == larger
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "larger")
    assert theirs(text)["input_ids"] == larger.encode_text(text)


def test_words_as_tokens_of_wordpiece(tmp_path: Path) -> None:
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "你", "low", "##er"]
    (tmp_path / "vocab.txt").write_text("\n".join(entries), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    larger = WordPieceTokenizer.from_folder(tmp_path).with_tokens(["鲸", "你"])
    assert larger.encode_text("你鲸 lower") == [2, 5, len(entries), 6, 7, 3]  # 鲸 was one token: [UNK]
    larger.save(tmp_path / "larger")
    assert WordPieceTokenizer.from_folder(tmp_path / "larger") == larger


def test_no_token_can_be_added_to_ids_with_gaps(tmp_path: Path) -> None:
    """The `tokenizers` library would give it the id of another token."""
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "你", "你", "low"]
    (tmp_path / "vocab.txt").write_text("\n".join(entries), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(InputError, match="it has 7 tokens, and the highest id is 7; no token can be added"):
        WordPieceTokenizer.from_folder(tmp_path).with_tokens(["鲸"])


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_settings_of_other_tools_stay(folder: Path, name: str, method: str) -> None:
    tokenizer = Tokenizer(folder / "vocab.json")
    torch.manual_seed(3)
    model = FOREIGN[name](tokenizer.get_vocab_size())
    save_pretrained(model, folder / name, tokenizer)
    finetune(**settings(folder, name, max_steps=4, **METHODS[method]).as_dict())
    adapter = folder / "run" / "last" if method == "lora" else None
    trained = load_model(folder / name if adapter else folder / "run" / "last", adapter=adapter)
    assert trained.config == model.config
    assert not torch.equal(logits(trained), logits(model))


# -- train --init_from -------------------------------------------------------------------------------------


def test_training_goes_on_from_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "book.txt").write_text("天地日月山水花草是什么颜色？" * 40, encoding="utf-8")
    result = train(
        init_from=folder / "gpt", text=folder / "book.txt", output=folder / "more", max_steps=6,
        block_size=16, learning_rate=1e-2, threads=1, device="cpu",
    )  # fmt: skip
    assert "recipe finetune: no --recipe was given" in capsys.readouterr().out
    lines = map(json.loads, (folder / "more" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    first = next(line["val_loss"] for line in lines if "val_loss" in line)
    assert result["val_loss"] < first - 0.1
    model = load_model(folder / "more" / "best")
    assert model.config == load_model(folder / "gpt").config


@pytest.mark.parametrize("size", ["3s", "1GFLOP"])
def test_a_size_chooses_the_number_of_steps(
    folder: Path, capsys: pytest.CaptureFixture[str], size: str
) -> None:
    options = {**settings(folder).as_dict(), "size": size, "max_steps": 0, "num_train_epochs": 1.0}
    result = finetune(**options)
    assert 1 <= result["steps"] <= 2  # eight conversations in batches of four
    assert "size" in capsys.readouterr().out
    with pytest.raises(InputError, match="--size small chooses a new model"):
        finetune(**{**options, "size": "small", "output": folder / "second"})


# -- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "missing"}, "missing does not exist"),
        ({"method": "freeze"}, "--method freeze needs --train_only"),
        ({"train_only": "head"}, "--method freeze needs --train_only, and only it has that"),
        ({"r": 4}, "--r belongs to --method lora: got --method full"),
        ({"use_dora": True}, "--use_dora belongs to --method lora"),
        ({"method": "lora", "target_modules": ("c_atn",)}, "unknown module in target_modules 'c_atn'"),
        ({"method": "lora", "add_tokens": "from-data"}, "an adapter adds no rows"),
        ({"method": "adapter", "add_tokens": "from-data"}, "an adapter adds no rows"),
        ({"method": "adapter", "r": 4}, "--r belongs to --method lora: got --method adapter"),
        ({"bottleneck_size": 4}, "--bottleneck_size belongs to --method adapter: got --method full"),
        ({"method": "ia3", "layers_to_transform": (0,)}, "belongs to --method lora or adapter: got --method"),
        ({"method": "ia3", "target_modules": ("c_atn",)}, "unknown module in target_modules 'c_atn'"),
        ({"method": "adapter", "bottleneck_size": 0}, "bottleneck_size must be from 1 to"),
        ({"method": "adapter", "layers_to_transform": (9,)}, "layers_to_transform names block 9: the model"),
        ({"method": "adapter", "parallel": "fsdp"}, "does not go with method=adapter"),
        ({"add_tokens": "words.txt"}, "must be from-data, or a text in UTF-8"),
        ({"n_layer": 3}, "--n_layer is for a new model"),
        ({"block_size": 64}, "reads 32 tokens"),
        ({"tokenizer": "vocab.json"}, "leave out --tokenizer"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"output": "", "overwrite": True}, "--overwrite would move .*: give another --output"),
        ({"method": "loar"}, "method"),
        ({"target_module": "c_attn"}, "did you mean 'target_modules'"),
    ],
)
def test_bad_options_are_one_line(folder: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        trainer(settings(folder, **{"model": "gpt", **values}))
    assert "\n" not in str(caught.value)
    assert not checkpoint.list_checkpoints(folder / "run")


def test_the_doctor_examines_a_fine_tuned_run(folder: Path, run_command: RunCommand) -> None:
    finetune(**{**settings(folder, **METHODS["lora"]).as_dict(), "max_steps": 2, "eval_steps": 1})
    result = run_command("doctor", folder / "run", "--language", "en")
    assert result.code == 0, result.err
    assert "the run began with given weights" in result.out
