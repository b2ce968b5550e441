"""Several processes: they compute the same losses, and signals, errors and dead processes reach all of them.

Processes are forks of one that has imported torch (tests/processes.py); torchrun starts them in one test.
"""

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import minigpt
from minigpt.data.batches import Batch
from minigpt.errors import InputError
from minigpt.storage.files import verify_manifest
from minigpt.training.config import TrainConfig, read_run
from minigpt.training.distributed import SINGLE_PROCESS, Processes, is_restarted, join_processes
from minigpt.training.parallel import Parallel, shard_batch
from tests.runs import config, given, metrics, paths, trainer, write_data

ROOT = Path(__file__).parents[1]
NO_CHANCE: dict[str, Any] = {"dropout": 0.0, "logging_steps": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tiny data set."""
    write_data(tmp_path)
    return tmp_path


class Ended(NamedTuple):
    """The exit codes of several processes, and the output of each (standard output and errors)."""

    codes: list[int]
    said: list[str]


class Launch(Protocol):
    """`launch(folder, 2, ["--output", ...], rank=1, what="SIGKILL", step=3)`."""

    def __call__(self, folder: Path, size: int, argv: Sequence[object], **job: Any) -> Ended: ...


# FSDP and --compile load these: every fork would anew.
SERVER = """
import torch.distributed.checkpoint.state_dict, torch.distributed.tensor.experimental, torch.export._trace
import sympy.combinatorics
from tests.processes import main
main()
"""


@pytest.fixture(scope="module")
def launch() -> Iterator[Launch]:
    """Return a function that runs `minigpt train` in several processes."""
    command = [sys.executable, "-c", SERVER]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as server:

        def start(folder: Path, size: int, argv: Sequence[object], **job: Any) -> Ended:
            assert server.stdin is not None
            assert server.stdout is not None
            log = folder / "log"
            whole = {"argv": list(map(str, argv)), "size": size, "log": str(log), **job}
            server.stdin.write(json.dumps(whole) + "\n")
            server.stdin.flush()
            codes = json.loads(server.stdout.readline())
            return Ended(codes, [Path(f"{log}-{rank}").read_text(encoding="utf-8") for rank in range(size)])

        yield start


@pytest.fixture(scope="module")
def straight(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that returns an undisturbed run with dropout: `straight(2, "fsdp")`."""

    @functools.cache
    def run(size: int, kind: str = "ddp") -> Path:
        folder = tmp_path_factory.mktemp("straight")
        write_data(folder)
        ended = launch(folder, size, flags(folder, "run", parallel=kind, dropout=0.1))
        assert ended.codes == [0] * size, ended.said
        return folder / "run"

    return run


def flags(folder: Path, output: str, **values: Any) -> list[str]:
    """Return the flags of a tiny run. The other options are those of `config(folder)`."""
    (folder / "plain.toml").touch()
    return given(folder, output=folder / output, recipe=folder / "plain.toml", **values)


def resume(folder: Path, output: str = "run") -> list[object]:
    """Return the flags that resume the run."""
    return ["--output", folder / output, "--resume"]


def losses(run: Path) -> list[float]:
    """Return the logged losses."""
    return [line["train_loss"] for line in metrics(run) if "train_loss" in line]


def same_tensors(a: Path, b: Path) -> bool:
    """Return True if two checkpoints are equal: weights, optimiser, the random state of each process."""
    names = sorted(path.name for path in a.glob("*.safetensors"))
    assert names == sorted(path.name for path in b.glob("*.safetensors"))
    pairs = [(load_file(a / name), load_file(b / name)) for name in names]
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in pairs)


# -- who gets what ------------------------------------------------------------------------------------------


def batch_of(rows: int) -> Batch:
    """Make a batch whose row i has i + 1 everywhere."""
    ids = torch.arange(1, rows + 1)[:, None].repeat(1, 5)
    mask = torch.ones_like(ids, dtype=torch.bool)
    return Batch(ids, ids, mask, mask, np.arange(rows))


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_row_is_in_one_shard_and_no_shard_is_empty(rows: int, size: int) -> None:
    parts = [shard_batch(batch_of(rows), Processes(rank, size)) for rank in range(size)]
    assert sorted(int(row) for part in parts for row in part.rows) == list(range(rows))
    counted = [int(i) for part in parts for i in part.input_ids[part.token_mask]]
    assert sorted(counted) == sorted(i + 1 for i in range(rows) for _ in range(5))
    assert all(len(part.input_ids) > 0 for part in parts)


@pytest.mark.parametrize(("batches", "size"), [(1, 2), (3, 2), (4, 2), (4, 4), (6, 4)])
def test_the_processes_share_a_step(batches: int, size: int) -> None:
    step = [batch_of(5) for _ in range(batches)]
    dealt = []
    for rank in range(size):
        parallel = Parallel.__new__(Parallel)  # only `shard_batches`, which needs no model
        parallel._processes = Processes(rank, size)
        dealt.append(parallel.shard_batches(step))
    assert len({len(part) for part in dealt}) == 1, "who waits for whom"
    rows = sorted(int(row) for part in dealt for batch in part for row in batch.rows)
    assert rows == sorted(list(range(5)) * batches)


# -- the environment ----------------------------------------------------------------------------------------


def test_one_process_makes_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in ("", "1"):
        monkeypatch.setenv("WORLD_SIZE", size)
        with join_processes() as processes:
            assert processes is SINGLE_PROCESS
            assert not torch.distributed.is_initialized()
    assert processes.broadcast("text") == "text"
    assert processes.all_gather(b"x") == [b"x"]
    assert processes.all_reduce([1.5]) == [1.5]


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number: got 'two'"),
        ({"WORLD_SIZE": "2"}, "needs a RANK from 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "needs a RANK from 0 to 1: got 2"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "needs MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_an_environment_that_says_too_little(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], text: str
) -> None:
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=text), join_processes():
        pass


def test_a_restart_is_known_by_torchrun_s_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    assert not is_restarted()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert is_restarted()


@pytest.mark.parametrize("more", [{"optimizer": "muon"}, {"save_async": True}])
def test_pieces_do_not_go_with_everything(more: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"parallel=fsdp .* does not go with "):
        TrainConfig(parallel="fsdp", **more)


# -- the same run -------------------------------------------------------------------------------------------

# Sums of float32 in another order: a relative 1e-7 each, which twelve steps of Adam (whose first steps divide
# a gradient by its own size) may make a hundred times larger.
CLOSE = 1e-5


def test_weighted_samples_count_the_same_in_several_processes(folder: Path, launch: Launch) -> None:
    path = folder / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [{**row, "weight": number} for number, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    more = {"keyword_weight": "红:2", "batch_size": 3, **NO_CHANCE}
    trainer(config(folder, "one", **more)).run()
    ended = launch(folder, 2, flags(folder, "several", **more))
    assert ended.codes == [0, 0], ended.said
    one, several = losses(folder / "one"), losses(folder / "several")
    assert len(one) == 12
    assert several == pytest.approx(one, rel=CLOSE)


@pytest.mark.parametrize(
    ("size", "kind", "steps", "optimizer"),
    [(2, "ddp", 1, "muon"), (2, "ddp", 3, "adamw"), (4, "ddp", 2, "adamw"), (2, "fsdp", 2, "adamw")],
)
def test_several_processes_compute_what_one_does(
    folder: Path, launch: Launch, size: int, kind: str, steps: int, optimizer: str
) -> None:
    more = {"gradient_accumulation_steps": steps, "optimizer": optimizer, "max_grad_norm": 0.5, **NO_CHANCE}
    trainer(config(folder, "one", **more)).run()
    ended = launch(folder, size, flags(folder, "several", parallel=kind, **more))
    assert ended.codes == [0] * size, ended.said
    assert ended.said[1:] == [""] * (size - 1), "process 0 alone talks"
    one, several = metrics(folder / "one"), metrics(folder / "several")
    assert [line.keys() for line in one] == [line.keys() for line in several]
    for a, b in zip(one, several):
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=CLOSE, abs=CLOSE), (a["step"], key)
    expected = minigpt.load_model(folder / "one")
    found = minigpt.load_model(folder / "several")
    ids = torch.arange(10)[None]
    # a weight's last digits may flip an update's sign where the gradient is all but zero: 12 steps of 1e-2
    torch.testing.assert_close(found(ids), expected(ids), rtol=1e-2, atol=1e-2)


def test_an_adapter_learns_the_same_in_two_processes(folder: Path, launch: Launch) -> None:
    trainer(config(folder, "base", **NO_CHANCE)).run()
    more = {"method": "lora", "max_steps": 6, "eval_steps": 3, "batch_size": 4, "threads": 1, "device": "cpu"}
    more |= {"model": folder / "base", "train_data": folder / "train.jsonl", "val_data": folder / "val.jsonl"}
    flags = [part for name, value in more.items() for part in (f"--{name}", str(value))]
    for output, size in (("one", 1), ("two", 2)):
        ended = launch(folder, size, ["finetune", *flags, "--output", folder / output])
        assert ended.codes == [0] * size, ended.said
    expected, found = (load_file(folder / run / "last/adapter_model.safetensors") for run in ("one", "two"))
    assert expected.keys() == found.keys()
    for key in expected:  # six steps of 1e-3: see the test above
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-3)


# The same with 16 bits: where a float32 differs by 1e-7, a few of its roundings to bfloat16 fall to the other
# side, by 2^-8 of one value among thousands. Together less than one more rounding of everything.
CLOSE_16 = 2.0**-9


@pytest.mark.parametrize(
    ("kind", "precision", "steps"),
    [("ddp", "bfloat16", 2), ("ddp", "bfloat16", 1), ("fsdp", "bfloat16", 2), ("ddp", "float16", 2)],
)
def test_text_and_16_bits(folder: Path, launch: Launch, kind: str, precision: str, steps: int) -> None:
    (folder / "text.txt").write_text(
        "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。\n" * 40, encoding="utf-8"
    )
    more = {"text": folder / "text.txt", "block_size": 16, "loss_on": "all", "precision": precision}
    more |= {"gradient_accumulation_steps": steps, "max_steps": 6, "eval_steps": 3, **NO_CHANCE}
    trainer(config(folder, "one", **more)).run()
    ended = launch(folder, 2, flags(folder, "several", parallel=kind, **more))
    assert ended.codes == [0, 0], ended.said
    assert losses(folder / "several") == pytest.approx(losses(folder / "one"), rel=CLOSE_16)


@pytest.mark.parametrize(
    ("kind", "more", "job"),
    [
        ("ddp", {"optimizer": "muon", "logging_steps": 3}, {"asynchronous": True}),
        ("fsdp", {"logging_steps": 3}, {"asynchronous": True}),
        ("ddp", {}, {"compiled": True}),
        ("fsdp", {}, {"compiled": True}),
        ("ddp", {"gradient_checkpointing": True}, {"compiled": True, "asynchronous": True}),
        ("fsdp", {"gradient_checkpointing": True}, {"asynchronous": True}),
    ],
)
def test_the_gpu_s_fast_paths_in_several_processes(
    folder: Path, launch: Launch, kind: str, more: dict[str, Any], job: dict[str, Any]
) -> None:
    settings = {**NO_CHANCE, "max_grad_norm": 0.5, "batch_size": 2, **more}
    if "compiled" in job:
        # a graph is traced layer by layer, in seconds, and once more for other lengths
        settings |= {"n_layer": 1, "max_steps": 4, "eval_steps": 2}
    trainer(config(folder, "one", **settings)).run()
    switches = ["--compile"] if "compiled" in job else []
    switches += ["--gradient_checkpointing"] if settings.pop("gradient_checkpointing", False) else []
    ended = launch(folder, 2, [*flags(folder, "several", parallel=kind, **settings), *switches], **job)
    assert ended.codes == [0, 0], ended.said
    assert losses(folder / "several") == pytest.approx(losses(folder / "one"), rel=CLOSE)
    names = load_file(folder / "several" / "best" / "model.safetensors").keys()
    assert names == load_file(folder / "one" / "best" / "model.safetensors").keys()


def test_a_bad_step_of_one_process_is_everyone_s_before_it_is_read(folder: Path, launch: Launch) -> None:
    more = {**NO_CHANCE, "logging_steps": 4}
    ended = launch(folder, 2, flags(folder, "run", **more), asynchronous=True, rank=1, what="nan", step=3)
    assert ended.codes == [0, 0], ended.said
    assert "step      3  skipped: loss nan" in ended.said[0]
    state = json.loads((folder / "run" / "last" / "training_state.json").read_bytes())
    assert state["skipped"] == [[3, 3]]


@pytest.mark.parametrize(("size", "kind"), [(2, "ddp"), (2, "fsdp"), (4, "ddp")])
def test_a_stopped_run_ends_on_the_same_bits(
    folder: Path, launch: Launch, straight: Callable[..., Path], size: int, kind: str
) -> None:
    more = {"parallel": kind, "dropout": 0.1}
    ended = launch(folder, size, flags(folder, "run", **more), rank=size - 1, what="SIGTERM", step=4)
    assert ended.codes == [143] * size, ended.said
    assert "SIGTERM: saved step 5 in " in ended.said[0]
    last = folder / "run" / "last"
    verify_manifest(last)
    assert len(list(last.glob("rng*.safetensors"))) == size
    assert len(list(last.glob("shard-*.safetensors"))) == (size if kind == "fsdp" else 0)
    ended = launch(folder, size, resume(folder))
    assert ended.codes == [0] * size, ended.said
    assert "resumed from" in ended.said[0]
    assert same_tensors(straight(size, kind) / "last", folder / "run" / "last")
    assert metrics(straight(size, kind)) == metrics(folder / "run")


@pytest.mark.parametrize(
    ("before", "kind", "after", "then"), [(2, "fsdp", 1, "ddp"), (1, "ddp", 2, "fsdp"), (2, "ddp", 4, "ddp")]
)
def test_another_number_of_processes_goes_on_with_the_same_data(
    folder: Path, launch: Launch, before: int, kind: str, after: int, then: str
) -> None:
    trainer(config(folder, "straight", **NO_CHANCE)).run()
    first = flags(folder, "run", parallel=kind, **NO_CHANCE)
    assert launch(folder, before, first, rank=0, what="SIGINT", step=4).codes == [130] * before
    ended = launch(folder, after, [*resume(folder), "--parallel", then])
    assert ended.codes == [0] * after, ended.said
    assert f"processes was {before} before, is {after} now: sums are rounded differently" in ended.said[0]
    assert losses(folder / "run") == pytest.approx(losses(folder / "straight"), abs=CLOSE)
    assert read_run(folder / "run").parallel == then


# -- what goes wrong ----------------------------------------------------------------------------------------


def test_a_dead_process_ends_all_and_a_restart_goes_on(
    folder: Path, launch: Launch, straight: Callable[..., Path]
) -> None:
    more = {"dropout": 0.1}
    ended = launch(folder, 2, flags(folder, "run", **more), rank=1, what="SIGKILL", step=8)
    assert ended.codes == [1, -9]
    assert "process 0: another process has died" in ended.said[0]
    ended = launch(folder, 2, flags(folder, "run", **more), restart=1)  # torchrun knows no other flags
    assert ended.codes == [0, 0], ended.said
    assert "resumed from" in ended.said[0]
    assert same_tensors(straight(2) / "last", folder / "run" / "last")


def test_an_error_names_its_process(folder: Path, launch: Launch) -> None:
    ended = launch(folder, 2, flags(folder, "run"), rank=1, what="error", step=2)
    assert ended.codes == [1, 1]
    assert "process 1: on purpose" in ended.said[1]
    assert "ZeroDivisionError" not in ended.said[0]


def test_a_save_that_fails_stops_all(folder: Path, launch: Launch) -> None:
    ended = launch(folder, 2, flags(folder, "run", on_save_error="stop"), rank=0, what="save")
    assert ended.codes == [2, 2]
    assert "error: the disk is full" in ended.said[0]
    assert ended.said[1] == ""


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_failed_save_may_also_be_passed_over(folder: Path, launch: Launch, kind: str) -> None:
    ended = launch(folder, 2, flags(folder, "run", parallel=kind), rank=0, what="save")
    assert ended.codes == [2, 2], "the last one must not fail"
    assert "the disk is full; training continues" in ended.said[0]


def test_bad_input_is_said_once(folder: Path, launch: Launch) -> None:
    ended = launch(folder, 2, flags(folder, "run", train_data=folder / "absent.jsonl"))
    assert ended.codes == [2, 2]
    assert "absent.jsonl" in ended.said[0]
    assert ended.said[1] == ""
    assert not (folder / "run").exists()


def test_the_first_process_chooses_the_size(folder: Path, launch: Launch) -> None:
    files = [part for name, path in paths(folder).items() for part in (f"--{name}", path)]
    shape = ["--n_layer", 1, "--n_embd", 32, "--threads", 1, "--device", "cpu", "--max_steps", 3]
    ended = launch(folder, 2, [*files, *shape, "--size", "small"])
    assert ended.codes == [0, 0], ended.said
    assert "expected: about" not in ended.said[0]  # one process cannot measure two
    assert ended.said[1] == ""
    written = json.loads((folder / "run" / "run.json").read_text(encoding="utf-8"))
    assert written["size"]["chosen"]["steps"] == 3
    assert written["size"]["got"]["val_loss"] > 0


# -- the real launcher --------------------------------------------------------------------------------------


def test_sampled_answers_are_those_of_one_process(folder: Path, launch: Launch) -> None:
    assert launch(folder, 1, flags(folder, "start", **NO_CHANCE, max_steps=4)).codes == [0]
    more = {"task": "grpo", "model": folder / "start" / "best", "train_data": folder / "train.jsonl"}
    more |= {"val_data": folder / "val.jsonl", "max_steps": 4, "eval_steps": 2, "logging_steps": 1}
    more |= {"batch_size": 3, "reward": "length", "reward_length": 4, "num_generations": 4, "beta": 0.1}
    more |= {"max_completion_length": 6, "learning_rate": 1e-2, "threads": 1, "max_length": 32}
    argv = [f"--{name}={value}" for name, value in more.items()]
    runs = [folder / "one", folder / "two"]
    for size, run in enumerate(runs, 1):
        ended = launch(folder, size, ["finetune", *argv, f"--output={run}"])
        assert ended.codes == [0] * size, ended.said
    one, two = map(metrics, runs)
    assert [[*line] for line in one] == [[*line] for line in two]
    for left, right in zip(one, two):  # the same answers; sums in another order
        assert left == pytest.approx(right, rel=1e-3, abs=1e-5)


# torchrun with its own command line. It and its processes are forks, because each new one would import torch;
# process 1 of the first start kills itself before its ninth step.
TORCHRUN = """
import os, runpy, signal, sys
from torch.distributed import run
from tests.survival.children import at_step

def work(*argv):
    sys.argv = [*argv]
    try:
        runpy.run_module("minigpt.train", run_name="__main__")
    except SystemExit as stop:  # torchrun waits for what the function returns
        if stop.code:
            raise

def die():
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        os.kill(os.getpid(), signal.SIGKILL)

run.run_script_path = work
at_step(8, die)
run.main(sys.argv[1:])
sys.exit(0)
"""


def test_torchrun_starts_anew_after_a_kill(
    folder: Path, launch: Launch, straight: Callable[..., Path]
) -> None:
    command = ["--standalone", "--nproc_per_node=2", "--max_restarts=1", "--start_method=fork"]
    command += ["--run_path", "minigpt train", *flags(folder, "run", dropout=0.1)]
    # the variable that docs/distributed.md recommends: without it torch's own rendezvous may meet the dead
    environment = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    ended = launch(folder, 1, command, code=TORCHRUN, environment=environment)
    assert ended.codes == [0], ended.said[0][-3000:]
    assert "resumed from" in ended.said[0]
    assert same_tensors(straight(2) / "last", folder / "run" / "last")
