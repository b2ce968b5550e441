"""Print what is installed and what machine this is, for a bug report.

    minigpt env
    minigpt env --json      # the same as one JSON object, on the last line

The report has versions, processor, memory and GPUs. It also says whether generation in C on a CPU (the
"native step") works on this machine, and if not, why. A fact that cannot be found out is "unknown".
"""

from dataclasses import dataclass
from typing import Any

from minigpt.console import command_line
from minigpt.console.language import columns, translated
from minigpt.errors import printable


@dataclass(frozen=True, kw_only=True)
class Options(command_line.CommandOptions):
    """Say what is installed and what machine this is, to paste into an issue."""


def main(options: Options) -> dict[str, Any]:
    """Collect the facts, and print a line for each."""
    from minigpt.diagnosis.installation import facts

    found = facts()
    lines = [(translated(label), translated(text)) for fact in found for label, text in fact.lines.items()]
    width = max(columns(label) for label, _ in lines)
    for label, text in lines:
        print(printable(f"{label}{' ' * (width - columns(label))}  {text}"))
    return {fact.name: fact.data for fact in found}


if __name__ == "__main__":
    command_line.run(Options, main)
