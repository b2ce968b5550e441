"""minigpt's numbers agree with those of another implementation (golden/make_golden.py) to ten digits."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from minigpt.families.gpt2.family import FAMILY
from minigpt.model import GPTLMHeadModel

FOLDER = Path(__file__).parent / "golden"
VARIANTS = ("gpt2_bias_tanh", "gpt2_nobias_exact")

# Both sides compute in double precision; only the order of sums differs. Ten AdamW steps amplify a difference
# of 1e-15 to about 1e-13; a wrong term anywhere shows in the third digit.
RELATIVE = 1e-10


def load(variant: str) -> tuple[GPTLMHeadModel, dict[str, Tensor], dict[str, Any]]:
    arrays = load_file(FOLDER / f"{variant}.safetensors")
    expected = json.loads((FOLDER / f"{variant}.json").read_bytes())
    config = FAMILY.config_from_hugging_face(expected["config"])
    stored = {name: arrays.pop(name) for name in ("batches", "logits")}
    model = GPTLMHeadModel(config).double()
    model.load_state_dict(FAMILY.from_hugging_face(arrays, config, torch.float64), strict=False)
    return model, stored, expected


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def their_name(ours: str) -> str:
    parts = ours.split(".")
    block = parts[2] if parts[1] == "blocks" else ""
    pattern = ours.replace(f".{block}.", ".*.", 1) if block else ours
    return next(row.theirs for row in FAMILY.weights if row.ours == pattern).replace("*", block)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_the_stored_ones(variant: str) -> None:
    model, stored, _ = load(variant)
    torch.testing.assert_close(model(stored["batches"][0]), stored["logits"], rtol=RELATIVE, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_of_each_tensor_has_the_stored_norm(variant: str) -> None:
    model, stored, expected = load(variant)
    ids = stored["batches"][0]
    loss_of(model(ids), ids).backward()  # type: ignore[no-untyped-call]
    norms = {their_name(n): p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
    assert norms == pytest.approx(expected["gradient_norms"], rel=RELATIVE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ten_losses_are_the_stored_ones(variant: str) -> None:
    model, stored, expected = load(variant)
    optimizer = torch.optim.AdamW(model.parameters(), **expected["adamw"])
    losses = []
    for step in range(10):
        ids = stored["batches"][step % 2]
        optimizer.zero_grad()
        loss = loss_of(model(ids), ids)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(expected["losses"], rel=RELATIVE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_script_still_makes_what_is_stored(variant: str) -> None:
    pytest.importorskip("transformers", reason="the golden is made with transformers, which is not installed")
    spec = importlib.util.spec_from_file_location("make_golden", FOLDER / "make_golden.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    arrays, contents = script.make(variant)
    stored_arrays = load_file(FOLDER / f"{variant}.safetensors")
    stored = json.loads((FOLDER / f"{variant}.json").read_bytes())
    assert arrays.keys() == stored_arrays.keys()
    for name, array in arrays.items():
        torch.testing.assert_close(array, stored_arrays[name], rtol=RELATIVE, atol=1e-12)
    assert contents["config"] == stored["config"]
    assert contents["adamw"] == stored["adamw"]
    for key in ("losses", "gradient_norms"):
        assert contents[key] == pytest.approx(stored[key], rel=RELATIVE)
