"""Writes an HTML page that contains a model and runs it in the browser.

reading = read_question(model, tokenizer, "四川的省会是哪里？")
write_live_page("page.html", folder, model, tokenizer, opened=Opened("四川的省会是哪里？", reading))

The page generates with the options that the model's folder recommends (generation_config.json). At its
start, the page shows the question and answer in `opened`. This module collects what the page needs;
weights/html_file.py writes the file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minigpt.families.registry import LanguageModel
from minigpt.generation.api import ends_of_answer, eos_of
from minigpt.generation.generation_config import prompt_format, recommended_options, start_token
from minigpt.generation.options import id_list
from minigpt.lens.reading import Reading
from minigpt.weights.html_file import HtmlDtype, write_html
from minigpt.weights.pretrained import AnyTokenizer

__all__ = ["LiveView", "Opened", "write_live_page"]

LiveView = Literal["attention", "distribution", "steps", "lens"]


@dataclass(frozen=True)
class Opened:
    """A question with its answer, and the view of them that the page shows at its start.

    The page computes with the same token ids as the views in the terminal, so the numbers are the same.
    """

    said: str  # the question, or a plain text
    reading: Reading
    view: LiveView = "attention"
    layer: int | None = None
    head: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Return a dict for JSON, which the script page.js in the page reads."""
        reading = self.reading
        ids = (reading.ids, []) if reading.is_text else (reading.prompt, reading.answer)
        shown = {"view": self.view, "layer": self.layer or 0, "head": -1 if self.head is None else self.head}
        return {"said": self.said, "prompt": ids[0], "ids": ids[1], "isOwn": reading.is_own, **shown}


def write_live_page(
    path: Path,
    folder: Path,
    model: LanguageModel,
    tokenizer: AnyTokenizer,
    dtype: HtmlDtype = "float16",
    opened: Opened | None = None,
) -> list[str]:
    """Write a model as a page that answers questions.

    Args:
        folder: the model's folder, from which prompt format, generation options and name are read.
        dtype: data type of the weight matrices in the page.
        opened: a question that the page shows at its start; None: the page waits for a question.

    Returns: sentences that say where the page's results differ from minigpt's.

    Raises:
        InputError: for the same reasons as `write_html`.
    """
    form = prompt_format(folder, tokenizer)
    advised = recommended_options(folder)
    eos = advised.pop("eos_token_id", None)
    if eos is None:
        eos = ends_of_answer(tokenizer) if form == "question" else eos_of(tokenizer)
    known = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return write_html(
        path,
        model,
        tokenizer,
        form=form,
        eos=id_list(eos),
        dtype=dtype,
        name=_name(folder),
        options={key: value for key, value in advised.items() if key in known},
        start=start_token(folder, tokenizer),
        opened=None if opened is None else opened.as_json(),
    )


def _name(folder: Path) -> str:
    """Return the folder's name. For a checkpoint folder `best` or `last`, return its run folder's name."""
    whole = folder.absolute()
    return whole.parent.name if whole.name in ("best", "last") else whole.name
