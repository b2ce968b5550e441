"""Show the loss curves of one or several training runs, and compare the answers of their models.

    minigpt plot output/demo
    minigpt plot output/small output/base output/large --question "四川的省会是哪里？" --output curves.png

The terminal shows a table of size, loss and time, each loss curve as one line of bars (▇▅▃▂), and the
checkpoints.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minigpt.console import command_line
from minigpt.console.flags import POSITIONAL
from minigpt.console.language import chosen_language
from minigpt.errors import InputError, Message


@dataclass(frozen=True, kw_only=True)
class Options(command_line.CommandOptions):
    """Show the curves of training runs, a table of size, loss and time, and answers to the same questions."""

    run: tuple[Path, ...] = field(default=(), metadata=POSITIONAL)
    """folders of runs, as `minigpt train --output` made them"""
    question: tuple[str, ...] = ()
    """one question, or several, that the best model of each run answers"""
    output: Path | None = None
    """also draw the curves: .png, .svg, .pdf, or .html"""


def main(options: Options) -> dict[str, Any]:
    """Read the runs, print and draw them."""
    from minigpt.errors import printable_lines
    from minigpt.lens.curves import compare_runs
    from minigpt.lens.pictures import check_picture, write_picture
    from minigpt.lens.results import in_terminal

    if not options.run:
        raise InputError("RUN is missing: give the folder of a run, such as output/demo")
    if options.output is not None:
        check_picture(options.output, "--output")
    runs, language = compare_runs(options.run, options.question), chosen_language(options.language)
    print(printable_lines(in_terminal(runs, language, shutil.get_terminal_size().columns)))
    if options.output is not None:
        write_picture([runs], options.output, language)
        command_line.show(Message("picture: {path}", path=options.output))
    return runs.as_dict()


if __name__ == "__main__":
    command_line.run(Options, main)
