"""The loop: its fast paths equal their slow twins, it learns, and it resumes to the same bits."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import minigpt
from minigpt.command_line import InputError
from minigpt.devices import random_state, set_random_state
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.train import defaults
from minigpt.training import checkpoint, report
from minigpt.training.config import RECIPES, TrainConfig, read_recipe, read_run
from minigpt.training.loop import Stopped, Trainer
from minigpt.training.optimizer import make_optimizers, orthogonalize, schedule
from minigpt.training.run_data import read_data
from tests.doors import RunDoor

ROOT = Path(__file__).parents[1]
TINY: dict[str, Any] = {
    "n_layer": 2, "n_embd": 32, "n_head": 2, "block_size": 32, "max_length": 32, "batch_size": 4,
    "learning_rate": 1e-2, "max_steps": 12, "eval_steps": 6, "logging_steps": 2, "threads": 1,
    "device": "cpu",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tiny data set: eight colours of eight things, in answers of unlike lengths."""
    things, colours = "天地日月山水花草", ("黑", "土黄", "红", "雪白", "青", "天蓝", "淡淡的紫", "绿")
    pairs = [(f"{t}是什么颜色？", f"{t}是{c}色。") for t, c in zip(things, colours)]
    lines = "".join(json.dumps({"question": q, "answer": a}, ensure_ascii=False) + "\n" for q, a in pairs)
    (tmp_path / "train.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "val.jsonl").write_text("".join(lines.splitlines(keepends=True)[:3]), encoding="utf-8")
    Tokenizer.from_word2id(build_vocabulary(q + a for q, a in pairs)).save(tmp_path / "vocab.json")
    return tmp_path


def config(folder: Path, output: str = "run", **values: Any) -> TrainConfig:
    paths: dict[str, Any] = {
        "train_data": folder / "train.jsonl",
        "val_data": folder / "val.jsonl",
        "vocab_path": folder / "vocab.json",
        "output": folder / output,
    }
    return TrainConfig(**{**paths, **TINY, **values})


def trainer(settings: TrainConfig) -> Trainer:
    return Trainer(settings, read_data(settings))


# -- schedule and optimiser ---------------------------------------------------------------------------------


def test_cosine_with_warm_up_by_hand() -> None:
    settings = TrainConfig(warmup_steps=4, min_lr_ratio=0.1, lr_scheduler_type="cosine")
    rates = [schedule(settings, step, total_steps=15) for step in range(15)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0  # the cosine begins where the warm-up ended
    assert rates[9] == pytest.approx(0.55)  # half way between 1 and 0.1, half way through
    assert rates[14] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_constant_schedule() -> None:
    settings = TrainConfig(lr_scheduler_type="constant")
    assert {schedule(settings, step, 100) for step in range(100)} == {1.0}


def test_only_matrices_decay(folder: Path) -> None:
    run = trainer(config(folder, weight_decay=0.5, learning_rate=0.1))
    (optimizer,) = make_optimizers(run.model, run.config)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in run.model.named_parameters():
        # AdamW with no gradient leaves w * (1 - rate * decay)
        factor = 1 - 0.1 * 0.5 if parameter.dim() == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, rtol=1e-6, atol=0)


def test_orthogonalize_against_the_singular_value_decomposition() -> None:
    random = torch.Generator().manual_seed(0)
    for shape in ((4, 16, 16), (2, 64, 16), (2, 16, 64)):
        matrices = torch.randn(*shape, generator=random, dtype=torch.float64)
        u, s, vt = torch.linalg.svd(matrices, full_matrices=False)
        # the iteration acts on each singular value alone: apply its polynomial to them
        values = s / s.norm(dim=-1, keepdim=True)
        for _ in range(3):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        expected = u @ torch.diag_embed(values) @ vt
        torch.testing.assert_close(orthogonalize(matrices), expected, atol=1e-6, rtol=0)  # 1e-7 in the norm
        assert values.max() < 1.3


def test_muon_against_a_written_out_update(folder: Path) -> None:
    """One matrix after the other, QKV in three, momentum by hand."""
    run = trainer(config(folder, optimizer="muon", dropout=0.0, muon_weight_decay=0.1))
    run.model.double()
    adamw, muon = make_optimizers(run.model, run.config)
    names = {p: name for name, p in run.model.named_parameters()}
    by_muon = [p for group in muon.param_groups for p in group["params"]]
    parts = ("qkv_proj.weight", "out_proj.weight", "c_fc.weight", "c_proj.weight")
    assert len(by_muon) == 2 * len(parts)
    assert all(names[p].endswith(parts) for p in by_muon)
    by_adamw = [p for group in adamw.param_groups for p in group["params"]]
    assert len(by_adamw) + len(by_muon) == len(names)
    random = torch.Generator().manual_seed(1)
    expected = {p: p.detach().clone() for p in by_muon}
    momentum = {p: torch.zeros_like(p) for p in by_muon}
    for _ in range(3):
        for p in by_muon:
            p.grad = torch.randn(p.shape, generator=random, dtype=torch.float64)
            momentum[p] = 0.95 * momentum[p] + 0.05 * p.grad
            direction = 0.05 * p.grad + 0.95 * momentum[p]
            pieces = direction.split(32) if p.shape[0] == 96 else [direction]
            update = torch.cat([orthogonalize(piece[None])[0] for piece in pieces])
            taller = 2.0 if p.shape == (128, 32) else 1.0  # sqrt(rows / columns)
            expected[p] = expected[p] * (1 - 0.02 * 0.1) - 0.02 * taller * update
        muon.step()
    for p in by_muon:
        torch.testing.assert_close(p.detach(), expected[p], atol=1e-12, rtol=0)


# -- fast paths and their slow twins ------------------------------------------------------------------------


@pytest.mark.parametrize("loss_on", ["answer", "all"])
def test_loss_at_counted_positions_is_the_masked_loss(folder: Path, loss_on: Any) -> None:
    run = trainer(config(folder, loss_on=loss_on, dropout=0.0))
    run.model.double()
    batch = run.batches(0)[0]
    counted = batch.answer_mask if loss_on == "answer" else batch.token_mask
    logits = run.model(batch.input_ids, attention_mask=(batch.input_ids != 0).long())  # (B, T, V)
    every = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    expected = (every * counted.flatten()).sum()
    # the loop computes the loss in single precision: 2^-24 of a sum of at most some hundred terms
    assert run.loss(batch).item() == pytest.approx(expected.item(), rel=1e-6)


def test_padding_does_not_change_the_loss(folder: Path) -> None:
    losses = []
    for pad in (False, True):
        run = trainer(config(folder, f"run-{pad}", dropout=0.0, pad_to_max_length=pad))
        losses.append([run.step()["loss"] for _ in range(5)])
        assert (run.batches(0)[0].input_ids.shape[1] == 31) is pad
    # single-precision sums in another order, amplified over five steps
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_limit_of_tokens_counts_all_padding(folder: Path) -> None:
    run = trainer(config(folder, tokens_per_batch=70, pad_to_max_length=True))
    assert len(run.plan) == 4  # eight pairs: two rows of 32 fit into 70
    assert {run.batches(step)[0].input_ids.shape for step in range(4)} == {(2, 31)}


def test_accumulation_equals_one_large_batch(folder: Path) -> None:
    losses = []
    for accumulate in (1, 2, 4):  # eight pairs: all of them are one step in each case
        settings = config(
            folder, dropout=0.0, batch_size=8 // accumulate, gradient_accumulation_steps=accumulate
        )
        run = trainer(settings)
        assert run.tokens_seen == 0
        losses.append([run.step()["loss"] for _ in range(5)])
        assert run.tokens_seen == 5 * int((run.data.train.lengths - 1).sum())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)


def test_bfloat16_stays_close_to_float32(folder: Path) -> None:
    numbers = {}
    for precision in ("float32", "bfloat16"):
        run = trainer(config(folder, precision=precision, dropout=0.0))
        numbers[precision] = run.step()["loss"]
    # bfloat16 keeps 8 bits: products are right to about 0.4 %
    assert numbers["bfloat16"] == pytest.approx(numbers["float32"], rel=1e-2)
    assert numbers["bfloat16"] != numbers["float32"]


def test_first_loss_is_that_of_guessing(folder: Path) -> None:
    run = trainer(config(folder, dropout=0.0))
    # initial logits have a standard deviation of about 0.02 * sqrt(32): guessing, to a few hundredths
    assert run.step()["loss"] == pytest.approx(math.log(run.tokenizer.get_vocab_size()), abs=0.1)


# -- the run ------------------------------------------------------------------------------------------------


def test_it_learns_and_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wider: dict[str, Any] = {"n_embd": 128, "n_head": 4, "learning_rate": 3e-3, "max_grad_norm": 1.0}
    run = trainer(config(folder, max_steps=60, eval_steps=20, dropout=0.0, batch_size=8, **wider))
    result = run.run()
    assert result["steps"] == 60
    assert result["val_loss"] < 0.1
    out = capsys.readouterr().out
    assert out.count("validation loss") == 3
    assert "Q: " in out
    model = minigpt.load_model(folder / "run")
    tokenizer = minigpt.load_tokenizer(folder / "run" / "best")
    assert minigpt.generate(model, tokenizer, "山是什么颜色？") == "山是青色。"
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "train_loss" in line]
    assert [line["step"] for line in trained] == list(range(2, 61, 2))
    assert {"learning_rate", "grad_norm", "tokens_per_second"} <= trained[0].keys()
    assert [line["step"] for line in lines if "val_loss" in line] == [20, 40, 60]
    assert list((folder / "run" / "tensorboard").glob("events.*"))


def identical(a: Path, b: Path) -> None:
    """Weights, optimiser, random state and metrics of two runs, bit for bit (times excepted)."""
    for name in ("model", "optimizer", "rng"):
        left = load_file(a / "last" / f"{name}.safetensors")
        right = load_file(b / "last" / f"{name}.safetensors")
        assert left.keys() == right.keys()
        for key in left:
            assert torch.equal(left[key], right[key]), (name, key)
    assert metrics(a) == metrics(b)


def stop_at(run: Trainer, step: int) -> None:
    """Run, with a Ctrl-C during step number `step`."""
    one_step = run.step

    def stopping() -> dict[str, float]:
        if run.steps_done == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return one_step()

    run.step = stopping  # type: ignore[method-assign]
    with pytest.raises(Stopped, match=f"saved step {step} ") as stopped:
        run.run()
    assert stopped.value.code == 130


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


@pytest.mark.parametrize(
    ("stop_after", "optimizer"), [(1, "adamw"), (5, "muon"), (6, "adamw"), (11, "adamw")]
)
def test_a_resumed_run_ends_on_the_same_bits(folder: Path, stop_after: int, optimizer: Any) -> None:
    trainer(config(folder, "straight", dropout=0.1, optimizer=optimizer)).run()
    stop_at(trainer(config(folder, "stopped", dropout=0.1, optimizer=optimizer)), stop_after)
    minigpt.load_model(folder / "stopped")  # also where there is no `best` yet
    again = trainer(read_run(folder / "stopped"))
    torch.manual_seed(999)  # whatever happened to the generator since must not matter
    assert again.resume().name == f"step-{stop_after:08d}"
    again.run()
    identical(folder / "straight", folder / "stopped")


def test_killed_at_any_time_it_resumes_to_the_same_bits(folder: Path) -> None:
    """SIGKILL, three times in one run, at whatever point it has reached then."""
    command = [sys.executable, "-m", "minigpt", "train", "--max_steps", "400", "--eval_steps", "20"]
    for name, value in {**TINY, "dropout": 0.1, "train_data": folder / "train.jsonl"}.items():
        if name not in ("max_steps", "eval_steps"):
            command += [f"--{name}", str(value)]
    command += ["--val_data", str(folder / "val.jsonl"), "--vocab_path", str(folder / "vocab.json")]

    def run(output: str, *more: str) -> subprocess.Popen[bytes]:  # pytest shows its stderr if the test fails
        return subprocess.Popen(
            [*command, "--output", str(folder / output), *more], cwd=ROOT, stdout=subprocess.DEVNULL
        )

    def newest() -> str:
        return max((path.name for path in (folder / "killed").glob("step-*")), default="")

    straight, killed, kills = run("straight"), run("killed"), 0
    for _ in range(3):
        before = newest()
        while killed.poll() is None and newest() == before:  # until a checkpoint has come since the start
            time.sleep(0.01)
        killed.kill()
        if killed.wait() == -signal.SIGKILL:
            killed, kills = run("killed", "--resume"), kills + 1
    assert (straight.wait(), killed.wait()) == (0, 0)
    assert kills > 0
    identical(folder / "straight", folder / "killed")


def test_a_damaged_checkpoint_is_passed_over(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(config(folder)).run()
    newest = folder / "run" / "step-00000012" / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content)
    run = trainer(config(folder))
    assert run.resume().name == "step-00000006"
    assert "step-00000012 passed over" in capsys.readouterr().err
    run.run()
    trainer(config(folder, "straight")).run()
    identical(folder / "run", folder / "straight")


def test_resume_refuses_what_does_not_belong_together(folder: Path) -> None:
    settings = config(folder)
    with pytest.raises(InputError, match="nothing to resume"):
        trainer(settings).resume()
    trainer(settings).run()
    with pytest.raises(InputError, match="is finished"):
        trainer(settings).resume()
    longer = dataclasses.replace(settings, max_steps=20)
    shutil.copy(folder / "val.jsonl", folder / "other.jsonl")
    with pytest.raises(InputError, match=r"training data.*other\.jsonl"):
        trainer(dataclasses.replace(longer, train_data=folder / "other.jsonl")).resume()
    with pytest.raises(InputError, match=r"n_embd|shape|size"):
        trainer(dataclasses.replace(longer, n_embd=16)).resume()


def test_resume_says_what_will_change_the_bits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(config(folder)).run()
    trainer(config(folder, max_steps=20)).resume()
    assert "before, is" not in capsys.readouterr().err
    trainer(config(folder, max_steps=20, threads=2)).resume()
    assert "threads was 1 before, is 2 now" in capsys.readouterr().err


def test_a_best_checkpoint_that_is_gone_is_not_the_best(folder: Path) -> None:
    stop_at(trainer(config(folder)), 8)
    assert (folder / "run" / "best").resolve().name == "step-00000006"
    shutil.rmtree(folder / "run" / "step-00000006")
    again = trainer(read_run(folder / "run"))
    assert again.resume().name == "step-00000008"
    assert (again.best_val_loss, again.best_step) == (math.inf, 0)
    again.run()
    assert (folder / "run" / "best").resolve().name == "step-00000012"


def test_a_link_left_behind_is_set_again(folder: Path) -> None:
    """As after a kill between saving a checkpoint and linking it."""
    stop_at(trainer(config(folder)), 8)
    (folder / "run" / "best").unlink()
    checkpoint.set_link(folder / "run", "last", folder / "run" / "step-00000006")
    trainer(read_run(folder / "run")).resume()
    assert (folder / "run" / "best").resolve().name == "step-00000006"
    assert (folder / "run" / "last").resolve().name == "step-00000008"


def test_a_run_clears_away_what_a_killed_one_was_writing(folder: Path) -> None:
    for name in (".step-00000006.tmp-7", ".step-00000006.tmp-7.mine", ".notes.tmp-7"):
        (folder / "run" / name).mkdir(parents=True)
    trainer(config(folder)).run()
    assert sorted(path.name for path in (folder / "run").glob(".*")) == [
        ".notes.tmp-7",
        ".step-00000006.tmp-7.mine",
    ]


def test_a_link_that_cannot_be_made_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = tmp_path / "step-00000001"
    step.mkdir()
    (tmp_path / "last").mkdir()  # as a copy that follows links makes it
    with pytest.raises(InputError, match=r"last cannot be made a link to it: .*irectory; remove what"):
        checkpoint.set_link(tmp_path, "last", step)

    def refuse(path: Path, target: str) -> None:
        raise OSError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(InputError, match=r"best cannot be made a link to it: Operation not permitted"):
        checkpoint.set_link(tmp_path, "best", step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-00000001"]


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_a_device_keeps_its_own_random_state(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """On a stand-in for the device: dropout there draws from a generator that is not the CPU's."""
    states = [torch.tensor([7])]
    monkeypatch.setattr(getattr(torch, kind), "get_rng_state", lambda *_: states[-1])
    monkeypatch.setattr(getattr(torch, kind), "set_rng_state", lambda state, *_: states.append(state))
    device = torch.device(kind)
    saved = random_state(device)
    expected = torch.rand(3)
    states.append(torch.tensor([8]))
    set_random_state(torch.device("cpu"), saved)
    assert states[-1].item() == 8
    set_random_state(device, saved)
    assert states[-1].item() == 7
    assert torch.equal(torch.rand(3), expected)


def test_the_estimate_is_of_what_is_left_and_changes_nothing(folder: Path) -> None:
    run = trainer(config(folder, dropout=0.1))
    whole = report.estimate(run)
    for _ in range(9):
        run.step()
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    random = random_state(run.device)["torch"]
    assert (whole.steps, report.estimate(run).steps) == (12, 3)
    assert torch.equal(random_state(run.device)["torch"], random)
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_a_part_without_answers_is_named(folder: Path) -> None:
    with pytest.raises(InputError, match=r"train\.jsonl: no pair has an answer left.*max_length=5"):
        read_data(config(folder, max_length=5))


def test_a_loss_that_is_not_finite_never_reaches_the_weights(folder: Path) -> None:
    run = trainer(config(folder, dropout=0.0))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    assert isinstance(run.model, minigpt.GPTLMHeadModel)
    run.model.transformer.ln_f.register_forward_hook(lambda module, given, out: out * math.inf)
    with pytest.raises(InputError, match=r"step 1: loss nan.*weights untouched.*lines"):
        run.step()
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_pruning_keeps_newest_best_and_strangers(tmp_path: Path) -> None:
    for step in range(1, 7):
        (tmp_path / f"step-{step:08d}").mkdir()
    for stranger in ("step-1", "step-00000001.backup", "step-000000001", "notes"):
        (tmp_path / stranger).mkdir()
    checkpoint.set_link(tmp_path, "best", tmp_path / "step-00000002")
    checkpoint.set_link(tmp_path, "last", tmp_path / "step-00000006")
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best", "last", "notes", "step-000000001", "step-00000001.backup", "step-00000002",
        "step-00000005", "step-00000006", "step-1",
    ]  # fmt: skip


def test_a_failed_save_leaves_the_earlier_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(config(folder))
    write, count = Path.write_bytes, 0

    def full_disk(path: Path, content: Any) -> int:
        nonlocal count
        count += path.name == "rng.safetensors"
        if count > 1:  # the first checkpoint went well
            raise OSError(28, "No space left on device", str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(InputError, match=r"step-00000012.*No space left on device.*bytes free"):
        run.run()
    left = [path.name for path in (folder / "run").iterdir()]
    assert "step-00000006" in left
    assert not [name for name in left if "tmp" in name or name == "step-00000012"]
    monkeypatch.undo()
    assert trainer(config(folder)).resume().name == "step-00000006"


# -- configuration ------------------------------------------------------------------------------------------


def test_every_recipe_is_read_and_makes_a_model() -> None:
    names = {path.stem for path in RECIPES.glob("*.toml")}
    assert {"document", "qa-cpu", "qa-gpu"} <= names
    for name in names:
        assert read_recipe(name).model_config(vocab_size=100).num_hidden_layers > 0
    document = read_recipe("document")
    # the tutorial's model: "about 46.4M parameters" at a vocabulary of 4,825
    assert round(document.model_config(vocab_size=4825).parameter_count() / 1e6, 1) == 46.4
    assert (document.learning_rate, document.lr_scheduler_type, document.batch_size) == (1e-4, "constant", 32)
    assert (document.max_length, document.pad_to_max_length, document.num_train_epochs) == (128, True, 15)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_layers = 3", "unknown key 'n_layers'; did you mean 'n_layer'"),
        ("n_layer = 'three'", "n_layer = 'three': expected int"),
        ("n_layer = true", "n_layer = True: expected int"),
        ("loss_on = 'both'", r"loss_on = 'both': expected \('answer', 'all'\)"),
        ("n_layer = ", "is no TOML"),
        ("batch_size = 0", "batch_size must be at least 1"),
        ("learning_rate = nan", "learning_rate must be a finite number"),
        ("max_length = 500", "max_length=500 tokens do not fit into block_size=256"),
    ],
)
def test_a_bad_recipe_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_recipe(str(tmp_path / "mine.toml"))


def test_a_recipe_may_stand_on_another(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('base = "qa-cpu"\nn_layer = 9\nvocab_path = "v.json"', encoding="utf-8")
    expected = dataclasses.replace(
        read_recipe("qa-cpu"), recipe=str(mine), n_layer=9, vocab_path=Path("v.json")
    )
    assert read_recipe(str(mine)) == expected
    mine.write_text(f'base = "{mine}"', encoding="utf-8")
    with pytest.raises(InputError, match=r"base = .*: expected one of document, qa-cpu, qa-gpu"):
        read_recipe(str(mine))


def test_a_recipe_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown recipe 'qa-cpus'; did you mean 'qa-cpu'"):
        read_recipe("qa-cpus")
    with pytest.raises(InputError, match=r"missing\.toml does not exist"):
        read_recipe("missing.toml")


def test_a_resumed_run_keeps_its_recipe_and_not_the_calls_flags(folder: Path) -> None:
    trainer(config(folder, recipe="qa-cpu", overwrite=True, strict=True, json=True)).run()
    resume = ["--resume", "--output", str(folder / "run")]
    inherited = config(folder, recipe="qa-cpu", strict=True, resume=True)
    assert defaults(resume) == defaults([*resume, "--recipe=qa-cpu"]) == inherited
    with pytest.raises(InputError, match="began with --recipe qa-cpu, got --recipe document"):
        defaults([*resume, "--recipe", "document"])


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"config": [1]}'])
def test_a_damaged_run_file_can_be_replaced_as_its_error_says(folder: Path, content: str) -> None:
    trainer(config(folder)).run()
    path = folder / "run" / "run.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"run\.json is damaged: copy .*last.training_state\.json over it"):
        read_run(folder / "run")
    shutil.copy(folder / "run" / "last" / "training_state.json", path)
    assert read_run(folder / "run") == config(folder, resume=True)


def test_sizes_that_make_no_model(folder: Path) -> None:
    with pytest.raises(InputError, match="n_head must divide n_embd: got n_head=5, n_embd=32"):
        trainer(config(folder, n_head=5))


# -- the door -----------------------------------------------------------------------------------------------


def given(folder: Path, **values: Any) -> list[str]:
    """The flags of `config(folder)`."""
    paths = {"train_data": folder / "train.jsonl", "val_data": folder / "val.jsonl"}
    paths |= {"vocab_path": folder / "vocab.json", "output": folder / "run"}
    settings = {**TINY, **paths, **values}
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def door(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "minigpt/train.py", *given(folder), *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


def test_the_door_trains_refuses_to_mix_runs_and_moves_the_old_one(folder: Path) -> None:
    first = door(folder, "--json")
    assert first.returncode == 0, first.stderr
    assert "recipe qa-cpu: no --recipe was given and the device is cpu" in first.stdout
    assert json.loads(first.stdout.splitlines()[-1])["steps"] == 12
    second = door(folder)
    assert second.returncode == 2
    assert len(second.stderr.splitlines()) == 1
    assert "--resume" in second.stderr
    assert "--overwrite" in second.stderr
    third = door(folder, "--overwrite")
    assert third.returncode == 0, third.stderr
    assert (folder / "run.previous" / "best" / "model.safetensors").exists()
    identical(folder / "run", folder / "run.previous")


def test_overwrite_moves_a_run_only_for_one_that_starts(folder: Path, run_door: RunDoor) -> None:
    trainer(config(folder)).run()
    for wrong in ({"n_head": 5}, {"val_data": folder / "missing.jsonl"}):
        assert run_door("train.py", *given(folder, **wrong), "--overwrite").code == 2
    strange = folder / "run.previous" / "notes.txt"
    strange.parent.mkdir()
    strange.write_text("mine", encoding="utf-8")
    refused = run_door("train.py", *given(folder), "--overwrite")
    assert refused.code == 2
    assert "run.previous is in the way and is no run" in refused.err
    assert strange.exists()
    assert minigpt.load_model(folder / "run")  # the old run is where it was


def test_dry_run_reports_and_starts_nothing(folder: Path) -> None:
    result = door(folder, "--dry_run", "--json")
    assert result.returncode == 0, result.stderr
    numbers = json.loads(result.stdout.splitlines()[-1])
    assert f"{numbers['parameters']:,}" in result.stdout
    assert "equal" in result.stdout
    assert "MiB of memory" in result.stdout
    assert numbers["steps"] == 12
    assert not (folder / "run").exists()
