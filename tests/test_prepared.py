"""tests/prepared.py: its programs behave as processes that Python starts."""

import os
import signal
from pathlib import Path

from tests import prepared


def test_streams_arguments_folder_and_exit_code(tmp_path: Path) -> None:
    program = (
        "import os, sys; print(os.getcwd(), sys.argv, os.environ); print('错', file=sys.stderr); sys.exit(3)"
    )
    done = prepared.run("-c", program, "a", cwd=tmp_path, env={"ONE": "1"})
    assert done.stdout == f"{tmp_path} {['-c', 'a']} environ({{'ONE': '1'}})\n"
    assert (done.returncode, done.stderr) == (3, "错\n")


def test_an_error_is_shown() -> None:
    done = prepared.run("-c", "1 / 0")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "ZeroDivisionError: division by zero")


def test_nothing_of_minigpt_was_imported() -> None:
    done = prepared.run(
        "-c", "import sys; print([name for name in sys.modules if name.split('.')[0] == 'minigpt'])"
    )
    assert done.stdout == "[]\n"


def test_a_signal_ends_it() -> None:
    reading, writing = os.pipe()
    program = prepared.Program(["-c", "print(1, flush=True); input()"], (reading, writing, writing))
    assert program.poll() is None
    program.kill()
    assert program.wait() == -signal.SIGKILL
    os.close(reading)
    os.close(writing)
