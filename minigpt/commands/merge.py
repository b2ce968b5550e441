"""Merges an adapter into the weights of its model. The result is a normal Hugging Face folder.

    minigpt merge --model gpt2 --adapter output/lora --output output/merged
    minigpt generate --model output/merged --question 四川省的省会是哪里？

The adapter has PEFT's format (LoRA, rsLoRA, DoRA, IA3). The new folder has the model's tokenizer, settings
and dtype. `minigpt generate --adapter output/lora` merges only in memory.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt.console import command_line
from minigpt.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Options(command_line.CommandOptions):
    """Merge an adapter into the weights of its model."""

    model: Path = Path("output/best")
    """checkpoint folder that the adapter was trained on"""
    adapter: Path
    """adapter folder of PEFT's kind"""
    output: Path
    """the new folder; must not exist yet, or be empty"""


def main(options: Options) -> dict[str, Any]:
    """Read model and adapter, merge them, and write the result."""
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        raise InputError(f"{options.output} exists and is not empty: choose another folder with --output")
    from minigpt.finetuning.adapters import adapter_folder, load_adapter
    from minigpt.finetuning.layers import adapted_layers, merge_and_unload
    from minigpt.generation.generation_config import with_training_facts
    from minigpt.storage.json_files import read_json
    from minigpt.weights.derived_folders import write_derived
    from minigpt.weights.pretrained import load_model, model_folder, save_pretrained
    from minigpt.weights.quantized_folders import is_quantized

    folder, adapter = model_folder(options.model), adapter_folder(options.adapter)
    config = read_json(folder / "config.json")
    if is_quantized(config):
        raise InputError(f"{folder} is quantised: give the folder that it was made from")
    model = load_model(folder, dtype="stored")
    rank = getattr(load_adapter(model, adapter), "r", None)  # None for IA3, which has no rank
    layers = sum(1 for _ in adapted_layers(model))
    merge_and_unload(model)
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    # Leave out "torch_dtype", the old name of the key "dtype": its value may contradict the new one.
    config = {key: value for key, value in config.items() if key != "torch_dtype"}
    config |= {"dtype": dtype}
    # If the adapter has changed lm_head, lm_head now has a weight of its own. So `is_tied` is False, even
    # if lm_head and the token embedding shared one weight before.
    is_tied = model.config.tie_word_embeddings
    if "tie_word_embeddings" in config or not is_tied:
        config["tie_word_embeddings"] = is_tied
    config = with_training_facts(config, folder, adapter)
    write_derived(folder, options.output, config, lambda goal: save_pretrained(model, goal))
    counted = f"{layers} layers" if rank is None else f"rank {rank}, {layers} layers"
    command_line.show(f"{options.output}: {adapter} ({counted}) merged into {folder}, in {dtype}")
    return {"output": options.output, "rank": rank, "layers": layers, "dtype": dtype}


if __name__ == "__main__":
    command_line.run(Options, main)
