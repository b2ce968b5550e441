"""Runs the user's own nanoGPT: its unchanged train.py takes turns with minigpt, and its loss is measured.

    python benchmarks/nanogpt.py EVERY SEED VAL.bin train.py's arguments

`NanoGPT` starts this command in a temporary folder with the files of the checkout; do not start it yourself.
train.py prints a line after each iteration. Its `print` is replaced by a function that measures time, that
measures the loss over the whole validation part after every EVERY iterations, and that waits for the next
turn. Training time runs from one such line to the next, without measurements and waiting. A turn is a line
"SECONDS" on standard input. The results go to standard output, one JSON object per line.

This file imports nothing from minigpt. One function, `loss_over`, measures both programs.
"""

import json
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F


@torch.inference_mode()
def loss_over(
    logits: Callable[[Tensor], Tensor], ids: npt.NDArray[Any], T: int, device: str | torch.device = "cpu"
) -> float:
    """Return nats per token over all of `ids` but the first, read in adjacent windows of T tokens.

    Args:
        logits: function from ids (B, T) to scores (B, T, V).
        ids: the tokens.
        T: length of a window.
    """
    all_ids = torch.from_numpy(ids.astype(np.int64))
    total, whole = 0.0, (len(ids) - 1) // T * T
    windows, targets = all_ids[:whole].view(-1, T), all_ids[1 : whole + 1].view(-1, T)
    B = max(1, 2**15 // T)
    pieces = [(windows[i : i + B], targets[i : i + B]) for i in range(0, len(windows), B)]
    if whole < len(ids) - 1:  # the last, shorter window
        pieces.append((all_ids[None, whole:-1], all_ids[None, whole + 1 :]))
    for x, y in pieces:
        scores = logits(x.to(device)).float()  # (B, T, V)
        nll = F.cross_entropy(scores.flatten(0, 1), y.to(device).flatten(), reduction="none")
        total += float(nll.double().sum())
    return total / (len(ids) - 1)


class Missing(Exception):  # noqa: N818 -- no error of ours: the peer is named, and the rest runs
    """Raised if a peer is not installed or does not run. The benchmark names it, and runs the rest."""


def require_checkout(folder: Path | None, *needed: str) -> Path:
    """Return the folder of nanoGPT, after checking that it has the needed files.

    Raises:
        Missing: if a file is missing; the message names it.
    """
    if folder is None:
        raise Missing("nanoGPT: no --nanogpt DIR was given")
    for name in needed:
        if not (folder / name).is_file():
            raise Missing(f"nanoGPT: {folder / name} does not exist")
    return folder


def lay_out(checkout: Path, work: Path) -> None:
    """Copy the files of the checkout into a work folder, so that the user's folder does not change."""
    for file in checkout.glob("*.py"):
        shutil.copy(file, work)
    if (checkout / "config").is_dir():
        shutil.copytree(checkout / "config", work / "config")


class NanoGPT:
    """A run of the user's nanoGPT that takes turns with minigpt. Its rows have seconds, iterations and loss.

    Args:
        checkout: the user's folder.
        work: an empty folder for this run.
        text: the text. As in nanoGPT's prepare.py, the last tenth is the validation part, and the vocabulary
            consists of the text's characters.
        arguments: arguments of train.py.
        every: number of iterations between measurements.
        stop: seconds of training after which the run ends.

    Raises:
        Missing: if train.py fails; the message has its last line.
    """

    def __init__(
        self,
        checkout: Path,
        work: Path,
        text: str,
        arguments: list[str],
        *,
        every: int,
        seed: int,
        threads: int,
        stop: float = float("inf"),
    ) -> None:
        lay_out(checkout, work)
        data = work / "data" / "shakespeare_char"
        data.mkdir(parents=True)
        characters = {c: i for i, c in enumerate(sorted(set(text)))}
        ids = np.array([characters[c] for c in text], dtype=np.uint16)
        first = int(len(text) * 0.9)
        ids[:first].tofile(data / "train.bin")
        ids[first:].tofile(data / "val.bin")
        # without this file train.py would use GPT-2's 50,304 entries; only nanoGPT reads it
        (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(characters)}))
        # switch off train.py's own evaluations, except the one before the first iteration
        arguments = [*arguments, "--eval_interval=1000000000"]
        command = [sys.executable, str(Path(__file__).resolve()), str(every), str(seed)]
        number = str(threads)
        self._log = work / "log.txt"
        with self._log.open("w") as log:
            self._child = subprocess.Popen(
                [*command, str(data / "val.bin"), "train.py", *arguments],
                cwd=work,
                env={**os.environ, "OMP_NUM_THREADS": number, "MKL_NUM_THREADS": number},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.rows, self.seed, self.stop, self.seconds = [], seed, stop, 0.0

    rows: list[dict[str, Any]]

    def run(self, slice_seconds: float) -> bool:
        """Let it train for a slice."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(f"{slice_seconds}\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            self._failed()
        for line in self._child.stdout:
            values = json.loads(line)
            event = values.pop("event")
            self.seconds = values["seconds"]
            if event == "row":
                row = {"arm": "nanoGPT", "seed": self.seed, **values}
                self.rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
                print(self.rows[-1], flush=True)
            elif event == "turn" and self.seconds < self.stop:
                return True
            else:
                self.close()
                return False
        return self._failed()

    def _failed(self) -> bool:
        self.close()
        said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise Missing(f"nanoGPT: train.py ended with an error: {said[-1] if said else 'it said nothing'}")

    def close(self) -> None:
        """Kill the process."""
        if self._child.poll() is None:
            self._child.kill()
        self._child.communicate()


class Watch:
    """Replaces `print` in train.py."""

    def __init__(self, every: int, ids: npt.NDArray[Any], channel: Any) -> None:
        self.every, self.ids, self.channel = every, ids, channel
        self.seconds, self.turn, self.first = 0.0, 0.0, 0.0
        self.began: float | None = None

    def tell(self, **values: Any) -> None:
        """Send a JSON object to the parent process."""
        self.channel.write(json.dumps(values) + "\n")
        self.channel.flush()

    def wait(self) -> None:
        """Wait for the next turn."""
        self.turn = self.seconds + float(sys.stdin.readline())

    def __call__(self, *values: Any, **_: Any) -> None:
        """Handle a line that train.py prints."""
        now = time.perf_counter()
        line = " ".join(map(str, values))
        names = sys._getframe(1).f_globals
        if line.startswith("step "):  # train.py's evaluation before the first iteration is done
            self.wait()
        elif found := re.match(r"iter (\d+): loss", line):
            assert self.began is not None, "train.py's first evaluation did not come"
            self.seconds += now - self.began
            number = int(found[1])
            last = number >= names["max_iters"]
            self.first = self.first or self.seconds
            if (number and number % self.every == 0) or last:
                self.measure(number + 1, names)
            if self.seconds >= self.turn and not last:
                self.tell(event="turn", seconds=self.seconds)
                self.wait()
        self.began = time.perf_counter()

    def measure(self, iterations: int, names: dict[str, Any]) -> None:
        """Measure the loss over the whole validation part."""
        model, T = names["raw_model"], names["block_size"]
        model.eval()
        try:
            with names["ctx"]:  # with targets, nanoGPT computes logits at all positions
                loss = loss_over(lambda ids: model(ids, ids)[0], self.ids, T, names["device"])
        finally:
            model.train()
        row = {"seconds": self.seconds, "first": self.first, "iterations": iterations, "loss": loss}
        self.tell(event="row", **row, parameters=sum(p.numel() for p in model.parameters()))


def main() -> None:
    """Run the train.py in the current folder."""
    every, seed, val = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # all other output goes to stderr
    sys.argv = sys.argv[4:]
    sys.path.insert(0, os.getcwd())  # noqa: PTH109
    real = torch.manual_seed  # train.py has a fixed seed
    torch.manual_seed = lambda number: real(number + seed)  # type: ignore[assignment]
    watch = Watch(every, np.fromfile(val, dtype=np.uint16), channel)
    runpy.run_path(sys.argv[0], init_globals={"print": watch}, run_name="__main__")
    watch.tell(event="end", seconds=watch.seconds)


if __name__ == "__main__":
    main()
