"""Write the built-in corpus `data.jsonl`: Chinese questions and answers, made from the tables in `facts/`.

    python data/make_corpus.py                  write data/data.jsonl
    python data/make_corpus.py --check          exit 1 if data/data.jsonl is not what the tables give
    python data/make_corpus.py --output PATH    write elsewhere

Two kinds of facts go in:

- a table (`facts/<table>.tsv`, one fact a row) with the phrasings of its category (`facts/phrasings.toml`):
  each row is asked in every phrasing, so a model meets each phrasing with many subjects and can answer
  combinations that it has not seen;
- a fact with phrasings of its own (`facts/science.toml`, `facts/talk.toml`): one block is one fact.

The file is a pure function of the tables and of SEED: the same bytes on every machine. Splitting the pairs
and building the vocabulary are not done here: see `minigpt/split_data.py` and `minigpt/build_vocab.py`.
"""

import argparse
import csv
import json
import random
import sys
import tomllib
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

DATA = Path(__file__).resolve().parent
FACTS = DATA / "facts"
SEED = 20240

Row = dict[str, str]


class Record(NamedTuple):
    """One line of the corpus, and the fact behind it: records of one fact share `fact` and `answer`."""

    question: str
    answer: str
    category: str
    fact: str


def read_table(path: Path) -> list[Row]:
    """Rows of a tab-separated table as dictionaries; the first line names the columns."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def arithmetic_tables() -> dict[str, list[Row]]:
    """Sums up to 10, products up to 9 x 9; the smaller number first, as Chinese children learn them."""

    def row(a: int, b: int, result: int) -> Row:
        return {"a": str(a), "b": str(b), "result": str(result)}

    ordered = [(a, b) for a in range(1, 10) for b in range(a, 10)]
    return {
        "additions": [row(a, b, a + b) for a, b in ordered if a + b <= 10],
        "multiplications": [row(a, b, a * b) for a, b in ordered if a > 1],
    }


def table_records() -> Iterator[Record]:
    """Every row of every table in every phrasing of its category."""
    computed = arithmetic_tables()
    phrasings = tomllib.loads((FACTS / "phrasings.toml").read_text(encoding="utf-8"))
    for category, block in phrasings.items():
        templates = [block["answer"], *block["questions"]]
        for row in computed.get(block["table"]) or read_table(FACTS / f"{block['table']}.tsv"):
            # An empty cell says that the fact does not exist, is disputed or changes: leave it out.
            if any(value == "" and f"{{{column}}}" in "".join(templates) for column, value in row.items()):
                continue
            answer, *questions = (template.format(**row) for template in templates)
            for question in questions:
                yield Record(question, answer, category, f"{category}/{answer}")


def block_records() -> Iterator[Record]:
    """Facts that have phrasings of their own."""
    for category in ("science", "talk"):
        for name, block in tomllib.loads((FACTS / f"{category}.toml").read_text(encoding="utf-8")).items():
            for question in block["questions"]:
                yield Record(question, block["answer"], category, f"{category}/{name}")


def normalise(question: str) -> str:
    """The question as a careless reader sees it: NFKC, no white space, no punctuation."""
    text = unicodedata.normalize("NFKC", question)
    return "".join(c for c in text if not c.isspace() and unicodedata.category(c)[0] != "P")


def check(records: list[Record]) -> None:
    """Raise ValueError where two lines ask the same thing or a template was not filled in."""
    first: dict[str, Record] = {}
    for record in records:
        other = first.setdefault(normalise(record.question), record)
        if other is not record:
            raise ValueError(
                f"one question twice: {record.question!r} in {record.fact!r} and in {other.fact!r}"
            )
        if "{" in record.question + record.answer or "\n" in record.question + record.answer:
            raise ValueError(
                f"a placeholder or a line break was left in {record.question!r}, {record.answer!r}"
            )


def build() -> list[Record]:
    """All records in the order of the file."""
    records = [*table_records(), *block_records()]
    check(records)
    random.Random(SEED).shuffle(records)
    return records


def serialise(records: list[Record]) -> bytes:
    """The bytes of data.jsonl: one JSON object a line, UTF-8, "\\n" at each line's end."""
    lines = (json.dumps({"question": r.question, "answer": r.answer}, ensure_ascii=False) for r in records)
    return "".join(line + "\n" for line in lines).encode("utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write the built-in corpus from the tables in data/facts.")
    parser.add_argument(
        "--output", type=Path, default=DATA / "data.jsonl", help="the file to write, or to check"
    )
    parser.add_argument(
        "--check", action="store_true", help="compare instead of writing; exit 1 on a difference"
    )
    options = parser.parse_args(arguments)

    records = build()
    content = serialise(records)
    if options.check:
        same = options.output.is_file() and options.output.read_bytes() == content
        verdict = "up to date" if same else "differs from the tables; run make_corpus.py again"
        print(f"{options.output}: {verdict}")
        return 0 if same else 1
    options.output.write_bytes(content)
    print(f"{options.output}: {len(records)} pairs, {len({r.fact for r in records})} facts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
