"""Model folders in both directions: `transformers` reads minigpt's folders, and minigpt reads theirs.

GPT-2 and Qwen3, with characters and with byte-level BPE, in one file and in shards, in three precisions.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM
from minigpt.families.registry import LanguageModel
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.storage.safetensors_files import INDEX, WEIGHTS
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenizer import SPECIAL_TOKENS, Tokenizer
from minigpt.weights.pretrained import (
    AnyTokenizer,
    load_model,
    load_model_and_tokenizer,
    load_tokenizer,
    save_pretrained,
)
from tests.commands import RunCommand

transformers = pytest.importorskip("transformers", reason="transformers, the oracle here, is not installed")

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
TEXTS = ["你好吗", "", "lowest new", "  a\n\nb ", "Hello 世界, it's 2026!", "<sep><|endoftext|>"]
SIZE = 6000  # bytes; the models below take several such shards in each precision


@pytest.fixture(autouse=True)
def quiet_transformers(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Check that transformers' log stays empty. It would report unexpected keys there."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="transformers"):
        yield
    assert [record.getMessage() for record in caplog.get_records("call")] == []


def characters() -> Tokenizer:
    words = [*SPECIAL_TOKENS, *dict.fromkeys("你好吗 abc\nlowestn")]
    return Tokenizer.from_word2id({word: index for index, word in enumerate(words)})


def bpe(kind: str) -> BpeTokenizer:
    return BpeTokenizer.train(["low lower lowest new newer 你好"] * 3, vocab_size=275, kind=kind)


def spread(model: Any, dtype: torch.dtype) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


def make(family: str, rows: int, dtype: torch.dtype) -> LanguageModel:
    torch.manual_seed(1)
    if family == "gpt2":
        return spread(GPTLMHeadModel(GPTConfig(16, 2, 2, 0.1, 24, rows, True, "tanh")), dtype)  # type: ignore[no-any-return]
    config = Qwen3Config(rows, 16, 32, 2, 4, 2, 8, 24, tie_word_embeddings=family == "qwen3 tied")
    return spread(Qwen3ForCausalLM(config), dtype)  # type: ignore[no-any-return]


CASES: dict[str, tuple[str, Any, int]] = {  # family, tokenizer, rows without a token
    "gpt2-characters": ("gpt2", characters, 0),
    "gpt2-bpe": ("gpt2", lambda: bpe("gpt2"), 0),
    "qwen3-bpe": ("qwen3 tied", lambda: bpe("qwen2"), 9),
    "qwen3-untied-bpe": ("qwen3 untied", lambda: bpe("qwen2"), 0),
    "qwen3-characters": ("qwen3 tied", characters, 0),
}


def assert_same_ids(theirs: Any, ours: AnyTokenizer) -> None:
    for text in TEXTS:
        if isinstance(ours, BpeTokenizer) and "<" in text:
            continue  # their tokenizers take a typed "<sep>" for the token, unless told otherwise
        ids = ours.encode_text(text)
        assert theirs(text, add_special_tokens=False).input_ids == ids
        if not isinstance(ours, Tokenizer) or ours.unk_token_id not in ids:
            assert theirs.decode(ids) == ours.decode(ids) == text
    assert theirs.eos_token_id == ours.eos_token_id
    assert theirs.pad_token_id == ours.pad_token_id


def ids_for(model: LanguageModel) -> Tensor:
    return torch.randint(model.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(4))


def assert_same_logits(theirs: Any, ours: LanguageModel) -> None:
    ids = ids_for(ours)
    with torch.no_grad():
        # Both sides compute in float32, but sum in another order.
        torch.testing.assert_close(theirs.float().eval()(ids).logits, ours.float()(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", ["5GB", SIZE], ids=["whole", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_ours_is_read_there_and_theirs_here(
    case: str, dtype: torch.dtype, size: int | str, tmp_path: Path
) -> None:
    family, make_tokenizer, spare = CASES[case]
    tokenizer = make_tokenizer()
    model = make(family, tokenizer.get_vocab_size() + spare, dtype)
    save_pretrained(model, tmp_path / "ours", tokenizer, max_shard_size=size)
    assert (tmp_path / "ours" / INDEX).exists() == (size == SIZE)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert {key: len(value) for key, value in report.items() if value} == {}
    assert theirs.dtype == dtype  # as config.json says
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert_same_ids(their_tokenizer, tokenizer)

    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    their_tokenizer.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs" / INDEX).exists() == (size == SIZE)
    back = load_model(tmp_path / "theirs", dtype=dtype)
    assert back.config == model.config
    for (name, parameter), original in zip(back.named_parameters(), model.parameters(), strict=True):
        assert parameter.dtype == dtype
        assert torch.equal(parameter, original), name
    back_tokenizer = load_tokenizer(tmp_path / "theirs")
    assert back_tokenizer.fingerprint == tokenizer.fingerprint

    save_pretrained(back, tmp_path / "again", back_tokenizer, max_shard_size=size)
    for path in sorted((tmp_path / "ours").glob("model*")):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", attn_implementation="eager")
    assert_same_ids(transformers.AutoTokenizer.from_pretrained(tmp_path / "again"), tokenizer)
    assert_same_logits(again, model)


@pytest.mark.parametrize("case", CASES)
def test_generation_ends_where_our_tokenizer_says(case: str, tmp_path: Path) -> None:
    family, make_tokenizer, spare = CASES[case]
    tokenizer = make_tokenizer()
    model = make(family, tokenizer.get_vocab_size() + spare, torch.float32)
    save_pretrained(model, tmp_path, tokenizer)
    settings = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (settings.eos_token_id, settings.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert not settings.do_sample
    load_model_and_tokenizer(tmp_path)


@pytest.mark.parametrize("family", ["gpt2", "qwen3 tied"])
def test_a_byte_level_model_without_sep_continues_the_text(
    family: str, tmp_path: Path, run_command: RunCommand
) -> None:
    """It continues like `generate` of transformers from the same ids. Nothing is added after the prompt."""
    tokenizer = BpeTokenizer.train(["low lower lowest 你好"] * 3, vocab_size=270)
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_bytes())
    del config["sep_token"]  # as in GPT-2's and Qwen's own files
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = BpeTokenizer.from_folder(tmp_path)
    assert tokenizer.sep_token_id is None
    save_pretrained(make(family, tokenizer.get_vocab_size(), torch.float32), tmp_path, tokenizer)
    prompt = "lowest 你"
    done = run_command(
        "generate.py", "--model", tmp_path, "--question", prompt, "--max_new_tokens", 5, "--json"
    )
    assert done.code == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([tokenizer.encode_text(prompt)])
    mask = torch.ones_like(ids)
    written = theirs.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    kept = [index for index in written.tolist() if index != tokenizer.eos_token_id]
    assert json.loads(done.out.splitlines()[-1])["answer"] == tokenizer.decode(kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_a_directory_in_their_own_style_is_read(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The folder has transformers' defaults and no key of minigpt, with and without the head, in shards."""
    torch.manual_seed(2)
    if family == "gpt2":
        sizes = {"n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 20, "vocab_size": 31}
        config, kind = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1), "GPT2"
    else:
        sizes = {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        sizes |= {"head_dim": 8, "intermediate_size": 24, "max_position_embeddings": 20, "vocab_size": 31}
        config, kind = transformers.Qwen3Config(**sizes, tie_word_embeddings=True), "Qwen3"
    whole = {"GPT2": "GPT2LMHeadModel", "Qwen3": "Qwen3ForCausalLM"}[kind]
    theirs = spread(getattr(transformers, whole)(config), dtype)
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size=2000)
    theirs.base_model.save_pretrained(tmp_path / "headless", max_shard_size=2000)
    assert (tmp_path / "whole" / WEIGHTS).exists()
    assert len(list((tmp_path / "headless").glob("model-*"))) > 1
    models = [load_model(tmp_path / name) for name in ("whole", "shards", "headless")]
    # Load it again, because `to` has also rounded the RoPE frequencies of the model above.
    theirs = getattr(transformers, whole).from_pretrained(tmp_path / "whole", dtype=torch.float32)
    for model in models:
        assert_same_logits(theirs, model)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "family", "entries"),
    [("gpt2_tokenizer", "gpt2", 50_257), ("qwen_tokenizer", "qwen3 tied", 151_669)],
)
def test_the_published_tokenizers_go_round(folder: str, family: str, entries: int, tmp_path: Path) -> None:
    source = SHARED / folder
    if not source.is_dir():
        pytest.skip(f"the published tokenizer's files are not there: {folder}")
    if family == "gpt2":
        tokenizer = BpeTokenizer.from_folder(source)
    else:
        for name, goal in (("vocab.json", "vocab.json"), ("merges.txt", "merges.txt")):
            (tmp_path / goal).write_bytes((source / name).read_bytes())
        (tmp_path / "tokenizer_config.json").write_bytes(
            (source / "qwen3_tokenizer_config.json").read_bytes()
        )
        published = load_tokenizer(tmp_path)
        assert isinstance(published, BpeTokenizer)
        tokenizer = published
    assert tokenizer.get_vocab_size() == entries
    torch.manual_seed(1)
    rows = 151_936 if entries > 100_000 else entries
    if family == "gpt2":
        model: LanguageModel = GPTLMHeadModel(GPTConfig(4, 2, 1, 0.1, 16, rows, True, "tanh"))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(rows, 4, 8, 1, 2, 1, 2, 16))
    save_pretrained(model, tmp_path / "saved", tokenizer, dtype=torch.bfloat16)
    back, back_tokenizer = load_model_and_tokenizer(tmp_path / "saved")
    assert back.config.vocab_size == rows
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    expected = [json.loads(line) for line in (source / "expected_ids.jsonl").read_text("utf-8").splitlines()]
    assert len(expected) > 100
    for row in expected:
        text, ids = row["text"], row["ids"]
        assert back_tokenizer.encode_text(text) == ids
        assert theirs(text, add_special_tokens=False).input_ids == ids
