"""Atomic writing: an incomplete file never gets its final name. Also hashes, and a folder's manifest.

A file is written under a temporary name in the same folder, flushed to the disk, and then renamed. After a
crash, a full disk or Ctrl-C the old file is unchanged. A manifest lists the files of a folder with size and
checksum. Without a manifest, a flipped bit in a weight file would load without an error.

The checksum is XXH3, of 128 bits: it is computed about as fast as memory is read, much faster than SHA-256.
It finds damage. It cannot find a forgery, and neither could SHA-256: whoever can replace a weight file can
replace the manifest beside it.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from minigpt.errors import InputError, Message
from minigpt.storage.json_files import read_json
from minigpt.storage.regular_files import is_there, open_regular

__all__ = [
    "MANIFEST",
    "ManifestCheck",
    "atomic_folder",
    "atomic_open",
    "atomic_write",
    "make_folder",
    "reached",
    "sha256",
    "step_hook",
    "sync_folder",
    "verify_manifest",
]

MANIFEST = "manifest.json"
_BLOCK = 2**24  # largest number of bytes that are read and hashed in one call
# A file is read into a buffer of the file's size, but of at least _LEAST and at most _BLOCK bytes. (A file in
# /proc has size 0 although it has content.)
_LEAST = 2**16
_FORMAT = 2  # format number of new manifests; old manifests have format 1 and can still be read
_CHECKSUM = {1: "sha256", 2: "xxh3_128"}  # format number of a manifest -> name of its checksums
_HASHES: dict[str, Callable[[], Any]] = {"sha256": hashlib.sha256, "xxh3_128": xxhash.xxh3_128}
_CARD = "README.md"  # verify_manifest ignores this file, because a user may write or edit it later


def _no_hook(point: str) -> None:
    """Do nothing. The default of `step_hook`."""


# Called at each step of writing with the step's name ("model.safetensors: flushed"). The tests and a
# benchmark replace this hook, to kill the process or simulate a disk error at that step.
step_hook: Callable[[str], None] = _no_hook


def reached(point: str) -> None:
    """Call `step_hook` with the name of a step of writing that is now complete."""
    step_hook(point)


@contextlib.contextmanager
def atomic_open(path: Path | str) -> Iterator[BinaryIO]:
    """Open a new file for writing bytes. If the `with` block ends without an error, the file replaces `path`.

    If `path` is a link, its target is replaced. A device or pipe (/dev/null) is written to directly.

    Raises:
        InputError: if the file cannot be written; the message has the path, the reason and the free bytes.
    """
    goal = Path(os.path.realpath(path))
    temporary = _temporary_name(goal)
    with _explained(Path(path), goal, temporary):
        if goal.is_symlink():  # the link leads to itself, so realpath could not resolve it
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(goal))
        if Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a directory; a file name is needed", str(goal))
        if Path(path).exists() and not Path(path).is_file():
            with Path(path).open("wb") as device:  # write to a device such as /dev/null, never replace it
                yield device
            return
        _make_folder(goal.parent)
        try:
            with temporary.open("wb") as file:
                reached(f"{goal.name}: opened")
                yield file
                file.flush()
                reached(f"{goal.name}: written")
                os.fsync(file.fileno())
            reached(f"{goal.name}: flushed")
            if goal.exists():
                shutil.copymode(goal, temporary)
            temporary.replace(goal)
            reached(f"{goal.name}: renamed")
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    _sync_entry(goal)


def atomic_write(path: Path | str, content: str | bytes) -> None:
    """Write a file. After a crash, the path holds the old or the new content, never a part of the new one."""
    data = content.encode() if isinstance(content, str) else content
    with atomic_open(path) as file:
        file.write(data)


def atomic_folder(
    goal: Path, fill: Callable[[Path], None], before_rename: Callable[[], None] | None = None
) -> None:
    """Make the new folder `goal` atomically: fill a temporary folder, add a manifest, flush, rename.

    Args:
        goal: the folder. It must not exist, unless before_rename moves it away.
        fill: called with the temporary folder, into which it writes the files.
        before_rename: called when the temporary folder is complete and on the disk, just before it gets the
            name `goal`.

    Raises:
        InputError: if the folder cannot be written; the temporary folder is removed.
    """
    temporary = _temporary_name(goal)
    with _explained(goal, goal, temporary):
        if os.path.lexists(goal) and before_rename is None:
            raise FileExistsError(errno.EEXIST, "exists already", str(goal))
        _make_folder(goal.parent)
        if temporary.exists():
            shutil.rmtree(temporary)
        try:
            reached("folder: begun")
            temporary.mkdir()
            reached("folder: made")
            fill(temporary)
            reached("folder: filled")
            _write_manifest(temporary)
            reached("folder: flushed")
            if before_rename is not None:
                before_rename()
            temporary.rename(goal)
            reached("folder: renamed")
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    _sync_entry(goal)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, if they do not exist. Flush them, so that they survive a power cut.

    Raises:
        InputError: if a folder cannot be made; the message has the path, the reason and the free bytes.
    """
    with _explained(folder, folder, folder):
        _make_folder(folder)


def _make_folder(folder: Path) -> None:
    new = [level for level in (folder, *folder.parents) if not level.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # a parent folder is a file; Python's "File exists" would be misleading
        text = f"{os.strerror(errno.ENOTDIR)}: {folder}"
        raise NotADirectoryError(errno.ENOTDIR, text, str(folder)) from None
    for level in new:
        with contextlib.suppress(PermissionError):  # we may have no right to open some parent folders
            sync_folder(level.parent)


def _temporary_name(goal: Path) -> Path:
    return goal.parent / f".{goal.name}.tmp-{os.getpid()}"


@contextlib.contextmanager
def _explained(name: Path, goal: Path, temporary: Path) -> Iterator[None]:
    """Convert an OSError to an InputError that names the path that the user gave."""
    try:
        yield
    except InputError as error:  # the message gets the user's path instead of the temporary path
        raise InputError(str(error).replace(str(temporary), str(name))) from error
    except OSError as error:
        culprit = goal if error.filename is None else Path(os.fsdecode(error.filename))
        is_ours = culprit in (name, goal, temporary, *goal.parents) or temporary in culprit.parents
        if isinstance(error, BrokenPipeError) or not is_ours:
            raise  # an error about another file keeps its own message
        raise InputError(f"cannot write {name}: {_reason(error, goal)}; nothing was changed") from error


def _reason(error: OSError, goal: Path) -> str:
    folder = next((folder for folder in goal.absolute().parents if os.access(folder, os.R_OK)), Path())
    return f"{error.strerror or error} ({shutil.disk_usage(folder).free:,} bytes free there)"


def _sync_entry(goal: Path) -> None:
    """Flush the folder that contains `goal`, after a file or folder was renamed to `goal`.

    If this fails, a power cut could undo the rename. The InputError says so.
    """
    try:
        sync_folder(goal.parent)
        reached(f"{goal.name if goal.is_file() else 'folder'}: parent flushed")
    except OSError as error:
        raise InputError(
            f"{goal} is written, but may be lost in a power cut: {_reason(error, goal)}"
        ) from error


def sync_folder(folder: Path) -> None:
    """Flush a folder to the disk. Only then does a rename survive a power cut."""
    if os.name == "nt":  # Windows cannot open a folder to flush it
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # EINVAL, ENOTSUP: some network file systems cannot flush folders. This is no reason for an error.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sha256(path: Path | str) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    return _digest(path, "sha256")


def _digest(path: Path | str, name: str) -> str:
    """Return the hexadecimal hash of a file, by the function `name` of `_HASHES`."""
    with open_regular(path) as file:
        size = min(max(os.fstat(file.fileno()).st_size, _LEAST), _BLOCK) + 1
        digest, block = _HASHES[name](), memoryview(bytearray(size))
        while count := file.readinto(block):
            digest.update(block[:count])
        return str(digest.hexdigest())


def _write_manifest(folder: Path) -> None:
    """Write manifest.json with size and checksum of every file in the folder, and flush all files."""
    files = {}
    for path in sorted(folder.iterdir()):
        digest = _digest(path, _CHECKSUM[_FORMAT])
        reached(f"{path.name}: hashed")
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        files[path.name] = {"size": path.stat().st_size, _CHECKSUM[_FORMAT]: digest}
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        reached("manifest: opened")
        json.dump({"format": _FORMAT, "files": files}, file, indent=2)
        file.flush()
        reached("manifest: written")
        os.fsync(file.fileno())
    reached("manifest: flushed")
    sync_folder(folder)


def verify_manifest(folder: Path | str, weights: bool = True) -> None:
    """Compare every file of a folder with its manifest.json, except README.md, which may change at any time.

    Links are followed, because download caches consist of links.

    Args:
        folder: the folder.
        weights: True: compare size and hash of .safetensors files. False: compare only their size, so that
            they need not be read.

    Raises:
        InputError: if a file is missing, additional, or differs in size or hash; the message names it.
    """
    folder = Path(folder)
    expected = _read_manifest(folder / MANIFEST)
    present = {entry.name for entry in folder.iterdir()} - {MANIFEST}
    for name in sorted((expected.keys() | present) - {_CARD}):
        path = folder / name
        if name not in expected:
            raise InputError(
                f"{path} is not listed in {MANIFEST}: remove it, or the folder is not what was saved"
            )
        if name not in present or not path.is_file():
            raise InputError(f"{path} is listed in {MANIFEST} but missing")
        size, checksum, digest = expected[name]
        actual = path.stat().st_size
        if actual != size:
            text = "{path} has {actual} bytes, {manifest} says {size}: damaged"
            raise InputError(Message(text, path=path, actual=actual, manifest=MANIFEST, size=size))
        if (weights or path.suffix != ".safetensors") and _digest(path, checksum) != digest:
            text = "{path} does not match its checksum in {manifest}: damaged"
            raise InputError(Message(text, path=path, manifest=MANIFEST))


class ManifestCheck:
    """Compares a folder with its manifest in a thread, while the caller reads the same files.

        with ManifestCheck(folder):
            model = read(folder)
        # here the folder is undamaged: otherwise the end of the block has raised an InputError

    A folder without a manifest passes. The thread starts at the beginning of the `with` block, or earlier if
    `start` is called.

    Raises:
        InputError: at the end of the `with` block, if `verify_manifest` finds an error. If the block has
            raised an error, too, the InputError replaces it, because a damaged file may be its cause.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._error: Exception | None = None
        self._first, self._done = threading.Lock(), threading.Event()

    def start(self) -> None:
        """Start the thread. A second call does nothing."""
        if self._first.acquire(blocking=False):
            try:
                threading.Thread(target=self._compare, daemon=True).start()
            except RuntimeError:  # the system gives no new thread
                self._compare()

    def _compare(self) -> None:
        try:
            if is_there(self.folder / MANIFEST):
                verify_manifest(self.folder)
        except Exception as error:
            self._error = error
        self._done.set()

    def __enter__(self) -> None:
        """Start the thread, if it is not started yet."""
        self.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the thread. Raise the error that it found, if any. After Ctrl-C, do nothing."""
        if kind is None or issubclass(kind, Exception):
            self._done.wait()
            if self._error is not None:
                raise self._error from None


def _read_manifest(path: Path) -> dict[str, tuple[int, str, str]]:
    """Read a manifest.json. Returns a dict: file name -> (size in bytes, name of the hash, hash)."""
    manifest = read_json(path, missing="this folder was not written completely")
    try:
        version, files = manifest.pop("format"), manifest.pop("files")
        if checksum := "" if manifest else _CHECKSUM.get(version):
            return {name: (int(one["size"]), checksum, str(one[checksum])) for name, one in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise InputError(f"{path} is damaged: not the JSON that was written") from None
    raise InputError(f"{path} is damaged, or of a later format than this minigpt knows: {version!r:.80}")
