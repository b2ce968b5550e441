"""GPT-2 continues a prompt: the published weights, in NumPy, JAX or PyTorch; always the most likely token.

    python gpt2.py "Alan Turing theorized that computers would one day become"
    python gpt2.py "Not all heroes wear capes." --n_tokens_to_generate 8 --model_size 355M --backend torch

The model is read from MODELS_DIR/MODEL_SIZE, in OpenAI's form (TensorFlow's checkpoint, hparams.json,
encoder.json, vocab.bpe) or in Hugging Face's (config.json, model.safetensors, and tokenizer.json or
vocab.json with merges.txt). One of the published sizes, 124M, 355M, 774M or 1558M, is downloaded if it is not
there: from --mirror, or from HF_ENDPOINT if that environment variable is set, or else from OpenAI. A prompt
that begins with "-" stands at the end, after "--".

The command line is that of picoGPT, https://github.com/jaymody/picoGPT. The model in NumPy is
minigpt/reference/gpt2.py, in PyTorch minigpt/model.py.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from minigpt.console import command_line
from minigpt.console.flags import POSITIONAL
from minigpt.errors import InputError, printable

if TYPE_CHECKING:
    from minigpt.model import GPTLMHeadModel


@dataclass(frozen=True, kw_only=True)
class Options(command_line.CommandOptions):
    """Continue a prompt with GPT-2, always with the most likely token."""

    RANGES = {"n_tokens_to_generate": (1, 10**6)}

    prompt: str = field(metadata=POSITIONAL)
    """the beginning of the text"""
    n_tokens_to_generate: int = 40
    """how many tokens to add to it"""
    model_size: str = "124M"
    """124M, 355M, 774M, 1558M (or gpt2, gpt2-medium, gpt2-large, gpt2-xl), or a folder of models_dir"""
    models_dir: Path = Path("models")
    """where the models are, and downloaded to: a folder for each"""
    backend: Literal["numpy", "jax", "torch"] = "numpy"
    """what computes"""
    mirror: str | None = None
    """download from this copy of OpenAI's bucket: MIRROR/124M/hparams.json, and so on"""


class Model(NamedTuple):
    """A loaded model, whatever computes it."""

    n_vocab: int
    n_ctx: int  # tokens that it can read, the new ones included
    continuation: Callable[[list[int], int], list[int]]  # ids of a prompt, how many -> the new ids


def main(options: Options) -> dict[str, Any] | None:
    """Read the model, encode the prompt, continue it, print."""
    if not options.prompt:
        raise InputError("the prompt is empty: the model needs a token to start from")
    if options.backend == "jax":
        from minigpt.reference.transforms import imported_jax

        imported_jax()  # complain before half a gigabyte is downloaded
    from minigpt.tokenization.bpe import BpeTokenizer

    folder = find(options)
    tokenizer = BpeTokenizer.from_folder(folder, kind="gpt2")
    prompt = tokenizer.encode_text(options.prompt)
    model = load(folder, options.backend)
    if tokenizer.get_vocab_size() > model.n_vocab:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.get_vocab_size()} entries, the model {model.n_vocab}: "
            "they do not belong together"
        )
    if len(prompt) + options.n_tokens_to_generate > model.n_ctx:
        raise InputError(
            f"the model reads {model.n_ctx} tokens: {len(prompt)} of the prompt and "
            f"--n_tokens_to_generate {options.n_tokens_to_generate} are too many"
        )
    ids = model.continuation(prompt, options.n_tokens_to_generate)
    text = tokenizer.decode(ids)
    if not options.json:
        print("\n".join(map(printable, text.split("\n"))))  # line ends yes, a terminal's codes no
    return {"prompt": options.prompt, "text": text, "ids": ids}


def find(options: Options) -> Path:
    """The model's folder, filled by a download if need be.

    Raises:
        InputError: for a name that is neither a folder nor a published model; for a failed download.
    """
    from minigpt.families.gpt2.presets import OPENAI_FILES, preset, urls
    from minigpt.weights.download import download_model

    def is_whole(folder: Path) -> bool:
        forms = (OPENAI_FILES, ("config.json", "model.safetensors"))
        return any(all((folder / name).exists() for name in form) for form in forms)

    folder = options.models_dir / options.model_size
    if is_whole(folder):
        return folder
    try:
        published = preset(options.model_size)
    except InputError:
        if folder.is_dir():
            return folder  # a user's own model: reading it names what is missing
        raise
    folder = options.models_dir / published.name
    if not is_whole(folder):
        download_model(folder, urls(published, options.mirror, os.environ.get("HF_ENDPOINT")))
    return folder


def load(folder: Path, backend: str) -> Model:
    """The model of a folder, in OpenAI's form or Hugging Face's.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    if backend == "torch":
        return _with_torch(folder)
    import numpy

    from minigpt.reference import gpt2 as reference

    array_module: Any = numpy
    if (folder / "config.json").exists():
        from minigpt.reference import weights

        config, params = weights.load(folder)
        if config["model_type"] != "gpt2":
            raise InputError(
                f"{folder / 'config.json'}: model_type must be gpt2: got {config['model_type']!r}"
            )
        settings = reference.settings(config)
    else:
        from minigpt.families.gpt2.openai_checkpoint import read_checkpoint

        sizes, tensors = read_checkpoint(folder)
        params, settings = reference.params_from_names(tensors), {"n_head": sizes.n_head}
    if backend == "jax":
        from minigpt.reference.names import map_tree
        from minigpt.reference.transforms import imported_jax

        array_module = imported_jax().numpy
        params = map_tree(array_module.asarray, params)  # once, not with each token

    def continuation(ids: list[int], count: int) -> list[int]:
        return reference.generate(ids, params, **settings, n_tokens_to_generate=count, np=array_module)

    return Model(len(params["wte"]["weight"]), len(params["wpe"]["weight"]), continuation)


def _with_torch(folder: Path) -> Model:
    from minigpt.generation.api import GenerationOptions, generate_ids
    from minigpt.model import GPTConfig

    if (folder / "config.json").exists():
        from minigpt.weights.pretrained import load_model

        model = load_model(folder)
    else:
        model = _torch_model(folder)
    if not isinstance(model.config, GPTConfig):
        raise InputError(f"{folder / 'config.json'}: model_type must be gpt2")

    def continuation(ids: list[int], count: int) -> list[int]:
        # no token ends it: like the others, it continues behind <|endoftext|>
        return generate_ids(model, [ids], GenerationOptions(max_new_tokens=count), eos_token_id=None)[0].ids

    return Model(model.config.vocab_size, model.config.block_size, continuation)


def _torch_model(folder: Path) -> "GPTLMHeadModel":
    """OpenAI's checkpoint in minigpt.model."""
    import torch

    from minigpt.families.gpt2.family import FAMILY
    from minigpt.families.gpt2.openai_checkpoint import read_checkpoint

    sizes, tensors = read_checkpoint(folder)
    config = sizes.config()
    model: GPTLMHeadModel = FAMILY.on_meta(config)
    arrays = {name: torch.from_numpy(array) for name, array in tensors.items()}
    FAMILY.load_state(model, FAMILY.from_hugging_face(arrays, config), assign=True)
    return model.eval()


if __name__ == "__main__":
    command_line.run(Options, main)
