"""Parts kill and signal: SIGKILL at named points and at random instants; signals in every phase."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

from minigpt.training import checkpoint
from tests.survival.bench import Bench
from tests.survival.children import SIGNALS, WATCH, Watch, at_point, die, finished, start, watched
from tests.survival.runs import EVERY, newest_step

LIMIT = 5.0  # seconds from a signal to the exit
ONCE = ("reading", "resuming", "estimating")  # phases early in a run, each only once


def kill(bench: Bench) -> None:
    """SIGKILL at every named point, and at random instants."""

    def at(output: Path, point: str) -> bool:
        if point.startswith("old one"):
            while len(checkpoint.list_checkpoints(output)) < 2:
                bench.runs.run(output.name, at_point("folder: parent flushed", die))
            bench.damage_newest(output)
        return bench.runs.run(output.name, at_point(point, die)) == -signal.SIGKILL

    held = bench.chain("points", bench.reference.points, at)
    bench.table.add("kill", "SIGKILL at each named point of writing", len(bench.reference.points), held)
    background = (
        bench.reference.points
        if bench.options.full
        else bench.reference.points[:: max(1, len(bench.reference.points) // 10)]
    )
    killed = 0

    def in_background(output: Path, point: str) -> bool:
        nonlocal killed
        if point.startswith("old one"):
            bench.damage_newest(output)
        code = bench.runs.run(output.name, at_point(point, die), save_async=True)
        killed += code == -signal.SIGKILL
        return code in (-signal.SIGKILL, 0)  # 0: the run has not passed the point

    held = bench.chain("async", background, in_background, save_async=True)
    bench.table.add("kill", "the same, with --save_async", len(background), held, killed=killed)

    def anywhere(output: Path, instant: float) -> bool | None:
        child = start(bench.runs.argv(output.name), bench.runs.log)
        time.sleep(instant)
        os.kill(child, signal.SIGKILL)
        code = finished(child)
        return None if code == 0 else code == -signal.SIGKILL

    # long enough for some checkpoints
    longest = bench.reference.seconds * min(1.0, 10 * EVERY / bench.options.steps)
    instants = [bench.random.uniform(0, longest) for _ in range(bench.options.kills)]
    held = bench.chain("random", instants, anywhere)
    bench.table.add("kill", "SIGKILL at random instants", len(instants), held)


class Signalled(NamedTuple):
    """One trial: the signal, the phase, and the delay after the phase was seen."""

    number: signal.Signals
    phase: str
    later: float  # delay in seconds


def left_before(child: int, phase: int) -> int | None:
    """Wait until a child is in a phase. Return its exit code if it has ended before."""
    while WATCH.get()[0] != phase:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0002)
    return None


def signals(bench: Bench) -> None:
    """A run sends itself SIGTERM at the start of each phase; all signals come from outside in all phases."""
    slowest, too_late, phases = 0.0, 0, dict.fromkeys(Watch.PHASES, 0)

    def judged(output: Path, code: int, number: int, seconds: float, before: int) -> bool:
        nonlocal slowest
        phase, steps, _ = WATCH.get()
        slowest = max(slowest, seconds)
        newest = newest_step(output)
        # No step is lost. Before the first step, step 0 may be saved or not.
        kept = newest == max(steps, before) or (newest, max(steps, before)) == (0, -1)
        held = kept and seconds <= LIMIT and (code == 128 + number or (code == 0 and bench.is_done(output)))
        if not held:
            said = bench.runs.said()[-400:]
            print(f"signal {number}: {code}, {seconds:.1f} s, {phase}, {steps}; {said}", file=sys.stderr)
        return held

    def begun(output: Path, phase: str) -> None:
        if phase == "resuming" and not (output / "run.json").exists():
            bench.runs.run(output.name, at_point("pruning: begun", die))

    def inside(output: Path, phase: str) -> bool:
        begun(output, phase)
        before = newest_step(output)
        code = bench.runs.run(output.name, lambda: watched(phase))
        seconds = time.monotonic() - WATCH.get()[2]
        return judged(output, code, signal.SIGTERM, seconds, before) and code == 128 + signal.SIGTERM

    def outside(output: Path, trial: Signalled) -> bool | None:
        nonlocal too_late
        begun(output, trial.phase)
        before = newest_step(output)
        child = start(bench.runs.argv(output.name), bench.runs.log, watched)
        code = left_before(child, Watch.PHASES.index(trial.phase))
        if code is None:
            time.sleep(trial.later)
            sent, (number, *_) = time.monotonic(), WATCH.get()
            os.kill(child, trial.number)  # works for an ended child, too, until the parent waits for it
            code = finished(child)
            seconds, phase = time.monotonic() - sent, Watch.PHASES[number]
            if code != 0 or phase in ONCE:
                phases[phase] += 1
                return judged(output, code, trial.number, seconds, before) and code != 0
        if code != 0:
            print(f"without a signal: exit {code}; {bench.runs.said()[-400:]}", file=sys.stderr)
            return False
        too_late += 1
        return None

    wanted = [phase for phase in Watch.PHASES if phase != "elsewhere"]
    held = bench.chain("phases", wanted, inside)
    bench.table.add("signal", "SIGTERM in each phase", len(wanted), held)
    trials = []
    for number in range(bench.options.signals):
        phase = Watch.PHASES[number % len(Watch.PHASES)]
        longest = bench.reference.seconds / 2 if phase == "elsewhere" else 0.01
        trials.append(Signalled(SIGNALS[number % len(SIGNALS)], phase, bench.random.uniform(0, longest)))
    held = bench.chain("signals", trials, outside)
    what = f"signals from outside in all phases: saved, no step lost, exit within {LIMIT:.0f} s"
    bench.table.add(
        "signal", what, len(trials), held, slowest=round(slowest, 2), phases=phases, too_late=too_late
    )
