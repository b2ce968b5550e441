"""Save a model in fewer bits: int8 (a quarter of float32's size), int4 or float16.

    minigpt quantize --model output/best --output output/int8 --precision int8
    minigpt generate --model output/int8 --question 四川省的省会是哪里？
    minigpt eval --model output/best --precision float32 int8          # the loss of quality, before you do it

Only minigpt reads an int8 or int4 folder (weights/quantized_folders.py describes it); other programs refuse
it. Other commands can round a model while they load it (`--precision int8`); the weights are then the same to
the bit as in an int8 folder. int4 is for a GPU: on a CPU it is slow. Every program reads a float16 folder. In
minigpt its weights stay in 16 bits, and the computation is in float32.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minigpt.console import command_line
from minigpt.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Options(command_line.CommandOptions):
    """Save a model in fewer bits: int8, int4 or float16."""

    model: Path = Path("output/best")
    """checkpoint folder of `minigpt train`"""
    output: Path
    """the new folder; must not exist yet"""
    precision: Literal["int8", "int4", "float16"] = "int8"
    """int8: only minigpt reads it; int4: also only minigpt, and fast only on a GPU; float16: all programs"""


def main(options: Options) -> dict[str, Any]:
    """Read the model, round it, write the folder, print the sizes."""
    if options.output.exists():
        raise InputError(f"{options.output} exists already: choose another folder with --output")
    from torch import float16

    from minigpt.families.registry import family_of
    from minigpt.families.strict_loading import cast
    from minigpt.generation.generation_config import with_training_facts
    from minigpt.storage.json_files import read_json
    from minigpt.storage.safetensors_files import safetensors_parts
    from minigpt.weights.derived_folders import write_derived
    from minigpt.weights.pretrained import load_model_and_tokenizer, model_folder
    from minigpt.weights.quantized import set_precision
    from minigpt.weights.quantized_folders import FILES, is_quantized, quantized_config, quantized_weights

    folder = model_folder(options.model)
    model, _ = load_model_and_tokenizer(folder)
    config = read_json(folder / "config.json")
    if is_quantized(config):
        raise InputError(f"{folder} is quantised already: give the folder that it was made from")
    weights: dict[str, Tensor]
    name_of_weights = FILES.get(options.precision, "model.safetensors")
    if options.precision in FILES:
        config = quantized_config(config, options.precision)
        weights = quantized_weights(set_precision(model, options.precision))
    else:
        config = {**config, "dtype": "float16"}
        config.pop("torch_dtype", None)  # older name of the key "dtype"; its value may contradict the new one
        exact = family_of(model.config).to_hugging_face(model)
        weights = {name: cast(name, tensor, float16) for name, tensor in exact.items()}

    def write(goal: Path) -> None:
        with (goal / name_of_weights).open("wb") as file:
            file.writelines(safetensors_parts(weights, {"format": "pt"}))

    config = with_training_facts(config, folder)
    write_derived(folder, options.output, config, write)
    before, after = _size(folder), _size(options.output)
    command_line.show(
        f"{options.output}: {after:,} bytes of weights in {options.precision}, {after / before:.0%} of "
        f"{folder}'s {before:,}"
    )
    return {"output": options.output, "precision": options.precision, "before": before, "after": after}


def _size(folder: Path) -> int:
    """Return the number of bytes of a folder's weights."""
    from minigpt.weights.quantized_folders import FILES

    names = ("model*.safetensors", *FILES.values())
    return sum(path.stat().st_size for name in names for path in folder.glob(name))


if __name__ == "__main__":
    command_line.run(Options, main)
