"""Parts numbers and order: NaN and infinities; the batches after a resume."""

import itertools
import json
import shutil

from minigpt.data.batches import BatchPlan
from minigpt.training import checkpoint, run_data
from minigpt.training.non_finite import NonFiniteGuard
from tests.survival.bench import Bench
from tests.survival.children import at_point, die, poisoned
from tests.survival.runs import EVERY, digest, is_done, is_finite

ROLLED = EVERY * 8  # number of steps of a run that goes back to a checkpoint


def numbers(bench: Bench) -> None:
    """NaN and infinities in loss, gradient and data: no trace in any checkpoint."""
    count = bench.options.bad_steps
    length = 3 * count
    bad: dict[int, str] = {}
    for number in bench.random.sample(range(length), length):  # at most two in a row
        if len(bad) < count and not ({number - 2, number - 1} <= bad.keys()):
            neighbours = [
                all(n in bad for n in range(s, s + 3) if n != number)
                for s in (number - 2, number - 1, number)
            ]
            if not any(neighbours):
                bad[number] = bench.random.choice(("loss", "gradient", "data"))
    output = bench.runs.folder / "numbers"
    # step numbers in this dictionary count from 0; `skipped` counts from 1
    code = bench.runs.run(
        "numbers", lambda: poisoned(bad), max_steps=length, save_total_limit=length, eval_steps=10
    )
    state = json.loads((output / "last" / "training_state.json").read_bytes()) if code == 0 else {}
    skipped = {n - 1 for first, last in state.get("skipped", ()) for n in range(first, last + 1)}
    bench.table.add(
        "numbers",
        "steps without a finite number: skipped",
        len(bad),
        len(skipped & bad.keys()),
        more_skipped=len(skipped - bad.keys()),
    )
    folders = checkpoint.list_checkpoints(output)
    held = sum(map(is_finite, folders))
    bench.table.add("numbers", "checkpoints that such runs kept: finite", len(folders), held)

    first, second = EVERY * 3, EVERY * 6
    window = dict.fromkeys(range(first, first + 3), "loss")
    straight = bench.runs.run("rolled", lambda: poisoned(window), max_steps=ROLLED)
    same, kills = killed_while_rolling_back(bench, window)
    rolled = bench.runs.folder / "rolled"
    state = json.loads((rolled / "last" / "training_state.json").read_bytes()) if straight == 0 else {}
    went = state.get("rollbacks") == 1 and state["skipped"] == [[first + 1, first + 3]]
    bench.table.add("numbers", "three in a row: back to the last checkpoint, and on", 1, int(bool(went)))
    bench.table.add("numbers", "killed around that, it ends on the same bits", kills, same)
    window |= dict.fromkeys(range(second, second + 3), "gradient")
    bench.runs.log.unlink(missing_ok=True)
    code = bench.runs.run("twice", lambda: poisoned(window), max_steps=ROLLED)
    named = "after going back once already" in bench.runs.said() and "lines " in bench.runs.said()
    bench.table.add("numbers", "a second time: stops, naming lines", 1, int(code == 2 and named))


def killed_while_rolling_back(bench: Bench, window: dict[int, str]) -> tuple[int, int]:
    """Kill at points of the save after a rollback. Return how many runs end the same, and how many ran."""
    expected = digest(bench.runs.folder / "rolled")
    points = (
        bench.reference.points
        if bench.options.full
        else ["folder: made", "folder: flushed", "folder: renamed", "last: made"]
    )
    held = 0
    for number, point in enumerate(points):
        name = f"rolling-{number}"

        def prepare(point: str = point) -> None:
            poisoned(window)
            real = NonFiniteGuard.roll_back

            def roll_back(self: NonFiniteGuard, why: str) -> None:
                at_point(point, die)()
                real(self, why)

            NonFiniteGuard.roll_back = roll_back  # type: ignore[method-assign]

        bench.runs.run(name, prepare, max_steps=ROLLED)
        code = (
            bench.runs.run(name, lambda: poisoned(window))
            if not is_done(bench.runs.folder / name, ROLLED)
            else 0
        )
        held += code == 0 and digest(bench.runs.folder / name) == expected
        shutil.rmtree(bench.runs.folder / name)
    return held, len(points)


def order(bench: Bench) -> None:
    """Check that a resumed run has the batches of an uninterrupted one, and each sample once per epoch."""
    config = bench.runs.config("order")
    data = run_data.read_data(config)
    assert isinstance(data, run_data.RunData)

    def plan() -> BatchPlan:
        return BatchPlan(data.train, batch_size=5, by_length=config.by_length, seed=config.seed)

    epochs = 40
    straight = plan()
    sequence = [straight.rows(number).tolist() for number in range(epochs * len(straight))]
    held = 0
    for _ in range(bench.options.resumes):
        here = bench.random.randrange(len(sequence) - 3)
        resumed = plan()  # a new process knows only the step number
        held += all(resumed.rows(n).tolist() == sequence[n] for n in range(here, here + 3))
    bench.table.add("order", "batches after a resume at a random step", bench.options.resumes, held)
    per_epoch = [sequence[e * len(straight) : (e + 1) * len(straight)] for e in range(epochs)]
    each = list(range(len(data.train)))
    held = sum(sorted(itertools.chain.from_iterable(rows)) == each for rows in per_epoch)
    bench.table.add("order", "epochs with each sample exactly once", epochs, held)
