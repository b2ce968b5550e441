"""Running a door inside the test's process: `Result`, and the type of the fixture `run_door`."""

from typing import NamedTuple, Protocol


class Result(NamedTuple):
    """What a door left behind."""

    code: int
    out: str
    err: str


class RunDoor(Protocol):
    """`run_door("train.py", "--dry_run")`, as `python ./minigpt/train.py --dry_run`."""

    def __call__(self, script: str, *arguments: object, stdin: bytes = b"") -> Result: ...
