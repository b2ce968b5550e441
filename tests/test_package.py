"""minigpt/__init__.py: its import loads nothing heavy, its names resolve, and the verbs answer at once."""

import functools
import json
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

import minigpt
from minigpt import __main__ as verbs
from tests import prepared
from tests.commands import run_here

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "numpy", "safetensors", "tokenizers", "rich", "transformers", "matplotlib")
PUBLIC = [
    *("BpeTokenizer", "Engine", "GPTConfig", "GPTLMHeadModel", "GenerationOptions", "InputError"),
    *("Qwen3Config", "Qwen3ForCausalLM", "Tokenizer", "TrainConfig", "WordPieceTokenizer"),
    *("chinese_font", "evaluate", "evaluate_task", "finetune", "generate", "load_model"),
    *("load_tokenizer", "save_pretrained", "stream", "train"),
]


def python(*argv: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=cwd, env=environment)


def loaded_by(code: str) -> set[str]:
    """Return the heavy modules that a program has loaded at its end."""
    done = python("-c", f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))")
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1])) & set(HEAVY)


# -- importing ---------------------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_by("import minigpt") == set()
    assert loaded_by("import minigpt; dir(minigpt); minigpt.__version__; minigpt.__all__") == set()


@functools.cache
def heavy() -> tuple[set[str], float]:
    """Load a model's class in a new process. Return the heavy modules, and the seconds."""
    start = time.perf_counter()
    return loaded_by("import minigpt; minigpt.GPTConfig"), time.perf_counter() - start


def test_the_measure_of_heaviness_works() -> None:
    assert {"torch", "numpy"} <= heavy()[0]


@pytest.mark.parametrize("module", ["errors", "console.command_line", "storage.files", "__main__"])
def test_the_lowest_level_loads_nothing_heavy(module: str) -> None:
    assert loaded_by(f"import minigpt.{module}") == set()


@pytest.mark.parametrize("module", ["console.terminal", "tokenizer", "data.reader"])
def test_what_needs_no_tensors_loads_no_torch(module: str) -> None:
    assert "torch" not in loaded_by(f"import minigpt.{module}")


def test_public_names() -> None:
    assert minigpt.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(minigpt))
    assert {"__version__", "__doc__", "__path__"} <= set(dir(minigpt))
    assert dir(minigpt) == sorted(dir(minigpt))
    for name in PUBLIC:
        value = getattr(minigpt, name)
        assert callable(value)
        assert value.__name__ == name
        assert value is getattr(minigpt, name)


def test_a_star_gives_the_public_names() -> None:
    namespace: dict[str, object] = {}
    exec("from minigpt import *", namespace)
    assert set(namespace) - {"__builtins__"} == set(PUBLIC)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'minigpt' has no attribute 'generat'"):
        _ = minigpt.generat
    assert not hasattr(minigpt, "__wrapped__")
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from minigpt import nothing")


def test_the_version_is_the_distribution_s() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert minigpt.__version__ == project["version"]


@pytest.mark.parametrize(("name", "home"), [("generate", "generation.api"), ("train", "training.run")])
def test_a_function_stays_one_when_the_script_of_its_name_is_imported(name: str, home: str) -> None:
    # the script first, and after the function had been looked up: each where only torch was imported
    for order in (f"import minigpt.{name}", f"from minigpt import {name}; import minigpt.{name}"):
        shown = f"print(type(minigpt.{name}).__name__, minigpt.{name}.__module__, flush=True)"
        done = prepared.run("-c", f"{order}\n{shown}")
        assert (done.returncode, done.stdout, done.stderr) == (0, f"function minigpt.{home}\n", ""), order


def test_other_attributes_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minigpt, "generate", "mine")  # as a user's test would
    assert vars(minigpt)["generate"] == "mine"
    monkeypatch.undo()
    assert minigpt.generate.__name__ == "generate"


# -- verbs -------------------------------------------------------------------------------------------------


def test_help_prints_every_verb_and_loads_nothing_heavy(capsys: pytest.CaptureFixture[str]) -> None:
    assert verbs.main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for verb, (_, text) in verbs.COMMANDS.items():
        assert f" {verb} {text} " in " ".join(out.split()), verb
    assert loaded_by("import minigpt.__main__ as m; m.main(['--help'])") == set()


def test_help_is_much_faster_than_loading_torch() -> None:
    def fastest(times: int, *argv: str) -> float:
        spent = []
        for _ in range(times):
            start = time.perf_counter()
            assert python(*argv).returncode == 0
            spent.append(time.perf_counter() - start)
        return min(spent)

    # both in one run on one machine, so a ratio: about 0.03, and almost 1 if the help loaded torch
    assert fastest(3, "-m", "minigpt", "--help") < 0.5 * heavy()[1]


def test_no_verb_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert verbs.main([]) == 2
    assert "usage: minigpt VERB" in capsys.readouterr().out


def test_version() -> None:
    done = python("-m", "minigpt", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"minigpt {minigpt.__version__}\n", "")


@pytest.mark.parametrize(
    ("verb", "hint"),
    [
        ("trian", "did you mean 'train'?"),
        ("generat", "did you mean 'generate'?"),
        ("Train", "did you mean 'train'?"),
        ("xyzzy", f"known: {', '.join(verbs.COMMANDS)}"),
        ("--hlep", f"known: {', '.join(verbs.COMMANDS)}"),
        ("", f"known: {', '.join(verbs.COMMANDS)}"),
    ],
)
def test_an_unknown_verb(capsys: pytest.CaptureFixture[str], verb: str, hint: str) -> None:
    assert verbs.main([verb]) == 2
    assert capsys.readouterr() == ("", f"minigpt: error: unknown verb {verb!r}; {hint}\n")


def test_a_strange_verb_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert verbs.main(["a\n\x1b[31m\udc80"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert r"a\n\x1b[31m\udc80" in err


@pytest.mark.parametrize("verb", verbs.COMMANDS)
def test_a_verb_is_the_script_behind_it(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = verbs.COMMANDS[verb][0]
    script = ROOT / Path(*module.split(".")).with_suffix(".py")
    monkeypatch.chdir(tmp_path)
    as_verb = run_here([sys.executable, "-m", "minigpt", verb, "--no_such_flag"])
    is_the_tutorials = script.parent.name == "minigpt"
    way = [script] if is_the_tutorials else ["-m", module]
    other = run_here([sys.executable, *way, "--no_such_flag"])
    assert (as_verb.returncode, as_verb.stdout, other.returncode, other.stdout) == (2, "", 2, "")
    name, text = as_verb.stderr.split(": error: ")
    assert name == f"minigpt {verb}"
    assert text.startswith("unknown flag '--no_such_flag'; ")
    assert other.stderr == f"{script.name}: error: {text}"
    assert list(tmp_path.iterdir()) == []


EXIT_CODES = {
    "sys.exit()": 0,
    "sys.exit(0)": 0,
    "sys.exit(3)": 3,
    "pass": 0,
}


@pytest.mark.parametrize("code", EXIT_CODES)
def test_exit_codes_of_a_command_are_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    (tmp_path / "made_command.py").write_text(f"import sys\nprint(sys.argv)\n{code}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(verbs.COMMANDS, "try", ("made_command", ""))
    before = list(sys.argv)
    assert verbs.main(["try", "--flag"]) == EXIT_CODES[code]
    assert sys.argv == before


def test_a_command_that_exits_with_a_text_or_an_error_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for number, code in enumerate(["sys.exit('a text')", "raise KeyError('bug')", "raise KeyboardInterrupt"]):
        (tmp_path / f"made_command_{number}.py").write_text(f"import sys\n{code}\n")
        monkeypatch.setitem(verbs.COMMANDS, f"try{number}", (f"made_command_{number}", ""))
    with pytest.raises(SystemExit, match="a text"):
        verbs.main(["try0"])
    with pytest.raises(KeyError, match="bug"):
        verbs.main(["try1"])
    assert verbs.main(["try2"]) == 130
    assert capsys.readouterr().err == "minigpt try2: interrupted\n"


def test_the_installed_command_is_this_main() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert scripts == {"minigpt": "minigpt.__main__:main"}
