"""Weights in one file and in several: written weights come back, under Hugging Face's names."""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.storage.safetensors_files import (
    INDEX,
    WEIGHTS,
    WeightFiles,
    described,
    parse_size,
    safetensors_parts,
    write_weights,
)
from minigpt.tokenizer import SPECIAL_TOKENS, Tokenizer
from minigpt.weights.pretrained import load_model, load_model_and_tokenizer, load_weights, save_pretrained

VOCABULARY = {word: index for index, word in enumerate([*SPECIAL_TOKENS, *"你好吗 abc"])}


def make_tokenizer() -> Tokenizer:
    return Tokenizer.from_word2id(VOCABULARY)


def make_model(dtype: torch.dtype = torch.float32, bias: bool = False) -> GPTLMHeadModel:
    torch.manual_seed(1)
    model = GPTLMHeadModel(GPTConfig(16, 2, 2, 0.1, 12, len(VOCABULARY), bias, "exact")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def assert_same_weights(model: LanguageModel, original: GPTLMHeadModel) -> None:
    for (name, parameter), expected in zip(model.named_parameters(), original.parameters(), strict=True):
        assert torch.equal(parameter, expected), name


# ------------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [1, 5000, "10KB"])  # at 1 byte each tensor gets a file of its own
def test_shards_come_back(size: int | str, bias: bool, tmp_path: Path) -> None:
    model = make_model(bias=bias)
    save_pretrained(model, tmp_path / "a", make_tokenizer(), max_shard_size=size)
    back, tokenizer = load_model_and_tokenizer(tmp_path / "a")
    assert_same_weights(back, model)
    save_pretrained(back, tmp_path / "b", tokenizer, max_shard_size=size)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    copied = make_model(bias=bias)
    torch.nn.init.zeros_(copied.transformer.ln_f.weight)
    load_weights(copied, tmp_path / "a")
    assert_same_weights(copied, model)


def test_shards_are_named_and_indexed_as_elsewhere(tmp_path: Path) -> None:
    save_pretrained(make_model(), tmp_path / "one", make_tokenizer())
    save_pretrained(make_model(), tmp_path / "many", make_tokenizer(), max_shard_size="10KB")
    index = json.loads((tmp_path / "many" / INDEX).read_bytes())
    shards = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    whole = load_file(tmp_path / "one" / WEIGHTS)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in whole.values())
    together: dict[str, Tensor] = {}
    for shard in shards:
        part = load_file(tmp_path / "many" / shard)
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= 10_000
        assert {name for name, file in index["weight_map"].items() if file == shard} == part.keys()
        together |= part
    assert together.keys() == whole.keys()
    assert all(torch.equal(together[name], whole[name]) for name in whole)


def test_a_tensor_larger_than_a_shard_stands_alone(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2), "large": torch.ones(100), "b": torch.ones(2), "c": torch.ones(2)}
    write_weights(tmp_path, dict(tensors), max_shard_size=20)
    assert [sorted(load_file(path)) for path in sorted(tmp_path.glob("*.safetensors"))] == [
        ["a"],
        ["large"],
        ["b", "c"],
    ]
    assert WeightFiles(tmp_path).keys() == tensors.keys()


def test_saving_anew_leaves_no_file_of_the_other_layout(tmp_path: Path) -> None:
    (tmp_path / "model-of-mine.safetensors").write_bytes(b"not ours")
    for size in (1, "1GB", "10KB", "1GB"):
        save_pretrained(make_model(), tmp_path, make_tokenizer(), max_shard_size=size)
        assert_same_weights(load_model(tmp_path), make_model())
        assert (tmp_path / WEIGHTS).exists() == (size == "1GB") != (tmp_path / INDEX).exists()
        weights = {path.name for path in tmp_path.glob("model-0*")}
        named = json.loads((tmp_path / INDEX).read_bytes())["weight_map"] if size != "1GB" else {}
        assert weights == set(named.values())
    assert (tmp_path / "model-of-mine.safetensors").read_bytes() == b"not ours"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", ["5GB", 3000])
def test_half_precision_goes_round(dtype: torch.dtype, size: int | str, tmp_path: Path) -> None:
    save_pretrained(make_model(), tmp_path / "a", make_tokenizer(), dtype=dtype, max_shard_size=size)
    assert json.loads((tmp_path / "a/config.json").read_bytes())["dtype"] == str(dtype).removeprefix("torch.")
    assert {tensor.dtype for tensor in WeightFiles(tmp_path / "a").values()} == {dtype}
    as_float32, tokenizer = load_model_and_tokenizer(tmp_path / "a")
    assert {parameter.dtype for parameter in as_float32.parameters()} == {torch.float32}
    assert_same_weights(as_float32, make_model(dtype).float())
    save_pretrained(as_float32, tmp_path / "b", tokenizer, dtype=dtype, max_shard_size=size)
    as_stored = load_model(tmp_path / "a", dtype=dtype)
    assert {parameter.dtype for parameter in as_stored.parameters()} == {dtype}
    save_pretrained(as_stored, tmp_path / "c", tokenizer, max_shard_size=size)  # a model's own dtype
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


def test_double_precision_is_written_in_single(tmp_path: Path) -> None:
    save_pretrained(make_model(torch.float64), tmp_path, make_tokenizer())
    assert json.loads((tmp_path / "config.json").read_bytes())["dtype"] == "float32"
    assert_same_weights(load_model(tmp_path), make_model())


# ------------------------------------------------------------------------------------------------- two by two


@pytest.mark.parametrize("size", ["5GB", 3000])
def test_two_tensors_of_the_file_are_held_at_a_time(
    size: int | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pretrained(make_model(), tmp_path, make_tokenizer(), max_shard_size=size)
    read: list[tuple[str, weakref.ref[Tensor]]] = []
    original = WeightFiles.__getitem__

    def watched(self: WeightFiles, name: str) -> Tensor:
        others = [name for name, tensor in read if tensor() is not None]
        assert len(others) <= 1, others
        tensor = original(self, name)
        read.append((name, weakref.ref(tensor)))
        return tensor

    monkeypatch.setattr(WeightFiles, "__getitem__", watched)
    model = load_model(tmp_path)
    monkeypatch.undo()
    assert_same_weights(model, make_model())
    assert sorted(name for name, _ in read) == sorted(WeightFiles(tmp_path))  # each once


def test_described_reads_headers_only(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2, 3, dtype=torch.bfloat16), "b": torch.ones(4, dtype=torch.bool)}
    save_file(tensors, tmp_path / WEIGHTS)
    forms = described(WeightFiles(tmp_path))
    assert {name: (form.dtype, form.shape, form.device.type) for name, form in forms.items()} == {
        "a": (torch.bfloat16, (2, 3), "meta"),
        "b": (torch.bool, (4,), "meta"),
    }
    assert described(tensors) is tensors


# ----------------------------------------------------------------------------------------------- bad requests


@pytest.mark.parametrize("size", [0, -5, "", "GB", "-1GB", "5XB", "0.0001KB", "5 G B", "nan", "1e9"])
def test_a_size_that_is_none_is_named_before_anything_is_written(size: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r'max_shard_size must be a size like "5GB" or "500MB": got'):
        parse_size(size)
    with pytest.raises(InputError, match="max_shard_size"):
        save_pretrained(make_model(), tmp_path / "new", make_tokenizer(), max_shard_size=size)
    assert not (tmp_path / "new").exists()


def test_a_dtype_that_is_no_dtype_of_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dtype must be one of float32, float16, bfloat16: got torch\.int8"):
        save_pretrained(make_model(), tmp_path, make_tokenizer(), dtype=torch.int8)


def test_values_beyond_float16_are_not_written_as_infinity(tmp_path: Path) -> None:
    save_pretrained(make_model(), tmp_path, make_tokenizer())
    before, model = contents(tmp_path), make_model()
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = 70_000.0
    with pytest.raises(
        InputError, match=r"transformer.ln_f.weight holds values beyond 65,504, the largest number in float16"
    ):
        save_pretrained(model, tmp_path, make_tokenizer(), dtype=torch.float16)
    assert contents(tmp_path) == before
    save_pretrained(model, tmp_path, make_tokenizer(), dtype=torch.bfloat16)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_parts_are_the_library_s_bytes_and_no_copies(metadata: dict[str, str] | None) -> None:
    kinds = (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
    torch.manual_seed(0)
    tensors = {f'{kind} "名"\n{i}': (9 * torch.randn(3, i)).to(kind) for kind in kinds for i in range(3)}
    tensors |= {"a number": torch.tensor(2.5), "of training": torch.ones(3, requires_grad=True)}
    parts = list(safetensors_parts(tensors, metadata))
    assert b"".join(parts) == save(tensors, metadata=metadata)
    assert len(parts[0]) % 8 == 0  # the numbers begin where every type may begin
    weight = {"w": torch.zeros(5)}
    _, numbers = safetensors_parts(weight)
    weight["w"][4] = 1
    assert bytes(numbers)[-4:] == b"\0\0\x80\x3f"
    assert b"".join(safetensors_parts({})) == save({})
