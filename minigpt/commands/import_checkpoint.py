"""Turn a .pth of torch.save, such as the tutorial's output/best_model.pth, into a checkpoint folder.

    minigpt import output/best_model.pth --vocab data/vocab.json
    minigpt import output/best_model.pth --vocab data/vocab.json --output imported

The folder is like those of `minigpt train`: `minigpt generate --model FOLDER` uses it, and so do Hugging
Face's libraries. Only weights are read from the .pth; code in it is never run. The optimiser's state is not
kept, so training cannot be resumed from the folder.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from minigpt.console import command_line
from minigpt.console.flags import POSITIONAL
from minigpt.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Options(command_line.CommandOptions):
    """Turn a .pth of torch.save into a checkpoint folder that all commands can read."""

    RANGES = {"n_head": (1, 10_000)}

    checkpoint: Path = field(default=Path("output/best_model.pth"), metadata=POSITIONAL)
    """the .pth file: a dict with model_state_dict, or a state_dict"""
    vocab: Path = Path("data/vocab.json")
    """vocabulary that the model was trained with"""
    output: Path | None = None
    """folder to make; default: the name of the .pth file without .pth"""
    n_head: int = 8
    """number of attention heads; the tensors do not show it"""
    gelu: Literal["exact", "tanh"] = "exact"
    """GELU that the model was trained with: exact, as in the tutorial, or GPT-2's tanh approximation"""


def main(options: Options) -> dict[str, Any]:
    """Read the file, check it, write the folder."""
    from minigpt.families.gpt2.pth_file import read_pth
    from minigpt.storage.files import atomic_folder
    from minigpt.tokenizer import Tokenizer
    from minigpt.weights.pretrained import save_pretrained

    output = options.output or options.checkpoint.with_suffix("")
    if output == options.checkpoint:
        raise InputError(f"{output} has no suffix to leave out: name the folder to make with --output")
    tokenizer = Tokenizer(options.vocab)
    model, epoch = read_pth(options.checkpoint, options.n_head, options.gelu)
    rows, entries = model.config.vocab_size, tokenizer.get_vocab_size()
    if rows != entries:
        raise InputError(
            f"{options.vocab} is not this model's vocabulary: it has {entries:,} entries, the model {rows:,}"
        )
    atomic_folder(output, lambda folder: save_pretrained(model, folder, tokenizer))
    config = model.config
    sizes = {
        name: getattr(config, name) for name in ("n_embd", "n_head", "n_layer", "block_size", "vocab_size")
    }
    seen = "" if epoch is None else f" of epoch {epoch}"
    print(f"{options.checkpoint}: {config.parameter_count():,} parameters{seen}")
    print("  " + "  ".join(f"{name}={value}" for name, value in sizes.items()) + f"  bias={config.bias}")
    print(f"{output} written; ask it with: minigpt generate --model {output}")
    return {"output": str(output), "parameters": config.parameter_count(), "epoch": epoch, **sizes}


if __name__ == "__main__":
    command_line.run(Options, main)
