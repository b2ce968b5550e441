"""Models of several sizes, and random text, for the benchmarks of arithmetic and memory."""

from pathlib import Path
from typing import Any

import numpy as np

from minigpt.tokenizer import Tokenizer
from minigpt.training.config import TrainConfig

__all__ = ["SIZES", "config_of", "write_text"]

SIZES: dict[str, dict[str, Any]] = {  # vocab_size is for the tokenizer
    "toy": {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 100},
    "1M": {"n_layer": 4, "n_embd": 128, "n_head": 4, "vocab_size": 1000},
    "5M": {"n_layer": 6, "n_embd": 256, "n_head": 4, "vocab_size": 1000},
    "10M": {"n_layer": 6, "n_embd": 384, "n_head": 6, "vocab_size": 100},  # nanoGPT's "baby GPT"
    "25M": {"n_layer": 8, "n_embd": 512, "n_head": 8, "vocab_size": 1000},
    "50M": {"n_layer": 7, "n_embd": 768, "n_head": 12, "vocab_size": 1000},
    "124M": {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257}  # GPT-2
    | {"bias": True, "gelu": "tanh", "block_size": 1024},
}
_CHARACTERS = [  # CJK, its extensions A and B, Hangul: 74,000 code points
    *range(0x4E00, 0x9FA6), *range(0x3400, 0x4DB6), *range(0xAC00, 0xD7A4), *range(0x20000, 0x2A6D7)
]  # fmt: skip


def write_text(folder: Path, vocab_size: int, length: int = 200_000) -> dict[str, Any]:
    """Write a text of random characters and its vocabulary. Returns the paths for TrainConfig."""
    characters = [chr(c) for c in _CHARACTERS[: vocab_size - 3]]
    words = ["<pad>", "<unk>", "<sep>", *characters]
    Tokenizer.from_word2id({word: i for i, word in enumerate(words)}).save(folder / "vocab.json")
    drawn = np.random.default_rng(0).choice(np.array(characters), length)
    (folder / "text.txt").write_text("".join(drawn), encoding="utf-8")
    return {"text": folder / "text.txt", "tokenizer": str(folder / "vocab.json")}


def config_of(size: str, paths: dict[str, Any], **values: Any) -> TrainConfig:
    """Return the configuration of a run with AdamW, because its updates take little arithmetic."""
    shape = {key: value for key, value in SIZES[size].items() if key != "vocab_size"}
    plain = {"dropout": 0.0, "loss_on": "all", "optimizer": "adamw", "learning_rate": 3e-4}
    plain |= {"max_grad_norm": 1.0, "device": "cpu", "report_to": "none"}
    return TrainConfig(**{**plain, **shape, **paths, **values})
