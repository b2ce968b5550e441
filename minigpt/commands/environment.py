"""Say what is installed and what machine this is: a report to paste into an issue.

    minigpt env
    minigpt env --json      # the same as one JSON object, on the last line

Besides versions, processor, memory and GPUs it says whether a CPU writes answers by the native step, and if
not, why. What cannot be found out is "unknown" in its line.
"""

from dataclasses import dataclass
from typing import Any

from minigpt.console import command_line
from minigpt.errors import printable


@dataclass(frozen=True, kw_only=True)
class Options(command_line.CommandOptions):
    """Say what is installed and what machine this is, to paste into an issue."""


def main(options: Options) -> dict[str, Any]:
    """Ask, and print a line for each fact."""
    from minigpt.diagnosis.installation import facts

    found = facts()
    lines = [line for fact in found for line in fact.lines.items()]
    width = max(len(label) for label, _ in lines)
    for label, text in lines:
        print(printable(f"{label:<{width}}  {text}"))
    return {fact.name: fact.data for fact in found}


if __name__ == "__main__":
    command_line.run(Options, main)
