"""The values that `--size` accepts and refuses."""

import pytest

from minigpt.errors import InputError
from minigpt.training.config import TrainConfig
from minigpt.training.sizing import parse_size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0min", "size must be above 0 and at most 720h: got size=0min"),
        ("-3", "size must be small, base, large, a time"),
        ("-3min", "size must be small, base, large, a time"),
        ("banana", "got size=banana"),
        ("10", "size=10 has no unit: write 10min, 10h or 10GFLOP"),
        ("1e30GFLOP", "at most 1e15GFLOP: got size=1e30GFLOP"),
        ("1e999GFLOP", "at most 1e15GFLOP"),
        ("1e-999s", "above 0"),
        ("nanmin", "got size=nanmin"),
        ("10 parsecs", "got size=10 parsecs"),
        ("1_0min", "got size=1_0min"),
        ("١min", "got size=١min"),
        ("9999h", "at most 720h"),
    ],
)
def test_a_bad_size_is_named(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_size(text)
    with pytest.raises(InputError, match=message):
        TrainConfig(size=text)


def test_sizes() -> None:
    forms = (("10min", "10m", "600s", "10 MIN"), ("2h", "120min"))
    same = [{parse_size(text).amount for text in texts} for texts in forms]
    assert same == [{600.0}, {7200.0}]
    assert parse_size("2e6GFLOP").amount == parse_size("2PFLOP").amount == 2e15
    assert [parse_size(name).unit for name in ("small", "Base", "large")] == ["name"] * 3
