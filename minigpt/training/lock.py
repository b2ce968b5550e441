"""One run a folder, and one that makes shards in it: a lock that dies with its process.

The kernel's lock on FOLDER/.lock, by way of `filelock`. The file stays behind; it locks nothing by itself.
"""

import errno
from pathlib import Path

from filelock import FileLock, Timeout

from minigpt.console.terminal import warn
from minigpt.errors import InputError
from minigpt.storage.files import make_folder

__all__ = ["LOCK_FILE", "lock_folder"]

LOCK_FILE = ".lock"
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what such a file system answers


def lock_folder(folder: Path, wait: bool = False) -> FileLock:
    """Make a folder and take its lock. `release()` gives it back, and so does the end of the process.

    Args:
        folder: which one.
        wait: if another run holds it, say so in a line, and wait.

    Raises:
        InputError: if another run holds it; if the folder cannot be made or written to.
    """
    make_folder(folder)
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        held = f"{folder} is in use by another run"
        if not wait:
            raise InputError(f"{held}: wait for it, stop it, or choose another --output") from None
        print(f"{held}: waiting until it is done", flush=True)
        lock.acquire()
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise InputError(f"cannot write {folder / LOCK_FILE}: {error.strerror or error}") from None
        warn(f"{folder} cannot be locked ({error.strerror or error}): see that no second run writes there")
    return lock
