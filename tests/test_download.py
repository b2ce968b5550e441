"""Downloads from a server in a thread. It works, breaks off, lies, stalls or refuses. No network is used."""

import contextlib
import http.server
import json
import os
import re
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minigpt.errors import InputError
from minigpt.families.gpt2.presets import HUGGING_FACE_FILES, OPENAI_FILES, preset, urls
from minigpt.weights.download import Patience, download_model, fetch

CONTENT = bytes(range(256)) * 4000  # a megabyte: several chunks, more than a socket's buffer


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves one file in full or in part; each request is answered by the next of the server's acts."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
        self.close_connection = True
        act = self.server.acts.pop(0) if self.server.acts else Handler.serve
        with contextlib.suppress(ConnectionError):
            act(self)

    def answer(self, status: int, body: bytes = b"", **headers: object) -> None:
        self.send_response(status)
        for name, value in ({"Content_Length": len(body)} | headers).items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def serve(self, body_end: int | None = None, **headers: object) -> None:
        """Answer like a good server. body_end: number of bytes after which it breaks off."""
        content, tag = self.server.content, self.server.tag
        found = re.fullmatch(r"bytes=([0-9]+)-", self.headers.get("Range") or "")
        start = int(found[1]) if found and self.headers.get("If-Range") in (None, tag) else 0
        if found and start >= len(content):
            self.answer(416, Content_Range=f"bytes */{len(content)}")
            return
        headers = {"Content_Length": len(content) - start, "ETag": tag} | headers
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.answer(206 if start else 200, content[start:body_end], **headers)

    def log_message(self, *_: object) -> None:
        pass


Act = Callable[[Handler], None]


class Server(http.server.ThreadingHTTPServer):
    """The server: its file, the requests that it got, and its next acts."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.tag = CONTENT, '"1"'
        self.requests: list[tuple[str, str | None, str | None]] = []
        self.acts: list[Act] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def ranges(self) -> list[str | None]:
        return [asked for _, asked, _ in self.requests]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def pauses() -> list[float]:
    return []


@pytest.fixture
def patience(pauses: list[float]) -> Patience:
    return Patience(timeout=5.0, attempts=4, pause=1.0, sleep=pauses.append)


@pytest.fixture
def goal(tmp_path: Path) -> Path:
    return tmp_path / "models" / "file"


def breaks_off(after: int) -> Act:
    return lambda handler: handler.serve(body_end=after)


def status(code: int) -> Act:
    return lambda handler: handler.answer(code, b"some words")


def names(goal: Path) -> list[str]:
    return sorted(path.name for path in goal.parent.iterdir()) if goal.parent.exists() else []


# -- a good server ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [CONTENT, b"x", b""])
def test_a_file(server: Server, patience: Patience, goal: Path, content: bytes) -> None:
    server.content = content
    fetch(f"{server.url}/a/file", goal, patience)
    assert goal.read_bytes() == content
    assert names(goal) == ["file"]
    assert server.requests == [("/a/file", None, None)]


def test_a_redirect_is_followed_also_when_going_on(server: Server, patience: Patience, goal: Path) -> None:
    def redirect(handler: Handler) -> None:
        handler.answer(302, Location="/elsewhere")

    server.acts = [redirect, breaks_off(5000), redirect]
    fetch(f"{server.url}/file", goal, patience)
    assert goal.read_bytes() == CONTENT
    assert [path for path, _, _ in server.requests] == ["/file", "/elsewhere"] * 2
    assert server.ranges() == [None, None, "bytes=5000-", "bytes=5000-"]


def test_chunks_without_a_length(server: Server, patience: Patience, goal: Path) -> None:
    def chunked(end: bytes) -> Act:
        body = b"%x\r\n%b\r\n" % (len(CONTENT), CONTENT) + end
        return lambda handler: handler.answer(200, body, Content_Length=None, Transfer_Encoding="chunked")

    server.acts = [chunked(b""), chunked(b"0\r\n\r\n")]  # the first one lacks the end
    fetch(f"{server.url}/file", goal, patience)
    assert goal.read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_a_plain_file_server(patience: Patience, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own server has Last-Modified, but no ETag and no ranges."""
    (tmp_path / "served").write_bytes(CONTENT)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)

    def handler(*arguments: object) -> http.server.SimpleHTTPRequestHandler:
        return http.server.SimpleHTTPRequestHandler(*arguments, directory=str(tmp_path))  # type: ignore[arg-type]

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            fetch(f"http://127.0.0.1:{server.server_port}/served", tmp_path / "file", patience)
        finally:
            server.shutdown()
            thread.join()
    assert (tmp_path / "file").read_bytes() == CONTENT


# -- going on -----------------------------------------------------------------------------------------------


def test_what_breaks_off_goes_on(
    server: Server,
    patience: Patience,
    pauses: list[float],
    goal: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.acts = [breaks_off(700_000), breaks_off(900_000)]
    fetch(f"{server.url}/file", goal, patience)
    assert goal.read_bytes() == CONTENT
    assert server.ranges() == [None, "bytes=700000-", "bytes=900000-"]
    assert [tag for _, _, tag in server.requests] == [None, '"1"', '"1"']
    assert pauses == [1.0, 1.0]  # each attempt brought something
    warning = "file: the connection broke off after 700,000 of 1,024,000 bytes; trying again in 1 s"
    assert warning in capsys.readouterr().err


def test_a_later_run_goes_on(server: Server, goal: Path) -> None:
    once = Patience(attempts=1)
    server.acts = [breaks_off(700_000)]
    with pytest.raises(InputError, match=r"broke off after .* 700,000 bytes are kept in file\.part"):
        fetch(f"{server.url}/file", goal, once)
    assert names(goal) == ["file.part", "file.part.json"]
    assert (goal.parent / "file.part").read_bytes() == CONTENT[:700_000]
    fetch(f"{server.url}/file", goal, once)
    assert server.ranges() == [None, "bytes=700000-"]
    assert goal.read_bytes() == CONTENT
    assert names(goal) == ["file"]


@pytest.fixture
def interrupted(server: Server, goal: Path) -> None:
    """Leave a part of the file, as an interrupted download does."""
    server.acts = [breaks_off(700_000)]
    with pytest.raises(InputError):
        fetch(f"{server.url}/file", goal, Patience(attempts=1))
    server.requests.clear()


@pytest.mark.usefixtures("interrupted")
def test_ranges_ignored(server: Server, patience: Patience, goal: Path) -> None:
    server.acts = [lambda handler: handler.answer(200, CONTENT)]
    fetch(f"{server.url}/file", goal, patience)
    assert server.ranges() == ["bytes=700000-"]
    assert goal.read_bytes() == CONTENT


@pytest.mark.usefixtures("interrupted")
def test_another_version_meanwhile(server: Server, patience: Patience, goal: Path) -> None:
    server.content, server.tag = CONTENT[::-1], '"2"'
    fetch(f"{server.url}/file", goal, patience)
    assert goal.read_bytes() == CONTENT[::-1]


@pytest.mark.usefixtures("interrupted")
@pytest.mark.parametrize(
    ("content", "tag"), [(CONTENT[::-1], '"2"'), (CONTENT + b"more", None), (CONTENT[:-1], None)]
)
def test_another_version_from_a_server_that_ignores_if_range(
    server: Server, patience: Patience, goal: Path, content: bytes, tag: str | None
) -> None:
    def part(handler: Handler) -> None:
        where = f"bytes 700000-{len(content) - 1}/{len(content)}"
        handler.answer(206, content[700_000:], Content_Range=where, ETag=tag)

    server.content, server.acts = content, [part]
    fetch(f"{server.url}/file", goal, patience)
    assert server.ranges() == ["bytes=700000-", None]
    assert goal.read_bytes() == content


@pytest.mark.usefixtures("interrupted")
@pytest.mark.parametrize(
    "where", [None, "", "bytes 0-1023999/1024000", "bytes 700001-1023999/1024000", "bytes 700000-1023998/*"]
)
def test_another_part_than_asked_for(
    server: Server, patience: Patience, goal: Path, where: str | None
) -> None:
    server.acts = [lambda handler: handler.answer(206, CONTENT[700_000:], Content_Range=where)]
    fetch(f"{server.url}/file", goal, patience)
    assert goal.read_bytes() == CONTENT


def test_a_part_that_nobody_asked_for(server: Server, patience: Patience, goal: Path) -> None:
    server.acts = [lambda handler: handler.answer(206, CONTENT, Content_Range="bytes 0-1023999/1024000")]
    with pytest.raises(InputError, match="the server answers 206"):
        fetch(f"{server.url}/file", goal, patience)


@pytest.mark.usefixtures("interrupted")
def test_killed_between_the_last_byte_and_the_name(server: Server, patience: Patience, goal: Path) -> None:
    (goal.parent / "file.part").write_bytes(CONTENT)
    fetch(f"{server.url}/file", goal, patience)
    assert server.ranges() == ["bytes=1024000-"]  # answered by 416: there is no more
    assert goal.read_bytes() == CONTENT


@pytest.mark.usefixtures("interrupted")
def test_more_than_the_file_has(server: Server, patience: Patience, goal: Path) -> None:
    (goal.parent / "file.part").write_bytes(CONTENT + b"?")
    fetch(f"{server.url}/file", goal, patience)
    assert server.ranges() == ["bytes=1024001-", None]
    assert goal.read_bytes() == CONTENT


@pytest.mark.usefixtures("interrupted")
@pytest.mark.parametrize(
    "notes", [None, "", "[]", '{"url": 3}', '{"url": "http://other", "length": 1, "tag": null}']
)
def test_a_part_of_nobody_knows_what(
    server: Server, patience: Patience, goal: Path, notes: str | None
) -> None:
    path = goal.parent / "file.part.json"
    path.unlink() if notes is None else path.write_text(notes)
    fetch(f"{server.url}/file", goal, patience)
    assert server.ranges() == [None]
    assert goal.read_bytes() == CONTENT


# -- a bad server -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [500, 503, 429, 408])
def test_a_busy_server_is_asked_again(
    server: Server, patience: Patience, pauses: list[float], goal: Path, code: int
) -> None:
    server.acts = [status(code)] * 3
    fetch(f"{server.url}/file", goal, patience)
    assert goal.read_bytes() == CONTENT
    assert pauses == [1.0, 2.0, 4.0]


def test_not_for_ever(server: Server, patience: Patience, pauses: list[float], goal: Path) -> None:
    server.acts = [status(500)] * 10
    with pytest.raises(InputError, match=r"/file cannot be downloaded: the server answers 500 .*, 4 times$"):
        fetch(f"{server.url}/file", goal, patience)
    assert len(server.requests) == 4
    assert pauses == [1.0, 2.0, 4.0]
    assert names(goal) == []


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410])
def test_a_refusal_is_final(server: Server, patience: Patience, goal: Path, code: int) -> None:
    server.acts = [status(code)]
    with pytest.raises(InputError, match=rf"/file cannot be downloaded: the server answers {code} \("):
        fetch(f"{server.url}/file", goal, patience)
    assert len(server.requests) == 1
    assert names(goal) == []


def test_a_length_that_is_too_long(server: Server, patience: Patience, goal: Path) -> None:
    server.acts = [lambda handler: handler.serve(Content_Length=len(CONTENT) + 50)] * 10
    with pytest.raises(InputError, match=r"cannot be downloaded"):
        fetch(f"{server.url}/file", goal, patience)
    assert not goal.exists()
    assert len(server.requests) <= 8  # an end, though each attempt brings bytes


def test_a_length_that_is_too_short_is_believed(server: Server, patience: Patience, goal: Path) -> None:
    """HTTP cannot show this error. OpenAI's checksums do, when the checkpoint is read."""
    server.acts = [lambda handler: handler.answer(200, CONTENT, Content_Length=len(CONTENT) - 50)]
    fetch(f"{server.url}/file", goal, patience)
    assert goal.read_bytes() == CONTENT[:-50]


@pytest.mark.parametrize("length", [None, "-5", "many", ""])
def test_no_length(server: Server, patience: Patience, goal: Path, length: str | None) -> None:
    server.acts = [lambda handler: handler.answer(200, CONTENT, Content_Length=length)]
    with pytest.raises(InputError, match="comes without its length"):
        fetch(f"{server.url}/file", goal, patience)


def test_compressed_though_not_asked_for(server: Server, patience: Patience, goal: Path) -> None:
    server.acts = [lambda handler: handler.answer(200, b"zip", Content_Encoding="gzip")]
    with pytest.raises(InputError, match="comes as gzip"):
        fetch(f"{server.url}/file", goal, patience)


def test_silence(server: Server, pauses: list[float], goal: Path) -> None:
    over = threading.Event()

    def stalls(handler: Handler) -> None:
        handler.serve(body_end=700_000)
        handler.wfile.flush()
        over.wait(30)

    server.acts = [stalls]
    try:
        fetch(f"{server.url}/file", goal, Patience(timeout=0.3, attempts=20, sleep=pauses.append))
    finally:
        over.set()
    assert goal.read_bytes() == CONTENT
    assert server.ranges() == [None, "bytes=700000-"]  # nothing of what had come was lost


def test_silence_before_the_first_word(server: Server, goal: Path) -> None:
    over = threading.Event()

    def waits(handler: Handler) -> None:
        over.wait(30)

    server.acts = [waits] * 2
    try:
        with pytest.raises(InputError, match="the server stopped answering, 2 times"):
            fetch(f"{server.url}/file", goal, Patience(timeout=0.1, attempts=2, sleep=lambda _: None))
    finally:
        over.set()


def test_nobody_listens(patience: Patience, goal: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # taken, but never listened at
        with pytest.raises(InputError, match=r"Connection refused, 4 times$"):
            fetch(f"http://127.0.0.1:{closed.getsockname()[1]}/file", goal, patience)


def test_no_network(
    patience: Patience, pauses: list[float], goal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is one line, comes at once, and says which files to put where."""

    def unknown_host(*_: object, **__: object) -> None:
        raise urllib.error.URLError(socket.gaierror(-2, "Name or service not known"))

    monkeypatch.setattr(urllib.request, "urlopen", unknown_host)
    with pytest.raises(InputError) as caught:
        download_model(goal.parent, urls(preset("124M")), patience)
    base = "https://openaipublic.blob.core.windows.net/gpt-2/models/124M"
    assert str(caught.value) == (
        f"{base}/checkpoint cannot be reached: Name or service not known. Without a network: put "
        f"{', '.join(OPENAI_FILES)} into {goal.parent}, from {base}/"
    )
    assert pauses == []
    assert not goal.parent.exists()


# -- the disk -----------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made(server: Server, patience: Patience, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file")
    with pytest.raises(InputError, match=r"cannot write .*file\.part"):
        fetch(f"{server.url}/file", tmp_path / "models" / "file", patience)
    assert server.requests == []


def test_a_full_disk(server: Server, patience: Patience, goal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot write .*file\.part: No space left on device"):
        fetch(f"{server.url}/file", goal, patience)
    assert len(server.requests) == 1, "not the network's fault: no second attempt"
    assert not goal.exists()


def test_two_at_once(server: Server, patience: Patience, goal: Path) -> None:
    """Both would append to the same part. The result must not get the file's name."""

    def disturbed(handler: Handler) -> None:
        with (goal.parent / "file.part").open("ab") as other:
            other.write(b"from elsewhere")
        handler.serve()

    server.acts = [breaks_off(700_000), disturbed]
    with pytest.raises(InputError, match="another program writes to it too"):
        fetch(f"{server.url}/file", goal, patience)
    assert not goal.exists()
    fetch(f"{server.url}/file", goal, patience)
    assert goal.read_bytes() == CONTENT


# -- whole models -------------------------------------------------------------------------------------------


def test_addresses() -> None:
    model = preset("gpt2-xl")
    base = "https://openaipublic.blob.core.windows.net/gpt-2/models/1558M/"
    assert urls(model) == {name: base + name for name in OPENAI_FILES}
    assert urls(model, "http://a.b/c/") == {name: f"http://a.b/c/1558M/{name}" for name in OPENAI_FILES}
    base = "https://hf.example/openai-community/gpt2-xl/resolve/main/"
    assert urls(model, None, "https://hf.example") == {name: base + name for name in HUGGING_FACE_FILES}
    assert urls(model, "http://a.b", "https://hf.example") == urls(model, "http://a.b")
    assert urls(model, "", "") == urls(model)


@pytest.mark.parametrize(
    "address", ["ftp://a.b", "a.b/c", "file:///c", "http://", "http://a b", "http://a\nb"]
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(InputError, match="mirror must be an address like"):
        urls(preset("124M"), address)
    with pytest.raises(InputError, match="HF_ENDPOINT must be an address like"):
        urls(preset("124M"), None, address)


def test_only_what_is_missing_is_fetched(server: Server, patience: Patience, tmp_path: Path) -> None:
    addresses = urls(preset("124M"), server.url)
    (tmp_path / "hparams.json").write_text("{}")
    server.acts = [Handler.serve, status(404)]
    with pytest.raises(InputError) as caught:
        download_model(tmp_path, addresses, patience)
    missing = [name for name in OPENAI_FILES if name not in ("checkpoint", "hparams.json")]
    assert f"put {', '.join(missing)} into {tmp_path}, from {server.url}/124M/" in str(caught.value)
    download_model(tmp_path, addresses, patience)
    assert {path.name for path in tmp_path.iterdir()} == set(OPENAI_FILES)
    assert (tmp_path / "hparams.json").read_text() == "{}"
    server.requests.clear()
    download_model(tmp_path, addresses, patience)
    assert server.requests == []


def test_notes_are_json(server: Server, goal: Path) -> None:
    server.acts = [breaks_off(10)]
    with pytest.raises(InputError):
        fetch(f"{server.url}/file", goal, Patience(attempts=1))
    notes = json.loads((goal.parent / "file.part.json").read_text())
    assert notes == {"url": f"{server.url}/file", "length": len(CONTENT), "tag": '"1"'}
