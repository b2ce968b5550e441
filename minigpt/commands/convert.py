"""Convert a checkpoint folder to one file: for llama.cpp and programs that use it, or for a browser.

    minigpt convert --model output/best --output model.gguf
    minigpt convert --model output/best --dtype int8
    minigpt convert --model output/best --format html --output model.html    # opens in any browser, offline

GGUF needs the gguf package: pip install 'minigpt[gguf]'. Warnings list differences between these programs and
minigpt. An HTML file contains weights, tokenizer and program. Hugging Face's libraries need
no conversion: they read the folder directly.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minigpt.console import command_line
from minigpt.errors import InputError

# our name of a dtype -> its name in write_gguf
_GGUF_DTYPES = {"float32": "f32", "float16": "f16", "int8": "q8_0"}


@dataclass(frozen=True, kw_only=True)
class Options(command_line.CommandOptions):
    """Convert a checkpoint folder to a GGUF file for llama.cpp, or to an HTML file for a browser."""

    model: Path = Path("output/best")
    """checkpoint folder, from `minigpt train` or in Hugging Face's format"""
    output: Path | None = None
    """file to write; default: the name of the folder, followed by the dtype and .gguf or .html"""
    format: Literal["gguf", "html"] | None = None
    """gguf: for llama.cpp; html: a page that answers in a browser; left out: as --output ends, or gguf"""
    dtype: Literal["float32", "float16", "int8", "f32", "f16", "q8_0"] = "float16"
    """type of matrices: float32 or f32: exact; float16 or f16: half the size; int8 or q8_0: a quarter"""


def main(options: Options) -> dict[str, Any]:
    """Read the folder, write the file, warn of differences."""
    from minigpt.console.terminal import warn
    from minigpt.weights.pretrained import load_model_and_tokenizer, model_folder
    from minigpt.weights.quantized import precision_of

    kind = options.format or ("html" if options.output and options.output.suffix == ".html" else "gguf")
    ours: Any = next((one for one, theirs in _GGUF_DTYPES.items() if theirs == options.dtype), options.dtype)
    dtype = ours if kind == "html" else _GGUF_DTYPES[ours]
    folder = options.model
    output = options.output or folder.with_name(f"{folder.name or 'model'}-{dtype}.{kind}")
    if output.suffix != f".{kind}":
        raise InputError(f"--output must end in .{kind}, programs know such files by it: got {output}")
    model, tokenizer = load_model_and_tokenizer(folder)
    if precision_of(model) != "float32":
        raise InputError(f"{folder} is quantised: give the folder that it was made from, and --dtype int8")
    name = folder.resolve().name
    if kind == "gguf":
        from minigpt.weights.gguf_file import write_gguf

        notes = write_gguf(output, model, tokenizer, dtype, name)
    else:
        from minigpt.weights.html_file import write_html

        found = _settings(model_folder(folder, verify=False), tokenizer)
        notes = write_html(output, model, tokenizer, dtype=ours, name=_name(folder), **found)
    size = output.stat().st_size
    print(f"{output} written: {model.config.parameter_count():,} parameters as {dtype}, {size:,} bytes")
    if kind == "html":
        print("open it in a browser: double-click it, or send it to a phone")
    for note in notes:
        warn(note)
    return {"output": str(output), "format": kind, "dtype": dtype, "bytes": size, "notes": notes}


def _name(folder: Path) -> str:
    """Return the model's name to show. The folder `best` or `last` of a run has the run's name."""
    whole = folder.absolute()
    return whole.parent.name if whole.name in ("best", "last") else whole.name


def _settings(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Return the prompt format, end tokens, start token, and the HTML page's first generation options."""
    from minigpt.generation.api import ends_of_answer, eos_of
    from minigpt.generation.generation_config import prompt_format, recommended_options, start_token
    from minigpt.generation.options import id_list

    form = prompt_format(folder, tokenizer)
    advised = recommended_options(folder)
    eos = advised.pop("eos_token_id", None)
    if eos is None:
        eos = ends_of_answer(tokenizer) if form == "question" else eos_of(tokenizer)
    known = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    options = {key: value for key, value in advised.items() if key in known}
    start = start_token(folder, tokenizer)
    return {"form": form, "eos": id_list(eos), "options": options, "start": start}


if __name__ == "__main__":
    command_line.run(Options, main)
