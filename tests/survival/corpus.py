"""Part corpus: `minigpt train --text` makes shards of gigabytes of text, and its memory is measured.

The text is made here: lines of Chinese characters with punctuation, with frequencies by Zipf's law. All lines
have the same length, so the position of each character is known. The memory is the sum of the peaks of all
processes (VmHWM in /proc). This is more than was used at any one time, and it counts shared memory several
times.
"""

import contextlib
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from minigpt.data.memory_mapped import Tokens, read_manifest
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenizer import Tokenizer
from tests.prepared import Program
from tests.survival.bench import Bench

LIMIT = 10**9  # largest memory in bytes
LINE = 60  # number of characters of a line, line end included
POOL = 200_000  # largest number of different lines
LOOKS = 1000  # number of positions at which ids are compared with the text


def corpus(bench: Bench) -> None:
    """Prepare shards for a character vocabulary, and from a part of the text for byte-pair encoding."""
    if not Path("/proc/self/status").exists():
        print("  corpus: left out: memory is read from /proc, which is Linux's", file=sys.stderr)
        return
    folder = bench.runs.folder / "corpus"
    folder.mkdir()
    text = folder / "text.txt"
    size = write_text(text, round(bench.options.gigabytes * 1e9), bench.options.seed)
    prepared(bench, text, size, "char", "one token a character")
    size = min(size, round(bench.options.bpe_gigabytes * 1e9) // line_bytes() * line_bytes())
    os.truncate(text, size)
    sample = text.open(encoding="utf-8").read(bench.options.sampled)
    BpeTokenizer.train([sample], 8000).save(folder / "bpe")
    prepared(bench, text, size, str(folder / "bpe"), "byte-pair encoding")
    shutil.rmtree(folder)


def line_bytes() -> int:
    """Return the number of bytes of a line: three for each character, one for the line end."""
    return 3 * (LINE - 1) + 1


def write_text(path: Path, size: int, seed: int) -> int:
    """Write about `size` bytes; returns how many."""
    draw = np.random.default_rng(seed)
    left = written = max(1, size // line_bytes())
    different = max(1, min(POOL, written // 10))
    ranks = 1 / np.arange(1, 4001)
    drawn = draw.choice(4000, size=(different, LINE - 1), p=ranks / ranks.sum()) + 0x4E00
    drawn[:, 9::10] = ord("，")  # Chinese text has no words as long as a line
    drawn[:, -1] = ord("。")
    encoded = np.empty((different, LINE - 1, 3), dtype=np.uint8)  # UTF-8 as one table instead of strings
    encoded[..., 0], encoded[..., 1], encoded[..., 2] = (
        0xE0 | drawn >> 12, 0x80 | drawn >> 6 & 0x3F, 0x80 | drawn & 0x3F
    )  # fmt: skip
    lines = np.full((different, line_bytes()), ord("\n"), dtype=np.uint8)
    lines[:, :-1] = encoded.reshape(different, -1)
    with path.open("wb") as file:
        while left:
            count = min(left, 100_000)
            file.write(lines[draw.integers(different, size=count)].tobytes())
            left -= count
    return written * line_bytes()


def prepared(bench: Bench, text: Path, size: int, tokenizer: str, what: str) -> None:
    """Run `minigpt train --text --dry_run`, which makes the shards. Watch its memory, and check the ids.

    The model is tiny, because this part does not measure the memory of training.
    """
    shards = text.with_name(f"shards-{Path(tokenizer).name}")
    command = ["-m", "minigpt", "train", "--recipe", "songci-cpu", "--dry_run"]
    command += ["--text", str(text), "--tokenizer", tokenizer, "--shards", str(shards)]
    tiny = {"n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 64, "batch_size": 4, "threads": 1}
    command += [part for name, value in tiny.items() for part in (f"--{name}", str(value))]
    command += ["--output", str(text.with_name("run")), "--workers", str(bench.options.workers)]
    began = time.monotonic()
    with bench.runs.log.open("ab") as log:
        process = Program(command, (log.fileno(), log.fileno(), log.fileno()))
        peaks: dict[int, int] = {}
        while process.poll() is None:
            for member in family(process.pid):
                peaks[member] = max(peaks.get(member, 0), peak(member))
            time.sleep(0.05)
    seconds = time.monotonic() - began
    assert process.returncode == 0, bench.runs.said()
    memory = sum(peaks.values())
    manifest = read_manifest(shards)
    assert manifest is not None
    name = f"{size / 1e9:.3g} GB of text, {what}"
    bench.table.add(
        "corpus",
        f"{name}: prepared in under {LIMIT / 1e9:.0f} GB of memory",
        1,
        int(memory < LIMIT),
        megabytes=round(memory / 1e6),
        largest_process_megabytes=round(max(peaks.values()) / 1e6),
        processes=len(peaks),
        seconds_in_all=round(seconds, 1),
        megabytes_per_second=round(size / 1e6 / seconds, 1),
        tokens=manifest["tokens"],
    )
    tokens = Tokens(shards, manifest)
    if tokenizer == "char":
        held = compared(bench, text, tokens, Tokenizer(shards / "vocab.json"), size)
        bench.table.add("corpus", f"{name}: ids at random places are the text's", LOOKS, held)
    else:
        held = int(is_beginning(text, tokens, BpeTokenizer.from_folder(Path(tokenizer))))
        bench.table.add("corpus", f"{name}: the first shard's ids are the text's", 1, held)
    del tokens
    shutil.rmtree(shards)


def compared(bench: Bench, text: Path, tokens: Tokens, tokenizer: Tokenizer, size: int) -> int:
    """Return the number of random lines whose ids are those of their characters."""
    held = 0
    with text.open("rb") as file:
        for _ in range(LOOKS):
            line = bench.random.randrange(size // line_bytes())
            file.seek(line * line_bytes())
            expected = tokenizer.encode_array(file.read(line_bytes()).decode())
            held += bool(np.array_equal(tokens.read(line * LINE, LINE), expected))
    return held if len(tokens) == size // line_bytes() * LINE + 1 else 0  # + 1: the end of the text


def is_beginning(text: Path, tokens: Tokens, tokenizer: BpeTokenizer) -> bool:
    """Return True if the text begins with the decoded first shard."""
    count = min(tokens.manifest["shards"][0]["tokens"], len(tokens) - 1)
    decoded = tokenizer.decode(tokens.read(0, count).tolist()).encode()
    with text.open("rb") as file:
        return len(decoded) > 1000 and file.read(len(decoded)) == decoded


def family(process: int) -> list[int]:
    """Return a process and all of its descendants."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has just ended
            parent = (
                path.read_text().rpartition(")")[2].split()[1]
            )  # the fields after the name, which may contain any character
            children.setdefault(int(parent), []).append(int(path.parent.name))
    found = [process]
    for member in found:  # the list grows during the loop
        found += children.get(member, [])
    return found


def peak(process: int) -> int:
    """Return the peak memory of a process in bytes; 0 if it has ended."""
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
