"""The wheel has all files and no others, and works with its declared dependencies only.

It is built offline, from a source distribution, and installed into an empty environment. The environment gets
links to the packages that `dependencies` in pyproject.toml names, and to their own dependencies; to no
others.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests import runs

ROOT = Path(__file__).parents[1]
SHIPPED = ("minigpt", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
BESIDE = ("tests", "data", "docs", "benchmarks", "gpt2.py")  # in the checkout, not in a distribution

# The steps of a user, in one process, so that torch is imported once.
USE = """
import contextlib, importlib.metadata, io, json, sys

import minigpt
from minigpt.__main__ import main

results = []
for argv in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    results.append((code, out.getvalue(), err.getvalue()))
files = [part.__file__ for name, part in sys.modules.items() if name.split(".")[0] == "minigpt"]
installed = [found.name for found in importlib.metadata.distributions()]
print(json.dumps({"results": results, "files": files, "installed": installed}))
"""


def call(*command: object, cwd: Path) -> str:
    """Run a command to its end, without the variables that tell Python where to import from."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: Path, output: Path) -> Path:
    """Make an "sdist" or a "wheel" of a folder. Return the file."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(output)!r})"
    before = set(output.iterdir())
    call(sys.executable, "-c", code, cwd=source)
    (made,) = set(output.iterdir()) - before
    return made


def closure(lines: Iterable[str]) -> set[str]:
    """Return the installed distributions that these requirements need, directly or indirectly."""
    found: dict[tuple[str, str], importlib.metadata.Distribution] = {}
    open_ = [(Requirement(line), "") for line in lines]
    while open_:
        requirement, wanted_by = open_.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": wanted_by}):
            continue
        distribution = importlib.metadata.distribution(requirement.name)
        for extra in ("", *requirement.extras):
            key = distribution.name, extra
            if key not in found:
                found[key] = distribution
                open_ += [(Requirement(line), extra) for line in distribution.requires or ()]
    return {name for name, _ in found}


def link(name: str, site: Path) -> None:
    """Link an installed distribution's packages, modules and metadata into a site-packages folder."""
    distribution = importlib.metadata.distribution(name)
    for file in distribution.files or ():
        if ".." in file.parts:  # a command, in the environment's bin
            continue
        here = Path(str(distribution.locate_file(""))).resolve()
        # a folder that is no package may belong to several distributions: google/, numpy.libs/
        depth = 1 if (here / file.parts[0] / "__init__.py").is_file() else 2
        part = Path(*file.parts[:depth])
        if not (site / part).is_symlink():
            (site / part).parent.mkdir(exist_ok=True)
            (site / part).symlink_to(here / part)


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Make a source distribution of the checkout, and the wheel from it."""
    source, output = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    for name in (*SHIPPED, *BESIDE):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(ROOT / name, source)
    sdist = build("sdist", source, output)
    with tarfile.open(sdist) as archive:
        # Python 3.11 has filters from 3.11.4 on; newer versions warn without one
        safely: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(source / "unpacked", **safely)
    (unpacked,) = (source / "unpacked").iterdir()
    return sdist, build("wheel", unpacked, output)


def package_files() -> set[str]:
    """Return the package's files in the checkout, by their names in the wheel."""
    paths = {path.relative_to(ROOT) for path in (ROOT / "minigpt").rglob("*") if path.is_file()}
    return {
        path.as_posix()
        for path in paths
        if not any(part.startswith((".", "__pycache__")) for part in path.parts)
    }


def test_the_wheel_has_the_package_s_files_and_no_others(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as archive:
        names = set(archive.namelist())
    info = f"minigpt-{project()['version']}.dist-info"
    assert {name for name in names if not name.startswith(info)} == package_files()
    assert f"{info}/licenses/LICENSE" in names
    suffixes = {Path(name).suffix for name in names}
    assert {".py", ".toml", ".jsonl", ".c", ".h", ".typed", ".mo"} <= suffixes, "all that the package opens"


def test_the_source_distribution_has_what_the_wheel_needs_and_no_more(
    distributions: tuple[Path, Path],
) -> None:
    with tarfile.open(distributions[0]) as archive:
        names = {Path(*Path(member.name).parts[1:]) for member in archive.getmembers() if member.isfile()}
    assert {name.as_posix() for name in names if name.parts[0] == "minigpt"} == package_files()
    made = {"PKG-INFO", "setup.cfg", "minigpt.egg-info"}
    assert {name.parts[0] for name in names} == {*SHIPPED, *made}


def test_the_installed_package_trains_and_answers(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    home, desk = tmp_path / "environment", tmp_path / "desk"
    venv.create(home, symlinks=True, with_pip=False)
    site, scripts = (Path(sysconfig.get_path(k, "venv", {"base": str(home)})) for k in ("purelib", "scripts"))
    python = scripts / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install"]
    call(*pip, "--quiet", "--no-index", "--no-deps", distributions[1], cwd=tmp_path)
    needed = closure(project()["dependencies"])
    for name in needed:
        link(name, site)

    desk.mkdir()
    runs.write_data(desk)
    (desk / "train.jsonl").rename(desk / "all.jsonl")
    model = desk / "run" / "best"
    commands = [
        ["vocab", "--data", "all.jsonl", "--output", "vocab.json"],
        ["split", "--input", "all.jsonl", "--output_dir", ".", "--train_ratio", "0.75", "--seed", "1"],
        ["stats", "--train_data", "train.jsonl", "--vocab_path", "vocab.json"],
        ["train", "--recipe", "qa-cpu", *runs.given(desk, max_steps=6)],
        ["eval", "--model", str(model), "--data", "val.jsonl", "--batch_size", "2"],
        ["doctor", "run", "--language", "en"],
        ["generate", "--model", str(model), "--question", "天是什么颜色？", "--json"],
    ]
    said = json.loads(call(python, "-c", USE, json.dumps(commands), cwd=desk).splitlines()[-1])
    for (verb, *_), (code, out, err) in zip(commands, said["results"], strict=True):
        assert code == 0, f"{verb}: {err}"
        assert out.strip(), verb
    answer = json.loads(said["results"][-1][1].splitlines()[-1])
    assert isinstance(answer["answer"], str)
    assert [name for name in said["files"] if not Path(name).is_relative_to(site)] == []
    assert set(said["installed"]) == {"minigpt", *needed}
    assert call(scripts / "minigpt", "--version", cwd=desk) == f"minigpt {project()['version']}\n"


def test_a_closure_follows_extras_and_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = {
        "first": ["second[fast]; python_version >= '3'", "absent; python_version < '3'"],
        "second": ["third; extra == 'fast'", "absent; extra == 'slow'"],
        "third": ["first"],
    }
    for name, lines in needs.items():
        metadata = tmp_path / f"{name}-1.0.dist-info" / "METADATA"
        metadata.parent.mkdir()
        required = "".join(f"Requires-Dist: {line}\n" for line in lines)
        metadata.write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n{required}")
    monkeypatch.syspath_prepend(tmp_path)
    assert closure(["first"]) == set(needs)
    assert closure(["second"]) == {"second"}
    with pytest.raises(importlib.metadata.PackageNotFoundError, match="absent"):
        closure(["second[slow]"])
