"""Notebooks: made of the pages, cell by block, and they run.

What a page's blocks print is compared in tests/test_documents.py. A test here shows that the cells are these
blocks, so that they need not be run twice. Where nbclient is installed, Jupyter runs one notebook.
"""

import importlib.util
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.test_documents import ROOT, Block, at_desk, read_blocks

HERE = ROOT / "docs/notebooks.py"
RUN = "docs/api.md"  # the page that Jupyter runs: Python and commands, some seconds
MISSING = [name for name in ("nbclient", "ipykernel") if importlib.util.find_spec(name) is None]
MAGIC = re.compile(r"^%%writefile (\S+)\n")


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return runpy.run_path(str(HERE), run_name="notebooks")


def notebook(made: dict[str, Any], page: Path) -> dict[str, Any]:
    """A page's notebook, as JSON holds it."""
    content: dict[str, Any] = json.loads(json.dumps(made["notebook"](page, ROOT / "build/notebooks/docs")))
    return content


def blocks_of(content: dict[str, Any]) -> list[Block]:
    """What a notebook does, as blocks of a page. The first cell chooses the folder."""
    found = []
    for cell in content["cells"][1:]:
        text = "".join(cell["source"])
        if cell["cell_type"] != "code":
            continue
        if written := MAGIC.match(text):
            found.append(Block("file", written[1], text[written.end() :], cell["metadata"]["line"]))
        elif re.search(r"^!", text, re.MULTILINE):
            found.append(
                Block("bash", "", re.sub(r"^!", "", text, flags=re.MULTILINE), cell["metadata"]["line"])
            )
        else:
            found.append(Block("python", "", text, cell["metadata"]["line"]))
    return found


def test_each_page_with_python_has_a_notebook(made: dict[str, Any]) -> None:
    pages = {page.relative_to(ROOT).as_posix() for page in made["pages"]()}
    for path in [*ROOT.glob("README*.md"), *ROOT.glob("docs/**/*.md")]:
        name = path.relative_to(ROOT).as_posix()
        has_python = any(block.language == "python" and not block.name for block in read_blocks(name))
        assert (name in pages) == has_python, name


def test_the_cells_are_the_page_s_blocks_in_their_order(made: dict[str, Any]) -> None:
    for page in made["pages"]():
        name = page.relative_to(ROOT).as_posix()
        blocks = [block for block in read_blocks(name) if block.name or block.language in ("bash", "python")]
        expected = [
            ("file" if block.name else block.language, block.name, block.text.strip("\n"), block.line)
            for block in blocks
        ]
        content = notebook(made, page)
        assert [(b.language, b.name, b.text, b.line) for b in blocks_of(content)] == expected, name
        cells = [cell for cell in content["cells"][1:] if cell["cell_type"] == "code"]
        for block, cell in zip(blocks, cells, strict=True):
            shown = "".join(line for output in cell["outputs"] for line in output["text"]).strip("\n")
            assert not shown or (block.output is not None and shown == block.output.text.strip("\n"))
            if block.language == "bash" and not block.name:  # Jupyter would replace these in a command
                assert not re.search(r"[{$]", block.text), f"{name}:{block.line}"


def test_nothing_of_a_page_s_text_is_lost(made: dict[str, Any]) -> None:
    def words(text: str) -> list[str]:
        return re.findall(
            r"\w+", re.sub(r"\]\([^)]*\)|^`{3,}.*$|^%%writefile .*$", "", text, flags=re.MULTILINE)
        )

    for page in made["pages"]():
        texts = []
        for cell in notebook(made, page)["cells"][1:]:
            texts += cell["source"] + ["\n"]
            texts += [line for output in cell.get("outputs", ()) for line in output["text"]] + ["\n"]
        assert words("".join(texts)) == words(page.read_text(encoding="utf-8")), page


def test_a_notebook_is_nbformat_4(made: dict[str, Any], tmp_path: Path) -> None:
    paths = made["write"](tmp_path)
    for path in paths:
        content = json.loads(path.read_text(encoding="utf-8"))
        assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
        assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
        for cell in content["cells"]:
            assert set(cell) == {"cell_type", "id", "metadata", "source"} | (
                {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
            )
        links = re.findall(r"\]\(([^)\s]+)\)", "".join(line for c in content["cells"] for line in c["source"]
                                                       if c["cell_type"] == "markdown"))  # fmt: skip
        for link in links:
            assert link.startswith("https://") or (path.parent / link).exists(), f"{path}: {link}"
    if importlib.util.find_spec("nbformat") is not None:
        import nbformat

        for path in paths:
            nbformat.validate(nbformat.read(path, as_version=4))


@pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; the page's blocks are run all the same"
)
def test_jupyter_runs_a_notebook(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nbformat
    from nbclient import NotebookClient

    with at_desk(tmp_path):  # has links to minigpt, and the data
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        folder = tmp_path / "build/notebooks/docs"
        folder.mkdir(parents=True)
        made_of = nbformat.reads(json.dumps(notebook(made, ROOT / RUN)), as_version=4)
        client = NotebookClient(made_of, timeout=600, resources={"metadata": {"path": str(folder)}})
        client.execute()
    cells = [cell for cell in client.nb.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    printed = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    assert "error" not in printed
    assert (tmp_path / "output/tiny/best/config.json").is_file(), "made in the root, not beside the notebook"
