"""TensorBoard and Weights & Biases: report_to chooses them, a resume continues, errors stop no training."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from minigpt.training.metrics import Metrics
from minigpt.training.trackers import WANDB_ID, ReportTo, Trackers

needs_wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="wandb is not installed (pip install 'minigpt[wandb]')"
)


class Run:
    """The used part of wandb.init's result. It records its calls."""

    def __init__(self, id: str, fails_at: str = "") -> None:
        self.id, self.fails_at = id, fails_at
        self.logged: list[dict[str, float]] = []
        self.axis: list[tuple[str, str]] = []
        self.finished = 0

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axis.append((name, step_metric))

    def log(self, values: dict[str, float]) -> None:
        if self.fails_at == "log":
            raise ConnectionError("no route\nto host")
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1
        if self.fails_at == "finish":
            raise RuntimeError("cannot finish")


class FakeWandb(ModuleType):
    """Replaces the package, without a process and a network."""

    def __init__(self, fails_at: str = "") -> None:
        super().__init__("wandb")
        self.fails_at = fails_at
        self.inits: list[dict[str, Any]] = []
        self.runs: list[Run] = []

    @staticmethod
    def Settings(**values: str) -> dict[str, str]:  # noqa: N802 -- wandb's name
        return values

    def init(self, **options: Any) -> Run:
        self.inits.append(options)
        if self.fails_at == "init":
            raise ValueError("api_key not configured")
        self.runs.append(Run(options["id"] or f"run{len(self.inits)}", self.fails_at))
        return self.runs[-1]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> FakeWandb:
    fake = FakeWandb(getattr(request, "param", ""))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_PROJECT", "WANDB_DIR", "WANDB_RUN_ID", "WANDB_CONSOLE"):
        monkeypatch.delenv(name, raising=False)
    return fake


def write_two(
    output: Path, report_to: ReportTo, steps_done: int = 0, **settings: Any
) -> list[dict[str, Any]]:
    """Write two lines with Metrics. Return the lines of metrics.jsonl."""
    with Metrics(output, steps_done, report_to, settings) as metrics:
        metrics.write(steps_done + 1, train_loss=2.0, seconds=1.0)
        metrics.write(steps_done + 2, val_loss=1.0)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()]


def test_the_numbers_reach_wandb_with_our_step_as_axis(tmp_path: Path, wandb: FakeWandb) -> None:
    lines = write_two(tmp_path, "wandb", learning_rate=0.1)
    (run,) = wandb.runs
    assert run.logged == lines
    assert run.axis == [("*", "step")]
    assert run.finished == 1
    (options,) = wandb.inits
    assert options["config"] == {"learning_rate": 0.1}
    assert (options["project"], options["dir"], options["resume"]) == ("minigpt", tmp_path, "allow")
    assert options["settings"] == {"console": "off"}, "answers, which are printed, stay here"
    assert (tmp_path / WANDB_ID).read_text("utf-8") == "run1\n"
    assert not (tmp_path / "tensorboard").exists()


def test_wandb_s_own_variables_decide(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("PROJECT", "mine"), ("DIR", "there"), ("RUN_ID", "seven"), ("CONSOLE", "wrap")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    write_two(tmp_path, "wandb")
    (options,) = wandb.inits
    assert (options["project"], options["dir"], options["id"]) == ("mine", "there", "seven")
    assert options["settings"] == {"console": "wrap"}


def test_a_resumed_run_goes_on_in_the_same_one_and_a_new_one_does_not(
    tmp_path: Path, wandb: FakeWandb
) -> None:
    write_two(tmp_path, "wandb")
    write_two(tmp_path, "wandb", steps_done=1)  # step 2 again, then 3
    assert [options["id"] for options in wandb.inits] == [None, "run1"]
    assert [line["step"] for run in wandb.runs for line in run.logged] == [1, 2, 2, 3]
    write_two(tmp_path, "wandb")  # from the start: another run, whose id is kept from now on
    assert wandb.inits[2]["id"] is None
    assert (tmp_path / WANDB_ID).read_text("utf-8") == "run3\n"


@pytest.mark.parametrize("wandb", ["init", "log", "finish"], indirect=True)
def test_a_failure_is_one_warning_and_no_line_is_lost(
    tmp_path: Path, wandb: FakeWandb, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(write_two(tmp_path, "wandb")) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == err.count("warning: wandb failed") == 1


@pytest.mark.parametrize("report_to", ["wandb", "all", "tensorboard"])
def test_what_is_not_installed_is_one_warning(
    tmp_path: Path, report_to: ReportTo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not there
    assert len(write_two(tmp_path, report_to)) == 2
    names = ["tensorboard", "wandb"] if report_to == "all" else [report_to]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(names)
    for name, line in zip(names, lines):
        assert line.startswith(f"warning: {name} is not installed"), line
        assert f"minigpt[{name}]" in line


def test_none_is_metrics_alone(tmp_path: Path, wandb: FakeWandb, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(write_two(tmp_path, "none")) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (wandb.inits, capsys.readouterr()) == ([], ("", ""))


def test_only_finite_numbers_are_curves(tmp_path: Path, wandb: FakeWandb) -> None:
    with Trackers(tmp_path, 0, "wandb") as trackers:
        trackers.write(1, {"a": 1.5, "b": float("nan"), "c": "text", "d": [1], "e": True, "f": None, "g": 2})
        trackers.write(2, {"event": "spike", "loss": 9.0})
    assert wandb.runs[0].logged == [{"step": 1, "a": 1.5, "g": 2}]


def test_tensorboard_is_what_happens_without_a_word(tmp_path: Path, wandb: FakeWandb) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    with Metrics(tmp_path, 0) as metrics:
        metrics.write(1, train_loss=2.0)
    assert list((tmp_path / "tensorboard").glob("events.*"))
    assert wandb.inits == []


@needs_wandb
def test_wandb_itself_offline_twice_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_PROJECT", "WANDB_DIR", "WANDB_RUN_ID", "WANDB_CONSOLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # wandb puts its own there
    write_two(tmp_path, "wandb")
    first = (tmp_path / WANDB_ID).read_text("utf-8").strip()
    write_two(tmp_path, "wandb", steps_done=2)
    assert (tmp_path / WANDB_ID).read_text("utf-8").strip() == first
    written = [path.name for path in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")]
    assert set(written) == {f"run-{first}.wandb"}
    importlib.import_module("wandb").teardown()  # its threads and its process
