"""Each benchmark runs at toy size and reports its measurements. No absolute time is asserted."""

import io
import json
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import context, look, peft_speed, tables
from benchmarks.doctor_runs import CASES
from minigpt.diagnosis.findings import WORDS
from minigpt.evaluation.harness import IS_INSTALLED
from minigpt.generation import native
from minigpt.model import GPTConfig
from tests import prepared
from tests.commands import run_here
from tests.marks import compiled

ROOT = Path(__file__).parents[1]


def test_chinese_qa(tmp_path: Path) -> None:
    lines = (ROOT / "data" / "data.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "qa.jsonl").write_text("".join(lines[:3000]), encoding="utf-8")
    command = [sys.executable, "benchmarks/chinese_qa.py", "--data", str(tmp_path / "qa.jsonl")]
    command += ["--toy", "--threads", "1", "--seeds", "1", "2", "--output", str(tmp_path / "r.json")]
    result = run_here(command)
    assert result.returncode == 0, result.stderr
    numbers = json.loads(result.stdout.splitlines()[-1])
    assert numbers == json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    rows = numbers["rows"]
    assert [row["arm"] for row in rows] == [
        *("qa-cpu, 0.2 s", "qa-cpu, 1 s", "qa-cpu --n_embd 48, 0.5 s"),
        *("document", "document", "document"),
    ]
    assert all(row["answer_loss"] > 0 and row["seconds"] >= row["budget"] - 0.05 for row in rows)  # rounded
    of = {(one["arm"], one["seconds"]): one["loss"]["median"] for one in numbers["summary"]}
    assert of["qa-cpu", 1.0] < of["document", 1.0]
    assert numbers["reached"] == 1
    assert numbers["ratio"]["median"] > 0


def test_families(tmp_path: Path) -> None:
    lines = (ROOT / "data" / "data.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "qa.jsonl").write_text("".join(lines[:200]), encoding="utf-8")
    command = [sys.executable, "benchmarks/families.py", "--data", str(tmp_path / "qa.jsonl")]
    command += ["--budgets", "0.1", "0.2", "--slice", "0.1", "--threads", "1", "--seeds", "1", "2"]
    command += ["--n_embd", "128", "--num_key_value_heads", "2", "--output", str(tmp_path / "r.json")]
    result = run_here(command)
    assert result.returncode == 0, result.stderr
    numbers = json.loads(result.stdout.splitlines()[-1])
    assert numbers == json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    gpt, qwen3 = numbers["parameters"]["gpt"], numbers["parameters"]["qwen3"]
    assert abs(gpt - qwen3) <= 0.01 * gpt
    rows = numbers["rows"]
    assert [(row["seed"], row["budget"], row["family"]) for row in rows] == [
        (seed, budget, family) for seed in (1, 2) for budget in (0.1, 0.2) for family in ("gpt", "qwen3")
    ]
    assert all(row["answer_loss"] > 0 and row["seconds"] >= row["budget"] for row in rows)
    for mean in numbers["means"]:
        of_gpt = [r["answer_loss"] for r in rows if r["family"] == "gpt" and r["budget"] == mean["seconds"]]
        assert abs(mean["gpt"] - sum(of_gpt) / 2) < 1e-4


def test_reference_speed() -> None:
    # in this process: the cache must pay even at toy size, where it computes some fifty times less
    module = runpy.run_path(str(ROOT / "benchmarks" / "reference_speed.py"))
    result = module["measure"]("toy", prompt=8, tokens=100, rounds=2)
    assert result["ratio"] > 1
    command = [sys.executable, "benchmarks/reference_speed.py", "--toy", "--tokens", "5", "--rounds", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout.splitlines()[-1])
    assert (numbers["tokens"], numbers["rounds"], numbers["threads"]) == (5, 1, "2")


def test_equality() -> None:
    command = [sys.executable, "benchmarks/equality.py", "--streamed", "20", "--batched", "20"]
    command += ["--speculative", "10"]
    done = run_here(command)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [(row["trials"], row["different"]) for row in rows] == [(20, 0)] * 3 + [(10, 0)] * 2
    assert rows[0]["with_multi_byte_characters"] > 5
    assert all(0 < row["accepted"] < row["drafted"] for row in rows[3:])


@pytest.mark.skipif(
    not IS_INSTALLED, reason="lm-evaluation-harness is not installed: pip install 'minigpt[evaluate]'"
)
def test_evaluation(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/evaluation.py", "--toy", "--threads", "1", "--questions", "8"]
    command += ["--output", str(tmp_path / "r.json")]
    done = run_here(command)
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = json.loads(done.stdout.splitlines()[-1])
    assert numbers == json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    rows = {(row["set"], row["arm"]): row for row in numbers["rows"]}
    assert len(rows) == 9
    for (_, arm), row in rows.items():
        assert row["questions_per_second"] > 0
        if arm == "minigpt float32":
            assert row["largest_difference"] < 1e-4
            assert row["other_choices"] == 0


class Ended:
    """In the place of subprocess.Popen: an arm that has had all its turns, in this process."""

    def __init__(self, command: list[str], **_: Any) -> None:
        rounds = int(command[command.index("--rounds") + 1])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", io.StringIO("turn\n" * rounds + "end\n"))
            done = run_here(command)
        assert done.returncode == 0, done.stderr
        self.stdin, self.stdout = io.StringIO(), io.StringIO(done.stdout)

    def wait(self) -> None: ...

    kill = wait


def test_peft_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("transformers", "accelerate", "peft"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install {package}")
    monkeypatch.setattr(peft_speed, "subprocess", SimpleNamespace(Popen=Ended, PIPE=subprocess.PIPE))
    flags = ["--toy", "--threads", "1", "--methods", "lora", "--steps", "1", "--output"]
    monkeypatch.setattr(sys, "argv", ["peft_speed.py", *flags, str(tmp_path / "r.json")])
    peft_speed.main()
    done = capsys.readouterr().out
    numbers = json.loads(done.splitlines()[-1])
    assert numbers == json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    theirs, ours = numbers["rows"]
    assert (theirs["arm"], ours["arm"]) == ("transformers", "minigpt")
    # the same adapter: r (inputs + outputs) of four layers in two blocks of 32 channels
    assert theirs["trained"] == ours["trained"] == 2 * 8 * (32 + 96 + 32 + 32 + 32 + 128 + 128 + 32)
    for row in numbers["rows"]:
        total = row["total"]
        assert total["pairs"] == numbers["batch_size"] * numbers["rounds"] * numbers["steps"]
        assert 0 < total["tokens"] <= total["places"]
        assert row["mib"] > 100
    assert ours["ratio"]["median"] > 0
    columns, rows = tables.peft_speed(numbers)
    assert [len(row) for row in rows] == [len(columns)] * 2
    assert tables.newest(tmp_path, "peft_speed", {"shape": "gpt2"}) is None, "a toy's speed is no result"


def test_masked_lm(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/masked_lm.py", "--toy", "--threads", "1"]
    command += ["--output", str(tmp_path / "r.json")]
    done = run_here(command)
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = json.loads(done.stdout.splitlines()[-1])
    assert numbers == json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    causal, hidden, longer = numbers["training"]
    assert causal["tokens"] == hidden["tokens"] < longer["tokens"]
    assert causal["positions"] == causal["tokens"], "every token is a target"
    assert hidden["positions"] / hidden["tokens"] == pytest.approx(0.15, abs=0.01)  # ten of 64 in a row
    assert longer["seconds"] >= hidden["seconds"]
    for name in ("masked_training", "masked_one", "masked_two", "masked_span"):
        columns, rows = getattr(tables, name)(numbers)
        assert {len(row) for row in rows} == {len(columns)}
    assert numbers["span"][-1]["known_pairs"] > 0.9  # pairs of held-out lines are mostly known ones


def test_doctor(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/doctor.py", "--small", "--output", str(tmp_path / "r.json")]
    done = run_here(command)
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = json.loads(done.stdout.splitlines()[-1])
    assert numbers == json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert {row["case"]: row["named"] for row in numbers["rows"]} == {
        "rate_far_too_low": "rate_too_low",
        "too_short": "too_short",
        "answers_shuffled": "answers_unrelated",
        "two_pairs": "too_few_to_learn",
        "healthy_gpt": "",
        "healthy_qwen3_muon": "",
    }
    assert tables.newest(tmp_path, "doctor", {"small": False}) is None


def test_the_doctor_s_runs_are_thirty_faults_and_fifteen_healthy_ones() -> None:
    assert [sum(bool(one.expected) is faulty for one in CASES) for faulty in (True, False)] == [30, 15]
    assert len({one.words for one in CASES} | {one.chinese for one in CASES}) == 90
    assert {code for one in CASES for code in one.expected} <= WORDS.keys()


def test_soak() -> None:
    command = ("benchmarks/soak.py", "--minutes", "0.025", "--clients", "3", "--interval", "0.3")
    done = prepared.run(*command)
    numbers = json.loads(done.stdout.splitlines()[-1])
    # A second and a half are too short for the process's size to have settled: not asserted here.
    others = {promise: held for promise, held in numbers["held"].items() if promise != "no more memory"}
    assert all(others.values()), (others, numbers["errors"])
    assert done.returncode == (not numbers["held"]["no more memory"])
    requests = numbers["requests"]
    assert min(requests[name] for name in ("finished", "cancelled", "compared")) > 0
    assert numbers["tokens"]["reused"] > 0


def test_generate_gpu_through_the_script_that_runs_all(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/on_a_gpu.py", "--output", str(tmp_path / "new"), "--toy"]
    done = subprocess.run(
        [*command, "--only", "generate"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])["done"]["generate_gpu"]
    numbers = json.loads((tmp_path / "new" / outcome["file"]).read_text(encoding="utf-8"))
    assert numbers["toy"]
    assert {row["kind"] for row in numbers["single"]} >= {"graph", "neither"}
    assert [row["batch"] for row in numbers["sweep"]] == [1, 2, 4]
    for row in [*numbers["single"], *numbers["sweep"]]:
        assert 0 < row["first_token"] < row["seconds"]
        assert min(row["per_token"], row["bytes"], row["flops"]) > 0
    mixed = numbers["mixed"]
    assert mixed["requests"] == 8
    # of every token that was written: not more in a second than in all the time
    assert abs(mixed["tokens_per_second"] * mixed["seconds"] / mixed["written"] - 1) < 0.5


def test_the_bytes_and_products_of_a_step_are_those_of_the_formula() -> None:
    module = runpy.run_path(str(ROOT / "benchmarks" / "generate_gpu.py"))
    config = module["TOY"]
    C, D, wide, V = config.hidden_size, config.head_dim, config.intermediate_size, config.vocab_size
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    block = C * heads * D * 2 + C * shared * D * 2 + 3 * C * wide
    count = config.num_hidden_layers * block + V * C
    model = module["build"](config, "float32", module["torch"].device("cpu"))
    size, found = module["weights_of"](model)
    assert found == count
    norms = config.num_hidden_layers * (2 * C + 2 * D) + C
    assert size == 4 * (count + norms)
    int8 = module["build"](config, "int8", module["torch"].device("cpu"))
    assert count < module["weights_of"](int8)[0] < 1.2 * count  # one byte each, scales and norms besides


@compiled
def test_generate_with_and_without_the_native_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(command: Sequence[object], **options: Any) -> subprocess.CompletedProcess[str]:
        with pytest.MonkeyPatch.context() as patch:  # an arm without the step takes it from its process
            patch.setattr(native, "library", native.library)
            return run_here(command, **options)

    monkeypatch.setattr(subprocess, "run", measured)
    command = [sys.executable, "benchmarks/generate.py", "--shape", "toy", "--native_step", "--rounds", "1"]
    command += ["--threads", "1", "--output", str(tmp_path / "r.json")]
    done = run_here(command)
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout.splitlines()[-1])
    assert numbers == json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert tables.newest(tmp_path, "native_step", {"shape": "toy"}) is None, "a toy's speed is no result"
    columns, rows = tables.native_step(numbers)
    assert columns[:3] == ["arm", "tokens/s", "of the speed with it"]
    assert [row[0] for row in rows] == [
        *("minigpt float32", "minigpt float32 without the native step"),
        *("minigpt int8", "minigpt int8 without the native step"),
    ]
    # one round: the median is the quotient of the two speeds, which depends on the machine
    speeds = [row["decode"]["median"] for row in numbers["rows"]]
    shares = [row.get("share", {}).get("median") for row in numbers["rows"]]
    assert shares[0::2] == [None, None]
    assert shares[1::2] == pytest.approx([speeds[1] / speeds[0], speeds[3] / speeds[2]], rel=0.01)
    assert [row[2].split()[0] for row in rows[1::2]] == [f"{share:.2g}" for share in shares[1::2]]


@compiled
def test_context(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/context.py", "--toy", "--threads", "1", "--rounds", "2"]
    command += ["--output", str(tmp_path / "r.json")]
    done = run_here(command)
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout.splitlines()[-1])
    assert numbers == json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert [row["precision"] for row in numbers["rows"]] == ["float32", "int8"]
    for row in numbers["rows"]:
        assert [one["length"] for one in row["lengths"]] == list(range(7, 128, 8))
        assert row["bytes_of_token"] == 2 * 2 * 64 * 4  # keys and values, two layers, 64 floats
        assert row["memory"]["least"] > 0


def test_look(tmp_path: Path) -> None:
    commands = look.documented()
    views = {command.split()[2] for command in commands if command.startswith("minigpt look")}
    assert views >= {"tokens", "batch", "loss", "next", "attention", "lens", "neighbours", "cache", "weights"}
    command = look.large_model(tmp_path, GPTConfig(8, 4, 1, 0.0, 1024, 600, True, "tanh"))
    row = look.measured(command, tmp_path, 1)  # measured() raises an error if the command fails
    assert min(row.values()) > 0
    with pytest.raises(SystemExit, match=r"look nothing: exit code 2: .*nothing"):
        look.measured("minigpt look nothing", tmp_path, 1)


def test_a_line_through_times() -> None:
    line = context.fit([(0, 5.0), (100, 5.5), (300, 6.5)], 20_000)
    assert line["milliseconds"] == pytest.approx(5.0)
    assert line["microseconds"] == pytest.approx(5.0)
    assert line["r_squared"] == pytest.approx(1.0)
    assert line["gigabytes"] == pytest.approx(4.0)  # 20 kB in 5 microseconds
