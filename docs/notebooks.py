"""Makes Jupyter notebooks of the pages that hold Python: python docs/notebooks.py [FOLDER]

The pages stay the only source: notebooks are made, not committed (build/notebooks/docs/api.ipynb). A block
of Python becomes a cell; a command, a line behind "!"; a file that the reader makes, a cell of %%writefile.
The output that a page shows is the cell's, until it is run. tests/test_notebooks.py compares the cells with
the blocks that tests/test_documents.py runs.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_FENCE = re.compile(
    r"^(?P<ticks>`{3,})(?P<language>\S*) ?(?P<name>\S*)\n(?P<text>.*?)^(?P=ticks)$\n?", re.M | re.S
)
_LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")
# All pages are followed in the root of the repository, with the commands of the kernel's environment.
_SETUP = """import os
import sys
from pathlib import Path

os.chdir(next(folder for folder in [Path.cwd(), *Path.cwd().parents] if (folder / "minigpt").is_dir()))
os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]
"""


def pages() -> list[Path]:
    """Return the pages that hold a block of Python, in both languages."""
    found = [*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs/book").glob("*.md")]
    return [
        path for path in sorted(found) if re.search(r"^```python$", path.read_text("utf-8"), re.MULTILINE)
    ]


def notebook(page: Path, folder: Path) -> dict[str, Any]:
    """Return the notebook of a page, in nbformat 4, for a file in `folder`."""
    text, end = page.read_text(encoding="utf-8"), 0
    cells = [_cell("code", _SETUP, 0)]
    for found in _FENCE.finditer(text):
        language, name = found["language"], found["name"]
        runs = bool(name) or language in ("bash", "python")
        is_output = language == "text" and not name and cells[-1]["cell_type"] == "code"
        if not (runs or is_output):
            continue  # a drawing, a tree, other text: it stays in the text around it
        between = text[end : found.start()]
        end = found.end()
        if between.strip():
            is_output = False  # what the last cell prints, behind a sentence
            cells.append(_cell("markdown", _with_links(between, page, folder), 0))
        if is_output:
            cells[-1]["outputs"] = [
                {"output_type": "stream", "name": "stdout", "text": _lines(found["text"])}
            ]
        elif runs:
            line = text.count("\n", 0, found.start("text")) + 1
            cells.append(_cell("code", _code(language, name, found["text"]), line))
        else:
            cells.append(_cell("markdown", found[0], 0))
    if text[end:].strip():
        cells.append(_cell("markdown", _with_links(text[end:], page, folder), 0))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def _code(language: str, name: str, text: str) -> str:
    if name:
        return f"%%writefile {name}\n{text}"
    return re.sub(r"(?<!\\\n)^(?=[^\s#])", "!", text, flags=re.M) if language == "bash" else text


def _cell(kind: str, text: str, line: int) -> dict[str, Any]:
    """Make a cell. `line`: where its block begins in the page."""
    cell: dict[str, Any] = {"cell_type": kind, "metadata": {}, "source": _lines(text.strip("\n"))}
    if kind == "code":
        cell |= {"execution_count": None, "outputs": [], "metadata": {"line": line}}
    return cell


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def _with_links(text: str, page: Path, folder: Path) -> str:
    """Return a text whose relative links hold in the notebook's folder."""

    def link(found: re.Match[str]) -> str:
        if re.match(r"https?://|mailto:|#", found[2]):
            return found[0]
        target = (page.parent / found[2]).resolve()
        return f"{found[1]}({Path(os.path.relpath(target, folder)).as_posix()})"

    return _LINK.sub(link, text)


def write(folder: Path) -> list[Path]:
    """Write all notebooks below a folder; each has the place of its page in the repository."""
    made = []
    for page in pages():
        path = folder / page.relative_to(ROOT).with_suffix(".ipynb")
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(notebook(page, path.parent.resolve()), ensure_ascii=False, indent=1)
        path.write_text(content + "\n", encoding="utf-8")
        made.append(path)
    return made


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        sys.exit()
    for one in write(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "notebooks"):
        print(one)
