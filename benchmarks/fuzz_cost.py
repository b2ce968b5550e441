"""What checking costs: `fuzz.py --cost`. Some minutes; the machine must be quiet.

Cold starts with and without the reading of a manifest, and the reading of a folder of 500 MB with its checks
and without them, in turns: the median of each, and of their ratios. Without checks, the checksums of the
manifest, finiteness and casts are skipped; the tensors are read in both. The folder is read from the page
cache, and from the disk: there the operating system is asked to drop the files from the cache first.
"""

import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

from benchmarks.turns import finish, surroundings
from minigpt.families import strict_loading
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.storage import files
from minigpt.storage.files import MANIFEST, atomic_folder
from minigpt.tokenizer import SPECIAL_TOKENS, Tokenizer
from minigpt.weights import pretrained

__all__ = ["measure"]

ROUNDS = 9
ROOT = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Read without comparing checksums and without looking for NaN."""
    with (
        mock.patch.object(files, "verify_manifest", return_value=None),
        mock.patch.object(strict_loading, "is_finite", return_value=True),
    ):
        yield


def timed(work: Callable[[], object]) -> float:
    """Seconds on the clock."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def command(*words: str) -> Callable[[], object]:
    """Start `minigpt WORDS` in a process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-m", "minigpt", *words]
    return lambda: subprocess.run(arguments, env=environment, check=True, capture_output=True)


def drop_from_cache(folder: Path) -> None:
    """Ask the operating system to forget the content of a folder's files, so that the disk is read next."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def compared(
    first: Callable[[], object], second: Callable[[], object], before: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Measure two in turns, after one of each that does not count. `before` runs before each, unmeasured."""
    pairs = []
    for number in range(ROUNDS + 1):
        took = {}
        for work in (first, second) if number % 2 else (second, first):
            before()
            took[work] = timed(work)
        pairs.append((took[first], took[second]))
    firsts, seconds = zip(*pairs[1:])
    shares = [a / b - 1 for a, b in pairs[1:]]
    return {
        "with_checks": round(statistics.median(firsts), 4),
        "without": round(statistics.median(seconds), 4),
        "share": round(statistics.median(shares), 4),
    }


def measure(output: Path | None) -> int:
    """Measure, print a table and the numbers. Returns the exit code."""
    with tempfile.TemporaryDirectory(prefix="fuzz-cost-") as name:
        place, rows = Path(name), {}
        characters = (*SPECIAL_TOKENS, *(chr(0x4E00 + number) for number in range(12_000 - 3)))
        tokenizer = Tokenizer.from_word2id({token: number for number, token in enumerate(characters)})
        shapes = {"small": (64, 2, 2), "large": (1024, 16, 9)}  # the large one: 500 MB
        for name, (n_embd, n_head, n_layer) in shapes.items():
            model = GPTLMHeadModel(GPTConfig(n_embd, n_head, n_layer, 0.0, 64, 12_000, True, "tanh"))
            save = functools.partial(pretrained.save_pretrained, model, tokenizer=tokenizer)
            atomic_folder(place / name, save)
            bare = place / f"{name}-bare"  # the same without a manifest
            bare.mkdir()
            for path in (place / name).iterdir():
                if path.name != MANIFEST:
                    os.link(path, bare / path.name)
        rows["minigpt --help"] = {
            "seconds": round(statistics.median(timed(command("--help")) for _ in range(7)), 4)
        }
        asking = ("generate", "--question", "一", "--device", "cpu", "--max_new_tokens", "2", "--model")
        for name in shapes:
            rows[f"minigpt generate, a {name} model"] = compared(
                command(*asking, str(place / name)), command(*asking, str(place / f"{name}-bare"))
            )

        def without() -> None:
            with unchecked():
                pretrained.load_model(place / "large")

        def checked() -> None:
            pretrained.load_model(place / "large")

        size = sum(path.stat().st_size for path in (place / "large").iterdir())
        for name, before in (
            ("a folder of 500 MB, from the page cache", lambda: None),
            ("a folder of 500 MB, from the disk", lambda: drop_from_cache(place / "large")),
        ):
            rows[name] = {**compared(checked, without, before), "bytes": size}
    for what, row in rows.items():
        print(f"{what:<42}{json.dumps(row)}")
    finish(surroundings("fuzz-cost", None, torch.get_num_threads()) | {"rows": rows}, output)
    return 0
