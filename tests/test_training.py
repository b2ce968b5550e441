"""The training loop: fast paths equal their slow twins, the model learns; configuration and command."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import minigpt
from minigpt.devices import random_state
from minigpt.errors import InputError
from minigpt.model import GPTLMHeadModel
from minigpt.training import autosize
from minigpt.training import estimate as report
from minigpt.training import run as training_run
from minigpt.training.config import RECIPES, TrainConfig, read_recipe
from minigpt.training.optimizer import Muon, make_optimizers, orthogonalize, schedule
from minigpt.training.run_data import RunData, read_data
from tests import prepared
from tests.commands import RunCommand
from tests.runs import config, given, identical, metrics, one_step, trainer, write_data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder with a tiny data set."""
    write_data(tmp_path)
    return tmp_path


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


def test_wsd_by_hand() -> None:
    settings = TrainConfig(warmup_steps=4, min_lr_ratio=0.1, lr_scheduler_type="wsd", decay_ratio=0.25)
    rates = [schedule(settings, step, total_steps=20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:15] == [1.0] * 11
    assert rates[15:] == pytest.approx([0.82, 0.64, 0.46, 0.28, 0.1])  # five steps, a line from 1 to 0.1
    assert schedule(settings, 20, total_steps=20) == pytest.approx(0.1)  # not below, also past the end


def test_wsd_that_only_falls() -> None:
    settings = TrainConfig(min_lr_ratio=0.0, lr_scheduler_type="wsd", decay_ratio=1.0)
    rates = [schedule(settings, step, total_steps=4) for step in range(4)]
    assert rates == [0.75, 0.5, 0.25, 0.0]
    short = TrainConfig(min_lr_ratio=0.0, lr_scheduler_type="wsd", decay_ratio=0.01)
    assert [schedule(short, step, total_steps=3) for step in range(3)] == [1.0, 1.0, 0.0]  # one step at least


def test_adamw_against_a_written_out_update(folder: Path) -> None:
    """https://arxiv.org/abs/1711.05101, algorithm 2, on each parameter, in double precision."""
    settings = config(folder, learning_rate=0.01, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95)
    run = trainer(settings)
    run.model.double()
    (optimizer,) = make_optimizers(run.model, run.config)
    parameters = list(run.model.parameters())
    random = torch.Generator().manual_seed(1)
    expected = [p.detach().clone() for p in parameters]
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for step in range(1, 4):
        for i, p in enumerate(parameters):
            p.grad = torch.randn(p.shape, generator=random, dtype=torch.float64)
            first[i] = 0.8 * first[i] + 0.2 * p.grad
            second[i] = 0.95 * second[i] + 0.05 * p.grad**2
            root = (second[i] / (1 - 0.95**step)).sqrt() + 1e-8
            decay = 0.1 if p.dim() == 2 else 0.0
            expected[i] = expected[i] * (1 - 0.01 * decay) - 0.01 * first[i] / (1 - 0.8**step) / root
        optimizer.step()
    for p, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.detach(), value, atol=1e-12, rtol=0)


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
        # The iteration acts on each singular value separately, so apply its polynomial to the singular
        # values.
        values = s / s.norm(dim=-1, keepdim=True)
        for _ in range(3):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        expected = u @ torch.diag_embed(values) @ vt
        torch.testing.assert_close(orthogonalize(matrices), expected, atol=1e-6, rtol=0)  # 1e-7 in the norm
        assert values.max() < 1.3


def test_orthogonalizing_in_16_bits_gives_nearly_the_same_direction() -> None:
    random = torch.Generator().manual_seed(0)
    for shape in ((4, 16, 16), (2, 64, 16), (2, 160, 432)):
        matrices = torch.randn(*shape, generator=random)
        exact, rounded = orthogonalize(matrices), orthogonalize(matrices, torch.bfloat16)
        assert rounded.dtype == torch.float32
        assert not torch.equal(exact, rounded)
        # of each of three steps the terms, up to 3.4, 4.8 and 2 times what comes out, are rounded by 2^-8
        assert float((rounded - exact).norm() / exact.norm()) < 3 * 10.3 * 2**-8


def test_a_run_s_muon_multiplies_in_its_precision(folder: Path) -> None:
    for precision, products in (("float32", None), ("bfloat16", torch.bfloat16), ("float16", None)):
        run = trainer(config(folder, precision, optimizer="muon", precision=precision))
        assert [o.products for o in run.step.optimizers if isinstance(o, Muon)] == [products]


def test_muon_against_a_written_out_update(folder: Path) -> None:
    """The written-out update takes one matrix at a time, QKV as three, with momentum by hand."""
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


def test_muon_against_torchs(folder: Path) -> None:
    """torch's own Muon takes single matrices, and computes in bfloat16."""
    run = trainer(config(folder, optimizer="muon", dropout=0.0, muon_weight_decay=0.1))
    _, muon = make_optimizers(run.model, run.config)
    by_muon = [p for group in muon.param_groups for p in group["params"]]
    pieces = {  # a copy of each matrix, three of a fused QKV projection
        p: [torch.nn.Parameter(piece.clone()) for piece in p.detach().split(32 if p.shape[0] == 96 else 128)]
        for p in by_muon
    }
    singles = [piece for some in pieces.values() for piece in some]
    theirs = torch.optim.Muon(singles, lr=0.02, weight_decay=0.1, momentum=0.95, ns_steps=3)
    random = torch.Generator().manual_seed(1)
    before = {p: p.detach().clone() for p in by_muon}
    for _ in range(3):
        for p, some in pieces.items():
            p.grad = torch.randn(p.shape, generator=random)
            for piece, gradient in zip(some, p.grad.split(len(some[0])), strict=True):
                piece.grad = gradient.clone()
        muon.step()
        theirs.step()  # type: ignore[no-untyped-call]
    for p, some in pieces.items():
        ours, other = p.detach() - before[p], torch.cat([piece.detach() for piece in some]) - before[p]
        # bfloat16 has 8 bits: some ten roundings in a row, 2^-9 each, at singular values that the iteration
        # moves by up to 3.4 times in each of its three steps
        assert (ours - other).norm() < 0.05 * other.norm()


# -- fast paths and their slow twins ------------------------------------------------------------------------


@pytest.mark.parametrize("loss_on", ["answer", "all"])
def test_loss_at_counted_positions_is_the_masked_loss(folder: Path, loss_on: Any) -> None:
    run = trainer(config(folder, loss_on=loss_on, dropout=0.0))
    run.model.double()
    batch = run.step.batches(0)[0]
    counted = batch.answer_mask if loss_on == "answer" else batch.token_mask
    logits = run.model(batch.input_ids, attention_mask=(batch.input_ids != 0).long())  # (B, T, V)
    every = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    expected = (every * counted.flatten()).sum()
    # the loop computes the loss in single precision: 2^-24 of a sum of at most some hundred terms
    assert run.step.summed_loss(run.step.to_device(batch)).item() == pytest.approx(expected.item(), rel=1e-6)


def test_padding_does_not_change_the_loss(folder: Path) -> None:
    losses = []
    for pad in (False, True):
        run = trainer(config(folder, f"run-{pad}", dropout=0.0, pad_to_max_length=pad))
        losses.append([one_step(run).loss for _ in range(5)])
        assert (run.step.batches(0)[0].input_ids.shape[1] == 31) is pad
    # single-precision sums in another order, amplified over five steps
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_limit_of_tokens_counts_all_padding(folder: Path) -> None:
    run = trainer(config(folder, tokens_per_batch=70, pad_to_max_length=True))
    assert len(run.step.plan) == 4  # eight pairs: two rows of 32 fit into 70
    assert {run.step.batches(step)[0].input_ids.shape for step in range(4)} == {(2, 31)}


def test_accumulation_equals_one_large_batch(folder: Path) -> None:
    losses = []
    for accumulate in (1, 2, 4):  # eight pairs: all of them are one step in each case
        settings = config(
            folder, dropout=0.0, batch_size=8 // accumulate, gradient_accumulation_steps=accumulate
        )
        run = trainer(settings)
        assert run.progress.tokens_seen == 0
        assert isinstance(run.data, RunData)
        losses.append([one_step(run).loss for _ in range(5)])
        assert run.progress.tokens_seen == 5 * int((run.data.train.lengths - 1).sum())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)


def test_bfloat16_stays_close_to_float32(folder: Path) -> None:
    numbers = {}
    for precision in ("float32", "bfloat16"):
        run = trainer(config(folder, precision=precision, dropout=0.0))
        numbers[precision] = one_step(run).loss
    # bfloat16 keeps 8 bits: products are right to about 0.4 %
    assert numbers["bfloat16"] == pytest.approx(numbers["float32"], rel=1e-2)
    assert numbers["bfloat16"] != numbers["float32"]


def test_first_loss_is_that_of_guessing(folder: Path) -> None:
    run = trainer(config(folder, dropout=0.0))
    # initial logits have a standard deviation of about 0.02 * sqrt(32): guessing, to a few hundredths
    assert one_step(run).loss == pytest.approx(math.log(run.data.tokenizer.get_vocab_size()), abs=0.1)


def test_zero_projections_leave_the_embedding_as_it_is(folder: Path) -> None:
    run = trainer(config(folder, dropout=0.0, zero_projections=True))
    assert isinstance(run.model, GPTLMHeadModel)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    stem = run.model.transformer
    embedded = stem.wte(ids) + stem.wpe(torch.arange(5))  # (B, T, C)
    torch.testing.assert_close(run.model(ids), run.model.lm_head(stem.ln_f(embedded)), rtol=0, atol=0)
    plain = dict(trainer(config(folder, "plain", dropout=0.0)).model.named_parameters())
    for name, parameter in run.model.named_parameters():
        ends = name.endswith(("out_proj.weight", "mlp.c_proj.weight"))
        assert torch.equal(parameter, torch.zeros_like(parameter) if ends else plain[name]), name


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


@pytest.mark.parametrize(
    ("steps", "asked", "every"),
    [(2, 0, 1), (199, 0, 1), (350, 0, 3), (1000, 0, 10), (99999, 0, 10), (2, 5, 5)],
)
def test_a_short_run_writes_more_lines(folder: Path, steps: int, asked: int, every: int) -> None:
    run = trainer(config(folder, max_steps=steps, logging_steps=asked))
    assert run.step.logging_steps == every


def test_a_run_of_two_steps_has_both_losses(folder: Path) -> None:
    trainer(config(folder, max_steps=2, logging_steps=0)).run()
    assert [line["step"] for line in metrics(folder / "run") if "train_loss" in line] == [1, 2]


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


def test_what_a_long_row_needs_follows_from_short_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(config(folder, block_size=256, max_length=256, dropout=0.1))
    measured = report._bytes_per_row(run, 255)
    monkeypatch.setattr(report, "_LONGEST", 128)
    # what is kept is a polynomial of the length; only the ends of blocks of memory may be rounded
    assert report._bytes_per_row(run, 255) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("longest", [2, 4, 16])  # the first columns of 2 hold no token of an answer
def test_a_long_row_is_measured_in_part(folder: Path, monkeypatch: pytest.MonkeyPatch, longest: int) -> None:
    run = trainer(config(folder, loss_on="answer"))
    widths, compute = set[int](), run.step.summed_loss

    def noted(batch: Any) -> torch.Tensor:
        widths.add(batch[0].shape[1])
        return compute(batch)

    monkeypatch.setattr(run.step, "summed_loss", noted)
    monkeypatch.setattr(report, "_LONGEST", longest)
    monkeypatch.setattr(
        report, "batch_flops", lambda *sizes: 1e11
    )  # as if every row were a thousand times wider
    assert 0 < report._measure(run, 1.0) < math.inf
    (width,) = widths
    assert longest / 2 < width <= longest


def test_a_run_that_does_not_fit_is_refused_before_it_computes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(config(folder))
    enough = (report.memory_needed(run) - report.TORCH_ITSELF) / report.HELD
    assert report.estimate(run, enough + 1).steps == 12
    monkeypatch.setattr(run.step, "summed_loss", lambda batch: pytest.fail("a batch was computed"))
    with pytest.raises(
        InputError, match=r"needs about 0\.\d GB of memory, and 0\.\d GB are free: lower --batch"
    ):
        report.estimate(run, enough - 1)


def test_weights_that_do_not_fit_are_refused_before_they_are_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(folder)
    count = trainer(settings).model.config.parameter_count()
    monkeypatch.setattr(autosize, "free_memory", lambda _: 4.0 * count - 1)
    monkeypatch.setattr(training_run, "Trainer", lambda *_: pytest.fail("a model was made"))
    with pytest.raises(InputError, match=f"{count:,} parameters take .* lower --n_layer or --n_embd"):
        training_run.train(settings)
    assert not (folder / "run").exists()


def test_a_part_without_answers_is_named(folder: Path) -> None:
    with pytest.raises(InputError, match=r"train\.jsonl: no answer is left.*max_length=5"):
        read_data(config(folder, max_length=5))


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
        ("RANGES = 3", "unknown key 'RANGES'"),
        ("n_layers = 3", "unknown key 'n_layers'; did you mean 'n_layer'"),
        ("n_layer = 'three'", "n_layer = 'three': expected int"),
        ("n_layer = true", "n_layer = True: expected int"),
        ("loss_on = 'both'", r"loss_on = 'both': expected \('answer', 'all'\)"),
        ("n_layer = ", "is not valid TOML"),
        ("batch_size = 0", "batch_size must be from 1 to 1000000: got batch_size=0"),
        ("learning_rate = nan", "learning_rate must be from 0 to 1e\\+38: got learning_rate=nan"),
        ("lr_scheduler_type = 'linear'", "lr_scheduler_type = 'linear': expected"),
        ("decay_ratio = 0.0", "decay_ratio must be from 1e-06 to 1: got decay_ratio=0.0"),
        ("decay_ratio = nan", "decay_ratio must be from 1e-06 to 1: got decay_ratio=nan"),
        ("learning_rate = 1" + "0" * 400, "learning_rate must be from 0 to 1e\\+38: got learning_rate=inf"),
        ("n_layer = 1000000", "n_layer must be from 1 to 1000: got n_layer=1000000"),
        ("max_length = 2", "max_length must be from 3 to 1000000 .*: got max_length=2"),
        ("seed = -1", "seed must be from 0 to 9223372036854775807: got seed=-1"),
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
    with pytest.raises(
        InputError,
        match=r"base = .*: expected one of classification.*, document, finetune, gpt2-124m, grpo, qa-cpu",
    ):
        read_recipe(str(mine))


def test_a_recipe_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown recipe 'qa-cpus'; did you mean 'qa-cpu'"):
        read_recipe("qa-cpus")
    with pytest.raises(InputError, match=r"missing\.toml does not exist"):
        read_recipe("missing.toml")


def test_sizes_that_make_no_model(folder: Path) -> None:
    with pytest.raises(InputError, match="n_head must divide n_embd: got n_head=5, n_embd=32"):
        trainer(config(folder, n_head=5))


# -- the command --------------------------------------------------------------------------------------------


def test_the_command_trains_refuses_to_mix_runs_and_moves_the_old_one(
    folder: Path, run_command: RunCommand
) -> None:
    first = prepared.run("minigpt/train.py", *given(folder), "--json")
    assert first.returncode == 0, first.stderr
    assert "recipe qa-cpu: no --recipe was given and the device is cpu" in first.stdout
    assert json.loads(first.stdout.splitlines()[-1])["steps"] == 12
    second = run_command("train.py", *given(folder))
    assert second.code == 2
    assert len(second.err.splitlines()) == 1
    assert "--resume" in second.err
    assert "--overwrite" in second.err
    third = run_command("train.py", *given(folder), "--overwrite")
    assert third.code == 0, third.err
    assert (folder / "run.previous" / "best" / "model.safetensors").exists()
    identical(folder / "run", folder / "run.previous")


def test_overwrite_moves_a_run_only_for_one_that_starts(folder: Path, run_command: RunCommand) -> None:
    trainer(config(folder)).run()
    for wrong in ({"n_head": 5}, {"val_data": folder / "missing.jsonl"}):
        assert run_command("train.py", *given(folder, **wrong), "--overwrite").code == 2
    strange = folder / "run.previous" / "notes.txt"
    strange.parent.mkdir()
    strange.write_text("mine", encoding="utf-8")
    refused = run_command("train.py", *given(folder), "--overwrite")
    assert refused.code == 2
    assert "run.previous is in the way and is not a run" in refused.err
    assert strange.exists()
    assert minigpt.load_model(folder / "run")  # the old run is where it was


def test_dry_run_reports_and_starts_nothing(folder: Path, run_command: RunCommand) -> None:
    result = run_command("train.py", *given(folder), "--dry_run", "--json")
    assert result.code == 0, result.err
    numbers = json.loads(result.out.splitlines()[-1])
    assert f"{numbers['parameters']:,}" in result.out
    assert "equal" in result.out
    assert "MiB of memory" in result.out
    assert numbers["steps"] == 12
    assert not (folder / "run").exists()
