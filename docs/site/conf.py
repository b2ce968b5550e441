"""Sphinx's configuration of the site. build.py chooses the language and the folders."""

import re
import sys
from pathlib import Path
from typing import Any

import sphinx.search
from docutils import nodes
from pygments.lexers.data import JsonLexer
from pygments.lexers.special import TextLexer
from sphinx.search.zh import SearchChinese

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import minigpt

project = "minigpt"
version = release = minigpt.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "index"
templates_path = ["templates"]

html_theme = "furo"
html_title = "minigpt"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_use_index = False
html_theme_options = {"top_of_page_buttons": []}

smartquotes = False  # they would make a dash of --flag

nitpicky = True
# Types of other packages have no page here, nor have classes of ours that are not public.
nitpick_ignore_regex = [(r"py:.*", r"(?!minigpt\.\w+$).*")]
default_role = "literal"  # docstrings write code between single backticks, as Markdown does
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 90

_HAN = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\u2014\u2018-\u201d\u2026]")
_PUNCTUATION = re.compile(r"[\u3000-\u303f\uff00-\uff0f\uff1a-\uff1f\u2026]")


class ChineseSearch(SearchChinese):
    """Splits Chinese text into pairs of neighbouring characters: no dictionary is needed, and none is wrong.

    A query is split in the same way, and a page must have all of its pairs.
    """

    language_name = "English"  # Sphinx looks for a stemmer of this name, and there is none for Chinese
    js_splitter_code = r"""
function splitQuery(query) {
  const found = [];
  for (const [word] of query.matchAll(/[\p{Script=Han}]+|[\p{Letter}\p{Number}_]+/gu)) {
    const latin = word.match(/[^\p{Script=Han}]+/gu) || [];
    found.push(...latin);
    for (const run of word.match(/[\p{Script=Han}]+/gu) || []) {
      if (run.length === 1) found.push(run);
      for (let i = 0; i + 1 < run.length; i++) found.push(run.slice(i, i + 2));
    }
  }
  return found;
}
"""

    def split(self, input: str) -> list[str]:
        """Return the words of a text. A single character is found, too."""
        latin = re.findall(r"[a-zA-Z0-9_]+", input)
        self.latin_terms.update(latin)
        runs = re.findall(r"[\u2e80-\u9fff\uf900-\ufaff]+", input)
        return [*latin, *(run[i : i + n] for run in runs for n in (1, 2) for i in range(len(run) - n + 1))]

    def word_filter(self, stemmed_word: str) -> bool:
        """Return whether a word belongs into the index."""
        return not stemmed_word.isascii() or len(stemmed_word) > 1


def _join_lines(app: Any, doctree: nodes.document) -> None:
    """A line end between two Chinese characters, or beside one of their commas, is no space."""
    for end in [text for text in doctree.findall(nodes.Text) if text == "\n"]:
        place = end.parent.index(end)
        if not 0 < place < len(end.parent) - 1:
            continue
        sides = (end.parent[place - 1].astext()[-1:], end.parent[place + 1].astext()[:1])
        if all(map(_HAN.fullmatch, sides)) or any(map(_PUNCTUATION.fullmatch, sides)):
            end.parent.remove(end)


def _as_rest(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text. What would be markup of reStructuredText is escaped; items become a list."""
    paragraphs = [part.split("\n") for part in "\n".join(lines).strip("\n").split("\n\n")]
    for part in paragraphs:
        if part[0].startswith(">>>"):
            continue
        is_section = re.fullmatch(r"\s*(Args|Returns|Raises|Yields|Attributes):", part[0])
        if not is_section and not part[0].startswith(" ") and any(line.startswith(" ") for line in part):
            part[:] = [f"  {line.strip()}" if line.startswith(" ") else f"* {line}" for line in part]
        part[:] = [re.sub(r"(?<!^)([|*])(?=\S)", r"\\\1", line) if "`" not in line else line for line in part]
    lines[:] = "\n\n".join("\n".join(part) for part in paragraphs).split("\n")
    _attributes[name] = [*lines] if what == "attribute" else []


_attributes: dict[str, list[str]] = {}


def _without_types(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Undo what napoleon makes of a field's text: it reads all before a colon as a type."""
    lines[:] = _attributes.get(name) or lines


def _other_edition(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """The switch: this page in the other language, or the front page where there is no such page."""
    folder, context["edition"] = ("en", "English") if app.config.language == "zh_CN" else ("zh", "中文")
    up = "../" * (pagename.count("/") + 1)
    context["other_edition"] = f"{up}{folder}/{pagename}.html"


def setup(app: Any) -> None:
    """Add what the pages need: the search in Chinese, the switch, drawings as code."""
    sphinx.search.languages["zh"] = ChineseSearch
    for name in ("diagram", "tree"):
        app.add_lexer(name, TextLexer)
    app.add_lexer("jsonl", JsonLexer)
    app.connect("autodoc-process-docstring", _as_rest, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", _without_types, priority=600)
    app.connect("doctree-read", _join_lines)
    app.connect("html-page-context", _other_edition)
