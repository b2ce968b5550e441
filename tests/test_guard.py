"""Numbers that are not finite have no effect on the run, and spikes of the loss are reported."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt.errors import InputError
from minigpt.evaluation.loss import LossReport
from minigpt.training import checkpoint
from minigpt.training.loop import Trainer
from minigpt.training.non_finite import first_non_finite
from minigpt.training.run_data import RunData, shown_lines
from minigpt.training.run_state import Progress, spike_threshold
from tests.runs import after_updates, config, identical, metrics, one_step, stop_at, trainer, write_data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder with a tiny data set."""
    write_data(tmp_path)
    return tmp_path


def poison(run: Trainer, steps: set[int], factor: float = math.nan) -> Trainer:
    """Multiply the loss of some steps (from 0) by `factor`."""
    loss = run.step.summed_loss
    run.step.summed_loss = lambda batch: (  # type: ignore[method-assign]
        loss(batch) * (factor if run.progress.steps_done in steps else 1.0)
    )
    return run


def infinite_gradient(run: Trainer) -> None:
    parameter = next(run.model.parameters())
    parameter.register_hook(lambda gradient: gradient * math.inf)  # type: ignore[no-untyped-call]


def nothing_counts(run: Trainer) -> None:
    empty = [b._replace(answer_mask=torch.zeros_like(b.answer_mask)) for b in run.step.batches(0)]
    run.step.batches = lambda step: empty  # type: ignore[method-assign]


@pytest.mark.parametrize("spoil", [lambda run: poison(run, {0}), infinite_gradient, nothing_counts])
def test_a_bad_step_leaves_no_trace(folder: Path, spoil: Callable[[Trainer], object]) -> None:
    run = trainer(config(folder, dropout=0.0))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    spoil(run)
    metrics = one_step(run)
    assert not (math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm))
    assert (run.progress.bad_steps, run.progress.skipped, run.progress.loss_steps) == (1, [[1, 1]], 0)
    assert all(not optimizer.state for optimizer in run.step.optimizers)
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_skipped_steps_are_named_and_the_run_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = poison(trainer(config(folder)), {2, 3})
    lines = run.step.positions([2])
    assert run.run()["steps"] == 12
    assert (
        f"step      3  skipped: loss nan, gradient norm nan; {shown_lines(lines)} of"
        in capsys.readouterr().out
    )
    events = [line for line in metrics(folder / "run") if "event" in line]
    assert events[0] == {"step": 3, "event": "skipped", "loss": None, "grad_norm": None, "lines": lines}
    assert [line["step"] for line in events] == [3, 4]
    assert run.progress.skipped == [[3, 4]]


def test_several_in_a_row_go_back_and_pass_over_the_data(folder: Path) -> None:
    run = poison(trainer(config(folder, max_steps=18)), {8, 9, 10})
    run.run()
    assert (run.progress.rollbacks, run.progress.skipped) == (1, [[7, 11]])
    (event,) = [line for line in metrics(folder / "run") if line.get("event") == "rollback"]
    assert (event["step"], event["to_step"]) == (11, 6)
    # the slow twin: the first six steps, then, with the learning rates and the data of 12 to 18, the rest
    twin = trainer(config(folder, "twin", max_steps=18))
    for _ in range(6):
        twin.step()
    state = torch.get_rng_state()
    twin.progress.steps_done = 11
    torch.set_rng_state(state)
    for _ in range(7):
        twin.step()
    for (name, ours), (_, theirs) in zip(run.model.named_parameters(), twin.model.named_parameters()):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("stop_after", [10, 11, 12])
def test_a_rollback_is_resumed_to_the_same_bits(folder: Path, stop_after: int) -> None:
    bad = {8, 9, 10}
    poison(trainer(config(folder, "straight", max_steps=18, dropout=0.1)), bad).run()
    stop_at(poison(trainer(config(folder, max_steps=18, dropout=0.1)), bad), stop_after)
    again = poison(trainer(config(folder, max_steps=18, dropout=0.1)), bad)
    again.resume()
    again.run()
    identical(folder / "run", folder / "straight")
    assert again.progress.skipped == [[7, 11]]


def test_a_second_time_it_stops_and_names_the_lines(folder: Path) -> None:
    run = poison(trainer(config(folder, max_steps=30)), {8, 9, 10, 14, 15, 16})
    lines = shown_lines(run.step.positions([14, 15, 16]))
    with pytest.raises(
        InputError, match=rf"step 17: 3 steps in a row .* once already; .*{lines} of .*train\.jsonl"
    ):
        run.run()
    (state,) = [json.loads(p.read_bytes()) for p in (folder / "run").glob("last/training_state.json")]
    assert (state["steps_done"], state["rollbacks"]) == (12, 1)


def test_with_nothing_to_go_back_to_it_stops(folder: Path) -> None:
    with pytest.raises(InputError, match=r"step 3: .*no checkpoint to go back to; lower --learning_rate"):
        poison(trainer(config(folder)), {0, 1, 2}).run()
    assert checkpoint.list_checkpoints(folder / "run") == []


@pytest.mark.parametrize("where", ["weights", "optimizer"])
def test_weights_that_are_not_finite_are_never_saved(folder: Path, where: str) -> None:
    run = trainer(config(folder, eval_steps=3))

    def spoil(done: int) -> None:
        if done == 6 and not run.progress.rollbacks:
            parameter = next(run.model.parameters())
            state: Any = run.step.optimizers[0].state[parameter]["exp_avg_sq"]
            (parameter.data if where == "weights" else state)[0] = math.inf

    after_updates(run, spoil)
    run.run()
    assert (run.progress.rollbacks, run.progress.skipped) == (1, [[4, 6]])
    (event,) = [line for line in metrics(folder / "run") if line.get("event") == "rollback"]
    assert "holds numbers that are not finite" in event["reason"]
    assert [line["step"] for line in metrics(folder / "run") if "val_loss" in line] == [3, 6, 9, 12]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_validation_loss_that_is_not_finite_goes_back(folder: Path, value: float) -> None:
    """If finite weights give outputs that are not finite, they are not saved as a checkpoint."""
    run = trainer(config(folder, eval_steps=3))
    evaluate = run.evaluate

    def spoiled() -> LossReport:
        report = evaluate()
        assert isinstance(report, LossReport)
        if run.progress.steps_done == 6 and not run.progress.rollbacks:
            report.all.nll = report.answer.nll = value
        return report

    run.evaluate = spoiled  # type: ignore[method-assign]
    run.run()
    assert (run.progress.rollbacks, run.progress.skipped) == (1, [[4, 6]])
    lines = metrics(folder / "run")
    (event,) = [line for line in lines if line.get("event") == "rollback"]
    assert (event["step"], event["to_step"]) == (6, 3)
    assert "validation loss is not a finite number" in event["reason"]
    losses = [(line["step"], line["val_loss"] is None) for line in lines if "val_loss" in line]
    assert losses == [(3, False), (6, True), (6, False), (9, False), (12, False)]


def test_a_second_validation_loss_that_is_not_finite_ends_the_run(folder: Path) -> None:
    run = trainer(config(folder, eval_steps=3))
    evaluate = run.evaluate

    def spoiled() -> LossReport:
        report = evaluate()
        assert isinstance(report, LossReport)
        if run.progress.steps_done > 3:
            report.all.nll = report.answer.nll = math.nan
        return report

    run.evaluate = spoiled  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"step 6: the validation loss .* once already; lower --learning_ra"):
        run.run()
    (state,) = [json.loads(p.read_bytes()) for p in (folder / "run").glob("last/training_state.json")]
    assert (state["steps_done"], state["rollbacks"]) == (6, 1)


def test_a_sample_that_cannot_be_written_ends_no_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> str:
        raise ValueError("no such token")

    monkeypatch.setattr(RunData, "sample", fail)
    assert trainer(config(folder)).run()["steps"] == 12
    assert "no sample: no such token" in capsys.readouterr().out


def test_a_spike_is_named(folder: Path) -> None:
    run = poison(trainer(config(folder, max_steps=24, dropout=0.0)), {20}, factor=9.0)
    lines = run.step.positions([20])
    run.run()
    (event,) = [line for line in metrics(folder / "run") if line.get("event") == "spike"]
    assert (event["step"], event["lines"]) == (21, lines)


def test_a_steady_loss_has_no_spikes_and_one_spike_hides_no_other() -> None:
    noise = torch.Generator().manual_seed(0)
    losses = (3 + 0.1 * torch.randn(400, generator=noise)).tolist()
    above = [x for n, x in enumerate(losses) if x > spike_threshold(losses[max(0, n - 64) : n])]
    assert above == []
    usual = losses[:60]
    # 6 sigma of 0.1 above 3.153, which one in 16 exceeds; the median distance of 60 values is right to
    # a fifth, that bound to half a sigma
    assert 3.153 + 0.48 - 0.05 < spike_threshold(usual) < 3.153 + 0.72 + 0.05
    # two more at the top: the bound moves from the 4th of 60 to the 2nd, which is about a sigma higher
    assert 0 <= spike_threshold([*usual, 100.0, 1e6]) - spike_threshold(usual) < 0.1


def test_a_hard_batch_that_comes_each_time_is_no_spike() -> None:
    """One in 10 batches has twice the loss of the others. As this is usual, it is no spike."""
    losses = [2.0 + 0.01 * (n % 7) if n % 10 == 5 else 1.0 + 0.1 * (n % 7) / 7 for n in range(200)]
    assert not [n for n, x in enumerate(losses) if x > spike_threshold(losses[max(0, n - 64) : n]) and n > 30]
    assert spike_threshold(losses[-64:]) < 4.0


def test_the_first_tensor_that_is_not_finite() -> None:
    good = {"a": torch.ones(3), "step": torch.tensor(7)}
    assert first_non_finite(good) == ""
    assert first_non_finite({**good, "b": torch.tensor([1.0, math.inf]), "c": torch.tensor(math.nan)}) == "b"


def test_skipped_windows_join() -> None:
    progress = Progress()
    for first, last in ((3, 3), (5, 5), (6, 6), (5, 9), (20, 20)):
        progress.skip(first, last)
    assert progress.skipped == [[3, 3], [5, 9], [20, 20]]
    again = Progress()
    again.load(json.loads(json.dumps(progress.as_dict())))
    assert again == progress
