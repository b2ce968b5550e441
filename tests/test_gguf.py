"""GGUF files, read by a reader that is written here from the specification and shares no code with minigpt.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Logits are transformers', with what was read.
"""

import dataclasses
import json
import struct
import sys
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from minigpt.errors import InputError
from minigpt.families.gpt2.family import gelu_difference
from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM, RopeScaling
from minigpt.families.registry import LanguageModel
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenizer import SPECIAL_TOKENS, Tokenizer
from minigpt.weights.gguf_file import write_gguf
from minigpt.weights.pretrained import save_pretrained
from tests.commands import RunCommand

pytest.importorskip("gguf", reason="the gguf package is not installed: pip install 'minigpt[gguf]'")
transformers = pytest.importorskip("transformers", reason="transformers, the oracle here, is not installed")

DTYPES = ["f32", "f16", "q8_0"]


# ------------------------------------------------------------------------------------ the reader of this test

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_F32, _F16, _Q8_0 = 0, 1, 8


def _unpack(file: BinaryIO, form: str) -> Any:
    return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))[0]


def _text(file: BinaryIO) -> str:
    return file.read(_unpack(file, "Q")).decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _TEXT:
        return _text(file)
    if kind == _ARRAY:
        inner, count = _unpack(file, "I"), _unpack(file, "Q")
        return [_value(file, inner) for _ in range(count)]
    return _unpack(file, _SCALARS[kind])


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, npt.NDArray[np.float32]]]]:
    """Return the metadata, and for each tensor its type and its values, rows first."""
    with path.open("rb") as file:
        assert file.read(4) == b"GGUF"
        assert _unpack(file, "I") == 3
        tensor_count, key_count = _unpack(file, "Q"), _unpack(file, "Q")
        keys = [(_text(file), _value(file, _unpack(file, "I"))) for _ in range(key_count)]
        metadata = dict(keys)
        assert len(metadata) == key_count
        entries = []
        for _ in range(tensor_count):
            name = _text(file)
            shape = [_unpack(file, "Q") for _ in range(_unpack(file, "I"))][::-1]  # the fastest comes first
            entries.append((name, shape, _unpack(file, "I"), _unpack(file, "Q")))
        start = -(-file.tell() // metadata.get("general.alignment", 32)) * 32
        tensors = {}
        for name, shape, kind, offset in entries:
            assert offset % 32 == 0
            file.seek(start + offset)
            count = int(np.prod(shape))
            tensors[name] = (kind, _values(file, kind, count).reshape(shape))
        assert len(tensors) == tensor_count
    return metadata, tensors


def _values(file: BinaryIO, kind: int, count: int) -> npt.NDArray[np.float32]:
    if kind == _F32:
        return np.frombuffer(file.read(4 * count), "<f4").astype(np.float32)
    if kind == _F16:
        return np.frombuffer(file.read(2 * count), "<f2").astype(np.float32)
    assert kind == _Q8_0
    assert count % 32 == 0
    blocks = np.frombuffer(file.read(34 * count // 32), np.dtype([("scale", "<f2"), ("codes", "i1", 32)]))
    values: npt.NDArray[np.float32] = blocks["scale"].astype(np.float32)[:, None] * blocks["codes"]
    return values.ravel()


# ----------------------------------------------------------------------------------------------------- models


def characters() -> Tokenizer:
    words = [*SPECIAL_TOKENS, *"\n 你好吗？abc"]
    return Tokenizer.from_word2id({word: index for index, word in enumerate(words)})


def bpe(kind: str) -> BpeTokenizer:
    return BpeTokenizer.train(["low lower lowest 你好"] * 3, vocab_size=270, kind=kind)


def spread(model: Any) -> Any:
    """Set all weights, biases and norms to random values, so that no two tensors can be confused."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def gpt2(
    bias: bool = True, gelu: Any = "tanh", n_embd: int = 32, vocab_size: int = 0, tied: bool = True
) -> GPTLMHeadModel:
    vocab_size = vocab_size or characters().get_vocab_size()
    torch.manual_seed(1)
    return spread(GPTLMHeadModel(GPTConfig(n_embd, 4, 2, 0.1, 16, vocab_size, bias, gelu, tied)))  # type: ignore[no-any-return]


def qwen3(tied: bool, vocab_size: int) -> Qwen3ForCausalLM:
    torch.manual_seed(1)
    config = Qwen3Config(vocab_size, 32, 64, 2, 4, 2, 16, 64, 1e-6, 1e5, tied)
    return spread(Qwen3ForCausalLM(config))  # type: ignore[no-any-return]


GPT2_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output": "lm_head",
    "output_norm": "transformer.ln_f",
    "blk.*.attn_norm": "transformer.h.*.ln_1",
    "blk.*.attn_qkv": "transformer.h.*.attn.c_attn",
    "blk.*.attn_output": "transformer.h.*.attn.c_proj",
    "blk.*.ffn_norm": "transformer.h.*.ln_2",
    "blk.*.ffn_up": "transformer.h.*.mlp.c_fc",
    "blk.*.ffn_down": "transformer.h.*.mlp.c_proj",
}
QWEN3_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.*.attn_norm": "model.layers.*.input_layernorm",
    "blk.*.attn_q": "model.layers.*.self_attn.q_proj",
    "blk.*.attn_k": "model.layers.*.self_attn.k_proj",
    "blk.*.attn_v": "model.layers.*.self_attn.v_proj",
    "blk.*.attn_output": "model.layers.*.self_attn.o_proj",
    "blk.*.attn_q_norm": "model.layers.*.self_attn.q_norm",
    "blk.*.attn_k_norm": "model.layers.*.self_attn.k_norm",
    "blk.*.ffn_norm": "model.layers.*.post_attention_layernorm",
    "blk.*.ffn_gate": "model.layers.*.mlp.gate_proj",
    "blk.*.ffn_up": "model.layers.*.mlp.up_proj",
    "blk.*.ffn_down": "model.layers.*.mlp.down_proj",
}
"""llama.cpp's names (its src/llama-arch.cpp) and Hugging Face's, recorded once more, by hand."""


def theirs(metadata: dict[str, Any], tensors: dict[str, tuple[int, npt.NDArray[np.float32]]]) -> Any:
    """Make transformers' model with the metadata's sizes and the file's weights. Every tensor is used."""
    family = metadata["general.architecture"]
    sizes = {key.partition(".")[2]: value for key, value in metadata.items() if key.startswith(f"{family}.")}
    vocab_size = len(metadata["tokenizer.ggml.tokens"])
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=vocab_size,
            n_positions=sizes["context_length"],
            n_embd=sizes["embedding_length"],
            n_layer=sizes["block_count"],
            n_head=sizes["attention.head_count"],
            n_inner=sizes["feed_forward_length"],
            layer_norm_epsilon=sizes["attention.layer_norm_epsilon"],
            activation_function="gelu_new",  # what llama.cpp computes
            tie_word_embeddings="output.weight" not in tensors,
        )
        model, names = transformers.GPT2LMHeadModel(config), GPT2_NAMES
    else:
        config = transformers.Qwen3Config(
            vocab_size=vocab_size,
            max_position_embeddings=sizes["context_length"],
            hidden_size=sizes["embedding_length"],
            intermediate_size=sizes["feed_forward_length"],
            num_hidden_layers=sizes["block_count"],
            num_attention_heads=sizes["attention.head_count"],
            num_key_value_heads=sizes["attention.head_count_kv"],
            head_dim=sizes["attention.key_length"],
            rms_norm_eps=sizes["attention.layer_norm_rms_epsilon"],
            rope_parameters={"rope_type": "default", "rope_theta": sizes["rope.freq_base"]},
            tie_word_embeddings="output.weight" not in tensors,
        )
        assert sizes["attention.value_length"] == sizes["attention.key_length"]
        model, names = transformers.Qwen3ForCausalLM(config), QWEN3_NAMES
    state: dict[str, Tensor] = {}
    for name, (_, values) in tensors.items():
        stem, _, end = name.rpartition(".")
        block = stem.split(".")[1] if stem.startswith("blk.") else ""
        target = names[stem.replace(f"blk.{block}.", "blk.*.", 1)].replace("*", block) + f".{end}"
        is_conv1d = ".c_" in target and end == "weight"
        state[target] = torch.from_numpy(values.T.copy() if is_conv1d else values)
    expected = {name for name, _ in model.named_parameters()}
    assert state.keys() == expected
    assert model.load_state_dict(state, strict=False).unexpected_keys == []
    return model.eval()


def ids_for(model: LanguageModel) -> Tensor:
    return torch.randint(model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(4))


# ---------------------------------------------------------------------------------------------------- weights

CASES: dict[str, tuple[Any, Any]] = {
    "gpt2": (lambda: gpt2(), characters),
    "gpt2 without biases": (lambda: gpt2(bias=False), characters),
    "gpt2, rows not of 32": (lambda: gpt2(n_embd=24), characters),
    "gpt2, head of its own": (lambda: gpt2(tied=False), characters),
    "gpt2 with BPE": (lambda: gpt2(vocab_size=270), lambda: bpe("gpt2")),
    "qwen3": (lambda: qwen3(True, 272), lambda: bpe("qwen2")),
    "qwen3, head of its own": (lambda: qwen3(False, 270), lambda: bpe("qwen2")),
    "qwen3 with characters": (lambda: qwen3(True, characters().get_vocab_size()), characters),
}


@pytest.mark.parametrize("case", CASES)
def test_f32_computes_what_minigpt_does(case: str, tmp_path: Path) -> None:
    model, tokenizer = (make() for make in CASES[case])
    write_gguf(tmp_path / "m.gguf", model, tokenizer, "f32")
    metadata, tensors = read_gguf(tmp_path / "m.gguf")
    assert {kind for kind, _ in tensors.values()} == {_F32}
    ids = ids_for(model)
    # the same float32 weights to the bit; only the order of sums differs
    torch.testing.assert_close(theirs(metadata, tensors)(ids).logits, model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
@pytest.mark.parametrize("case", CASES)
def test_smaller_types_are_rounded_as_the_format_says(case: str, dtype: str, tmp_path: Path) -> None:
    """Compare each value with the exact file's. The format's arithmetic gives the bound."""
    model, tokenizer = (make() for make in CASES[case])
    write_gguf(tmp_path / "exact.gguf", model, tokenizer, "f32")
    write_gguf(tmp_path / "small.gguf", model, tokenizer, dtype)
    _, exact = read_gguf(tmp_path / "exact.gguf")
    metadata, small = read_gguf(tmp_path / "small.gguf")
    assert list(small) == list(exact)
    assert metadata["general.file_type"] == {"f16": 1, "q8_0": 7}[dtype]
    for name, (kind, values) in small.items():
        original = exact[name][1]
        if original.ndim == 1 or name == "position_embd.weight":
            assert kind == _F32
            assert np.array_equal(values, original)
            continue
        if dtype == "f16" or original.shape[-1] % 32:
            assert kind == _F16
            bound = np.abs(original) * 2.0**-11 + 2.0**-25  # half of the last of 11 bits; subnormals
        else:
            assert kind == _Q8_0
            largest = (
                np.abs(original.reshape(-1, 32)).max(1, keepdims=True).repeat(32, 1).reshape(original.shape)
            )
            # half a step of largest / 127, and 127 steps of a scale that is rounded to 11 bits
            bound = largest / 127 * 0.5 + largest * 2.0**-11 + 1e-7
        assert (np.abs(values - original) <= bound).all(), name
    ids = ids_for(model)
    with torch.no_grad():
        difference = (theirs(metadata, small)(ids).logits - model(ids)).abs().max()
        # A proven bound through two blocks would be too wide to say anything. Rounding a value costs up to
        # 2^-11 (f16) or 1/254 of its block's largest (q8_0); some ten matrices lie on the way, and 24 * V
        # logits are compared: 50 such errors are 0.025 and 0.2 of their spread. Confused tensors make more.
        assert difference < {"f16": 50 * 2.0**-11, "q8_0": 50 / 254}[dtype] * model(ids).std()


def test_one_confused_tensor_would_be_seen(tmp_path: Path) -> None:
    model = gpt2()
    write_gguf(tmp_path / "m.gguf", model, characters(), "f32")
    metadata, tensors = read_gguf(tmp_path / "m.gguf")
    first, second = "blk.0.attn_output.weight", "blk.1.attn_output.weight"
    tensors[first], tensors[second] = tensors[second], tensors[first]
    ids = ids_for(model)
    difference = (theirs(metadata, tensors)(ids).logits - model(ids)).abs().max()
    assert difference > 0.3 * model(ids).std()


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_gguf(tmp_path / name, gpt2(), characters(), "q8_0", "name")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


# ------------------------------------------------------------------------------------------------- tokenizers


def test_characters_are_pieces_of_one_character(tmp_path: Path) -> None:
    tokenizer = characters()
    notes = write_gguf(tmp_path / "m.gguf", gpt2(), tokenizer, "f32")
    metadata, _ = read_gguf(tmp_path / "m.gguf")
    inside = {key.removeprefix("tokenizer.ggml."): metadata[key] for key in metadata if "tokenizer" in key}
    assert inside["model"] == "t5"
    assert inside["tokens"] == [word.replace(" ", "\u2581") for word in tokenizer.id2word]
    assert inside["token_type"] == [3, 2, 3] + [1] * (tokenizer.get_vocab_size() - 3)
    assert len(inside["scores"]) == tokenizer.get_vocab_size()
    assert (inside["eos_token_id"], inside["padding_token_id"], inside["unknown_token_id"]) == (2, 0, 1)
    switches = ["add_space_prefix", "remove_extra_whitespaces", "add_bos_token", "add_eos_token"]
    assert [inside[switch] for switch in switches] == [False] * 4
    assert any("one <unk> for several unknown characters" in note for note in notes)
    assert not any("U+2581" in note for note in notes)


def test_a_vocabulary_with_the_sign_for_a_space_says_so(tmp_path: Path) -> None:
    words = [*SPECIAL_TOKENS, " ", "a", "\u2581"]
    tokenizer = Tokenizer.from_word2id({word: index for index, word in enumerate(words)})
    notes = write_gguf(tmp_path / "m.gguf", gpt2(vocab_size=6), tokenizer, "f32")
    assert any("U+2581 stands for the space" in note for note in notes)
    tokens = read_gguf(tmp_path / "m.gguf")[0]["tokenizer.ggml.tokens"]
    assert len(set(tokens)) == len(tokens)
    assert tokens[3] == "\u2581"


@pytest.mark.parametrize(("kind", "name"), [("gpt2", "gpt-2"), ("qwen2", "qwen2")])
def test_byte_level_tokens_and_merges_are_the_files(kind: str, name: str, tmp_path: Path) -> None:
    tokenizer = bpe(kind)
    entries = tokenizer.get_vocab_size()
    notes = write_gguf(tmp_path / "m.gguf", gpt2(vocab_size=entries + 5), tokenizer, "f32")
    metadata, _ = read_gguf(tmp_path / "m.gguf")
    tokenizer.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_bytes())
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert metadata["tokenizer.ggml.pre"] == name
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert {token: index for index, token in enumerate(tokens)}.items() >= content["model"]["vocab"].items()
    assert tokens[entries:] == [f"[PAD{index}]" for index in range(entries, entries + 5)]
    assert types[entries:] == [5] * 5
    assert [index for index, kind in enumerate(types) if kind == 3] == sorted(tokenizer.special_ids)
    assert metadata["tokenizer.ggml.merges"] == [" ".join(pair) for pair in content["model"]["merges"]]
    assert metadata["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert any("NFC" in note for note in notes) == (kind == "qwen2")


def test_what_a_tokenizer_puts_around_a_text_is_the_file_s(tmp_path: Path) -> None:
    """BOS and EOS are the ids of the template, whatever roles the configuration gives them."""
    plain = bpe("gpt2").definition
    expected = {
        # before, after, eos: BOS's id, EOS's id, whether each is added
        ((2,), (), "<|endoftext|>"): (2, 1, True, False),
        ((2,), (1,), "<|endoftext|>"): (2, 1, True, True),
        ((), (1,), None): (None, 1, False, True),
        ((), (), "<|endoftext|>"): (1, 1, False, False),
    }
    for (before, after, eos), values in expected.items():
        named = {"eos_token": eos} if eos else {}
        tokenizer = BpeTokenizer(dataclasses.replace(plain, named=named, before=before, after=after))
        write_gguf(tmp_path / "m.gguf", gpt2(vocab_size=tokenizer.get_vocab_size()), tokenizer, "f32")
        metadata, _ = read_gguf(tmp_path / "m.gguf")
        keys = ("bos_token_id", "eos_token_id", "add_bos_token", "add_eos_token")
        assert tuple(metadata.get(f"tokenizer.ggml.{key}") for key in keys) == values
    two = BpeTokenizer(dataclasses.replace(plain, before=(2, 1)))
    notes = write_gguf(tmp_path / "m.gguf", gpt2(vocab_size=two.get_vocab_size()), two, "f32")
    assert any("several tokens before or behind a text" in note for note in notes)


def test_a_qwen3_that_llama_cpp_lacks_is_refused(tmp_path: Path) -> None:
    model = qwen3(True, 270)
    for change in (
        {"attention_bias": True},
        {"rope_scaling": RopeScaling("linear", 2.0)},
        {"sliding_window": 4},
    ):
        changed = Qwen3ForCausalLM(dataclasses.replace(model.config, **change))
        with pytest.raises(InputError, match=f"a Qwen3 with {next(iter(change))} cannot be written"):
            write_gguf(tmp_path / "m.gguf", changed, bpe("qwen2"), "f32")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"pre_tokenizer": {"type": "Digits", "individual_digits": True}}, "cuts words by a rule"),
        ({"normalizer": {"type": "Lowercase"}}, "has no equivalent of the tokenizer's normalizer"),
    ],
)
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(step: Any, message: str, tmp_path: Path) -> None:
    plain = bpe("gpt2").definition
    if "pre_tokenizer" in step:
        parts = [step["pre_tokenizer"], plain.frame["pre_tokenizer"]]
        step = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": parts}}
    tokenizer = BpeTokenizer(dataclasses.replace(plain, frame={**plain.frame, **step}))
    with pytest.raises(InputError, match=message):
        write_gguf(tmp_path / "m.gguf", gpt2(vocab_size=tokenizer.get_vocab_size()), tokenizer, "f32")


# ----------------------------------------------------------------------------------------------- what differs


def test_the_difference_of_the_two_gelus_is_told(tmp_path: Path) -> None:
    model = gpt2(gelu="exact")
    notes = write_gguf(tmp_path / "m.gguf", model, characters(), "f32")
    largest, share = gelu_difference(model)
    assert 0 < largest < 0.1
    assert 0 <= share <= 1
    assert f"logits differ by up to {largest:.2g}, and {share:.1%}" in notes[0]
    assert [block.mlp.approximate for block in model.blocks] == ["none", "none"]  # left as it was
    # and that is what a reader gets
    ids = torch.randint(model.config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
    there = theirs(*read_gguf(tmp_path / "m.gguf"))(ids).logits
    assert (there - model(ids)).abs().max().item() == pytest.approx(
        largest, rel=0.05
    )  # float32 sums: 1e-6 of 1e-3
    assert not any("GELU" in note for note in write_gguf(tmp_path / "m.gguf", gpt2(), characters()))


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    model = gpt2(n_embd=24)  # rows that q8_0 cannot hold
    with torch.no_grad():
        model.blocks[1].mlp.c_fc.weight[0, 0] = 1e5
    for dtype in ("f16", "q8_0"):
        with pytest.raises(
            InputError, match=r"transformer.h.1.mlp.c_fc.weight holds values too large for float16"
        ):
            write_gguf(tmp_path / "m.gguf", model, characters(), dtype)
    assert list(tmp_path.iterdir()) == []
    write_gguf(tmp_path / "m.gguf", model, characters(), "f32")


# ------------------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_command_converts_a_folder(dtype: str, tmp_path: Path, run_command: RunCommand) -> None:
    save_pretrained(gpt2(), tmp_path / "model", characters())
    result = run_command("convert", "--model", tmp_path / "model", "--dtype", dtype, "--json")
    assert result.code == 0
    told = json.loads(result.out.splitlines()[-1])
    path = tmp_path / f"model-{dtype}.gguf"
    assert told["output"] == str(path)
    assert told["bytes"] == path.stat().st_size
    assert "one <unk>" in result.err
    assert read_gguf(path)[0]["general.name"] == "model"


@pytest.mark.parametrize(("here", "given"), [("model", "."), ("model/deeper", "..")])
def test_a_folder_without_a_name_of_its_own(
    here: str, given: str, tmp_path: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pretrained(gpt2(), tmp_path / "model", characters())
    (tmp_path / here).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / here)
    assert run_command("convert", "--model", given).code == 0
    assert (tmp_path / "model-f16.gguf").is_file()


def test_what_cannot_be_converted_is_said(tmp_path: Path, run_command: RunCommand) -> None:
    save_pretrained(gpt2(), tmp_path / "model", characters())
    result = run_command("convert", "--model", tmp_path / "model", "--output", tmp_path / "model.bin")
    assert result.code == 2
    assert "--output must end in .gguf" in result.err
    assert run_command("convert", "--model", tmp_path / "nowhere").code == 2
    with pytest.raises(InputError, match="dtype must be one of f32, f16, q8_0: got 'q4'"):
        write_gguf(tmp_path / "m.gguf", gpt2(), characters(), "q4")


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'minigpt\[gguf\]'"):
        write_gguf(tmp_path / "m.gguf", gpt2(), characters())
