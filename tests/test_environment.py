"""`minigpt env` prints a line for each fact, whatever is broken, and the same as JSON."""

import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

from minigpt import __version__
from minigpt.diagnosis import installation
from minigpt.diagnosis.installation import Fact, facts
from minigpt.generation.native_library import Build
from tests.commands import RunCommand

ROOT = Path(__file__).parents[1]
PROBES = [name for name in vars(installation) if name in {f"_{fact.name}" for fact in facts()}]
AMD = "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512f avx512_vnni\n\nmodel name\t: B\n"
GRAVITON = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm bf16\nCPU part\t: 0xd40\n"


def fact(name: str) -> Fact:
    return next(one for one in facts() if one.name == name)


def line(name: str) -> str:
    """Return the text of a fact that has one line."""
    (text,) = fact(name).lines.values()
    return text


def failing(*_: Any, **__: Any) -> NoReturn:
    raise ValueError("broken\non purpose")


# -- the report ----------------------------------------------------------------------------------------------


def test_the_report_is_aligned_lines_and_the_same_as_json(run_command: RunCommand) -> None:
    plain, both = run_command("env"), run_command("env", "--json")
    assert (plain.code, plain.err, both.code, both.err) == (0, "", 0, "")
    *lines, last = both.out.splitlines()
    found = facts()
    expected = {label: text for one in found for label, text in one.lines.items()}
    # memory that is free changes
    assert [text for text in lines if not text.startswith("memory")] == [
        text for text in plain.out.splitlines() if not text.startswith("memory")
    ]
    width = max(map(len, expected)) + 2
    assert {text[:width].rstrip() for text in lines} == set(expected)
    assert all(text[:width].endswith("  ") and text[width:] == text[width:].strip() for text in lines)
    data = json.loads(last)
    assert list(data) == [one.name for one in found]
    for key in {"minigpt", "python", "packages", "native_step", "optional_packages"}:
        assert data[key] == fact(key).data
    assert f"minigpt{' ' * (width - 7)}{__version__}" in plain.out
    assert torch.__version__ in plain.out


def test_each_fact_has_a_probe_of_its_own() -> None:
    assert len(PROBES) == len(facts()) == 11


@pytest.mark.parametrize("probe", PROBES)
def test_a_probe_that_fails_says_so_in_its_line(
    probe: str, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installation, probe, failing)
    result = run_command("env", "--json")
    assert (result.code, result.err) == (0, "")
    label = probe[1:].replace("_", " ")
    assert re.search(rf"^{label} +unknown: ValueError: broken on purpose$", result.out, re.MULTILINE)
    data = json.loads(result.out.splitlines()[-1])
    assert {name for name, value in data.items() if value == {"error": "ValueError: broken on purpose"}} == {
        probe[1:]
    }


def test_everything_may_be_broken(run_command: RunCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # then `import torch` raises ImportError
    monkeypatch.setattr(subprocess, "run", failing)
    monkeypatch.setattr(installation, "system_build", failing)
    monkeypatch.setattr(importlib.metadata, "requires", failing)
    monkeypatch.setattr(installation, "CPUINFO", Path("nowhere"))
    monkeypatch.setattr(installation, "MEMINFO", Path("nowhere"))
    result = run_command("env")
    assert result.code == 0
    assert result.err == ""
    assert "unknown" in line("gpu")
    assert "torch's threads unknown: ModuleNotFoundError" in line("cores")
    assert "Traceback" not in result.out


def test_strange_characters_stay_in_their_line(
    run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installation, "processor", lambda: "a\n\x1b[31mb\udc80")
    assert "processor" in (out := run_command("env").out)
    assert r"a\n\x1b[31mb\udc80" in out


# -- what is installed ---------------------------------------------------------------------------------------


def test_the_commit_of_a_checkout() -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    if head.returncode:
        pytest.skip("this is no checkout, or there is no git")
    commit = fact("minigpt").data["commit"]
    assert head.stdout.startswith(commit.removesuffix("-dirty"))
    assert line("minigpt") == f"{__version__}, commit {commit}"


def test_no_commit_without_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "ROOT", tmp_path)  # even if it lies in somebody else's
    assert line("minigpt") == __version__
    (tmp_path / ".git").mkdir()  # a damaged one, or no git to ask
    assert line("minigpt").startswith(f"{__version__}, commit unknown: ")


@pytest.mark.parametrize("installed", [True, False])
def test_packages_are_those_of_pyproject(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = project["optional-dependencies"].items()
    optional = [f'{name}; extra == "{group}"' for group, names in groups for name in names]

    def requires(name: str) -> list[str]:
        assert name == "minigpt"
        if not installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return [*project["dependencies"], *optional]  # as setuptools writes them

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    names = {re.split(r"[^\w-]", text)[0] for text in project["dependencies"]}
    assert set(fact("packages").data) == names
    assert {"torch", "numpy", "safetensors", "tokenizers"} <= names
    assert set(fact("optional_packages").data) == {re.split(r"[^\w-]", text)[0] for text in optional}


def test_versions_and_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "9.9", "jax": "8.8"}

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    packages, optional = fact("packages"), fact("optional_packages")
    assert packages.lines["torch"] == packages.data["torch"] == "9.9"
    assert packages.lines["numpy"] == "not installed"
    assert packages.data["numpy"] is None
    assert optional.lines["jax"] == "8.8"
    assert optional.lines["matplotlib"] == "not installed (pip install 'minigpt[plot]')"
    assert optional.lines["pyarrow"] == "not installed (pip install 'minigpt[datasets]')"
    assert optional.data["matplotlib"] is None


# -- the machine ---------------------------------------------------------------------------------------------


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Return a function that simulates another processor."""

    def other(machine: str, text: str) -> None:
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(installation, "CPUINFO", tmp_path / "cpuinfo")
        if text:
            (tmp_path / "cpuinfo").write_text(text)

    return other


def test_a_processor_of_linux(cpuinfo: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo("x86_64", AMD)
    assert line("processor") == "AMD EPYC"
    assert line("instructions") == "AVX2, AVX-512, VNNI; not BF16, AMX"
    monkeypatch.setattr(
        installation, "_output", lambda *_: "Architecture: aarch64\nModel name:   Neoverse-V1\n"
    )
    cpuinfo("aarch64", GRAVITON)
    assert line("processor") == "Neoverse-V1"
    assert line("instructions") == "NEON, DOTPROD, I8MM, BF16; not SVE"
    assert fact("instructions").data["SVE"] is False


def test_a_processor_of_macos(cpuinfo: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        ("sysctl", "-n", "machdep.cpu.brand_string"): "Apple M2",
        ("sysctl", "hw.optional"): (
            "hw.optional.arm.FEAT_BF16: 1\nhw.optional.arm.FEAT_DotProd: 1\n"
            "hw.optional.arm.FEAT_I8MM: 0\nhw.optional.AdvSIMD: 1"
        ),
    }
    cpuinfo("arm64", "")
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(installation, "_output", lambda *command: said[command])
    assert line("processor") == "Apple M2"
    assert line("instructions") == "NEON, DOTPROD, BF16; not I8MM, SVE"


def test_a_processor_that_nothing_is_said_of(
    cpuinfo: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo("x86_64", "")
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(installation, "_output", failing_program)
    assert line("processor") == "x86_64"
    assert line("instructions").startswith("unknown: OSError: ")


def failing_program(*command: str) -> NoReturn:
    raise FileNotFoundError(command[0])


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert f"torch computes with {torch.get_num_threads()} threads (OMP_NUM_THREADS=7)" in line("cores")
    assert fact("cores").data["threads"] == torch.get_num_threads()


def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text(
        "MemTotal:       25165824 kB\nMemFree: 1 kB\nMemAvailable: 1048576 kB\n"
    )
    assert line("memory") == "24.0 GiB, 1.0 GiB of it available"
    assert fact("memory").data == {"total": 24 * 2**30, "available": 2**30}


def test_the_native_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    kept = tmp_path / "kept" / "native.so"
    monkeypatch.setattr(installation, "system_build", lambda: Build(object(), "", "gcc -m64", kept))
    assert line("native_step") == "available: gcc -m64, ~/kept/native.so"
    assert fact("native_step").data == {
        "available": True,
        "reason": None,
        "compiler": "gcc -m64",
        "path": "~/kept/native.so",
    }
    monkeypatch.setattr(installation, "system_build", lambda: Build(object(), "", "gcc"))
    assert line("native_step").startswith(
        "available: gcc, compiled anew for each process: nothing can be kept"
    )
    monkeypatch.setattr(installation, "system_build", lambda: Build(None, "gcc failed: no"))
    assert line("native_step") == "not available: gcc failed: no"
    assert fact("native_step").data["reason"] == "gcc failed: no"


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [SimpleNamespace(name="NVIDIA H200", total_memory=140 * 2**30)] * 2
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: kinds[index])
    assert fact("gpu").lines == {f"gpu {i}": "NVIDIA H200, 140.0 GiB, CUDA 12.8" for i in (0, 1)}
    assert fact("gpu").data == [{"name": "NVIDIA H200", "memory": 140 * 2**30, "runtime": "CUDA 12.8"}] * 2


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def old_driver() -> bool:
        warnings.warn("the driver is\ntoo old", UserWarning, stacklevel=1)
        return False

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert line("gpu") == "none; this torch is built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", old_driver)
    assert line("gpu") == "none that this torch (for CUDA 12.8) can use: the driver is too old"
    assert fact("gpu").data == []
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert "MPS" in line("gpu")
