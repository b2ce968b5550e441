"""Whatever fails, a file is the old or the new one. A folder agrees with its manifest, or it is refused."""

import contextlib
import errno
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import Mock

import pytest
import xxhash

from minigpt.errors import InputError
from minigpt.storage import files
from minigpt.storage.files import (
    MANIFEST,
    ManifestCheck,
    atomic_folder,
    atomic_open,
    atomic_write,
    sha256,
    verify_manifest,
)

OLD, NEW = b"old content", "新的内容".encode() * 1000
CONTENTS = {"config.json": b'{"n_layer": 2}\n', "model.safetensors": bytes(range(256)) * 4, "empty": b""}


def fill(folder: Path) -> None:
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "step-00000001"
    atomic_folder(folder, fill)
    return folder


# After an interrupt between `open` and `with`, the garbage collector closes the file, with a warning.
unclosed = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def no_space(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt(*_: object, **__: object) -> Any:
    raise KeyboardInterrupt


@contextlib.contextmanager
def interrupted_at(line: int) -> Iterator[list[int]]:
    """Raise KeyboardInterrupt before the `line`-th executed line of files.py, like Ctrl-C at any time."""
    count = [0]

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename != files.__file__:
            return None
        if event == "line":
            count[0] += 1
            if count[0] == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


# -- one file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["四川\n", b"\x00\xff", "", "a\r\nb"])
def test_written_bytes_are_the_given_ones(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "new" / "folder" / "file"
    atomic_write(path, content)
    assert path.read_bytes() == (content.encode("utf-8") if isinstance(content, str) else content)
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("failure", [no_space, interrupt])
@pytest.mark.parametrize("where", ["fsync", "replace", "open"])
def test_a_failing_call_changes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    failure: Callable[..., Any],
    existing: bool,
) -> None:
    path = tmp_path / "vocab.json"
    if existing:
        path.write_bytes(OLD)
    with monkeypatch.context() as patch:
        patch.setattr(io if where == "open" else os, where, failure)
        with pytest.raises(InputError if failure is no_space else KeyboardInterrupt) as caught:
            atomic_write(path, NEW)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == (
        {"vocab.json": OLD} if existing else {}
    )
    if failure is no_space:
        text = str(caught.value)
        assert "\n" not in text
        assert text.startswith(f"cannot write {path}: No space left on device (")
        assert "bytes free there" in text
        assert text.endswith("nothing was changed")
        assert ".tmp-" not in text


def test_a_disk_that_refuses_bytes_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (100, hard)
    )  # the kernel's own refusal, in the middle of a write
    try:
        with pytest.raises(InputError, match="File too large"):
            atomic_write(path, NEW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == OLD
    assert names(tmp_path) == ["file"]


def test_an_error_in_the_block_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    with pytest.raises(OSError, match="half way"), atomic_open(path) as file:  # noqa: PT012
        file.write(NEW)
        raise FileNotFoundError(errno.ENOENT, "half way", "another file")
    assert path.read_bytes() == OLD
    assert names(tmp_path) == ["file"]


@unclosed
def test_ctrl_c_at_any_line_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    outcomes = []
    for line in range(1, 200):
        path.write_bytes(OLD)
        with interrupted_at(line) as executed:
            try:
                atomic_write(path, NEW)
            except KeyboardInterrupt:
                pass
            else:
                break
        content = path.read_bytes()
        assert content in (OLD, NEW), line
        assert names(tmp_path) == ["file"], line
        outcomes.append(content)
    assert executed[0] < line, "the loop must have run past the last line"
    assert {OLD, NEW} == set(outcomes), "interrupted both before and after the rename"


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    code = (
        "import sys; from minigpt.storage.files import atomic_write\n"
        "while True:\n"
        "    for byte in b'ab':\n"
        "        atomic_write(sys.argv[1], bytes([byte]) * 3_000_000); print(flush=True)\n"
    )
    for lines in (2, 3, 5):
        child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        with child.stdout:
            for _ in range(lines):
                child.stdout.readline()
            child.kill()
            child.wait()
        content = path.read_bytes()
        assert len(content) == 3_000_000
        assert len(set(content)) == 1


def test_a_failed_flush_of_the_folder_does_not_claim_that_nothing_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    monkeypatch.setattr(files, "sync_folder", no_space)
    with pytest.raises(InputError, match="is written, but may be lost") as caught:
        atomic_write(path, NEW)
    assert "nothing was changed" not in str(caught.value)
    assert path.read_bytes() == NEW


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_file_systems_that_cannot_flush_folders_are_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    atomic_write(tmp_path / "file", NEW)
    assert (tmp_path / "file").read_bytes() == NEW


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_follows_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        atomic_write(tmp_path / "file", NEW)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


def test_new_folders_are_flushed_into_their_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(files, "sync_folder", flushed.append)
    files.make_folder(tmp_path / "a" / "b")
    assert sorted(flushed) == [tmp_path, tmp_path / "a"]
    files.make_folder(tmp_path / "a" / "b")
    assert len(flushed) == 2
    (tmp_path / "file").write_bytes(OLD)
    with pytest.raises(InputError, match=r"cannot write .*file: Not a directory: .* bytes free"):
        files.make_folder(tmp_path / "file")


def test_an_old_file_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    path.chmod(0o751)
    atomic_write(path, NEW)
    assert stat.S_IMODE(path.stat().st_mode) == 0o751


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_written_through(tmp_path: Path, exists: bool) -> None:
    goal, middle, link = tmp_path / "elsewhere" / "goal", tmp_path / "middle", tmp_path / "link"
    goal.parent.mkdir()
    if exists:
        goal.write_bytes(OLD)
    middle.symlink_to(Path("elsewhere") / "goal")
    link.symlink_to(middle)
    atomic_write(link, NEW)
    assert link.is_symlink()
    assert middle.is_symlink()
    assert goal.read_bytes() == NEW


def test_a_link_that_leads_back_to_itself_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(InputError, match=r"a: Too many levels of symbolic links"):
        atomic_write(tmp_path / "a", NEW)
    assert names(tmp_path) == ["a", "b"]


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is a directory; a file name is needed"):
        atomic_write(tmp_path, NEW)
    assert names(tmp_path) == []
    with pytest.raises(InputError, match="is a directory"):
        atomic_write("/", NEW)


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(OLD)
    with pytest.raises(InputError, match=r"cannot write .*file.vocab\.json: Not a directory|File exists"):
        atomic_write(tmp_path / "file" / "vocab.json", NEW)
    assert (tmp_path / "file").read_bytes() == OLD


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path: Path) -> None:
    # A rename would replace the pipe. As root, it would replace /dev/null, and so break the machine.
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        atomic_write(pipe, b"content")
        assert os.read(reader, 100) == b"content"
    finally:
        os.close(reader)
    assert pipe.is_fifo()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_device_is_one_line(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("/dev/full")
    with pytest.raises(
        InputError, match=r"^cannot write .*/link: No space left on device \([\d,]+ bytes free"
    ):
        atomic_write(link, NEW)
    assert Path("/dev/full").is_char_device()


def test_errors_about_other_files_keep_their_own_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, atomic_open(tmp_path / "output"):
        (tmp_path / "input").read_bytes()
    assert str(caught.value.filename) == str(tmp_path / "input")
    with pytest.raises(BrokenPipeError), atomic_open(tmp_path / "output"):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert names(tmp_path) == []


def test_half_a_character_destroys_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(OLD)
    with pytest.raises(UnicodeEncodeError):
        atomic_write(tmp_path / "file", "\ud83d")
    assert (tmp_path / "file").read_bytes() == OLD


def test_sha256_is_sha256(tmp_path: Path) -> None:
    # of "abc": the example of FIPS 180-2, appendix B.1
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_file_that_states_no_size_is_hashed_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stated").write_bytes(b"")
    content, reads = b"x" * 2**16, []
    with (tmp_path / "stated").open("rb") as stated:

        class Counted(io.BytesIO):
            def fileno(self) -> int:
                return stated.fileno()

            def readinto(self, block: Any) -> int:
                reads.append(len(block))
                return super().readinto(block)

        monkeypatch.setattr(files, "open_regular", lambda path: Counted(content))
        assert sha256(tmp_path / "stated") == hashlib.sha256(content).hexdigest()
    assert len(reads) == 2, "one for the content, and one that finds the end"


# -- a folder ----------------------------------------------------------------------------------------------


def test_a_whole_folder_verifies_and_lists_what_it_holds(saved: Path) -> None:
    verify_manifest(saved)
    manifest = json.loads((saved / MANIFEST).read_text())
    assert manifest == {
        "format": 2,
        "files": {
            name: {"size": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
            for name, content in CONTENTS.items()
        },
    }
    assert names(saved.parent) == [saved.name]


def test_the_checksum_is_xxh3_of_128_bits(tmp_path: Path) -> None:
    # the value that xxHash's own tests give for no bytes: https://github.com/Cyan4973/xxHash
    atomic_folder(tmp_path / "folder", lambda new: atomic_write(new / "empty", b""))
    files = json.loads((tmp_path / "folder" / MANIFEST).read_text())["files"]
    assert files == {"empty": {"size": 0, "xxh3_128": "99aa06d3014798d86001c324468d497f"}}


def test_a_manifest_of_before_is_compared_by_its_sha256(saved: Path) -> None:
    files = {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in CONTENTS.items()
    }
    (saved / MANIFEST).write_text(json.dumps({"format": 1, "files": files}))
    verify_manifest(saved)
    path = saved / "model.safetensors"
    path.write_bytes(flipped(path.read_bytes(), 3))
    assert f"{path} does not match its checksum" in refusal(saved)


def test_what_is_written_is_flushed_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real_fsync(descriptor)

    def rename(source: Path, goal: Path) -> None:
        flushed.append("<rename>")
        real_rename(source, goal)

    if not Path("/proc/self/fd").exists():
        pytest.skip("only Linux tells a descriptor's file")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    atomic_folder(tmp_path / "goal", fill)
    position = flushed.index("<rename>")
    assert {*CONTENTS, MANIFEST} < set(flushed[:position])
    assert flushed[position - 1].startswith(".goal.tmp-"), "the folder's entries too"
    assert flushed[position + 1 :] == [tmp_path.name]


@pytest.mark.parametrize("failure", [no_space, interrupt])
def test_a_failure_at_any_call_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Callable[..., Any]
) -> None:
    parent, goal = tmp_path / "output", tmp_path / "output" / "step-00000001"
    calls = [(os, name) for name in ("fsync", "rename", "mkdir", "open", "stat", "close")] + [(io, "open")]
    kept, made = set(), 0
    for module, name in calls:
        for turn in range(100):
            made, real = 0, getattr(module, name)

            def sometimes(*args: Any, _real: Any = real, _turn: int = turn, **kwargs: Any) -> Any:
                nonlocal made
                made += 1
                if made == _turn + 1:
                    failure()
                return _real(*args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(module, name, sometimes)
                with contextlib.suppress(InputError, KeyboardInterrupt):
                    atomic_folder(goal, fill)
            if made <= turn:  # there was no such call: all of them have been tried
                break
            left = names(parent) if parent.exists() else []
            if goal.name in left:  # only the flush after the rename may fail with the folder there, and whole
                verify_manifest(goal)
                kept.add((name, turn))
            assert left in ([], [goal.name]), (name, turn)
            shutil.rmtree(parent, ignore_errors=True)
        assert made, f"{name} is never called: this test has lost its object"
        shutil.rmtree(parent, ignore_errors=True)
    assert {name for name, _ in kept} <= {"fsync", "open", "close", "stat"}
    assert "fsync" in {name for name, _ in kept}


@unclosed
def test_ctrl_c_at_any_line_leaves_no_folder_or_a_whole_one(tmp_path: Path) -> None:
    goal = tmp_path / "goal"
    absent = whole = 0
    for line in range(1, 300):
        with interrupted_at(line) as executed:
            try:
                atomic_folder(goal, fill)
            except KeyboardInterrupt:
                pass
            else:
                break
        if goal.exists():
            verify_manifest(goal)
            shutil.rmtree(goal)
            whole += 1
        else:
            absent += 1
        assert names(tmp_path) == [], line
    assert executed[0] < line
    assert absent > 10
    assert whole > 0


def test_an_error_while_filling_leaves_nothing_and_names_the_folder(tmp_path: Path) -> None:
    goal = tmp_path / "goal"

    def half(folder: Path) -> None:
        (folder / "config.json").write_bytes(b"{}")
        raise ZeroDivisionError

    def full(folder: Path) -> None:
        (folder / "file").write_bytes(OLD)
        atomic_write(folder / "file" / "below", NEW)

    with pytest.raises(ZeroDivisionError):
        atomic_folder(goal, half)
    assert names(tmp_path) == []
    with pytest.raises(InputError) as caught:
        atomic_folder(goal, full)
    assert str(goal) in str(caught.value)
    assert ".tmp-" not in str(caught.value)
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "dangling link"])
def test_what_exists_is_never_replaced_by_a_folder(tmp_path: Path, kind: str) -> None:
    goal = tmp_path / "goal"
    match kind:
        case "folder" | "empty folder":
            goal.mkdir()
        case "file":
            goal.write_bytes(OLD)
        case _:
            goal.symlink_to("nowhere")
    if kind == "folder":
        (goal / "precious").write_bytes(OLD)
    with pytest.raises(InputError, match="exists already"):
        atomic_folder(goal, lambda _: pytest.fail("nothing should be written"))
    assert names(tmp_path) == ["goal"]


def test_what_a_killed_process_left_does_not_get_into_the_folder(tmp_path: Path) -> None:
    leftover = tmp_path / f".goal.tmp-{os.getpid()}"
    leftover.mkdir()
    (leftover / "stale").write_bytes(OLD)
    atomic_folder(tmp_path / "goal", fill)
    assert names(tmp_path / "goal") == sorted([*CONTENTS, MANIFEST])


# -- what verify_manifest notices --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CONTENTS if CONTENTS[name]])
def test_one_flipped_bit_of_a_file_is_noticed(saved: Path, name: str) -> None:
    path, content = saved / name, CONTENTS[name]
    bits = range(8 * len(content))
    for bit in random.Random(0).sample(bits, min(200, len(bits))):  # every bit of the small file
        path.write_bytes(flipped(content, bit))
        assert f"{path} does not match its checksum" in refusal(saved), f"bit {bit}"
    path.write_bytes(content)
    verify_manifest(saved)


def test_every_flipped_bit_of_the_manifest_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    atomic_folder(folder, lambda new: atomic_write(new / "a", b"content"))
    content = (folder / MANIFEST).read_bytes()
    for bit in range(8 * len(content)):
        (folder / MANIFEST).write_bytes(flipped(content, bit))
        assert refusal(folder), f"bit {bit}"


def refusal(folder: Path) -> str:
    try:  # pytest.raises would take most of the time of a thousand of these
        verify_manifest(folder)
    except InputError as error:
        return str(error)
    return ""


def flipped(content: bytes, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


@pytest.mark.parametrize("name", [name for name in CONTENTS if CONTENTS[name]])
def test_a_file_that_is_cut_or_longer_or_gone_is_noticed(saved: Path, name: str) -> None:
    path, content = saved / name, CONTENTS[name]
    for wrong in (content[:-1], content[: len(content) // 2], b"", content + b"\0"):
        path.write_bytes(wrong)
        with pytest.raises(InputError, match=f"{name} has {len(wrong)} bytes.* says {len(content)}"):
            verify_manifest(saved)
    path.unlink()
    with pytest.raises(InputError, match=f"{name} is listed in {MANIFEST} but missing"):
        verify_manifest(saved)
    path.mkdir()
    with pytest.raises(InputError, match=f"{name} is listed in {MANIFEST} but missing"):
        verify_manifest(saved)


@pytest.mark.parametrize("name", ["extra.bin", ".hidden", "文件", "model.safetensors.bak"])
def test_an_additional_file_or_folder_is_noticed(saved: Path, name: str) -> None:
    (saved / name).write_bytes(b"")
    with pytest.raises(InputError, match=f"{name} is not listed"):
        verify_manifest(saved)
    (saved / name).unlink()
    (saved / name).mkdir()
    with pytest.raises(InputError, match=f"{name} is not listed"):
        verify_manifest(saved)


def test_renamed_and_exchanged_files_are_noticed(saved: Path) -> None:
    (saved / "config.json").rename(saved / "Config.json")
    with pytest.raises(InputError, match=r"Config\.json is not listed|config\.json is listed"):
        verify_manifest(saved)
    (saved / "model.safetensors").rename(saved / "config.json")
    (saved / "Config.json").rename(saved / "model.safetensors")
    with pytest.raises(InputError, match=r"config\.json has 1024 bytes"):
        verify_manifest(saved)


def test_a_link_counts_as_what_it_leads_to(saved: Path, tmp_path: Path) -> None:
    # Download caches keep a model's files as links. The loaded bytes are checked.
    outside, path = tmp_path / "outside", saved / "model.safetensors"
    path.rename(outside)
    path.symlink_to(outside)
    verify_manifest(saved)
    outside.write_bytes(CONTENTS["model.safetensors"][::-1])
    with pytest.raises(InputError, match=r"model\.safetensors does not match its checksum"):
        verify_manifest(saved)
    outside.unlink()
    with pytest.raises(InputError, match=r"model\.safetensors is listed .* but missing"):
        verify_manifest(saved)


def test_without_weights_their_size_alone_is_compared(saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(CONTENTS["model.safetensors"][::-1])
    verify_manifest(saved, weights=False)
    path.write_bytes(CONTENTS["model.safetensors"] + b"x")
    with pytest.raises(InputError, match=r"model\.safetensors has 1025 bytes"):
        verify_manifest(saved, weights=False)
    (saved / "config.json").write_bytes(CONTENTS["config.json"][::-1])
    with pytest.raises(InputError, match=r"config\.json does not match its checksum"):
        verify_manifest(saved, weights=False)


def test_a_check_beside_the_reading_ends_with_the_block(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ManifestCheck(saved):
        pass
    check = ManifestCheck(saved)
    (saved / "model.safetensors").write_bytes(CONTENTS["model.safetensors"][::-1])
    check.start()
    with pytest.raises(InputError, match="does not match its checksum"), check:
        pass
    for error in (InputError("the header is damaged"), ValueError("a bad number")):
        with pytest.raises(InputError, match="does not match its checksum") as raised, check:
            raise error
        assert raised.value.__suppress_context__
    with pytest.raises(KeyboardInterrupt), check:  # the user's end comes first, and waits for nothing
        raise KeyboardInterrupt
    monkeypatch.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError("can't start new thread")))
    with pytest.raises(InputError, match="does not match its checksum"), ManifestCheck(saved):
        pass


def test_a_missing_manifest_is_noticed(saved: Path) -> None:
    (saved / MANIFEST).unlink()
    with pytest.raises(
        InputError, match=r"manifest\.json is missing: this folder was not written completely"
    ):
        verify_manifest(saved)


ENTRY = {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"no JSON",
        b"\xff\xfe",
        b"[" * 100_000,
        b"[]",
        b"[1, 2]",
        b"null",
        b"3",
        b'"files"',
        b"{}",
        b'{"format": 1}',
        b'{"format": 1, "files": []}',
        b'{"format": 1, "files": null}',
        b'{"format": 1, "files": {"empty": null}}',
        b'{"format": 1, "files": {"empty": []}}',
        b'{"format": 1, "files": {"empty": {"size": 0}}}',
        b'{"format": 1, "files": {"empty": {"sha256": ""}}}',
        b'{"format": 1, "files": {"empty": {"size": "many", "sha256": ""}}}',
        b'{"format": 1, "files": {"empty": {"size": null, "sha256": ""}}}',
        b'{"format": 1, "files": {"empty": {"size": NaN, "sha256": ""}}}',
        b'{"format": 1, "files": {"empty": {"size": Infinity, "sha256": ""}}}',
        json.dumps({"format": 2, "files": {"empty": ENTRY}}).encode(),
        json.dumps({"format": 3, "files": {"empty": ENTRY}}).encode(),
        json.dumps({"format": [1], "files": {"empty": ENTRY}}).encode(),
        json.dumps({"format": 1, "files": {"empty": ENTRY}, "more": 1}).encode(),
        json.dumps({"files": {"empty": ENTRY}}).encode(),
    ],
)
def test_a_damaged_manifest_is_named(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / MANIFEST).write_bytes(text)
    wrong = r"manifest\.json (is damaged|is not JSON|must hold a JSON object)"
    with pytest.raises(InputError, match=wrong) as caught:
        verify_manifest(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../outside", "/outside", "..", ".", "", "sub/file", "./config.json", "a\0b"]
)
def test_a_manifest_cannot_lead_out_of_its_folder(saved: Path, name: str) -> None:
    (saved.parent / "outside").write_bytes(OLD)
    (saved / "sub").mkdir()
    (saved / "sub" / "file").write_bytes(OLD)
    manifest = json.loads((saved / MANIFEST).read_text())
    manifest["files"][name] = {"size": len(OLD), "sha256": hashlib.sha256(OLD).hexdigest()}
    (saved / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError):
        verify_manifest(saved)


def test_signals_are_as_they_were() -> None:
    # This file raises KeyboardInterrupt many times. Ctrl-C must still work in the next test.
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
