"""Bottleneck adapters: their computation, their folders, and that they cannot be merged."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import minigpt
from minigpt.errors import InputError
from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM
from minigpt.families.registry import LanguageModel
from minigpt.finetuning.adapters import adapter_tensors, load_adapter, save_adapter
from minigpt.finetuning.bottleneck import BottleneckConfig
from minigpt.finetuning.layers import (
    adapted_layers,
    adapter_names,
    add_adapter,
    disable_adapter,
    merge_and_unload,
    set_adapter,
)
from minigpt.finetuning.lora import LoraConfig, add_weighted_adapter
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.weights.quantized import set_precision
from tests.commands import RunCommand

CHARACTERS = Tokenizer.from_word2id(build_vocabulary(["天地玄黄宇宙洪荒日月盈昃"]))
V = CHARACTERS.get_vocab_size()
MODELS: dict[str, Callable[[], LanguageModel]] = {
    "gpt": lambda: GPTLMHeadModel(GPTConfig(24, 3, 2, 0.0, 16, V, bias=True)),
    "gpt-untied": lambda: GPTLMHeadModel(GPTConfig(24, 3, 2, 0.0, 16, V, tie_word_embeddings=False)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(V, 24, 40, 2, 4, 2, 8, 16)),
    "qwen3-untied": lambda: Qwen3ForCausalLM(
        Qwen3Config(V, 24, 40, 2, 4, 2, 8, 16, tie_word_embeddings=False)
    ),
}
IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return MODELS[request.param]().eval()


def draw(model: LanguageModel, adapter: str = "default") -> None:
    with torch.no_grad():
        for tensor in adapter_tensors(model, adapter).values():
            tensor.add_(torch.randn(tensor.shape) * 0.1)


def test_at_the_start_nothing_changes_and_the_base_is_frozen(model: LanguageModel) -> None:
    plain, base = model(IDS), list(model.parameters())
    add_adapter(model, BottleneckConfig(5))
    assert torch.equal(model(IDS), plain)
    assert not any(parameter.requires_grad for parameter in base)
    # 2 blocks, 2 places in each, and there 5 x 24 down, 5, 24 x 5 up, 24
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == 2 * 2 * (5 * 24 + 5 + 24 * 5 + 24)
    model(IDS).logsumexp(-1).sum().backward()
    tensors = adapter_tensors(model)
    assert all(
        bool(t.grad.any()) == ("adapter_up" in name) for name, t in tensors.items() if t.grad is not None
    )


@torch.no_grad()
def test_the_output_of_attention_and_mlp_goes_through_the_bottleneck(model: LanguageModel) -> None:
    """The outputs equal the formula, applied by hooks on the same model without adapters."""
    twin: Any = copy.deepcopy(model)
    add_adapter(model, BottleneckConfig(5))
    draw(model)
    tensors = adapter_tensors(model)
    for number, block in enumerate(twin.blocks):
        attention, mlp = (getattr(block, name, None) for name in ("attn", "mlp"))
        for part in (attention or block.self_attn, mlp):
            assert part is not None
            name = next(key for key, one in twin.named_modules() if one is part)
            stem = next(
                key.rpartition(".adapter_down")[0]
                for key in tensors
                if f".{number}.{name.rpartition('.')[2]}." in key and key.endswith("adapter_down.weight")
            )
            part.register_forward_hook(_bottleneck(stem, tensors))
    torch.testing.assert_close(model(IDS), twin(IDS), rtol=1e-5, atol=1e-5)


def _bottleneck(stem: str, tensors: dict[str, torch.Tensor]) -> Callable[..., torch.Tensor]:
    def hook(_module: Any, _inputs: Any, h: torch.Tensor) -> torch.Tensor:
        down = h @ tensors[f"{stem}.adapter_down.weight"].t() + tensors[f"{stem}.adapter_down.bias"]
        return (
            h + F.gelu(down) @ tensors[f"{stem}.adapter_up.weight"].t() + tensors[f"{stem}.adapter_up.bias"]
        )

    return hook


@torch.no_grad()
def test_a_folder_is_written_and_read(model: LanguageModel, tmp_path: Path) -> None:
    config = BottleneckConfig(5, layers_to_transform=(1,), modules_to_save=("lm_head",))
    minigpt.save_pretrained(model, tmp_path / "base", CHARACTERS)
    plain = model(IDS)
    add_adapter(model, config)
    draw(model)
    save_adapter(model, config, tmp_path / "adapter", base="base")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_bytes())
    assert (written["peft_type"], written["bottleneck_size"]) == ("BOTTLENECK", 5)
    again = minigpt.load_model(tmp_path / "base", adapter=tmp_path / "adapter")
    assert torch.equal(again(IDS), model(IDS))
    assert not torch.equal(again(IDS), plain)
    with disable_adapter(again):
        assert torch.equal(again(IDS), plain)
    assert load_adapter(minigpt.load_model(tmp_path / "base"), tmp_path / "adapter") == config


@torch.no_grad()
def test_beside_other_weights_and_other_adapters(tmp_path: Path) -> None:
    model = MODELS["qwen3"]().eval()
    minigpt.save_pretrained(model, tmp_path, CHARACTERS)
    add_adapter(model, BottleneckConfig(5), "a")
    draw(model, "a")
    alone = model(IDS)
    add_adapter(model, LoraConfig(r=2), "b")
    draw(model, "b")
    assert adapter_names(model) == {"a": False, "b": True}
    set_adapter(model, "a")
    assert torch.equal(model(IDS), alone)
    with pytest.raises(InputError, match="bottleneck adapters cannot be added: take one of a, b"):
        set_adapter(model, ["a", "b"])
    with pytest.raises(InputError, match="only adapters of LoRA can be weighted"):
        add_weighted_adapter(model, ["a"], [1.0], "c")
    with pytest.raises(InputError, match="bottlenecks are not linear, so weights cannot take them up"):
        merge_and_unload(model)
    assert len(list(adapted_layers(model))) == 2 * 2 + 2 * 7
    set_adapter(model, "b")
    merge_and_unload(model)  # what is not active does not matter
    small = set_precision(minigpt.load_model(tmp_path), "int8")
    add_adapter(small, BottleneckConfig(5))
    plain = small(IDS)
    draw(small)
    assert not torch.equal(small(IDS), plain)


def test_what_is_wrong_with_a_folder_is_one_line(tmp_path: Path) -> None:
    model = MODELS["qwen3"]()
    add_adapter(model, BottleneckConfig(5))
    save_adapter(model, BottleneckConfig(5), tmp_path)
    path = tmp_path / "adapter_config.json"
    text = path.read_text(encoding="utf-8")
    for old, new, message in (
        (
            '"bottleneck_size": 5',
            '"bottleneck_size": 4',
            "says bottleneck_size=4, but .* another size: .* is",
        ),
        ('"bottleneck_size": 5', '"bottleneck_size": 0', "bottleneck_size must be at least 1: got 0"),
        (
            '"bottleneck_size": 5',
            '"bottleneck_size": "a"',
            "bottleneck_size must be a number below 1e9: got a",
        ),
        ('"bottleneck_size": 5', '"bottleneck_size": 5, "act": "relu"', "act='relu' is not known here"),
        ('"layers_to_transform": null', '"layers_to_transform": [5]', "does not fit the model: layers_to_tr"),
    ):
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")
        whole = MODELS["qwen3"]()
        with pytest.raises(InputError, match=message) as error:
            load_adapter(whole, tmp_path)
        assert "\n" not in str(error.value)
        assert adapter_names(whole) == {}
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"adapter_model\.safetensors does not fit the model; "):
        load_adapter(MODELS["gpt"](), tmp_path)


def test_commands_read_it_and_merge_refuses_it(tmp_path: Path, run_command: RunCommand) -> None:
    model = MODELS["gpt"]().eval()
    minigpt.save_pretrained(model, tmp_path / "base", CHARACTERS)
    add_adapter(model, BottleneckConfig(5))
    draw(model)
    save_adapter(model, BottleneckConfig(5), tmp_path / "adapter", base=str(tmp_path / "base"))
    flags = ("--model", tmp_path / "base", "--adapter", tmp_path / "adapter")
    expected = minigpt.generate(model, CHARACTERS, "天地", max_new_tokens=5)
    done = run_command("generate", *flags, "--question", "天地", "--max_new_tokens", 5, "--device", "cpu")
    said = f"note: {tmp_path / 'adapter'} stays beside the float32 weights: PyTorch computes it, slowly\n"
    assert (done.code, done.out, done.err.startswith(said)) == (0, f"{expected}\n", True)
    done = run_command("generate", *flags, "--question", "天地", "--precision", "int8", "--device", "cpu")
    assert done.err.startswith(f"note: {tmp_path / 'adapter'} stays beside the int8 weights")
    advised = run_command("generate", "--model", tmp_path / "adapter", "--question", "天地").err
    assert "bottlenecks cannot be merged: `minigpt generate`, `chat` and `eval` take --model" in advised
    assert f"--model {tmp_path / 'base'} --adapter" in advised
    assert f"--adapter {tmp_path / 'adapter'}" in advised
    assert "minigpt merge" not in advised
    refused = run_command("merge", *flags, "--output", tmp_path / "merged")
    assert (refused.code, refused.out, len(refused.err.splitlines())) == (2, "", 1)
    assert "bottlenecks are not linear" in refused.err
    assert not (tmp_path / "merged").exists()
