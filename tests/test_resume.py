"""A run that was stopped, killed or damaged continues to the same bits, or says why it cannot."""

import dataclasses
import json
import math
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import load_file

import minigpt
from minigpt.devices import random_state, set_random_state
from minigpt.errors import InputError
from minigpt.storage import files
from minigpt.tokenizer import Tokenizer
from minigpt.training import checkpoint, run_data
from minigpt.training.config import RECIPES, TrainConfig, read_recipe, read_run
from minigpt.training.lock import LOCK_FILE, lock_folder
from minigpt.training.resolve import resolve
from minigpt.training.stop_request import Stopped
from tests.commands import RunCommand, swallowed
from tests.runs import TINY, config, given, identical, metrics, paths, stop_at, trainer, write_data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder with a tiny data set."""
    write_data(tmp_path)
    return tmp_path


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
    assert (again.progress.best_val_loss, again.progress.best_step) == (math.inf, 0)
    again.run()
    assert (folder / "run" / "best").resolve().name == "step-00000012"


def test_a_link_left_behind_is_set_again(folder: Path) -> None:
    """A kill between saving a checkpoint and moving the link leaves such a folder."""
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


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_a_device_keeps_its_own_random_state(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A stand-in for a device: its dropout draws from a generator that is not the CPU's."""
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


def test_a_resumed_run_keeps_its_recipe_and_not_the_calls_flags(folder: Path) -> None:
    trainer(config(folder, recipe="qa-cpu", overwrite=True, strict=True, json=True)).run()
    resume = {"resume": True, "output": folder / "run"}
    inherited = config(folder, recipe="qa-cpu", strict=True, resume=True)
    assert resolve(resume) == resolve({**resume, "recipe": "qa-cpu"}) == inherited
    with pytest.raises(InputError, match="began with --recipe qa-cpu, got --recipe document"):
        resolve({**resume, "recipe": "document"})


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"config": [1]}'])
def test_a_damaged_run_file_can_be_replaced_as_its_error_says(folder: Path, content: str) -> None:
    trainer(config(folder)).run()
    path = folder / "run" / "run.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"run\.json is damaged: copy .*last.training_state\.json over it"):
        read_run(folder / "run")
    shutil.copy(folder / "run" / "last" / "training_state.json", path)
    assert read_run(folder / "run") == config(folder, resume=True)


# -- what may change between the stop and the resume, and what may not --------------------------------------


def test_each_changed_setting_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stop_at(trainer(config(folder)), 8)
    changed: dict[str, Any] = {
        "seed": 7,
        "batch_size": 2,
        "by_length": False,
        "loss_on": "all",
        "max_steps": 20,
    }
    capsys.readouterr()
    trainer(config(folder, **changed)).resume()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed on resume: ")]
    assert [line.removeprefix("changed on resume: ") for line in said] == [
        "batch_size 4 -> 2",
        "by_length True -> False",
        "loss_on answer -> all",
        "max_steps 12 -> 20",
        "seed 42 -> 7",
        "total_steps 12 -> 20 (the learning rate's schedule is another one)",
    ]


def test_what_changes_nothing_is_not_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stop_at(trainer(config(folder)), 8)
    capsys.readouterr()
    trainer(config(folder, save_async=True, on_save_error="stop", save_total_limit=5)).resume()
    assert "changed" not in capsys.readouterr().out


def test_changed_data_needs_to_be_allowed_and_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_at(trainer(config(folder)), 8)
    for name in ("train", "val"):
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[1:]), encoding="utf-8")
    with pytest.raises(InputError, match=r"another training data .*--allow_changed_data"):
        trainer(config(folder)).resume()
    capsys.readouterr()
    run = trainer(config(folder, allow_changed_data=True))
    run.resume()
    out = capsys.readouterr().out
    assert "changed on resume: the training data" in out
    assert "the order is that of the new data" in out
    assert run.progress.best_val_loss == math.inf  # measured on other data
    fresh = trainer(config(folder, "other"))
    assert run.step.positions([8, 9]) == fresh.step.positions([8, 9])
    run.run()
    (event,) = [line for line in metrics(folder / "run") if line.get("event") == "changed"]
    assert event["step"] == 8
    assert [sentence.split(" (")[0] for sentence in event["what"]] == [
        "the training data",
        "the validation data",
    ]


def test_another_vocabulary_is_refused_whatever_is_allowed(folder: Path) -> None:
    stop_at(trainer(config(folder)), 8)
    words = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))["word2id"]
    first, second = list(words)[3:5]
    words[first], words[second] = words[second], words[first]
    Tokenizer.from_word2id(words).save(folder / "vocab.json")
    with pytest.raises(InputError, match="another vocabulary"):
        trainer(config(folder, allow_changed_data=True)).resume()
    with pytest.raises(InputError, match="another vocabulary"):  # the files of data are the same
        trainer(config(folder)).resume()


def test_an_option_that_makes_other_examples_is_named(folder: Path) -> None:
    stop_at(trainer(config(folder)), 8)
    before = config(folder).max_length  # longer than every example
    with pytest.raises(InputError, match=f"was made with --max_length {before}, which gives other examples"):
        trainer(config(folder, max_length=13)).resume()


def test_metrics_behind_the_checkpoint_are_written_anew(folder: Path) -> None:
    trainer(config(folder, "straight")).run()
    stop_at(trainer(config(folder)), 8)
    with (folder / "run" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 10, "train_loss": 1.0}\n{"step": 12, "train')  # as a killed run leaves it
    again = trainer(read_run(folder / "run"))
    again.resume()
    again.run()
    identical(folder / "run", folder / "straight")


def test_the_generators_of_python_and_numpy_are_kept() -> None:
    device = torch.device("cpu")
    random.gauss(0, 1)  # draws one of a pair of numbers; the other one is part of the state
    np.random.normal()
    state = random_state(device)
    drawn = [(random.gauss(0, 1), random.random(), np.random.normal(), np.random.random()) for _ in range(3)]
    random.seed(1)
    np.random.seed(1)
    set_random_state(device, state)
    again = [(random.gauss(0, 1), random.random(), np.random.normal(), np.random.random()) for _ in range(3)]
    assert drawn == again


# The keys of every checkpoint so far. If a key disappears or changes its meaning, earlier runs cannot be
# resumed.
STATE_KEYS = {
    "minigpt", "platform", "torch", "device", "threads", "processes", "total_steps", "train_fingerprint",
    "val_fingerprint", "vocabulary_fingerprint", "config", "steps_done", "tokens_seen", "best_val_loss",
    "best_step", "evaluated", "loss_sum", "loss_steps", "sums", "train_seconds", "bad_steps", "rollbacks",
    "skipped", "recent_losses", "loss_scale", "best_metrics",
}  # fmt: skip


def test_the_state_is_the_one_that_earlier_versions_wrote(folder: Path) -> None:
    run = trainer(config(folder, optimizer="muon"))
    stop_at(run, 5)
    last = folder / "run" / "last"
    state = json.loads((last / "training_state.json").read_bytes())
    assert state.keys() == STATE_KEYS
    assert state["config"].keys() == {field.name for field in dataclasses.fields(TrainConfig)}
    assert load_file(last / "rng.safetensors").keys() == {
        "torch", "python", "python_spare", "numpy", "numpy_spare",
    }  # fmt: skip
    kinds: dict[str, set[str]] = {}
    for key in load_file(last / "optimizer.safetensors"):
        name, _, kind = key.rpartition(".")
        kinds.setdefault(name, set()).add(kind)
    by_muon = {p for group in run.step.optimizers[1].param_groups for p in group["params"]}
    assert kinds == {
        name: {"momentum_buffer"} if parameter in by_muon else {"step", "exp_avg", "exp_avg_sq"}
        for name, parameter in run.model.named_parameters()
    }
    # Checkpoints of the first version had neither processes nor a loss scale.
    for key in ("processes", "loss_scale", "recent_losses", "skipped", "rollbacks", "best_metrics", "sums"):
        del state[key]
    again = trainer(config(folder, optimizer="muon"))
    again.progress.load(state)
    assert (again.progress.steps_done, again.progress.skipped, again.progress.loss_scale) == (5, [], [])


# -- each recipe --------------------------------------------------------------------------------------------

# These sizes replace those of recipes that would take long. All other options are the recipe's.
SMALL: dict[str, Any] = {
    **TINY, "intermediate_size": 0, "head_dim": 0, "num_key_value_heads": 0, "max_steps": 8,
    "eval_steps": 4, "warmup_steps": 2, "report_to": "none", "compile": False,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.toml")))
@pytest.mark.parametrize("kind", ["pairs", "text"])
def test_every_recipe_s_options_survive(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    recipe = read_recipe(name)
    own: dict[str, Any] = {"learning_rate": recipe.learning_rate}
    if recipe.tokens_per_batch:
        own["tokens_per_batch"] = 64
    own["gradient_accumulation_steps"] = min(recipe.gradient_accumulation_steps, 3)
    if kind == "text":
        (folder / "t.txt").write_text("天是蓝色。地是黄色。日是红色。月是白色。\n" * 20, encoding="utf-8")
        own |= {"text": folder / "t.txt", "shards": folder / "shards", "val_fraction": 0.1}

    def settings(output: str, **more: Any) -> TrainConfig:
        values = {**SMALL, **own, **paths(folder, output), **more}
        return dataclasses.replace(recipe, **values)

    trainer(settings("straight")).run()
    stop_at(trainer(settings("run")), 5, signal.SIGTERM)
    again = trainer(read_run(folder / "run"))
    assert again.resume().name == "step-00000005"
    again.run()
    identical(folder / "run", folder / "straight")

    class PowerCutError(BaseException):
        pass

    def cut(point: str) -> None:  # of the second checkpoint
        if point == "folder: filled" and checkpoint.list_checkpoints(folder / "cut"):
            raise PowerCutError

    monkeypatch.setattr(files, "step_hook", cut)
    with pytest.raises(PowerCutError):
        trainer(settings("cut")).run()
    monkeypatch.undo()
    again = trainer(dataclasses.replace(read_run(folder / "cut"), save_async=True))
    assert again.resume().name == "step-00000004"
    again.run()
    identical(folder / "cut", folder / "straight")


# -- signals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_the_exit_code_says_which_signal_it_was(folder: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    stop_at(trainer(config(folder)), 3, number)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("where", ["in a gradient", "in the evaluation", "in a save"])
def test_a_signal_in_the_midst_of_something_costs_no_bit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    trainer(config(folder, "straight", dropout=0.1)).run()
    run = trainer(config(folder, dropout=0.1))
    calls = 0

    def strike() -> None:
        nonlocal calls
        calls += 1
        if calls == (1 if where == "in the evaluation" else 2):
            os.kill(os.getpid(), signal.SIGTERM)

    if where == "in a save":
        monkeypatch.setattr(files, "step_hook", lambda point: strike() if point == "folder: filled" else None)
    else:  # in the second step, or in the first evaluation
        assert isinstance(run.model, minigpt.GPTLMHeadModel)
        layer = run.model.transformer.ln_f
        training = where == "in a gradient"
        layer.register_forward_hook(lambda m, *_: strike() if m.training == training else None)
    saved = {"in a gradient": 1, "in the evaluation": 6, "in a save": 12}[where]
    if where == "in a save":  # of the last checkpoint: nothing is left to stop
        run.run()
    else:
        with pytest.raises(Stopped, match=f"SIGTERM: saved step {saved} "):
            run.run()
        monkeypatch.undo()
        again = trainer(read_run(folder / "run"))
        assert again.resume().name == f"step-{saved:08d}"
        again.run()
    identical(folder / "run", folder / "straight")


def test_a_second_signal_stops_at_once(folder: Path) -> None:
    run = trainer(config(folder))
    evaluate = run.evaluate

    def impatient() -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate()

    run.evaluate = impatient  # type: ignore[method-assign]
    with pytest.raises(SystemExit) as stopped:
        run.run()
    assert stopped.value.code == 143
    assert checkpoint.list_checkpoints(folder / "run") == []


def test_before_training_there_is_nothing_to_save(
    folder: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run_data.read_data

    def reading(settings: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return real(settings)

    monkeypatch.setattr(run_data, "read_data", reading)
    result = run_command("train.py", *given(folder))
    assert (result.code, result.err) == (138, "train.py: terminated\n")
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    "error", [None, TypeError("no shape"), safetensors.SafetensorError("could not determine the shape")]
)
def test_a_signal_that_a_library_swallows_is_no_damage(
    folder: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    stop_at(trainer(config(folder)), 3)
    before = [path.name for path in checkpoint.list_checkpoints(folder / "run")]
    monkeypatch.setattr(checkpoint, "read", swallowed(checkpoint.read, error))
    result = run_command("train.py", "--output", folder / "run", "--resume")
    assert (result.code, result.err.splitlines()[-1]) == (143, "train.py: terminated")
    assert [path.name for path in checkpoint.list_checkpoints(folder / "run")] == before
    monkeypatch.undo()
    assert run_command("train.py", "--output", folder / "run", "--resume").code == 0  # nothing is remembered


@pytest.mark.parametrize("error", [None, RuntimeError("of torch")])
def test_a_step_in_which_a_signal_was_swallowed_is_done_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    trainer(config(folder, "straight", dropout=0.1)).run()
    run = trainer(config(folder, dropout=0.1))
    monkeypatch.setattr(run.step, "summed_loss", swallowed(run.step.summed_loss, error))
    with pytest.raises(Stopped, match="SIGTERM: saved step 0 "):
        run.run()
    again = trainer(read_run(folder / "run"))
    again.resume()
    again.run()
    identical(folder / "run", folder / "straight")


# -- two at once --------------------------------------------------------------------------------------------


def test_a_second_run_in_the_folder_is_refused(folder: Path, run_command: RunCommand) -> None:
    lock = lock_folder(folder / "run")
    for flags in ([], ["--overwrite"]):
        result = run_command("train.py", *given(folder), *flags)
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert f"{folder / 'run'} is in use by another run: wait for it, stop it, or choose" in result.err
    lock.release()
    assert run_command("train.py", *given(folder)).code == 0  # the file is there, its lock is not


def test_a_stale_lock_file_locks_nothing(folder: Path) -> None:
    (folder / LOCK_FILE).write_text('{"pid": 1}', encoding="utf-8")  # as earlier versions wrote it
    lock = lock_folder(folder)
    with pytest.raises(InputError, match="is in use by another run"):
        lock_folder(folder)
    lock.release()


def test_resume_before_the_first_checkpoint_starts_from_the_beginning(
    folder: Path, run_command: RunCommand
) -> None:
    run_command("train.py", *given(folder, output=folder / "straight"))
    (folder / "run").mkdir()
    settings = (folder / "straight" / "run.json").read_text(encoding="utf-8")
    (folder / "run" / "run.json").write_text(settings, encoding="utf-8")  # killed right after it wrote this
    result = run_command("train.py", "--resume", "--output", folder / "run")
    assert result.code == 0, result.err
    assert "holds no checkpoint yet: the run starts from the beginning" in result.out
    identical(folder / "run", folder / "straight")


def test_a_folder_whose_name_is_no_utf8(tmp_path: Path, run_command: RunCommand) -> None:
    """Linux allows any bytes in a name: here those of a computer that writes GBK."""
    folder = tmp_path / os.fsdecode("模型".encode("gbk"))
    folder.mkdir()
    write_data(folder)
    result = run_command("train", *given(folder, max_steps=2, eval_steps=1))
    assert result.code == 0, result.err
    result = run_command("train", "--resume", "--output", folder / "run", "--max_steps", 4)
    assert result.code == 0, result.err
    tuned = run_command(
        *("finetune", "--model", folder / "run" / "last", "--method", "lora", "--max_steps", 1),
        *("--train_data", folder / "train.jsonl", "--device", "cpu", "--output", folder / "tuned"),
    )
    assert tuned.code == 0, tuned.err
    answer = run_command(
        *("generate", "--model", folder / "run" / "last", "--adapter", folder / "tuned" / "last"),
        *("--question", "天是什么颜色？", "--json"),
    )
    assert answer.code == 0, answer.err


def test_a_model_is_no_place_for_a_run(folder: Path, run_command: RunCommand) -> None:
    assert run_command("train", *given(folder, max_steps=1)).code == 0
    model = folder / "run" / "last"
    before = sorted(model.iterdir())
    for flags in ([], ["--overwrite"]):
        result = run_command("train", *given(folder, output=model), *flags)
        assert result.code == 2
        assert f"{model} is the folder of a model: choose another folder with --output" in result.err
    assert sorted(model.iterdir()) == before
    for verb, more in (("train", []), ("finetune", ["--model", model])):  # nor is a folder data
        result = run_command(verb, *more, *given(folder, train_data=".", output=folder / "new"))
        assert result.code == 2
        assert ". is a folder" in result.err
