"""Train a GPT on questions and answers, or on plain text.

    python ./minigpt/train.py                      # picks a recipe by device, says which and why
    minigpt train --recipe qa-cpu --num_train_epochs 5
    minigpt train --text book.txt --recipe shakespeare-cpu
    minigpt train --size 10min                     # chooses model and steps for the data and this machine
    minigpt train --resume                         # after Ctrl-C or a crash: continues to the same bits

Reads data/train.jsonl, data/val.jsonl and data/vocab.json, or what --text names; writes output/ (see `--help`
for every path).
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: Python put this folder first, where our names would shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from minigpt.console import command_line
from minigpt.console.terminal import seconds
from minigpt.errors import InputError
from minigpt.training.config import FOREIGN_OPTIONS, RUN_FILE, TrainConfig, read_recipe, read_run
from minigpt.training.sizing import parse_size

if TYPE_CHECKING:
    from minigpt.training.distributed import Processes


_GIVEN: set[str] = set()  # flags on the command line that `defaults` saw: --size leaves them alone


def defaults(argv: list[str]) -> TrainConfig:
    """What the flags do not say: the recipe's values, or with --resume those of the run.

    Raises:
        InputError: for a recipe or a run that cannot be read; for a run that began with another recipe.
    """
    _hush()
    _GIVEN.clear()
    _GIVEN.update(flags_of(argv))
    first = _peek(argv)
    if "--resume" in argv:
        run = read_run(Path(first.get("output", "output")))
        if first.get("recipe", run.recipe) != run.recipe:
            raise InputError(
                f"the run in {run.output} began with --recipe {run.recipe}, got --recipe {first['recipe']}: "
                "--resume keeps the run's; change single values by their flags"
            )
        if first.get("size", run.size) != run.size:
            began = f"began with --size {run.size}" if run.size else "began without --size"
            raise InputError(
                f"the run in {run.output} {began}, got --size {first['size']}: --resume keeps what was "
                "chosen then; raise --max_steps to train for longer"
            )
        return run
    if "recipe" in first:
        return _of_family(read_recipe(first["recipe"]), first.get("family"))
    if "--help" in argv or "-h" in argv:
        return read_recipe("qa-cpu")
    if "size" in first:
        parse_size(first["size"])  # before anything is printed
    if "size" in first and "text" in first:
        print("recipe shakespeare-cpu: no --recipe was given and the data is plain text")
        return _of_family(read_recipe("shakespeare-cpu"), first.get("family"))
    from minigpt.devices import pick_device

    device = pick_device(first.get("device", "auto"))
    name = "qa-gpu" if device.type == "cuda" else "qa-cpu"
    print(f"recipe {name}: no --recipe was given and the device is {device.type}")
    return _of_family(read_recipe(name), first.get("family"))


def _hush() -> None:
    """Of several processes only the first one prints results; see minigpt.training.distributed."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 -- until it ends


def _of_family(recipe: TrainConfig, family: str | None) -> TrainConfig:
    """A recipe with the family of the command line, less the options of its own family, which are named."""
    if family is None or family == recipe.family or family not in FOREIGN_OPTIONS:  # the parser says which
        return recipe
    nothing = FOREIGN_OPTIONS[family]
    dropped = [f"{name}={value}" for name in nothing if (value := getattr(recipe, name)) != nothing[name]]
    if dropped:
        print(f"family {family} has no such options, the recipe's values do not count: {', '.join(dropped)}")
    values: dict[str, Any] = {**nothing, "family": family}
    return dataclasses.replace(recipe, **values)


_PEEKED = ("recipe", "output", "device", "family", "size", "text")


def flags_of(argv: Iterable[str]) -> frozenset[str]:
    """Names of the flags on a command line.

    >>> sorted(flags_of(["--n_layer=3", "--no_bias", "--output", "x"]))
    ['bias', 'n_layer', 'output']
    """
    flags = [word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")]
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    return frozenset(flag if flag in known else flag.removeprefix("no_") for flag in flags)


def _peek(argv: list[str]) -> dict[str, str]:
    """The values of some flags, before all of them are parsed in full."""
    found = {}
    for index, argument in enumerate(argv):
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and name in _PEEKED:
            if not equals and index + 1 < len(argv):
                value = argv[index + 1]
            if value:
                found[name] = value
    return found


def main(config: TrainConfig) -> dict[str, Any]:
    """Read, build, estimate, train."""
    from minigpt.training.distributed import is_restarted, join_processes

    if is_restarted():  # by torchrun, after a process died: with the flags that the run began with
        config = dataclasses.replace(config, resume=True, overwrite=False)
        if (config.output / RUN_FILE).exists():
            begun = read_run(config.output)  # with what --size and --precision auto chose the first time
            config = begun if config.size else dataclasses.replace(config, precision=begun.precision)
    with command_line.remembered_signals(), contextlib.ExitStack() as locks, join_processes() as processes:
        return _main(config, locks, processes)


def _main(config: TrainConfig, locks: contextlib.ExitStack, processes: "Processes") -> dict[str, Any]:
    from minigpt.training import autosize, checkpoint
    from minigpt.training import estimate as report
    from minigpt.training.lock import lock_folder
    from minigpt.training.loop import Trainer
    from minigpt.training.run_data import read_data
    from minigpt.training.stop_request import Stopped

    output = config.output
    if config.dry_run and processes.size > 1:
        raise InputError("--dry_run looks at the machine that it runs on: run it as one process")
    is_chosen = config.resume and (output / RUN_FILE).exists()
    if config.size and not is_chosen:
        autosize.check_flags(config, _GIVEN)
    has_checkpoint = is_locked = False
    with processes.shared_errors():
        if processes.is_main:
            if output.is_dir() and not config.dry_run:  # at once, not after minutes of reading data
                locks.callback(lock_folder(output).release)
                is_locked = True
                checkpoint.clear_leftovers(output)
            has_checkpoint = bool(checkpoint.list_checkpoints(output))
    has_checkpoint = processes.broadcast(has_checkpoint)
    occupied = has_checkpoint and not (config.resume or config.dry_run)
    if occupied and not config.overwrite:
        raise InputError(
            f"{output} holds a run already: --resume continues it, --overwrite moves it to "
            f"{output}.previous and starts anew, --output FOLDER writes elsewhere"
        )
    with processes.main_first():
        data = read_data(config)
    processes.require_same(f"{data.train.fingerprint} {data.val.fingerprint}", "data")
    record = autosize.read_record(output) if config.size and is_chosen else None
    if config.size and not is_chosen:
        decision = autosize.decide(config, data, _GIVEN, processes)
        config, data, record = decision.config, decision.data, decision.record
    trainer = Trainer(config, data, processes)
    trainer.notes = {autosize.RECORD: record} if record else {}
    if config.precision == "auto":
        print(f"precision auto: {trainer.config.precision} on this machine")
    print(f"{data.sentence}; {trainer.model.config.parameter_count():,} parameters on {trainer.device}")
    if config.dry_run:
        report.print_parameters(trainer)
    elif config.resume and not has_checkpoint:
        print(f"{output} holds no checkpoint yet: the run starts from the beginning")
    elif config.resume:
        folder = trainer.resume()
        done = f"{trainer.progress.steps_done} of {trainer.step.total_steps}"
        print(f"resumed from {folder}: {done} steps are done")
    if processes.size == 1:
        expected = report.estimate(trainer)
        print(expected.sentence())
        if config.dry_run:
            counted = {"parameters": trainer.model.config.parameter_count()}
            return {**counted, **dataclasses.asdict(expected), **trainer.notes}
    else:
        steps = trainer.step.total_steps - trainer.progress.steps_done
        print(f"{processes.size} processes, {config.parallel}: {steps:,} steps")
    with processes.shared_errors():
        if processes.is_main:
            if occupied:  # not earlier: a missing file or a wrong size must not cost the old run its place
                _move_aside(output)
            if occupied or not is_locked:
                locks.callback(lock_folder(output).release)
    command_line.obey_swallowed()
    try:
        result = trainer.run()
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.code)
    print(
        f"done: {result['steps']} steps in {seconds(result['seconds'])}; the best validation loss, "
        f"{result['val_loss']:.4f}, was at step {result['best_step']}: {result['model']}"
    )
    if record:
        record, sentence = autosize.compare(record, result)
        print(sentence)
        if processes.is_main:
            autosize.write_record(output, record)
        result = {**result, autosize.RECORD: record}
    return result


def _move_aside(output: Path) -> None:
    """Move a run to OUTPUT.previous, in place of a run that lies there."""
    previous = output.absolute().with_name(f"{output.absolute().name}.previous")
    if previous.exists():
        if not (previous / RUN_FILE).exists():
            raise InputError(
                f"{output}.previous is in the way and is no run: move it away, or choose another --output"
            )
        shutil.rmtree(previous)
    output.rename(previous)
    if (previous / "shards").exists():  # the encoded text is not the run's: it is used again
        output.mkdir()
        (previous / "shards").rename(output / "shards")
    print(f"the earlier run is in {output}.previous now")


if __name__ == "__main__":
    command_line.run(TrainConfig, main, defaults=defaults)
