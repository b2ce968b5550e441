"""Convert a checkpoint folder for other programs: llama.cpp, a browser, or onnxruntime.

    minigpt convert --model output/best --output model.gguf
    minigpt convert --model output/best --dtype int8
    minigpt convert --model output/best --format html --output model.html    # opens in any browser, offline
    minigpt convert --model output/best --format onnx --output model.onnx    # the model alone
    minigpt convert --model output/best --format onnx --output output/onnx   # a folder: with its tokenizer

GGUF needs the package gguf (pip install 'minigpt[gguf]'), ONNX the package onnx (pip install
'minigpt[onnx]'). Warnings say what the other programs do differently from minigpt. An HTML file contains all
that it needs: weights, tokenizer and program. Hugging Face's libraries need no conversion: they read the
folder directly.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minigpt.console import command_line
from minigpt.errors import InputError
from minigpt.storage.regular_files import resolved

# The value of --dtype -> the name that `write_gguf` has for this dtype.
_GGUF_DTYPES = {"float32": "f32", "float16": "f16", "int8": "q8_0"}
_OTHER_FILES = (".gguf", ".html", ".bin", ".pt", ".pth", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class Options(command_line.CommandOptions):
    """Convert a checkpoint folder to a GGUF file for llama.cpp, to an HTML file for a browser, or to an ONNX
    file or folder for onnxruntime.
    """

    model: Path = Path("output/best")
    """checkpoint folder, from `minigpt train` or in Hugging Face's format"""
    output: Path | None = None
    """file to write, for ONNX also a new folder; default: the name of the folder, the dtype, and .gguf, .html
    or .onnx"""
    format: Literal["gguf", "html", "onnx"] | None = None
    """gguf: for llama.cpp; html: a page that answers in a browser; onnx: for onnxruntime; left out: as
    --output ends, or gguf"""
    dtype: Literal["float32", "float16", "int8", "f32", "f16", "q8_0"] | None = None
    """matrices as float32 (exact), float16 (half the size) or int8 (a quarter, not for ONNX); default:
    float16, ONNX: float32"""


def main(options: Options) -> dict[str, Any]:
    """Read the folder and write the file. Warn of what other programs will do differently from minigpt."""
    from minigpt.console.terminal import warn
    from minigpt.weights.pretrained import load_model_and_tokenizer, model_folder
    from minigpt.weights.quantized import precision_of

    by_end = options.output.suffix.removeprefix(".") if options.output else ""
    kind = options.format or (by_end if by_end in ("html", "onnx") else "gguf")
    given = options.dtype or ("float32" if kind == "onnx" else "float16")
    ours: Any = next((one for one, theirs in _GGUF_DTYPES.items() if theirs == given), given)
    dtype = _GGUF_DTYPES[ours] if kind == "gguf" else ours
    folder = options.model
    named = folder if folder.name.strip(".") else resolved(folder)  # "." and ".." cannot name the file
    output = options.output or named.parent / f"{named.name or 'model'}-{dtype}.{kind}"
    _check_output(output, kind)
    model, tokenizer = load_model_and_tokenizer(folder)
    if precision_of(model) != "float32":
        other = "" if kind == "onnx" else ", and --dtype int8"
        raise InputError(f"{folder} is quantised: give the folder that it was made from{other}")
    files, notes = [output], []
    name = resolved(folder).name
    if kind == "gguf":
        from minigpt.weights.gguf_file import write_gguf

        notes = write_gguf(output, model, tokenizer, dtype, name)
    elif kind == "html":
        from minigpt.lens.live import write_live_page

        notes = write_live_page(output, model_folder(folder), model, tokenizer, ours)
    elif output.suffix == ".onnx":
        from minigpt.weights.onnx_file import write_onnx

        files = write_onnx(output, model, tokenizer, dtype=ours)
    else:
        files = _write_onnx_folder(output, model_folder(folder), model, tokenizer, ours)
    size = sum(one.stat().st_size for one in files)
    command_line.show(
        f"{output} written: {model.config.parameter_count():,} parameters as {dtype}, {size:,} bytes"
    )
    if kind == "html":
        command_line.show("open it in a browser: double-click it, or send it to a phone")
    for note in notes:
        warn(note)
    return {"output": str(output), "format": kind, "dtype": dtype, "bytes": size, "notes": notes}


def _write_onnx_folder(
    goal: Path, source: Path, model: Any, tokenizer: Any, dtype: Literal["float32", "float16"]
) -> list[Path]:
    """Write a folder with model.onnx, and with the tokenizer and the settings of the model's folder."""
    from minigpt.generation.generation_config import with_training_facts
    from minigpt.storage.json_files import read_json
    from minigpt.weights.derived_folders import write_derived
    from minigpt.weights.onnx_file import write_onnx

    written: list[Path] = []
    # Whatever the dtype of the weights in the file, onnxruntime computes in float32, and its cache is
    # float32.
    config = {**read_json(source / "config.json"), "dtype": "float32"}
    config.pop("torch_dtype", None)  # older name of the key "dtype"; its value may contradict the new one

    def write(folder: Path) -> None:
        written.extend(write_onnx(folder / "model.onnx", model, tokenizer, dtype=dtype))

    write_derived(source, goal, with_training_facts(config, source), write)
    return [goal / one.name for one in written]


def _check_output(output: Path, kind: str) -> None:
    if kind != "onnx":
        if output.suffix != f".{kind}":
            raise InputError(f"--output must end in .{kind}, programs know such files by it: got {output}")
    elif output.suffix in _OTHER_FILES:
        raise InputError(f"--output must end in .onnx, or be the name of a new folder: got {output}")
    elif output.suffix != ".onnx" and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} exists and is not empty: choose another folder with --output")


if __name__ == "__main__":
    command_line.run(Options, main)
