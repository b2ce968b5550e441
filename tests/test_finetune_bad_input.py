"""`minigpt finetune` and commands with adapters refuse bad input: one line, exit code 2, nothing is lost."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

import minigpt
from minigpt.errors import InputError
from minigpt.finetuning.adapters import save_adapter
from minigpt.finetuning.bottleneck import BottleneckConfig
from minigpt.finetuning.ia3 import IA3Config
from minigpt.finetuning.layers import AdapterConfig, add_adapter
from minigpt.finetuning.lora import LoraConfig
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.tokenizer import Tokenizer
from minigpt.training.config import checked_config, read_recipe, read_run
from minigpt.training.finetune_config import FinetuneConfig
from minigpt.training.run import finetune
from tests.commands import RunCommand
from tests.runs import write_data

ADAPTERS: dict[str, AdapterConfig] = {
    "lora": LoraConfig(r=3),
    "adapter": BottleneckConfig(3),
    "ia3": IA3Config(),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make data, two models (base and wider), int8 (the base in int8), and an adapter of each kind."""
    folder = tmp_path_factory.mktemp("bad")
    write_data(folder)
    tokenizer = Tokenizer(folder / "vocab.json")
    for name, width in (("base", 24), ("wider", 36)):
        model = GPTLMHeadModel(GPTConfig(width, 3, 2, 0.0, 32, tokenizer.get_vocab_size()))
        minigpt.save_pretrained(model, folder / name, tokenizer)
    for name, config in ADAPTERS.items():
        base = minigpt.load_model(folder / "base")
        add_adapter(base, config)
        save_adapter(base, config, folder / name, base=str(folder / "base"))
    from minigpt.commands.quantize import Options, main

    main(Options(model=folder / "base", output=folder / "int8"))
    return folder


def refused(done: Any, message: str) -> None:
    assert (done.code, len(done.err.splitlines())) == (2, 1), done
    assert message in done.err


# -- adapters that do not fit ------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["generate", "chat", "eval", "merge"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_for_another_model(place: Path, run_command: RunCommand, verb: str, kind: str) -> None:
    flags: dict[str, tuple[object, ...]] = {
        "generate": ("--question", "天是什么颜色？"),
        "chat": (),
        "eval": ("--data", place / "val.jsonl"),
        "merge": ("--output", place / "merged"),
    }
    done = run_command(verb, "--model", place / "wider", "--adapter", place / kind, *flags[verb])
    refused(
        done, "adapter_model.safetensors does not fit the model; unfit: base_model.model.transformer.h.0."
    )
    assert not (place / "merged").exists()


@pytest.mark.parametrize(
    ("kind", "old", "new", "message"),
    [
        ("lora", '"r": 3', '"r": 4', "says r=4, but adapter_model.safetensors has another rank"),
        ("adapter", '_size": 3', '_size": 4', "says bottleneck_size=4, but adapter_model.safetensors"),
        ("lora", "c_attn", "c_atn", "does not fit the model; "),
        ("ia3", '"mlp.c_proj"\n', '"mlp.c_fc"\n', "does not fit the model"),
        ("adapter", "BOTTLENECK", "BOTTLENEK", "peft_type='BOTTLENEK'; known are LORA, IA3, BOTTLENECK"),
        ("ia3", '"feedforward_modules": [', '"feedforward_modules": [1,', "feedforward_modules must name"),
    ],
)  # fmt: skip
def test_an_adapter_s_file_that_was_changed(
    place: Path, run_command: RunCommand, tmp_path: Path, kind: str, old: str, new: str, message: str
) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((place / kind / name).read_bytes())
    text = (tmp_path / "adapter_config.json").read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "adapter_config.json").write_text(text.replace(old, new), encoding="utf-8")
    flags = ("--model", place / "base", "--adapter", tmp_path, "--question", "天")
    refused(run_command("generate", *flags), message)


# -- options and data --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--method adapter --r 4", "--r belongs to --method lora: got --method adapter"),
        ("--method full --bottleneck_size 4", "--bottleneck_size belongs to --method adapter"),
        ("--method adapter --bottleneck_size 0", "bottleneck_size must be from 1 to 100000"),
        ("--method adapter --layers_to_transform 2", "layers_to_transform names block 2: the model has"),
        ("--method adapter --modules_to_save hood", "unknown module in modules_to_save 'hood'"),
        ("--method lora --target_modules c_atn", "unknown module in target_modules 'c_atn'"),
        ("--method lora --target_modules .*none.*", "target_modules='.*none.*' chooses no layer"),
        ("--method lora --target_modules (", "target_modules='(' is no regular expression"),
        ("--method lora --target_modules (a|b)*!", "target_modules='(a|b)*!' could match a name in too many"),
        ("--method ia3 --target_modules q_proj", "unknown module in target_modules 'q_proj'"),
        ("--method lora --lora_dropout 1", "lora_dropout must be from 0 to 0.999"),
        ("--method lora --base_precision int2", "int2"),
        ("--base_precision int8", "--base_precision belongs to --method lora, adapter, ia3"),
        ("--method lora --base_precision int8 --modules_to_save lm_head", "lm_head is quantised"),
        ("--method lora --model int8 --modules_to_save lm_head", "modules_to_save: lm_head is quantised"),
        ("--model int8", "is quantised, so its weights cannot be trained"),
        ("--keyword_weight 红", "keyword_weight must be keywords with weights of at least 0"),
        ("--keyword_weight 鲸:2", "the vocabulary lacks '鲸' of the keyword '鲸'"),
        ("--keyword_weight 红:2 --task dpo", "--keyword_weight belongs to --task sft"),
        ("--pretraining_epochs 3", "--pretraining_epochs belongs to --task classification"),
        ("--whole_words jieba", "--whole_words belongs to --task mlm"),
        ("--method lora --model lora", "is an adapter, not a model. Merge them first: minigpt merge --model"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(
    place: Path, run_command: RunCommand, tmp_path: Path, flags: str, message: str
) -> None:
    given = flags.split()
    if "--model" in given:
        given[given.index("--model") + 1] = str(place / given[given.index("--model") + 1])
    else:
        given += ["--model", str(place / "base")]
    files = ("--train_data", place / "train.jsonl", "--val_data", place / "val.jsonl")
    done = run_command("finetune", *given, *files, "--output", tmp_path / "run", "--device", "cpu")
    refused(done, message)
    assert not (tmp_path / "run").exists()


# -- runs that are continued -------------------------------------------------------------------------------


def run_of(place: Path, output: Path, **values: Any) -> dict[str, Any]:
    """Do a run of one step, or of the given number of steps."""
    given: dict[str, Any] = {
        "model": place / "base",
        "train_data": place / "train.jsonl",
        "val_data": place / "val.jsonl",
    }
    given |= {"device": "cpu", "precision": "float32", "threads": 1, "report_to": "none", "max_steps": 1}
    return finetune(**({} if values.get("resume") else given) | {"output": output, **values})


@pytest.mark.parametrize(
    ("begun", "changed", "message"),
    [
        ({"method": "adapter"}, {"bottleneck_size": 3}, "with --bottleneck_size 64, got --bottleneck_size 3"),
        (
            {"method": "adapter"},
            {"layers_to_transform": (0,)},
            "with no --layers_to_transform, got --layers_",
        ),
        ({"method": "lora"}, {"r": 3}, "was made with --r 8, got --r 3: --resume keeps what is trained"),
        ({"method": "lora"}, {"use_dora": True}, "was made with no --use_dora, got --use_dora"),
        ({"method": "ia3"}, {"method": "lora"}, "was made with --method ia3, got --method lora"),
        ({"method": "ia3"}, {"base_precision": "int8"}, "float32, got --base_precision int8"),
        ({"method": "freeze", "train_only": "head"}, {"train_only": "mlp"}, "head, got --train_only mlp"),
        ({}, {"teacher": "base"}, "was made without --teacher"),
        ({"task": "grpo", "max_completion_length": 2}, {"beta": 0.1}, "without a reference model (--beta 0)"),
    ],
)
def test_a_resume_does_not_change_what_is_trained(
    place: Path, tmp_path: Path, begun: dict[str, Any], changed: dict[str, Any], message: str
) -> None:
    if "teacher" in changed:
        changed = {"teacher": place / "base"}
    run_of(place, tmp_path / "run", **begun)
    with pytest.raises(InputError) as error:
        run_of(place, tmp_path / "run", resume=True, max_steps=2, **changed)
    assert message in str(error.value)
    assert run_of(place, tmp_path / "run", resume=True, max_steps=2)["steps"] == 2


def test_the_best_loss_is_that_of_the_loss_that_is_measured_now(place: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": f"{a}？", "chosen": "红", "rejected": "蓝"} for a in "天地草海"]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in pairs), encoding="utf-8")
    begun = {"task": "dpo", "train_data": data, "val_data": data}
    first = run_of(place, tmp_path / "run", **begun)
    assert first["val_loss"] < math.log(2) * 1.01
    other = run_of(place, tmp_path / "run", resume=True, max_steps=2, loss_type="orpo")
    assert other["best_step"] == 2  # a loss of ORPO includes the cross-entropy, so it is larger
    assert other["val_loss"] > first["val_loss"]


# -- data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["sft", "grpo", "dpo"])
def test_one_record_cannot_be_divided(
    place: Path, run_command: RunCommand, tmp_path: Path, task: str
) -> None:
    record = {"question": "天？", "answer": "蓝", "prompt": "天？", "chosen": "蓝", "rejected": "红"}
    (tmp_path / "one.jsonl").write_text(json.dumps(record), encoding="utf-8")
    files = ("--model", place / "base", "--train_data", tmp_path / "one.jsonl", "--output", tmp_path / "run")
    done = run_command("finetune", "--task", task, *files)
    refused(done, "cannot be divided: give --val_data FILE, another --val_fraction, or more of them")


def test_weights_that_are_all_zero_and_weights_that_do_not_count(
    place: Path, run_command: RunCommand, tmp_path: Path
) -> None:
    path, val = tmp_path / "data.jsonl", place / "val.jsonl"
    record = {"question": "天？", "answer": "蓝", "weight": 0}
    path.write_text(json.dumps(record), encoding="utf-8")
    flags = ("--model", place / "base", "--train_data", path, "--output", tmp_path / "run")
    done = run_command("finetune", *flags, "--val_data", val)
    refused(done, "data.jsonl: the `weight` of every record is 0: there is nothing to learn")
    assert not (tmp_path / "run").exists()
    path.write_text(json.dumps({**record, "chosen": "蓝", "rejected": "红"}), encoding="utf-8")
    for task, other in (("grpo", val), ("dpo", path)):
        done = run_command("finetune", "--task", task, *flags, "--val_data", other, "--dry_run")
        assert done.code == 0, done.err
        assert "data.jsonl: records have a `weight`, which counts in --task sft only" in done.err


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"question": "天？", "answer": "蓝", "weight": -1}, "`weight` is no number from 0 to 1e6"),
        ({"question": "天？", "answer": "蓝", "weight": [2]}, "`weight` is no number from 0 to 1e6"),
        ({"question": "天？", "answer": "蓝", "weight": True}, "`weight` is no number from 0 to 1e6"),
        ({"question": "天？", "answer": " "}, "`answer` is empty"),
        (
            {"messages": [{"role": "user", "content": "天？"}, {"role": "assistant", "content": ""}]},
            "a turn is empty: turn 2",
        ),
        (
            {"messages": [{"role": "user", "content": "天？"}]},
            "no turn is an assistant's: there is no answer",
        ),
    ],
)
def test_a_record_that_is_wrong_is_named_and_the_others_stay(
    place: Path, run_command: RunCommand, tmp_path: Path, record: dict[str, Any], reason: str
) -> None:
    path = tmp_path / "data.jsonl"
    good = (place / "train.jsonl").read_text(encoding="utf-8")
    path.write_text(good + json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    flags = ("--model", place / "base", "--train_data", path, "--val_data", place / "val.jsonl")
    more = ("--output", tmp_path / "run", "--max_steps", 1, "--device", "cpu", "--threads", 1)
    refused(run_command("finetune", *flags, *more, "--strict"), f"data.jsonl:9: {reason}")
    assert not (tmp_path / "run").exists()
    done = run_command("finetune", *flags, *more)
    assert done.code == 0, done.err
    assert f"skipped 1: {reason.partition(':')[0]}" in done.err
    assert "8 pairs to learn from" in done.out


# -- configurations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_steps": 0, "num_train_epochs": 0}, "nothing to do: both max_steps and num_train_epochs are 0"),
        ({"val_text": "v.txt"}, "--val_text belongs to --text"),
        ({"text": "a.txt", "output": "o", "shards": "o"}, "--shards o is the output folder"),
        ({"add_tokens": "w.txt"}, "--add_tokens needs a model that has tokens"),
        ({"init_from": "m", "tokenizer": "bpe"}, "leave out --tokenizer"),
        (
            {"max_length": 100, "block_size": 50},
            "pairs of max_length=100 tokens do not fit into block_size=50",
        ),
        ({"family": "qwen3"}, "family qwen3 has no dropout: got dropout=0.1; it must be 0.0 here"),
        ({"parallel": "fsdp", "optimizer": "muon"}, "does not go with optimizer=muon (it needs whole"),
        ({"parallel": "fsdp", "save_async": True}, "does not go with save_async"),
        ({"alpha": 0.3}, "--alpha belongs to --teacher FOLDER"),
        ({"temperature": 2.0}, "--temperature belongs to --teacher FOLDER"),
        ({"teacher": "t", "parallel": "fsdp"}, "--teacher does not go with parallel=fsdp"),
        ({"resume": True, "overwrite": True}, "--resume continues a run, --overwrite starts anew"),
        ({"n_layer": "two"}, "options: n_layer"),
        ({"n_layers": 2}, "options: unknown key 'n_layers'; did you mean 'n_layer'?"),
    ],
)
def test_options_of_training_that_contradict_each_other(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        checked_config(values, "options")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keyword_weight": "a:2", "task": "mlm", "text": "a"}, "--keyword_weight belongs to --task sft"),
        ({"r": 4, "method": "ia3"}, "--r belongs to --method lora: got --method ia3"),
        (
            {"task": "classification", "method": "lora", "base_precision": "int8"},
            "--base_precision does not go",
        ),
        ({"method": "lora", "add_tokens": "w.txt"}, "--add_tokens needs --method full or freeze"),
        ({"method": "lora", "parallel": "fsdp"}, "parallel=fsdp does not go with method=lora"),
        ({"reward": ["length"]}, "--reward belongs to --task grpo: got --task sft"),
        (
            {"task": "grpo", "text": "a.txt"},
            "--task grpo answers prompts: give --train_data instead of --text",
        ),
        ({"task": "grpo", "reward": ["regex"]}, "--reward regex needs --reward_regex, and only it has that"),
        ({"task": "grpo", "reward_length": 9}, "--reward length needs --reward_length, and only it has that"),
        ({"task": "grpo", "compile": True}, "at every step and does not go with --compile"),
        ({"task": "grpo", "parallel": "fsdp"}, "at every step and does not go with parallel=fsdp"),
        ({"task": "grpo", "loss_on": "all"}, "leave --loss_on at answer"),
        ({"label_smoothing": 0.1}, "--label_smoothing belongs to --task dpo: got --task sft"),
        ({"beta": 0.2}, "--beta belongs to --task dpo or grpo: got --task sft"),
        (
            {"task": "dpo", "loss_type": "dapo"},
            "--task dpo has the loss types sigmoid, ipo, simpo, orpo: got dapo",
        ),
        ({"task": "dpo", "beta": 0.0}, "--task dpo needs a --beta above 0"),
        ({"task": "dpo", "text": "a.txt"}, "--task dpo learns from pairs of answers"),
        ({"task": "dpo", "loss_on": "all"}, "--task dpo compares answers: leave --loss_on at answer"),
        (
            {"task": "dpo", "loss_type": "ipo", "label_smoothing": 0.1},
            "--label_smoothing belongs to --loss_type",
        ),
        ({"task": "dpo", "simpo_gamma": 0.1}, "--simpo_gamma belongs to --loss_type simpo: got sigmoid"),
    ],
)
def test_options_of_finetuning_that_contradict_each_other(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        checked_config(FinetuneConfig.with_task_defaults(values), "options", FinetuneConfig)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('base = "nothing"', "base = 'nothing': expected one of "),
        ("max_steps = ", "is not valid TOML: "),
        ("a = " + "[" * 9999, "is not valid TOML: it is nested too deeply"),
        ("max_steps = true", "max_steps = True: expected int"),
        (None, "does not exist; the built-in ones are "),
    ],
    ids=["base", "TOML", "depth", "kind", "absent"],
)
def test_recipes_that_cannot_be_read(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "r.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=rf"r\.toml.*{message}"):
        read_recipe(str(path))


def test_a_recipe_or_a_run_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown recipe 'qa-cpus'; did you mean 'qa-cpu'"):
        read_recipe("qa-cpus")
    with pytest.raises(InputError, match=r"nothing to resume: .*run\.json does not exist"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text('{"config": 7}')
    with pytest.raises(InputError, match=r"run\.json is damaged: copy .*training_state\.json over it"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text('{"config": {"task": "sft"}}')
    with pytest.raises(InputError, match="holds a run of `minigpt finetune`: continue it with that command"):
        read_run(tmp_path)
