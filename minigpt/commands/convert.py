"""Convert a checkpoint folder to a GGUF file, for llama.cpp, Ollama, LM Studio and others.

    minigpt convert --model output/best --output model.gguf
    minigpt convert --model output/best --dtype q8_0

This needs the gguf package: pip install 'minigpt[gguf]'. Warnings say what these programs do differently from
minigpt. Hugging Face's libraries need no conversion: they read the folder directly.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minigpt.console import command_line
from minigpt.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Options(command_line.CommandOptions):
    """Convert a checkpoint folder to a GGUF file for llama.cpp."""

    model: Path = Path("output/best")
    """checkpoint folder, from `minigpt train` or in Hugging Face's format"""
    output: Path | None = None
    """file to write; default: the name of the folder, followed by the dtype and .gguf"""
    dtype: Literal["f32", "f16", "q8_0"] = "f16"
    """type of matrices: f32: exact; f16: half the size; q8_0: a quarter, with a scale for each 32 values"""


def main(options: Options) -> dict[str, Any]:
    """Read the folder, write the file, warn of differences."""
    from minigpt.console.terminal import warn
    from minigpt.weights.gguf_file import write_gguf
    from minigpt.weights.pretrained import load_model_and_tokenizer
    from minigpt.weights.quantized import precision_of

    model, tokenizer = load_model_and_tokenizer(options.model)
    folder = options.model
    if precision_of(model) != "float32":
        raise InputError(f"{folder} is quantised: give the folder that it was made from, and --dtype q8_0")
    output = options.output or folder.with_name(f"{folder.name or 'model'}-{options.dtype}.gguf")
    if output.suffix != ".gguf":
        raise InputError(f"--output must end in .gguf, programs know such files by it: got {output}")
    notes = write_gguf(output, model, tokenizer, options.dtype, folder.resolve().name)
    size = output.stat().st_size
    print(
        f"{output} written: {model.config.parameter_count():,} parameters as {options.dtype}, {size:,} bytes"
    )
    for note in notes:
        warn(note)
    return {"output": str(output), "dtype": options.dtype, "bytes": size, "notes": notes}


if __name__ == "__main__":
    command_line.run(Options, main)
