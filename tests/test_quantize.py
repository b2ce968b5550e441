"""`minigpt quantize`: a folder equals rounding in memory, bit for bit, and damage is refused."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import minigpt
from minigpt.errors import InputError
from minigpt.families.qwen3.model import Qwen3Config
from minigpt.families.registry import ModelConfig, new_model
from minigpt.model import GPTConfig
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.weights.quantized import precision_of, set_precision
from tests.commands import Result, RunCommand

TOKENIZER = Tokenizer.from_word2id(build_vocabulary(["天地玄黄，宇宙洪荒。日月盈昃"]))
V = TOKENIZER.get_vocab_size()
GPT = GPTConfig(n_embd=24, n_head=2, n_layer=2, block_size=16, vocab_size=V, dropout=0.0, bias=True)
CONFIGS: dict[str, ModelConfig] = {
    "gpt": GPT,
    "gpt without biases": GPTConfig(
        n_embd=24, n_head=2, n_layer=1, block_size=16, vocab_size=V, dropout=0.0, bias=False
    ),
    "qwen3": Qwen3Config(V, 32, 88, 2, 4, 2, 8, 16),
    "qwen3 with a head of its own": Qwen3Config(V, 32, 88, 1, 4, 2, 8, 16, tie_word_embeddings=False),
}


def saved(folder: Path, config: ModelConfig = GPT) -> Path:
    torch.manual_seed(0)
    model = new_model(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: nothing stays at 0 or 1
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    minigpt.save_pretrained(model, folder, TOKENIZER)
    return folder


@pytest.fixture
def command(run_command: RunCommand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)
    return partial(run_command, "quantize")


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        scores: torch.Tensor = model(torch.arange(V)[None, :16] % V)
        return scores


# -- bad input ----------------------------------------------------------------------------------------------


def assert_refused(result: Result, *fragments: str) -> None:
    assert (result.code, result.out) == (2, "")
    assert result.err.count("\n") == 1, result.err
    for fragment in fragments:
        assert fragment in result.err


def test_what_the_command_refuses(command: Any, run_command: RunCommand) -> None:
    saved(Path("model"))
    assert_refused(command("--model", "model"), "--output")
    assert_refused(
        command("--model", "model", "--output", "new", "--precision", "int3"), "--precision", "'int3'"
    )
    assert_refused(command("--model", "nowhere", "--output", "new"), "nowhere does not exist")
    assert_refused(command("--model", "model", "--output", "model"), "model exists already")
    assert command("--model", "model", "--output", "small").code == 0
    assert_refused(command("--model", "small", "--output", "new"), "small is quantised already")
    assert command("--model", "model", "--output", "smaller", "--precision", "int4").code == 0
    assert_refused(command("--model", "smaller", "--output", "new"), "smaller is quantised already")
    for folder in ("small", "smaller"):
        result = run_command("convert", "--model", folder)
        assert_refused(result, f"{folder} is quantised: give the folder that it was made from")
    assert not Path("new").exists()


def test_weights_beyond_float16_are_refused(command: Any) -> None:
    saved(Path("model"))
    weights = load_file("model/model.safetensors")
    weights["transformer.wte.weight"][0, 0] = 1e5
    save_file(weights, "model/model.safetensors", metadata={"format": "pt"})
    result = command("--model", "model", "--output", "new", "--precision", "float16")
    assert_refused(result, "transformer.wte.weight holds values beyond 65,504")
    assert not Path("new").exists()


def damaged(folder: Path, name: str, change: Any, file: str = "int8.safetensors") -> Path:
    """Copy a folder with one tensor changed or removed (None), and without the manifest."""
    copy = folder.parent / "damaged"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    (copy / "manifest.json").unlink()
    weights = load_file(copy / file)
    tensor = change(weights.pop(name))
    if tensor is not None:
        weights[name] = tensor.contiguous()
    save_file(weights, copy / file, metadata={"format": "pt"})
    return copy


FC = "transformer.h.1.mlp.c_fc"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (f"{FC}.scale", lambda t: t * float("nan"), f"{FC}.scale holds NaN or infinity: it is damaged"),
        (f"{FC}.scale", lambda t: -t, f"{FC}.scale holds a scale below 0"),
        (f"{FC}.scale", lambda t: None, f"missing: {FC}.scale"),
        (
            f"{FC}.scale",
            lambda t: t[:, :-1],
            f"{FC}.scale is torch.float32 (1, 95), not torch.float32 (1, 96)",
        ),
        (f"{FC}.scale", lambda t: t.half(), f"{FC}.scale is torch.float16 (1, 96), not torch.float32"),
        (
            f"{FC}.weight",
            lambda t: t.float(),
            f"{FC}.weight is torch.float32 (24, 96), not torch.int8 (24, 96)",
        ),
        (f"{FC}.weight", lambda t: t.t(), f"{FC}.weight is torch.int8 (96, 24), not torch.int8 (24, 96)"),
        (f"{FC}.weight", lambda t: torch.full_like(t, -128), f"{FC}.weight holds the number -128"),
        ("transformer.wte.weight", lambda t: t / 0, "transformer.wte.weight holds NaN or infinity"),
    ],
)
def test_damage_is_named(command: Any, tmp_path: Path, name: str, change: Any, message: str) -> None:
    saved(Path("model"))
    assert command("--model", "model", "--output", "small").code == 0
    with pytest.raises(InputError) as refused:
        minigpt.load_model(damaged(tmp_path / "small", name, change))
    assert message in str(refused.value)
    assert "damaged/int8.safetensors: " in str(refused.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (f"{FC}.scales", lambda t: t * float("nan"), f"{FC}.scales holds NaN or infinity: it is damaged"),
        (f"{FC}.scales", lambda t: -t, f"{FC}.scales holds a scale below 0"),
        (f"{FC}.scales", lambda t: None, f"missing: {FC}.scales"),
        (f"{FC}.weight", lambda t: t.t(), f"{FC}.weight is torch.uint8 (32, 96), not torch.uint8 (96, 32)"),
        (f"{FC}.weight", lambda t: t.char(), f"{FC}.weight is torch.int8 (96, 32), not torch.uint8"),
        ("lm_head.scale", lambda t: -t, "lm_head.scale holds a scale below 0"),
        ("transformer.wte.weight", lambda t: t.float(), "transformer.wte.weight is torch.float32"),
    ],
)
def test_damage_of_int4_is_named(command: Any, tmp_path: Path, name: str, change: Any, message: str) -> None:
    saved(Path("model"))
    assert command("--model", "model", "--output", "small", "--precision", "int4").code == 0
    with pytest.raises(InputError) as refused:
        minigpt.load_model(damaged(tmp_path / "small", name, change, "int4.safetensors"))
    assert message in str(refused.value)
    assert "damaged/int4.safetensors: " in str(refused.value)


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize(
    "change",
    [{"n_layer": 10**9}, {"n_layer": 10**250}, {"vocab_size": 10**15}, {"n_embd": 2 * 10**9}],
    ids=["layers", "more layers", "vocabulary", "width"],
)
def test_absurd_sizes_are_an_error_before_they_cost_anything(
    command: Any, tmp_path: Path, precision: str, change: dict[str, int]
) -> None:
    saved(Path("model"))
    assert command("--model", "model", "--output", "small", "--precision", precision).code == 0
    (tmp_path / "small/manifest.json").unlink()
    path = tmp_path / "small/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    # to sketch a model of the first of these would take hours
    with pytest.raises(
        InputError, match=r"highest layer in the weights|too large for any machine|do not fit"
    ):
        minigpt.load_model(tmp_path / "small")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "names the method 'gptq': only 'minigpt'"),
        ({"quant_method": "minigpt", "precision": "int3"}, "precision must be 'int8' or 'int4': got 'int3'"),
        ("int8", "names the method 'int8'"),
    ],
)
def test_other_formats_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    folder = saved(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": content}))
    with pytest.raises(InputError, match=message):
        minigpt.load_model(folder)


def test_a_flipped_bit_is_noticed(command: Any) -> None:
    saved(Path("model"))
    assert command("--model", "model", "--output", "small").code == 0
    weights = Path("small/int8.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match="does not match its checksum"):
        minigpt.load_model("small")


def test_the_precision_of_a_quantised_folder_is_fixed(command: Any) -> None:
    saved(Path("model"))
    assert command("--model", "model", "--output", "small").code == 0
    assert minigpt.load_model("small", dtype="stored").config == minigpt.load_model("model").config
    with pytest.raises(
        InputError, match=r"small is quantised, its arithmetic is fixed: got dtype=torch\.float16"
    ):
        minigpt.load_model("small", dtype=torch.float16)


def test_a_quantised_model_is_neither_saved_as_a_plain_one_nor_rounded_twice(tmp_path: Path) -> None:
    model = set_precision(minigpt.load_model(saved(tmp_path / "model")), "int8")
    with pytest.raises(InputError, match="a quantised model cannot be saved here"):
        minigpt.save_pretrained(model, tmp_path / "again", TOKENIZER)
    with pytest.raises(
        InputError, match="the model is stored in int8: take its unquantised folder for float16"
    ):
        set_precision(model, "float16")
    assert set_precision(model, "int8") is set_precision(model, None) is model
    with pytest.raises(InputError, match="a quantised model cannot be saved here"):
        minigpt.save_pretrained(
            set_precision(minigpt.load_model(tmp_path / "model"), "int4"), tmp_path / "again", TOKENIZER
        )


# -- what is written ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_folder_is_the_model_that_rounding_in_memory_gives(command: Any, precision: Any, name: str) -> None:
    saved(Path("model"), CONFIGS[name])
    result = command("--model", "model", "--output", "small", "--precision", precision, "--json")
    assert (result.code, result.err) == (0, "")
    numbers = json.loads(result.out.splitlines()[-1])
    assert numbers["before"] == Path("model/model.safetensors").stat().st_size
    assert numbers["after"] == Path(f"small/{precision}.safetensors").stat().st_size < numbers["before"]
    expected = set_precision(minigpt.load_model("model"), precision)
    read = minigpt.load_model("small")
    assert precision_of(read) == precision
    assert set_precision(read, precision) is set_precision(read, None) is read
    state = read.state_dict()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(state.pop(key), tensor), key
    assert not state
    assert torch.equal(logits(read), logits(expected))
    assert minigpt.load_tokenizer("small") == TOKENIZER


@pytest.mark.parametrize("name", ["gpt", "qwen3"])
def test_four_bits_are_as_described(command: Any, name: str) -> None:
    """The test reads them by hand: two numbers in a byte, a scale and an offset for 64 neighbours."""
    saved(Path("model"), CONFIGS[name])
    assert command("--model", "model", "--output", "small", "--precision", "int4").code == 0
    before, after = load_file("model/model.safetensors"), load_file("small/int4.safetensors")
    products = [key.removesuffix(".scales") for key in after if key.endswith(".scales")]
    assert len(products) == {"gpt": 2 * 4, "qwen3": 2 * 7}[name]
    for product in products:
        exact = before[f"{product}.weight"]
        exact = exact.t() if name == "gpt" else exact  # (N, K)
        packed, scales = after[f"{product}.weight"].int(), after[f"{product}.scales"].float()
        for row in (0, len(exact) - 1):
            for column in range(exact.shape[1]):
                byte = int(packed[row, column // 2])
                number = byte % 16 if column % 2 else byte // 16
                scale, offset = scales[column // 64, row].tolist()
                found, goal = (number - 8) * scale + offset, float(exact[row, column])
                # half a step; and what bfloat16's 8 bits make of the ends, 8 steps off the offset
                assert abs(found - goal) <= 0.51 * scale + (abs(offset) + 8 * scale) * 2**-8
    assert after["lm_head.weight"].dtype == torch.int8


@pytest.mark.parametrize("name", ["gpt", "qwen3"])
def test_weight_times_scale_is_hugging_face_s_matrix(command: Any, name: str) -> None:
    saved(Path("model"), CONFIGS[name])
    assert command("--model", "model", "--output", "small").code == 0
    before, after = load_file("model/model.safetensors"), load_file("small/int8.safetensors")
    head = before.get("transformer.wte.weight", before.get("model.embed_tokens.weight"))
    assert head is not None
    before["lm_head.weight"] = head  # the tied head has weights of its own
    scales = {key for key in after if key.endswith(".scale")}
    assert after.keys() - scales == before.keys()
    for key, exact in before.items():
        scale = after.get(f"{key.removesuffix('.weight')}.scale") if key.endswith(".weight") else None
        if scale is None:
            assert torch.equal(after[key], exact), key
        else:  # rounding to whole numbers is off by half of one; the rest is float32's own rounding
            assert ((after[key] * scale - exact).abs() <= scale * 0.5001).all(), key


def test_other_programs_refuse_int8_and_read_float16(command: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    saved(Path("model"))
    for folder, precision in (("smaller", "int4"), ("small", "int8")):
        assert command("--model", "model", "--output", folder, "--precision", precision).code == 0
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            AutoModelForCausalLM.from_pretrained(folder)
    assert command("--model", "model", "--output", "half", "--precision", "float16").code == 0
    for folder in ("small", "half"):  # who may read a config.json may read the weights beside it
        assert len({path.stat().st_mode for path in Path(folder).iterdir()}) == 1
    theirs = AutoModelForCausalLM.from_pretrained("half", dtype=torch.float32).eval()
    ours = minigpt.load_model("half")
    # the same weights in float32, summed in another order: units in the last place
    torch.testing.assert_close(logits(theirs).logits, logits(ours), atol=1e-4, rtol=0)  # type: ignore[attr-defined]
    assert AutoTokenizer.from_pretrained("half")("天地").input_ids[:2] == TOKENIZER.encode_text("天地")
    for key, tensor in load_file("half/model.safetensors").items():
        assert torch.equal(tensor, load_file("model/model.safetensors")[key].half()), key
