"""The split is a partition without leaks, repeatable to the byte, and as close to the ratio as possible."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.data.conversation import Conversation, Turn, conversation_of_pair
from minigpt.data.reader import read_conversations
from minigpt.data.split import NORMALISATION, Split, normalise, split_conversations, write_split
from minigpt.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the test data beside the project are not there"
)
quick = settings(derandomize=True, deadline=None, max_examples=100)


def make_pairs(items: list[tuple[str, str]]) -> list[Conversation]:
    return [
        conversation_of_pair(q, a, line, json.dumps({"question": q, "answer": a}, ensure_ascii=False))
        for line, (q, a) in enumerate(items, 1)
    ]


def one_each(count: int) -> list[Conversation]:
    return make_pairs([(f"question {i}", "a") for i in range(count)])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("你好，最近怎么样？", "你好,最近怎么样?"),
        ("ＧＰＴ－２", "gpt-2"),
        ("你好 吗", "　你好吗\n"),
        ("STRASSE", "straße"),
        ("é", "e\u0301"),
        ("①", "1"),
        ("ﾊﾟ", "パ"),
        ("你\u200b好", "你好"),
        ("❤\ufe0f", "❤"),
    ],
)
def test_what_counts_as_one_question(one: str, other: str) -> None:
    assert normalise(one) == normalise(other)


def test_what_does_not() -> None:
    different = ["你好吗？", "你好吗", "您好吗？", "1", "一", "e", "é", "a b?", "ab"]
    assert len({normalise(q) for q in different}) == len(different)


# few different questions and answers, so that they repeat
questions = st.sampled_from(["你好", "你 好", "ａ", "A", "a", "b", "c", "d？", "d?", "e"]) | st.text(
    max_size=3
)
items = st.lists(st.tuples(questions, st.sampled_from(["x", "y", "z"])), min_size=1, max_size=40)


@quick
@given(items, st.floats(0.05, 0.95), st.integers(0, 5))
def test_a_partition_without_leaks(items: list[tuple[str, str]], ratio: float, seed: int) -> None:
    pairs = make_pairs(items)
    try:
        split = split_conversations(pairs, ratio, seed)
    except InputError:
        sizes = group_sizes(pairs)
        best = closest(sizes, ratio)
        assert best & {0, sum(sizes)}  # refused for a good reason only
        return
    dropped = [pair for pair, _ in split.dropped]
    assert sorted(split.train + split.val + dropped, key=lambda pair: pair.line) == pairs
    assert not {normalise(p.question) for p in split.train} & {normalise(p.question) for p in split.val}
    for side in (split.train, split.val):
        assert side
        assert [pair.line for pair in side] == sorted(pair.line for pair in side)
    kept = [(normalise(p.question), p.answer) for p in split.train + split.val]
    assert len(kept) == len(set(kept))
    for pair, first in split.dropped:
        assert (normalise(pair.question), pair.answer) == (normalise(first.question), first.answer)
        assert first.line < pair.line
        assert first in split.train + split.val
    assert split.questions == len({question for question, _ in kept})


def group_sizes(pairs: list[Conversation]) -> list[int]:
    distinct = {(normalise(pair.question), pair.answer) for pair in pairs}
    return list(Counter(question for question, _ in distinct).values())


def closest(sizes: list[int], ratio: float) -> set[int]:
    """Return the sums of groups that are closest to the ratio, by trying all sums."""
    sums = {0}
    for size in sizes:
        sums |= {total + size for total in sums}
    target = ratio * sum(sizes)
    distance = min(abs(total - target) for total in sums)
    return {total for total in sums if abs(total - target) == distance}


@quick
@given(st.lists(st.integers(1, 12), min_size=2, max_size=14), st.floats(0.05, 0.95))
def test_the_ratio_is_met_as_closely_as_whole_groups_allow(sizes: list[int], ratio: float) -> None:
    pairs = make_pairs(
        [(f"question {i}", f"answer {j}") for i, size in enumerate(sizes) for j in range(size)]
    )
    best = closest(sizes, ratio)
    try:
        split = split_conversations(pairs, ratio)
    except InputError:
        assert best & {0, sum(sizes)}
        return
    assert len(split.train) in best


@pytest.mark.parametrize(
    ("count", "ratio"), [(10, 0.8), (11, 0.8), (3, 0.8), (2, 0.5), (999, 0.9), (5000, 0.123)]
)
def test_single_questions_meet_the_ratio_to_the_pair(count: int, ratio: float) -> None:
    split = split_conversations(one_each(count), ratio)
    assert abs(len(split.train) - ratio * count) <= 0.5
    assert len(split.train) + len(split.val) == count


def test_large_groups_among_many_questions() -> None:
    sizes = [1] * 3000 + [7] * 200 + [400]
    pairs = make_pairs([(f"q{i}", f"a{j}") for i, size in enumerate(sizes) for j in range(size)])
    for seed in range(5):
        split = split_conversations(pairs, 0.9, seed)
        assert abs(len(split.train) - 0.9 * len(pairs)) <= 0.5
        assert len(split.grouped) == 201


def test_groups_of_two_alone() -> None:
    pairs = make_pairs([(f"q{i}", a) for i in range(1000) for a in "xy"])
    assert len(split_conversations(pairs, 0.8001).train) == 1600  # 1600.2 is not to be had


def test_mostly_duplicates() -> None:
    pairs = make_pairs([(f"question {i % 38}", "a") for i in range(100)])  # 62 % repeat an earlier pair
    split = split_conversations(pairs, 0.8)
    assert (len(split.train), len(split.val), len(split.dropped)) == (30, 8, 62)
    assert [pair.line for pair, _ in split.dropped] == list(range(39, 101))
    assert [first.line for _, first in split.dropped][:3] == [1, 2, 3]
    assert split.grouped == []


def test_several_answers_stay_together() -> None:
    pairs = make_pairs(
        [("你好？", "a"), ("你好?", "b"), ("你好 ？", "a"), *[(f"q{i}", "a") for i in range(8)]]
    )
    split = split_conversations(pairs, 0.8)
    assert split.dropped == [(pairs[2], pairs[0])]
    assert split.grouped == [[pairs[0], pairs[1]]]
    assert (pairs[0] in split.train) == (pairs[1] in split.train)
    assert split.as_dict() == {
        "train": 8,
        "val": 2,
        "train_share": 0.8,
        "train_answers": 8,
        "val_answers": 2,
        "questions": 9,
        "questions_with_several_answers": 1,
        "pairs_of_these": 2,
        "dropped_duplicates": 1,
        "exchanges_on_both_sides": 0,
    }


@quick
@given(items, st.integers(0, 3), st.randoms(use_true_random=False))
def test_the_order_of_lines_decides_nothing(items: list[tuple[str, str]], seed: int, random: Any) -> None:
    def train_side(pairs: list[Conversation]) -> set[str] | None:
        try:
            return {normalise(pair.question) for pair in split_conversations(pairs, 0.5, seed).train}
        except InputError:
            return None

    shuffled = list(items)
    random.shuffle(shuffled)
    assert train_side(make_pairs(items)) == train_side(make_pairs(shuffled))


def test_seeds_differ_and_repeat() -> None:
    pairs = one_each(200)
    splits = [split_conversations(pairs, 0.8, seed) for seed in (1, 2, 1)]
    assert splits[0] == splits[2]
    assert splits[0].train != splits[1].train
    # The part of a question does not depend on its position: about 20 % of the first half are in val.
    in_val = [
        sum(pair.line <= 100 for pair in split_conversations(pairs, 0.8, seed).val) for seed in range(50)
    ]
    # mean 20, standard deviation of a mean of 50 hypergeometric draws: 0.4; five of them
    assert abs(sum(in_val) / 50 - 20) < 2


def test_a_known_split() -> None:
    """The rank is SHA-256 of seed and question, computed here again. All machines must split equally."""
    pairs = one_each(10)
    ranked = sorted(
        pairs, key=lambda p: hashlib.sha256(f"7\n{p.question.replace(' ', '')}".encode()).digest()
    )
    assert {pair.line for pair in split_conversations(pairs, 0.8, 7).train} == {
        pair.line for pair in ranked[:8]
    }


@pytest.mark.parametrize("ratio", [0, 1, -1, 1.5, float("nan"), float("inf"), -0.0])
def test_ratios_that_are_none(ratio: float) -> None:
    with pytest.raises(InputError, match="--train_ratio must lie between 0 and 1, both excluded: got"):
        split_conversations(one_each(10), ratio)


@pytest.mark.parametrize(
    ("pairs", "ratio", "side"),
    [
        (one_each(1), 0.5, "empty"),
        (one_each(2), 0.9, "val.jsonl"),
        (one_each(10), 0.01, "train.jsonl"),
        (make_pairs([("q", a) for a in "abcdefgh"]), 0.8, "val.jsonl"),
    ],
)
def test_an_empty_side_is_refused(pairs: list[Conversation], ratio: float, side: str) -> None:
    with pytest.raises(InputError, match=rf"--train_ratio {ratio} of \d+ pairs with \d+ .*{side}.*choose"):
        split_conversations(pairs, ratio)


def test_a_tie_leaves_no_side_empty() -> None:
    assert len(split_conversations(one_each(5), 0.9).train) == 4  # 4.5: 5 would be as close
    assert len(split_conversations(one_each(5), 0.1).train) == 1


# Files


def write_input(folder: Path, lines: list[str], end: str = "\n") -> Path:
    path = folder / "data.jsonl"
    path.write_bytes(end.join([*lines, ""]).encode())
    return path


def run_split(path: Path, folder: Path, ratio: float = 0.5) -> tuple[Split, dict[str, Any]]:
    pairs, report = read_conversations(path)
    split = split_conversations(pairs, ratio)
    return split, write_split(split, report, folder, train_ratio=ratio, seed=42)


def odd_lines() -> list[str]:
    return [
        '{"answer":"b" ,"question" :  "a\\u4f60"}',
        '  {"question": "n\u2028", "answer": "1\u2028", "x": [1.0, 1e5]}',
        '{"question": "𠮷", "answer": "\\ud83d\\ude0a"} ',
        '{"question": "c", "answer": "d"}',
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_are_kept_byte_for_byte(tmp_path: Path, end: str) -> None:
    lines = odd_lines()
    run_split(write_input(tmp_path, lines, end), tmp_path)
    written = [(tmp_path / name).read_bytes().split(b"\n") for name in ("train.jsonl", "val.jsonl")]
    assert all(side.pop() == b"" for side in written)
    assert sorted(itertools.chain(*written)) == sorted(line.encode() for line in lines)
    assert len(written[0]) == len(written[1]) == 2


def test_the_manifest_tells_what_was_done(tmp_path: Path) -> None:
    path = write_input(tmp_path, [*odd_lines(), "{}", odd_lines()[0]])
    split, manifest = run_split(path, tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert json.loads((folder / "split.json").read_text(encoding="utf-8")) == manifest
    assert manifest["input"]["name"] == "data.jsonl"
    assert manifest["input"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert manifest["input"]["skipped"] == 1
    assert (manifest["seed"], manifest["train_ratio"]) == (42, 0.5)
    assert manifest["normalisation"]["version"] == NORMALISATION == 1
    assert manifest["result"] == split.as_dict()
    for name in ("train.jsonl", "val.jsonl"):
        content = (folder / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        assert manifest["files"][name] == {"size": len(content), "sha256": digest}
    assert sorted(entry.name for entry in folder.iterdir()) == ["split.json", "train.jsonl", "val.jsonl"]


def test_the_input_is_never_overwritten(tmp_path: Path) -> None:
    path = write_input(tmp_path, odd_lines()).rename(tmp_path / "train.jsonl")
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"train.jsonl is the input and would be overwritten"):
        run_split(path, tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["train.jsonl"]
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    with pytest.raises(InputError, match="would be overwritten"):
        run_split(link, tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    path = write_input(tmp_path, odd_lines())
    run_split(path, tmp_path)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    calls = itertools.count(1)

    def fsync(descriptor: int) -> None:
        if next(calls) >= failing:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    write_input(tmp_path, [*odd_lines(), '{"question": "new", "answer": "new"}'])
    before["data.jsonl"] = path.read_bytes()
    with pytest.raises((InputError, OSError), match="No space left on device"):
        run_split(path, tmp_path)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_pythons_hash_seed_decides_nothing(tmp_path: Path) -> None:
    path = write_input(tmp_path, [pair.raw for pair in one_each(60)] + odd_lines())
    results = []
    for seed in ("0", "1"):
        command = [sys.executable, str(ROOT / "minigpt" / "split_data.py"), "--input", str(path)]
        command += ["--output_dir", str(tmp_path / seed)]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": seed})
        results.append({entry.name: entry.read_bytes() for entry in (tmp_path / seed).iterdir()})
    assert results[0] == results[1]
    assert len(results[0]) == 3


@needs_shared
@pytest.mark.parametrize(("name", "dropped"), [("baike_dialogue", 0), ("kdconv", 12)])
def test_real_files(tmp_path: Path, name: str, dropped: int) -> None:
    path = SHARED / name / "qa.jsonl"
    pairs, report = read_conversations(path)
    split = split_conversations(pairs, 0.8)
    write_split(split, report, tmp_path, train_ratio=0.8, seed=42)
    # An independent count of repeated pairs: equal texts apart from white space.
    folded = Counter(("".join(normalise(p.question).split()), p.answer) for p in pairs)
    assert len(split.dropped) == sum(count - 1 for count in folded.values()) == dropped
    kept = len(pairs) - dropped
    assert abs(len(split.train) - 0.8 * kept) <= 0.5
    assert not {normalise(p.question) for p in split.train} & {normalise(p.question) for p in split.val}
    original = set(path.read_bytes().split(b"\n"))
    for side in ("train.jsonl", "val.jsonl"):
        assert set((tmp_path / side).read_bytes().split(b"\n")) <= original


# -- conversations -------------------------------------------------------------------------------------------


def talk(line: int, *exchanges: tuple[str, str]) -> Conversation:
    turns = [
        turn for question, answer in exchanges for turn in (Turn("user", question), Turn("assistant", answer))
    ]
    return Conversation(tuple(turns), line)


def test_conversations_that_share_a_question_and_its_answer_stay_together() -> None:
    """There are twenty subjects, each in two conversations with different beginnings."""
    talks = [
        talk(2 * i + k, (f"开场{i}{k}", "嗯"), (f"什么是{i}？", f"是{i}。"))
        for i in range(20)
        for k in range(2)
    ]
    for seed in range(5):
        split = split_conversations(talks, 0.8, seed)
        assert (len(split.train), len(split.val)) == (32, 8)
        assert split.on_both_sides == []
        subjects = [{each.question for each in side} for side in (split.train, split.val)]
        assert not subjects[0] & subjects[1]


def test_a_greeting_that_all_share_does_not_join_them_and_is_counted() -> None:
    talks = [talk(i, ("你好", "你好！"), (f"什么是{i // 2}？", "x"), (f"{i}", "y")) for i in range(40)]
    split = split_conversations(talks, 0.8)
    assert (len(split.train), len(split.val)) == (32, 8)
    assert split.on_both_sides == [(("你好", "你好！"), 8)]
    assert split.as_dict()["exchanges_on_both_sides"] == 1
    assert split.as_dict()["val_answers"] == 24


def test_equal_conversations_are_dropped_and_pairs_among_them_count_as_pairs() -> None:
    talks = [*(talk(i, ("甲", "乙"), (f"{i % 9}", "丙")) for i in range(18)), talk(18, ("甲", "乙"))]
    split = split_conversations(talks, 0.5)
    assert [(a.line, b.line) for a, b in split.dropped] == [(i, i - 9) for i in range(9, 18)]
    assert split.questions == 1  # the one pair's
