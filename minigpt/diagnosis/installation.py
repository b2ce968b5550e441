"""Collects facts about this installation and this machine, for bug reports.

    for fact in facts():
        for label, text in fact.lines.items(): ...     # for people
        fact.name, fact.data                            # for programs

Facts raise no errors: a fact that cannot be found out is "unknown", with the reason.
"""

import importlib.metadata
import os
import platform
import re
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from minigpt import __version__
from minigpt.generation.native_library import cache_folder, system_build
from minigpt.storage.json_files import read_toml
from minigpt.storage.regular_files import read_text

__all__ = ["Fact", "facts", "instructions", "processor"]

ROOT = Path(__file__).resolve().parents[2]  # root of the git checkout, or the folder of installed packages
CPUINFO, MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
_GIB = 2**30

# minigpt's name of an instruction set -> its names in /proc/cpuinfo (Linux) and in sysctl (macOS).
_X86 = {
    "AVX2": {"avx2", "avx2_0"},
    "AVX-512": {"avx512f"},
    "VNNI": {"avx512_vnni", "avx_vnni", "avx512vnni"},
    "BF16": {"avx512_bf16"},
    "AMX": {"amx_tile"},
}
_ARM = {
    "NEON": {"asimd", "neon", "advsimd"},
    "DOTPROD": {"asimddp", "feat_dotprod"},
    "I8MM": {"i8mm", "feat_i8mm"},
    "BF16": {"bf16", "feat_bf16"},
    "SVE": {"sve"},
}


class Fact(NamedTuple):
    """A fact, or the reason why it is unknown."""

    name: str
    lines: dict[str, str]  # label -> text, for people; most facts have one line
    data: Any  # the fact in types that JSON can hold, for programs


def facts() -> list[Fact]:
    """Return all facts, in the order in which they are printed."""
    probes = (
        ("minigpt", _minigpt),
        ("python", _python),
        ("platform", _platform),
        ("packages", _packages),
        ("processor", _processor),
        ("instructions", _instructions),
        ("cores", _cores),
        ("memory", _memory),
        ("native step", _native_step),
        ("gpu", _gpu),
        ("optional packages", _optional_packages),
    )
    return [_probed(name, probe) for name, probe in probes]


def _probed(name: str, probe: Callable[[], tuple[str | dict[str, str], Any]]) -> Fact:
    try:
        text, data = probe()
    except Exception as error:  # an error about one fact must not prevent the report of the others
        text = f"unknown: {_one_line(error)}"
        data = {"error": _one_line(error)}
    return Fact(name.replace(" ", "_"), text if isinstance(text, dict) else {name: text}, data)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _output(*command: str) -> str:
    """Return the output of a program. Raises OSError if it does not exist or fails."""
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, timeout=5, env=environment, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise OSError(f"{command[0]}: {done.stderr.decode('utf-8', 'replace').strip()}")
    return done.stdout.decode("utf-8", "replace").strip()


# -- what is installed --------------------------------------------------------------------------------------


def _minigpt() -> tuple[str, Any]:
    if not (ROOT / ".git").exists():
        return __version__, {"version": __version__, "commit": None}
    try:
        commit = _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*")
    except (OSError, subprocess.SubprocessError) as error:
        return f"{__version__}, commit unknown: {_one_line(error)}", {"version": __version__, "commit": None}
    return f"{__version__}, commit {commit}", {"version": __version__, "commit": commit}


def _python() -> tuple[str, Any]:
    version = platform.python_version()
    return f"{version} ({platform.python_implementation()})", version


def _platform() -> tuple[str, Any]:
    return platform.platform(), platform.platform()


def _requirements() -> list[tuple[str, str]]:
    """Return (package, group) for each package that minigpt uses. The group "" means: always needed.

    Other groups are pip's extras, such as "evaluate".
    """
    try:
        lines = importlib.metadata.requires("minigpt") or []
    # If minigpt runs from a git checkout and is not installed, read the requirements from pyproject.toml.
    except importlib.metadata.PackageNotFoundError:
        project = read_toml(ROOT / "pyproject.toml")["project"]
        groups = project["optional-dependencies"].items()
        lines = [f'{line}; extra == "{group}"' for group, names in groups for line in names]
        lines = [*project["dependencies"], *lines]
    found = []
    for line in lines:
        name, group = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"](.+?)['\"]", line)
        if name:
            found.append((name[0], group[1] if group else ""))
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> tuple[dict[str, str], Any]:
    found = {name: _version(name) for name, group in _requirements() if not group}
    return {name: version or "not installed" for name, version in found.items()}, found


def _optional_packages() -> tuple[dict[str, str], Any]:
    groups: dict[str, str] = {}
    for name, group in _requirements():
        if group:
            groups.setdefault(name, group)
    found = {name: _version(name) for name in groups}
    advice = {name: f"not installed (pip install 'minigpt[{group}]')" for name, group in groups.items()}
    return {name: version or advice[name] for name, version in found.items()}, found


# -- the machine --------------------------------------------------------------------------------------------


def _cpuinfo() -> dict[str, str]:
    """Return the first processor's entries in /proc/cpuinfo, keys in lower case; {} without that file."""
    try:
        text = read_text(CPUINFO, errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip().lower(): value.strip() for key, _, value in pairs}


def processor() -> str:
    """Return the processor's model name."""
    if name := _cpuinfo().get("model name"):
        return name
    try:
        if platform.system() == "Darwin":
            return _output("sysctl", "-n", "machdep.cpu.brand_string")
        if named := re.search(r"^Model name: *(.+)", _output("lscpu"), re.MULTILINE):
            return named[1]
    except (OSError, subprocess.SubprocessError):
        pass
    return platform.processor() or platform.machine()


def _processor() -> tuple[str, Any]:
    return processor(), processor()


def instructions() -> dict[str, bool]:
    """Return a dict: instruction set that matters for speed -> True if the processor has it.

    Raises:
        OSError: if the system does not list its instruction sets.
    """
    known = _ARM if platform.machine().lower() in ("arm64", "aarch64") else _X86
    info = _cpuinfo()
    there = {*info.get("flags", info.get("features", "")).lower().split()}
    if not there and platform.system() == "Darwin":
        lines = _output("sysctl", "hw.optional").lower().splitlines()
        there = {line.partition(":")[0].rpartition(".")[2] for line in lines if line.endswith(": 1")}
    if not there:
        raise OSError("the system does not list them")
    return {name: bool(names & there) for name, names in known.items()}


def _instructions() -> tuple[str, Any]:
    found = instructions()
    missing = [name for name, is_there in found.items() if not is_there]
    text = ", ".join(name for name, is_there in found.items() if is_there) or "none of those that matter"
    return f"{text}; not {', '.join(missing)}" if missing else text, found


def _cores() -> tuple[str, Any]:
    count = os.cpu_count()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else count
    data = {"cores": count, "usable": usable, "threads": None}
    text = str(count) if usable == count else f"{count}, of which this process may use {usable}"
    asked = os.environ.get("OMP_NUM_THREADS")
    why = f" (OMP_NUM_THREADS={asked})" if asked else ""
    try:
        import torch

        data["threads"] = torch.get_num_threads()
        return f"{text}; torch computes with {data['threads']} threads{why}", data
    except Exception as error:  # any error: a broken torch must be reported, too
        return f"{text}; torch's threads unknown: {_one_line(error) + why}", data


def _memory() -> tuple[str, Any]:
    try:
        text = read_text(MEMINFO, "ascii")
        sizes = {
            key: int(value) * 1024 for key, value in re.findall(r"^(\w+): *(\d+) kB", text, re.MULTILINE)
        }
        total, available = sizes["MemTotal"], sizes["MemAvailable"]
    except OSError:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return f"{total / _GIB:.1f} GiB", {"total": total, "available": None}
    data = {"total": total, "available": available}
    return f"{total / _GIB:.1f} GiB, {available / _GIB:.1f} GiB of it available", data


def _native_step() -> tuple[str, Any]:
    build = system_build()
    data: dict[str, Any] = {"available": build.library is not None, "reason": build.reason or None}
    data |= {"compiler": build.compiler or None, "path": _short(build.path)}
    if build.library is None:
        return f"not available: {build.reason}", data
    unkept = f"compiled anew for each process: nothing can be kept in {_short(cache_folder()) or 'a home'}"
    where = data["path"] or unkept
    return f"available: {build.compiler}, {where}", data


def _short(path: Path | None) -> str | None:
    """Return a path with "~" in place of the home folder, so that a bug report has no user's name."""
    try:
        return None if path is None else f"~/{path.relative_to(Path.home())}"
    except (ValueError, RuntimeError):
        return str(path)


def _gpu() -> tuple[str | dict[str, str], Any]:
    import torch

    # torch may warn, for example, that the driver is too old. The warning becomes a part of the fact.
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        is_there = torch.cuda.is_available()
    runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    if is_there:
        kinds = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        lines = {
            f"gpu {index}": f"{kind.name}, {kind.total_memory / _GIB:.1f} GiB, {runtime}"
            for index, kind in enumerate(kinds)
        }
        return lines, [{"name": k.name, "memory": k.total_memory, "runtime": runtime} for k in kinds]
    if torch.backends.mps.is_available():
        return "Apple's, by MPS; it shares the memory", [{"name": "MPS", "memory": None, "runtime": "MPS"}]
    if not torch.version.cuda and not torch.version.hip:
        return "none; this torch is built without CUDA", []
    why = "".join(f": {' '.join(str(one.message).split())}" for one in said[:1])
    return f"none that this torch (for {runtime}) can use{why}", []
