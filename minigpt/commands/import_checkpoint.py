"""Turn a file of torch.save (a .pth or .pt) into a checkpoint folder.

The file may come from nanoGPT, from minGPT, or from the tutorial that minigpt is based on.

    minigpt import output/best_model.pth --vocab data/vocab.json
    minigpt import output/best_model.pth --vocab data/vocab.json --output imported
    minigpt import out/ckpt.pt --vocab gpt2     # nanoGPT, with GPT-2's tokenizer from the folder gpt2

The folder has the same format as a checkpoint of a training run: `minigpt generate --model FOLDER` answers
with it, and Hugging Face's libraries read it. Only weights are read from the file; no code in it is run. The
optimiser's state is not kept: training cannot be resumed from the folder.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from minigpt.console import command_line
from minigpt.console.flags import POSITIONAL
from minigpt.console.language import translated
from minigpt.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Options(command_line.CommandOptions):
    """Turn a .pth of torch.save, nanoGPT's ckpt.pt too, into a checkpoint folder that all commands read."""

    RANGES = {"n_head": (1, 10_000)}

    checkpoint: Path = field(default=Path("output/best_model.pth"), metadata=POSITIONAL)
    """the file: a dict with model_state_dict or model, or a state_dict"""
    vocab: Path = Path("data/vocab.json")
    """the vocabulary that the model was trained with, or a folder with its tokenizer"""
    output: Path | None = None
    """folder to make; default: the name of the file without its ending"""
    n_head: int | None = None
    """number of attention heads; default: as the file says (nanoGPT), or else 8; tensors do not show it"""
    gelu: Literal["auto", "exact", "tanh"] = "auto"
    """GELU of the training; auto: tanh for minGPT and transformers, exact for the tutorial and nanoGPT"""


def main(options: Options) -> dict[str, Any]:
    """Read the file, check it, write the folder."""
    from minigpt.families.gpt2.pth_file import read_pth
    from minigpt.storage.files import atomic_folder
    from minigpt.storage.regular_files import resolved
    from minigpt.tokenizer import Tokenizer
    from minigpt.weights.pretrained import load_tokenizer, save_pretrained

    output = options.output or options.checkpoint.parent / options.checkpoint.stem
    if resolved(output) == resolved(options.checkpoint):
        raise InputError(f"{output} has no suffix to leave out: name the folder to make with --output")
    tokenizer = load_tokenizer(options.vocab) if options.vocab.is_dir() else Tokenizer(options.vocab)
    found = read_pth(options.checkpoint, options.n_head, None if options.gelu == "auto" else options.gelu)
    model = found.model
    rows, entries = model.config.vocab_size, tokenizer.get_vocab_size()
    if rows != entries and (isinstance(tokenizer, Tokenizer) or rows < entries):
        raise InputError(
            f"{options.vocab} is not this model's vocabulary: it has {entries:,} entries, the model {rows:,}"
        )
    atomic_folder(output, lambda folder: save_pretrained(model, folder, tokenizer))
    config = model.config
    sizes = {
        name: getattr(config, name) for name in ("n_embd", "n_head", "n_layer", "block_size", "vocab_size")
    }
    seen = f" of {found.step}" if found.step else ""
    command_line.show(
        f"{options.checkpoint}, as {found.origin} writes it: {config.parameter_count():,} parameters{seen}"
    )
    print("  " + "  ".join(f"{name}={value}" for name, value in sizes.items()) + f"  bias={config.bias}")
    print(f"  gelu={config.gelu}" + translated(" (--gelu says another)" if options.gelu == "auto" else ""))
    command_line.show(f"{output} written; ask it with: minigpt generate --model {output}")
    number = found.step.rpartition(" ")[2]
    return {
        "output": str(output),
        "parameters": config.parameter_count(),
        "epoch": int(number) if found.step.startswith("epoch") else None,
        "origin": found.origin,
        **sizes,
    }


if __name__ == "__main__":
    command_line.run(Options, main)
