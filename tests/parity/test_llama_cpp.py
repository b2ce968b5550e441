"""llama.cpp runs files of `minigpt convert`: the same ids, and logits up to llama.cpp's own rounding.

Skipped without llama-cpp-python, which is built from source in some minutes: pip install llama-cpp-python.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM
from minigpt.families.registry import LanguageModel
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenizer import SPECIAL_TOKENS, Tokenizer
from minigpt.weights.gguf_file import write_gguf
from minigpt.weights.pretrained import AnyTokenizer

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytest.importorskip("gguf", reason="the gguf package is not installed: pip install 'minigpt[gguf]'")

TEXTS = ["你好 吗", "  你\n\n好  ", "<sep>", "a b", "x你x好x", "Hello 世界, it's 2026!\n\n  x", "é ñ 안녕 🚀"]


def characters() -> Tokenizer:
    words = [*SPECIAL_TOKENS, *dict.fromkeys("\n 你好吗？abc<sep>")]
    return Tokenizer.from_word2id({word: index for index, word in enumerate(words)})


def spread(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def cases() -> dict[str, tuple[LanguageModel, AnyTokenizer]]:
    torch.manual_seed(1)
    texts = ["low lower lowest 你好世界 it's 2026", "é ñ 안녕"] * 3
    gpt2_bpe, qwen_bpe = (BpeTokenizer.train(texts, vocab_size=290, kind=kind) for kind in ("gpt2", "qwen2"))
    rows = characters().get_vocab_size()
    return {
        "gpt2 characters": (
            spread(GPTLMHeadModel(GPTConfig(64, 4, 2, 0.1, 48, rows, False, "tanh"))),
            characters(),
        ),
        "gpt2 BPE": (spread(GPTLMHeadModel(GPTConfig(64, 4, 2, 0.1, 48, 300, True, "tanh"))), gpt2_bpe),
        "qwen3 BPE": (spread(Qwen3ForCausalLM(Qwen3Config(300, 32, 64, 2, 4, 2, 16, 48))), qwen_bpe),
        "qwen3 untied": (
            spread(Qwen3ForCausalLM(Qwen3Config(300, 32, 64, 2, 4, 2, 16, 48, tie_word_embeddings=False))),
            qwen_bpe,
        ),
        "qwen3 characters": (
            spread(Qwen3ForCausalLM(Qwen3Config(rows, 32, 64, 2, 4, 2, 16, 48))),
            characters(),
        ),
    }


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("case", cases())
def test_llama_cpp_gives_our_ids_and_logits(case: str, dtype: str, tmp_path: Path) -> None:
    model, tokenizer = cases()[case]
    write_gguf(tmp_path / "m.gguf", model, tokenizer, dtype, "test")
    there = llama_cpp.Llama(
        str(tmp_path / "m.gguf"),
        n_ctx=48,
        n_threads=1,
        logits_all=True,
        flash_attn=False,
        type_k=0,  # the cache in f32
        type_v=0,
        verbose=False,
    )
    for text in TEXTS:
        ids = tokenizer.encode_text(text)
        if isinstance(tokenizer, Tokenizer):  # several unknown characters in a row are one there
            unknown = tokenizer.unk_token_id
            ids = [
                index for i, index in enumerate(ids) if i == 0 or (index, ids[i - 1]) != (unknown, unknown)
            ]
        assert there.tokenize(text.encode(), add_bos=False, special=False) == ids, text
        if isinstance(tokenizer, BpeTokenizer) or unknown not in ids:
            assert there.detokenize(ids).decode() == text
    eos = "<sep>" if isinstance(tokenizer, Tokenizer) else "<|endoftext|>"
    assert there.tokenize(eos.encode(), add_bos=True, special=True) == [tokenizer.eos_token_id]
    assert there.token_eos() == tokenizer.eos_token_id

    ids = [5, 6, 7, 4, 8, 3, 9, 10]
    there.eval(ids)
    logits = np.array(there.scores[: len(ids)])
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0].numpy()
    # On a CPU llama.cpp looks GELU up in a table of float16 values, and multiplies with f16 or q8_0 weights
    # after rounding the other factor to 16 or 8 bits too: as in tests/test_gguf.py, twice.
    share = {"f32": 20 * 2.0**-11, "f16": 100 * 2.0**-11, "q8_0": 100 / 254}[dtype]
    assert np.abs(logits - expected).max() < share * expected.std()
