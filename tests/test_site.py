"""The site of the documents: built without a warning and without a network, whole, in both languages."""

import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import minigpt
from minigpt.__main__ import COMMANDS
from tests.browser import Browser

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "docs/site/build.py"
MISSING = [name for name in ("sphinx", "furo", "myst_parser") if importlib.util.find_spec(name) is None]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

with_sphinx = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (make site)")
with_browser = pytest.mark.skipif(
    CHROMIUM is None or shutil.which("bash") is None, reason="chromium, which shows the page here, is missing"
)
OFFLINE = """
import runpy, socket, sys
def refuse(*arguments): raise OSError("the build asks for a network")
socket.socket.connect = socket.getaddrinfo = refuse
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def source_pages() -> set[str]:
    found = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs/book").glob("*.md")]
    return {f"{path.relative_to(ROOT).with_suffix('')}" for path in found if ".zh-CN" not in path.name}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    code = OFFLINE.replace("sys.argv[0]", repr(str(BUILD)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return folder


@with_sphinx
@pytest.mark.parametrize("language", ["en", "zh"])
def test_each_page_is_there_and_has_its_other_edition(site: Path, language: str) -> None:
    pages = {
        str(path.relative_to(site / language).with_suffix("")) for path in (site / language).rglob("*.html")
    }
    verbs = {f"docs/commands/{verb}" for verb in COMMANDS}
    names = {f"docs/reference/{name}" for name in minigpt.__all__}
    assert {"index", *source_pages(), *verbs, *names} <= pages
    assert "search" in pages
    for page in pages:
        path = site / language / f"{page}.html"
        text = path.read_text(encoding="utf-8")
        (other,) = re.findall(r'class="edition" href="([^"]+)"', text)
        expected = site / {"en": "zh", "zh": "en"}[language] / f"{page}.html"
        assert (path.parent / other).resolve() == expected
        assert expected.is_file()
        assert f'lang="{language}' in text.split("<head>")[0]


@with_sphinx
def test_the_page_for_a_wrong_address_leads_to_both_languages(site: Path) -> None:
    links = re.findall(r'class="edition" href="([^"]+)"', (site / "404.html").read_text(encoding="utf-8"))
    assert links == ["en/index.html", "zh/index.html"]
    assert all((site / link).is_file() for link in links)


@with_sphinx
def test_a_public_name_s_page_has_its_types_and_its_text(site: Path) -> None:
    text = (site / "en/docs/reference/load_model.html").read_text(encoding="utf-8")
    plain = re.sub(r"<[^>]+>|\s+", "", text)
    assert "minigpt.load_model(" in plain
    assert re.search(r"device:str[^,]*='cpu'", plain.replace("&#39;", "'"))
    documented = str(minigpt.load_model.__doc__).split(".")[0]
    assert "".join(documented.split()) in plain


@with_sphinx
def test_links_between_pages_lead_somewhere(site: Path) -> None:
    for path in [*site.glob("en/**/*.html"), *site.glob("zh/**/*.html")]:
        for target in re.findall(r'href="([^"#?]+)[^"]*"', path.read_text(encoding="utf-8")):
            if not re.match(r"https?:|mailto:|data:", target):
                assert (path.parent / target).exists(), f"{path.relative_to(site)}: {target}"


@with_sphinx
def test_the_pages_ask_for_nothing_from_a_network(site: Path) -> None:
    asks = re.compile(
        r"<(?:script|img|iframe|source)[^>]*\ssrc=\"(?:https?:)?//|<link[^>]*(?:stylesheet|preload|icon)[^>]*href=\"(?:https?:)?//"
        r"|@import[^;]*//|url\(['\"]?(?:https?:)?//"
    )
    for path in site.rglob("*"):
        if path.suffix in (".html", ".css") and "source" not in path.relative_to(site).parts[0]:
            assert not asks.search(path.read_text(encoding="utf-8")), path


@with_sphinx
@pytest.mark.parametrize("word", ["注意力", "词表", "熵"])
def test_the_index_finds_a_chinese_word(site: Path, word: str) -> None:
    """In all pages that have it; not in all pages."""
    index = json.loads((site / "zh/searchindex.js").read_text("utf-8")[len("Search.setIndex(") : -1])
    pairs = [word[i : i + 2] for i in range(max(1, len(word) - 1))]
    found = set.intersection(*(
        {one for terms in (index["terms"], index["titleterms"]) for one in _numbers(terms.get(pair, []))}
        for pair in pairs
    ))  # fmt: skip
    texts = [(site / "source/zh" / f"{name}.md").read_text("utf-8") for name in index["docnames"]]
    having = {number for number, text in enumerate(texts) if word in text}
    assert having
    assert having <= found
    assert len(found) < len(texts)


def _numbers(value: Any) -> list[int]:
    return value if isinstance(value, list) else [value]


@with_sphinx
@with_browser
def test_a_browser_finds_the_page_of_a_chinese_word(site: Path) -> None:
    assert CHROMIUM is not None
    with Browser(CHROMIUM) as browser:
        browser.open(site / "zh/index.html", width=390, language="zh-CN")
        assert browser.run("document.documentElement.scrollWidth") <= 390
        browser.run("location.href = 'search.html?q=' + encodeURIComponent('注意力')")
        browser.until("document.querySelectorAll('#search-results li a').length > 0")
        links = browser.run("[...document.querySelectorAll('#search-results li a')].map((a) => a.href)")
        assert any("docs/families.html" in link for link in links)
        assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []


# -- without Sphinx ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def build() -> dict[str, Any]:
    return runpy.run_path(str(BUILD), run_name="build")


def test_pages_are_copied_with_links_that_hold(build: dict[str, Any], tmp_path: Path) -> None:
    build["stage"]("zh", tmp_path)
    for name in source_pages():
        assert (tmp_path / f"{name}.md").is_file()
    text = (tmp_path / "index.md").read_text(encoding="utf-8")
    assert ".zh-CN" not in text
    assert "(docs/commands.md)" in text
    assert (tmp_path / "docs/commands/train.md").read_text("utf-8").startswith("# minigpt train\n")


@pytest.mark.parametrize("target", ["docs/nowhere.md", "nothing.png", "docs", "docs/api.md"])
def test_a_dead_link_is_an_error(build: dict[str, Any], tmp_path: Path, target: str) -> None:
    """Also one to the English edition in the Chinese one."""
    page = ROOT / "README.zh-CN.md"
    known = build["pages"]("zh")
    text = f"# A page\n\n```text\n[no link](nowhere.md)\n```\n\n[a link]({target})\n"
    (tmp_path / "README.zh-CN.md").write_text(text, encoding="utf-8")
    staged = build["_staged"]
    before = staged.__globals__["ROOT"]
    staged.__globals__["ROOT"] = tmp_path
    try:
        with pytest.raises(build["DeadLinkError"], match=re.escape(target)):
            staged("index", tmp_path / page.name, known, tmp_path)
    finally:
        staged.__globals__["ROOT"] = before
