"""Qwen3's config.json and weights: an error names the key or the tensor."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minigpt.errors import InputError
from minigpt.families.qwen3.family import FAMILY
from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM
from minigpt.families.qwen3.presets import preset
from minigpt.families.registry import family_of, family_of_json
from minigpt.tokenizer import Tokenizer
from minigpt.weights.pretrained import load_model, load_weights, save_pretrained

WORDS = ["<pad>", "<unk>", "<sep>", *"你好吗"]
TINY = Qwen3Config(len(WORDS), 8, 12, 2, 4, 2, 4, 16, rope_theta=100.0)
UNTIED = Qwen3Config(len(WORDS), 8, 12, 2, 4, 2, 4, 16, tie_word_embeddings=False)
PUBLISHED = Path(__file__).parents[2] / "shared" / "data" / "qwen_tokenizer" / "qwen3_config.json"


def make_model(config: Qwen3Config = TINY) -> Qwen3ForCausalLM:
    torch.manual_seed(1)
    return Qwen3ForCausalLM(config).eval()


# ------------------------------------------------------------------------------------------------ config.json


def test_configurations_come_back() -> None:
    for config in (TINY, UNTIED, Qwen3Config()):
        values = FAMILY.config_to_hugging_face(config, eos_token_id=2, pad_token_id=0)
        assert FAMILY.config_from_hugging_face(json.loads(json.dumps(values))) == config
        assert (values["eos_token_id"], values["pad_token_id"]) == (2, 0)
        assert family_of_json(values) is family_of(config) is FAMILY


def test_the_published_4b_configuration() -> None:
    if not PUBLISHED.exists():
        pytest.skip("../shared/data/qwen_tokenizer is not there")
    assert FAMILY.config_from_hugging_face(json.loads(PUBLISHED.read_bytes())) == preset("4B").config()


@pytest.mark.parametrize(
    "change",
    [
        {"auto_map": {"AutoModelForCausalLM": "evil.py"}},
        {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 3},  # from block 28 on, which this model lacks
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}},
        {"layer_types": ["full_attention"] * 2},
        {"architectures": None},
        {"architectures": ["Qwen3Model"]},
    ],
    ids=str,
)
def test_what_changes_no_result_is_allowed(change: dict[str, Any]) -> None:
    assert FAMILY.config_from_hugging_face({**FAMILY.config_to_hugging_face(TINY), **change}) == TINY


def test_blocks_behind_the_first_ones_have_a_window() -> None:
    values = {**FAMILY.config_to_hugging_face(TINY), "use_sliding_window": True, "sliding_window": 3}
    assert "layer_types" not in values
    found = FAMILY.config_from_hugging_face({**values, "max_window_layers": 1})
    assert (found.sliding_window, found.layer_types) == (3, ("full_attention", "sliding_attention"))


def test_what_is_left_out_is_hugging_faces_default() -> None:
    values = FAMILY.config_to_hugging_face(TINY)
    for key in ("rms_norm_eps", "rope_scaling", "attention_bias", "hidden_act", "architectures"):
        del values[key]
    assert FAMILY.config_from_hugging_face(values) == TINY
    del values["tie_word_embeddings"]
    assert not FAMILY.config_from_hugging_face(values).tie_word_embeddings
    values["rope_parameters"] = {"rope_theta": values.pop("rope_theta"), "rope_type": "default"}
    assert FAMILY.config_from_hugging_face(values).rope_theta == 100.0
    values["num_key_value_heads"] = None
    assert FAMILY.config_from_hugging_face(values).num_key_value_heads == 4


WINDOWED = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}
LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model_type": "qwen2"}, 'model_type must be "qwen3": got \'qwen2\''),
        ({"architectures": ["Qwen3ForTokenClassification"]}, "architectures must be one of Qwen3ForCausalLM"),
        ({"architectures": "Qwen3ForCausalLM"}, "architectures must be"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        ({"attention_bias": 1}, "attention_bias must be True or False"),
        ({**WINDOWED, "sliding_window": 0}, "sliding_window must be a whole number of at"),
        ({**WINDOWED, "max_window_layers": "1"}, "max_window_layers must be a whole number"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"rope_scaling": {"rope_type": "yarn", "factor": -4.0}}, "factor must be a number above 0"),
        ({"rope_scaling": {"rope_type": "su"}}, "rope_type='su' is not supported, only"),
        ({"rope_scaling": {"type": "linear"}}, "missing keys: rope_scaling.factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "missing keys: rope_scaling.low_freq_factor"),
        ({"rope_scaling": 2.0}, "rope_scaling must be null or an object: got 2.0"),
        ({"rope_scaling": {**LINEAR, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supp"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "must be the same for all kinds"),
        ({"rope_parameters": {"rope_theta": 7.0}}, "rope_theta, rope_parameters.rope_theta must be"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "but use_sliding_window or"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types must be null or"),
        ({"layer_types": ["full_attention"]}, "for each of the 2 layers"),
        ({"layer_types": "full_attention"}, "layer_types must be null or"),
        ({"hidden_size": -8}, "hidden_size must be a whole number of at least 1: got hidden_size=-8"),
        ({"hidden_size": None}, "hidden_size must be a whole number"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers must be a whole number"),
        ({"num_attention_heads": [4]}, "num_attention_heads must be a whole number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads"),
        ({"head_dim": 3}, "head_dim must be even"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps must be a finite number above 0"),
        ({"rope_theta": float("nan")}, "rope_theta must be a finite number above 0"),
        ({"rope_theta": None}, "rope_theta must be a finite number above 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be True or False"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)  # fmt: skip
def test_what_this_model_cannot_be_is_an_error_that_names_the_key(change: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError) as error:
        FAMILY.config_from_hugging_face({**FAMILY.config_to_hugging_face(TINY), **change})
    assert text in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_key_value_heads", "head_dim"])
def test_a_missing_key_is_named(key: str) -> None:
    values = FAMILY.config_to_hugging_face(TINY)
    del values[key]
    with pytest.raises(InputError, match=f"missing keys: {key}"):
        FAMILY.config_from_hugging_face(values)


# ---------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("assign", [True, False])
def test_weights_come_back_bit_for_bit(config: Qwen3Config, assign: bool) -> None:
    model = make_model(config)
    written = FAMILY.to_hugging_face(model)
    assert ("lm_head.weight" in written) is not config.tie_word_embeddings
    other = FAMILY.on_meta(config) if assign else Qwen3ForCausalLM(config)
    FAMILY.load_state(other, FAMILY.from_hugging_face(written, config), assign=assign)
    for (name, parameter), again in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, again), name
    assert (other.lm_head.weight is other.model.embed_tokens.weight) is config.tie_word_embeddings
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(other(ids), model(ids))


def test_what_is_read_is_a_copy_in_the_dtype_asked_for() -> None:
    given = {name: tensor.bfloat16() for name, tensor in FAMILY.to_hugging_face(make_model()).items()}
    read = FAMILY.from_hugging_face(given, TINY)
    assert {tensor.dtype for tensor in read.values()} == {torch.float32}
    same = FAMILY.from_hugging_face(given, TINY, torch.bfloat16)
    assert all(same[name].data_ptr() != given[name].data_ptr() for name in given)


def test_names_without_their_prefix_are_read() -> None:
    written = FAMILY.to_hugging_face(make_model())
    bare = {name.removeprefix("model."): tensor for name, tensor in written.items()}
    read = FAMILY.from_hugging_face(bare, TINY)
    assert read.keys() == written.keys()
    assert all(torch.equal(read[name], written[name]) for name in written)
    with pytest.raises(InputError, match="twice, with and without its prefix"):
        FAMILY.from_hugging_face({**written, "norm.weight": written["model.norm.weight"]}, TINY)


def test_a_tied_head_may_be_there_if_it_is_the_same() -> None:
    written = FAMILY.to_hugging_face(make_model())
    head = written["model.embed_tokens.weight"].clone()
    assert "lm_head.weight" not in FAMILY.from_hugging_face({**written, "lm_head.weight": head}, TINY)
    head[0, 0] += 1
    with pytest.raises(InputError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        FAMILY.from_hugging_face({**written, "lm_head.weight": head}, TINY)
    with pytest.raises(InputError, match=r"missing: lm_head\.weight"):
        FAMILY.from_hugging_face(written, UNTIED)


def test_everything_that_does_not_fit_is_listed_in_one_line() -> None:
    weights: dict[str, Tensor] = FAMILY.to_hugging_face(make_model())
    del weights["model.norm.weight"]
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(16)
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(8, 12)
    weights["model.layers.1.self_attn.k_norm.weight"] = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(InputError) as error:
        FAMILY.from_hugging_face(weights, TINY)
    assert str(error.value) == (
        "the weights do not fit the configuration; missing: model.norm.weight; "
        "unexpected: model.layers.0.self_attn.q_proj.bias; "
        "unfit: model.layers.1.self_attn.k_norm.weight is torch.int32 (4,), not float (4,), "
        "model.layers.1.mlp.up_proj.weight is float (8, 12), not float (12, 8)"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_named(value: float) -> None:
    model = make_model()
    weights = FAMILY.to_hugging_face(model)
    weights["model.layers.1.mlp.gate_proj.weight"][3, 2] = value
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.gate_proj\.weight holds NaN or infinity"):
        FAMILY.from_hugging_face(weights, TINY)
    with torch.no_grad():
        model.model.norm.weight[1] = value
    with pytest.raises(InputError, match=r"model\.norm\.weight holds NaN or infinity"):
        FAMILY.to_hugging_face(model)


# ------------------------------------------------------------------------------------------------ directories


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = Tokenizer.from_word2id({word: index for index, word in enumerate(WORDS)})
    save_pretrained(make_model(), tmp_path, tokenizer)
    return tmp_path


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}), encoding="utf-8")


def test_a_directory_comes_back(folder: Path) -> None:
    model = load_model(folder)
    assert isinstance(model, Qwen3ForCausalLM)
    assert not model.training
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(model(ids), make_model()(ids))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"model_type": "qwen4"}, "model_type 'qwen4' is another architecture; minigpt reads gpt2 and qwen3"),
        ({"hidden_size": 16}, r"model\.embed_tokens\.weight is float \(6, 8\), not float \(6, 16\)"),
        ({"num_key_value_heads": 1}, r"k_proj\.weight is float \(8, 8\), not float \(4, 8\)"),
        ({"head_dim": 8}, r"q_proj\.weight is float \(16, 8\), not float \(32, 8\).* and \d more"),
        ({"num_hidden_layers": 1}, r"unexpected: model\.layers\.1\."),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000, but the highest layer in the weights"),
        ({"hidden_size": 10**12, "vocab_size": 10**12}, "sizes are too large for any machine"),
        ({"vocab_size": 10**30}, "sizes are too large for any machine"),
    ],
    ids=str,
)
def test_sizes_that_are_not_the_weights_are_said_at_once(
    folder: Path, values: dict[str, Any], text: str
) -> None:
    change(folder, **values)
    with pytest.raises(InputError, match=text) as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def test_a_shard_that_is_not_there_is_missing_tensors(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    last = {name: tensor for name, tensor in weights.items() if ".layers.0." not in name}
    save_file(last, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"missing: model\.layers\.0\.input_layernorm\.weight.* and 8 more"):
        load_model(folder)


def test_weights_are_copied_into_a_model_of_the_same_configuration_alone(folder: Path) -> None:
    model = make_model()
    before = model.model.embed_tokens.weight
    with torch.no_grad():
        before.zero_()
    load_weights(model, folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight is before
    assert torch.equal(before, make_model().lm_head.weight)
    with pytest.raises(InputError, match=r"another model, rope_theta=100\.0 instead of 1000000\.0"):
        load_weights(make_model(UNTIED), folder)
