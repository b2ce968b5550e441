"""Builds the site of the documents, in English and in Chinese: python docs/site/build.py [FOLDER]

The sources are the pages as they are: README.md, and each .md file of docs and of docs/book. X.zh-CN.md is
the Chinese edition of X.md. Each language is a site of its own, FOLDER/en and FOLDER/zh, and a page has the
same address in both: so a switch on each page is a link, and a search finds one language.

Before Sphinx reads them, pages are copied to FOLDER/source/LANGUAGE. There README.md is index.md, the Chinese
edition loses its suffix, docs/commands.md becomes a page per verb, each public name has a page. A relative
link that leads nowhere is an error, as is each warning of Sphinx. Nothing is fetched from a network.
"""

import re
import shutil
import sys
from pathlib import Path

import minigpt

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
LANGUAGES = {"en": "en", "zh": "zh_CN"}  # folder -> Sphinx's name
BOTH = ("data/README.md", "LOG.md", "CHANGELOG.md", "CONTRIBUTING.md")  # one edition for both languages

_LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")
_FENCE = re.compile(r"^(`{3,}).*?^\1$", re.MULTILINE | re.DOTALL)
_EDITION = re.compile(r"^\[(中文|English)\]\(\S+\)\n+", re.MULTILINE)  # the switch replaces it
_NAMED = re.compile(r"^(`{3,})(\w+) (\S+)$", re.MULTILINE)  # the reader makes a file of this name
_TITLES = {
    "en": ("The book", "Pages", "Commands", "Python", "The project", "API reference"),
    "zh": ("教材", "专题", "命令", "Python", "项目", "API 参考"),
}


class DeadLinkError(ValueError):
    """A link to a file that does not exist, or to the wrong edition."""


def pages(language: str) -> dict[str, Path]:
    """Return the pages of a language: name on the site -> source."""
    found = {"index": ROOT / "README.md"}
    for path in sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "docs/book").glob("*.md")]):
        if ".zh-CN" not in path.name:
            found[path.relative_to(ROOT).with_suffix("").as_posix()] = path
    if language == "zh":
        found = {name: path.with_suffix(".zh-CN.md") for name, path in found.items()}
    return found | {name.removesuffix(".md"): ROOT / name for name in BOTH}


def stage(language: str, folder: Path) -> None:
    """Copy the pages of a language to a folder, as Sphinx reads them, and all files that they link to."""
    known = pages(language)
    texts = {name: _staged(name, path, known, folder) for name, path in known.items()}
    verbs = _split_commands(texts)
    api = [f"docs/reference/{name}" for name in minigpt.__all__]
    for page, name in zip(api, minigpt.__all__):
        kind = "autoclass" if name[0].isupper() else "autofunction"
        members = "\n   :members:" if kind == "autoclass" else ""
        texts[page] = f"# minigpt.{name}\n\n```{{eval-rst}}\n.. {kind}:: minigpt.{name}{members}\n```\n"
    book, topics, commands, python, project, reference = _TITLES[language]
    names = " ".join(f"[`{name}`](reference/{name}.md)" for name in minigpt.__all__)
    texts["docs/reference"] = f"# {reference}\n\n{names}\n" + _toctree("", api)
    own = [name for name in known if name.startswith("docs/") and name not in ("docs/commands", "docs/api")]
    front = texts["index"]
    own.sort(
        key=lambda name: front.find(f"({name}.md)") % (len(front) + 1)
    )  # README's order, then the others
    chapters = [name for name in own if name.startswith("docs/book/")]
    chapters.sort(key=lambda name: (not name.endswith("README"), name))
    texts["index"] += (
        _toctree(book, chapters)
        + _toctree(topics, [name for name in own if name not in chapters])
        + _toctree(commands, ["docs/commands"])
        + _toctree(python, ["docs/api", "docs/reference"])
        + _toctree(project, [name.removesuffix(".md") for name in BOTH])
    )
    texts["docs/commands"] += _toctree("", verbs)
    for name, text in texts.items():
        _write(folder / f"{name}.md", text)
    for path in folder.rglob("*.md"):  # of an earlier build
        if path.relative_to(folder).with_suffix("").as_posix() not in texts:
            path.unlink()


def _staged(name: str, path: Path, known: dict[str, Path], folder: Path) -> str:
    """Return a page's text with links that hold on the site. Files that are no pages are copied there."""
    places = {source: place for place, source in known.items()}
    text = _EDITION.sub("", path.read_text(encoding="utf-8"), count=1)

    def link(found: re.Match[str]) -> str:
        target = found[2]
        if re.match(r"https?://|mailto:|#", target):
            return found[0]
        source = (path.parent / target).resolve()
        if name + ".md" in BOTH and source.with_suffix(".zh-CN.md") in places:
            source = source.with_suffix(".zh-CN.md")
        up = "../" * name.count("/")
        if source in places:
            return f"{found[1]}({up}{places[source]}.md)"
        if not source.is_file() or source.suffix == ".md":
            raise DeadLinkError(f"{path.relative_to(ROOT)}: {target} is no file, or no page of this language")
        inside = source.relative_to(ROOT)
        (folder / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / inside)
        return f"{found[1]}({up}{inside.as_posix()})"

    def caption(found: re.Match[str]) -> str:
        return f"{found[1]}{{code-block}} {found[2]}\n:caption: {found[3]}\n"

    parts, end = [], 0
    for block in _FENCE.finditer(text):
        parts += [_LINK.sub(link, text[end : block.start()]), _NAMED.sub(caption, block[0], count=1)]
        end = block.end()
    return "".join([*parts, _LINK.sub(link, text[end:])])


def _split_commands(texts: dict[str, str]) -> list[str]:
    """Make a page of each section of docs/commands.md. Return the names of the pages."""
    first, *sections = re.split(r"^## ", texts["docs/commands"], flags=re.MULTILINE)
    found, lines = [], []
    for section in sections:
        title, body = section.split("\n", 1)
        verb = title.split()[-1]
        found.append(f"docs/commands/{verb}")
        deeper = re.sub(
            r"(\]\()((?!https?:)[^)\s]+\))", r"\1../\2", re.sub(r"^##(#+ )", r"#\1", body, flags=re.M)
        )
        texts[found[-1]] = f"# {title}\n{deeper}"
        lines.append(f"- [`{title}`](commands/{verb}.md)")
    texts["docs/commands"] = f"{first}\n" + "\n".join(lines) + "\n"
    return found


def _toctree(caption: str, names: list[str]) -> str:
    if not names:
        return ""
    title = f":caption: {caption}\n" if caption else ""
    return f"\n```{{toctree}}\n:hidden:\n{title}\n" + "".join(f"/{name}\n" for name in names) + "```\n"


def _write(path: Path, text: str) -> None:
    """Write a file if it changes: Sphinx reads again what is newer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


_FIRST = """<!doctype html>
<html><head><meta charset="utf-8"><title>minigpt</title>
<script>location.replace((navigator.language.startsWith("zh") ? "zh" : "en") + "/index.html")</script></head>
<body><a href="zh/index.html">中文</a> <a href="en/index.html">English</a></body></html>
"""

# A server shows this page for each address without a page. The address says in which folder the site lies.
_NOT_FOUND = """<!doctype html>
<html><head><meta charset="utf-8"><meta name="robots" content="noindex"><title>404 - minigpt</title></head>
<body><p lang="en">There is no such page. <a class="edition" href="en/index.html">English</a></p>
<p lang="zh-CN">没有这一页。<a class="edition" href="zh/index.html">中文</a></p>
<script>
const inside = location.pathname.match(/^(.*?[/])(?:en|zh)[/]/);
for (const link of document.querySelectorAll("a"))
  link.href = (inside ? inside[1] : location.pathname.replace(/[^/]*$/, "")) + link.getAttribute("href");
</script></body></html>
"""


def build(folder: Path) -> int:
    """Build both sites. Return the exit code: 1 if there were warnings."""
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    code = 0
    for short, language in LANGUAGES.items():
        source = folder / "source" / short
        stage(short, source)
        doctrees = folder / "source" / f"{short}.doctrees"
        with patch_docutils(), docutils_namespace():  # docutils keeps what one site registers
            site = Sphinx(
                source,
                HERE,
                folder / short,
                doctrees,
                "html",
                confoverrides={"language": language},
                status=None,
                warningiserror=True,
            )
            site.build()
        code = code or site.statuscode
    _write(folder / "index.html", _FIRST)
    _write(folder / "404.html", _NOT_FOUND)
    return code


if __name__ == "__main__":
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "site"
    try:
        result = build(given)
    except DeadLinkError as error:
        sys.exit(f"error: {error}")
    print(f"{given / 'index.html'}" if result == 0 else "warnings are errors: see above")
    sys.exit(result)
