"""LoRA, rsLoRA and DoRA against PEFT: outputs, gradients, three steps, and folders in both directions."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import minigpt
from minigpt.errors import InputError
from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM
from minigpt.families.registry import LanguageModel
from minigpt.finetuning.adapters import adapter_tensors, load_adapter, save_adapter
from minigpt.finetuning.lora import LoraConfig, apply_lora, lora_layers, merge_and_unload, module_names
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.tokenizer import Tokenizer, build_vocabulary

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings(  # of what PEFT asks transformers
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)
CHARACTERS = Tokenizer.from_word2id(build_vocabulary(["天地玄黄宇宙洪荒日月盈昃"]))
V = CHARACTERS.get_vocab_size()
MODELS: dict[str, Callable[[], LanguageModel]] = {
    "gpt2": lambda: GPTLMHeadModel(GPTConfig(24, 3, 2, 0.0, 16, V, bias=True, gelu="tanh")),
    "gpt": lambda: GPTLMHeadModel(GPTConfig(24, 3, 2, 0.0, 16, V)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(V, 24, 40, 2, 4, 2, 8, 16)),
    "qwen3-untied": lambda: Qwen3ForCausalLM(
        Qwen3Config(V, 24, 40, 2, 4, 2, 8, 16, tie_word_embeddings=False)
    ),
}
QWEN3 = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIGS = {
    "lora": LoraConfig(r=3, lora_alpha=7),
    "rslora": LoraConfig(r=3, lora_alpha=7, use_rslora=True),
    "dora": LoraConfig(r=3, lora_alpha=7, use_dora=True),
    "one block": LoraConfig(r=2, lora_alpha=4, layers_to_transform=(1,)),
}


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(5)
    model = MODELS[request.param]()
    with torch.no_grad():
        for parameter in model.parameters():  # so large that every part counts
            parameter.add_(torch.randn_like(parameter) * 0.1)
    minigpt.save_pretrained(model, tmp_path / "base", CHARACTERS)
    return tmp_path / "base"


def peft_config(config: LoraConfig, is_gpt2: bool) -> Any:
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    values["init_lora_weights"] = True
    values["layers_to_transform"] = list(config.layers_to_transform) or None
    values["modules_to_save"] = list(config.modules_to_save) or None
    values["fan_in_fan_out"] = is_gpt2
    if config.layers_to_transform:  # PEFT wants names then
        values["target_modules"] = ["c_attn", "c_proj", "c_fc"] if is_gpt2 else [*QWEN3]
    return peft.LoraConfig(task_type="CAUSAL_LM", **values)


def theirs_of(folder: Path, config: LoraConfig, dtype: torch.dtype) -> Any:
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return peft.get_peft_model(base, peft_config(config, base.config.model_type == "gpt2"))


def randomised(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Values that no product hides: B is zero at the start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in sorted(tensors):
            tensor = tensors[name]
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
            tensor.add_(noise * 0.1)
    return tensors


def ids() -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randint(3, V, (3, 9), generator=generator)


def loss_of(model: Any, given: torch.Tensor) -> torch.Tensor:
    logits = model(given)
    logits = getattr(logits, "logits", logits)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), given[:, 1:].flatten())


# float64's sums of some hundred products differ by about 1e-14; float32's by about 1e-6 of values near 1
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_gradients_and_three_steps(folder: Path, name: str, dtype: torch.dtype, close: float) -> None:
    config = CONFIGS[name]
    if isinstance(minigpt.load_model(folder), Qwen3ForCausalLM):
        close = max(close, 1e-6)  # transformers computes norms and angles in float32 there, always
    ours = minigpt.load_model(folder).to(dtype)
    apply_lora(ours, config)
    theirs = theirs_of(folder, config, dtype)
    own = randomised(adapter_tensors(ours, config))
    named = {
        key.replace(".default", ""): value for key, value in theirs.named_parameters() if value.requires_grad
    }
    named = {
        key.removesuffix(".weight") if "magnitude" in key else key: value for key, value in named.items()
    }
    assert own.keys() == named.keys()
    with torch.no_grad():
        for key, value in own.items():
            named[key].copy_(value)
    assert [p for p in ours.parameters() if p.requires_grad] == list(own.values())
    optimizers = [torch.optim.AdamW(each.values(), lr=1e-2) for each in (own, named)]
    for given, _ in zip(ids(), range(3)):
        losses = [loss_of(ours, given), loss_of(theirs, given)]
        assert abs(losses[0].item() - losses[1].item()) < close
        for loss, optimizer in zip(losses, optimizers):
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        for key, value in own.items():
            assert value.grad is not None
            assert (value.grad - named[key].grad).abs().max() < close, key
        for optimizer in optimizers:
            optimizer.step()
    # Adam divides by the gradient's size: where that is near zero, an error of rounding becomes a part of a
    # step
    for key, value in own.items():
        assert (value - named[key]).abs().max() < 1e3 * close, key


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_folders_in_both_directions(folder: Path, name: str, tmp_path: Path) -> None:
    config, given = CONFIGS[name], next(ids())
    ours = minigpt.load_model(folder)
    apply_lora(ours, config)
    randomised(adapter_tensors(ours, config))
    save_adapter(ours, config, tmp_path / "ours", base=str(folder))
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    read = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    expected = ours(given)
    assert (read(given).logits - expected).abs().max() < 1e-5
    read.save_pretrained(tmp_path / "theirs")
    again = minigpt.load_model(folder)
    assert load_adapter(again, tmp_path / "theirs").r == config.r
    assert torch.equal(again(given), expected)
    merged = merge_and_unload(again)
    assert not list(lora_layers(merged))
    assert (merged(given) - expected).abs().max() < 1e-5
    minigpt.save_pretrained(merged, tmp_path / "merged", CHARACTERS)
    assert torch.equal(minigpt.load_model(tmp_path / "merged")(given), merged(given))


@torch.no_grad()
def test_at_the_start_nothing_is_changed_and_the_base_is_frozen(folder: Path) -> None:
    plain, given = minigpt.load_model(folder), next(ids())
    model = minigpt.load_model(folder)
    apply_lora(model, LoraConfig(modules_to_save=("lm_head",)))
    assert torch.equal(model(given), plain(given))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name or "lm_head" in name or "wte" in name or "embed" in name for name in trained)
    assert any(".lora_A" in name for name in trained)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "r must be at least 1"),
        ({"lora_dropout": 1.0}, "lora_dropout must be"),
        ({"target_modules": ("q_prj",)}, "unknown module in target_modules 'q_prj'"),
        ({"target_modules": "("}, "no regular expression"),
        ({"target_modules": "nothing"}, "chooses no layer"),
        ({"layers_to_transform": (2,)}, "the model has 0 to 1"),
        ({"modules_to_save": ("head",)}, "unknown module in modules_to_save 'head'"),
    ],
)
def test_bad_configurations(values: dict[str, Any], message: str) -> None:
    model = MODELS["qwen3"]()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(InputError, match=message):
        apply_lora(model, LoraConfig(**values))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_an_adapter_of_another_model_or_kind_is_refused(tmp_path: Path) -> None:
    model = MODELS["qwen3"]()
    apply_lora(model, LoraConfig())
    save_adapter(model, LoraConfig(), tmp_path)
    with pytest.raises(InputError, match=r"adapter_model\.safetensors does not fit the model"):
        load_adapter(Qwen3ForCausalLM(Qwen3Config(V, 32, 40, 2, 4, 2, 8, 16)), tmp_path)
    with pytest.raises(InputError, match="unknown module in target_modules"):
        load_adapter(MODELS["gpt2"](), tmp_path)
    text = (tmp_path / "adapter_config.json").read_text(encoding="utf-8")
    for old, new, message in (
        ('"LORA"', '"IA3"', "only LORA is known"),
        ('"bias": "none"', '"bias": "all"', "bias='all' is not known here"),
        ('"r": 8', '"r": 4', "does not fit the model"),
        ('"r": 8', '"r": "x"', "r must be a number"),
    ):
        (tmp_path / "adapter_config.json").write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(InputError, match=message):
            load_adapter(MODELS["qwen3"](), tmp_path)
    (tmp_path / "adapter_config.json").write_text(text, encoding="utf-8")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="does not exist"):
        load_adapter(MODELS["qwen3"](), tmp_path)
    with pytest.raises(InputError, match="no adapter's folder"):
        load_adapter(MODELS["qwen3"](), tmp_path / "nowhere")


def test_names_are_hugging_face_s() -> None:
    names = module_names(MODELS["qwen3"]())
    assert names["model.layers.1.self_attn.q_proj"] == "model.layers.1.self_attn.q_proj"
    assert len(names) == 2 * 7 + 1
