"""The benchmarks of training run at toy size, also without their peers, and report their measurements.

No absolute time is asserted. A stand-in with the same interface replaces nanoGPT: a script that sleeps, whose
model is a table of pairs of characters.
"""

import importlib.util
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    arithmetic,
    chinese_qa,
    classification,
    fine_tuning,
    grpo,
    memory,
    methods,
    nanogpt,
    preferences,
    shakespeare,
    tables,
    turns,
)
from benchmarks.sizes import config_of, write_text
from minigpt.training import estimate as report
from minigpt.training.loop import Trainer
from minigpt.training.run_data import read_data
from tests.commands import run_here

ROOT = Path(__file__).parents[1]

TRAIN = """
import sys, time
import contextlib
import numpy as np
import torch
from model import Table

known = dict(argument[2:].split("=") for argument in sys.argv[1:] if "=" in argument)
max_iters, block_size, device = int(known["max_iters"]), 64, "cpu"
ctx = contextlib.nullcontext()
torch.manual_seed(1337)
ids = torch.from_numpy(np.fromfile("data/shakespeare_char/train.bin", dtype=np.uint16).astype(np.int64))
raw_model = Table(int(ids.max()) + 1)
print("step 0: train loss 1, val loss 1")
for iter_num in range(max_iters + 1):
    time.sleep(0.05)
    print(f"iter {iter_num}: loss 1, time 1ms")
"""
MODEL = """
from torch import nn
from torch.nn import functional as F

class Table(nn.Module):
    def __init__(self, V):
        super().__init__()
        self.scores = nn.Embedding(V, V)
    def forward(self, ids, targets):
        scores = self.scores(ids)
        return scores, F.cross_entropy(scores.flatten(0, 1), targets.flatten())
"""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    words = ["the", "king", "and", "his", "men", "went", "up", "a", "hill", "down", "again", "to", "sea"]
    drawn = np.random.default_rng(0).choice(words, 1500)
    path = tmp_path / "input.txt"
    path.write_text(" ".join(drawn), encoding="utf-8")
    return path


def checkout(folder: Path, train: str = TRAIN) -> Path:
    (folder / "config").mkdir(parents=True)
    (folder / "train.py").write_text(train)
    (folder / "model.py").write_text(MODEL)
    for name in ("configurator.py", "config/train_shakespeare_char.py"):
        (folder / name).write_text("")
    return folder


def run(
    module: Any, arguments: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict[str, Any]:
    """Run a benchmark's `main` in this process. Return its last line."""
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments), "--threads", "1"])
    module.main()
    numbers: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return numbers


# -- Shakespeare ---------------------------------------------------------------------------------------------


def test_shakespeare(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peer = checkout(tmp_path / "peer")
    before = sorted(path.name for path in peer.rglob("*"))
    output = tmp_path / "r.json"
    arguments = ["--text", text, "--nanogpt", peer, "--toy", "--target", "3.5", "--output", output]
    numbers = run(shakespeare, arguments, monkeypatch, capsys)
    assert numbers == json.loads(output.read_text(encoding="utf-8"))
    assert sorted(path.name for path in peer.rglob("*")) == before, "the user's checkout stays as it is"
    assert numbers["left_out"] == []
    theirs = [row for row in numbers["rows"] if row["arm"] == "nanoGPT"]
    assert [row["iterations"] for row in theirs] == [21, 41, 61]
    # The stand-in's 61 iterations sleep and learn nothing, so minigpt reaches a lower loss earlier.
    assert theirs[-1]["seconds"] >= 61 * 0.05
    assert len({row["loss"] for row in theirs}) == 1
    assert numbers["final_ratio"]["median"] > 1
    ours = {row["arm"]: row for row in numbers["rows"] if row["arm"] != "nanoGPT"}
    assert list(ours) == ["minigpt, 0.1 s", "minigpt, 0.2 s", "minigpt, 0.4 s"]
    assert ours["minigpt, 0.4 s"]["loss"] < theirs[-1]["loss"]


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        (None, "no --nanogpt DIR was given"),
        ("wrong", "train.py does not exist"),
        ("broken", "train.py ended with an error: ValueError: no such thing"),
    ],
)
def test_a_peer_that_is_missing_is_named_and_the_rest_runs(
    folder: str | None, said: str, text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    checkout(tmp_path / "broken", "raise ValueError('no such thing')")
    given = ["--nanogpt", tmp_path / folder] if folder else []
    numbers = run(shakespeare, ["--text", text, *given, "--toy"], monkeypatch, capsys)
    assert len(numbers["left_out"]) == 1
    assert said in numbers["left_out"][0]
    assert [row["arm"] for row in numbers["summary"]] == ["minigpt"]
    assert numbers["ratio"] is None
    assert len(numbers["rows"]) == 3


def test_the_loss_over_windows_is_that_of_each_token_once() -> None:
    torch.manual_seed(0)
    scores = torch.randn(7, 7)
    ids = np.random.default_rng(0).integers(7, size=75)
    expected = float(cross_entropy(scores[ids[:-1]].double(), torch.from_numpy(ids[1:])))
    for T in (1, 10, 37, 74, 200):  # float32 sums of single tokens: 75 roundings of 1e-7
        assert nanogpt.loss_over(lambda x: scores[x], ids, T) == pytest.approx(expected, rel=1e-5)


def test_times_are_read_off_a_curve() -> None:
    curve = [(10.0, 3.0), (20.0, 2.0), (30.0, 2.5), (40.0, 1.0)]
    assert turns.seconds_to(2.5, curve) == 15
    assert turns.seconds_to(1.75, curve) == 35
    assert turns.seconds_to(0.5, curve) is None
    assert turns.seconds_to(3.5, curve) == 10
    assert turns.first_to_reach(2.0, [(5.0, 2.1), (9.0, 1.0), (7.0, 2.0)]) == 7
    assert turns.first_to_reach(0.5, [(5.0, 2.1)]) is None
    assert shakespeare.loss_at(15, curve) == 2.5
    assert (shakespeare.loss_at(1, curve), shakespeare.loss_at(99, curve)) == (3.0, 1.0)


# -- Chinese questions: one run of the peer for several seeds ------------------------------------------------


def test_the_peer_s_only_run_serves_all_seeds() -> None:
    def row(arm: str, seed: int, budget: float, loss: float) -> dict[str, Any]:
        return {"arm": arm, "seed": seed, "budget": budget, "seconds": budget, "answer_loss": loss}

    rows = [row("document", 1, 10.0, 4.0), row("document", 1, 100.0, 3.0)]
    rows += [row("qa-cpu, 10 s", 1, 10.0, 2.9), row("qa-cpu, 20 s", 1, 20.0, 2.0)]
    rows += [row("qa-cpu, 10 s", 2, 10.0, 3.1), row("qa-cpu, 20 s", 2, 20.0, 3.0)]

    class Options:
        budgets, peer_seconds, seeds = (10.0, 20.0), 100.0, (1, 2)

    found = chinese_qa.summary(rows, Options)  # type: ignore[arg-type]
    assert found["ratio"] == {"median": 7.5, "least": 5.0, "most": 10.0}
    assert found["reached"] == 2
    assert [(one["arm"], one["seconds"], one["seeds"]) for one in found["summary"]] == [
        ("document", 10.0, 1), ("qa-cpu", 10.0, 2), ("qa-cpu", 20.0, 2), ("document", 100.0, 1)
    ]  # fmt: skip


# -- arithmetic and memory -----------------------------------------------------------------------------------


def test_the_formula_is_what_torch_counts(tmp_path: Path) -> None:
    """torch counts forward and backward of all products, with attention in steps, as in the formula."""
    config = config_of(
        "toy", write_text(tmp_path, 100), block_size=16, batch_size=4, output=tmp_path, threads=1
    )
    trainer = Trainer(config, read_data(config))
    batch = trainer.step.batches(0)[0]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trainer.step.summed_loss(trainer.step.to_device(batch)).backward()  # type: ignore[no-untyped-call]
    B, T = batch.input_ids.shape
    assert counter.get_total_flops() == report.batch_flops(trainer, B, T, 1.0)
    per_token = 6 * arithmetic.multiplying(trainer) + 12 * 2 * 32 * 16
    assert report.batch_flops(trainer, 1, 1, 1.0) == per_token - 12 * 2 * 32 * 15
    assert arithmetic.attention_share(trainer, 16) == 12 * 2 * 32 * 16 / per_token


def test_arithmetic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = run(arithmetic, ["--toy", "--output", tmp_path / "r.json"], monkeypatch, capsys)
    assert run(arithmetic, ["--rows", tmp_path / "r.json"], monkeypatch, capsys) == numbers
    rows = numbers["rows"]
    assert [(row["size"], row["T"]) for row in rows] == [("toy", 8), ("toy", 16), ("toy", 64)]
    assert all(0 < row["causal"]["median"] < row["ratio"]["median"] for row in rows)
    # products of matrices 32 wide cannot come near one of 128 x 128, on any machine
    assert all(row["ratio"]["median"] < 1 for row in rows)


def test_arithmetic_in_16_bits_is_timed_beside_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--toy", "--lengths", "16", "--precision", "bfloat16", "--output", tmp_path / "r.json"]
    numbers = run(arithmetic, flags, monkeypatch, capsys)
    assert numbers["precision"] == "bfloat16"
    columns, rows = tables.arithmetic_in_16_bits(numbers)
    assert [len(row) for row in rows] == [len(columns)] * len(numbers["rows"])
    for row, shown in zip(numbers["rows"], rows, strict=True):
        assert 0 < row["times"]["least"] <= row["times"]["median"] <= row["times"]["most"]
        assert shown[-1].startswith(f"{row['times']['median']:.4g} (")
    (tmp_path / "r.json").write_text(json.dumps({**numbers, "toy": False}), encoding="utf-8")
    assert tables.newest(tmp_path, *tables.TABLES["arithmetic-bfloat16"][:2]) is not None
    assert tables.newest(tmp_path, *tables.TABLES["arithmetic"][:2]) is None, "float32's table is another"


def test_a_line_is_fitted_to_what_lies_on_one() -> None:
    rows = [
        {"multiplying": n, "layers_times_width": w, "T": T,
         "seconds_per_token": {"median": 3e-6 + 5e-11 * n + 2e-10 * w * T}}
        for n, w in ((10**6, 512), (10**7, 2304), (10**8, 9216)) for T in (64, 1024)
    ]  # fmt: skip
    found = arithmetic.fit(rows)
    assert found["constant"] == pytest.approx(3e-6)
    assert found["per_weight"] == pytest.approx(5e-11)
    assert found["per_attention"] == pytest.approx(2e-10)
    assert found["r_squared"] == pytest.approx(1)
    assert found["gflops_of_weights"] == pytest.approx(6 / 5e-11 / 1e9)


def test_memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    start = memory.run

    def some_here(arguments: list[str], threads: int) -> tuple[str, float]:
        if "--dry_run" not in arguments:
            return start(arguments, threads)
        return run_here([sys.executable, *arguments]).stdout, 0.0  # its memory is not asked for

    monkeypatch.setattr(memory, "run", some_here)
    (row,) = run(memory, ["--toy"], monkeypatch, capsys)["rows"]
    assert 0 < row["import"]["median"] < row["peak"]["median"]
    assert row["parts"] <= row["estimate"]
    assert abs(row["error"]) < 0.5


def test_a_run_that_fails_says_why() -> None:
    with pytest.raises(SystemExit, match=r"exit code 1(.|\n)*ZeroDivisionError"):
        memory.run(["-c", "1 / 0"], 1)


# -- transformers --------------------------------------------------------------------------------------------


def questions(folder: Path) -> Path:
    lines = (ROOT / "data" / "data.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "qa.jsonl").write_text("".join(lines[:150]), encoding="utf-8")
    return folder / "qa.jsonl"


def test_fine_tuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = run(fine_tuning, ["--data", questions(tmp_path), "--toy"], monkeypatch, capsys)
    arms = [one["arm"] for one in numbers["summary"]]
    if numbers["left_out"]:
        assert all(said.endswith("is not installed") for said in numbers["left_out"])
        assert fine_tuning.PEER not in arms
        return
    assert arms == ["minigpt, same steps", "minigpt, qa-cpu", "transformers"]
    start = {row["arm"]: row["answer_loss"] for row in numbers["rows"] if row["steps"] == 0}
    assert len({*start.values()}) == 1, "all begin with the same weights"
    ends = {one["arm"]: one["last_loss"]["median"] for one in numbers["summary"]}
    assert all(ends[arm] < start[arm] for arm in arms)
    steps = {row["arm"]: row["steps"] for row in numbers["rows"]}
    assert steps["minigpt, same steps"] == steps["transformers"]


def test_fine_tuning_without_its_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    gone = ("transformers", "accelerate")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else found(name))
    numbers = run(fine_tuning, ["--data", questions(tmp_path), "--toy"], monkeypatch, capsys)
    assert numbers["left_out"] == [f"transformers: {name} is not installed" for name in gone]
    assert [one["arm"] for one in numbers["summary"]] == ["minigpt, same steps", "minigpt, qa-cpu"]
    assert numbers["ratio"] == {}


def test_the_collator_pads_and_hides_what_is_no_answer() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = fine_tuning.padded(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_preferences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "--data",
        questions(tmp_path),
        "--toy",
        "--epochs_before",
        "0.2",
        "--epochs",
        "1",
        "--seeds",
        "1",
        "2",
    ]
    numbers = run(preferences, flags, monkeypatch, capsys)
    assert [one["seed"] for one in numbers["runs"]] == [1, 2]
    for one in numbers["runs"]:
        assert one["longer"] == 1.0  # each rejected answer is the beginning of the chosen one
        assert 0 < one["pairs"] < 24
        assert one["curve"][0]["val_chosen_loss"] == one["chosen_loss_before"]
        assert one["accuracy"] in [row["rewards/accuracies"] for row in one["curve"]]


# -- GPUs ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: it would be measured in full")
def test_training_gpu_without_one(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", run_here)
    command = [sys.executable, "benchmarks/training_gpu.py", "--text", str(text), "--only", "speed", "loss"]
    command += ["--nanogpt", str(tmp_path / "wrong")]
    done = run_here(command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no CUDA device: toy size\n")
    numbers = json.loads(done.stdout.splitlines()[-1])
    assert [said.split()[-3:] for said in numbers["left_out"]] == [["does", "not", "exist"]] * 2
    assert numbers["speed"][0]["tokens_per_second"]["median"] > 0
    assert numbers["speed"][0]["mfu"] is None
    losses = [row["loss"] for row in numbers["loss"]["rows"]]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


# -- the pages -----------------------------------------------------------------------------------------------


def test_the_pages_are_what_the_results_say() -> None:
    command = [sys.executable, "benchmarks/tables.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}run python benchmarks/tables.py"


def test_the_pages_of_a_language_have_every_table() -> None:
    for paths in tables.PAGES.values():
        lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
        found = [line[5:-4] for line in lines if line.startswith("<!--")]
        assert [name for name in found if name != "end"] == list(tables.TABLES)


def test_the_newest_result_is_shown_and_no_toy(tmp_path: Path) -> None:
    result = {
        "benchmark": "memory", "optimizer": "adamw", "date": "2030-01-02", "machine": "2 cores", "threads": 2,
        "versions": {"torch": "3"}, "toy": False, "rows": [{
            "size": "1M", "parameters": 1234567, "estimate": 1500, "error": -0.0123,
            "peak": {"median": 7, "least": 6, "most": 9}, "import": {"median": 5},
        }],
    }  # fmt: skip
    others = [{**result, "date": "2029-01-01", "rows": []}, {**result, "date": "2031-01-01", "toy": True}]
    for number, one in enumerate([result, *others, {"benchmark": "memory", "date": "2032-01-01"}]):
        (tmp_path / f"{number}.json").write_text(json.dumps(one))
    shown = tables.page("a\n<!-- memory -->\nold\n<!-- end -->\nz", "en", tmp_path)
    row = "| 1M | 1,234,567 | 7 (6 to 9) | 1,500 | -1.2% | 5 |"
    assert row in shown.splitlines()
    assert "2 cores, 2 threads, torch 3, 2030-01-02: `benchmarks/results/0.json`." in shown
    assert shown.startswith("a\n")
    assert shown.endswith("<!-- end -->\nz")
    assert "old" not in shown
    assert tables.page(shown, "en", tmp_path) == shown
    assert "| 7 (6 至 9) |" in tables.page(shown, "zh", tmp_path)
    assert "not yet measured" in tables.page(shown, "en", tmp_path / "nothing")
    with pytest.raises(SystemExit, match="no table 'else'"):
        tables.page("<!-- else -->\n<!-- end -->", "en", tmp_path)


def test_grpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--toy", "--seeds", "1", "--output", tmp_path / "r.json"]
    flags += ["--steps_before", 40, "--batch_size", 4, "--num_generations", 4]
    numbers = run(grpo, flags, monkeypatch, capsys)
    assert numbers == json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    (one,) = numbers["runs"]
    assert [step for step, _ in one["curve"]] == [0, 30]
    assert one["curve"][0][1] == one["exact_match_before"] <= 0.3
    assert one["curve"][-1][1] == one["exact_match"] == numbers["summary"]["exact_match"]["median"]
    assert one["seconds"] > 0
    assert tables.newest(tmp_path, "grpo", {"toy": False}) is None, "a toy's numbers are no result"


def test_classification(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", run_here)
    flags = ["--toy", "--threads", "1", "--output", str(tmp_path / "r.json")]
    numbers = run(classification, flags, monkeypatch, capsys)
    (one,) = numbers["results"]
    assert (one["set"], one["arm"], one["seed"], one["steps"]) == ("sms_spam", "scratch", 42, 20)
    assert 0 <= one["accuracy"] <= 1
    assert tables.newest(tmp_path, "classification", {"toy": False}) is None


def test_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(subprocess, "run", run_here)
    flags = ["--toy", "--threads", "1", "--seeds", "1", "--output", str(tmp_path / "r.json")]
    rows = run(methods, flags, monkeypatch, capsys)["summary"]
    assert [row["method"] for row in rows] == ["scratch", *methods.TOY_METHODS]
    trained = {row["method"]: row["trained"] for row in rows}
    assert trained["full"] == trained["scratch"]
    assert 0 < trained["LoRA, r 4"] < trained["full"] > trained["adapter, 32"] > 0
    assert all(row["loss"]["median"] > 0 and row["mib"] > 0 for row in rows)
    assert rows[1]["gain"] == 1.0


@pytest.mark.parametrize(
    "name",
    [
        *("shakespeare", "chinese_qa", "arithmetic", "memory", "fine_tuning", "training_gpu"),
        *("classification", "methods", "preferences", "grpo"),
    ],
)
def test_each_is_a_command_with_help(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="__main__")
    assert stop.value.code == 0
