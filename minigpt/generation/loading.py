"""Loads a model, its tokenizer and its assistant model, for `minigpt generate` and `minigpt chat`.

torch is imported only when a model is loaded. During this import, a thread already reads the weights, which
saves time.
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from minigpt.console.command_line import ModelOptions, lasting_imports, remembered_signals, warn
from minigpt.errors import InputError, Message
from minigpt.storage.read_ahead import ReadAhead

if TYPE_CHECKING:
    from minigpt.families.registry import LanguageModel
    from minigpt.weights.pretrained import AnyTokenizer

__all__ = ["Loaded", "adapter_note", "load_to_answer", "require_model", "warn_of_gaps"]


class Loaded(NamedTuple):
    """A model that is ready to generate, with its folder and its tokenizer."""

    folder: Path  # folder of the checkpoint (such as output/best), not of the training run (output)
    model: "LanguageModel"
    tokenizer: "AnyTokenizer"
    assistant_model: "LanguageModel | None"


def require_model(path: Path, has_flag: bool = True) -> None:
    """Raise InputError if a path does not exist. The message tells beginners what to do first.

    Args:
        has_flag: True: the command has the option --model, so the message advises this option. False: the
            command takes the model's folder as a positional argument.
    """
    if not path.exists():
        if path == ModelOptions.model:  # the user gave no --model
            made = [
                *Path("output").glob("*/best/config.json"),
                *Path("output").glob("*/run/best/config.json"),
            ]
            if made:
                newest = max(made, key=lambda file: file.stat().st_mtime).parent
                text = "{path} does not exist; the newest model here: --model {newest}"
                raise InputError(Message(text, path=path, newest=newest))
        text = (
            "{path} does not exist: train a model first (`minigpt train`; or `make demo`, then "
            "--model output/demo/best), or name its folder with --model"
            if has_flag
            else "{path} does not exist: give the folder of a model (`minigpt train` makes output/best, and "
            "`make demo` makes output/demo/best)"
        )
        raise InputError(Message(text, path=path))


def adapter_note(model: "LanguageModel", adapter: Path) -> str:
    """Return a sentence that says whether the adapter was merged into the model's weights."""
    from minigpt.finetuning.layers import adapter_names
    from minigpt.weights.quantized import precision_of

    if adapter_names(model):
        return f"{adapter} stays beside the {precision_of(model)} weights: PyTorch computes it, slowly"
    return f"{adapter} is merged into the weights"


def warn_of_gaps(tokenizer: "AnyTokenizer", model: Path) -> None:
    """Warn the user if a model is a masked language model, which can fill gaps but cannot continue a text."""
    from minigpt.finetuning.masked_lm import mask_token_id

    if mask_token_id(tokenizer) is not None:
        warn(f"{model} was trained to fill gaps (minigpt fill); it cannot continue a text")


@remembered_signals()  # importing torch may lose a Ctrl-C; this raises it again when the function ends
def load_to_answer(options: ModelOptions, assistant_model: Path | None, fills: bool = False) -> Loaded:
    """Load a model with the precision, device and number of threads in the options.

    Args:
        fills: True if the command fills gaps. If False, the function warns of a masked language model,
            because such a model can only fill gaps.

    Raises:
        InputError: as load_model_and_tokenizer; also if the device does not exist.
    """
    require_model(options.model)
    ahead = ReadAhead(options.model)  # a thread reads the weights while torch is imported
    with lasting_imports():
        import torch

        from minigpt.console.terminal import note
        from minigpt.devices import pick_device
        from minigpt.generation.native import dtype_to_load
        from minigpt.weights.pretrained import load_model, load_model_and_tokenizer, model_folder
        from minigpt.weights.quantized import set_precision

    device = pick_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    folder = model_folder(options.model)
    dtype = dtype_to_load(device)
    model, tokenizer = load_model_and_tokenizer(folder, device, dtype, ahead, options.adapter)
    model = set_precision(model, options.precision)
    if options.adapter is not None:
        note(adapter_note(model, options.adapter))
    if not fills:
        warn_of_gaps(tokenizer, options.model)
    assistant = None
    if assistant_model is not None:
        assistant = set_precision(load_model(assistant_model, device, dtype), options.precision)
    return Loaded(folder, model, tokenizer, assistant)
