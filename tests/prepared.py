"""Starts Python programs as forks of a process that has imported torch, which takes 0.1 s instead of 2 s.

The fork has imported nothing of minigpt. It has its own arguments, streams, environment, session and exit
code, and it ends as a process does. Tests about imports, or about variables that Python or torch read when
they start, need a new process (subprocess).

The tests' own process cannot fork: after it has computed gradients with torch, its forks cannot compute any.
"""

import atexit
import contextlib
import functools
import gc
import io
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_STATUS = struct.Struct("i")


class Program:
    """A running program, with the methods of subprocess.Popen that tests use."""

    def __init__(
        self,
        argv: Sequence[str],
        streams: tuple[int, int, int],
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
        terminal: bool = False,
    ) -> None:
        """Start `python ARGV`. `terminal`: its standard input is a terminal, which it takes."""
        self.returncode: int | None = None
        self._ended, writing = os.pipe()
        job = {"argv": list(argv), "cwd": str(cwd), "env": dict(os.environ if env is None else env)}
        request = json.dumps({**job, "terminal": terminal}).encode()
        here = _parent()
        socket.send_fds(here, [struct.pack("Q", len(request))], [*streams, writing])
        os.close(writing)
        here.sendall(request)
        self.pid = int.from_bytes(_exactly(here, 8), "little")

    def poll(self) -> int | None:
        return self._wait(0.0)

    def wait(self, timeout: float = 60.0) -> int:
        code = self._wait(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("a prepared program", timeout)
        return code

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)

    def _wait(self, patience: float) -> int | None:
        if self.returncode is None and select.select([self._ended], [], [], patience)[0]:
            status = os.read(self._ended, _STATUS.size)
            os.close(self._ended)
            self.returncode = os.waitstatus_to_exitcode(_STATUS.unpack(status)[0])
        return self.returncode


def run(
    *argv: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None, patience: float = 300.0
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGV` to its end, without input, for at most `patience` seconds. Return code and output."""
    with (
        tempfile.TemporaryFile() as nothing,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        code = Program(argv, (nothing.fileno(), out.fileno(), err.fileno()), cwd, env).wait(patience)
        texts = [(stream.seek(0), stream.read().decode())[1] for stream in (out, err)]
    return subprocess.CompletedProcess(list(argv), code, *texts)


@functools.cache
def _parent() -> socket.socket:
    """Start the process whose forks the programs are. It ends with the tests."""
    here, there = socket.socketpair()
    with there:
        process = subprocess.Popen(
            [sys.executable, __file__, str(there.fileno())], pass_fds=[there.fileno()], cwd=ROOT,
            stdin=subprocess.DEVNULL, start_new_session=True, env={**os.environ, "PYTHONUTF8": "1"},
        )  # fmt: skip

    def end() -> None:
        here.close()
        process.wait()

    atexit.register(end)
    return here


def _exactly(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        piece = connection.recv(size - len(found))
        assert piece, "the process that forks has ended"
        found += piece
    return found


# -- in the process that forks ------------------------------------------------------------------------------


def _next_job(connection: socket.socket) -> dict[str, Any]:
    """Fork for each job. This returns the job in the fork; the process itself ends here with the tests."""
    while True:
        head, fds, _, _ = socket.recv_fds(connection, 8, 4)
        with contextlib.suppress(ChildProcessError):  # there is none
            while os.waitpid(-1, 0 if not head else os.WNOHANG)[0]:
                pass
        if not head:
            sys.exit()
        job: dict[str, Any] = json.loads(_exactly(connection, struct.unpack("Q", head)[0]))
        pid_read, pid_write = os.pipe()
        keeper = os.fork()
        if not keeper:
            # forks once more, and waits for that fork
            child = os.fork()
            if not child:
                _become(job, fds)
                return job
            os.write(pid_write, child.to_bytes(8, "little"))
            for fd in (*fds[:3], pid_write):
                os.close(fd)
            _, status = os.waitpid(child, 0)
            os.write(fds[3], _STATUS.pack(status))
            os._exit(0)
        connection.sendall(os.read(pid_read, 8))
        for fd in (*fds, pid_read, pid_write):
            os.close(fd)


def _become(job: dict[str, Any], fds: list[int]) -> None:
    """Take the streams, environment and folder of a job."""
    for number in range(3):
        os.dup2(fds[number], number)
    os.closerange(3, 256)
    os.setsid()
    if job["terminal"]:
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    sys.stdin = sys.__stdin__ = _text(0, "rb", "surrogateescape")  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = _text(1, "wb", "surrogateescape", os.isatty(1))  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _text(2, "wb", "backslashreplace", lines=True)  # type: ignore[misc]


def _text(number: int, mode: str, errors: str, lines: bool = False) -> io.TextIOWrapper:
    """Open a standard stream as Python does at its start."""
    return io.TextIOWrapper(open(number, mode, closefd=False), "utf-8", errors, line_buffering=lines)


def _main() -> None:
    import torch  # noqa: F401

    gc.freeze()  # garbage collection would copy the memory that the forks share
    job = _next_job(socket.socket(fileno=int(sys.argv[1])))
    program, *arguments = job["argv"]
    if program in ("-c", "-m"):
        what, *arguments = arguments
        sys.argv, sys.path[0] = [program, *arguments], str(Path.cwd()) if program == "-m" else ""
        if program == "-c":
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [program, *arguments], str(Path(program).resolve().parent)
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    _main()
