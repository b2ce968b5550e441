"""Model folders: written weights come back byte for byte, and an error is one line."""

import json
import os
import pickle
import re
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minigpt.errors import InputError
from minigpt.families.gpt2.family import FAMILY
from minigpt.generation.generation_config import notes_of, recommended_options, start_token
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenizer import Tokenizer
from minigpt.weights.pretrained import (
    load_model,
    load_model_and_tokenizer,
    load_tokenizer,
    load_weights,
    save_pretrained,
)

FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]
SEP = 2  # the id of <sep>, which ends an answer
WORDS = ["<pad>", "<unk>", "<sep>", *"你好吗\n <sep>"[:5], "?", "\u2028", "😀"]
VARIANTS = [(True, "tanh"), (True, "exact"), (False, "exact"), (False, "tanh")]


def make_tokenizer() -> Tokenizer:
    return Tokenizer.from_word2id({word: index for index, word in enumerate(WORDS)})


def make_model(bias: bool = False, gelu: Any = "exact", vocab_size: int = len(WORDS)) -> GPTLMHeadModel:
    torch.manual_seed(1)
    model = GPTLMHeadModel(GPTConfig(16, 2, 2, 0.1, 12, vocab_size, bias, gelu)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    save_pretrained(make_model(), folder, make_tokenizer())
    return folder


def change_json(path: Path, change: dict[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **change}), encoding="utf-8")


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def message(action: Callable[[], object]) -> str:
    """Return the error's line that a user would see."""
    with pytest.raises(InputError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize(("bias", "gelu"), VARIANTS, ids=str)
def test_what_is_saved_comes_back(bias: bool, gelu: str, tmp_path: Path) -> None:
    model, tokenizer = make_model(bias, gelu), make_tokenizer()
    save_pretrained(model, tmp_path, tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    back, tokenizer_back = load_model_and_tokenizer(tmp_path)
    assert back.config == model.config
    assert not back.training
    assert back.lm_head.weight is back.transformer.wte.weight
    assert all(parameter.requires_grad for parameter in back.parameters())
    for (name, parameter), original in zip(back.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, original), name
        assert parameter.is_contiguous(), name
    ids = torch.tensor([[3, 4, 5, 2, 6]])
    assert torch.equal(back(ids), model(ids))
    assert tokenizer_back == tokenizer


def test_save_load_save_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model_and_tokenizer(saved)
    save_pretrained(model, tmp_path / "again", tokenizer)
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes(), name


def test_a_loaded_model_does_not_hang_on_its_file(saved: Path) -> None:
    model = load_model(saved)
    before = [parameter.clone() for parameter in model.parameters()]
    path = saved / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))  # in place: a memory map would see the zeros
    assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before, strict=True))


def test_saving_twice_into_one_directory_replaces_what_is_there(saved: Path) -> None:
    save_pretrained(make_model(True, "tanh"), saved, make_tokenizer())
    assert isinstance(config := load_model(saved).config, GPTConfig)
    assert config.bias
    assert sorted(path.name for path in saved.iterdir()) == FILES


@pytest.mark.skipif(os.name == "nt", reason="no umask on Windows")
def test_file_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_pretrained(make_model(), tmp_path, make_tokenizer())
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_computed_in_float32(stored: torch.dtype, saved: Path) -> None:
    def cast(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.to(stored) for name, tensor in tensors.items()})

    change_weights(saved, cast)
    model, original = load_model(saved), make_model()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    expected = original.transformer.wte.weight.to(stored).float()
    assert isinstance(model, GPTLMHeadModel)
    assert torch.equal(model.transformer.wte.weight, expected)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64])
def test_as_stored_means_16_bits_only_where_all_is(stored: torch.dtype, saved: Path) -> None:
    def cast(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.to(stored) for name, tensor in tensors.items()})

    def widen_one(tensors: dict[str, Tensor]) -> None:
        tensors["transformer.ln_f.weight"] = tensors["transformer.ln_f.weight"].float()

    assert {parameter.dtype for parameter in load_model(saved, dtype="stored").parameters()} == {
        torch.float32
    }
    change_weights(saved, cast)
    expected = stored if stored != torch.float64 else torch.float32
    model = load_model(saved, dtype="stored")
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert all(map(torch.equal, model.float().parameters(), load_model(saved).parameters()))
    change_weights(saved, widen_one)
    assert {parameter.dtype for parameter in load_model(saved, dtype="stored").parameters()} == {
        torch.float32
    }


def test_dtype_is_what_is_asked_for(saved: Path) -> None:
    model = load_model(saved, dtype=torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert model(torch.tensor([[3, 4]])).dtype == torch.float64


def test_a_run_folder_stands_for_its_best(saved: Path, tmp_path: Path) -> None:
    run = tmp_path / "output"
    run.mkdir()
    saved.rename(run / "step-00000400")
    (run / "best").symlink_to("step-00000400")
    assert load_model(run).config == load_model(run / "best").config == make_model().config
    assert load_tokenizer(run) == make_tokenizer()


def test_weights_are_copied_into_a_model_that_exists(saved: Path) -> None:
    torch.manual_seed(2)
    source = make_model()
    model = GPTLMHeadModel(replace(source.config, dropout=0.3)).double()
    parameters = list(model.parameters())
    load_weights(model, saved)
    for parameter, kept, original in zip(model.parameters(), parameters, source.parameters(), strict=True):
        assert parameter is kept
        assert torch.equal(parameter, original.double())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.training


def test_weights_of_another_model_are_refused(saved: Path) -> None:
    model = GPTLMHeadModel(replace(make_model().config, n_layer=3, gelu="tanh"))
    line = message(lambda: load_weights(model, saved))
    expected = "for another model, n_layer=2 instead of 3, gelu='exact' instead of 'tanh'"
    assert line == f"{saved / 'config.json'}: the weights are {expected}"


def test_a_vocab_json_is_a_tokenizer_too(tmp_path: Path) -> None:
    make_tokenizer().save(tmp_path / "vocab.json")
    assert load_tokenizer(tmp_path / "vocab.json") == make_tokenizer()


def test_tokenizer_json_lists_the_vocabulary_by_id(saved: Path) -> None:
    content = json.loads((saved / "tokenizer.json").read_bytes())
    assert list(content["model"]["vocab"].items()) == [(word, index) for index, word in enumerate(WORDS)]
    assert "你" in (saved / "tokenizer.json").read_text(encoding="utf-8")  # for people, not \u4f60


# ------------------------------------------------------------------------------------------ what may be wrong


def test_missing_and_misplaced_paths_are_named(saved: Path, tmp_path: Path) -> None:
    assert "nowhere does not exist" in message(lambda: load_model(tmp_path / "nowhere"))
    assert "nowhere does not exist" in message(lambda: load_tokenizer(tmp_path / "nowhere"))
    assert "config.json is a file" in message(lambda: load_model(saved / "config.json"))
    (tmp_path / "empty").mkdir()
    assert re.search(
        r"config\.json is missing: .*empty is not a model", message(lambda: load_model(tmp_path / "empty"))
    )
    (saved / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in message(lambda: load_tokenizer(saved))
    (saved / "model.safetensors").unlink()
    assert "model.safetensors is missing" in message(lambda: load_model(saved))


def test_a_pickle_is_never_opened(saved: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("a pickle was run",))

    (saved / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pth"):
        (saved / name).write_bytes(pickle.dumps(Trap()))
    assert "never from a pickle" in message(lambda: load_model(saved))
    (saved / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    assert "model.safetensors is damaged or not a safetensors file" in message(lambda: load_model(saved))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_weight_file_is_named(share: float, saved: Path) -> None:
    path = saved / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert f"{path} is damaged" in message(lambda: load_model(saved))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"model_type": "gpt2"'])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_json_file_that_is_none_is_named(name: str, content: bytes, saved: Path) -> None:
    (saved / name).write_bytes(content)
    assert re.search(
        rf"{name} (is not JSON|must hold a JSON object)", message(lambda: load_model_and_tokenizer(saved))
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is another architecture; minigpt reads gpt2 and qwen3"),
        ({"model_type": None}, "model_type must be one of gpt2, qwen3: got None"),
        ({"n_inner": 100}, "n_inner must be null or 4 * n_embd = 64: got 100"),
        (
            {"activation_function": "relu"},
            "activation_function must be one of gelu, gelu_new, gelu_pytorch_tanh: got",
        ),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not supported"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False is not supported"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be True or False"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06 is not supported, only 1e-05"),
        ({"add_cross_attention": True}, "add_cross_attention=True is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config names the method None: only 'minigpt'"),
        ({"resid_pdrop": 1.5}, "dropout must be at least 0 and below 1: got dropout=1.5"),
        ({"minigpt_bias": "no"}, "minigpt_bias must be true or false: got 'no'"),
        ({"n_head": 5}, "n_head must divide n_embd: got n_head=5, n_embd=16"),
        ({"n_embd": "16"}, "n_embd must be a whole number"),
        ({"n_layer": None}, "n_layer must be a whole number"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_an_unsupported_configuration_names_the_key(change: dict[str, Any], text: str, saved: Path) -> None:
    change_json(saved / "config.json", change)
    line = message(lambda: load_model(saved))
    assert line.startswith(f"{saved / 'config.json'}: {text}")


def test_a_configuration_of_another_family_is_refused() -> None:
    values = {**FAMILY.config_to_hugging_face(make_model().config), "model_type": "gpt_neo"}
    assert (
        message(lambda: FAMILY.config_from_hugging_face(values))
        == "model_type must be \"gpt2\": got 'gpt_neo'"
    )


def test_missing_sizes_are_listed(saved: Path) -> None:
    (saved / "config.json").write_text('{"model_type": "gpt2", "n_embd": 16, "n_layer": 2}')
    assert message(lambda: load_model(saved)).endswith("missing keys: vocab_size, n_positions, n_head")


def test_all_that_does_not_fit_is_listed_in_one_line(saved: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["transformer.wpe.weight"]
        del tensors["transformer.h.1.attn.c_attn.bias"]
        tensors["transformer.h.2.ln_1.weight"] = torch.ones(16)
        tensors["transformer.h.0.mlp.c_fc.weight"] = torch.ones(64, 16)  # as torch's Linear has it: not here
        tensors["transformer.ln_f.bias"] = torch.ones(16, dtype=torch.int8)

    change_weights(saved, spoil)
    line = message(lambda: load_model(saved))
    assert line.startswith(f"{saved / 'model.safetensors'}: the weights do not fit the configuration; ")
    assert "missing: transformer.wpe.weight, transformer.h.1.attn.c_attn.bias; " in line
    assert "unexpected: transformer.h.2.ln_1.weight; " in line
    assert "transformer.h.0.mlp.c_fc.weight is float (64, 16), not float (16, 64)" in line
    assert "transformer.ln_f.bias is torch.int8 (16,), not float (16,)" in line


def test_a_configuration_of_another_size_is_noticed(saved: Path) -> None:
    change_json(saved / "config.json", {"n_layer": 3})
    assert "missing: transformer.h.2.ln_1.weight," in message(lambda: load_model(saved))
    change_json(saved / "config.json", {"n_layer": 1})
    line = message(lambda: load_model(saved))
    assert "unexpected: transformer.h.1.attn.c_attn.bias," in line
    assert line.endswith("and 9 more")  # a block has 12 tensors; 3 are named
    change_json(saved / "config.json", {"n_layer": 2, "vocab_size": 12})
    assert "transformer.wte.weight is float (11, 16), not float (12, 16)" in message(
        lambda: load_model(saved)
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_named_on_reading_and_writing(value: float, saved: Path) -> None:
    change_weights(saved, lambda tensors: tensors["transformer.h.1.mlp.c_fc.weight"][3, 5].fill_(value))
    assert "transformer.h.1.mlp.c_fc.weight holds NaN or infinity" in message(lambda: load_model(saved))
    model = make_model()
    with torch.no_grad():
        model.transformer.wpe.weight[0, 0] = value
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    line = message(lambda: save_pretrained(model, saved, make_tokenizer()))
    assert "transformer.wpe.weight holds NaN or infinity" in line
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_wrapped_model_is_not_written_as_zeros() -> None:
    wrapped: Any = torch.nn.ModuleDict({"inside": make_model()})
    wrapped.config = make_model().config
    with pytest.raises(InputError, match=r"a gpt2 folder cannot hold inside\.transformer\..* and \d+ more"):
        FAMILY.to_hugging_face(wrapped)


@pytest.mark.parametrize("name", ["attn.c_proj.bias", "mlp.c_fc.bias", "mlp.c_proj.bias"])
def test_a_bias_that_should_not_be_there_must_be_zero(name: str, saved: Path) -> None:
    assert (load_file(saved / "model.safetensors")[f"transformer.h.1.{name}"] == 0).all()
    change_weights(saved, lambda tensors: tensors[f"transformer.h.1.{name}"][7].fill_(1e-3))
    assert f"transformer.h.1.{name} is not zero, but the configuration has no such weight" in message(
        lambda: load_model(saved)
    )
    change_json(saved / "config.json", {"minigpt_bias": True})
    assert isinstance(config := load_model(saved).config, GPTConfig)
    assert config.bias


def test_an_absent_zero_bias_is_not_missed_but_a_real_one_is(saved: Path) -> None:
    change_weights(saved, lambda tensors: tensors.pop("transformer.h.0.attn.c_proj.bias"))
    load_model(saved)
    change_json(saved / "config.json", {"minigpt_bias": True})
    assert "missing: transformer.h.0.attn.c_proj.bias" in message(lambda: load_model(saved))


def test_old_files_with_masks_a_head_and_no_prefix_are_read() -> None:
    model = make_model(True, "tanh")
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in FAMILY.to_hugging_face(model).items()
    }
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 12, 12).tril()
    tensors["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    read = FAMILY.from_hugging_face(tensors, model.config)
    assert read.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(tensor, model.get_parameter(name)) for name, tensor in read.items())
    tensors["lm_head.weight"][0, 0] += 1
    assert "lm_head.weight differs" in message(lambda: FAMILY.from_hugging_face(tensors, model.config))
    del tensors["lm_head.weight"]
    tensors["transformer.ln_f.bias"] = tensors["ln_f.bias"]
    assert "ln_f.bias twice" in message(lambda: FAMILY.from_hugging_face(tensors, model.config))


def test_vocabularies_of_different_sizes_show_both_numbers(saved: Path) -> None:
    model = make_model(vocab_size=10)
    line = message(lambda: save_pretrained(model, saved, make_tokenizer()))
    assert "the model has vocab_size=10, the tokenizer 11 entries" in line
    other = saved.parent / "other"
    save_pretrained(
        model, other, Tokenizer.from_word2id({word: index for index, word in enumerate(WORDS[:10])})
    )
    (saved / "tokenizer.json").replace(other / "tokenizer.json")
    line = message(lambda: load_model_and_tokenizer(other))
    assert line.startswith(f"{other}: ")
    assert "the model has vocab_size=10, the tokenizer 11 entries" in line


@pytest.mark.parametrize("model", [{"type": "Unigram", "vocab": []}, None, [], {"type": "WordLevel"}])
def test_another_kind_of_tokenizer_is_refused(model: object, saved: Path) -> None:
    change_json(saved / "tokenizer.json", {"model": model})
    assert "tokenizer.json: its model is" in message(lambda: load_tokenizer(saved))


def test_a_manifest_is_verified_and_never_made_stale(saved: Path) -> None:
    (saved / "manifest.json").write_text('{"format": 1, "files": {}}')
    for action in (load_model, load_tokenizer, load_model_and_tokenizer):
        with pytest.raises(InputError, match="not listed in manifest"):
            action(saved)
    line = message(lambda: save_pretrained(make_model(), saved, make_tokenizer()))
    assert "is a finished checkpoint" in line


# ----------------------------------------------------------------------------------------------------- tables


def test_the_table_names_every_parameter_once_in_both_directions() -> None:
    model = make_model(bias=True)
    ours = {row.ours.replace("*", str(block)) for row in FAMILY.weights for block in range(2)}
    assert ours == dict(model.named_parameters()).keys()
    assert (
        len({row.theirs for row in FAMILY.weights})
        == len(FAMILY.weights)
        == len({row.ours for row in FAMILY.weights})
    )


@pytest.mark.parametrize(("bias", "gelu"), VARIANTS, ids=str)
def test_configurations_come_back(bias: bool, gelu: Any) -> None:
    config = GPTConfig(24, 3, 5, 0.25, 40, 99, bias, gelu)
    assert (
        FAMILY.config_from_hugging_face(FAMILY.config_to_hugging_face(config, eos_token_id=2, pad_token_id=0))
        == config
    )


def test_a_plain_gpt2_configuration_is_gpt2() -> None:
    values = {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024}
    values |= {
        "vocab_size": 50257,
        "activation_function": "gelu_pytorch_tanh",
        "n_ctx": 1024,
        "summary_type": "x",
    }
    config = FAMILY.config_from_hugging_face(values)
    assert config == GPTConfig(768, 12, 12, 0.1, 1024, 50257, bias=True, gelu="tanh")
    assert config.parameter_count() == 124_439_808  # as published


# -- what a folder advises -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("advice", "config", "expected"),
    [
        (None, None, {}),
        ({"temperature": 0.0, "top_k": 5}, {}, {"top_k": 5, "eos_token_id": []}),  # nothing is sampled
        ({"eos_token_id": [3, 99], "top_p": None}, {"vocab_size": 11}, {"eos_token_id": [3]}),
        ({"eos_token_id": 99}, {"vocab_size": [11]}, {"eos_token_id": [99]}),
    ],
)
def test_advice_of_a_folder(
    advice: dict[str, Any] | None, config: dict[str, Any] | None, expected: dict[str, Any], tmp_path: Path
) -> None:
    for name, content in (("generation_config.json", advice), ("config.json", config)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    assert recommended_options(tmp_path) == expected


@pytest.mark.parametrize(
    "advice",
    [
        {"temperature": "warm"},
        {"do_sample": True, "temperature": -1.0},
        {"eos_token_id": [-1]},
        {"top_k": [1]},
    ],
    ids=str,
)
def test_advice_that_is_none_names_the_file(advice: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(advice))
    line = message(lambda: recommended_options(tmp_path))
    assert line.startswith(f"{tmp_path / 'generation_config.json'}: {list(advice)[-1]}")


@pytest.mark.parametrize(
    ("bos", "size", "expected"),
    [
        (5, 11, 5),
        (11, 11, SEP),
        (-1, 11, SEP),
        ("5", 11, SEP),
        (True, 11, SEP),
        (5, None, 5),
        (5, [11], 5),
        (5, 0, None),
    ],
)
def test_a_text_begins_with_an_id_of_the_model(
    bos: Any, size: Any, expected: int | None, saved: Path
) -> None:
    (saved / "generation_config.json").write_text(json.dumps({"bos_token_id": bos}))
    change_json(saved / "config.json", {"vocab_size": size})
    assert start_token(saved, make_tokenizer()) == expected


def test_a_setting_that_is_ignored_is_quoted_in_few_characters(saved: Path) -> None:
    ignored = {"suppress_tokens": list(range(10**5)), "num_beams": 1, "stop_strings": []}
    (saved / "generation_config.json").write_text(json.dumps(ignored))
    first, *_ = notes_of(saved, make_tokenizer())
    assert "not followed: suppress_tokens=[0, 1, 2, " in first
    assert len(first) < len(str(saved)) + 200


def test_a_token_for_which_the_model_has_no_row_is_not_written(tmp_path: Path) -> None:
    """Published tokenizers have a padding token behind the last row of the model."""
    BpeTokenizer.train([], 259, special_tokens=["<|endoftext|>"]).save(tmp_path)
    whole = json.loads((tmp_path / "tokenizer.json").read_bytes())
    whole["added_tokens"].append({**whole["added_tokens"][0], "id": 259, "content": "<more>"})
    change_json(tmp_path / "tokenizer.json", whole)
    change_json(tmp_path / "tokenizer_config.json", {"pad_token": "<more>", "eos_token": "<|endoftext|>"})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token_id == 259
    save_pretrained(make_model(vocab_size=259), tmp_path / "model", tokenizer)
    written = json.loads((tmp_path / "model" / "config.json").read_bytes())
    assert (written["eos_token_id"], written["pad_token_id"]) == (tokenizer.eos_token_id, None)
    assert "pad_token_id" not in json.loads((tmp_path / "model" / "generation_config.json").read_bytes())
