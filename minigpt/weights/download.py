"""Downloads the files of a published model.

    download_model(Path("models/124M"), {"hparams.json": "https://..."})

A file is written to FILE.part, and renamed when it is complete. An interrupted download continues where it
stopped, if the file on the server is still the same. After a network error the download is tried again, with
growing pauses. Progress is shown on stderr.

This module does not check the content of the files. The code that reads them later does: for example, it
compares the weights of OpenAI's checkpoint with the checkpoint's checksums.
"""

import contextlib
import http.client
import json
import os
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from email.message import Message
from pathlib import Path

from minigpt.console.terminal import ProgressLine, seconds, warn
from minigpt.errors import InputError
from minigpt.storage.files import sync_folder
from minigpt.storage.json_files import read_json

__all__ = ["Patience", "download_model", "fetch"]

CHUNK = 1 << 18  # largest number of bytes that are read in one call


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a download waits, and how often it tries again."""

    timeout: float = 30.0  # the connection counts as broken if no byte arrives for this number of seconds
    attempts: int = 5  # the download fails after this number of successive attempts without a new byte
    pause: float = 1.0  # seconds before the second attempt; doubled before each further attempt
    sleep: Callable[[float], None] = time.sleep


class _DroppedError(Exception):
    """Raised for errors after which another attempt follows: a broken connection, a busy server."""


def download_model(folder: Path, addresses: dict[str, str], patience: Patience | None = None) -> None:
    """Download the files that are not yet in `folder`.

    Args:
        folder: the folder for the files.
        addresses: name of each file -> its URL.
        patience: timeout, attempts and pauses.

    Raises:
        InputError: if a file cannot be downloaded; the message says which files to put where by hand.
    """
    for name, url in addresses.items():
        if (folder / name).exists():
            continue
        try:
            fetch(url, folder / name, patience)
        except InputError as error:
            with contextlib.suppress(OSError):
                folder.rmdir()  # rmdir removes only an empty folder
            missing = [name for name in addresses if not (folder / name).exists()]
            raise InputError(
                f"{error}. Without a network: put {', '.join(missing)} into {folder}, "
                f"from {url.rpartition('/')[0]}/"
            ) from None


def fetch(url: str, goal: Path, patience: Patience | None = None) -> None:
    """Download one file. Continue from FILE.part if it is there.

    Raises:
        InputError: if the URL cannot be downloaded, or the file cannot be written.
    """
    patience = patience or Patience()
    attempts, furthest = 0, -1
    with _Part(goal) as part:
        while True:
            try:
                _continue(url, part, patience)
                break
            except _DroppedError as error:
                attempts = attempts + 1 if part.size <= furthest else 1
                furthest = max(furthest, part.size)
                if attempts >= patience.attempts:
                    kept = f"; {part.size:,} bytes are kept in {part.path.name}" if part.size else ""
                    raise InputError(f"{url} cannot be downloaded: {error}, {attempts} times{kept}") from None
                pause = patience.pause * 2 ** (attempts - 1)
                warn(f"{goal.name}: {error}; trying again in {seconds(pause)}")
            patience.sleep(pause)
        part.finish()


@dataclass(frozen=True)
class _Version:
    """Identifies one version of a file on a server, so that a change of the file there is noticed."""

    url: str
    length: int | None  # number of bytes of the whole file; None if the server does not say
    tag: str | None  # ETag of the file, or the time of its last change


class _Part:
    """An unfinished download.

    FILE.part holds the bytes so far. FILE.part.json says which version of the file they belong to.
    """

    def __init__(self, goal: Path) -> None:
        self.goal = goal
        self.path = goal.with_name(f"{goal.name}.part")
        self.notes = goal.with_name(f"{goal.name}.part.json")
        self.size = 0
        self.version: _Version | None = None

    def __enter__(self) -> "_Part":
        with self._explained():
            self.goal.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("ab")
        self.size = self.file.tell()
        with contextlib.suppress(ValueError, TypeError):
            self.version = _Version(**read_json(self.notes))
        if self.version is None:
            self.restart(None)  # begin again: the bytes so far may belong to another version of the file
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.file.close()
        with contextlib.suppress(OSError):
            if self.size == 0 and self.path.exists():
                self.path.unlink()
                self.notes.unlink(missing_ok=True)

    def restart(self, version: _Version | None) -> None:
        """Delete the bytes so far, and record which version of the file is downloaded now."""
        with self._explained():
            # delete the bytes first: FILE.part.json must never describe bytes of another version
            self.file.truncate(0)
            self.size, self.version = 0, version
            if version is not None:
                self.notes.write_text(json.dumps(asdict(version)) + "\n", encoding="utf-8")

    def write(self, data: bytes) -> None:
        """Append bytes to the file."""
        with self._explained():
            self.file.write(data)
        self.size += len(data)

    def finish(self) -> None:
        """Flush the file to the disk, and rename FILE.part to FILE."""
        with self._explained():
            self.file.flush()
            os.fsync(self.file.fileno())
            found = os.fstat(self.file.fileno()).st_size
            if found != self.size:
                self.restart(None)
                raise InputError(f"{self.path}: another program writes to it too; wait for it, or end it")
            self.file.close()
            self.path.replace(self.goal)
            self.notes.unlink(missing_ok=True)
            sync_folder(self.goal.parent)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror or error}") from None


def _continue(url: str, part: _Part, patience: Patience) -> None:
    """Make one attempt: download from the end of `part` to the end of the file.

    Raises:
        _DroppedError: for an error after which another attempt makes sense.
        InputError: for any other error.
    """
    # ask for no compression, because a compressed file would have another length
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "minigpt"})
    before = part.version
    if part.size and before is not None and before.url == url:
        request.add_header("Range", f"bytes={part.size}-")
        if before.tag:
            # If-Range: if the file has changed, the server sends the whole new file.
            request.add_header("If-Range", before.tag)
    else:
        part.restart(None)
    try:
        with urllib.request.urlopen(request, timeout=patience.timeout) as answer:
            assert isinstance(answer, http.client.HTTPResponse), "of an address that begins with http"
            length = _begin(url, part, answer.status, answer.headers)
            _receive(answer, part, length)
    except urllib.error.HTTPError as error:
        with error:
            _refused(url, part, error)
    except urllib.error.URLError as error:
        _unreachable(url, part, error.reason)
    except (http.client.HTTPException, OSError) as error:  # a timeout is an OSError, too
        raise _DroppedError(_words(error)) from None


def _begin(url: str, part: _Part, status: int, headers: Message) -> int | None:
    """Compare the server's headers with the bytes in FILE.part. Return the size of the whole file in bytes.

    The size is None if the server does not say it. If the server sends another version of the file, the bytes
    in FILE.part are deleted.
    """
    if headers.get("Content-Encoding", "identity") != "identity":
        raise InputError(f"{url} comes as {headers['Content-Encoding']}, which was not asked for")
    given = headers.get("Content-Length", "")
    body = int(given) if re.fullmatch(r"[0-9]{1,18}", given) else None
    if body is None and "chunked" not in headers.get("Transfer-Encoding", "").lower():
        raise InputError(f"{url} comes without its length: it could not be checked whether it is complete")
    tag = headers.get("ETag") or headers.get("Last-Modified")
    if tag and tag.startswith("W/"):  # a weak ETag does not promise equal bytes
        tag = headers.get("Last-Modified")
    if status == 206 and (before := part.version) is not None:
        found = re.fullmatch(r"bytes ([0-9]+)-([0-9]+)/([0-9]+)", headers.get("Content-Range", ""))
        first, last, total = map(int, found.groups()) if found else (-1, -1, -1)
        is_rest = (first, last + 1) == (part.size, total) and body in (None, total - first)
        is_same = before.length in (None, total) and (not tag or not before.tag or tag == before.tag)
        if not is_rest or not is_same:
            part.restart(None)
            raise _DroppedError("the server sent another part, or the file there has changed")
        return total
    if status != 200:
        raise InputError(f"{url} cannot be downloaded: the server answers {status}")
    # status 200 instead of 206: the server sends the file from its first byte
    part.restart(_Version(url, body, tag))
    return body


def _receive(answer: http.client.HTTPResponse, part: _Part, length: int | None) -> None:
    """Read the server's answer to its end and append it to `part`.

    Progress is shown in megabytes, because the last digits of a byte count would change too fast to read.
    """
    total = "?" if length is None else f"{length / 1e6:,.1f}"
    start, began = part.size, time.monotonic()
    with ProgressLine(f"{part.goal.name}:", (length or 0) // 10**6, patience=1.0) as progress:
        # read1 returns the bytes that came before an error; `read` would lose them
        while data := answer.read1(CHUNK):
            part.write(data)
            speed = (part.size - start) / 1e6 / max(time.monotonic() - began, 1e-3)
            progress.update(part.size // 10**6, f"MB ({total} in all), {speed:.1f} MB/s")
    if length is not None and part.size != length:
        raise _DroppedError(f"the connection broke off after {part.size:,} of {length:,} bytes")


def _refused(url: str, part: _Part, error: urllib.error.HTTPError) -> None:
    if error.code == 416:  # FILE.part has at least as many bytes as the file on the server
        total = error.headers.get("Content-Range", "").removeprefix("bytes */")
        if part.version is not None and total == str(part.size) == str(part.version.length):
            return
        part.restart(None)
        raise _DroppedError("the server has no such part of the file")
    if error.code in (408, 429) or error.code >= 500:
        raise _DroppedError(f"the server answers {error.code} ({error.reason})")
    hint = "there is no such file" if error.code == 404 else "it refuses"
    raise InputError(f"{url} cannot be downloaded: the server answers {error.code} ({error.reason}), {hint}")


def _unreachable(url: str, part: _Part, reason: object) -> None:
    # An unknown server name or a wrong certificate will not change in seconds: the download fails. Exception:
    # if some bytes have arrived before, the address is right, and a further attempt follows.
    if isinstance(reason, socket.gaierror | ssl.SSLCertVerificationError) and not part.size:
        raise InputError(f"{url} cannot be reached: {_words(reason)}") from None
    if not isinstance(reason, OSError):
        raise InputError(f"{url} cannot be reached: {reason}") from None
    raise _DroppedError(_words(reason)) from None


def _words(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "the server stopped answering"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())
