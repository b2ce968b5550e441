"""docs/sampling.md: its table has every option with default and range, and its picture is right."""

import ast
import dataclasses
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from minigpt.console.flags import flags_of
from minigpt.generation.options import GenerationOptions
from tests.commands import options_of

ROOT = Path(__file__).parents[1]
PAGES = ["docs/sampling.md", "docs/sampling.zh-CN.md"]


@pytest.mark.parametrize("page", PAGES)
def test_the_table_has_every_option_its_default_and_whether_it_is_a_flag(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \| .*\| (✓?) ?\|$", text, re.MULTILINE)
    fields = dataclasses.fields(GenerationOptions)
    assert [name for name, _, _ in rows] == [field.name for field in fields]
    flags = flags_of(options_of("generate"))
    for (name, default, tick), field in zip(rows, fields):
        assert ast.literal_eval(default) == field.default, name
        assert bool(tick) == (name in flags), name


@pytest.mark.parametrize("page", PAGES)
def test_the_table_has_the_ranges_that_are_checked(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    cells = dict(re.findall(r"^\| `(\w+)` \| `.*?` \| .* \| (.*?) \| ✓? ?\|$", text, re.MULTILINE))
    number = r"(-?[\d.,]+(?:e-?\d+)?)"
    for name, (low, high, *_) in GenerationOptions.RANGES.items():
        found = re.match(rf"{number}(?: (?:to|到) {number})?", cells[name])
        assert found, f"{name}: {cells[name]}"
        assert float(found[1].replace(",", "")) == low, name
        if found[2]:
            assert float(found[2].replace(",", "")) == high, name
        else:  # an upper end that is not named must be too large to matter
            assert high >= 10**9, name


@pytest.mark.parametrize("name", ["sampling.png", "sampling.zh-CN.png"])
def test_the_picture_is_there_and_small(name: str) -> None:
    content = (ROOT / "docs" / name).read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) < 200 * 1024


def test_what_the_panels_show() -> None:
    picture: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks/sampling.py"))
    before = picture["distribution"](GenerationOptions(do_sample=True))
    assert before == pytest.approx(picture["PROBABILITIES"])  # they add up to 1
    for values in picture["PANELS"][1:]:
        after = picture["distribution"](GenerationOptions(**{"do_sample": True, **values}))
        assert sum(after) == pytest.approx(1)
        assert after != pytest.approx(before), values  # each panel shows something


def test_it_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'minigpt[plot]'")
    picture: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks/sampling.py"))
    picture["draw"](tmp_path / "picture.png", picture["WORDS"]["sampling.zh-CN.png"])
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
