"""Sends mixed requests to the engine for minutes, and checks that memory, threads and slots stay constant.

    python benchmarks/soak.py --minutes 30 --output benchmarks/results/NAME.json
    python benchmarks/soak.py --minutes 0.05 --clients 2                        # takes seconds

The model is tiny and random. A thread runs the engine, as in a server. Clients send one request after
another: prompts of all lengths, half of them with a common prefix, with options of all kinds. A third of the
requests is cancelled at some point; sometimes a client sends more than the queue accepts. Now and then a
client compares an answer with the model's answer outside the engine.

At the end the script checks: every request has ended, none failed, all compared answers were equal, all slots
are free, there are no more threads than after the warm-up (the first fifth of the time), and the process has
grown by less than SLACK since then. It prints a row per interval and one JSON object. The exit code is 1 if a
check failed.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import random
import statistics
import threading
import time
from typing import Any

import torch

from benchmarks.turns import surroundings
from minigpt.generation.api import GenerationOptions, generate_ids
from minigpt.generation.engine import Engine, EngineThread, QueueFullError, RequestHandle
from minigpt.model import GPTConfig, GPTLMHeadModel

V, BLOCK, EOS = 200, 128, 2
# Memory that malloc may keep. It returns the end of a heap only from 128 KiB on, each thread has its own
# heap, and a freed block below a used one stays. 64 times 128 KiB for all of this. So a leak of 1 KiB per
# request shows from 8,192 requests on; the result has the number of requests.
SLACK = 64 * 128 * 1024


class Client(threading.Thread):
    """A client thread: sends requests, waits, and cancels until it is told to stop."""

    def __init__(self, engine: Engine, seed: int, compare_every: int) -> None:
        super().__init__(name=f"client {seed}")
        self.engine, self.draw, self.compare_every = engine, random.Random(seed), compare_every
        self.is_over = threading.Event()
        self.counts = {"asked": 0, "refused": 0, "compared": 0, "different": 0}
        self.errors: list[str] = []

    def run(self) -> None:
        """Send one request after another."""
        while not self.is_over.is_set():
            try:
                self.ask()
            except QueueFullError:
                self.counts["refused"] += 1
                time.sleep(0.001)
            except Exception as error:
                self.errors.append(repr(error))
                return

    def ask(self) -> None:
        """Send one request, or several together."""
        draw = self.draw
        prompt = [draw.randrange(3, V) for _ in range(draw.randint(1, 60))]
        if draw.random() < 0.5:
            prompt = [5, 6, 7, 8] * 10 + prompt[:30]
        values: dict[str, Any] = {"max_new_tokens": draw.randint(1, 40)}
        if draw.random() < 0.5:
            values |= {"do_sample": True, "seed": draw.randrange(1000), "top_p": 0.9}
        if draw.random() < 0.3:
            values |= {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3}
        options = GenerationOptions(**values)
        handle = self.submit(prompt, options)
        if draw.random() < 0.05:  # now and then, more than the queue accepts
            self.ask_too_much(prompt, options)
        way = draw.random()
        if way < 0.33:
            stop = draw.randint(0, 20)
            for place, _ in enumerate(handle):
                if place == stop:
                    break
            handle.cancel()
            handle.result(timeout=60)
            return
        found = list(handle) if way < 0.66 else handle.result(timeout=60).ids
        if self.counts["asked"] % self.compare_every == 1:
            self.counts["compared"] += 1
            self.counts["different"] += (
                generate_ids(self.engine.model, [prompt], options, EOS)[0].ids != found
            )

    def ask_too_much(self, prompt: list[int], options: GenerationOptions) -> None:
        """Send more requests than the queue accepts, and cancel them."""
        handles: list[RequestHandle] = []
        try:
            for _ in range(self.engine.max_waiting + self.engine.cache.slots + 1):
                handles.append(self.submit(prompt, options))
        except QueueFullError:
            self.counts["refused"] += 1
        finally:
            for handle in handles:
                handle.cancel()

    def submit(self, prompt: list[int], options: GenerationOptions) -> RequestHandle:
        """Submit a request, and count it."""
        handle = self.engine.submit(prompt, options, EOS)
        self.counts["asked"] += 1
        return handle


def status(name: str) -> int:
    """Return a number of this process from /proc: "VmRSS" in KiB, "Threads"."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise SystemExit(f"the system does not say {name}")


def soak(minutes: float, clients: int, rows: int, interval: float, compare_every: int) -> dict[str, Any]:
    """Let the clients send requests for some minutes. Returns the result."""
    torch.manual_seed(0)
    model = GPTLMHeadModel(GPTConfig(64, 4, 2, 0.0, BLOCK, V))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.25)
    engine = Engine(model, max_rows=rows, max_waiting=4, chunk=16, prefix_mib=1)
    samples: list[dict[str, Any]] = []
    start = time.monotonic()
    with EngineThread(engine):
        users = [Client(engine, seed, compare_every) for seed in range(clients)]
        for user in users:
            user.start()
        while (seconds := time.monotonic() - start) < minutes * 60:
            time.sleep(min(interval, max(0.0, minutes * 60 - seconds)))
            sample = {"seconds": round(time.monotonic() - start, 1), "rss_kib": status("VmRSS")}
            sample |= {"threads": status("Threads"), "running": engine.running, "waiting": engine.waiting}
            samples.append(sample | {"written": engine.statistics.tokens_written})
            print(samples[-1], flush=True)
        for user in users:
            user.is_over.set()
        for user in users:
            user.join(120)
    counts = {name: sum(user.counts[name] for user in users) for name in users[0].counts}
    errors = [error for user in users for error in user.errors]
    return judged(engine, counts, errors, samples, alive=sum(user.is_alive() for user in users))


def judged(
    engine: Engine,
    counts: dict[str, int],
    errors: list[str],
    samples: list[dict[str, Any]],
    alive: int,
) -> dict[str, Any]:
    """Return the result, with the checks that passed and failed."""
    done, warm = engine.statistics, len(samples) // 5 + 1
    early, late = samples[warm : warm + max(1, len(samples) // 5)], samples[-max(1, len(samples) // 5) :]
    growth = 1024 * int(
        statistics.median(sample["rss_kib"] for sample in late)
        - statistics.median(sample["rss_kib"] for sample in early)
    )
    held = {
        "no errors": not errors and not alive and not done.failed,
        "all requests have ended": done.finished + done.cancelled == counts["asked"],
        "the same as alone": counts["different"] == 0 and counts["compared"] > 0,
        "all slots are back": engine.cache.n_free == engine.cache.slots and engine.is_idle,
        "no more threads": max(one["threads"] for one in late) <= max(one["threads"] for one in early),
        "no more memory": growth <= SLACK,
    }
    return {
        "requests": counts | {"finished": done.finished, "cancelled": done.cancelled},
        "errors": errors,
        "tokens": {"read": done.tokens_read, "reused": done.tokens_reused, "written": done.tokens_written},
        "cache_bytes": engine.bytes,
        "growth_bytes": growth,
        "slack_bytes": SLACK,
        "held": held,
        "samples": samples,
    }


def main(arguments: argparse.Namespace) -> int:
    """Run, print, write. Returns 1 if a check failed."""
    torch.set_num_threads(arguments.threads)
    found = soak(
        arguments.minutes, arguments.clients, arguments.rows, arguments.interval, arguments.compare_every
    )
    result = surroundings("soak", Path("random/prompts"), arguments.threads)
    result |= {"minutes": arguments.minutes, "clients": arguments.clients, "rows": arguments.rows} | found
    for promise, is_held in found["held"].items():
        print(f"{promise}: {'yes' if is_held else 'NO'}")
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return int(not all(found["held"].values()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=6, help="threads that ask")
    parser.add_argument("--rows", type=int, default=4, help="requests written at once")
    parser.add_argument("--interval", type=float, default=10.0, help="seconds between two samples")
    parser.add_argument("--compare_every", type=int, default=20, help="of a client's requests")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    sys.exit(main(parser.parse_args()))
