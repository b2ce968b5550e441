"""Opens files for reading, but only regular files, because another kind of file could block the program.

    with open_regular(path) as file: ...     # binary
    read_bytes(path), read_text(path)

Opening a pipe waits until another program writes to it. Reading a device such as /dev/zero never ends. If a
file cannot be opened, an OSError is raised, whose text has the path. A caller may convert it to a clearer
error.
"""

import errno
import io
import os
import stat
from pathlib import Path

__all__ = ["MOST_BYTES", "is_there", "open_regular", "read_bytes", "read_text", "resolved"]

MOST_BYTES = 2**30  # largest number of bytes of a file that is read into memory as a whole

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
# A path that begins with one of these texts may be a pipe that the shell made for `<(...)` or `|`.
_OF_THE_SHELL = ("/dev/fd/", "/dev/stdin", "/proc/")


def open_regular(path: Path | str, *, or_pipe: bool = False) -> io.BufferedReader:
    """Open a regular file for reading, or raise an error immediately.

    Args:
        path: the file. Links are followed.
        or_pipe: also open a pipe that the shell passes as `<(...)` or /dev/stdin.

    Raises:
        OSError: if the file cannot be opened, or is a directory, a pipe, a device or a socket.
    """
    # Without O_NONBLOCK, opening a pipe would wait until another program writes to it.
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    try:
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
        if kind == stat.S_IFIFO and or_pipe and str(path).startswith(_OF_THE_SHELL):
            os.set_blocking(descriptor, True)
        elif kind == stat.S_IFDIR:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        elif kind != stat.S_IFREG:
            what = f"is no regular file, but {_KINDS.get(kind, 'something else')}"
            raise OSError(errno.EINVAL, what, str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def is_there(path: Path | str) -> bool:
    """Return True if a file, folder or link has this path. A link counts even if its target is missing."""
    return os.path.lexists(path)


def resolved(path: Path | str) -> Path:
    """Return the absolute path, with all links followed. A link to itself is no error: it is not followed."""
    return Path(os.path.realpath(path))


def read_bytes(path: Path | str, *, or_pipe: bool = False, max_bytes: int = MOST_BYTES) -> bytes:
    """Return the bytes of a regular file.

    Args:
        path: the file.
        or_pipe: as in `open_regular`.
        max_bytes: a larger file raises an OSError, because it may not fit into memory.
    """
    with open_regular(path, or_pipe=or_pipe) as file:
        if (
            os.fstat(file.fileno()).st_size > max_bytes
            or len(content := file.read(max_bytes + 1)) > max_bytes
        ):
            raise OSError(errno.EFBIG, f"is too large: more than {max_bytes:,} bytes are not read", str(path))
        return content


def read_text(path: Path | str, encoding: str = "utf-8", errors: str = "strict") -> str:
    """Return the text of a regular file, with "\\n" at the end of each line.

    Raises:
        OSError: as `open_regular`.
        UnicodeDecodeError: if the bytes are not text in this encoding.
    """
    with io.TextIOWrapper(io.BytesIO(read_bytes(path)), encoding, errors) as text:
        return text.read()
