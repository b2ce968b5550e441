"""Writes the model card: the README.md of a checkpoint folder, with the header that Hugging Face reads.

    update_card(Path("output/best"), results)

A user can edit the file: minigpt keeps what the user wrote. If the file exists, minigpt changes only these
parts of it:

- the results: the text between two comments that mark it (if they are missing, it is added at the end);
- the header's key `model-index`, if minigpt wrote it (a comment then says so);
- keys that the header lacks, which are added.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from minigpt.console.terminal import warn
from minigpt.errors import InputError, printable
from minigpt.evaluation.report import in_markdown, results_table
from minigpt.evaluation.task_results import TaskResult
from minigpt.storage.files import atomic_write
from minigpt.storage.json_files import json_text, read_json
from minigpt.storage.regular_files import read_text, resolved
from minigpt.weights.classifiers import classifier_labels

__all__ = ["update_card", "updated_card"]

_BEGIN, _END = "<!-- minigpt eval: begin -->", "<!-- minigpt eval: end -->"
_OWN = "# written by minigpt eval"
_KEY = re.compile(r"^([A-Za-z_][\w-]*):", re.MULTILINE)
_CHECKPOINT = re.compile(r"step-\d{8}")
_HAN = re.compile(r"[\u3400-\u9fff]")


def update_card(folder: Path, results: Sequence[TaskResult]) -> Path:
    """Write the results into the README.md of a model's folder. Returns the README's path."""
    path = folder / "README.md"
    try:
        before = read_text(path, "utf-8-sig") if path.exists() else ""
    except UnicodeDecodeError:
        raise InputError(f"{path} is not in UTF-8: save it so, then --card can add the results") from None
    atomic_write(path, updated_card(before, folder, results))
    return path


def updated_card(before: str, folder: Path, results: Sequence[TaskResult]) -> str:
    """Return the card's new text with the results. `before`: the old text, or ""."""
    header, body = _divided(before)
    blocks = _blocks(header)
    wanted = {
        "language": _languages(results),
        "library_name": "library_name: transformers\n",
        "pipeline_tag": f"pipeline_tag: {_pipeline(folder)}\n",
        "base_model": _base(folder),
    }
    for key, text in wanted.items():
        if text and key not in blocks:
            blocks[key] = text
    if "model-index" in blocks and _OWN not in blocks["model-index"]:
        warn(f"{folder / 'README.md'}: its model-index was not written by minigpt, and stays as it is")
    else:
        blocks["model-index"] = _index(_name(folder), results)
    section = f"{_BEGIN}\n\n## Results\n\n{results_table(results)}\n\n{_END}"
    if _BEGIN in body and _END in body[body.index(_BEGIN) :]:
        start = body.index(_BEGIN)
        end = body.index(_END, start) + len(_END)
        body = body[:start] + section + body[end:]
    else:
        title = "" if body.strip() else f"# {in_markdown(_name(folder))}\n\n"
        body = f"{body.rstrip()}\n\n{section}\n" if body.strip() else f"{title}{section}\n"
    return f"---\n{''.join(blocks.values())}---\n\n{body.lstrip()}"


def _divided(text: str) -> tuple[str, str]:
    """Split a card into its YAML header (without the two lines "---") and the text below the header."""
    if not text.startswith("---\n"):
        return "", text
    end = text.find("\n---", 3)
    if end < 0:
        return "", text
    rest = text[end + 4 :]
    return text[4 : end + 1], rest.removeprefix("\n")


def _blocks(header: str) -> dict[str, str]:
    """Split the header into a dict: key at the top level -> lines of this key.

    The key "" has the lines above the first key.
    """
    starts = [(match.start(), match[1]) for match in _KEY.finditer(header)]
    found = {"": header[: starts[0][0]]} if starts and starts[0][0] else {} if starts else {"": header}
    ends = [start for start, _ in starts[1:]] + [len(header)]
    for (start, key), end in zip(starts, ends):
        found[key] = header[start:end]
    return {key: text if text.endswith("\n") or not text else f"{text}\n" for key, text in found.items()}


def _languages(results: Sequence[TaskResult]) -> str:
    texts = [one.question or "".join(one.references) for r in results for one in r.task.examples[:50]]
    chinese = sum(bool(_HAN.search(text)) for text in texts)
    found = [name for name, has in (("zh", chinese), ("en", chinese < len(texts))) if has]
    return f"language: [{', '.join(found)}]\n"


def _name(folder: Path) -> str:
    """Return the name of a model: the folder's name.

    For a checkpoint such as run/step-00001000, or a link to it such as run/best, this is "run".
    """
    whole = resolved(folder)
    return printable(whole.parent.name if _CHECKPOINT.fullmatch(whole.name) else whole.name)


def _pipeline(folder: Path) -> str:
    is_classifier = (folder / "config.json").exists() and classifier_labels(folder) is not None
    return "text-classification" if is_classifier else "text-generation"


def _base(folder: Path) -> str:
    """Return the header's line `base_model: ...`, or "" if the folder names no base model."""
    for name, key in (("adapter_config.json", "base_model_name_or_path"), ("config.json", "_name_or_path")):
        path = folder / name
        if path.exists() and (value := read_json(path).get(key)) and isinstance(value, str):
            return f"base_model: {json_text(value)}\n"
    return ""


def _index(name: str, results: Sequence[TaskResult]) -> str:
    """Return the header's `model-index`. Texts are written as JSON strings, because these are YAML, too."""
    lines = ["model-index:", _OWN, f"- name: {json_text(name)}", "  results:"]
    for result in results:
        task = json_text(printable(result.task.name))
        kind = "text-classification" if result.task.form == "classification" else "text-generation"
        lines += [
            f"  - task: {{type: {kind}}}",
            f"    dataset: {{name: {task}, type: {task}}}",
            "    metrics:",
        ]
        for key, metric in result.metrics.items():
            if math.isfinite(metric.value):
                lines.append(f"    - {{type: {key}, value: {metric.value:.6g}}}")
    return "\n".join(lines) + "\n"
