"""Adapters in commands: beside a model, merged into it, errors. parity/test_peft.py compares with PEFT."""

import json
import math
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import minigpt
from minigpt.data.batches import encode_conversations
from minigpt.data.conversation import conversation_of_pair
from minigpt.errors import InputError
from minigpt.finetuning.adapters import adapter_tensors, config_of, load_adapter, save_adapter
from minigpt.finetuning.ia3 import IA3Config
from minigpt.finetuning.layers import AdapterConfig, add_adapter
from minigpt.finetuning.lora import (
    LoraConfig,
    adapter_names,
    add_weighted_adapter,
    apply_lora,
    disable_adapter,
    lora_layers,
    merge_and_unload,
    set_adapter,
)
from minigpt.generation.native import NativeRunner, runner_for
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.storage.files import atomic_folder
from minigpt.tokenizer import Tokenizer
from minigpt.weights.quantized import set_precision
from tests.commands import RunCommand
from tests.marks import compiled
from tests.talking import learn_by_heart

BEFORE = {"天？": "天是红的", "地？": "地是蓝的"}
AFTER = {"天？": "天是蓝的", "地？": "地是红的"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make `base`, which knows BEFORE; `adapter`, with which it knows AFTER; and `int8`, the base in int8."""
    folder = tmp_path_factory.mktemp("adapters")
    learn_by_heart(BEFORE, folder / "base")
    model, tokenizer = minigpt.load_model(folder / "base"), minigpt.load_tokenizer(folder / "base")
    assert isinstance(tokenizer, Tokenizer)
    config = LoraConfig(r=4, lora_alpha=16)
    torch.manual_seed(0)
    apply_lora(model, config)
    pairs = [conversation_of_pair(question, answer, 0, "") for question, answer in AFTER.items()]
    batch = encode_conversations(pairs, tokenizer, 20).batch(np.arange(len(pairs)))
    optimizer = torch.optim.AdamW(adapter_tensors(model).values(), lr=1e-2)
    for _ in range(100):
        loss = F.cross_entropy(model(batch.input_ids)[batch.answer_mask], batch.targets[batch.answer_mask])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    save_adapter(model, config, folder / "adapter", base=str(folder / "base"))
    return folder


@pytest.fixture(scope="module")
def int8(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from minigpt.commands.quantize import Options, main

    main(Options(model=folders / "base", output=folders / "int8"))
    return folders / "int8"


def copy_of(folders: Path, goal: Path) -> Path:
    shutil.copytree(folders / "adapter", goal)
    return goal


def tiny(**values: Any) -> GPTLMHeadModel:
    return GPTLMHeadModel(GPTConfig(24, 3, 2, 0.0, 16, 30, **values)).eval()


# -- commands -----------------------------------------------------------------------------------------------


def test_generate_chat_and_eval_take_an_adapter(
    folders: Path, run_command: RunCommand, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"question": question, "answer": answer} for question, answer in AFTER.items()]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = ("--model", folders / "base", "--adapter", folders / "adapter", "--device", "cpu")
    asked, answers = "\n".join(AFTER).encode(), "\n".join(AFTER.values()) + "\n"
    said = f"note: {folders / 'adapter'} is merged into the weights\n"
    for verb in ("generate", "chat"):
        done = run_command(verb, *flags, stdin=asked)
        assert done == (0, answers, said)
        assert run_command(verb, *flags[:2], "--device", "cpu", stdin=asked).out == answers.translate(
            {ord("红"): "蓝", ord("蓝"): "红"}
        )
    done = run_command("eval", *flags, "--data", data, "--json", "--precision", "float32", "int8")
    assert (done.code, done.err) == (0, said)
    found = json.loads(done.out.splitlines()[-1])
    assert [found["precisions"][name]["exact_match"] for name in ("float32", "int8")] == [1.0, 1.0]


def test_beside_int8_weights_it_stays(folders: Path, int8: Path, run_command: RunCommand) -> None:
    flags = ("--model", int8, "--adapter", folders / "adapter", "--device", "cpu")
    done = run_command("generate", *flags, stdin="\n".join(AFTER).encode())
    said = f"note: {folders / 'adapter'} stays beside the int8 weights: PyTorch computes it, slowly\n"
    assert done == (0, "\n".join(AFTER.values()) + "\n", said)


def test_a_model_that_is_an_adapter_gets_commands_that_work(
    folders: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = copy_of(folders, tmp_path / "my run" / "best")
    for given in (adapter, adapter.parent):  # a run's folder, too
        refused = run_command("generate", "--model", given, "--question", "天？")
        assert (refused.code, refused.out, len(refused.err.splitlines())) == (2, "", 1)
        assert f"{adapter} is an adapter, not a model. Merge them first: " in refused.err
    said = refused.err.split("an adapter, not a model. ")[1]
    merge, beside = said.strip().split("Merge them first: ")[1].split("; `minigpt generate`")
    advice = beside.split(" take ")[1].removesuffix(" as they are")
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"question": "天？", "answer": "天是蓝的"}\n' * 9, encoding="utf-8")
    others = {  # verbs without --adapter say the same
        "quantize": ("--model", adapter, "--output", "small"),
        "convert": ("--model", adapter, "--output", "small.html"),
        "finetune": ("--model", adapter, "--train_data", data, "--output", "more"),
        "train": ("--init_from", adapter, "--train_data", data, "--val_data", data, "--output", "more"),
    }
    for verb, flags in others.items():
        refused = run_command(verb, *flags)
        assert (refused.code, refused.err.splitlines()[-1].split("not a model. ")[1]) == (2, said.strip())
    done = run_command("generate", *shlex.split(advice), "--question", "天？")
    assert (done.code, done.out) == (0, "天是蓝的\n")
    program, verb, *arguments = shlex.split(merge)
    assert (program, verb) == ("minigpt", "merge")
    assert run_command(verb, *arguments).code == 0
    done = run_command("generate", "--model", arguments[-1], "--question", "天？")
    assert (done.code, done.out) == (0, "天是蓝的\n")


def test_merge_keeps_the_precision_and_an_empty_folder(
    folders: Path, run_command: RunCommand, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    flags = ("--model", folders / "base", "--output", half, "--precision", "float16")
    assert run_command("quantize", *flags).code == 0
    (tmp_path / "merged").mkdir()
    done = run_command(
        *("merge", "--model", half, "--adapter", folders / "adapter"),
        *("--output", tmp_path / "merged", "--json"),
    )
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out.splitlines()[-1])["dtype"] == "float16"
    assert json.loads((tmp_path / "merged" / "config.json").read_bytes())["dtype"] == "float16"
    exact = minigpt.load_model(folders / "base", adapter=folders / "adapter")
    found = minigpt.load_model(tmp_path / "merged")
    pairs = zip((one.detach() for one in exact.parameters()), found.parameters())
    for before, after in pairs:
        # two roundings: of the base's weight, and of the sum; each by half of 2**-10 of the value at most
        torch.testing.assert_close(
            after.detach(), before, rtol=2**-10, atol=2**-10 * float(before.abs().max())
        )


@pytest.mark.parametrize("flag", ["--adapter", "--model", "--output"])
def test_merge_refuses_in_one_line(
    flag: str, folders: Path, int8: Path, run_command: RunCommand, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    other = tmp_path / "other"
    minigpt.save_pretrained(tiny(), other)
    refusals = {
        "--adapter": {
            tmp_path / "nowhere": "nowhere does not exist: give a folder with adapter_config.json",
            folders
            / "base": "is a model, not an adapter (it has no adapter_config.json): give it as --model",
            tmp_path: "is no adapter's folder: it has no adapter_config.json",
        },
        "--model": {
            tmp_path / "nowhere": "nowhere does not exist",
            int8: "is quantised: give the folder that it was made from",
            folders / "adapter": "is an adapter, not a model",
            other: "does not fit the model; unfit: base_model.model.transformer.h.0.attn.c_attn.lora_A.",
        },
        "--output": {
            tmp_path / "full": "exists and is not empty: choose another folder with --output",
            tmp_path / "full" / "file": "exists and is not empty",
        },
    }
    for value, message in refusals[flag].items():
        given = {
            "--model": folders / "base",
            "--adapter": folders / "adapter",
            "--output": tmp_path / "merged",
        }
        given[flag] = value
        refused = run_command("merge", *(part for pair in given.items() for part in pair))
        assert (refused.code, refused.out, len(refused.err.splitlines())) == (2, "", 1), refused
        assert message in refused.err
        assert not (tmp_path / "merged").exists()


# -- folders ------------------------------------------------------------------------------------------------


def test_a_manifest_is_verified(folders: Path, tmp_path: Path) -> None:
    goal = tmp_path / "adapter"

    def fill(folder: Path) -> None:
        shutil.copytree(folders / "adapter", folder, dirs_exist_ok=True)

    atomic_folder(goal, fill)
    minigpt.load_model(folders / "base", adapter=goal)
    path = goal / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"adapter_model\.safetensors does not match its checksum"):
        minigpt.load_model(folders / "base", adapter=goal)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    model = tiny()
    apply_lora(model, LoraConfig())
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write .*adapter_config\.json: "):
        save_adapter(model, LoraConfig(), tmp_path / "file")


def test_names_that_no_layer_has_are_passed_over_as_in_peft_unless_none_is_left(
    folders: Path, tmp_path: Path
) -> None:
    adapter = copy_of(folders, tmp_path / "adapter")
    values = json.loads((adapter / "adapter_config.json").read_bytes())
    values["target_modules"] += ["q_proj", "query"]
    (adapter / "adapter_config.json").write_text(json.dumps(values), encoding="utf-8")
    assert minigpt.load_model(folders / "base", adapter=adapter)
    values["target_modules"] = ["q_proj"]
    (adapter / "adapter_config.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(
        InputError, match=r"adapter_config\.json does not fit the model: unknown module .*'q_proj'"
    ):
        minigpt.load_model(folders / "base", adapter=adapter)


# -- models -------------------------------------------------------------------------------------------------


@compiled
def test_a_merged_model_runs_in_c(folders: Path) -> None:
    model = minigpt.load_model(folders / "base", adapter=folders / "adapter")
    assert isinstance(runner_for(model), NativeRunner)
    assert isinstance(runner_for(set_precision(model, "int8")), NativeRunner)


def test_loading_draws_no_numbers_and_drops_no_inputs(folders: Path, tmp_path: Path) -> None:
    adapter = copy_of(folders, tmp_path / "adapter")
    text = (adapter / "adapter_config.json").read_text(encoding="utf-8")
    new = text.replace('"lora_dropout": 0.0', '"lora_dropout": 0.5')
    (adapter / "adapter_config.json").write_text(new, encoding="utf-8")
    before = torch.get_rng_state()
    model, ids = minigpt.load_model(folders / "base", adapter=[adapter]), torch.tensor([[3, 4, 5]])
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        assert torch.equal(model(ids), model(ids))
        model.train()
        assert not torch.equal(model(ids), model(ids))


def test_several_adapters_have_names(folders: Path, tmp_path: Path) -> None:
    other = copy_of(folders, tmp_path / "adapter")
    named = {"one": folders / "adapter", "two": other}
    model = minigpt.load_model(folders / "base", adapter=named)
    assert adapter_names(model) == {"one": True, "two": False}
    with pytest.raises(InputError, match="the model has an adapter 'adapter' already: give this one another"):
        minigpt.load_model(folders / "base", adapter=[folders / "adapter", other])
    with pytest.raises(InputError, match="unknown adapter 'three'; "):
        set_adapter(model, ["one", "three"])
    assert adapter_names(model) == {"one": True, "two": False}
    with pytest.raises(InputError, match="the model has adapters beside its weights: merge_and_unload them"):
        minigpt.save_pretrained(model, tmp_path / "model")
    assert adapter_names(minigpt.load_model(folders / "base", adapter=[])) == {}


def test_only_active_adapters_learn() -> None:
    model = tiny()
    apply_lora(model, LoraConfig(r=2), "a")
    apply_lora(model, LoraConfig(r=2, modules_to_save=("ln_f",)), "b")

    def trained() -> set[str]:
        trained = {id(one) for one in model.parameters() if one.requires_grad}
        of = {name: {id(one) for one in adapter_tensors(model, name).values()} for name in ("a", "b")}
        assert trained <= of["a"] | of["b"]
        return {name for name, ids in of.items() if ids <= trained}

    assert trained() == {"b"}
    set_adapter(model, "a")
    assert trained() == {"a"}
    set_adapter(model, ["a", "b"])
    assert trained() == {"a", "b"}


@torch.no_grad()
def test_a_module_that_is_trained_whole_is_switched_too() -> None:
    model, ids = tiny(), torch.tensor([[3, 4, 5]])
    plain = model(ids)
    for adapter in ("a", "b"):
        apply_lora(model, LoraConfig(r=2, modules_to_save=("ln_f",)), adapter)
        model.transformer.ln_f.weight.add_(1 if adapter == "a" else 2)
    seen = []
    for adapter in ("a", "b", "a"):
        set_adapter(model, adapter)
        seen.append(model(ids))
        with disable_adapter(model):
            assert torch.equal(model(ids), plain)
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
    with pytest.raises(InputError, match=r"the adapters a and b both replace transformer\.ln_f: take one"):
        set_adapter(model, ["a", "b"])
    assert torch.equal(merge_and_unload(model)(ids), seen[0])
    assert not any(name.endswith("adapters") for name, _ in model.named_modules())


@pytest.mark.parametrize("values", [{"target_modules": ("lm_head",)}, {"modules_to_save": ("lm_head",)}])
@torch.no_grad()
def test_an_adapter_of_a_tied_head_leaves_the_embedding_alone(values: dict[str, Any]) -> None:
    model, ids = tiny(), torch.tensor([[3, 4, 5]])
    table = model.transformer.wte.weight.clone()
    apply_lora(model, LoraConfig(r=2, **values))
    for tensor in adapter_tensors(model).values():
        tensor.add_(torch.randn(tensor.shape))
    beside = model(ids)
    merged = merge_and_unload(model)(ids)
    torch.testing.assert_close(merged, beside, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.transformer.wte.weight, table)
    assert not torch.equal(model.lm_head.weight, table)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"target_modules": ("c_fc",)}, {"modules_to_save": ("mlp",)}, "two adapters change it"),
        ({"modules_to_save": ("h.0.mlp",)}, {"target_modules": ("c_fc",)}, "two adapters change it"),
        ({"modules_to_save": ("h.0.mlp",)}, {"modules_to_save": ("h.0.mlp.c_fc",)}, "two adapters change it"),
    ],
)
def test_adapters_that_contradict_each_other(
    first: dict[str, Any], second: dict[str, Any], message: str
) -> None:
    model = tiny()
    plain = {"target_modules": ("c_attn",)}
    apply_lora(model, LoraConfig(**{**plain, **first}), "a")
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(InputError, match=message):
        apply_lora(model, LoraConfig(**{**plain, **second}), "b")
    assert [name for name, _ in model.named_modules()] == before


def test_what_cannot_be_added_or_weighted() -> None:
    model = tiny()
    apply_lora(model, LoraConfig(r=2), "a")
    apply_lora(model, LoraConfig(r=3), "b")
    apply_lora(model, LoraConfig(r=2, use_dora=True), "c")
    with pytest.raises(InputError, match="the adapters must have one rank: got 2, 3"):
        add_weighted_adapter(model, ["a", "b"], [1, 1], "new")
    with pytest.raises(InputError, match="adapters with use_dora cannot be added: take one of a, c"):
        set_adapter(model, ["a", "c"])
    with pytest.raises(InputError, match="adapters with use_dora or modules_to_save cannot be weighted"):
        add_weighted_adapter(model, ["c"], [1], "new")
    with pytest.raises(InputError, match="each adapter needs a weight: got 2 adapters, 1 weights"):
        add_weighted_adapter(model, ["a", "b"], [1], "new")
    with pytest.raises(InputError, match="the model has an adapter 'a' already"):
        add_weighted_adapter(model, ["a"], [1], "a")
    assert adapter_names(model) == {"a": False, "b": False, "c": True}


def test_what_quantised_weights_cannot_have(folders: Path, int8: Path) -> None:
    model = minigpt.load_model(int8)
    with pytest.raises(
        InputError, match="modules_to_save: lm_head is quantised: take the model's unquantised"
    ):
        apply_lora(model, LoraConfig(modules_to_save=("lm_head",)))
    four = set_precision(minigpt.load_model(folders / "base"), "int4")
    with pytest.raises(InputError, match="use_dora needs weights of more than 4 bits: take int8"):
        apply_lora(four, LoraConfig(use_dora=True))
    for one in (model, four):
        assert not list(lora_layers(one))
    apply_lora(model, LoraConfig(use_dora=True, modules_to_save=("ln_f",)))
    ids, plain = torch.tensor([[3, 4, 5]]), minigpt.load_model(int8)
    # the length of each row is what it was: DoRA begins with nothing changed
    torch.testing.assert_close(model(ids), plain(ids), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_quantised_head_may_have_an_adapter(int8: Path, folders: Path, tmp_path: Path) -> None:
    model, config, ids = (
        minigpt.load_model(folders / "base"),
        LoraConfig(target_modules=("lm_head",)),
        [[3, 4]],
    )
    apply_lora(model, config)
    for tensor in adapter_tensors(model).values():
        tensor.add_(torch.randn(tensor.shape))
    save_adapter(model, config, tmp_path)
    beside = set_precision(minigpt.load_model(int8, adapter=tmp_path), None)
    hidden = beside.base_model(torch.tensor(ids))
    added = hidden @ next(lora_layers(model))[1].delta().t()
    expected = minigpt.load_model(int8).lm_head(hidden) + added
    torch.testing.assert_close(beside(torch.tensor(ids)), expected, rtol=1e-5, atol=1e-5)


def test_a_second_load_needs_a_name(folders: Path) -> None:
    model = minigpt.load_model(folders / "base")
    load_adapter(model, folders / "adapter")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(InputError, match="the model has an adapter 'default' already"):
        load_adapter(model, folders / "adapter")
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize(
    ("value", "said"), [(math.inf, "holds NaN or infinity"), (1e300, "holds values beyond 3.40282e+38")]
)
def test_values_that_float32_cannot_hold_are_refused(tmp_path: Path, value: float, said: str) -> None:
    model, config = tiny(), LoraConfig()
    apply_lora(model, config)
    save_adapter(model, config, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    weights = {name: tensor.double() for name, tensor in load_file(path).items()}
    name = next(iter(weights))
    weights[name][0, 0] = value
    save_file(weights, path)
    (tmp_path / "manifest.json").unlink(missing_ok=True)
    with pytest.raises(InputError, match=re.escape(f"{path}: {name} {said}")):
        load_adapter(tiny(), tmp_path)


# -- adapter_config.json -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "VERA"}, "peft_type='VERA'; known are LORA, IA3, BOTTLENECK"),
        ({"corpus": "x"}, "corpus='x' is not known here"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a list of names: got 'lm_head'"),
        ({"modules_to_save": [1]}, "modules_to_save must be a list of names: got [1]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the model's own weights, too"),
        ({"init_lora_weights": ["gaussian"]}, "init_lora_weights=['gaussian'] changes"),
        ({"target_modules": None}, "target_modules must name modules: got None"),
        ({"target_modules": []}, "target_modules must name modules: got []"),
        ({"target_modules": {"a": 1}}, "target_modules must name modules: got {'a': 1}"),
        ({"layers_to_transform": "1"}, "layers_to_transform must be numbers of blocks: got ['1']"),
        ({"layers_to_transform": [True]}, "layers_to_transform must be numbers of blocks: got [True]"),
        ({"r": "8"}, "r must be a number below 1e9: got 8"),
        ({"lora_alpha": math.nan}, "lora_alpha must be a number below 1e9: got nan"),
        ({"use_dora": "yes"}, "use_dora must be true or false: got 'yes'"),
    ],
)
def test_a_wrong_key_is_named(change: dict[str, Any], message: str) -> None:
    values = {"peft_type": "LORA", "target_modules": ["c_attn"], **change}
    with pytest.raises(InputError) as error:
        config_of(values, Path("a.json"))
    assert str(error.value).startswith(f"a.json: {message}")


def test_the_base_s_own_weight_beside_an_adapter_is_compared(
    folders: Path, int8: Path, tmp_path: Path
) -> None:
    """PEFT stores this weight, too, if lm_head has an adapter."""
    folder = copy_of(folders, tmp_path / "a")
    path, name = folder / "adapter_model.safetensors", "transformer.h.0.attn.c_attn"
    weights, own = load_file(path), load_file(folders / "base" / "model.safetensors")[f"{name}.weight"]
    save_file({**weights, f"base_model.model.{name}.base_layer.weight": own}, path)
    model = minigpt.load_model(folders / "base")
    load_adapter(model, folder)
    assert {name: tensor.tolist() for name, tensor in adapter_tensors(model).items()} == {
        name: tensor.tolist() for name, tensor in weights.items()
    }
    with pytest.raises(InputError, match="it cannot be compared with quantised weights"):
        load_adapter(minigpt.load_model(int8), folder)
    save_file({**weights, f"base_model.model.{name}.base_layer.weight": own + 1}, path)
    with pytest.raises(InputError, match="is not the model's own weight: the adapter is for another one"):
        load_adapter(minigpt.load_model(folders / "base"), folder)
    path.unlink()
    with pytest.raises(InputError, match="the adapter's weights are read from safetensors only"):
        load_adapter(minigpt.load_model(folders / "base"), folder)


@pytest.mark.parametrize(
    "config",
    [LoraConfig(r=2, target_modules=r".*\.c_attn"), IA3Config("all-linear", ("mlp.c_proj",))],
    ids=["a regular expression", "inputs that no short name means"],
)
def test_what_is_written_chooses_the_same_layers(config: AdapterConfig, tmp_path: Path) -> None:
    model = tiny()
    add_adapter(model, config)
    save_adapter(model, config, tmp_path)
    again = tiny()
    load_adapter(again, tmp_path)
    shapes = [{name: each.shape for name, each in adapter_tensors(one).items()} for one in (model, again)]
    assert shapes[0] == shapes[1]


def test_an_adapter_that_is_no_number_is_not_written(tmp_path: Path) -> None:
    model, config = tiny(), LoraConfig()
    apply_lora(model, config)
    name, tensor = next(iter(adapter_tensors(model).items()))
    with torch.no_grad():
        tensor[0, 0] = math.nan
    with pytest.raises(
        InputError, match=f"{re.escape(name)} holds NaN or infinity: the adapter is not written"
    ):
        save_adapter(model, config, tmp_path)
    assert not list(tmp_path.iterdir())
