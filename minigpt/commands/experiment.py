"""Train a small model with a mistake on purpose, and one without the mistake. Explain the difference.

minigpt experiment                       # lists all experiments
minigpt experiment no-causal-mask
minigpt experiment no-warmup --plot no-warmup.png
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minigpt.console import command_line
from minigpt.console.flags import POSITIONAL
from minigpt.console.language import chosen_language
from minigpt.data.field_names import DataOptions
from minigpt.errors import InputError, Message, unknown_name


@dataclass(frozen=True, kw_only=True)
class Options(command_line.CommandOptions, DataOptions):
    """Train two small models, the usual one and one that fails on purpose, and say why. No NAME: the list."""

    RANGES = {"steps": (1, 10**6), "seed": (0, 2**63 - 1), "threads": (1, 1024)}

    name: str = field(default="", metadata=POSITIONAL)
    """what goes wrong"""
    train_data: Path = Path("data/data.jsonl")
    """file of questions and answers"""
    steps: int = 120
    """number of training steps of each of the two runs"""
    seed: int = 42
    """seed of weights and order of the data"""
    threads: int = 1
    """number of CPU threads; so small a model is fastest with one"""
    plot: Path | None = None
    """also draw the curves: .png, .svg, .pdf, or .html"""


def main(options: Options) -> dict[str, Any]:
    """Run an experiment and print the results, or list all experiments."""
    import torch

    from minigpt.console.terminal import ProgressLine, table_text
    from minigpt.data.reader import read_conversations
    from minigpt.errors import printable_lines
    from minigpt.lens.experiments import EXPERIMENTS, experiment
    from minigpt.lens.pictures import check_picture, write_picture
    from minigpt.lens.results import in_terminal
    from minigpt.lens.words import speaker

    language, width = chosen_language(options.language), shutil.get_terminal_size().columns
    say = speaker(language)
    if not options.name:
        rows = [(name, say(about.what)) for name, about in EXPERIMENTS.items()]
        print(table_text(say("experiments"), ("NAME", ""), rows, (), width))
        return {"experiments": list(EXPERIMENTS)}
    if options.name not in EXPERIMENTS:
        raise InputError(unknown_name("experiment", options.name, EXPERIMENTS))
    if options.plot is not None:
        check_picture(options.plot)
    torch.set_num_threads(options.threads)
    conversations, _ = read_conversations(
        options.train_data, options.strict, options.encoding, options.field_names
    )
    with ProgressLine(options.name, 2 * options.steps, patience=2.0) as progress:
        result = experiment(options.name, conversations, options.steps, options.seed, progress.update)
    print(printable_lines(in_terminal(result, language, width)))
    if options.plot is not None:
        write_picture([result], options.plot, language)
        command_line.show(Message("picture: {path}", path=options.plot))
    return result.as_dict()


if __name__ == "__main__":
    command_line.run(Options, main)
