"""Compiles native.c at first use, keeps the library in the user's cache folder, and loads it.

    build = system_build()    # compiles at the first call in a process, which takes about two seconds
    build.library             # a ctypes.CDLL, or None: build.reason then says why

The name of a library file in the cache folder contains the SHA-256 of its content. Before the file is loaded,
its content is hashed again and must give the same SHA-256, because an incomplete library would crash the
process. If the cache folder cannot be written, each process compiles the library again.

This module does not import torch, because `minigpt env` uses it before torch is loaded.
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
from minigpt.storage.regular_files import read_text

__all__ = ["FLAGS", "Build", "build", "cache_folder", "system_build"]

SOURCE, PRODUCTS = (Path(__file__).with_name(name) for name in ("native.c", "products.h"))
# -ffp-contract=off forbids fused multiply-adds. A compiler would use them in some loops and not in others,
# so the bits of a token's logits would depend on the number of tokens in the call.
FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
    *("-shared", "-fPIC"),
)
COMPILERS = ("cc", "gcc", "clang")
_PATIENCE = 60  # largest number of seconds for compiling, which usually takes two


class Build(NamedTuple):
    """The result of compiling native.c: the loaded library, or the reason why there is none."""

    library: Any | None  # a ctypes.CDLL
    reason: str = ""  # one line that says why there is no library
    compiler: str = ""  # the compiler's command, without flags
    path: Path | None = None  # file of the library in the cache folder; None: no such file is used


class _BuildError(Exception):
    """native.c cannot be compiled, or the result cannot be loaded. The text of the error is the reason."""


@functools.cache
def system_build() -> Build:
    """Compile and load native.c. Use the compiler $CC, or else the first of cc, gcc and clang on PATH."""
    named = os.environ.get("CC", "")
    try:
        command = shlex.split(named)  # CC may hold several words, such as "ccache gcc"
    except ValueError as error:
        return Build(None, f"CC={named!r} cannot be read: {error}")
    if command:
        return build(command, cache=cache_folder(), shown=f"CC={named!r}")
    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    if found is None:
        return Build(None, "no C compiler (cc, gcc or clang) on PATH")
    return build([found], cache=cache_folder())


def cache_folder() -> Path | None:
    """Return the folder for compiled libraries, or None if the user has no home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minigpt"
    except RuntimeError:
        return None


def build(
    compiler: Sequence[str], flags: Sequence[str] = FLAGS, cache: Path | None = None, shown: str = ""
) -> Build:
    """Load the compiled native.c from the folder `cache`. If it is not there, compile it first, into `cache`.

    If no library can be loaded, the result's `library` is None and `reason` says why.

    Args:
        compiler: the compiler's command, without flags.
        cache: folder for compiled libraries. If it cannot be written, the library is compiled each time.
        shown: name of the compiler in the error message. Default: the command.
    """
    command = shlex.join(compiler)
    name = f"native-{_key(compiler, flags)}"
    for kept in _kept(cache, name):
        # a library that was compiled on another system may fail to load; native.c is then compiled again
        with contextlib.suppress(_BuildError):
            return Build(_load(kept), compiler=command, path=kept)
    try:
        with tempfile.TemporaryDirectory(prefix="minigpt-", ignore_cleanup_errors=True) as folder:
            made = Path(folder) / "native.so"
            _compile(compiler, flags, made, shown or command)
            try:
                kept = _keep(made, cache, name)
                return Build(_load(kept), compiler=command, path=kept)
            except (OSError, _BuildError):  # the cache folder is read-only, full, or allows no execution
                return Build(_load(made), compiler=command)
    except _BuildError as error:
        return Build(None, str(error), command)
    except OSError as error:
        return Build(None, f"no temporary folder to compile in: {error.strerror or error}", command)


def _key(compiler: Sequence[str], flags: Sequence[str]) -> str:
    # The key is a part of the library's file name. It depends on the processor, because machines with
    # different processors may share a home folder: code compiled with -march=native may crash on another
    # processor.
    texts = [read_text(file) for file in (SOURCE, PRODUCTS)]
    parts = [*texts, *flags, *compiler, platform.machine(), _processor()]
    return hashlib.sha256(chr(0).join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _processor() -> str:
    """Return the processor's instruction sets as a text, or its name if they are unknown, or ""."""
    try:
        text = read_text("/proc/cpuinfo")
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in text.splitlines() if line.startswith(("flags", "Features"))}))


def _kept(cache: Path | None, name: str) -> list[Path]:
    """Return the libraries in the cache folder whose names begin with `name`. Delete damaged libraries."""
    whole = []
    with contextlib.suppress(OSError):
        for path in sorted(cache.glob(f"{name}-*.so")) if cache else ():
            if path.stem == f"{name}-{sha256(path)}":
                whole.append(path)
            else:
                path.unlink()
    return whole


def _keep(made: Path, cache: Path | None, name: str) -> Path:
    """Copy a library into the cache folder and return its path there. Raise OSError if this fails."""
    if cache is None:
        raise FileNotFoundError("no folder to keep it in")
    cache.mkdir(parents=True, exist_ok=True)
    # Copy to a temporary folder, then rename the copy: another process never sees an incomplete library.
    with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as folder:
        return Path(shutil.copy(made, folder)).replace(cache / f"{name}-{sha256(made)}.so")


def _compile(compiler: Sequence[str], flags: Sequence[str], goal: Path, shown: str) -> None:
    try:
        done = subprocess.run(
            [*compiler, *flags, "-o", str(goal), str(SOURCE), "-lm"],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PATIENCE,
            env={**os.environ, "LC_ALL": "C"},  # LC_ALL=C: English messages, which `_complaint` can search
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
    """Return the line of a compiler's output that explains the failure best.

    The best line is a line about OpenMP, or else the first error, or else the last line.
    """
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
