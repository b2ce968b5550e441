"""Tokenizer: properties first, then the tutorial's ids, then wrong vocabularies."""

import copy
import json
import pickle
import random
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.errors import InputError
from minigpt.tokenizer import SPECIAL_TOKENS, Tokenizer, build_vocabulary

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data" / "baike_dialogue"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the test data beside the project are not there"
)
quick = settings(derandomize=True, deadline=None, max_examples=100)

CHARACTERS = "\n !<>adeknpsu你好，我很吗？\u2028𠮷😊"
TOKENIZER = Tokenizer.from_word2id(build_vocabulary([CHARACTERS]))
known_text = st.text(alphabet=CHARACTERS)
any_text = st.text(alphabet=st.characters(exclude_categories=()))  # lone surrogates included


def slow_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return [tokenizer.word2id.get(c, 1) if len(c) == 1 else 1 for c in text]


@quick
@given(known_text)
def test_decoding_gives_back_what_was_encoded(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode_text(text)) == text


@quick
@given(any_text)
def test_the_look_up_equals_a_loop_over_characters(text: str) -> None:
    assert TOKENIZER.encode_array(text).dtype == np.int32
    assert TOKENIZER.encode_text(text) == TOKENIZER.encode_array(text).tolist() == slow_ids(TOKENIZER, text)


@quick
@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, *"<>sepunkad好x"])).map("".join))
def test_text_never_becomes_a_special_id(text: str) -> None:
    ids = TOKENIZER.encode_text(text)
    assert len(ids) == len(text)
    assert 0 not in ids
    assert 2 not in ids
    assert (1 in ids) == bool(TOKENIZER.unknown_characters(text))


@quick
@given(any_text, st.none() | any_text, st.integers(1, 40), st.booleans())
def test_encode_joins_cuts_and_pads(question: str, answer: str | None, max_length: int, pad: bool) -> None:
    ids, mask = TOKENIZER.encode(question, answer, max_length, pad_to_max_length=pad)
    whole = [*slow_ids(TOKENIZER, question), 2]
    if answer is not None:
        whole += [*slow_ids(TOKENIZER, answer), 2]
    real = min(len(whole), max_length)
    padding = max_length - real if pad else 0
    assert ids == whole[:real] + [0] * padding
    assert mask == [1] * real + [0] * padding


@quick
@given(st.lists(any_text))
def test_a_vocabulary_has_each_character_once_in_order(texts: list[str]) -> None:
    word2id = build_vocabulary(texts)
    characters = sorted({c for text in texts for c in text if not 0xD800 <= ord(c) <= 0xDFFF})
    assert list(word2id) == [*SPECIAL_TOKENS, *characters]
    assert list(word2id.values()) == list(range(3 + len(characters)))
    assert Tokenizer.from_word2id(word2id).get_vocab_size() == 3 + len(characters)


def test_texts_in_any_order_give_the_same_vocabulary() -> None:
    texts = ["你好吗", "我很好", "GPT-2"]
    assert build_vocabulary(texts) == build_vocabulary(reversed(texts))


@needs_shared
def test_documents_ids() -> None:
    tokenizer = Tokenizer(SHARED / "vocab.json")
    ids, mask = tokenizer.encode("你好，最近怎么样？", "我很好，谢谢！", max_length=32)
    pair = [368, 1086, 4810, 2005, 4169, 1521, 240, 2103, 4816, 2]
    pair += [1646, 1480, 1086, 4810, 3989, 3989, 4806, 2]
    assert ids == pair + [0] * 14
    assert mask == [1] * 18 + [0] * 14
    assert tokenizer.get_vocab_size() == 4825
    assert tokenizer.decode(ids) == "你好，最近怎么样？<sep>我很好，谢谢！<sep>"


@needs_shared
def test_documents_vocabulary_is_written_byte_for_byte(tmp_path: Path) -> None:
    tokenizer = Tokenizer(SHARED / "vocab.json")
    characters = tokenizer.id2word[3:]
    random.Random(0).shuffle(characters)
    again = Tokenizer.from_word2id(build_vocabulary(characters))
    again.save(tmp_path / "vocab.json")
    assert (tmp_path / "vocab.json").read_bytes() == (SHARED / "vocab.json").read_bytes()


def test_special_ids_and_a_hand_made_pair() -> None:
    tokenizer = Tokenizer.from_word2id(build_vocabulary(["ba"]))
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.sep_token_id) == (0, 1, 2)
    assert tokenizer.word2id == {"<pad>": 0, "<unk>": 1, "<sep>": 2, "a": 3, "b": 4}
    assert tokenizer.encode("ab", "b?", max_length=7) == ([3, 4, 2, 4, 1, 2, 0], [1, 1, 1, 1, 1, 1, 0])
    assert tokenizer.encode("ab", None, max_length=7, pad_to_max_length=False) == ([3, 4, 2], [1, 1, 1])
    assert tokenizer.encode("ab", "b", max_length=2, pad_to_max_length=False) == ([3, 4], [1, 1])


def test_the_text_sep_in_a_question_is_five_characters() -> None:
    ids, _ = TOKENIZER.encode("<sep>", "<sep>", pad_to_max_length=False)
    assert len(ids) == 12
    assert ids.count(2) == 2
    assert TOKENIZER.decode(TOKENIZER.encode_text("<sep><pad>")) == "<sep><pad>"


def test_unknown_characters() -> None:
    assert TOKENIZER.unknown_characters("你好啊，嗨啊\ud800") == ["啊", "嗨", "\ud800"]
    assert TOKENIZER.unknown_characters("你好") == []
    # above every character of the vocabulary, and below
    assert Tokenizer.from_word2id(build_vocabulary(["m"])).encode_text("\U0010ffff\0zm") == [1, 1, 1, 3]


def test_a_vocabulary_of_special_tokens_alone() -> None:
    assert Tokenizer.from_word2id(build_vocabulary([])).encode("a", "b", 4) == ([1, 2, 1, 2], [1] * 4)


@pytest.mark.parametrize("max_length", [0, -1])
def test_max_length_below_one(max_length: int) -> None:
    with pytest.raises(ValueError, match=f"max_length must be at least 1: got {max_length}"):
        TOKENIZER.encode("a", "b", max_length=max_length)


def test_decode_shows_unknown_and_sep_and_skips_padding() -> None:
    assert TOKENIZER.decode([0, 1, 2, 0, 0]) == "<unk><sep>"
    assert TOKENIZER.decode([]) == ""


def test_decode_takes_arrays_and_tensors() -> None:
    ids = TOKENIZER.encode_text("你好")
    tensor = torch.tensor(ids)
    for form in (
        tuple(ids),
        np.array(ids, dtype=np.uint8),
        np.array(ids),
        tensor,
        tensor.tolist(),
        iter(ids),
    ):
        assert TOKENIZER.decode(form) == "你好"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([3, 99], "id 99 at position 1 is outside the vocabulary of {size} entries"),
        ([-1], "id -1 at position 0 is outside the vocabulary of {size} entries"),
        (np.array([3, 3, 2**40]), f"id {2**40} at position 2 is outside"),
        (torch.tensor([3, -7]), "id -7 at position 1 is outside"),
        ([3, 4.0], "ids must be integers: got 4.0 at position 1"),
        ([np.float32(4)], "ids must be integers: got .* at position 0"),
        (torch.tensor([3.0]), "ids must be integers: got .* at position 0"),
        (np.array([[3, 4]]), "ids must be integers: got .* at position 0"),
        ("ab", "ids must be integers: got 'a' at position 0"),
        ([None], "ids must be integers: got None at position 0"),
    ],
)
def test_ids_that_are_none(ids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.format(size=TOKENIZER.get_vocab_size())):
        TOKENIZER.decode(ids)


def test_equality_fingerprint_and_copies() -> None:
    same = Tokenizer.from_word2id(build_vocabulary(reversed(CHARACTERS)))
    other = Tokenizer.from_word2id(build_vocabulary([CHARACTERS, "再"]))
    assert same == TOKENIZER
    assert TOKENIZER.fingerprint == same.fingerprint
    assert other != TOKENIZER
    assert TOKENIZER.fingerprint != other.fingerprint
    assert TOKENIZER.word2id != TOKENIZER
    for twin in (pickle.loads(pickle.dumps(TOKENIZER)), copy.deepcopy(TOKENIZER)):
        assert twin == TOKENIZER
        assert twin.encode_text("你好\ud800") == TOKENIZER.encode_text("你好\ud800")
    # The same characters with other ids are another vocabulary.
    swapped = Tokenizer.from_word2id({"<pad>": 0, "<unk>": 1, "<sep>": 2, "b": 3, "a": 4})
    assert swapped != Tokenizer.from_word2id(build_vocabulary(["ab"]))
    assert swapped.fingerprint != Tokenizer.from_word2id(build_vocabulary(["ab"])).fingerprint


@quick
@given(st.lists(any_text))
def test_a_saved_vocabulary_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.json"
    tokenizer = Tokenizer.from_word2id(build_vocabulary(texts))
    tokenizer.save(path)
    assert Tokenizer(path) == tokenizer
    assert Tokenizer(str(path)).word2id == tokenizer.word2id


SPECIALS = {"<pad>": 0, "<unk>": 1, "<sep>": 2}
GOOD = {**SPECIALS, "a": 3, "b": 4}


def write_vocabulary(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "content",
    [
        {"word2id": GOOD},  # older files
        {"word2id": dict(reversed(GOOD.items()))},
        {"word2id": GOOD, "id2word": {str(i): w for w, i in reversed(GOOD.items())}, "note": "more keys"},
        "\ufeff" + json.dumps({"word2id": GOOD}),
    ],
)
def test_liberal_in_what_is_read(tmp_path: Path, content: Any) -> None:
    tokenizer = Tokenizer(write_vocabulary(tmp_path / "vocab.json", content))
    assert tokenizer == Tokenizer.from_word2id(build_vocabulary(["ab"]))
    assert tokenizer.id2word == [*SPECIAL_TOKENS, "a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON: "),
        ('{"word2id": ', "is not JSON: "),
        ("[" * 100_000, "is not JSON: "),
        ('{"word2id": {"<pad>": ' + "9" * 301 + "}}", "a whole number has more than 300 digits"),
        ("[]", "must hold a JSON object: got list; make it with: minigpt vocab"),
        ({"id2word": {"0": "<pad>"}}, "has no object `word2id`"),
        ({"word2id": ["<pad>"]}, "has no object `word2id`"),
        ({"word2id": {}}, "<pad> must have id 0, but is missing"),
        ({"word2id": {"<pad>": 0, "<unk>": 1, "<eos>": 2}}, "<sep> must have id 2, but is missing"),
        ({"word2id": {"<pad>": 1, "<unk>": 0, "<sep>": 2}}, "<pad> must have id 0, but has id 1"),
        ({"word2id": {**SPECIALS, "a": 4}}, "id 3 is missing among 4 entries"),
        ({"word2id": {**SPECIALS, "a": 3, "b": 3}}, "id 3 is given twice, to 'a' and 'b'"),
        ({"word2id": {**SPECIALS, "a": 2}}, "id 2 is given twice"),
        ({"word2id": {**SPECIALS, "a": -1}}, "the id of 'a' is -1, not a whole number of at least 0"),
        ({"word2id": {**SPECIALS, "a": 3.0}}, "the id of 'a' is 3.0, not a whole number"),
        ({"word2id": {**SPECIALS, "a": "3"}}, "the id of 'a' is '3', not a whole number"),
        ({"word2id": {**SPECIALS, "a": True}}, "the id of 'a' is True, not a whole number"),
        ({"word2id": {**SPECIALS, "a": None}}, "the id of 'a' is None, not a whole number"),
        ('{"word2id": {"<pad>": NaN}}', "the id of '<pad>' is nan, not a whole number"),
        ({"word2id": {**SPECIALS, "你好": 3}}, r"entry '你好' \(id 3\) is not one character"),
        ({"word2id": {**SPECIALS, "": 3}}, r"entry '' \(id 3\) is not one character"),
        ({"word2id": {**SPECIALS, "\ud800": 3}}, r"entry '\\ud800' \(id 3\) is not one character"),
        ({"word2id": GOOD, "id2word": {"0": "<pad>"}}, "disagree about id 1: '<unk>' and 'no entry'"),
        (
            {"word2id": GOOD, "id2word": {**{str(i): w for w, i in GOOD.items()}, "4": "c"}},
            "disagree about id 4: 'b' and 'c'",
        ),
        (
            {"word2id": GOOD, "id2word": {**{str(i): w for w, i in GOOD.items()}, "5": "c"}},
            "disagree about id 5: 'no entry' and 'c'",
        ),
        ({"word2id": GOOD, "id2word": None}, "`id2word` is not an object"),
        ({"word2id": GOOD, "id2word": [*GOOD]}, "`id2word` is not an object"),
    ],
)
def test_bad_vocabularies(tmp_path: Path, content: Any, message: str) -> None:
    path = write_vocabulary(tmp_path / "vocab.json", content)
    with pytest.raises(InputError, match=message) as caught:
        Tokenizer(path)
    assert str(path) in str(caught.value)
    assert "make it with: minigpt vocab" in str(caught.value)


def test_no_vocabulary_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"vocab.json is missing; make it with: minigpt vocab"):
        Tokenizer(tmp_path / "vocab.json")
    with pytest.raises(
        InputError,
        match=re.escape(f"{tmp_path} must be a file, and is a directory; make it with: minigpt vocab"),
    ):
        Tokenizer(tmp_path)


def test_a_vocabulary_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "vocab.json"
    path.write_bytes(json.dumps({"word2id": {**SPECIALS, "好": 3}}, ensure_ascii=False).encode("gb18030"))
    with pytest.raises(InputError, match="is not JSON: byte 50 is not UTF-8"):
        Tokenizer(path)


def test_from_word2id_refuses_the_same() -> None:
    with pytest.raises(InputError, match="the vocabulary: id 3 is missing"):
        Tokenizer.from_word2id({**SPECIALS, "a": 4})


def test_the_look_up_is_faster_than_the_loop() -> None:
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "tokenizer_speed.py"))
    result = benchmark["measure"](characters=300_000, repeats=5)
    assert result["ratio"] > 3  # about 20 on an idle machine; both halves run in this process, best of five


def test_a_tokenizer_of_longer_tokens_is_named_with_the_flag_that_takes_it(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(InputError, match=re.escape(f"takes it as --tokenizer {tmp_path}") + "$"):
            Tokenizer(path)
