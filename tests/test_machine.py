"""Training code for GPUs, tested on a CPU: the CPU never waits, and every fast path equals its slow twin.

A step that is set to be asynchronous behaves here as on CUDA. No speed is measured.
"""

import copy
import json
import math
import os
import platform
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from minigpt.data.batches import Batch
from minigpt.devices import move, random_state
from minigpt.errors import InputError
from minigpt.finetuning.lora import LoraConfig, LoraLinear
from minigpt.training import estimate as report
from minigpt.training.config import RECIPES, TrainConfig, read_recipe, read_run
from minigpt.training.finetune_config import FinetuneConfig
from minigpt.training.flops import model_flops, peak_flops
from minigpt.training.loop import Trainer
from minigpt.training.loss import NextTokenLoss, logits_limit, summed_cross_entropy, vocabulary_multiple
from minigpt.training.mixed_precision import LossScale, MixedPrecision, pick_precision
from minigpt.training.parallel import _require_compiler
from minigpt.training.stop_request import Stopped
from tests.commands import RunCommand
from tests.runs import config, identical, metrics, one_step, stop_at, trainer, write_data

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder with a tiny data set."""
    write_data(tmp_path)
    return tmp_path


def late(run: Trainer) -> Trainer:
    """Keep metrics on the device until they are due, as on CUDA."""
    run.step.asynchronous = True
    return run


def poison(run: Trainer, steps: set[int]) -> Trainer:
    """Make the loss of some steps (from 0) NaN."""
    loss, bad = run.step.summed_loss, torch.tensor(math.nan)
    run.step.summed_loss = lambda batch: (  # type: ignore[method-assign]
        loss(batch) * bad if run.progress.steps_done in steps else loss(batch)
    )
    return run


# -- asynchronous metrics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_asynchronous_metrics_change_nothing(folder: Path, optimizer: str, precision: str) -> None:
    more: dict[str, Any] = {
        "optimizer": optimizer,
        "precision": precision,
        "dropout": 0.1,
        "logging_steps": 3,
    }
    soon = poison(trainer(config(folder, "soon", **more)), {4, 5})
    soon.run()
    run = poison(late(trainer(config(folder, "late", **more))), {4, 5})
    run.run()
    assert run.progress.skipped == soon.progress.skipped == [[5, 6]]
    if optimizer == "adamw":
        assert metrics(folder / "late") == metrics(folder / "soon")
        identical(folder / "late", folder / "soon")
    else:
        # a factor 1 - found_inf is a float32, a number of Python's a double: 1e-7 an update
        for ours, theirs in zip(run.model.parameters(), soon.model.parameters()):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_bad_step_leaves_no_trace_before_it_is_read(folder: Path, optimizer: str) -> None:
    run = late(trainer(config(folder, dropout=0.0, optimizer=optimizer, logging_steps=100)))
    run.step()
    before = copy.deepcopy(
        [dict(run.model.state_dict()), [o.state_dict()["state"] for o in run.step.optimizers]]
    )
    poison(run, {1}).step()
    assert len(run.step.pending_metrics) == 2
    assert run.progress.bad_steps == 0
    after = [dict(run.model.state_dict()), [o.state_dict()["state"] for o in run.step.optimizers]]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert [metrics.bad_steps for metrics in run.step.read_metrics()] == [0, 1]
    assert run.progress.skipped == [[2, 2]]


def test_several_bad_steps_go_back_when_they_are_read(folder: Path) -> None:
    run = poison(late(trainer(config(folder, max_steps=18, logging_steps=4))), {6, 7, 8})
    run.run()
    (event,) = [line for line in metrics(folder / "run") if line.get("event") == "rollback"]
    assert (event["step"], event["to_step"]) == (12, 6), "read at 8 (two of them) and at 12"
    assert run.progress.skipped == [[7, 12]]
    assert run.progress.rollbacks == 1


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records operations for which the CPU would wait on CUDA, for a value or a shape that depends on one."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.NAMES or mask:
            self.seen.add(name)
        return func(*args, **(kwargs or {}))


class Looks(TorchFunctionMode):
    """Records reads of values. For tensors on a CPU, these are not operations."""

    NAMES = ("tolist", "item", "numpy", "cpu", "__float__", "__int__", "__bool__")

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.NAMES:
            self.seen.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("more", [{"optimizer": "muon"}, {"precision": "float16"}, {"loss_on": "all"}])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_step_does_not_wait_for_the_device(
    folder: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool, more: dict[str, Any]
) -> None:
    more = {"logging_steps": 100, "max_grad_norm": 1.0, "gradient_accumulation_steps": 2, **more}
    run = trainer(config(folder, **more))
    run.step.asynchronous = asynchronous
    run.step()  # optimisers make their state
    # Batches are prepared on the CPU, where reading values costs nothing.
    ready = {number: run.step.prepare(number) for number in (1, 2)}
    monkeypatch.setattr(run.step, "prepare", ready.__getitem__)
    random = random_state(CPU)
    monkeypatch.setattr("minigpt.training.step.random_state", lambda device: random)
    run.step._next = None
    with Waits() as waits, Looks() as looks:
        run.step()
    assert bool(waits.seen | looks.seen) is not asynchronous, waits.seen | looks.seen


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_next_batches_are_prepared_ahead_and_the_order_stays(folder: Path, asynchronous: bool) -> None:
    run = trainer(config(folder, logging_steps=100, eval_steps=100))
    run.step.asynchronous = asynchronous
    expected = [run.step.batches(number)[0].input_ids.tolist() for number in range(5)]
    prepared: list[int] = []
    learned: list[list[Any]] = []
    batches, loss = run.step.batches, run.step.summed_loss

    def noting_batches(step: int) -> list[Batch]:
        prepared.append(step)
        return batches(step)

    def noting_loss(batch: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
        assert batch[0] is not None
        learned.append(batch[0].tolist())
        return loss(batch)

    run.step.batches, run.step.summed_loss = noting_batches, noting_loss  # type: ignore[method-assign]
    for _ in range(5):
        run.step()
    assert prepared == [0, 1, 2, 3, 4, 5]
    assert learned == expected


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_stopped_asynchronous_run_ends_on_the_same_bits(folder: Path, precision: str) -> None:
    more: dict[str, Any] = {"precision": precision, "dropout": 0.1, "logging_steps": 3}
    late(trainer(config(folder, "straight", **more))).run()
    for stop_after in (4, 5):
        output = f"stopped-{stop_after}"
        stop_at(late(trainer(config(folder, output, **more))), stop_after)
        again = late(trainer(config(folder, output, **more)))
        again.resume()
        again.run()
        identical(folder / output, folder / "straight")


# -- 16 bits ------------------------------------------------------------------------------------------------


def test_the_loss_scale_is_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LossScale, "interval", 3)
    ours, theirs = LossScale(CPU), torch.amp.GradScaler("cpu", growth_interval=3)
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    theirs.scale(torch.ones(()))
    for bad in (False, True, True, False, False, False, False, True, False, False, False, False):
        weight.grad = torch.full((2,), math.inf if bad else 1.0)
        theirs.unscale_(optimizer)
        theirs.step(optimizer)
        theirs.update()
        ours.update(torch.tensor(float(bad)))
        assert float(ours.value) == theirs.get_scale()
    assert ours.state()[0] != 2.0**16
    again = LossScale(CPU)
    again.load(ours.state())
    assert again.state() == ours.state()
    again.load([])
    assert again.state() == ours.state()


def test_an_overflow_is_no_bad_step(folder: Path) -> None:
    run = trainer(config(folder, precision="float16", max_bad_steps=1, logging_steps=1, dropout=0.0))
    assert run.step.precision.scale is not None
    run.step.precision.scale.load(
        [2.0**30, 0]
    )  # far too large: gradients of about 1e-2 leave float16's 65,504
    before = copy.deepcopy(run.model)
    one_step(run)
    for ours, theirs in zip(run.model.parameters(), before.parameters()):
        assert torch.equal(ours, theirs)
    assert (run.progress.bad_steps, run.progress.tokens_seen, run.progress.skipped) == (0, 0, [[1, 1]])
    assert run.progress.loss_scale == [2.0**29, 0]
    for _ in range(25):
        one_step(run)
    assert run.progress.tokens_seen > 0
    assert run.progress.bad_steps == run.progress.rollbacks == 0
    # A scale of 1 cannot be lowered. Then the gradient itself is not finite.
    run.step.precision.scale.load([1.0, 0])
    next(run.model.parameters()).register_hook(lambda gradient: gradient * math.inf)  # type: ignore[no-untyped-call]
    one_step(run)
    assert run.progress.bad_steps == 1


def test_the_scale_is_resumed(folder: Path) -> None:
    more: dict[str, Any] = {"precision": "float16", "dropout": 0.1, "logging_steps": 1}

    def start(output: str) -> Trainer:
        run = trainer(config(folder, output, **more))
        assert run.step.precision.scale is not None
        run.step.precision.scale.load([2.0**26, 0])
        return run

    straight = start("straight")
    straight.run()
    stop_at(start("run"), 5)
    state = json.loads((folder / "run" / "last" / "training_state.json").read_bytes())
    assert state["loss_scale"][0] < 2.0**26, "overflows came first"
    again = trainer(config(folder, **more))
    again.resume()
    assert again.step.precision.scale is not None
    assert again.step.precision.scale.state() == state["loss_scale"]
    again.run()
    identical(folder / "run", folder / "straight")
    lines = [line for line in metrics(folder / "run") if "loss_scale" in line]
    assert lines[0]["loss_scale"] == 2.0**26
    assert "grad_norm" not in lines[0], "it was not finite, which is no news"
    assert math.isfinite(lines[-1]["grad_norm"])


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_16_bits_stay_close_to_32(folder: Path, precision: str) -> None:
    losses = {}
    for name in ("float32", precision):
        run = trainer(config(folder, name, precision=name, dropout=0.0, max_grad_norm=1.0))
        losses[name] = [one_step(run).loss for _ in range(4)]
        assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    # bfloat16 keeps 8 bits: products are right to about 0.4 %; a few steps of 1e-2 multiply that
    assert losses[precision] == pytest.approx(losses["float32"], rel=3e-2)
    assert losses[precision] != losses["float32"]


# -- precision ----------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of requested precisions of float32 products."""
    given: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", given.append)
    return given


@pytest.fixture
def cuda(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Return a CUDA device that only answers questions. Nothing can be computed on it."""

    class Properties:
        total_memory = 80 * 2**30

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    return torch.device("cuda")


def test_a_card_without_bfloat16_is_named(cuda: torch.device) -> None:
    with pytest.raises(InputError, match="Tesla T4 has no bfloat16: give --precision float16"):
        MixedPrecision("bfloat16", cuda)


def test_float32_is_float32_and_16_bits_bring_tf32(cuda: torch.device, asked: list[str]) -> None:
    MixedPrecision("float32", cuda)
    assert asked == []
    assert MixedPrecision("float16", CPU).scale is not None
    assert asked == []
    assert (vocabulary_multiple(CPU), logits_limit(CPU)) == (1, 2**26)


@pytest.mark.parametrize(
    ("has", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, "bfloat16"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bfloat16"),
        ({"avx512_bf16": False, "avx512_f": True, "avx2": True}, "float32"),  # would go by way of float32
        ({}, "float32"),  # another kind of processor
    ],
)
def test_auto_is_what_a_cpu_has_products_for(
    has: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert pick_precision("auto", CPU) == expected
    assert pick_precision("float16", CPU) == "float16"


@pytest.mark.parametrize(("is_new", "expected"), [(True, "bfloat16"), (False, "float16")])
def test_auto_on_a_gpu(
    is_new: bool, expected: str, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: is_new)
    assert pick_precision("auto", cuda) == expected
    assert pick_precision("auto", torch.device("mps")) == "float32"


def test_torch_knows_what_this_processor_can_do() -> None:
    """torch has the keys that `auto` reads. If torch renamed one, `auto` would always choose float32."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("only x86's names are asked for")
    assert {"avx512_bf16", "amx_bf16"} <= torch.cpu.get_capabilities().keys()


def test_what_auto_chose_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    begun = config(folder, precision="auto", max_steps=2)
    trainer(begun).run()
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert read_run(begun.output).precision == "bfloat16"
    assert trainer(read_run(begun.output)).config.precision == "bfloat16"
    assert trainer(config(folder, "elsewhere", precision="auto")).config.precision == "float32"


def test_16_bits_on_a_cpu_are_autocast_s_but_for_attention() -> None:
    precision = MixedPrecision("bfloat16", CPU)
    x, first, second = torch.randn(5, 16), torch.nn.Linear(16, 8), torch.nn.Linear(16, 8, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        expected = [first(x), second(x), first(-x), torch.relu(second(x)) @ torch.ones(8, 2)]
    with precision.autocast():
        found = [first(x), second(x), first(-x), torch.relu(second(x)) @ torch.ones(8, 2)]
        q, k, v = torch.randn(3, 2, 4, 16, 8)
        attended = F.scaled_dot_product_attention(q, k.bfloat16(), v, is_causal=True)
    assert [out.dtype for out in found] == [torch.bfloat16] * 4
    assert all(map(torch.equal, found, expected))
    assert attended.dtype == torch.float32
    assert torch.equal(attended, F.scaled_dot_product_attention(q, k.bfloat16().float(), v, is_causal=True))
    assert first(x).dtype == torch.float32, "after it all is as before"


class Roundings(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the shapes of tensors that were converted to another dtype."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.of: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.of.append(args[0].shape)
        return func(*args, **(kwargs or {}))


def test_an_input_of_several_layers_is_rounded_once() -> None:
    precision = MixedPrecision("bfloat16", CPU)
    x, layers = torch.randn(5, 16, requires_grad=True), [torch.nn.Linear(16, 8) for _ in range(3)]
    with Roundings() as roundings, precision.autocast():
        sums = torch.stack([layer(x).sum() for layer in layers])
    assert roundings.of.count(x.shape) == 1
    assert roundings.of.count(layers[0].weight.shape) == 3
    sums.sum().backward()  # type: ignore[no-untyped-call]
    expected = torch.stack([layer.weight.bfloat16().double().sum(0) for layer in layers]).sum(0)  # (16,)
    assert x.grad is not None
    # each of three terms, at most 8 * 0.25, and their sums are rounded to 8 bits: 2^-8 of 2, 2, 2, 4 and 6
    torch.testing.assert_close(x.grad, expected.float().expand(5, 16), rtol=0, atol=16 * 2**-8)


def test_what_cuda_decides(cuda: torch.device, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    precision = MixedPrecision("bfloat16", cuda)
    assert asked == ["high"]
    assert precision.scale is None
    assert vocabulary_multiple(cuda) == 64
    assert 14 * logits_limit(cuda) <= 80 * 2**30 // 4


def test_to_cuda_goes_pinned_memory_without_waiting(
    cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def pinned(self: torch.Tensor) -> torch.Tensor:
        calls.append("pin")
        return self

    def moved(self: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        calls.append((arguments, options))
        return self

    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    monkeypatch.setattr(torch.Tensor, "to", moved)
    move(torch.ones(2), cuda)
    assert calls == ["pin", ((cuda,), {"non_blocking": True})]


def test_a_compiler_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"--compile on a CPU needs a C\+\+ compiler"):
        _require_compiler(TrainConfig(compile=True), CPU)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="--compile needs Triton"):
        _require_compiler(TrainConfig(compile=True), torch.device("cuda"))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_what_torch_cannot_compile_on_a_cpu_is_refused_before_it_starts(
    precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++")
    both = TrainConfig(precision=precision, compile=True, gradient_checkpointing=True)
    with pytest.raises(InputError, match=r"--compile and --gradient_checkpointing .* --precision float32"):
        _require_compiler(both, CPU)
    for change in ({"gradient_checkpointing": False}, {"precision": "float32"}):
        _require_compiler(replace(both, **change), CPU)


def test_counted_positions_are_the_mask(folder: Path) -> None:
    run = trainer(config(folder, loss_on="answer"))
    batch = run.step.batches(0)[0]
    objective = run.step.loss
    assert isinstance(objective, NextTokenLoss)
    ids, targets, positions = objective.select(batch)
    assert positions is not None
    assert torch.equal(ids, batch.input_ids)
    assert torch.equal(targets, batch.targets[batch.answer_mask])
    hidden = torch.randn(*ids.shape, 3)
    assert torch.equal(hidden.flatten(0, 1).index_select(0, positions), hidden[batch.answer_mask])
    everything = batch._replace(answer_mask=torch.ones_like(batch.answer_mask))
    assert objective.select(everything).positions is None


# -- the loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [10**6, 300])
def test_a_padded_vocabulary_changes_neither_loss_nor_gradient(limit: int) -> None:
    random = torch.Generator().manual_seed(0)
    results = []
    for multiple in (1, 64):
        random.manual_seed(0)
        head = nn.Linear(16, 67, bias=False, dtype=torch.float64)
        with torch.no_grad():
            head.weight.copy_(torch.randn(67, 16, generator=random, dtype=torch.float64))
        hidden = torch.randn(20, 16, generator=random, dtype=torch.float64).requires_grad_()
        targets = torch.randint(67, (20,), generator=random)
        loss = summed_cross_entropy(head, hidden, targets, limit, multiple)
        loss.backward()  # type: ignore[no-untyped-call]
        assert head.weight.grad is not None
        results.append((loss.detach(), hidden.grad, head.weight.grad))
        expected = F.cross_entropy(head(hidden), targets, reduction="sum")
        # the loss is in float32
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


def test_an_adapter_of_the_head_is_not_left_out_of_a_padded_vocabulary() -> None:
    head = LoraLinear(nn.Linear(16, 67, bias=False), LoraConfig(r=2))
    nn.init.normal_(head.lora_B)
    hidden, targets = torch.randn(20, 16), torch.randint(67, (20,))
    expected = F.cross_entropy(head(hidden), targets, reduction="sum")
    assert (expected - F.cross_entropy(head.base_layer(hidden), targets, reduction="sum")).abs() > 1
    torch.testing.assert_close(summed_cross_entropy(head, hidden, targets, multiple=64), expected)


def test_pieces_work_under_autocast() -> None:
    random = torch.Generator().manual_seed(0)
    head = nn.Linear(16, 67, bias=False)
    hidden, targets = torch.randn(20, 16, generator=random), torch.randint(67, (20,), generator=random)
    gradients = []
    for limit in (10**6, 300):
        head.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = summed_cross_entropy(head, hidden, targets, limit, 64)
        assert loss.dtype == torch.float32
        loss.backward()  # type: ignore[no-untyped-call]
        assert head.weight.grad is not None
        gradients.append(head.weight.grad.clone())
    # five pieces, each gradient rounded to bfloat16's 8 bits before they are added up
    largest = float(gradients[0].abs().max())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=5 * largest * 2**-8)


# -- activation checkpointing -------------------------------------------------------------------------------


def gradients(run: Trainer) -> list[torch.Tensor]:
    torch.manual_seed(3)
    run.model.train()
    run.step.summed_loss(run.step.to_device(run.step.batches(0)[0])).backward()  # type: ignore[no-untyped-call]
    return [p.grad for p in run.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("more", [{"dropout": 0.1}, {"family": "qwen3", "dropout": 0.0}])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_recomputed_gradients_are_the_same_bits(folder: Path, precision: Any, more: dict[str, Any]) -> None:
    plain, twice = (
        trainer(config(folder, gradient_checkpointing=again, precision=precision, **more))
        for again in (False, True)
    )
    assert plain.model.state_dict().keys() == twice.model.state_dict().keys()
    ours, theirs = gradients(twice), gradients(plain)
    assert len(ours) == len(theirs) == len([*plain.model.parameters()])
    assert all(map(torch.equal, ours, theirs))


def test_recomputing_keeps_less(folder: Path) -> None:
    kept = {}
    for again in (False, True):
        run = trainer(config(folder, n_layer=6, gradient_checkpointing=again, dropout=0.0))
        ids = torch.zeros((4, 31), dtype=torch.int64)
        kept[again] = report._kept_bytes(run, ids)
        assert report.estimate(run).memory_bytes > 0
    # GPT keeps some 20 vectors (B, T, C) of a block for its gradient; one of them is its input
    assert kept[True] < kept[False] / 4


def test_a_recomputing_run_answers_and_saves(folder: Path) -> None:
    trainer(config(folder, "plain", dropout=0.1)).run()
    trainer(config(folder, "twice", dropout=0.1, gradient_checkpointing=True)).run()
    identical(folder / "plain", folder / "twice")


# -- torch.compile ------------------------------------------------------------------------------------------

# torch's own, when it loads its compiler
compiles = pytest.mark.filterwarnings(r"ignore:`torch.jit.*:DeprecationWarning")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Run torch.compile without its last part, which writes code. Collect the length of each graph."""
    lengths: list[int] = []
    original = torch.compile

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        lengths.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setenv("CXX", sys.executable)  # a C++ compiler is looked for, but has nothing to do
    monkeypatch.setattr(torch, "compile", lambda model: original(model, backend=backend))
    yield lengths
    torch._dynamo.reset()


@compiles
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"family": "qwen3"},
        {"gradient_checkpointing": True},
        {"precision": "bfloat16"},
    ],
)
def test_one_graph_serves_all_lengths(folder: Path, graphs: list[int], more: dict[str, Any]) -> None:
    losses = {}
    for compiled in (False, True):
        settings = config(folder, str(compiled), compile=compiled, dropout=0.0, batch_size=2, **more)
        run = trainer(settings)
        assert len({run.step.batches(number)[0].input_ids.shape for number in range(4)}) > 1
        losses[compiled] = [one_step(run).loss for _ in range(6)]
    assert len(graphs) == 1, "no break, no second one for another length"
    assert losses[True] == pytest.approx(losses[False], rel=1e-6)  # the same operations in the same order
    run.run()
    assert len(graphs) == 1, "evaluations and answers need none"
    run = trainer(config(folder, "True", dropout=0.0, batch_size=2, **more))
    names = dict(run.model.named_parameters())
    assert not any("_orig_mod" in name or "_checkpoint" in name for name in names)
    with pytest.raises(InputError, match="the run is finished"):
        run.resume()


@compiles
def test_a_signal_while_compiling_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.compile

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setenv("CXX", sys.executable)  # a C++ compiler is looked for, but has nothing to do
    monkeypatch.setattr(torch, "compile", lambda model: original(model, backend=backend))
    run = trainer(config(folder, compile=True))
    with pytest.raises(Stopped, match="SIGTERM: saved step 0 "):
        run.run()
    torch._dynamo.reset()


@compiles
@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="there is no C++ compiler")
def test_compiled_for_this_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])  # inductor adds the folder of what it wrote
    losses = {}
    for compiled in (False, True):
        # one layer: a compiler takes a second a kernel
        small = config(folder, str(compiled), compile=compiled, dropout=0.0, batch_size=2, n_layer=1)
        run = trainer(small)
        losses[compiled] = [one_step(run).loss for _ in range(6)]
    # float32's sums in another order, a relative 1e-7 each, which a few steps of Adam (whose first ones
    # divide a gradient by its own size) may make a hundred times larger
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    assert losses[True] != losses[False], "nothing was compiled"


# -- FLOPs --------------------------------------------------------------------------------------------------


def test_flops_by_the_usual_formula(folder: Path) -> None:
    run = trainer(config(folder, dropout=0.0))
    c = run.config
    matrices = c.n_layer * 12 * c.n_embd**2 + run.data.tokenizer.get_vocab_size() * c.n_embd
    expected = 100 * (6 * matrices + 12 * c.n_layer * c.n_embd * 20)
    assert model_flops(run.model, tokens=100, counted=100, T=20) == expected
    (size,) = run.step.prepare(0).sizes
    assert model_flops(run.model, *size) < model_flops(run.model, size.tokens, size.tokens, size.width), (
        "answers alone need lm_head"
    )


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA A10", 125), ("Tesla T4", 65), ("NVIDIA A10G", math.nan),
        ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GeForce RTX 4090 Laptop GPU", math.nan),
        ("NVIDIA H200", 989), ("", math.nan),
    ],
)  # fmt: skip
def test_peaks_go_by_the_whole_name(monkeypatch: pytest.MonkeyPatch, name: str, tera: float) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    cuda = torch.device("cuda")
    assert peak_flops(cuda, "bfloat16") == pytest.approx(tera * 1e12, nan_ok=True)
    assert math.isnan(peak_flops(cuda, "float32"))
    assert math.isnan(peak_flops(CPU, "bfloat16"))


def test_utilisation_is_shown_where_the_peak_is_known(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer(config(folder)).run()
    assert not any("mfu" in line for line in metrics(folder / "run"))
    monkeypatch.setattr("minigpt.training.metrics.peak_flops", lambda device, precision: 1e12)
    run = trainer(config(folder, "known"))
    run.run()
    found = [line["mfu"] for line in metrics(folder / "known") if "train_loss" in line]
    assert len(found) == 6
    assert all(value > 0 for value in found)


# -- recipes ------------------------------------------------------------------------------------------------


def is_for_train(name: str) -> bool:
    """Return True for a recipe without a task of minigpt finetune."""
    recipe = read_recipe(name, FinetuneConfig)
    assert isinstance(recipe, FinetuneConfig)
    return recipe.task == FinetuneConfig.__dataclass_fields__["task"].default


@pytest.mark.parametrize("name", sorted(filter(is_for_train, (path.stem for path in RECIPES.glob("*.toml")))))
def test_every_recipe_runs_dry(folder: Path, run_command: RunCommand, name: str) -> None:
    """Each recipe runs unchanged except for the model's size, because 124M parameters are slow on a CPU."""
    (folder / "text.txt").write_text("春眠不觉晓，处处闻啼鸟。\n" * 400, encoding="utf-8")
    data = ["--train_data", folder / "train.jsonl", "--val_data", folder / "val.jsonl"]
    data += ["--vocab_path", folder / "vocab.json"]
    if "--text" in (RECIPES / f"{name}.toml").read_text(encoding="utf-8"):
        data = ["--text", folder / "text.txt", "--val_fraction", "0.1"]
    small = ["--n_layer", 1, "--n_embd", 24, "--n_head", 2, "--device", "cpu", "--threads", 1]
    result = run_command(
        "train.py", "--recipe", name, *data, *small, "--output", folder / "run", "--dry_run", "--json"
    )
    assert result.code == 0, result.err
    numbers = json.loads(result.out.splitlines()[-1])
    recipe = read_recipe(name)
    if recipe.max_steps:
        assert numbers["steps"] == recipe.max_steps


def test_recipes_of_the_sizes_that_they_say() -> None:
    gpt2 = read_recipe("gpt2-124m")
    assert gpt2.model_config(50257).parameter_count() == 124_439_808  # GPT-2's own
    assert gpt2.block_size * gpt2.batch_size * gpt2.gradient_accumulation_steps == 524_288
    assert round(gpt2.max_steps * 524_288 / 1e9, 1) == 10.0
    shakespeare = read_recipe("shakespeare-gpu")
    assert round(shakespeare.model_config(65).parameter_count() / 1e6, 1) == 10.8
    for recipe in (gpt2, shakespeare, read_recipe("qa-gpu")):
        assert recipe.precision == "bfloat16"
        assert recipe.compile
