"""Damaged, forged or confused model folders: each gives one clear line at once, and no code is run."""

import json
import math
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt.errors import InputError
from minigpt.families.strict_loading import is_finite, require_finite
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.storage.files import atomic_folder
from minigpt.storage.safetensors_files import INDEX, WEIGHTS, WeightFiles
from minigpt.tokenizer import SPECIAL_TOKENS, Tokenizer
from minigpt.weights.pretrained import load_model, load_model_and_tokenizer, load_tokenizer, save_pretrained
from minigpt.weights.quantized import set_precision

VOCABULARY = {word: index for index, word in enumerate([*SPECIAL_TOKENS, *"你好吗 abc"])}


def make_model() -> GPTLMHeadModel:
    torch.manual_seed(1)
    return GPTLMHeadModel(GPTConfig(8, 2, 1, 0.1, 6, len(VOCABULARY), False, "exact")).eval()


def save(folder: Path, size: int | str = "5GB") -> Path:
    save_pretrained(make_model(), folder, Tokenizer.from_word2id(VOCABULARY), max_shard_size=size)
    return folder


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return save(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = save(tmp_path / "shards", 1500)
    assert len(list(folder.glob("model-*"))) > 2
    return folder


def message(action: Callable[[], object]) -> str:
    """Return the error's line that a user would see."""
    with pytest.raises(InputError) as error:
        action()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
    return str(error.value)


def change_json(path: Path, change: dict[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **change}), encoding="utf-8")


def with_header(folder: Path, change: Callable[[str], str], tail: bytes = b"") -> None:
    """Rewrite the header of model.safetensors as text. The data do not change."""
    path = folder / WEIGHTS
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = change(content[8 : 8 + length].decode()).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :] + tail)


class Trap:
    """An object that ends the test if it is unpickled."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was run",))


# ----------------------------------------------------------------------------------------- damaged in transit


def test_no_flipped_bit_in_a_header_goes_unnoticed_or_crashes(whole: Path) -> None:
    path = whole / WEIGHTS
    content = path.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    harmless, lines = 0, []
    for position in range(end):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            model = load_model(whole)
        except InputError as error:
            lines.append(str(error))
            continue
        harmless += 1  # the metadata's text, or one kind of white space for another
        for name, parameter in make_model().named_parameters():
            assert torch.equal(model.get_parameter(name), parameter), (position, name)
    assert harmless < 30
    assert [line for line in lines if "\n" in line] == []


@pytest.mark.parametrize("size", ["5GB", 1500])
def test_a_flipped_bit_in_the_data_is_noticed_with_a_manifest(size: int | str, tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def fill(new: Path) -> None:
        save(new, size)

    atomic_folder(folder, fill)
    load_model(folder)
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        for position in (9, len(content) - 3):
            damaged = bytearray(content)
            damaged[position] ^= 4
            path.write_bytes(damaged)
            assert f"{path} does not match its checksum" in message(lambda: load_model(folder))
        path.write_bytes(content)
    load_model(folder)


def test_every_truncation_of_a_shard_is_named(sharded: Path) -> None:
    path = sorted(sharded.glob("model-*"))[1]
    content = path.read_bytes()
    for length in [0, 1, 7, 8, 9, 50, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:length])
        assert f"{path} is damaged or not a safetensors file" in message(lambda: load_model(sharded))
    path.write_bytes(content + b"\0")
    assert f"{path} is damaged or not a safetensors file" in message(lambda: load_model(sharded))


def test_a_file_that_changes_while_it_is_read_is_an_error_too(whole: Path) -> None:
    weights = WeightFiles(whole)
    (whole / WEIGHTS).write_bytes(b"")
    assert "changed while it was read" in message(lambda: weights["transformer.wte.weight"])


# ----------------------------------------------------------------------------------------------------- forged


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r'"data_offsets":\[0,', '"data_offsets":[4,'),  # a hole, or an overlap
        (r'"data_offsets":\[0,', '"data_offsets":[-4,'),
        (r'"data_offsets":\[0,\d+\]', '"data_offsets":[0,99999999999]'),
        (r'"data_offsets":\[0,\d+\]', '"data_offsets":[0,18446744073709551615]'),
        (r'"data_offsets":\[0,(\d+)\]', r'"data_offsets":[\1,0]'),
        (r'"shape":\[', '"shape":[4294967296,4294967296,'),
        (r'"shape":\[\d+', '"shape":[-1'),
        (r'"shape":\[\d+', '"shape":["8"'),
        (r'"shape":\[\d+', '"shape":[1e3'),
        (r'"shape"', '"form"'),
        (r'"dtype":"F32"', '"dtype":null'),
        (r"^\{", "[{"),
        (r"^\{", "{" * 5000),
        (r"^\{", '{"a":' + "[" * 100_000),
        (r'"transformer\.ln_f\.bias"', '"transformer.ln_f.weight"'),
    ],
)
def test_a_forged_header_is_refused(old: str, new: str, whole: Path) -> None:
    with_header(whole, lambda text: re.sub(old, new, text, count=1))
    assert f"{whole / WEIGHTS} is damaged or not a safetensors file: " in message(lambda: load_model(whole))


def test_a_tensor_named_twice_is_refused_even_if_it_is_the_same(whole: Path) -> None:
    def twice(text: str) -> str:
        entry = re.search(r'"transformer\.ln_f\.bias":\{.*?\}', text)
        assert entry is not None
        return text.replace(entry[0], f"{entry[0]},{entry[0]}")

    with_header(whole, twice)
    assert "'transformer.ln_f.bias' comes twice" in message(lambda: load_model(whole))


def test_a_header_that_claims_to_be_enormous_is_not_read(whole: Path) -> None:
    path = whole / WEIGHTS
    for length in (0, 2**40, 2**63, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
        assert "is damaged or not a safetensors file" in message(lambda: load_model(whole))


def test_types_that_need_scales_are_refused_by_name(whole: Path) -> None:
    weights = load_file(whole / WEIGHTS)
    weights["transformer.ln_f.bias"] = weights["transformer.ln_f.bias"].to(torch.float8_e4m3fn)
    save_file(weights, whole / WEIGHTS)
    line = message(lambda: load_model(whole))
    assert f"{whole / WEIGHTS}: transformer.ln_f.bias is stored as F8_E4M3: only I64, F64," in line
    with_header(whole, lambda text: text.replace("F8_E4M3", "F31"))
    assert "transformer.ln_f.bias is stored as F31: only I64, F64," in message(lambda: load_model(whole))


@pytest.mark.parametrize("size", ["5GB", 1500])
def test_a_pickle_in_place_of_a_safetensors_file_is_told_as_one(size: int | str, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", size)
    path = sorted(folder.glob("*.safetensors"))[0]
    for protocol in (2, 3, 4, 5):
        path.write_bytes(pickle.dumps(Trap(), protocol))
        line = message(lambda: load_model(folder))
        assert f"{path} is damaged or not a safetensors file: it is a pickle, which is never read" in line
    with zipfile.ZipFile(path, "w") as archive:  # what torch.save writes
        archive.writestr("archive/data.pkl", pickle.dumps(Trap()))
    assert "it is a pickle, which is never read" in message(lambda: load_model(folder))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "best.pth"]
)
def test_weights_in_a_pickle_alone_say_what_to_do(name: str, whole: Path) -> None:
    (whole / WEIGHTS).unlink()
    (whole / name).write_bytes(pickle.dumps(Trap()))
    line = message(lambda: load_model(whole))
    remedy = "minigpt import" if name.endswith(".pth") else "save_pretrained()"
    assert f"{whole / WEIGHTS} is missing: weights are read from safetensors, never from a pickle" in line
    assert name in line
    assert remedy in line


# ----------------------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize(
    "name",
    [
        "../elsewhere/model.safetensors",
        "/etc/model.safetensors",
        "a/b.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        ".hidden.safetensors",
        "model.bin",
        "",
        "x.safetensors\n",
        "\0.safetensors",
        "字" * 82 + ".safetensors",  # 258 bytes: no file can have that name
        None,
        3,
        ["model.safetensors"],
    ],
)
def test_an_index_cannot_lead_out_of_its_folder(name: object, sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_bytes())
    save(sharded.parent / "elsewhere")  # something to be found there
    index["weight_map"]["transformer.ln_f.bias"] = name
    (sharded / INDEX).write_text(json.dumps(index))
    line = message(lambda: load_model(sharded))
    assert f"{sharded / INDEX}: transformer.ln_f.bias must be in a .safetensors file beside it: got" in line


def test_a_shard_that_is_not_there_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*"))[1]
    shard.unlink()
    assert f"{shard} is missing: {INDEX} names it" in message(lambda: load_model(sharded))


def test_index_and_shards_must_list_the_same(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*"))[1]
    tensors = load_file(shard)
    save_file({**tensors, "transformer.extra": torch.ones(1)}, shard)
    line = message(lambda: load_model(sharded))
    assert line == f"{shard} and {INDEX} do not list the same tensors: transformer.extra"
    removed = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != removed}, shard)
    assert line.replace("transformer.extra", removed) == message(lambda: load_model(sharded))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("a", [1] * 100_000),  # dimensions without end
        ("a", [0, 2**62, 2**62]),  # no number, but strides that no 64 bits hold
        ("a", [2**62] * 1000),
        (f"transformer.h.{'9' * 5000}.x", [0]),  # more digits than Python converts
        ("module." * 200_000 + "x", [0]),
    ],
)
def test_names_and_shapes_without_measure_are_refused_at_once(
    whole: Path, name: str, shape: list[int]
) -> None:
    size = 4 if 0 not in shape else 0
    header = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    (whole / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    assert message(lambda: load_model(whole)).startswith(f"{whole / WEIGHTS}")


@pytest.mark.parametrize("weight_map", [None, [], {}, "model.safetensors"])
def test_an_index_without_a_map_is_none(weight_map: object, sharded: Path) -> None:
    change_json(sharded / INDEX, {"weight_map": weight_map})
    assert "weight_map must be an object from tensor to file" in message(lambda: load_model(sharded))


def test_an_index_that_gives_a_tensor_twice_is_refused(sharded: Path) -> None:
    text = (sharded / INDEX).read_text()
    (sharded / INDEX).write_text(
        text.replace('"weight_map": {', '"weight_map": {"transformer.ln_f.bias": "x",')
    )
    assert "'transformer.ln_f.bias' comes twice" in message(lambda: load_model(sharded))


# --------------------------------------------------------------------------------------------- muddled models


@pytest.mark.parametrize(
    "change",
    [
        {"n_layer": 10**9},
        {"n_layer": 10**30},
        {"vocab_size": 10**15},
        {"n_positions": 10**18},
        {"n_embd": 2 * 10**9},
        {"n_embd": 2 * 10**25, "n_layer": 10**25},
    ],
    ids=str,
)
def test_absurd_sizes_are_an_error_before_they_cost_anything(change: dict[str, int], whole: Path) -> None:
    change_json(whole / "config.json", change)
    line = message(lambda: load_model(whole))  # sketching the first of these would take hours
    complaints = (
        "but the highest layer in the weights",
        "too large for any machine",
        "do not fit the config",
    )
    assert line.startswith(f"{whole / WEIGHTS}: ")
    assert any(complaint in line for complaint in complaints)


@pytest.mark.parametrize("value", [-1, 0, -(10**9), 1.5, "8", True, None, [8], float("nan")])
@pytest.mark.parametrize("key", ["n_layer", "n_embd", "n_head", "n_positions", "vocab_size"])
def test_sizes_that_are_none_are_named(key: str, value: object, whole: Path) -> None:
    change_json(whole / "config.json", {key: value})
    assert "must be a whole number of at least 1: got" in message(lambda: load_model(whole))


def test_a_configuration_with_a_key_twice_is_refused(whole: Path) -> None:
    path = whole / "config.json"
    path.write_text(path.read_text().replace('"n_layer"', '"n_layer": 7, "n_layer"'))
    assert f"{path} is not JSON: the key 'n_layer' comes twice" == message(lambda: load_model(whole))


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"\0", b"null", b'"gpt2"']
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", INDEX])
def test_json_that_is_wrong_in_other_ways(name: str, content: bytes, sharded: Path) -> None:
    (sharded / name).write_bytes(content)
    line = message(lambda: load_model_and_tokenizer(sharded))
    assert re.search(rf"{re.escape(name)} (is not JSON|must hold a JSON object)", line)


def test_transposed_weights_do_not_fit(whole: Path) -> None:
    weights = load_file(whole / WEIGHTS)
    for name in ("transformer.wpe.weight", "transformer.h.0.mlp.c_fc.weight"):
        save_file({**weights, name: weights[name].t().contiguous()}, whole / WEIGHTS)
        line = message(lambda: load_model(whole))
        assert f"{whole / WEIGHTS}: the weights do not fit the configuration; unfit: {name} is" in line


def test_half_of_the_files_is_no_model(whole: Path) -> None:
    weights = load_file(whole / WEIGHTS)
    save_file({}, whole / WEIGHTS)
    assert "missing: transformer.wte.weight, " in message(lambda: load_model(whole))
    save_file({name: weights[name] for name in list(weights)[:-1]}, whole / WEIGHTS)
    assert f"missing: {list(weights)[-1]}" in message(lambda: load_model(whole))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values_that_are_no_numbers_are_noticed_in_every_precision(
    value: float, dtype: torch.dtype, whole: Path
) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in load_file(whole / WEIGHTS).items()}
    weights["transformer.h.0.ln_2.bias"][5] = value
    save_file(weights, whole / WEIGHTS)
    line = message(lambda: load_model(whole))
    assert f"{whole / WEIGHTS}: transformer.h.0.ln_2.bias holds NaN or infinity" in line


# ------------------------------------------------------------------------------------------------ file system


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "tokenizer.json"])
def test_directories_empty_files_and_loops_in_place_of_files(name: str, whole: Path) -> None:
    path = whole / name
    path.unlink()
    path.mkdir()
    assert f"{path} must be a file, and is a directory" == message(lambda: load_model_and_tokenizer(whole))
    path.rmdir()
    path.touch()
    assert f"{path} is " in message(lambda: load_model_and_tokenizer(whole))
    path.unlink()
    path.symlink_to(name)  # onto itself
    assert f"{path} " in message(lambda: load_model_and_tokenizer(whole))
    path.unlink()
    path.symlink_to("nowhere")
    assert f"{path} is missing" in message(lambda: load_model_and_tokenizer(whole))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "tokenizer.json"])
def test_a_pipe_is_not_waited_for(name: str, whole: Path) -> None:
    (whole / name).unlink()
    os.mkfifo(whole / name)
    assert f"{whole / name} cannot be read: is no regular file, but a pipe" == message(
        lambda: load_model_and_tokenizer(whole)
    )


def test_a_folder_that_is_a_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert "loop does not exist" in message(lambda: load_model(tmp_path / "loop"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/best").symlink_to("best")
    assert "is missing" in message(lambda: load_model(tmp_path / "run"))


def test_links_to_files_elsewhere_are_followed(whole: Path, tmp_path: Path) -> None:
    """Download caches consist of such links."""
    (tmp_path / "blobs").mkdir()
    for path in list(whole.iterdir()):
        path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(tmp_path / "blobs" / path.name)
    assert load_model(whole).config == make_model().config


def test_a_byte_level_tokenizer_that_is_damaged_is_named(whole: Path) -> None:
    change_json(whole / "tokenizer.json", {"model": {"type": "BPE", "vocab": {}, "merges": []}})
    assert str(whole) in message(lambda: load_tokenizer(whole))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_one_bad_number_among_many_is_found_and_large_ones_are_good(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    for values in ([1.0], [largest] * 2, [largest, -largest, largest]):  # whose sums overflow
        require_finite("w", torch.tensor(values * 50, dtype=dtype))
    for bad in ([math.nan], [math.inf], [-math.inf], [math.inf, -math.inf], [largest, math.inf, -largest]):
        for place in (0, 33, 99):
            values = [0.5] * 100
            values[place : place + 1] = bad
            with pytest.raises(InputError, match="w holds NaN or infinity: these weights are unusable"):
                require_finite("w", torch.tensor(values, dtype=dtype))


def test_nothing_a_number_and_whole_numbers_are_finite() -> None:
    square = torch.ones(3, 3)
    for sound in (square[:0], square[0, 0], square.t(), torch.arange(3)):
        assert is_finite(sound)
    square[2, 0] = -math.inf
    assert not is_finite(square.t())


@pytest.mark.parametrize(
    ("stored", "value", "dtype"),
    [
        (torch.float64, 1e300, None),  # None: float32
        (torch.float32, 70_000.0, torch.float16),
        (torch.float32, -torch.finfo(torch.float32).max, torch.bfloat16),  # rounds to the next power of 2
    ],
    ids=str,
)
def test_values_that_the_cast_makes_infinite_are_named(
    stored: torch.dtype, value: float, dtype: torch.dtype | None, whole: Path
) -> None:
    weights = {name: tensor.to(stored) for name, tensor in load_file(whole / WEIGHTS).items()}
    weights["transformer.h.0.mlp.c_fc.weight"][1, 2] = value
    save_file(weights, whole / WEIGHTS)
    line = message(lambda: load_model(whole, dtype=dtype))
    kind = str(dtype or torch.float32).removeprefix("torch.")
    assert (
        f"transformer.h.0.mlp.c_fc.weight holds values beyond {torch.finfo(dtype or torch.float32).max:,.6g}"
        in line
    )
    assert line.endswith(f"the largest number in {kind}")


def test_set_precision_names_weights_that_16_bits_cannot_hold() -> None:
    model = make_model()
    with torch.no_grad():
        model.get_parameter("transformer.blocks.0.mlp.c_fc.weight")[1, 2] = 70_000.0
    expected = (
        "transformer.blocks.0.mlp.c_fc.weight holds values beyond 65,504, the largest number in float16"
    )
    assert message(lambda: set_precision(model, "float16")) == expected
