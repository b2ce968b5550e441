"""`minigpt.train` and `minigpt.evaluate` do the same as the commands. docs/api.md tests the other names."""

import json
from pathlib import Path
from typing import Any

import pytest

import minigpt
from minigpt.errors import InputError
from minigpt.training.config import read_run
from tests.commands import RunCommand
from tests.runs import TINY, config, paths, write_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the data of `write_data`, and a run of four steps."""
    folder = tmp_path_factory.mktemp("api")
    write_data(folder)
    result = minigpt.train(**{**TINY, **paths(folder), "recipe": "qa-cpu", "max_steps": 4, "eval_steps": 2})
    assert (result["steps"], result["model"]) == (4, str(folder / "run" / "best"))
    return folder


def test_what_is_left_out_is_the_recipes(folder: Path) -> None:
    run = read_run(folder / "run")
    assert (run.recipe, run.max_steps, run.optimizer) == ("qa-cpu", 4, "muon")


def test_a_configuration_leaves_nothing_to_a_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config(folder, "second")
    result = minigpt.train(settings, max_steps=2, output=str(folder / "second"))
    assert result["steps"] == 2
    assert "recipe" not in capsys.readouterr().out
    assert read_run(folder / "second").optimizer == settings.optimizer == "adamw"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 1e-3}, "options: unknown key 'lr'; did you mean 'learning_rate'?"),
        ({"optimizer": "adam"}, r"options: optimizer = 'adam': expected \('adamw', 'muon'\)"),
        ({"n_layer": 0}, "n_layer must be from 1 to 1000: got n_layer=0"),
        ({"learning_rate": 10**400}, "learning_rate must be from 0 to .*: got .*=a number of 1329 bits"),
        ({"output": 3}, "options: output = 3: expected"),
        ({"recipe": "qa"}, "unknown recipe 'qa'; (did you mean|known: )"),
    ],
)
def test_bad_options_of_train(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        minigpt.train(**{"recipe": "qa-cpu", **options})


def test_a_model_that_no_memory_holds_is_refused_at_once(folder: Path) -> None:
    sizes = {"n_layer": 1000, "n_embd": 8192, "n_head": 8, "dry_run": True}
    with pytest.raises(
        InputError, match=r"^805,.* parameters take 3,2.* GB in float32, and .* GB are free: lower"
    ):
        minigpt.train(**{**TINY, **paths(folder), **sizes, "recipe": "qa-cpu"})


def test_evaluate_gives_what_the_command_prints(folder: Path, run_command: RunCommand) -> None:
    data, flags = folder / "val.jsonl", ("--device", "cpu", "--max_new_tokens", 4, "--json", "--show", 0)
    model, tokenizer = minigpt.load_model(folder / "run"), minigpt.load_tokenizer(folder / "run")
    printed = run_command("eval", "--model", folder / "run", "--data", data, *flags)
    expected = json.loads(printed.out.splitlines()[-1])
    pairs = [(one["question"], one["answer"]) for one in map(json.loads, data.read_text().splitlines())]
    for given in (data, str(data), pairs):
        assert minigpt.evaluate(model, tokenizer, given, max_new_tokens=4) == expected

    text = folder / "text.txt"
    text.write_text("天是黑色。", encoding="utf-8")
    printed = run_command("eval", "--model", folder / "run", "--text", text, "--device", "cpu", "--json")
    assert minigpt.evaluate(model, tokenizer, text=text) == json.loads(printed.out.splitlines()[-1])


def test_evaluate_needs_one_thing_to_measure_on(folder: Path) -> None:
    model, tokenizer = minigpt.load_model(folder / "run"), minigpt.load_tokenizer(folder / "run")
    for data, text in ((None, None), ([("a", "b")], "x.txt")):
        with pytest.raises(InputError, match="give one of them"):
            minigpt.evaluate(model, tokenizer, data, text=text)
