"""native.c as a library that is loaded: compiled at first use, kept in the user's cache folder, checked.

    build = system_build()          # once a process, with this system's compiler: about two seconds
    build.library or build.reason   # one of the two

What is kept bears its SHA-256 in its name and is loaded only if that is still true: a library that is cut
short kills the process that calls it. Where nothing can be kept, the library is compiled for each process.

No torch here: `minigpt env` asks before that is loaded.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minigpt.storage.files import sha256

__all__ = ["FLAGS", "Build", "build", "cache_folder", "system_build"]

SOURCE, PRODUCTS = (Path(__file__).with_name(name) for name in ("native.c", "products.h"))
# -ffp-contract=off: compilers would join products and sums in one place and not in another, and a token's
# bits would depend on how many there are
FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
    *("-shared", "-fPIC"),
)
COMPILERS = ("cc", "gcc", "clang")
_PATIENCE = 60  # seconds; two are usual


class Build(NamedTuple):
    """The result of building the library: the library, or why there is none."""

    library: Any | None  # a ctypes.CDLL
    reason: str = ""  # one line: why there is none
    compiler: str = ""  # the command, without flags
    path: Path | None = None  # where the library is kept; None: it could not be


class _BuildError(Exception):
    """The text is the reason."""


@functools.cache
def system_build() -> Build:
    """The library as this process uses it: built with CC, or the first of cc, gcc and clang on PATH."""
    named = os.environ.get("CC", "")
    try:
        command = shlex.split(named)  # CC may hold several words: "ccache gcc" is common
    except ValueError as error:
        return Build(None, f"CC={named!r} cannot be read: {error}")
    if command:
        return build(command, cache=cache_folder(), shown=f"CC={named!r}")
    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    if found is None:
        return Build(None, "no C compiler (cc, gcc or clang) on PATH")
    return build([found], cache=cache_folder())


def cache_folder() -> Path | None:
    """Where libraries are kept between processes; None for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minigpt"
    except RuntimeError:
        return None


def build(
    compiler: Sequence[str], flags: Sequence[str] = FLAGS, cache: Path | None = None, shown: str = ""
) -> Build:
    """Compile and load the library, or load the one that was kept; nothing outside `cache` changes.

    Args:
        compiler: the command, without flags.
        cache: folder to keep the library in; None, or one that cannot be written: it is compiled anew.
        shown: the compiler in a reason; the command, if left out.
    """
    command = shlex.join(compiler)
    name = f"native-{_key(compiler, flags)}"
    for kept in _kept(cache, name):
        with contextlib.suppress(_BuildError):  # made on another system, with the same home
            return Build(_load(kept), compiler=command, path=kept)
    try:
        with tempfile.TemporaryDirectory(prefix="minigpt-", ignore_cleanup_errors=True) as folder:
            made = Path(folder) / "native.so"
            _compile(compiler, flags, made, shown or command)
            try:
                kept = _keep(made, cache, name)
                return Build(_load(kept), compiler=command, path=kept)
            except (OSError, _BuildError):  # read-only, full, or not to be executed from
                return Build(_load(made), compiler=command)
    except _BuildError as error:
        return Build(None, str(error), command)
    except OSError as error:
        return Build(None, f"no temporary folder to compile in: {error.strerror or error}", command)


def _key(compiler: Sequence[str], flags: Sequence[str]) -> str:
    # -march=native: another machine with the same home folder must not run it
    texts = [file.read_text(encoding="utf-8") for file in (SOURCE, PRODUCTS)]
    parts = [*texts, *flags, *compiler, platform.machine(), _processor()]
    return hashlib.sha256(chr(0).join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _processor() -> str:
    """What instructions the processor has, as far as the system says."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in text.splitlines() if line.startswith(("flags", "Features"))}))


def _kept(cache: Path | None, name: str) -> list[Path]:
    """The whole libraries of this name; damaged ones are removed."""
    whole = []
    with contextlib.suppress(OSError):
        for path in sorted(cache.glob(f"{name}-*.so")) if cache else ():
            if path.stem == f"{name}-{sha256(path)}":
                whole.append(path)
            else:
                path.unlink()
    return whole


def _keep(made: Path, cache: Path | None, name: str) -> Path:
    """Copy a library into the cache folder; an error if that cannot be."""
    if cache is None:
        raise FileNotFoundError("no folder to keep it in")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as folder:  # whole, or not there
        return Path(shutil.copy(made, folder)).replace(cache / f"{name}-{sha256(made)}.so")


def _compile(compiler: Sequence[str], flags: Sequence[str], goal: Path, shown: str) -> None:
    try:
        done = subprocess.run(
            [*compiler, *flags, "-o", str(goal), str(SOURCE), "-lm"],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PATIENCE,
            env={**os.environ, "LC_ALL": "C"},  # complaints in English, for what looks for words in them
        )
    except subprocess.TimeoutExpired:
        raise _BuildError(f"{shown} took more than {_PATIENCE} s") from None
    except OSError as error:
        raise _BuildError(f"{shown} could not be started: {error.strerror or error}") from None
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace")
        raise _BuildError(_complaint(shown, said) or f"{shown} failed with exit code {done.returncode}")
    if not goal.is_file():
        raise _BuildError(f"{shown} wrote no library")


def _complaint(shown: str, said: str) -> str:
    """One line of what a compiler printed: about OpenMP, else the first about an error, else the last."""
    lines = [" ".join(line.split()) for line in said.splitlines() if line.strip()]
    openmp = [line for line in lines if re.search(r"(?<!\w)(-fopenmp|-l\w?omp5?|omp\.h|lib\w?omp)\b", line)]
    if openmp:
        return f"{shown} has no OpenMP: {openmp[0]}"
    errors = [line for line in lines if re.search(r"\berror\b|cannot find|undefined", line)]
    return "".join(f"{shown} failed: {line}" for line in errors[:1] or lines[-1:])


def _load(path: Path) -> Any:
    try:
        library = ctypes.CDLL(str(path))
        library.minigpt_scratch.restype = ctypes.c_int64
    except (OSError, AttributeError) as error:
        raise _BuildError(f"the library cannot be loaded: {' '.join(str(error).split())}") from None
    return library
