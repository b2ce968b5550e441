"""Compiling native.c gives a library or a reason. Kept libraries are checked. There is one warning."""

import dataclasses
import os
import shlex
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM
from minigpt.families.registry import LanguageModel
from minigpt.generation import native, native_library
from minigpt.generation.api import GenerationOptions, generate_ids, stream_ids
from minigpt.generation.engine import Engine
from minigpt.generation.model_runner import TorchRunner
from minigpt.generation.native import NativeRunner, NativeStepWarning, runner_for
from minigpt.generation.native_library import Build, build, cache_folder, system_build
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.storage.files import sha256
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.training.run_data import read_data
from minigpt.weights.pretrained import AnyTokenizer, save_pretrained
from minigpt.weights.quantized import set_precision
from tests.commands import RunCommand
from tests.marks import compiled
from tests.runs import config, write_data

ROOT = Path(__file__).parents[1]
posix = pytest.mark.skipif(os.name == "nt", reason="the compiler is a shell script")


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], str]:
    """Return a function that makes a compiler from some lines of shell, and returns its path."""

    def make(lines: str) -> str:
        path = tmp_path / "compiler"
        path.write_text(f"#!/bin/sh\n{lines}\n", encoding="utf-8")
        path.chmod(0o755)
        return str(path)

    return make


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the library once. `copying` makes compilers that only copy it."""
    if kept := system_build().path:
        return kept
    made = build(shlex.split(system_build().compiler), cache=tmp_path_factory.mktemp("shipped"))
    assert made.path is not None, made.reason
    return made.path


@pytest.fixture
def copying(script: Callable[[str], str], shipped: Path, tmp_path: Path) -> tuple[str, Path]:
    """Make a compiler that copies the library to the path after -o, and a file that counts its calls."""
    calls = tmp_path / "calls"
    calls.touch()
    find = 'while [ "$1" != "-o" ]; do shift; done'
    return script(f"echo once >> '{calls}'\n{find}\ncp '{shipped}' \"$2\""), calls


def count(calls: Path) -> int:
    return len(calls.read_text().splitlines())


# -- why there is none ---------------------------------------------------------------------------------------

NO_HEADER = "native.c:19:10: fatal error: omp.h: No such file or directory"
COMPLAINTS = {  # output of a compiler -> minigpt's reason
    "": " failed with exit code 1",
    "cannot compute": " failed: cannot compute",
    "native.c:5:1: warning: odd\nnative.c:7:1: error: worse\n  7 | x\n    ^\ncompilation terminated.": (
        " failed: native.c:7:1: error: worse"
    ),
    "/usr/bin/ld: cannot find -lm\ncollect2: error: ld returned 1 exit status": (
        " failed: /usr/bin/ld: cannot find -lm"
    ),
    f"{NO_HEADER}\ncompilation terminated.": f" has no OpenMP: {NO_HEADER}",
    "/usr/bin/ld: cannot find -lomp: No such file\nclang: error: linker command failed": (
        " has no OpenMP: /usr/bin/ld: cannot find -lomp: No such file"
    ),
    "clang: error: unsupported option '-fopenmp'": (
        " has no OpenMP: clang: error: unsupported option '-fopenmp'"
    ),
    "gcc: fatal error: cannot read spec file 'libgomp.spec'": (
        " has no OpenMP: gcc: fatal error: cannot read spec file 'libgomp.spec'"
    ),
}


@posix
@pytest.mark.parametrize("said", COMPLAINTS)
def test_what_a_compiler_complains_of(said: str, script: Callable[[str], str], tmp_path: Path) -> None:
    compiler = script(f"printf '%s' {shlex.quote(said)} >&2; exit 1")
    made = build([compiler], cache=tmp_path / "cache")
    assert made == Build(None, f"{compiler}{COMPLAINTS[said]}", compiler)
    assert not (tmp_path / "cache").exists()
    assert build([compiler], shown="CC='x'").reason == f"CC='x'{COMPLAINTS[said]}"


@posix
@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("exit 0", " wrote no library"),
        ('while [ "$1" != "-o" ]; do shift; done; echo nonsense > "$2"', "the library cannot be loaded: "),
        ("kill -9 $$", " failed with exit code -9"),
    ],
)
def test_compilers_that_say_nothing(lines: str, reason: str, script: Callable[[str], str]) -> None:
    made = build([script(lines)])
    assert made.library is None
    assert reason in made.reason
    assert len(made.reason.splitlines()) == 1


@compiled
@posix
def test_another_library_is_not_taken_for_it(script: Callable[[str], str], tmp_path: Path) -> None:
    (tmp_path / "other.c").write_text("int other(void) { return 1; }\n")
    command = f"{system_build().compiler} -shared -fPIC '{tmp_path}/other.c' -o"
    made = build([script(f'while [ "$1" != "-o" ]; do shift; done; {command} "$2"')])
    assert made.library is None
    assert made.reason.startswith("the library cannot be loaded: ")
    assert "minigpt_scratch" in made.reason


@posix
def test_a_compiler_that_does_not_end(script: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_library, "_PATIENCE", 0.1)
    compiler = script("exec sleep 60")
    assert build([compiler]).reason == f"{compiler} took more than 0.1 s"


def test_a_compiler_that_cannot_be_started(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("")
    assert "could not be started: " in build([str(text)]).reason
    reason = build([str(tmp_path / "nothing"), "-x"]).reason
    assert reason == f"{tmp_path / 'nothing'} -x could not be started: No such file or directory"


def test_no_place_to_compile_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(Path("nowhere", "at all")))
    assert build(["cc"]).reason == "no temporary folder to compile in: No such file or directory"


# -- which compiler ------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Return a function that gives the arguments of `system_build`'s build, without building."""
    monkeypatch.setattr(native_library, "build", lambda *given, **more: (given, more))
    return native_library.system_build.__wrapped__


def test_cc_may_have_arguments(asked: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "ccache 'my cc' -m64")
    (command,), more = asked()
    assert command == ["ccache", "my cc", "-m64"]
    assert more["shown"] == """CC="ccache 'my cc' -m64\""""
    assert more["cache"] == cache_folder()


def test_cc_that_cannot_be_read(asked: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "'gcc")
    assert asked() == Build(None, """CC="'gcc" cannot be read: No closing quotation""")


@posix
@pytest.mark.parametrize("cc", [None, "", " "])
def test_else_the_first_on_path(
    cc: str | None, asked: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", cc or "")
    if cc is None:
        monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert asked() == Build(None, "no C compiler (cc, gcc or clang) on PATH")
    for name in ("clang", "gcc", "cc"):
        (tmp_path / name).touch(0o755)
        assert asked()[0] == ([str(tmp_path / name)],)


def test_the_reason_names_cc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no such compiler")
    made = native_library.system_build.__wrapped__()
    assert made.reason == "CC='no such compiler' could not be started: No such file or directory"


def test_asked_twice_built_once() -> None:
    assert system_build() is system_build()
    assert native.library() is system_build().library


# -- what is kept --------------------------------------------------------------------------------------------


@compiled
@posix
def test_it_is_compiled_once_and_kept(copying: tuple[str, Path], tmp_path: Path) -> None:
    compiler, calls = copying
    first, second = (build([compiler], cache=tmp_path / "a" / "b") for _ in range(2))
    assert first.library is not None
    assert first[1:] == second[1:] == ("", compiler, first.path)
    assert [first.path] == list((tmp_path / "a" / "b").iterdir())
    assert count(calls) == 1
    assert build([compiler], ["-O1"], tmp_path / "a" / "b").path != first.path
    assert count(calls) == 2


@compiled
@posix
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "gone"])
def test_a_damaged_library_is_built_anew(damage: str, copying: tuple[str, Path], tmp_path: Path) -> None:
    compiler, calls = copying
    path = build([compiler], cache=tmp_path / "cache").path
    assert path is not None
    whole = path.read_bytes()
    # Replace the file instead of changing it, because this process has loaded the old one.
    path.unlink()
    if damage != "gone":
        flipped = whole[:9000] + bytes([whole[9000] ^ 1]) + whole[9001:]
        path.write_bytes({"cut": whole[:9000], "flipped": flipped, "empty": b""}[damage])
    again = build([compiler], cache=tmp_path / "cache")
    assert again.library is not None
    assert again.path == path
    assert path.read_bytes() == whole
    assert count(calls) == 2


@compiled
@posix
def test_a_library_that_does_not_load_here_is_built_anew(copying: tuple[str, Path], tmp_path: Path) -> None:
    """The library is complete, but was made on another system with the same home folder."""
    compiler, calls = copying
    cache = tmp_path / "cache"
    name = build([compiler], cache=cache).path
    assert name is not None
    foreign = tmp_path / "foreign.so"
    foreign.write_bytes(b"of another system")
    kept = cache / f"{name.stem[: -len(name.stem.split('-')[-1])]}{sha256(foreign)}.so"
    name.unlink()
    foreign.rename(kept)
    made = build([compiler], cache=cache)
    assert made.library is not None
    assert made.path == name
    assert count(calls) == 2
    assert kept.exists(), "the other system still wants it"


@compiled
@posix
@pytest.mark.parametrize("why", ["no home", "not a folder"])
def test_where_nothing_can_be_kept_it_is_compiled_for_each_process(
    why: str,
    copying: tuple[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    compiler, calls = copying
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    cache = None if why == "no home" else calls / "cache"
    for times in (1, 2):
        made = build([compiler], cache=cache)
        assert made.library is not None
        assert made[1:] == ("", compiler, None)
        assert count(calls) == times
    assert list(temporary.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@posix
def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a"))
    assert cache_folder() == tmp_path / "a" / "minigpt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "minigpt"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert cache_folder() is None


# -- the warning ---------------------------------------------------------------------------------------------

BLOCK = 48
TOKENIZER = Tokenizer.from_word2id(build_vocabulary("天地日月？"))
seen = pytest.mark.filterwarnings("always:no native step:RuntimeWarning")
TWO = GenerationOptions(max_new_tokens=2)


def gpt(tokenizer: AnyTokenizer = TOKENIZER) -> LanguageModel:
    return GPTLMHeadModel(GPTConfig(16, 1, 1, 0.0, BLOCK, tokenizer.get_vocab_size()))


def qwen3() -> LanguageModel:
    return Qwen3ForCausalLM(Qwen3Config(TOKENIZER.get_vocab_size(), 16, 20, 1, 2, 1, 8, BLOCK))


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> str:
    """Simulate a system without a compiler. Return the reason."""
    monkeypatch.setattr(native, "system_build", lambda: Build(None, "no C compiler"))
    monkeypatch.setattr(native, "_was_said", False)  # as in a new process
    return "no C compiler"


@pytest.fixture
def shown(without: str, monkeypatch: pytest.MonkeyPatch) -> list[Warning | str]:
    """Collect the warnings and messages that a user without a compiler sees."""
    messages: list[Warning | str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: messages.append(message))
    return messages


@seen
def test_it_comes_once_and_is_one_line(shown: list[Warning | str]) -> None:
    model, small = gpt(), set_precision(qwen3(), "int8")
    assert isinstance(runner_for(model), TorchRunner)
    for _ in range(2):
        generate_ids(model, [[1, 2]], TWO, None)
    engine = Engine(small)
    engine.submit([1, 2], TWO)
    engine.run()
    assert len(shown) == 1
    assert isinstance(shown[0], NativeStepWarning)
    assert isinstance(shown[0], RuntimeWarning)
    assert len(str(shown[0]).splitlines()) == 1
    assert str(shown[0]).startswith("no native step (no C compiler): ")
    assert str(shown[0]).endswith("; install gcc or clang, with OpenMP")


@seen
@pytest.mark.parametrize(
    "way", ["generate", "stream", "engine", "window", "guesses", "assistant", "beams", "no cache"]
)
def test_every_way_to_an_answer_warns(way: str, shown: list[Warning | str]) -> None:
    model = gpt()
    if way == "engine":
        Engine(model)
    elif way == "stream":
        list(stream_ids(model, TOKENIZER, [1, 2], TWO))
    elif way == "assistant":
        generate_ids(model, [[1, 2]], TWO, None, assistant_model=gpt())
    else:
        more: dict[str, Any] = {"window": {"window": 9}, "guesses": {"prompt_lookup_num_tokens": 2}}
        more |= {"beams": {"num_beams": 2}, "no cache": {"use_cache": False}}
        generate_ids(model, [[1, 2]], dataclasses.replace(TWO, **more.get(way, {})), None)
    assert len(shown) == 1


@seen
@pytest.mark.parametrize("what", ["float64", "int4", "a sample in training"])
def test_no_warning_where_it_does_not_matter(what: str, shown: list[Warning | str], tmp_path: Path) -> None:
    if what == "a sample in training":
        write_data(tmp_path)
        data = read_data(config(tmp_path))
        assert data.sample(gpt(data.tokenizer), 0)
        assert isinstance(runner_for(gpt()), TorchRunner)
        assert len(shown) == 1, "it may still be said later"
        return
    model = gpt().double() if what == "float64" else set_precision(gpt(), "int4")
    generate_ids(model, [[1, 2]], TWO, None)
    assert shown == []


@compiled
@pytest.mark.filterwarnings("error:no native step:RuntimeWarning")
def test_no_warning_where_there_is_one() -> None:
    assert isinstance(runner_for(gpt()), NativeRunner)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make the folder of a model that gives some answer."""
    save_pretrained(gpt(), tmp_path / "model", TOKENIZER)
    (tmp_path / "data.jsonl").write_text('{"question": "天", "answer": "地"}\n', encoding="utf-8")
    return tmp_path / "model"


@seen
@pytest.mark.parametrize("verb", ["generate", "chat", "eval"])
def test_commands_print_it_as_they_print_every_warning(
    verb: str, without: str, folder: Path, run_command: RunCommand
) -> None:
    flags: list[object] = ["--model", folder, "--device", "cpu", "--max_new_tokens", 2]
    if verb == "eval":
        flags += ["--data", folder.parent / "data.jsonl"]
    stdin = "天\n地\n".encode()
    result = run_command(verb, *flags, stdin=stdin)
    assert result.code == 0
    warned = [line for line in result.err.splitlines() if "native step" in line]
    assert len(warned) == 1
    assert warned[0].startswith(f"warning: no native step ({without}): ")
    assert "native step" not in result.out
    assert "native step" not in run_command(verb, *flags, stdin=stdin).err, "once a process"


def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    """The process has Python's own warning filters, and a compiler that cannot be started."""
    code = (
        "from minigpt.generation.api import GenerationOptions, generate_ids\n"
        "from minigpt.model import GPTConfig, GPTLMHeadModel\n"
        "model = GPTLMHeadModel(GPTConfig(16, 1, 1, 0.0, 48, 9))\n"
        "import warnings\n"
        "for _ in range(3):\n"
        "    generate_ids(model, [[1, 2]], GenerationOptions(max_new_tokens=2), None)\n"
        "    warnings.simplefilter('ignore', UserWarning)  # after this Python forgets what it has shown\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CC": "no such compiler"}
    environment.pop("PYTHONWARNINGS", None)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("NativeStepWarning: no native step (CC='no such compiler' could not be") == 1
    assert done.stderr.count("native step") == 1
    assert done.stdout == ""
