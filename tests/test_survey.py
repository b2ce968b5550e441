"""Statistics of data: numbers compared with a slow count, the terminal's tables, and the picture."""

import importlib.util
import json
import math
import random
import struct
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.console import fonts
from minigpt.data import token_statistics
from minigpt.data.conversation import Conversation, conversation_of_pair
from minigpt.data.reader import read_conversations
from minigpt.data.token_statistics import Unknown, compute_statistics, plot, print_statistics
from minigpt.errors import InputError
from minigpt.tokenizer import Tokenizer, build_vocabulary

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the test data beside the project are not there"
)
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib (the extra `plot`) is not installed"
)
quick = settings(derandomize=True, deadline=None, max_examples=50)

TOKENIZER = Tokenizer.from_word2id(build_vocabulary(["abcde你好"]))


def make_pairs(items: list[tuple[str, str]]) -> list[Conversation]:
    return [conversation_of_pair(q, a, 10 * i, "") for i, (q, a) in enumerate(items, 1)]


def test_a_small_file_by_hand() -> None:
    pairs = make_pairs([("ab", "c"), ("你好", "dd"), ("Ａb", "c"), ("ab", "xxy"), ("a" * 62, "b" * 10)])
    statistics = compute_statistics(pairs, TOKENIZER, max_length=5)
    assert statistics.questions.tolist() == [2, 2, 2, 2, 62]
    assert statistics.answers.tolist() == [1, 2, 1, 3, 10]
    assert statistics.pairs.tolist() == [5, 6, 5, 7, 74]
    assert statistics.lengths()["pairs"] == {"mean": 19.4, "p50": 6, "p95": 74, "p99": 74, "max": 74}
    cuts = [(cut.max_length, cut.pairs, cut.without_answer) for cut in statistics.cuts]
    assert cuts == [(5, 3, 1), (64, 1, 0), (128, 0, 0), (256, 0, 0), (512, 0, 0)]
    assert statistics.unknown == [Unknown("x", 2, 40), Unknown("Ａ", 1, 30), Unknown("y", 1, 40)]
    assert statistics.unused == ["e"]
    assert statistics.repeated_pairs == 1  # Ａb is ab
    assert statistics.repeated_questions == 1


@quick
@given(
    st.lists(st.tuples(st.text("abcxy你再", min_size=1), st.text("abcxy你再", min_size=1)), min_size=1),
    st.integers(1, 20),
)
def test_against_a_slow_count(items: list[tuple[str, str]], max_length: int) -> None:
    pairs = make_pairs(items)
    statistics = compute_statistics(pairs, TOKENIZER, max_length)
    encoded = [TOKENIZER.encode(q, a, max_length=10_000, pad_to_max_length=False)[0] for q, a in items]
    assert statistics.pairs.tolist() == [len(ids) for ids in encoded]
    cut = next(cut for cut in statistics.cuts if cut.max_length == max_length)
    assert cut.pairs == sum(len(ids) > max_length for ids in encoded)
    # The answer is lost if its first token (after question and <sep>) does not fit.
    assert cut.without_answer == sum(len(q) + 2 > max_length for q, _ in items)
    text = "".join(q + a for q, a in items)
    assert {u.character: u.count for u in statistics.unknown} == Counter(c for c in text if c in "xy再")
    assert set(statistics.unused) == set("abcde你好") - set(text)
    for name in ("questions", "answers", "pairs"):
        values = sorted(getattr(statistics, name).tolist())
        row = statistics.lengths()[name]
        # The percentile is the smallest length that at least p % of the pairs do not exceed.
        for key, percent in (("p50", 50), ("p95", 95), ("p99", 99)):
            assert row[key] == values[math.ceil(percent * len(values) / 100) - 1]
        assert row["mean"] == pytest.approx(sum(values) / len(values))
        assert row["max"] == values[-1]
    json.dumps(statistics.as_dict(), allow_nan=False)


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    items = [("".join(rng.choices("abxy你", k=5)), "".join(rng.choices("cdz", k=3))) for _ in range(50)]
    whole = compute_statistics(make_pairs(items), TOKENIZER).as_dict()
    monkeypatch.setattr(token_statistics, "_BLOCK", 7)
    assert compute_statistics(make_pairs(items), TOKENIZER).as_dict() == whole


def test_max_length_below_one() -> None:
    with pytest.raises(InputError, match="--max_length must be at least 1: got 0"):
        compute_statistics(make_pairs([("a", "b")]), TOKENIZER, 0)


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    items = [("你好", "ab"), ("你好", "c" * 100), ("a\u2028\x1b[31m", "[bold]ÿ")]
    print_statistics(compute_statistics(make_pairs(items), TOKENIZER, max_length=100))
    out, err = capsys.readouterr()
    assert err == ""
    assert "100 <- yours" in out
    assert "33.33%" in out
    assert "\x1b[31m" not in out
    assert r"\u2028 (U+2028, 1x, first in line 30)" in out
    assert r"\x1b (U+001B, 1x, first in line 30)" in out
    assert "unused characters of the vocabulary: 1 of 7: e\n" in out
    assert "questions that come more than once: 1 " in out
    print_statistics(compute_statistics(make_pairs([("abcde你好", "a")]), TOKENIZER))
    out, _ = capsys.readouterr()
    assert "unknown characters: none" in out
    assert "unused characters of the vocabulary: 0 of 7\n" in out


@quick
@given(st.lists(st.integers(4, 100_000), min_size=1))
def test_every_pair_stands_in_one_bar(lengths: list[int]) -> None:
    labels, counts = token_statistics._bins(np.array(lengths))
    assert sum(counts) == len(lengths)
    assert len(labels) == len(counts) <= 14
    for label, count in zip(labels, counts, strict=True):
        first, _, last = label.partition("-")
        low, high = (int(first), int(last)) if last else (int(label.split()[0]), 10**9)
        assert count == sum(low <= length <= high for length in lengths)


@needs_matplotlib
def test_a_picture_with_chinese_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if fonts.chinese_font() is None:
        pytest.skip("no font with Chinese characters is installed; the extra `plot` brings one")
    path = tmp_path / "stats.png"
    statistics = compute_statistics(make_pairs([("你好", "ab" * i) for i in range(1, 60)]), TOKENIZER)
    plot(statistics, path, title="训练集 $x$ 😊.jsonl")  # a font without emoji must not raise an error
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert (width, height) == (1560, 624)
    assert capsys.readouterr().err == ""


@needs_matplotlib
def test_labels_reach_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An SVG whose texts are kept as text shows which labels were drawn."""
    import matplotlib as mpl

    original = mpl.rc_context
    monkeypatch.setattr(mpl, "rc_context", lambda rc: original({**rc, "svg.fonttype": "none"}))
    statistics = compute_statistics(make_pairs([("你好", "ab"), ("a", "b" * 200)]), TOKENIZER, max_length=40)
    monkeypatch.setattr(fonts, "chinese_font", lambda: "DejaVu Sans")
    plot(statistics, tmp_path / "zh.svg", title="t")
    chinese = (tmp_path / "zh.svg").read_text(encoding="utf-8")
    monkeypatch.setattr(fonts, "chinese_font", lambda: None)
    plot(statistics, tmp_path / "en.svg", title="t")
    english = (tmp_path / "en.svg").read_text(encoding="utf-8")
    for zh, en in (("问题", "questions"), ("回答", "answers"), ("不被截断的比例", "share that is not cut")):
        assert f"{zh} / {en}" in chinese
        assert en in english
        assert zh not in english
    assert "40: 50.0 %" in chinese


@needs_matplotlib
@pytest.mark.parametrize("longest", [1, 30, 90, 700, 5000])
def test_the_last_bar_counts_what_it_says_and_labels_stay_inside(longest: int) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    few = [("a", "b" * n) for n in range(1, 200, 2)]
    pairs = make_pairs([*few, *(("a", "b" * (n * longest // 4)) for n in range(1, 5) if longest > 3)])
    statistics = compute_statistics(pairs, TOKENIZER, max_length=longest + 3)
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    text = {name: english for name, (_, english) in token_statistics._LABELS.items()}
    drawn: list[tuple[Any, Any]] = []
    original = left.hist

    def hist(values: Any, bins: Any, **more: Any) -> Any:
        drawn.append((values, bins))
        return original(values, bins=bins, **more)

    left.hist = hist
    token_statistics._draw_lengths(left, statistics, text)
    token_statistics._draw_cuts(right, statistics, text)
    for name, (values, edges) in zip(("questions", "answers", "pairs"), drawn, strict=True):
        counts = np.histogram(values, edges)[0]
        assert counts.sum() == len(pairs)
        assert counts[-1] == (getattr(statistics, name) >= edges[-2]).sum()
    assert drawn[-1][0].max() >= drawn[-1][1][-2], "the last bar is not empty"
    canvas.draw()
    frame = right.get_window_extent()
    boxes = [label.get_window_extent() for label in right.texts]
    assert boxes
    for box in boxes:
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1


@needs_matplotlib
def test_without_a_font_the_labels_are_english_and_a_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fonts, "_FONT_PACKAGE", "no_such_font_package")
    monkeypatch.setattr(fonts, "_FONT_NAMES", ())
    plot(compute_statistics(make_pairs([("a", "b")]), TOKENIZER), tmp_path / "s.png", title="t")
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "English only" in err
    assert "Noto Sans CJK SC" in err
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


@needs_matplotlib
def test_fonts_are_judged_by_their_characters() -> None:
    import matplotlib as mpl

    assert not fonts._has(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", set("中文"))
    assert not fonts._has(Path("nowhere.ttf"), set("中文"))


@needs_matplotlib
def test_unknown_types_of_picture(tmp_path: Path) -> None:
    statistics = compute_statistics(make_pairs([("a", "b")]), TOKENIZER)
    with pytest.raises(InputError, match=r"stats.bmp3: .bmp3 cannot be written; use .png"):
        plot(statistics, tmp_path / "stats.bmp3", title="t")
    plot(statistics, tmp_path / "stats", title="t")
    assert (tmp_path / "stats").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.util.find_spec

    def find_spec(name: str, *rest: Any) -> Any:
        return None if name == "matplotlib" else original(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    statistics = compute_statistics(make_pairs([("a", "b")]), TOKENIZER)
    with pytest.raises(InputError, match=r"pip install 'minigpt\[plot\]'"):
        plot(statistics, tmp_path / "s.png", title="t")
    assert list(tmp_path.iterdir()) == []


@needs_shared
def test_real_file() -> None:
    pairs, _ = read_conversations(SHARED / "baike_dialogue" / "qa.jsonl")
    tokenizer = Tokenizer(SHARED / "baike_dialogue" / "vocab.json")
    statistics = compute_statistics(pairs, tokenizer)
    lengths = sorted(len(pair.question) + len(pair.answer) + 2 for pair in pairs)
    assert statistics.lengths()["pairs"]["p95"] == lengths[math.ceil(0.95 * len(lengths)) - 1] == 130
    assert statistics.unknown == []
    text = {c for pair in pairs for c in pair.question + pair.answer}
    assert len(statistics.unused) == len(set(tokenizer.id2word[3:]) - text)
