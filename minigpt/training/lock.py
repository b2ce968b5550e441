"""One run a folder, and one that makes shards in it: a lock that dies with its process.

The lock is the kernel's (flock), on OUTPUT/.lock. What the file says, which process on which machine, is only
for the error's text: a file that a killed process left behind locks nothing.
"""

import json
import os
import socket
import time
from pathlib import Path
from typing import IO

from minigpt.console.terminal import warn
from minigpt.errors import InputError
from minigpt.storage.files import make_folder

__all__ = ["LOCK_FILE", "FolderLock"]

LOCK_FILE = ".lock"


class FolderLock:
    """The right to write into a run's folder, until the block ends or the process does.

    with FolderLock() as lock:
        lock.acquire(output)
    """

    def __init__(self) -> None:
        self._file: IO[str] | None = None

    def __enter__(self) -> "FolderLock":
        return self

    def acquire(self, folder: Path, wait: bool = False) -> None:
        """Take the folder's lock; of one that is held already nothing changes. Makes the folder.

        Args:
            wait: if another run holds it, say so in a line, and wait.

        Raises:
            InputError: if another run holds it, naming process and machine; if the folder cannot be made.
        """
        try:
            import fcntl
        except ImportError:  # Windows: two runs in one folder are not noticed there
            return
        make_folder(folder)
        path = folder / LOCK_FILE
        if self._file is not None:
            if path.exists() and os.path.samestat(os.fstat(self._file.fileno()), path.stat()):
                return
            self.release()  # the folder was moved away, and the lock with it
        try:
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            held = f"{folder} is in use by another run, {_described(file.read())}"
            if not wait:
                file.close()
                raise InputError(f"{held}: wait for it, stop it, or choose another --output") from None
            print(f"{held}: waiting until it is done", flush=True)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except BaseException:  # a signal
                file.close()
                raise
        except OSError as error:  # a file system without locks
            warn(f"{path} cannot be locked ({error.strerror or error}): see that no second run writes there")
        file.seek(0)
        file.truncate()
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}, file)
        file.flush()
        self._file = file

    def release(self) -> None:
        """Give the lock back. The file stays: deleting it would let two newcomers lock two files."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __exit__(self, *_: object) -> None:
        self.release()


def _described(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):  # it has only just begun
        return "whose process is not known yet"
