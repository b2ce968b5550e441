"""A lock on a folder, so that only one process at a time trains in it, or writes shards of encoded text.

The operating system holds the lock on FOLDER/.lock (package `filelock`), and releases it when the process
ends. The file stays in the folder, but the file alone locks nothing.
"""

import errno
from pathlib import Path

from filelock import FileLock, Timeout

from minigpt.console.command_line import show
from minigpt.console.terminal import warn
from minigpt.errors import InputError
from minigpt.storage.files import make_folder

__all__ = ["LOCK_FILE", "lock_folder"]

LOCK_FILE = ".lock"
# error codes of file systems without locks
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def lock_folder(folder: Path, wait: bool = False) -> FileLock:
    """Make a folder and lock it. `release()`, or the end of the process, unlocks it.

    Args:
        folder: the folder.
        wait: if True and another run has the lock, print a line and wait until it is released.

    Raises:
        InputError: if another run has the lock and `wait` is False, or if the folder cannot be written.
    """
    make_folder(folder)
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        held = f"{folder} is in use by another run"
        if not wait:
            raise InputError(f"{held}: wait for it, stop it, or choose another --output") from None
        show(f"{held}: waiting until it is done")
        lock.acquire()
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise InputError(f"cannot write {folder / LOCK_FILE}: {error.strerror or error}") from None
        warn(f"{folder} cannot be locked ({error.strerror or error}): see that no second run writes there")
    return lock
