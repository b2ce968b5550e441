"""The four published sizes of GPT-2, as data, and the addresses of their files.

preset("124M").sizes.config()     # a GPTConfig
preset("gpt2-xl").sizes.config()  # Hugging Face's names work, too
urls(preset("124M"))              # file -> URL, for minigpt.weights.download
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from minigpt.errors import InputError, unknown_name

if TYPE_CHECKING:  # only for type checkers, because the import of torch takes a second
    from minigpt.model import GPTConfig

__all__ = ["HUGGING_FACE_FILES", "OPENAI", "OPENAI_FILES", "PRESETS", "Preset", "Sizes", "preset", "urls"]

OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2/models"
OPENAI_FILES = (
    "checkpoint",
    "hparams.json",
    "encoder.json",
    "vocab.bpe",
    "model.ckpt.index",
    "model.ckpt.data-00000-of-00001",  # the largest file is last, so a wrong URL fails at a small file
)
HUGGING_FACE_FILES = ("config.json", "vocab.json", "merges.txt", "tokenizer.json", "model.safetensors")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of a GPT-2 model. The fields are the keys of OpenAI's hparams.json."""

    n_vocab: int = 50257  # 256 bytes, 50,000 merges and <|endoftext|>
    n_ctx: int = 1024
    n_embd: int
    n_head: int
    n_layer: int

    def config(self) -> "GPTConfig":
        """Return the configuration as GPT-2 was trained: all biases, GELU's tanh form, dropout 0.1.

        Raises:
            ValueError: for a size that no model can have; the message names the size.
        """
        from minigpt.model import GPTConfig

        return GPTConfig(
            vocab_size=self.n_vocab,
            block_size=self.n_ctx,
            n_embd=self.n_embd,
            n_head=self.n_head,
            n_layer=self.n_layer,
            dropout=0.1,
            bias=True,
            gelu="tanh",
        )


class Preset(NamedTuple):
    """A published model: its name in OpenAI's release, its repository at Hugging Face, and its sizes."""

    name: str
    repository: str
    sizes: Sizes


# https://github.com/openai/gpt-2. GPT-2's paper has 117M, 345M, 762M and 1542M: OpenAI miscounted.
PRESETS = (
    Preset("124M", "openai-community/gpt2", Sizes(n_embd=768, n_head=12, n_layer=12)),
    Preset("355M", "openai-community/gpt2-medium", Sizes(n_embd=1024, n_head=16, n_layer=24)),
    Preset("774M", "openai-community/gpt2-large", Sizes(n_embd=1280, n_head=20, n_layer=36)),
    Preset("1558M", "openai-community/gpt2-xl", Sizes(n_embd=1600, n_head=25, n_layer=48)),
)


def preset(name: str) -> Preset:
    """Return the preset with this name. The name is OpenAI's ("124M") or Hugging Face's ("gpt2").

    Raises:
        InputError: for an unknown name; the message suggests the most similar name.
    """
    known = {row.name: row for row in PRESETS} | {row.repository.split("/")[1]: row for row in PRESETS}
    if name not in known:
        raise InputError(unknown_name("GPT-2 model", name, known))
    return known[name]


def urls(model: Preset, mirror: str | None = None, hf_endpoint: str | None = None) -> dict[str, str]:
    """Return a dict: name of a file -> URL. Without `mirror` and `hf_endpoint`, the URLs are OpenAI's.

    Args:
        model: the published model.
        mirror: address of a folder with copies of OpenAI's files, such as MIRROR/124M/hparams.json.
        hf_endpoint: https://huggingface.co or a copy of it, as in the environment variable HF_ENDPOINT. It is
            used only without `mirror`.

    Raises:
        InputError: if an address does not begin with http:// or https://.
    """
    for name, value in (("mirror", mirror), ("HF_ENDPOINT", hf_endpoint)):
        if value and not re.fullmatch(r"https?://[!-~]+", value):
            raise InputError(f"{name} must be an address like https://example.org/models: got {value!r:.80}")
    if hf_endpoint and not mirror:
        base = f"{hf_endpoint.rstrip('/')}/{model.repository}/resolve/main"
        return {name: f"{base}/{name}" for name in HUGGING_FACE_FILES}
    base = f"{(mirror or OPENAI).rstrip('/')}/{model.name}"
    return {name: f"{base}/{name}" for name in OPENAI_FILES}
