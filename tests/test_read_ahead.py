"""Reading ahead gives the same model, and leaves files with problems to the code that reads them later."""

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file

from minigpt.errors import InputError
from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.storage import read_ahead
from minigpt.storage.read_ahead import KEPT, WEIGHTS, ReadAhead
from minigpt.storage.safetensors_files import WeightFiles
from minigpt.tokenizer import Tokenizer
from minigpt.weights.pretrained import load_model_and_tokenizer, save_pretrained
from minigpt.weights.quantized import set_precision

WORDS = ["<pad>", "<unk>", "<sep>", *map(chr, range(0x4E00, 0x4E00 + 61))]
# Matrices of an MLP, (256, 1024) in float32, stay where they were read. All other tensors are too small for
# that.
GPT = GPTConfig(vocab_size=64, n_embd=256, n_layer=2, n_head=2, block_size=32, bias=True)
QWEN3 = Qwen3Config(
    vocab_size=64,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=32,
)

needs_preadv = pytest.mark.skipif(not hasattr(os, "preadv"), reason="this system cannot read ahead")


def _saved(
    folder: Path, family: str = "gpt2", max_shard_size: str = "5GB", dtype: torch.dtype | None = None
) -> Path:
    torch.manual_seed(0)
    model = GPTLMHeadModel(GPT) if family == "gpt2" else Qwen3ForCausalLM(QWEN3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()  # biases and norms, too, of which many are zeros and ones at first
    tokenizer = Tokenizer.from_word2id({word: index for index, word in enumerate(WORDS)})
    save_pretrained(model, folder, tokenizer, max_shard_size=max_shard_size, dtype=dtype)
    return folder


@needs_preadv
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
@pytest.mark.parametrize("shard", ["5GB", "3MB"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [None, "stored"])
def test_the_same_model_as_without(
    family: str,
    shard: str,
    stored: torch.dtype,
    dtype: Literal["stored"] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = _saved(tmp_path, family, max_shard_size=shard, dtype=stored)
    blocks: list[tuple[int, int]] = []

    def recorded(path: Path, begin: int, size: int) -> memoryview:
        content = read(path, begin, size)
        begin = torch.frombuffer(content, dtype=torch.uint8).data_ptr()
        blocks.append((begin, begin + size))
        return content

    read = read_ahead._bytes_of
    monkeypatch.setattr(read_ahead, "_bytes_of", recorded)
    ahead = ReadAhead(folder)
    model, _ = load_model_and_tokenizer(folder, dtype=dtype, ahead=ahead)
    without, _ = load_model_and_tokenizer(folder, dtype=dtype)
    for (name, found), expected in zip(
        model.state_dict().items(), without.state_dict().values(), strict=True
    ):
        assert found.dtype == expected.dtype, name
        assert torch.equal(found, expected), name
        assert found.is_contiguous(), name
    # Only large tensors whose type does not change stay where they were read.
    stays = dtype == "stored" or stored == torch.float32
    assert blocks
    for name, found in model.state_dict().items():
        inside = any(begin <= found.data_ptr() < end for begin, end in blocks)
        assert inside == (stays and found.nbytes >= KEPT), name
    assert all(ahead.take(path, name) is None for path in folder.iterdir() for name in WeightFiles(folder)), (
        "each tensor was taken"
    )


@needs_preadv
@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
def test_no_memory_is_kept_for_weights_that_were_replaced(
    precision: Literal["int8", "bfloat16"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Biases and norms, which stay in float32, do not keep the memory of matrices in the same block."""
    folder = _saved(tmp_path)
    memory: list[weakref.ref[Any]] = []

    def recorded(path: Path, begin: int, size: int) -> memoryview:
        content = read(path, begin, size)
        memory.append(weakref.ref(content.obj))
        return content

    read = read_ahead._bytes_of
    monkeypatch.setattr(read_ahead, "_bytes_of", recorded)
    model, _ = load_model_and_tokenizer(folder, ahead=ReadAhead(folder))
    assert any(block() is not None for block in memory)
    set_precision(model, precision)
    gc.collect()
    assert memory
    assert all(block() is None for block in memory)


@needs_preadv
def test_what_is_kept_lies_where_it_was_read(tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    weights = WeightFiles(folder, ReadAhead(folder))
    tensors = {name: weights[name] for name in weights}
    assert weights.own == {name for name, tensor in tensors.items() if tensor.nbytes >= KEPT}
    assert all(tensors[name].data_ptr() % 64 == 0 for name in weights.own)
    name = sorted(weights.own)[0]
    again = weights[name]  # a second look-up is another tensor, and a window into the file
    assert torch.equal(again, tensors[name])
    assert again.data_ptr() != tensors[name].data_ptr()
    assert name not in weights.own


def test_a_run_s_folder_means_its_best(tmp_path: Path) -> None:
    _saved(tmp_path / "best")
    path = tmp_path / "best" / WEIGHTS
    name = next(iter(WeightFiles(path.parent)))
    taken = ReadAhead(tmp_path).take(path.resolve(), name)
    assert (taken is not None) == hasattr(os, "preadv")


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    ahead = ReadAhead(folder)
    name = "transformer.h.0.mlp.c_fc.weight"
    other = {key: tensor * 2 for key, tensor in WeightFiles(folder).items()}
    for event in [block.done for block in ahead._blocks.values()]:
        assert event.wait(60)
    save_file(other, folder / "new.safetensors")
    (folder / "new.safetensors").replace(folder / WEIGHTS)
    weights = WeightFiles(folder, ahead)
    assert torch.equal(weights[name], other[name])
    assert name not in weights.own


def _header(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    def changed(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    return changed


def _overlapping(header: dict[str, Any]) -> None:
    for entry in list(header.values())[1:]:
        entry["data_offsets"] = [0, 1 << 20]


def _beyond(header: dict[str, Any]) -> None:
    del header["__metadata__"]
    last = max(header.values(), key=lambda entry: int(entry["data_offsets"][1]))
    last["data_offsets"][1] = 1 << 60


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda _: b"\x00" * 100,
        lambda _: b"\xff" * 100,
        lambda content: content[:40],
        lambda content: content[:-1000],
        lambda content: content[:8] + b"[" * 4000 + content[4008:],
        _header(lambda header: header.clear()),
        _header(lambda header: header.update(odd={"data_offsets": "ab"})),
        _header(lambda header: header.update(odd=3)),
        _header(lambda header: header["transformer.wpe.weight"].update(data_offsets=[0.0, 8192.0])),
        lambda content: content[:8] + b"[1]".ljust(int.from_bytes(content[:8], "little")) + content[8:],
        _header(_overlapping),
        _header(_beyond),
    ],
    ids=[
        "empty",
        "zeros",
        "ones",
        "header",
        "cut",
        "deep",
        "none",
        "letters",
        "number",
        "floats",
        "list",
        "overlap",
        "beyond",
    ],
)
def test_a_damaged_file_is_complained_of_as_without(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    path = folder / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError) as without:
        load_model_and_tokenizer(folder)
    with pytest.raises(InputError) as with_it:
        load_model_and_tokenizer(folder, ahead=ReadAhead(folder))
    # If several things are wrong, safetensors does not always name the same one.
    assert str(with_it.value).partition(": ")[0] == str(without.value).partition(": ")[0]


def test_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).mkdir()
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / ("long" * 1000)):
        assert ReadAhead(folder).take(folder / WEIGHTS, "one") is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / WEIGHTS)
    assert ReadAhead(tmp_path).take(tmp_path / WEIGHTS, "one") is None


@needs_preadv
def test_what_could_not_be_read_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(16), "b": torch.ones(16)}, tmp_path / WEIGHTS)
    monkeypatch.setattr(read_ahead, "_BLOCK", 64)  # bytes: each tensor alone
    monkeypatch.setattr(read_ahead, "_bytes_of", lambda path, begin, size: 1 // 0)
    ahead = ReadAhead(tmp_path)
    assert len(ahead._blocks) == 2
    assert [ahead.take(tmp_path / WEIGHTS, name) for name in "ab"] == [None, None]


@needs_preadv
def test_only_the_beginning_of_large_files_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {name: torch.full((16,), number) for number, name in enumerate("abcd")}
    save_file(tensors, tmp_path / WEIGHTS)
    monkeypatch.setattr(read_ahead, "_BLOCK", 128)  # bytes: two tensors
    monkeypatch.setattr(read_ahead, "_MOST", 300)
    ahead = ReadAhead(tmp_path)
    assert {name for _, name in ahead._blocks} == {"a", "b"}
    weights = WeightFiles(tmp_path, ahead)
    assert all(torch.equal(weights[name], tensor) for name, tensor in tensors.items())


@needs_preadv
def test_tensors_between_two_cache_lines_are_left_out(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3), "b": torch.arange(16.0), "c": torch.empty(0)}
    save_file(tensors, tmp_path / WEIGHTS)
    taken = {name: ReadAhead(tmp_path).take(tmp_path / WEIGHTS, name) for name in tensors}
    assert {name for name, content in taken.items() if content is not None} == {"a"}
    weights = WeightFiles(tmp_path, ReadAhead(tmp_path))
    assert all(torch.equal(weights[name], tensor) for name, tensor in tensors.items())


def test_it_needs_no_torch() -> None:
    code = "import sys, minigpt.storage.read_ahead; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
