"""Damaged and hostile input to every reader and command: what is refused, and what goes wrong.

    python benchmarks/fuzz.py --inputs 200000 --seed 1 --output benchmarks/results/NAME.json   # an hour
    python benchmarks/fuzz.py --inputs 2000 --only pth --only template
    python benchmarks/fuzz.py --replay template:1:57 --keep folder      # one input again, with its traceback
    python benchmarks/fuzz.py --cost                                    # what checking costs: three minutes

The tool's own writers make seeds: tiny models, runs, data (fuzz_seeds.py). They are damaged, forged, or
replaced by pipes and devices (fuzz_mutations.py), and read in forked processes. READER:SEED:NUMBER gives an
input again. An input has one of these outcomes:

    refused       one line: InputError, or exit code 2
    same          accepted, and the result is that of the undamaged file
    other         accepted with another result, where no checksum covers the file
    exception     an undocumented exception, or an error of several lines
    changed       accepted with another result, although a checksum covers the file
    hang          more than 5 s of processor time, or 60 s on the clock
    memory        more memory than twice the file and 300 MB
    created       a file was written or removed
    executed      a process or a socket was opened
    crash         the process died

All but the first three are faults. Processes are forked, so this needs Linux.
"""

import os
import sys
from pathlib import Path

# One thread from the start: torch.set_num_threads() would make threads that a forked process has not.
os.environ["OMP_NUM_THREADS"] = "1"

# run as a script: this checkout's minigpt, and the files beside this one
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import contextlib
import faulthandler
import gc
import json
import math
import mmap
import random
import re
import resource
import select
import shutil
import signal
import struct
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.fuzz_commands import PROCESSES, Workplace
from benchmarks.fuzz_mutations import KINDS, changed_file
from benchmarks.fuzz_readers import READERS, REFUSED, Reader, set_base
from benchmarks.fuzz_seeds import make_seeds
from benchmarks.turns import finish, surroundings
from minigpt.errors import InputError

FINE = ("refused", "same", "other")
FAULTS = ("exception", "changed", "hang", "memory", "created", "executed", "crash")
CHUNK = 2000  # inputs that one process reads
CPU_SECONDS, CLOCK_SECONDS = 5.0, 60.0  # the second for a machine that others use
EXTRA_MEMORY = 300 * 10**6
LINE = 3000  # most characters of an error
WORD = struct.Struct("<qd")  # number of the current input, and the processor time at its begin


@dataclass(frozen=True)
class Outcome:
    """What became of an input."""

    kind: str
    detail: str = ""
    trace: str = ""


@dataclass
class Row:
    """The counts of a reader."""

    name: str
    words: str
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[str, str, str]] = field(default_factory=list)  # (input, kind, detail)


# -- an input ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seed:
    """A folder of files: by relative path their bytes, and links by their targets."""

    name: str
    files: dict[str, bytes]
    links: dict[str, str]

    def write(self, folder: Path) -> None:
        """Write all files into a new folder."""
        folder.mkdir(parents=True)
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        for name, target in self.links.items():
            (folder / name).symlink_to(target)


def seeds_of(folder: Path) -> list[Seed]:
    """The seeds of a reader."""
    found = []
    for seed in sorted(folder.iterdir()):
        paths = [Path(base) / name for base, _, names in os.walk(seed) for name in names]
        files = {str(p.relative_to(seed)): p.read_bytes() for p in sorted(paths) if not p.is_symlink()}
        links = {str(p.relative_to(seed)): str(p.readlink()) for p in seed.iterdir() if p.is_symlink()}
        found.append(Seed(seed.name, files, links))
    return found


def listing(folder: Path) -> set[str]:
    """The relative names of all that is in a folder."""
    found, todo = set(), [str(folder)]
    while todo:
        with os.scandir(todo.pop()) as entries:
            for entry in entries:
                if entry.name.startswith("torchinductor_"):  # torch's own cache
                    continue
                found.add(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    todo.append(entry.path)
    return found


class FileInputs:
    """Changes seeds of a reader in a folder, reads them, and judges what happened."""

    def __init__(self, reader: Reader, seeds: list[Seed], scratch: Path, seed: int) -> None:
        self.reader, self.seeds, self.scratch, self.seed = reader, seeds, scratch, seed
        self.expected: dict[str, str] = {}
        self.written: set[str] = set()
        self.events: list[str] = []
        self.errors: tuple[type[BaseException], ...] = (InputError, *reader.errors)
        wanted = re.compile(reader.only or ".*")
        self.names = [[name for name in seed.files if wanted.fullmatch(name)] for seed in seeds]

    def prepare(self, one: Seed) -> Path:
        """The folder with a seed's files; its result is that of the first reading."""
        folder = self.scratch / one.name
        if one.name not in self.written:
            one.write(folder)
            self.written.add(one.name)
            try:
                self.expected[one.name] = self.reader.read(folder)
            except InputError as error:
                self.expected[one.name] = f"refused: {error}"
        return folder

    def run(self, number: int) -> Outcome:
        """Make input `number`, read it, and put the files back."""
        rng = random.Random(f"{self.reader.name}:{self.seed}:{number}")
        which = rng.randrange(len(self.seeds))
        one, names = self.seeds[which], self.names[which]
        folder = self.prepare(one)
        changed = rng.sample(names, min(len(names), 2 if rng.random() < 0.1 else 1))
        size = 0
        for name in changed:
            path = folder / name
            path.unlink()
            if rng.random() < 0.03:
                KINDS[rng.choice(list(KINDS))](path)
                continue
            content = one.files[name]
            if self.reader.change is not None and rng.random() < 0.8:
                content = self.reader.change(rng, content)
            else:
                content = changed_file(rng, name, content, one.files[rng.choice(names)], self.reader.sealed)
            path.write_bytes(content)
            size += len(content)
        if self.reader.forge is not None:
            self.reader.forge(rng, folder)
        size = max(size, sum(map(len, one.files.values())))
        before = listing(self.scratch)
        self.events.clear()
        try:
            outcome = self._read(folder, one, size)
            if outcome.kind in FINE:
                outcome = self._judged(outcome, before)
        finally:
            self._restore(folder, one, changed)
        return outcome

    def _read(self, folder: Path, one: Seed, size: int) -> Outcome:
        start = peak_memory(reset=True)
        try:
            result = self.reader.read(folder)
        except self.errors as error:
            text = str(error)
            if "\n" in text.strip() or len(text) > LINE:
                return Outcome("exception", f"an error of several lines or too long: {text[:200]!r}")
            outcome = Outcome("refused", text)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return Outcome("exception", *explained(error))
        else:
            if result == REFUSED:
                outcome = Outcome("refused")
            elif result == self.expected[one.name]:
                outcome = Outcome("same")
            elif self.reader.sealed:
                return Outcome("changed", f"{result}, not {self.expected[one.name]}")
            else:
                outcome = Outcome("other")
        taken = peak_memory() - start
        if taken > 2 * size + EXTRA_MEMORY:
            return Outcome("memory", f"{taken >> 20} MiB for {size:,} bytes: {outcome.kind}")
        return outcome

    def _judged(self, outcome: Outcome, before: set[str]) -> Outcome:
        if self.events:
            kind = "executed" if any(not one.startswith("open") for one in self.events) else "created"
            return Outcome(kind, "; ".join(self.events[:3]))
        if (after := listing(self.scratch)) != before:
            return Outcome("created", ", ".join(sorted(after ^ before)[:3]))
        return outcome

    def _restore(self, folder: Path, one: Seed, changed: list[str]) -> None:
        names = one.files if self.reader.forge is not None else changed
        for name in names:
            path = folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif os.path.lexists(path):
                path.unlink()
            path.write_bytes(one.files[name])

    def keep(self, number: int, goal: Path) -> None:
        """Copy the files of an input to a folder."""
        read = self.reader.read

        def copying(folder: Path) -> str:
            shutil.rmtree(goal, ignore_errors=True)
            goal.mkdir(parents=True)
            for path in folder.rglob("*"):
                if path.is_file() and path.stat().st_size < 10**9:
                    (goal / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, goal / path.relative_to(folder))
            return ""

        self.expected = {one.name: "" for one in self.seeds}
        object.__setattr__(self.reader, "read", copying)
        self.run(number)
        object.__setattr__(self.reader, "read", read)


def explained(error: BaseException) -> tuple[str, str]:
    """An exception in one line with the last place in minigpt, and its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/minigpt/" in frame.filename] or list(frames)
    place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
    text = " ".join(str(error).split())[:150]
    return f"{type(error).__name__} at {place}: {text}", "".join(traceback.format_exception(error))[-6000:]


def peak_memory(reset: bool = False) -> int:
    """Bytes of the most memory of this process; with `reset`, counting begins again."""
    if reset:
        Path("/proc/self/clear_refs").write_bytes(b"5")
    found = re.search(rb"VmHWM:\s*(\d+)", Path("/proc/self/status").read_bytes())
    return int(found[1]) * 1024 if found else 0


# -- processes -----------------------------------------------------------------------------------------------


def watch(events: list[str], allowed: str) -> None:
    """Note files that are opened for writing outside a folder, processes and sockets."""
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    changing = {
        "os.remove",
        "os.rename",
        "os.mkdir",
        "os.rmdir",
        "os.symlink",
        "os.link",
        "os.truncate",
        "os.chmod",
    }
    running = {
        "subprocess.Popen",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.spawn",
        "os.fork",
        "os.forkpty",
    }
    running |= {"socket.connect", "socket.bind", "socket.getaddrinfo", "webbrowser.open"}

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & writing and isinstance(path, str | bytes | os.PathLike):
                name = os.fsdecode(path)
                if not name.startswith((allowed, "/dev/null", "/proc/self/clear_refs")):
                    events.append(f"open for writing {name}")
        elif event in changing:
            if not str(Path.cwd() / os.fsdecode(arguments[0])).startswith(allowed):
                events.append(f"open: {event} {arguments[0]!r:.100}")
        elif event in running:
            events.append(f"{event} {arguments!r:.100}")

    sys.addaudithook(note)


def work(inputs: Any, numbers: range, current: mmap.mmap, answers: int, scratch: Path) -> None:
    """A forked process: judge inputs, and send a line for each."""
    os.setpgid(0, 0)
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_DFL)
    warnings.simplefilter("ignore")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    temporary = scratch / "tmp"
    temporary.mkdir()
    tempfile.tempdir = str(temporary)
    os.environ["TMPDIR"] = str(temporary)
    os.chdir(scratch)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (virtual_memory() + 6 * 2**30, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if isinstance(inputs, FileInputs):
        for seed in inputs.seeds:
            inputs.prepare(seed)  # the first reading imports modules
        watch(inputs.events, str(scratch))
    gc.freeze()
    for number in numbers:
        current[:] = WORD.pack(number, time.process_time())
        try:
            outcome = inputs.run(number)
        except MemoryError:
            outcome = Outcome("memory", "MemoryError in the harness")
        line = json.dumps([number, outcome.kind, outcome.detail[:400], outcome.trace]) + "\n"
        view = line.encode("utf-8", "replace")
        while view:
            view = view[os.write(answers, view) :]
    os._exit(0)


def virtual_memory() -> int:
    """Bytes of address space of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def processor_time(process: int) -> float:
    """Seconds of processor time that a process and its children took."""
    try:
        fields = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def judged(inputs: Any, numbers: range, scratch: Path) -> Iterator[tuple[int, Outcome]]:
    """Judge inputs in a forked process. After a crash or a hang, another one takes the next input."""
    while numbers:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        current = mmap.mmap(-1, WORD.size)
        current[:] = WORD.pack(numbers[0], 0.0)
        reading, writing = os.pipe()
        process = os.fork()
        if process == 0:
            code = 1
            try:
                os.close(reading)
                work(inputs, numbers, current, writing, scratch)
            except BaseException:
                with contextlib.suppress(BaseException):
                    os.write(writing, (json.dumps([-1, "", "", traceback.format_exc()]) + "\n").encode())
            finally:
                os._exit(code)
        os.close(writing)
        done, killed, rest = numbers[0] - 1, "", b""
        last = time.monotonic()
        while True:
            ready, _, _ = select.select([reading], [], [], 0.5)
            if ready:
                block = os.read(reading, 1 << 16)
                if not block:
                    break
                last = time.monotonic()
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    number, *values = json.loads(line)
                    if number < 0:
                        raise RuntimeError(f"the harness failed: {values[2]}")
                    done = number
                    yield number, Outcome(*values)
                continue
            _, begin = WORD.unpack(current[:])
            used = processor_time(process) - begin if begin else 0.0
            if used > CPU_SECONDS and inputs.watched:
                killed = f"{used:.1f} s of processor time"
            elif time.monotonic() - last > CLOCK_SECONDS:
                killed = f"{CLOCK_SECONDS:.0f} s on the clock"
            if killed:
                os.killpg(process, signal.SIGKILL)
                break
        os.close(reading)
        _, status = os.waitpid(process, 0)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process, signal.SIGKILL)  # children that it left behind
        if done + 1 >= numbers.stop:
            return
        number, _ = WORD.unpack(current[:])
        if killed:
            yield number, Outcome("hang", killed)
        else:
            yield number, Outcome("crash", f"wait status {status}")
        numbers = range(number + 1, numbers.stop)


FileInputs.watched = True  # type: ignore[attr-defined]


# -- all of it -----------------------------------------------------------------------------------------------


def counts_of(total: int, only: list[str]) -> dict[str, int]:
    """How many inputs each reader gets."""
    shares = {one.name: one.share for one in READERS} | {one.name: one.share for one in PROCESSES}
    if only:
        unknown = set(only) - shares.keys()
        if unknown:
            raise SystemExit(f"unknown reader {', '.join(unknown)}; known: {', '.join(shares)}")
        shares = {name: share for name, share in shares.items() if name in only}
    fixed = {one.name: one.most for one in PROCESSES}
    return {
        name: max(1, min(math.ceil(total * share / sum(shares.values())), fixed.get(name, total)))
        for name, share in shares.items()
    }


def inputs_of(name: str, seeds: Path, scratch: Path, seed: int) -> Any:
    """What makes the inputs of a reader."""
    for reader in READERS:
        if reader.name == name:
            return FileInputs(reader, seeds_of(seeds / name), scratch, seed)
    (kind,) = [one for one in PROCESSES if one.name == name]
    return kind.make(Workplace(seeds, scratch), seed)


def make_all_seeds(folder: Path) -> None:
    """Make the seeds in a forked process: what the commands do to theirs must not stay in this one."""
    process = os.fork()
    if process == 0:
        try:
            make_seeds(folder)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(process, 0)[1]:
        raise SystemExit("the seeds could not be made")
    set_base(folder)


def fuzz(options: argparse.Namespace, place: Path) -> list[Row]:
    """Judge all inputs; a line for each fault on stderr."""
    words = {one.name: one.words for one in READERS} | {one.name: one.words for one in PROCESSES}
    rows = []
    for name, count in counts_of(options.inputs, options.only).items():
        row, begin = Row(name, words[name]), time.monotonic()
        inputs = inputs_of(name, place / "seeds", place / "scratch", options.seed)
        for first in range(0, count, CHUNK):
            numbers = range(first, min(first + CHUNK, count))
            for number, outcome in judged(inputs, numbers, place / "scratch"):
                row.counts[outcome.kind] += 1
                if outcome.kind not in FINE:
                    row.faults.append((f"{name}:{options.seed}:{number}", outcome.kind, outcome.detail))
                    print(
                        f"{name}:{options.seed}:{number} {outcome.kind}: {outcome.detail}",
                        file=sys.stderr,
                        flush=True,
                    )
        speed = count / max(time.monotonic() - begin, 1e-9)
        print(f"# {name}: {dict(row.counts)}, {speed:.0f} inputs/s", file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def show(rows: list[Row]) -> None:
    """The table, as docs/reliability.md has it."""
    print("| what is read | inputs | refused | same | other | faults |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        faults = sum(row.counts[kind] for kind in FAULTS)
        cells = [f"{sum(row.counts.values()):,}", *(f"{row.counts[kind]:,}" for kind in FINE), f"{faults:,}"]
        print(f"| {row.words} | {' | '.join(cells)} |")
    every = Counter[str]()
    for row in rows:
        every += row.counts
    faults = sum(every[kind] for kind in FAULTS)
    cells = [f"{sum(every.values()):,}", *(f"{every[kind]:,}" for kind in FINE), f"{faults:,}"]
    print(f"| all | {' | '.join(cells)} |")


def replay(text: str, place: Path, keep: Path | None) -> int:
    """One input again: what it is, and what becomes of it."""
    name, seed, number = text.rsplit(":", 2)
    inputs = inputs_of(name, place / "seeds", place / "scratch", int(seed))
    numbers = range(int(number), int(number) + 1)
    ((_, outcome),) = judged(inputs, numbers, place / "scratch")
    print(f"{outcome.kind}: {outcome.detail}\n{outcome.trace}".rstrip())
    if keep is not None:
        shutil.rmtree(place / "scratch", ignore_errors=True)
        (place / "scratch").mkdir()
        inputs.keep(int(number), keep)
        print(f"its files are in {keep}")
    return 0 if outcome.kind in FINE else 1


def main() -> int:
    """Run what the flags ask for; 1 if there was a fault."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=200_000, help="how many, in all")
    parser.add_argument("--seed", type=int, default=1, help="of all changes")
    parser.add_argument(
        "--only", action="append", default=[], metavar="READER", help="may be given several times"
    )
    parser.add_argument("--replay", metavar="READER:SEED:NUMBER", help="one input again")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="with --replay: a copy of its files")
    parser.add_argument(
        "--cost", action="store_true", help="measure what checking costs, in place of all else"
    )
    parser.add_argument("--output", type=Path, help="write the numbers there, as JSON")
    options = parser.parse_args()
    if options.cost:
        from benchmarks.fuzz_cost import measure

        return measure(options.output)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    faulthandler.disable()
    fast = Path("/dev/shm")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(
        prefix="fuzz-", dir=fast if os.access(fast, os.W_OK) else None
    ) as folder:
        place = Path(folder)
        (place / "seeds").mkdir()
        make_all_seeds(place / "seeds")
        if options.replay:
            return replay(options.replay, place, options.keep)
        rows = fuzz(options, place)
    show(rows)
    numbers = surroundings("fuzz", None, 1) | {
        "seed": options.seed,
        "inputs": sum(sum(row.counts.values()) for row in rows),
        "seconds": round(time.monotonic() - begin),
        "readers": [vars(row) | {"counts": dict(row.counts)} for row in rows],
    }
    finish(numbers, options.output)
    return 1 if any(row.faults for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
