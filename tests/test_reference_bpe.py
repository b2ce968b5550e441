"""The BPE in plain Python has the same words, merges and ids as the `tokenizers` library."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from minigpt.reference import bpe
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenization.bpe_files import GPT2_WORDS
from minigpt.tokenization.bpe_training import LONGEST_WORD
from minigpt.tokenization.definition import BYTE_SYMBOLS

GPT2 = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "gpt2_tokenizer"
needs_shared = pytest.mark.skipif(not GPT2.is_dir(), reason="the test data beside the project are not there")
quick = settings(derandomize=True, deadline=None, max_examples=100)

SPECIAL = 3  # <pad>, <|endoftext|>, <sep>: the library's ids begin behind them
BYTE_OF = {symbol: byte for byte, symbol in enumerate(BYTE_SYMBOLS)}
# characters that this Python knows: the library may know a later Unicode
known = st.characters(exclude_categories=("Cn", "Cs"))


def as_bytes(token: str) -> bytes:
    return bytes(BYTE_OF[symbol] for symbol in token)


@quick
@given(
    st.text(known)
    | st.lists(st.sampled_from([*"ab 1²٣'’_.\n\t\r\x1c\u00a0\u3000\u0301好", "'s", "'ll", "  "])).map("".join)
)
def test_words_are_the_pattern_s(text: str) -> None:
    library = pre_tokenizers.Split(Regex(GPT2_WORDS), "isolated")
    assert list(bpe.split(text)) == [word for word, _ in library.pre_tokenize_str(text)]


@quick
@given(
    st.lists(st.text("ab 你们'.", max_size=30), max_size=6), st.integers(0, 40), st.sampled_from([1, 2, 3])
)
def test_learned_merges_are_the_library_s(texts: list[str], count: int, min_frequency: int) -> None:
    """The texts have few different characters, so nearly each step is a tie."""
    library = BpeTokenizer.train(texts, SPECIAL + 256 + count, min_frequency=min_frequency)
    tokens, merges = bpe.train(texts, 256 + count, min_frequency)
    assert [(as_bytes(a), as_bytes(b)) for a, b in library.definition.merges] == merges
    assert [
        library.token_bytes(SPECIAL + index) for index in range(library.get_vocab_size() - SPECIAL)
    ] == tokens
    for text in texts:
        ids = bpe.encode(text, tokens, merges)
        assert library.encode_text(text) == [SPECIAL + index for index in ids]
        assert b"".join(tokens[index] for index in ids).decode() == text


def test_long_words_are_cut_for_learning_as_the_library_does() -> None:
    rng = random.Random(0)
    texts = ["".join(rng.choices("天地玄黄宇宙", k=1000)), "a" * 1000, " " * 300, "\n" * 300]
    library = BpeTokenizer.train(texts, SPECIAL + 256 + 80)
    tokens, merges = bpe.train(texts, 256 + 80, longest_word=LONGEST_WORD)
    assert [(as_bytes(a), as_bytes(b)) for a, b in library.definition.merges] == merges
    assert bpe.train(texts, 256 + 80, longest_word=2000)[1] != merges  # the cut matters here
    for text in texts:
        assert library.encode_text(text) == [SPECIAL + index for index in bpe.encode(text, tokens, merges)]


@needs_shared
def test_gpt2_s_published_ids() -> None:
    tokenizer = BpeTokenizer.from_folder(GPT2)
    merges = [(as_bytes(a), as_bytes(b)) for a, b in tokenizer.definition.merges]
    tokens = [tokenizer.token_bytes(index) for index in range(50_257)]
    assert tokens[:256] == bpe.train([], 256)[0]
    for line in (GPT2 / "expected_ids.jsonl").read_text(encoding="utf-8").splitlines()[::4]:
        row = json.loads(line)
        assert bpe.encode(row["text"], tokens, merges) == row["ids"]
