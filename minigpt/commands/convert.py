"""Convert a checkpoint folder to a GGUF file, which llama.cpp, Ollama, LM Studio and others run.

    minigpt convert --model output/best --output model.gguf
    minigpt convert --model output/best --dtype q8_0

Needs the gguf package: pip install 'minigpt[gguf]'. Warnings name what those programs compute or read in
another way than minigpt. Hugging Face's libraries need no conversion: they read the folder as it is.
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
    """checkpoint folder, as `minigpt train` or Hugging Face's libraries write it"""
    output: Path | None = None
    """file to write; by default the folder with the dtype and .gguf behind its name"""
    dtype: Literal["f32", "f16", "q8_0"] = "f16"
    """format of matrices: f32 exact; f16 half the size; q8_0 a quarter, 8 bits and a scale for 32 values"""


def main(options: Options) -> dict[str, Any]:
    """Read, write, warn of differences."""
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
