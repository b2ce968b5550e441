"""Part cost: the time of manifests and their verification. It needs a machine that runs nothing else."""

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from minigpt.data.reader import read_conversations
from minigpt.data.split import split_conversations, write_split
from minigpt.storage import files
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.training import checkpoint
from minigpt.training.checkpointer import Checkpointer
from tests.survival.bench import Bench
from tests.survival.children import finished, start
from tests.survival.runs import void


def cost(bench: Bench) -> None:
    """Measure the time of verification."""
    folder = bench.runs.folder / "large"
    content = np.random.default_rng(0).bytes(bench.options.megabytes * 10**6)
    files.atomic_folder(folder, lambda new: void((new / "weights").write_bytes(content)))
    began = time.perf_counter()
    files.verify_manifest(folder)
    per_gb = (time.perf_counter() - began) / (bench.options.megabytes / 1000)
    held = {"seconds_per_gb": round(per_gb, 2)}
    if bench.options.demo:
        held |= demo(bench)
    bench.table.add("cost", "verifying, read from the cache", 1, 1, **held)


def demo(bench: Bench) -> dict[str, float]:
    """Return the share of `make demo`'s training time that manifests and their verification take."""
    root, place = Path(__file__).parents[2], bench.runs.folder / "demo"
    place.mkdir()
    pairs, read = read_conversations(root / "data" / "data.jsonl")
    Tokenizer.from_word2id(build_vocabulary(p.question + p.answer for p in pairs)).save(place / "vocab.json")
    write_split(split_conversations(pairs, 0.8, 42), read, place, train_ratio=0.8, seed=42)
    argv = [
        "--recipe",
        "qa-cpu",
        "--train_data",
        str(place / "train.jsonl"),
        "--output",
        str(place / "run"),
    ]
    argv += ["--val_data", str(place / "val.jsonl"), "--vocab_path", str(place / "vocab.json")]
    spent = place / "spent"

    def timed() -> None:
        for owner, name in ((files, "_write_manifest"), (checkpoint, "verify_manifest")):
            real = getattr(owner, name)

            def wrapper(folder: Path, real: Any = real) -> None:
                began = time.perf_counter()
                real(folder)
                with spent.open("a", encoding="utf-8") as file:
                    file.write(f"{time.perf_counter() - began}\n")

            setattr(owner, name, wrapper)

    began = time.perf_counter()
    code = finished(start(argv, bench.runs.log, timed))
    seconds = time.perf_counter() - began
    assert code == 0, bench.runs.said()
    total = sum(map(float, spent.read_text(encoding="utf-8").split()))
    share = statistics.median(background(bench, argv) for _ in range(3)) / seconds
    found = {"demo_seconds": seconds, "demo_share": total / seconds, "save_async_share": share}
    return {name: round(value, 5) for name, value in found.items()}


def background(bench: Bench, argv: list[str]) -> float:
    """Return the seconds that ten checkpoints, written in the background, add to a run of two epochs.

    The other run does everything except writing. The two runs take turns. A second call shows the noise.
    """

    def nothing_saved() -> None:
        Checkpointer.save = lambda self, best=False, final=False: None  # type: ignore[method-assign]

    argv = [*argv, "--num_train_epochs", "2", "--save_async", "--overwrite"]
    seconds = []
    for patch in (None, nothing_saved):
        began = time.perf_counter()
        assert finished(start(argv, bench.runs.log, patch)) == 0, bench.runs.said()
        seconds.append(time.perf_counter() - began)
    return seconds[0] - seconds[1]
