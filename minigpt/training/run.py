"""One training run, from its configuration to its result: what `minigpt train` and `minigpt.train` do.

result = train(recipe="qa-cpu", output="run", max_steps=100)
result = train(TrainConfig(...))
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from minigpt.console.command_line import obey_swallowed, remembered_signals
from minigpt.console.terminal import seconds, warn
from minigpt.errors import InputError
from minigpt.training import autosize, checkpoint, estimate, run_data
from minigpt.training.config import RUN_FILE, TrainConfig, checked_config, read_run
from minigpt.training.data_summary import summarize
from minigpt.training.distributed import Processes, is_restarted, join_processes
from minigpt.training.lock import lock_folder
from minigpt.training.loop import Trainer
from minigpt.training.resolve import resolve

__all__ = ["run_training", "train"]


def train(config: TrainConfig | None = None, **options: Any) -> dict[str, Any]:
    """Train a model; returns what `minigpt train --json` prints: steps, val_loss, best_step, model, ...

    Args:
        config: a whole configuration. Left out, what `options` leave out is the recipe's.
        options: fields of TrainConfig, as the flags of `minigpt train` have them; paths may be text.

    Raises:
        InputError: for an unknown option (naming the nearest), a bad value, unreadable data, a folder that
            holds a run already.
        Stopped: after Ctrl-C or SIGTERM; the run has saved itself, and `resume=True` continues it.
    """
    if config is None:
        return run_training(resolve(options), options)
    return run_training(checked_config({**config.as_dict(), **options}, "options"), options)


def run_training(config: TrainConfig, given: Collection[str]) -> dict[str, Any]:
    """Read, build, estimate, train.

    Args:
        given: names of the options that the user gave: `size` leaves them as they are.
    """
    if is_restarted():  # by torchrun, after a process died: with the flags that the run began with
        config = dataclasses.replace(config, resume=True, overwrite=False)
        if (config.output / RUN_FILE).exists():
            begun = read_run(config.output)  # with what --size and --precision auto chose the first time
            config = begun if config.size else dataclasses.replace(config, precision=begun.precision)
    with remembered_signals(), contextlib.ExitStack() as locks, join_processes() as processes:
        return _run(config, given, locks, processes)


def _run(
    config: TrainConfig, given: Collection[str], locks: contextlib.ExitStack, processes: Processes
) -> dict[str, Any]:
    output = config.output
    if config.dry_run and processes.size > 1:
        raise InputError("--dry_run looks at the machine that it runs on: run it as one process")
    is_chosen = config.resume and (output / RUN_FILE).exists()
    if config.size and not is_chosen:
        autosize.check_flags(config, given)
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
        data = run_data.read_data(config)
    processes.require_same(f"{data.train.fingerprint} {data.val.fingerprint}", "data")
    record = autosize.read_record(output) if config.size and is_chosen else None
    if config.size and not is_chosen:
        decision = autosize.decide(config, data, given, processes)
        config, data, record = decision.config, decision.data, decision.record
    with processes.shared_errors():
        _require_memory(config, data.tokenizer.get_vocab_size())
    trainer = Trainer(config, data, processes)
    summary = summarize(data, config)
    trainer.notes = {"data": summary.as_dict(), **({autosize.RECORD: record} if record else {})}
    if config.precision == "auto":
        print(f"precision auto: {trainer.config.precision} on this machine")
    print(f"{data.sentence}; {trainer.model.config.parameter_count():,} parameters on {trainer.device}")
    if not (config.resume and has_checkpoint) or config.allow_changed_data:  # else it was said before
        for sentence in summary.warnings():
            warn(sentence)
    if config.dry_run:
        estimate.print_parameters(trainer)
    elif config.resume and not has_checkpoint:
        print(f"{output} holds no checkpoint yet: the run starts from the beginning")
    elif config.resume:
        folder = trainer.resume()
        done = f"{trainer.progress.steps_done} of {trainer.step.total_steps}"
        print(f"resumed from {folder}: {done} steps are done")
    if processes.size == 1:
        expected = estimate.estimate(trainer)
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
    obey_swallowed()
    result = trainer.run()
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


def _require_memory(config: TrainConfig, vocab_size: int) -> None:
    """Refuse a model that cannot even be made here: the system would end the process without a word."""
    count, free = config.model_config(vocab_size).parameter_count(), autosize.free_memory(config)
    if 4 * count > free and config.parallel == "ddp":
        raise InputError(
            f"{count:,} parameters take {4 * count / 1e9:,.1f} GB in float32, and {free / 1e9:,.1f} GB are "
            "free: lower --n_layer or --n_embd"
        )


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
    if (previous / "shards").exists():  # shards depend on the data, not on the run: the next one uses them
        output.mkdir()
        (previous / "shards").rename(output / "shards")
    print(f"the earlier run is in {output}.previous now")
