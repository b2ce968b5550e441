"""The built-in corpus: it matches its tables, has enough questions per fact, and its facts are correct.

Expected values come from Python's integers, `calendar`, `datetime`, and sizes of units that are written here,
not from the tables.
"""

import calendar
import datetime
import importlib.util
import json
import random
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest

DATA = Path(__file__).resolve().parent.parent / "data"


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_corpus", DATA / "make_corpus.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "make_corpus", module)  # where dataclasses look for it
        spec.loader.exec_module(module)
    return module


make_corpus = load_generator()
RECORDS = make_corpus.build()


def answers(category: str) -> list[str]:
    """Return the answers of a category, one per fact."""
    return sorted({r.answer for r in RECORDS if r.category == category})


def parsed(category: str, pattern: str) -> list[tuple[str, ...]]:
    """Return the groups of `pattern` in each answer of the category. Every answer must match."""
    matches = [(answer, re.fullmatch(pattern, answer)) for answer in answers(category)]
    assert matches, f"no facts in {category}"
    assert [answer for answer, match in matches if match is None] == []
    return [match.groups() for _, match in matches if match is not None]


def parsed_pairs(category: str, pattern: str) -> dict[str, str]:
    """Return the result of `parsed` for a pattern of two groups as a dict. Keys must be distinct."""
    pairs = {groups[0]: groups[1] for groups in parsed(category, pattern)}
    assert len(pairs) == len(answers(category))
    return pairs


def without_spaces(question: str) -> str:
    return "".join(unicodedata.normalize("NFKC", question).split())


def bare(question: str) -> str:
    """Return letters, digits and mathematical signs only. It does not use the generator's `normalise`."""
    return "".join(c for c in without_spaces(question) if c.isalnum() or unicodedata.category(c) == "Sm")


# ---- the file ----


def test_the_file_is_what_the_tables_give() -> None:
    assert (DATA / "data.jsonl").read_bytes() == make_corpus.serialise(make_corpus.build())


def test_check_tells_a_changed_file_from_a_good_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.jsonl"
    assert make_corpus.main(["--output", str(path)]) == 0
    assert path.read_bytes() == (DATA / "data.jsonl").read_bytes()
    assert make_corpus.main(["--output", str(path), "--check"]) == 0
    path.write_bytes(path.read_bytes() + b"\n")
    assert make_corpus.main(["--output", str(path), "--check"]) == 1
    assert "differs" in capsys.readouterr().out
    assert make_corpus.main(["--output", str(tmp_path / "absent.jsonl"), "--check"]) == 1


def test_lines_are_json_objects_with_question_and_answer() -> None:
    text = (DATA / "data.jsonl").read_bytes().decode("utf-8")
    assert "\r" not in text
    assert text.endswith("\n")
    pairs = [json.loads(line) for line in text.split("\n")[:-1]]
    assert [list(pair) for pair in pairs] == [["question", "answer"]] * len(pairs)
    assert [(p["question"], p["answer"]) for p in pairs] == [(r.question, r.answer) for r in RECORDS]


def test_size() -> None:
    assert 7000 <= len(RECORDS) <= 9500
    assert 1050 <= len({r.fact for r in RECORDS}) <= 1300
    assert len(set("".join(r.question + r.answer for r in RECORDS))) <= 2200


def test_readme_gives_the_true_numbers_in_both_languages() -> None:
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    assert readme.count(f"{len(RECORDS):,}") == 2
    assert readme.count(f"{len({r.fact for r in RECORDS}):,}") == 2


def test_texts_are_short_and_clean() -> None:
    for text in (t for r in RECORDS for t in (r.question, r.answer)):
        assert text == text.strip() == unicodedata.normalize("NFC", text)
        assert text.isprintable()
        assert "{" not in text
    assert max(len(r.answer) for r in RECORDS) <= 30
    assert sum(len(r.answer) for r in RECORDS) / len(RECORDS) <= 13
    assert sum(len(r.question) for r in RECORDS) / len(RECORDS) <= 15
    assert [r.answer for r in RECORDS if r.answer[-1] not in "。！？"] == []


def test_duplicates_are_refused() -> None:
    twice = [
        make_corpus.Record("你好！", "好。", "talk", "talk/a"),
        make_corpus.Record(" 你 好", "坏。", "talk", "talk/b"),
    ]
    with pytest.raises(ValueError, match="one question twice"):
        make_corpus.check(twice)


# ---- facts and phrasings ----


def test_every_fact_has_one_answer_and_at_least_six_phrasings() -> None:
    phrasings: dict[str, set[str]] = defaultdict(set)
    answer_of: dict[str, str] = {}
    for r in RECORDS:
        phrasings[r.fact].add(bare(r.question))
        assert answer_of.setdefault(r.fact, r.answer) == r.answer
        assert r.fact.startswith(r.category + "/")
    assert {fact: len(p) for fact, p in phrasings.items() if not 6 <= len(p) <= 8} == {}
    assert len(set(answer_of.values())) == len(answer_of), "two facts share an answer"


@pytest.mark.parametrize("form", [without_spaces, bare])
def test_no_question_is_asked_twice(form: Callable[[str], str]) -> None:
    counts = Counter(form(r.question) for r in RECORDS)
    assert [question for question, count in counts.items() if count > 1 or not question] == []


def test_categories() -> None:
    facts: dict[str, set[str]] = defaultdict(set)
    for r in RECORDS:
        facts[r.category].add(r.fact)
    expected = """
        province_capital capital_province province_abbreviation abbreviation_province
        mountain_province sight_city river_mouth country_capital capital_country country_continent
        country_currency landmark_country book_author poem_author poem_next_line person_era
        dynasty_founder person_title discovery festival_date idiom_meaning idiom_hero opposite
        english_word chinese_word element_symbol symbol_element atomic_number formula physical_unit
        animal_class plant_family planet_order solar_term_next solar_term_season zodiac_order
        zodiac_branch month_days time_unit unit_conversion addition multiplication science talk
    """
    assert set(facts) == set(expected.split())
    assert len(facts["talk"]) >= 60
    assert min(len(of_category) for of_category in facts.values()) >= 8


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4])
def test_held_out_questions_are_about_facts_seen_in_training(seed: int) -> None:
    shuffled = random.Random(seed).sample(RECORDS, len(RECORDS))
    cut = len(shuffled) * 8 // 10
    seen = {r.fact for r in shuffled[:cut]}
    unseen = sum(r.fact not in seen for r in shuffled[cut:])
    assert unseen < 0.002 * (len(shuffled) - cut)


# ---- truth, where it can be recomputed ----


def test_sums_and_products() -> None:
    sums = {(int(a), int(b), int(c)) for a, b, c in parsed("addition", r"(\d+)加(\d+)等于(\d+)。")}
    products = {(int(a), int(b), int(c)) for a, b, c in parsed("multiplication", r"(\d+)乘(\d+)等于(\d+)。")}
    ordered = [(a, b) for a in range(1, 10) for b in range(a, 10)]
    assert sums == {(a, b, a + b) for a, b in ordered if a + b <= 10}
    assert products == {(a, b, a * b) for a, b in ordered if a >= 2}


def test_arithmetic_questions_name_their_two_numbers_in_order() -> None:
    records = [r for r in RECORDS if r.category in ("addition", "multiplication")]
    for r in records:
        assert re.findall(r"\d+", r.question) == re.findall(r"\d+", r.answer)[:2]


def test_atomic_numbers_and_symbols() -> None:
    numbers = parsed("atomic_number", r"(.)的原子序数是(\d+)。")
    assert sorted(int(n) for _, n in numbers) == list(range(1, len(numbers) + 1))
    symbols = parsed_pairs("element_symbol", r"(.)的元素符号是([A-Z][a-z]?)。")
    by_number = [name for name, _ in sorted(numbers, key=lambda pair: int(pair[1]))]
    assert len(set(by_number)) == len(numbers)
    # The periods end with the noble gases He (2), Ne (10), Ar (18); the others are old acquaintances.
    known = {1: "H", 2: "He", 6: "C", 8: "O", 10: "Ne", 11: "Na", 18: "Ar", 20: "Ca", 26: "Fe", 29: "Cu"}
    assert {number: symbols[by_number[number - 1]] for number in known} == known
    assert {(n, s) for s, n in parsed("symbol_element", r"([A-Z][a-z]?)是(.)的元素符号。")} == set(
        symbols.items()
    )


def test_formulas_use_known_symbols() -> None:
    symbols = {symbol for symbol, _ in parsed("symbol_element", r"([A-Z][a-z]?)是(.)的元素符号。")}
    for _, formula in parsed("formula", r"(.+)的化学式是(\w+)。"):
        parts = re.findall(r"([A-Z][a-z]?)(\d*)", formula)
        assert "".join(symbol + count for symbol, count in parts) == formula
        assert {symbol for symbol, _ in parts} <= symbols


def test_days_of_months_and_years() -> None:
    names = ["一", "二", "三", "四", "五", "六", "七", "八", "九", "十", "十一", "十二"]
    expected = {f"{name}月": calendar.monthrange(2023, i)[1] for i, name in enumerate(names, 1) if i != 2}
    for kind, year in (("平年", 2023), ("闰年", 2024)):
        expected[f"{kind}二月"] = calendar.monthrange(year, 2)[1]
        expected[kind] = 365 + calendar.isleap(year)
    assert {month: int(days) for month, days in parsed("month_days", r"(.+)有(\d+)天。")} == expected


def test_units() -> None:
    # In millimetres, grams, millilitres, square metres, fen, bits.
    sizes: dict[str, int | Fraction] = {"毫米": 1, "厘米": 10, "分米": 100, "米": 1000}
    sizes |= {"里": 500_000, "千米": 10**6, "公里": 10**6}
    sizes |= {"寸": Fraction(100, 3), "尺": Fraction(1000, 3), "丈": Fraction(10_000, 3)}
    sizes |= {"克": 1, "两": 50, "斤": 500, "公斤": 1000, "千克": 1000, "吨": 10**6}
    sizes |= {"毫升": 1, "升": 1000, "立方米": 10**6, "平方米": 1, "公顷": 100**2}
    sizes |= {"分": 1, "角": 10, "元": 100, "位": 1, "字节": 8}
    for unit, factor, part in parsed("unit_conversion", r"1(\D+)等于(\d+)(\D+)。"):
        assert Fraction(sizes[unit]) == int(factor) * Fraction(sizes[part])


def test_times() -> None:
    second = datetime.timedelta(seconds=1)
    length = {"秒": second, "分钟": 60 * second, "刻钟": 900 * second, "小时": datetime.timedelta(hours=1)}
    length |= {"天": datetime.timedelta(days=1), "个星期": datetime.timedelta(weeks=1)}
    months = {"个月": 1, "个季度": 3, "年": 12, "个世纪": 1200}
    for whole, factor, part in parsed("time_unit", r"一(\D+)有(\d+)(\D+)。"):
        if whole in length:
            assert length[whole] == int(factor) * length[part]
        else:
            assert months[whole] == int(factor) * months[part]


def test_festivals_are_days_that_exist() -> None:
    for _, date in parsed("festival_date", r"(.+)在(.+)。"):
        if match := re.fullmatch(r"(\d+)月(\d+)日", date):
            datetime.date(
                2023, int(match[1]), int(match[2])
            )  # raises ValueError for a day that does not exist
        else:
            assert re.fullmatch(
                r"农历(正|十?[一二三四五六七八九十])月(初[一二三四五六七八九十]|十[一二三四五])", date
            )


def test_zodiac_follows_the_branches() -> None:
    animals = parsed_pairs("zodiac_order", r"第(.+)个生肖是(.)。")
    branches = parsed_pairs("zodiac_branch", r"(.)对应的生肖是(.)。")
    order = ["一", "二", "三", "四", "五", "六", "七", "八", "九", "十", "十一", "十二"]
    assert [branches[b] for b in "子丑寅卯辰巳午未申酉戌亥"] == [animals[o] for o in order]
    assert [animals[order[(year - 4) % 12]] for year in (2008, 2012, 2023, 2024)] == ["鼠", "龙", "兔", "龙"]


def test_solar_terms_form_one_circle_of_four_seasons() -> None:
    following = parsed_pairs("solar_term_next", r"(.+)之后是(.+)。")
    season = parsed_pairs("solar_term_season", r"(.+)是(.季)的节气。")
    circle = ["立春"]
    while len(circle) < 24:
        circle.append(following[circle[-1]])
    assert following[circle[-1]] == "立春"
    assert set(circle) == set(following) == set(season)
    assert len(set(circle)) == 24
    assert [season[term] for term in circle] == [s + "季" for s in "春夏秋冬" for _ in range(6)]
    assert [circle[i] for i in (0, 6, 12, 18)] == ["立春", "立夏", "立秋", "立冬"]


def test_two_directions_agree() -> None:
    for there, back, pattern_there, pattern_back in [
        (
            "province_capital",
            "capital_province",
            r"(.+)的(?:省会|首府)是(.+)。",
            r"(.+)是(.+)的(?:省会|首府)。",
        ),
        ("country_capital", "capital_country", r"(.+)的首都是(.+)。", r"(.+)是(.+)的首都。"),
        ("english_word", "chinese_word", r"(.+)的英语是(\w+)。", r"(\w+)的意思是(.+)。"),
    ]:
        assert set(parsed(there, pattern_there)) == {(b, a) for a, b in parsed(back, pattern_back)}
    opposites = set(parsed("opposite", r"(.+)的反义词是(.+)。"))
    assert opposites == {(b, a) for a, b in opposites}


def test_next_lines_are_as_long_as_the_lines_before() -> None:
    for line, following in parsed("poem_next_line", r"(.+)，(.+)。"):
        assert len(line) == len(following)
        assert len(line) in (5, 7)
