"""LoRA, rsLoRA, DoRA and IA3 compared with PEFT: outputs, gradients, three steps, folders both ways."""

import copy
import dataclasses
import functools
import json
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
from minigpt.finetuning.ia3 import IA3Config
from minigpt.finetuning.layers import add_adapter
from minigpt.finetuning.lora import (
    LoraConfig,
    adapter_names,
    add_weighted_adapter,
    apply_lora,
    disable_adapter,
    lora_layers,
    merge_and_unload,
    module_names,
    set_adapter,
)
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.storage.files import verify_manifest
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.weights.quantized import set_precision
from tests.commands import RunCommand

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    # of what PEFT asks transformers
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # what an adapter of lm_head or the embedding leads to is tested here
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but the target:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]
CHARACTERS = Tokenizer.from_word2id(build_vocabulary(["天地玄黄宇宙洪荒日月盈昃"]))
V = CHARACTERS.get_vocab_size()
MODELS: dict[str, Callable[[], LanguageModel]] = {
    "gpt2": lambda: GPTLMHeadModel(GPTConfig(24, 3, 2, 0.0, 16, V, bias=True, gelu="tanh")),
    "gpt": lambda: GPTLMHeadModel(GPTConfig(24, 3, 2, 0.0, 16, V)),
    "gpt2-untied": lambda: GPTLMHeadModel(
        GPTConfig(24, 3, 2, 0.0, 16, V, bias=True, gelu="tanh", tie_word_embeddings=False)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(V, 24, 40, 2, 4, 2, 8, 16)),
    "qwen3-untied": lambda: Qwen3ForCausalLM(
        Qwen3Config(V, 24, 40, 2, 4, 2, 8, 16, tie_word_embeddings=False)
    ),
}
QWEN3 = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIGS: dict[str, LoraConfig | IA3Config] = {
    "lora": LoraConfig(r=3, lora_alpha=7),
    "rslora": LoraConfig(r=3, lora_alpha=7, use_rslora=True),
    "dora": LoraConfig(r=3, lora_alpha=7, use_dora=True),
    "one block": LoraConfig(r=2, lora_alpha=4, layers_to_transform=(1,)),
    "whole head": LoraConfig(r=2, lora_alpha=4, modules_to_save=("lm_head",)),
    "head": LoraConfig(r=2, lora_alpha=4, target_modules=r"lm_head|.*\.0\..*(c_attn|q_proj)"),
    "everything": LoraConfig(
        r=2,
        lora_alpha=4,
        use_rslora=True,
        use_dora=True,
        layers_to_transform=(0,),
        modules_to_save=("lm_head",),
    ),
    "ia3": IA3Config(),
    "ia3 by pattern": IA3Config(r".*\.1\.mlp\.\w*(fc|proj)", r".*(c_fc|up_proj)", ("lm_head",)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that returns the folder of a model. No test changes it."""

    @functools.cache
    def made(name: str) -> Path:
        torch.manual_seed(5)
        model, folder = MODELS[name](), tmp_path_factory.mktemp("base")
        with torch.no_grad():
            for parameter in model.parameters():  # large weights, so that every part has an effect
                parameter.add_(torch.randn_like(parameter) * 0.1)
        minigpt.save_pretrained(model, folder / "base", CHARACTERS)
        return folder / "base"

    return made


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT writes a page about each folder, which nothing reads, and compiles its template each time."""
    monkeypatch.setattr(peft.PeftModel, "create_or_update_model_card", lambda self, output: None)


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, folders: Callable[[str], Path]) -> Path:
    return folders(request.param)


@functools.cache
def _pretrained(folder: Path, dtype: torch.dtype) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def pretrained(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Return transformers' model. Its file is read once."""
    return copy.deepcopy(_pretrained(folder, dtype))


def peft_config(config: LoraConfig | IA3Config, is_gpt2: bool) -> Any:
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if isinstance(config, IA3Config):
        values["target_modules"] = config.target_modules or None
        values["modules_to_save"] = list(config.modules_to_save) or None
        return peft.IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=is_gpt2, **values)
    values["init_lora_weights"] = True
    values["layers_to_transform"] = list(config.layers_to_transform) or None
    values["modules_to_save"] = list(config.modules_to_save) or None
    values["fan_in_fan_out"] = is_gpt2
    if config.layers_to_transform:  # PEFT wants names then
        values["target_modules"] = ["c_attn", "c_proj", "c_fc"] if is_gpt2 else [*QWEN3]
    return peft.LoraConfig(task_type="CAUSAL_LM", **values)


def theirs_of(folder: Path, config: LoraConfig | IA3Config, dtype: torch.dtype) -> Any:
    base = pretrained(folder, dtype)
    return peft.get_peft_model(base, peft_config(config, base.config.model_type == "gpt2"))


def randomised(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return random values in place of the initial ones, because B is zero at the start."""
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


def exact_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    variance = x.square().mean(-1, keepdim=True)
    exact: torch.Tensor = module.weight * x * torch.rsqrt(variance + module.variance_epsilon)
    return exact


# float64's sums of some hundred products differ by about 1e-14; float32's by about 1e-6 of values near 1
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_gradients_and_three_steps(
    folder: Path, name: str, dtype: torch.dtype, close: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIGS[name]
    if dtype == torch.float64:  # transformers computes these norms in float32, always
        norm = transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm
        monkeypatch.setattr(norm, "forward", exact_norm)
    ours = minigpt.load_model(folder).to(dtype)
    add_adapter(ours, config)
    theirs = theirs_of(folder, config, dtype)
    own = randomised(adapter_tensors(ours))
    named = {
        key.replace(".default", ""): value for key, value in theirs.named_parameters() if value.requires_grad
    }
    named = {
        (key.removesuffix(".weight") if "magnitude" in key else key).replace("modules_to_save.", ""): value
        for key, value in named.items()
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
    add_adapter(ours, config)
    randomised(adapter_tensors(ours))
    save_adapter(ours, config, tmp_path / "ours", base=str(folder))
    base = pretrained(folder)
    read = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    expected = ours(given)
    assert (read(given).logits - expected).abs().max() < 1e-5
    read.save_pretrained(tmp_path / "theirs")
    again, plain = minigpt.load_model(folder), minigpt.load_model(folder)(given)
    loaded = load_adapter(again, tmp_path / "theirs")
    assert type(loaded) is type(config)
    assert getattr(loaded, "r", None) == getattr(config, "r", None)
    assert torch.equal(again(given), expected)
    with disable_adapter(again), read.disable_adapter():
        assert torch.equal(again(given), plain)
        assert (read(given).logits - plain).abs().max() < 1e-5
    assert torch.equal(again(given), expected)
    merged = merge_and_unload(again)
    assert adapter_names(merged) == {}
    assert (merged(given) - expected).abs().max() < 1e-5
    assert torch.equal(minigpt.load_model(folder, adapter=tmp_path / "theirs")(given), merged(given))
    minigpt.save_pretrained(merged, tmp_path / "merged", CHARACTERS)
    assert torch.equal(minigpt.load_model(tmp_path / "merged")(given), merged(given))


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("gpt2", {"target_modules": ("attn.c_proj",), "modules_to_save": ("mlp.c_fc", "wte", "ln_f")}),
        ("gpt2", {"target_modules": ("transformer.h.1.mlp.c_fc",), "modules_to_save": ("h.0.mlp",)}),
        (
            "qwen3",
            {"target_modules": ("self_attn.q_proj",), "modules_to_save": ("embed_tokens", "model.norm")},
        ),
        ("qwen3-untied", {"target_modules": ("lm_head", "v_proj"), "layers_to_transform": ()}),
    ],
)
@torch.no_grad()
def test_names_of_modules_mean_what_they_mean_in_peft(
    family: str, values: dict[str, Any], tmp_path: Path
) -> None:
    model, config, given = MODELS[family](), LoraConfig(r=2, **values), next(ids())
    minigpt.save_pretrained(model.eval(), tmp_path / "base", CHARACTERS)
    theirs = theirs_of(tmp_path / "base", config, torch.float32)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    expected = theirs(given).logits
    load_adapter(model, tmp_path / "theirs")
    assert (model(given) - expected).abs().max() < 1e-5
    if config.modules_to_save == ():  # PEFT has saved lm_head's own weight, too: it must be this one
        load_adapter(model, tmp_path / "theirs", "again")
        assert (model(given) - expected).abs().max() < 1e-5
        with pytest.raises(InputError, match=r"lm_head\.base_layer\.weight is not the model's own weight"):
            load_adapter(MODELS[family](), tmp_path / "theirs")
        whole = set_precision(minigpt.load_model(tmp_path / "base"), "int8")
        with pytest.raises(InputError, match="it cannot be compared with quantised weights"):
            load_adapter(whole, tmp_path / "theirs")
    save_adapter(model, config, tmp_path / "ours", base=str(tmp_path / "base"))
    base = pretrained(tmp_path / "base")
    read = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    assert (read(given).logits - expected).abs().max() < 1e-5


@torch.no_grad()
def test_several_adapters_switched_added_and_weighted(folder: Path, tmp_path: Path) -> None:
    given, parts = next(ids()), {"a": tmp_path / "a", "b.1": tmp_path / "b.1"}
    for number, part in enumerate(parts.values()):
        config = LoraConfig(r=3, lora_alpha=5 + number, use_rslora=number == 1)
        model = minigpt.load_model(folder)
        apply_lora(model, config)
        for tensor in adapter_tensors(model).values():
            tensor.copy_(torch.randn(tensor.shape) * 0.2)
        save_adapter(model, config, part, base=str(folder))
    ours = minigpt.load_model(folder, adapter=list(parts.values()))
    base = pretrained(folder)
    theirs = peft.PeftModel.from_pretrained(base, parts["a"], adapter_name="a")
    theirs.load_adapter(parts["b.1"], adapter_name="b_1")
    assert adapter_names(ours) == {"a": True, "b.1": False}

    def agree() -> None:
        assert (ours(given) - theirs(given).logits).abs().max() < 1e-5

    agree()
    seen = [ours(given)]
    set_adapter(ours, "b.1")
    theirs.set_adapter("b_1")
    agree()
    seen.append(ours(given))
    set_adapter(ours, ["a", "b.1"])
    theirs.base_model.set_adapter(["a", "b_1"])
    agree()
    seen.append(ours(given))
    with disable_adapter(ours), theirs.disable_adapter():
        agree()
    agree()
    theirs.add_weighted_adapter(["a", "b_1"], [0.7, -0.4], "both", combination_type="linear")
    theirs.set_adapter("both")
    made = add_weighted_adapter(ours, ["a", "b.1"], [0.7, -0.4], "both")
    agree()
    seen.append(ours(given))
    assert min(float((x - y).abs().max()) for n, x in enumerate(seen) for y in seen[:n]) > 1e-3
    save_adapter(ours, made, tmp_path / "both", base=str(folder), adapter="both")
    assert (minigpt.load_model(folder, adapter=tmp_path / "both")(given) - seen[-1]).abs().max() < 1e-5
    add_weighted_adapter(ours, ["b.1"], [1.0], "same")
    assert (ours(given) - seen[1]).abs().max() < 1e-5
    set_adapter(ours, ["a", "b.1"])
    assert (merge_and_unload(ours)(given) - seen[2]).abs().max() < 1e-5
    assert adapter_names(ours) == {}


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "qwen3-untied"])
@pytest.mark.parametrize("name", ["lora", "dora", "head"])
@torch.no_grad()
def test_a_merged_folder_is_one_that_transformers_runs(
    family: str, name: str, tmp_path: Path, run_command: RunCommand
) -> None:
    torch.manual_seed(5)
    minigpt.save_pretrained(MODELS[family](), tmp_path / "base", CHARACTERS)
    config = json.loads((tmp_path / "base" / "config.json").read_bytes())
    if family == "gpt2":  # the published files lack this key, which means true
        del config["tie_word_embeddings"]
        (tmp_path / "base" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    theirs, given = theirs_of(tmp_path / "base", CONFIGS[name], torch.float32).eval(), next(ids())
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    arguments = (
        "--model",
        tmp_path / "base",
        "--adapter",
        tmp_path / "adapter",
        "--output",
        tmp_path / "merged",
    )
    done = run_command("merge", *arguments)
    assert (done.code, done.err) == (0, "")
    verify_manifest(tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (merged(given).logits - theirs(given).logits).abs().max() < 1e-5
    assert (minigpt.load_model(tmp_path / "merged")(given) - theirs(given).logits).abs().max() < 1e-5
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.encode("天地", add_special_tokens=False) == CHARACTERS.encode_text("天地")
    if name == "head":  # it is not the embedding any more
        config["tie_word_embeddings"] = False
    assert json.loads((tmp_path / "merged" / "config.json").read_bytes()) == config
    for file in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        before, after = (json.loads((tmp_path / each / file).read_bytes()) for each in ("base", "merged"))
        assert after == before


@pytest.mark.parametrize("precision", ["int8", "int4"])
@torch.no_grad()
def test_beside_quantised_weights_an_adapter_adds_what_it_adds_in_peft(
    precision: Any, tmp_path: Path, run_command: RunCommand
) -> None:
    torch.manual_seed(5)
    minigpt.save_pretrained(MODELS["qwen3"](), tmp_path / "base", CHARACTERS)
    config, given = LoraConfig(r=3, lora_alpha=7, target_modules=QWEN3), next(ids())
    theirs = theirs_of(tmp_path / "base", config, torch.float32).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    given_flags = ("--model", tmp_path / "base", "--output", tmp_path / "small", "--precision", precision)
    assert run_command("quantize", *given_flags).code == 0
    model = minigpt.load_model(tmp_path / "small", adapter=tmp_path / "adapter")
    assert adapter_names(model) == {"default": True}
    inputs = torch.randn(2, 5, 24)
    for name, layer in lora_layers(model):
        x = inputs if layer.in_features == 24 else torch.randn(2, 5, layer.in_features)
        peer = theirs.base_model.model.get_submodule(name)
        added = peer.lora_B["default"](peer.lora_A["default"](x)) * peer.scaling["default"]
        torch.testing.assert_close(layer(x), layer.linear(x) + added, rtol=1e-6, atol=1e-6)
    assert (model(given) - minigpt.load_model(tmp_path / "small")(given)).abs().max() > 1e-3
    with disable_adapter(model):
        assert torch.equal(model(given), minigpt.load_model(tmp_path / "small")(given))
    with pytest.raises(InputError, match="quantised weights cannot take up an adapter"):
        merge_and_unload(model)


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
        ({"modules_to_save": ("hood",)}, "unknown module in modules_to_save 'hood'"),
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
        ('"LORA"', '"LOHA"', "peft_type='LOHA'; known are LORA, IA3, BOTTLENECK"),
        ('"bias": "none"', '"bias": "all"', "bias='all' is not known here"),
        ('"r": 8', '"r": 4', r"says r=4, but adapter_model\.safetensors has another rank: .* is \(8, "),
        ('"r": 8', '"r": "x"', "r must be a number below 1e9: got x"),
        ('"r": 8', f'"r": {10**30}', "r must be a number below 1e9: got 1"),
        ('"lora_alpha": 8', '"lora_alpha": NaN', "lora_alpha must be a number"),
        ('"layers_to_transform": null', '"layers_to_transform": "0"', "must be numbers of blocks: got"),
        ('"layers_to_transform": null', '"layers_to_transform": [true]', "must be numbers of blocks: got"),
        ('"modules_to_save": null', '"modules_to_save": "lm_head"', "must be a list of names: got 'lm_head'"),
        ('"use_dora": false', '"use_dora": "no"', "use_dora must be true or false: got 'no'"),
        ('"bias": "none"', '"kasa_config": {"r": 2}', "kasa_config={'r': 2} is not known here"),
        *(
            ('"init_lora_weights": true', f'"init_lora_weights": "{kind}"', "changes the model's own weights")
            for kind in ("pissa", "pissa_niter_4", "OLoRA", "corda", "loftq", "lora_ga", "something new")
        ),
    ):
        assert old in text
        (tmp_path / "adapter_config.json").write_text(text.replace(old, new), encoding="utf-8")
        whole = MODELS["qwen3"]()
        with pytest.raises(InputError, match=message) as error:
            load_adapter(whole, tmp_path)
        assert "\n" not in str(error.value)
        assert not list(lora_layers(whole))
        assert all(parameter.requires_grad for parameter in whole.parameters())
    for kind in ("false", '"gaussian"', '"eva"', '"orthogonal"', '"mica"'):  # they are drawn otherwise, only
        new = text.replace('"init_lora_weights": true', f'"init_lora_weights": {kind}')
        (tmp_path / "adapter_config.json").write_text(new, encoding="utf-8")
        load_adapter(MODELS["qwen3"](), tmp_path)
    (tmp_path / "adapter_config.json").write_text(text, encoding="utf-8")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="does not exist"):
        load_adapter(MODELS["qwen3"](), tmp_path)
    with pytest.raises(InputError, match="no adapter's folder"):
        load_adapter(MODELS["qwen3"](), tmp_path.parent)
    with pytest.raises(InputError, match=r"nowhere does not exist: give a folder with adapter_config\.json"):
        load_adapter(MODELS["qwen3"](), tmp_path / "nowhere")


def test_names_are_hugging_face_s() -> None:
    names = module_names(MODELS["qwen3"]())
    assert names["model.layers.1.self_attn.q_proj"] == "model.layers.1.self_attn.q_proj"
    assert len(names) == 2 * 7 + 1


@pytest.mark.parametrize(
    "targets",
    [
        {"gpt2": ("c_attn",), "qwen3": ("q_proj",)},  # none of them is a feedforward module
        {"gpt2": ("c_proj",), "qwen3": ("layers.1.mlp.down_proj", "v_proj")},  # their names end with its name
    ],
)
@torch.no_grad()
def test_ia3_of_layers_whose_names_are_given(
    folder: Path, tmp_path: Path, targets: dict[str, tuple[str, ...]]
) -> None:
    base, given = transformers.AutoModelForCausalLM.from_pretrained(folder), next(ids())
    config, ours = IA3Config(targets[base.config.model_type]), minigpt.load_model(folder)
    add_adapter(ours, config)
    randomised(adapter_tensors(ours))
    save_adapter(ours, config, tmp_path / "ours", base=str(folder))
    expected = ours(given)
    read = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    assert (read(given).logits - expected).abs().max() < 1e-5
    again = minigpt.load_model(folder)
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(again(given), expected)
