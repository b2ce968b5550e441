"""Adapters that are trained beside weights in int8 and int4: gradients, memory, runs, and errors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import minigpt
from minigpt.commands.quantize import Options, main
from minigpt.errors import InputError
from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM
from minigpt.families.registry import LanguageModel, parameter_table
from minigpt.finetuning.adapters import adapter_tensors
from minigpt.finetuning.bottleneck import BottleneckConfig
from minigpt.finetuning.ia3 import IA3Config
from minigpt.finetuning.layers import AdapterConfig, add_adapter
from minigpt.finetuning.lora import LoraConfig
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.tokenizer import Tokenizer
from minigpt.training.finetune_config import FinetuneConfig
from minigpt.training.loop import Trainer
from minigpt.training.run import finetune
from minigpt.training.run_data import read_data
from minigpt.weights.pretrained import save_pretrained
from minigpt.weights.quantized import (
    Int4Linear,
    Precision,
    QuantizedLinear,
    precision_of,
    prepare_training,
    set_precision,
)
from tests.commands import RunCommand
from tests.runs import stop_at, trainer, write_data

PRECISIONS: tuple[Precision, ...] = ("int8", "int4")
FAMILIES: dict[str, Callable[[int], LanguageModel]] = {
    "gpt": lambda V: GPTLMHeadModel(GPTConfig(24, 3, 2, 0.0, 32, V, bias=True)),
    "qwen3": lambda V: Qwen3ForCausalLM(Qwen3Config(V, 24, 40, 2, 4, 2, 8, 32, tie_word_embeddings=False)),
}


def small(family: str, precision: Precision) -> LanguageModel:
    model = set_precision(FAMILIES[family](40), precision)
    prepare_training(model)
    return model


# -- gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [64, 40])  # int4 pads 40 to 64
def test_the_gradient_is_that_of_the_dequantised_weights(precision: str, bias: bool, width: int) -> None:
    linear = nn.Linear(width, 12, bias=bias)
    layer = Int4Linear.of(linear) if precision == "int4" else QuantizedLinear.of(linear, "int8")
    weight = layer.dequantized()[:, :width].float()
    layer.trains_adapters = True
    x = torch.randn(3, 5, width)
    own, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = layer(own), F.linear(other, weight, linear.bias)
    torch.testing.assert_close(found, expected)
    noise = torch.randn(found.shape)
    (found * noise).sum().backward()
    (expected * noise).sum().backward()  # type: ignore[no-untyped-call]
    assert own.grad is not None
    torch.testing.assert_close(own.grad, other.grad)
    assert all(buffer.grad is None for buffer in layer.buffers())
    half = layer(x.bfloat16().requires_grad_())  # as under autocast
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "config",
    [LoraConfig(r=3, lora_alpha=7, target_modules=r"(?!.*embed).*"), BottleneckConfig(5), IA3Config()],
    ids=["lora", "adapter", "ia3"],
)
def test_adapters_learn_as_beside_the_dequantised_weights(
    family: str, precision: Precision, config: AdapterConfig
) -> None:
    """Loss and gradients equal those of a model whose linear layers have the same weights as floats."""
    models = []
    for is_float in (False, True):
        torch.manual_seed(1)
        model = small(family, precision)
        for name, layer in list(model.named_modules()):
            if is_float and isinstance(layer, QuantizedLinear | Int4Linear):
                linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
                linear.weight.data = layer.dequantized()[:, : layer.in_features].float()
                if layer.bias is not None:
                    linear.bias.data = layer.bias.float()
                model.set_submodule(name, linear)
        torch.manual_seed(2)
        add_adapter(model, config)
        with torch.no_grad():
            for tensor in adapter_tensors(model).values():
                tensor.add_(torch.randn(tensor.shape) * 0.1)
        ids = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(3))
        loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        models.append((loss.item(), adapter_tensors(model)))
    (found, own), (expected, others) = models
    assert found == pytest.approx(expected, rel=1e-5)
    for name, tensor in own.items():
        assert tensor.grad is not None
        assert others[name].grad is not None
        assert tensor.grad.abs().max() > 0
        torch.testing.assert_close(tensor.grad, others[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_weight_is_kept_as_floats(precision: Precision) -> None:
    model = small("qwen3", precision)
    add_adapter(model, LoraConfig(r=2))
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.arange(8)[None])
    weights = {(40, 24), (24, 40), (32, 24), (24, 32), (16, 24), (24, 16)}
    assert {tuple(tensor.shape) for tensor in kept} & weights == set()
    table = dict(parameter_table(model))
    assert table["layers.*.mlp.gate_proj.base_layer"] == 2 * 40 * 24


# -- runs --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make data, and a base model of each family: gpt and qwen3."""
    write_data(tmp_path)
    tokenizer = Tokenizer(tmp_path / "vocab.json")
    for name, make in FAMILIES.items():
        save_pretrained(make(tokenizer.get_vocab_size()), tmp_path / name, tokenizer)
    return tmp_path


def settings(folder: Path, output: str = "run", **values: Any) -> FinetuneConfig:
    shared: dict[str, Any] = {
        "model": folder / "qwen3", "train_data": folder / "train.jsonl", "val_data": folder / "val.jsonl",
        "output": folder / output, "batch_size": 4, "learning_rate": 1e-2, "max_steps": 8, "eval_steps": 4,
        "logging_steps": 1, "threads": 1, "device": "cpu", "precision": "float32", "report_to": "none",
        "max_length": 32, "block_size": 32, "method": "lora", "r": 3,
    }  # fmt: skip
    return FinetuneConfig(**{**shared, **values})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_base_stays_small_and_a_resumed_run_ends_on_the_same_bits(
    folder: Path, family: str, precision: Precision
) -> None:
    more: dict[str, Any] = {"model": folder / family, "base_precision": precision, "lora_dropout": 0.1}
    run = trainer(settings(folder, "straight", **more))
    assert precision_of(run.model) == precision
    frozen = {name: tensor.clone() for name, tensor in run.model.named_buffers()}
    frozen |= {name: p.detach().clone() for name, p in run.model.named_parameters() if not p.requires_grad}
    first = run.evaluate().loss
    assert run.run()["val_loss"] < first - 0.01
    now = {**dict(run.model.named_buffers()), **dict(run.model.named_parameters())}
    assert all(torch.equal(now[name], tensor) for name, tensor in frozen.items())
    stop_at(trainer(settings(folder, "stopped", **more)), 5)
    again = trainer(settings(folder, "stopped", **more))
    again.resume()
    again.run()
    for file in ("adapter_model.safetensors", "optimizer.safetensors"):
        ended, expected = (load_file(folder / name / "last" / file) for name in ("stopped", "straight"))
        assert ended.keys() == expected.keys()
        assert all(torch.equal(ended[key], expected[key]) for key in ended)
    stop_at(trainer(settings(folder, "other", **more)), 5)
    other = trainer(settings(folder, "other", **{**more, "base_precision": "float32"}))
    with pytest.raises(InputError, match=f"was made with --base_precision {precision}, got --base_pre"):
        other.resume()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_quantised_folder_is_a_base_too_and_the_adapter_fits_the_float_base(
    folder: Path, precision: Any
) -> None:
    main(Options(model=folder / "qwen3", output=folder / "small", precision=precision))
    run = trainer(settings(folder, model=folder / "small"))
    flagged = trainer(settings(folder, "flag", base_precision=precision))
    for name, buffer in run.model.named_buffers():
        assert torch.equal(buffer, flagged.model.get_buffer(name))
    first = run.evaluate().loss
    result = run.run()
    assert result["val_loss"] < first - 0.01
    data = read_data(run.config)
    losses = {}
    for base in ("small", "qwen3"):
        model = minigpt.load_model(folder / base, adapter=folder / "run" / "best")
        loss = run.step.loss.evaluate(model, data.val.in_order(8), torch.device("cpu"))
        losses[base] = loss.loss
    # on the small base the same to the rounding of inputs (int8), or of bfloat16 (int4); on the float base
    # what the rounding of the weights makes of it, which is less than what was learned
    learned = first - result["val_loss"]
    assert losses["small"] == pytest.approx(result["val_loss"], abs=0.1 * learned)
    assert losses["qwen3"] == pytest.approx(result["val_loss"], abs=0.5 * learned)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "full", "r": 8, "base_precision": "int8"}, "--base_precision belongs to --method lora, "),
        ({"base_precision": "int3"}, "base_precision"),
        ({"base_precision": "int8", "task": "classification"}, "does not go with --task classification"),
        ({"base_precision": "int8", "modules_to_save": ("lm_head",)}, "lm_head is quantised: take the model"),
        ({"base_precision": "int4", "use_dora": True}, "use_dora needs weights of more than 4 bits"),
    ],
)
def test_what_is_refused_is_one_line(
    folder: Path, values: dict[str, Any], message: str, run_command: RunCommand
) -> None:
    given = {**settings(folder).as_dict(), **values}
    names = ("model", "train_data", "val_data", "output", "method", "base_precision")
    flags = [f"--{name}={given[name]}" for name in names]
    if given["task"] != "sft":
        flags.append(f"--task={given['task']}")
    if given["use_dora"]:
        flags.append("--use_dora")
    flags += [part for name in given["modules_to_save"] for part in ("--modules_to_save", name)]
    refused = run_command("finetune", *flags)
    assert (refused.code, len(refused.err.splitlines())) == (2, 1), refused
    assert message in refused.err
    assert not (folder / "run").exists()


@pytest.mark.parametrize("values", [{"method": "full"}, {"method": "freeze", "train_only": "norms"}])
def test_quantised_weights_are_not_trained(folder: Path, values: dict[str, Any]) -> None:
    main(Options(model=folder / "qwen3", output=folder / "small", precision="int8"))
    given = {
        "model": folder / "small", "train_data": folder / "train.jsonl", "output": folder / "run",
        "max_steps": 1, "device": "cpu", "threads": 1,
    }  # fmt: skip
    assert finetune(**given, method="adapter")["steps"] == 1
    given["output"] = folder / "other"
    with pytest.raises(InputError, match="is quantised, so its weights cannot be trained: train an adapter"):
        finetune(**given, **values)


def test_the_head_of_a_quantised_base_learns_by_an_adapter(folder: Path) -> None:
    config = settings(folder, base_precision="int8", target_modules=("lm_head",))
    run = Trainer(config, read_data(config))
    first = run.evaluate().loss
    assert run.run()["val_loss"] < first - 0.01
