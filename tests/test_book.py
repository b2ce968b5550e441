"""The book: each chapter has a picture, exercises with solutions, and words that are explained.

What its blocks print is checked by tests/test_documents.py.
"""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BOOK = ROOT / "docs/book"
CHAPTERS = sorted(
    path.name.removesuffix(".md") for path in BOOK.glob("[0-9]*.md") if ".zh-CN" not in path.name
)
ENDINGS = ["", ".zh-CN"]
BACKTICKS = re.compile(r"^(`{3,}).*?^\1$", re.MULTILINE | re.DOTALL)


def prose(name: str) -> str:
    return BACKTICKS.sub("", (BOOK / f"{name}.md").read_text(encoding="utf-8"))


def sections(name: str) -> dict[str, str]:
    """Number of a section, as 6.3 -> its text, blocks included."""
    parts = re.split(r"^## (\d+\.\d+) .*$", (BOOK / f"{name}.md").read_text("utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def test_the_contents_list_each_chapter_in_order() -> None:
    for ending in ENDINGS:
        listed = re.findall(r"^\| \d+ \| \[.*?\]\((.*?)\.md\)", prose(f"README{ending}"), re.MULTILINE)
        assert listed == [f"{chapter}{ending}" for chapter in CHAPTERS]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_is_moderate_and_has_its_picture(chapter: str, ending: str) -> None:
    text = (BOOK / f"{chapter}{ending}.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 325
    picture = re.search(r"^!\[.+\]\((pictures/.+)\)$", text, re.MULTILINE)
    assert picture
    assert picture[1] == f"pictures/{chapter}{ending}.png"
    content = (BOOK / picture[1]).read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) < 60 * 1024
    words = "words.zh-CN.md" if ending else "words.md"
    assert f"]({words})" in text, "new words are linked"


@pytest.mark.parametrize("ending", ENDINGS)
def test_each_exercise_has_a_solution(ending: str) -> None:
    solved = prose(f"solutions-1{ending}") + prose(f"solutions-2{ending}")
    heading = r"^## 第 (\d+) 章$" if ending else r"^## Chapter (\d+)$"
    parts = re.split(heading, solved, flags=re.MULTILINE)
    answers = dict(zip(map(int, parts[1::2]), parts[2::2]))
    assert list(answers) == list(range(1, len(CHAPTERS) + 1))
    for number, chapter in enumerate(CHAPTERS, 1):
        title = "## 习题" if ending else "## Exercises"
        _, exercises = prose(f"{chapter}{ending}").split(title)
        numbers = re.findall(r"^(\d)\. ", exercises, re.MULTILINE)
        assert 2 <= len(numbers) <= 5, chapter
        # a solution may stand for two: "1 and 2."
        found = re.findall(r"^(\d)(?:\.| and | 和 )(?: ?(\d)\.)?", answers[number], re.MULTILINE)
        assert set(numbers) == {digit for pair in found for digit in pair if digit}, chapter


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_the_coverage_names_is_there(ending: str) -> None:
    rows = re.findall(r"^\| (.+?) \| (\[.+\)) \| `(.+)` \|$", prose(f"coverage{ending}"), re.MULTILINE)
    assert len(rows) > 50
    for subject, links, code in rows:
        found = re.findall(r"\[(\d+\.\d+)\]\((.+?)\.md\)", links)
        assert found, subject
        texts = [sections(name)[number] for number, name in found]
        assert any(text.replace("`", "'").find(code.removesuffix(" …")) >= 0 for text in texts), subject


def test_each_picture_is_drawn_by_a_function() -> None:
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib, which is optional")
    drawings = runpy.run_path(str(BOOK / "draw.py"))
    assert list(drawings["DRAWINGS"]) == CHAPTERS
    draw, size = drawings["DRAWINGS"]["06-attention"]
    png = drawings["picture_bytes"](lambda figure, _: draw(figure, lambda english, _: english), "png", size)
    assert drawings["small"](png).startswith(b"\x89PNG")
