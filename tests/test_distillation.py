"""Distillation: the loss by hand, a run that approaches its teacher, resume, and bad teachers."""

import json
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minigpt.data.batches import encode_conversation, encode_conversations
from minigpt.data.conversation import conversation_of_pair
from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel, new_model
from minigpt.model import GPTConfig
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.training.config import TrainConfig
from minigpt.training.distillation_loss import DistillationLoss, distillation_loss
from minigpt.training.estimate import HELD, memory_needed
from minigpt.training.finetune_config import FinetuneConfig
from minigpt.training.loss import NextTokenLoss
from minigpt.training.resolve import resolve
from minigpt.training.run import finetune, train
from minigpt.weights.pretrained import load_model, save_pretrained
from tests.runs import config, metrics, stop_at, trainer, write_data

CPU = torch.device("cpu")
TOKENIZER = Tokenizer.from_word2id(build_vocabulary(["天地玄黄宇宙洪荒"]))


def tiny(seed: int, size: int = TOKENIZER.get_vocab_size(), n_embd: int = 32) -> LanguageModel:
    torch.manual_seed(seed)
    model = new_model(
        GPTConfig(vocab_size=size, n_layer=1, n_embd=n_embd, n_head=2, block_size=32, dropout=0.1)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_two_tokens_by_hand() -> None:
    # model 1/2, 1/2; teacher 3/4, 1/4: KL = 3/4 ln(3/2) + 1/4 ln(1/2)
    logits, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    target = torch.tensor([1])
    assert distillation_loss(logits, teacher, target, 1.0, 1.0).item() == pytest.approx(kl)
    mixed = distillation_loss(logits, teacher, target, 0.25, 1.0).item()
    assert mixed == pytest.approx(0.25 * kl + 0.75 * math.log(2))
    # at temperature 2 the teacher's odds are sqrt(3) to 1
    p = math.sqrt(3) / (1 + math.sqrt(3))
    soft = 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    assert distillation_loss(logits, teacher, target, 1.0, 2.0).item() == pytest.approx(soft)
    # entries that only one vocabulary has do not count
    wider = torch.tensor([[math.log(3), 0.0, 9.0]])
    assert distillation_loss(logits, wider, target, 1.0, 1.0).item() == pytest.approx(kl)


@pytest.mark.parametrize("limit", [2**26, 40])
def test_loss_and_gradients_are_the_formula_at_the_positions_that_count(limit: int) -> None:
    pairs = [conversation_of_pair("天地", "玄"), conversation_of_pair("宇", "宙洪荒")]
    batch = encode_conversations(pairs, TOKENIZER, 16, encode_conversation).batch(np.arange(2))
    model, teacher = tiny(1).eval(), tiny(2).eval()
    loss = DistillationLoss(model, teacher, "answer", CPU, 0.3, 2.0)
    loss._limit = limit  # 40: pieces of one position
    found = loss(*loss.select(batch))
    found.backward()
    assert {id(parameter) for parameter in loss.parameters()} == {id(one) for one in model.parameters()}
    exact, known = tiny(1).eval().double(), tiny(2).eval().double()
    expected = torch.zeros((), dtype=torch.float64)
    for row, column in batch.answer_mask.nonzero().tolist():
        ids, target = batch.input_ids[row : row + 1], batch.targets[row, column]
        ours, theirs = (one(ids)[0, column] for one in (exact, known))
        p, q = (theirs / 2).softmax(0).detach(), (ours / 2).softmax(0)
        expected = expected + 0.3 * 4 * (p * (p / q).log()).sum() - 0.7 * ours.softmax(0)[target].log()
    expected.backward()  # type: ignore[no-untyped-call]
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)  # float32
    wanted = dict(exact.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), wanted[name].grad, rtol=1e-4, atol=1e-5)


def test_without_a_counted_position_there_is_nothing() -> None:
    batch = encode_conversations([conversation_of_pair("天", "地")], TOKENIZER, 16).batch(np.arange(1))
    loss = DistillationLoss(tiny(1), tiny(2), "answer", CPU)
    found = loss(*loss.select(batch.blank()))
    found.backward()
    assert found.item() == 0.0


def test_an_evaluation_is_that_of_next_tokens() -> None:
    data = encode_conversations([conversation_of_pair("天地", "玄")], TOKENIZER, 16)
    model = tiny(1)
    found = DistillationLoss(model, tiny(2), "answer", CPU).evaluate(model, data.in_order(8), CPU)
    assert found == NextTokenLoss(model, "answer", CPU).evaluate(model, data.in_order(8), CPU)


# -- runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a tiny data set and a teacher that has learned it."""
    folder = tmp_path_factory.mktemp("distillation")
    write_data(folder)
    train(config(folder, "teacher", max_steps=60, eval_steps=60, n_embd=64, dropout=0.0, report_to="none"))
    return folder


def settings(folder: Path, output: str, **values: Any) -> TrainConfig:
    more = {"teacher": folder / "teacher" / "best", "alpha": 0.8, "temperature": 2.0, "dropout": 0.1}
    return config(folder, output, **{**more, "report_to": "none", **values})


def distance(model: LanguageModel, teacher: LanguageModel, folder: Path) -> float:
    """Return the mean KL to the teacher over the tokens of the first training question."""
    line = json.loads((folder / "train.jsonl").read_text(encoding="utf-8").splitlines()[0])
    ids = torch.tensor([Tokenizer(folder / "vocab.json").encode_text(line["question"])])
    with torch.no_grad():
        p, q = (one(ids)[0].log_softmax(1) for one in (teacher, model))
    return float((p.exp() * (p - q)).sum(1).mean())


def test_a_run_comes_closer_to_its_teacher_and_resumes_to_the_same_bits(folder: Path) -> None:
    train(settings(folder, "straight", loss_on="all"))
    teacher = load_model(folder / "teacher" / "best")
    new = trainer(settings(folder, "new", loss_on="all")).model.eval()
    taught = load_model(folder / "straight" / "last")
    assert distance(taught, teacher, folder) < 0.5 * distance(new, teacher, folder)
    stop_at(trainer(settings(folder, "stopped", loss_on="all")), 5, signal.SIGTERM)
    train(output=folder / "stopped", resume=True)
    assert metrics(folder / "stopped") == metrics(folder / "straight")
    for name in ("model", "optimizer", "rng"):
        left, right = (
            load_file(folder / run / "last" / f"{name}.safetensors") for run in ("straight", "stopped")
        )
        assert all(torch.equal(left[key], right[key]) for key in left)


def test_the_estimate_counts_the_teacher(folder: Path) -> None:
    run = trainer(settings(folder, "estimated"))
    alone = trainer(config(folder, "estimated", dropout=0.1, report_to="none"))
    teacher = load_model(folder / "teacher" / "best")
    weights = sum(one.nbytes for one in teacher.parameters())
    assert memory_needed(run) - memory_needed(alone) == pytest.approx(HELD * weights, abs=2)  # in bytes


def test_an_adapter_learns_from_a_teacher(folder: Path) -> None:
    options: dict[str, Any] = {
        "model": folder / "learner" / "best", "teacher": folder / "teacher" / "best", "method": "lora",
        "train_data": folder / "train.jsonl", "val_data": folder / "val.jsonl", "max_steps": 4, "threads": 1,
        "device": "cpu", "output": folder / "adapter", "report_to": "none", "alpha": 1.0, "r": 2,
    }  # fmt: skip
    train(settings(folder, "learner"))
    assert finetune(**options)["val_loss"] > 0
    assert (folder / "adapter" / "best" / "adapter_model.safetensors").exists()


def test_a_resume_needs_the_same_teacher(folder: Path, tmp_path: Path) -> None:
    vocabulary = Tokenizer(folder / "vocab.json")
    size = vocabulary.get_vocab_size()
    save_pretrained(tiny(1, size), tmp_path / "teacher", vocabulary)
    stop_at(trainer(settings(folder, "moved", teacher=tmp_path / "teacher")), 5)
    for file in (tmp_path / "teacher").iterdir():
        file.unlink()
    save_pretrained(tiny(2, size), tmp_path / "teacher", vocabulary)
    with pytest.raises(InputError, match=r"belongs to other weights than those of .*teacher now"):
        train(output=folder / "moved", resume=True)


def test_bad_teachers(folder: Path, tmp_path: Path) -> None:
    save_pretrained(tiny(1), tmp_path / "other", TOKENIZER)
    with pytest.raises(InputError, match="other has another tokenizer than the model that learns"):
        trainer(settings(folder, "none", teacher=tmp_path / "other"))
    with pytest.raises(InputError, match=r"--teacher .*best reads 32 tokens, and rows have up to 63: lower"):
        trainer(settings(folder, "none", block_size=64, max_length=64))
    with pytest.raises(InputError, match="none"):
        trainer(settings(folder, "none", teacher=tmp_path / "none"))


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (TrainConfig, {"alpha": 0.1}, "--alpha belongs to --teacher FOLDER"),
        (TrainConfig, {"temperature": 2.0}, "--temperature belongs to --teacher FOLDER, or to"),
        (
            TrainConfig,
            {"teacher": "a", "parallel": "fsdp", "optimizer": "adamw"},
            "--teacher does not go with parallel=fsdp",
        ),
        (
            TrainConfig,
            {"teacher": "run/best", "output": "run", "overwrite": True},
            "would move run/best, the t",
        ),
        (FinetuneConfig, {"teacher": "a", "task": "dpo"}, "--teacher goes with --task sft: got --task dpo"),
    ],
)
def test_options_that_do_not_go_together(
    folder: Path, kind: type[TrainConfig], values: dict[str, Any], message: str
) -> None:
    model = {"model": folder / "teacher" / "best"} if kind is FinetuneConfig else {}
    with pytest.raises(InputError, match=message):
        resolve({**model, **values}, kind)
