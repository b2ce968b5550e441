"""One training run, from its configuration to its result. In Python, call `train` or `finetune`.

result = train(recipe="qa-cpu", output="run", max_steps=100)
result = train(TrainConfig(...))
"""

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from minigpt.console.command_line import obey_swallowed, remembered_signals, show
from minigpt.console.language import say
from minigpt.console.terminal import seconds, warn
from minigpt.data.batches import EncodedExamples
from minigpt.data.prompts import EncodedPrompts
from minigpt.data.windows import TextPart
from minigpt.errors import InputError, Message
from minigpt.families.registry import LanguageModel, parameter_table
from minigpt.storage.files import MANIFEST
from minigpt.storage.regular_files import resolved
from minigpt.training import autosize, checkpoint, classification, estimate, run_data
from minigpt.training.config import RUN_FILE, TrainConfig, checked_config, read_run
from minigpt.training.data_summary import summarize
from minigpt.training.distributed import Processes, is_restarted, join_processes
from minigpt.training.finetune_config import FinetuneConfig
from minigpt.training.lock import lock_folder
from minigpt.training.loop import Trainer
from minigpt.training.resolve import resolve
from minigpt.training.run_data import AnyData
from minigpt.training.sizing import parse_size
from minigpt.weights.pretrained import CONFIG

__all__ = ["finetune", "run_training", "train"]


def finetune(**options: Any) -> dict[str, Any]:
    """Continue to train a model. Return the dict that `minigpt finetune --json` prints.

    Args:
        options: fields of FinetuneConfig, named as the flags of `minigpt finetune`; a path may be a string.

    Raises:
        InputError, Stopped: as `train`.
    """
    return run_training(resolve(options, FinetuneConfig), options)


def train(config: TrainConfig | None = None, **options: Any) -> dict[str, Any]:
    """Train a model. Returns the same dict that `minigpt train --json` prints: steps, val_loss, model, ...

    Args:
        config: a whole configuration, of which `options` replaces values. Without it, the values that
            `options` leaves out come from a recipe, a file of default values.
        options: fields of TrainConfig, named as the flags of `minigpt train`; a path may be a string.

    Raises:
        InputError: for an unknown option (the message suggests a similar name), a bad value, unreadable data,
            or an output folder that already holds a run.
        Stopped: after Ctrl-C or SIGTERM. The run has been saved; `resume=True` continues it.
    """
    if config is None:
        return run_training(resolve(options), options)
    values = {**config.as_dict(), **options}
    return run_training(checked_config(values, "options", type(config)), options)


def run_training(config: TrainConfig, given: Collection[str]) -> dict[str, Any]:
    """Read the data, build the model, print the estimate, and train.

    Args:
        config: options of the run.
        given: names of the options that the user gave. --size does not change these options.
    """
    if is_restarted():
        # torchrun has started the same command again after a crash, so resume the run
        config = dataclasses.replace(config, resume=True, overwrite=False)
        if (config.output / RUN_FILE).exists():
            begun = read_run(config.output, type(config))  # holds what --size and --precision auto chose
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
    if config.size and not is_chosen and config.starts_from is None:
        autosize.check_flags(config, given)
    has_checkpoint = is_locked = False
    with processes.shared_errors():
        if processes.is_main:
            if any((output / name).exists() for name in (CONFIG, MANIFEST)):
                # OUTPUT is a model's folder. If a run wrote its files into this folder, the model could no
                # longer be loaded.
                text = "{output} is the folder of a model: choose another folder with --output"
                raise InputError(Message(text, output=output))
            # lock the folder already here, because reading the data may take minutes
            if output.is_dir() and not config.dry_run:
                locks.callback(lock_folder(output).release)
                is_locked = True
                checkpoint.clear_leftovers(output)
            has_checkpoint = bool(checkpoint.list_checkpoints(output))
    has_checkpoint = processes.broadcast(has_checkpoint)
    occupied = has_checkpoint and not (config.resume or config.dry_run)
    if occupied and not config.overwrite:
        raise InputError(
            Message(
                "{output} holds a run already: --resume continues it, --overwrite moves it to "
                "{output}.previous and starts anew, --output FOLDER writes elsewhere",
                output=output,
            )
        )
    with processes.main_first():
        data = _read_data(config)
    processes.require_same(f"{data.train.fingerprint} {data.val.fingerprint}", "data")
    record = autosize.read_record(output) if config.size and is_chosen else None
    if config.size and config.starts_from is not None:
        config = _with_steps(config, data, processes)
    elif config.size and not is_chosen:
        decision = autosize.decide(config, data, given, processes)
        config, data, record = decision.config, decision.data, decision.record
    for sentence in data.warnings:
        warn(sentence)
    with processes.shared_errors():
        if config.starts_from is None:
            _require_memory(config, data.tokenizer.get_vocab_size())
    trainer = Trainer(config, data, processes)
    is_text = isinstance(data.train, EncodedExamples | TextPart)
    # GRPO's data are prompts. Its loss counts none of their tokens, so there is nothing to summarise.
    is_text = is_text and not isinstance(data.train, EncodedPrompts)
    summary = summarize(data, config) if is_text else None
    trainer.notes = {autosize.RECORD: record} if record else {}
    if summary is not None:
        trainer.notes = {"data": summary.as_dict(), **trainer.notes}
    if config.precision == "auto":
        print(say("precision auto: {precision} on this machine", precision=trainer.config.precision))
    values = {"data": data.sentence, "parameters": _counted(trainer.model), "device": trainer.device}
    print(say("{data}; {parameters} on {device}", **values))
    # a resumed run has already printed these warnings when it began
    is_told = config.resume and has_checkpoint and not config.allow_changed_data
    for sentence in summary.warnings() if summary is not None and not is_told else ():
        warn(sentence)
    if config.dry_run:
        estimate.print_parameters(trainer)
    elif config.resume and not has_checkpoint:
        print(say("{output} holds no checkpoint yet: the run starts from the beginning", output=output))
    elif config.resume:
        folder = trainer.resume()
        values = {"folder": folder, "done": trainer.progress.steps_done, "total": trainer.step.total_steps}
        print(say("resumed from {folder}: {done} of {total} steps are done", **values))
    if processes.size == 1:
        expected = estimate.estimate(trainer, math.inf if config.dry_run else autosize.free_memory(config))
        print(expected.sentence())
        if config.dry_run:
            counted = {"parameters": sum(count for _, count in parameter_table(trainer.model))}
            return {**counted, **dataclasses.asdict(expected), **trainer.notes}
    else:
        steps = trainer.step.total_steps - trainer.progress.steps_done
        show(f"{processes.size} processes, {config.parallel}: {steps:,} steps")
    with processes.shared_errors():
        if processes.is_main:
            # move the old run only now: an error before this line leaves the old run in its place
            if occupied:
                _move_aside(output)
            if occupied or not is_locked:
                locks.callback(lock_folder(output).release)
    obey_swallowed()
    result = trainer.run()
    text = (
        "done: {steps} steps in {time}; the best validation loss, {val_loss:.4f}, was at step {best_step}: "
        "{model}"
    )
    values = {name: result[name] for name in ("steps", "val_loss", "best_step", "model")}
    print(say(text, **values, time=seconds(result["seconds"])))
    if record:
        record, sentence = autosize.compare(record, result)
        show(sentence)
        if processes.is_main:
            autosize.write_record(output, record)
        result = {**result, autosize.RECORD: record}
    return result


def _with_steps(config: TrainConfig, data: AnyData, processes: Processes) -> TrainConfig:
    """Choose the number of steps for --size (a time or FLOPs), if training begins with given weights.

    It is the number that fits into --size, but not more than the steps of all epochs.
    """
    size = parse_size(config.size)
    if size.unit == "name":
        raise InputError(
            f"--size {config.size} chooses a new model; with given weights it may be a time, such as 10min"
        )
    trainer = Trainer(dataclasses.replace(config, size=""), data, processes)
    expected = estimate.estimate(trainer)
    if size.unit == "seconds":
        most = int((size.amount - 11 * expected.evaluation_seconds) / expected.step_seconds)
    else:
        most = int(size.amount / expected.flops_per_step)
    steps = processes.broadcast(max(1, min(trainer.step.total_steps, most)))
    show(f"size {config.size}: {steps:,} of the {trainer.step.total_steps:,} steps that the epochs have")
    return dataclasses.replace(config, size="", max_steps=steps)


def _read_data(config: TrainConfig) -> AnyData:
    """Read the data for the task of the configuration."""
    if isinstance(config, FinetuneConfig) and config.task == "classification":
        return classification.read_data(config)
    return run_data.read_data(config)


def _counted(model: LanguageModel) -> str:
    """Return the number of the model's parameters as text for a message."""
    total = sum(count for _, count in parameter_table(model))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if trained == total:
        return Message("{total:,} parameters", total=total)
    text = "{trained:,} of {total:,} parameters are trained ({share:.2%})"
    return Message(text, trained=trained, total=total, share=trained / total)


def _require_memory(config: TrainConfig, vocab_size: int) -> None:
    """Raise InputError if the weights alone need more than the free memory.

    Without this error, the operating system would later kill the process, with no message.
    """
    count, free = config.model_config(vocab_size).parameter_count(), autosize.free_memory(config)
    if 4 * count > free and config.parallel == "ddp":
        raise InputError(
            f"{count:,} parameters take {4 * count / 1e9:,.1f} GB in float32, and {free / 1e9:,.1f} GB are "
            "free: lower --n_layer or --n_embd"
        )


def _move_aside(output: Path) -> None:
    """Move the run in `output` to OUTPUT.previous. An older run in OUTPUT.previous is deleted."""
    previous = Path(f"{resolved(output)}.previous")
    if previous.exists():
        if not (previous / RUN_FILE).exists():
            raise InputError(
                f"{output}.previous is in the way and is not a run: move it away, or choose another --output"
            )
        shutil.rmtree(previous)
    output.rename(previous)
    if (previous / "shards").exists():
        # The encoded text depends only on the data, so the new run can use it: move it back.
        output.mkdir()
        (previous / "shards").rename(output / "shards")
    print(say("the earlier run is in {output}.previous now", output=output))
