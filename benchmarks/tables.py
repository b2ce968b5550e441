"""Writes the tables of the pages in PAGES and their translations: no digit is typed.

    python benchmarks/tables.py            # writes both pages
    python benchmarks/tables.py --check    # changes nothing; exit code 1 if a page is out of date

A table is between `<!-- NAME -->` and `<!-- end -->`. For each benchmark (and shape), the newest result is
used that is not of toy size, by date and then by file name. Without a result the table says "not yet
measured".
"""

import sys
from pathlib import Path

# run as a script: import minigpt from this checkout, and the other files of this folder
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import re
from collections.abc import Callable
from typing import Any

from benchmarks.table_words import CHINESE

ROOT = Path(__file__).resolve().parents[1]
_PAGES = ("performance", "doctor", "evaluation", "fine_tuning", "lens", "masked_lm", "reliability")
PAGES = {
    "en": [ROOT / "docs" / f"{name}.md" for name in _PAGES],
    "zh": [ROOT / "docs" / f"{name}.zh-CN.md" for name in _PAGES],
}
NOTHING = {"en": "not yet measured", "zh": "尚未测量"}
Table = tuple[list[str], list[list[str]]]


def spread_of(values: dict[str, float] | None, nothing: str = "not reached") -> str:
    """Format a spread: median (least to greatest)."""
    return "{median:g} ({least:g} to {most:g})".format(**values) if values else nothing


def generate(result: dict[str, Any]) -> Table:
    """Table: decoding."""
    rows = [
        [
            row["arm"],
            *("{median:.4g} ({least:.4g} to {most:.4g})".format(**row[k]) for k in ("decode", "prefill")),
        ]
        for row in result["rows"]
    ]
    return ["arm", "tokens/s", "prefill of 512, s"], rows


def native_step(result: dict[str, Any]) -> Table:
    """Table: decoding with the native step and without it."""
    columns, rows = generate(result)
    for row, measured in zip(rows, result["rows"]):
        share = measured.get("share")
        row.insert(2, "{median:.2g} ({least:.2g} to {most:.2g})".format(**share) if share else "")
    columns.insert(2, "of the speed with it")
    return columns, rows


def cold(result: dict[str, Any]) -> Table:
    """Table: time from the start of a process to its first token."""
    names = {
        "first_token": "minigpt generate: first token",
        "torch_and_reading": "import torch, read the weights",
    }
    cell = "{median:.3g} ({least:.3g} to {most:.3g})"
    rows = [
        [text, *(cell.format(**result["cold"][name][moment]) for moment in ("first", "end"))]
        for name, text in names.items()
    ]
    return ["fresh process", "seconds", "to its end"], rows


def context(result: dict[str, Any]) -> Table:
    """Table: time of a token by the number of earlier tokens."""
    columns = ["weights", "ms = ... + ... times S", "R²", "GB/s of the slope", "GB/s of adding up numbers"]
    rows = []
    for row in result["rows"]:
        line = row["fit"]
        cells = [
            f"{line['milliseconds']:.3g} + {line['microseconds'] / 1000:.2g} S",
            f"{line['r_squared']:.3f}",
            f"{line['gigabytes']:.3g}",
            spread_of(row["memory"]),
        ]
        rows.append([row["precision"], *cells])
    return columns, rows


def equality(result: dict[str, Any]) -> Table:
    """Table: two ways that must give the same tokens."""
    rows = [[r["compared"], f"{r['trials']:,}", f"{r['different']:,}"] for r in result["rows"]]
    return ["compared", "trials", "different"], rows


def soak(result: dict[str, Any]) -> Table:
    """Table: the engine over minutes."""
    counts, samples = result["requests"], result["samples"]
    warm = samples[len(samples) // 5 + 1]
    return ["what", "seen"], [
        ["minutes", f"{result['minutes']:g}"],
        ["requests", f"{counts['asked']:,}"],
        ["cancelled", f"{counts['cancelled']:,}"],
        ["compared with alone, different", f"{counts['compared']:,}, {counts['different']:,}"],
        [
            "MiB after the warm-up, at the end",
            f"{warm['rss_kib'] / 1024:.1f}, {samples[-1]['rss_kib'] / 1024:.1f}",
        ],
        ["threads after the warm-up, at the end", f"{warm['threads']}, {samples[-1]['threads']}"],
        ["promises held", f"{sum(result['held'].values())} of {len(result['held'])}"],
    ]


def shakespeare(result: dict[str, Any]) -> Table:
    """Table: time to a loss on Shakespeare."""
    rows = [
        [row["arm"], spread_of(row["seconds_to_target"]), spread_of(row["loss_at_budget"]), "", ""]
        for row in result["summary"]
    ]
    ends = {row["seed"]: row for row in result["rows"] if row["arm"] == "nanoGPT"}  # last row of each seed
    whole = "; ".join(f"{end['seconds']:.0f} s: {end['loss']:.3f}" for end in ends.values())
    for row in rows:
        row[3] = spread_of(result["ratio"], "") if row[0] == "minigpt" else ""
        row[4] = whole if row[0] == "nanoGPT" else ""
    columns = ["arm", "seconds to the target", "loss at the budget", "times as fast", "end of each whole run"]
    return columns, rows


def chinese_qa(result: dict[str, Any]) -> Table:
    """Table: loss after seconds of training."""
    rows = [[row["arm"], f"{row['seconds']:g}", spread_of(row["loss"]), ""] for row in result["summary"]]
    if rows:
        rows[-1][-1] = spread_of(result["ratio"], "not reached")
    return ["arm", "seconds", "loss per answer character", "times as fast"], rows


def arithmetic(result: dict[str, Any]) -> Table:
    """Table: share of sgemm's speed."""
    columns = ["size", "parameters", "T", "GFLOP/s", "of sgemm", "the line is off by"]
    line = result["fit"]
    rows = []
    for r in result["rows"]:
        cells = [r["size"], f"{r['parameters']:,}", f"{r['T']:,}"]
        cells += [spread_of(r["gflops"]), spread_of(r["ratio"])]
        weights = line["per_weight"] * r["multiplying"]
        attention = line["per_attention"] * r["layers_times_width"] * r["T"]
        seconds = line["constant"] + weights + attention
        rows.append([*cells, f"{seconds / r['seconds_per_token']['median'] - 1:+.0%}"])
    rates = f"a = {line['gflops_of_weights']:.0f}, b = {line['gflops_of_attention']:.0f} GFLOP/s"
    constant = f"c = {1e6 * line['constant']:.0f} µs"
    return columns, [*rows, ["c + 6 N / a + 12 LdT / b", constant, "", rates, "", f"<= {line['worst']:.0%}"]]


def arithmetic_in_16_bits(result: dict[str, Any]) -> Table:
    """Table: speed in 16 bits, compared with sgemm and with the same steps in float32."""
    rows = [
        [
            r["size"],
            f"{r['parameters']:,}",
            f"{r['T']:,}",
            *(spread_of(r[key]) for key in ("gflops", "ratio", "times")),
        ]
        for r in result["rows"]
    ]
    return ["size", "parameters", "T", "GFLOP/s", "of sgemm", "times float32"], rows


def memory(result: dict[str, Any]) -> Table:
    """Table: peak memory of training."""
    columns = ["size", "parameters", "MiB at most", "estimate", "error", "import alone, MiB"]
    rows = []
    for r in result["rows"]:
        cells = [
            spread_of(r["peak"]),
            f"{r['estimate']:,}",
            f"{r['error']:+.1%}",
            f"{r['import']['median']:g}",
        ]
        rows.append([r["size"], f"{r['parameters']:,}", *cells])
    return columns, rows


def fine_tuning(result: dict[str, Any]) -> Table:
    """Table: fine-tuning compared with transformers."""
    columns = ["arm", "seconds an epoch", "last loss", "seconds to transformers' loss", "seeds that reach it"]
    columns.append("times as fast")
    rows = []
    for row in result["summary"]:
        cells = [spread_of(row[key]) for key in ("seconds_an_epoch", "last_loss", "seconds_to_equal")]
        cells.append(f"{row['reached']} / {len(result['seeds'])}")
        rows.append([row["arm"], *cells, spread_of(result["ratio"].get(row["arm"]), "")])
    return columns, rows


def gpu_speed(result: dict[str, Any]) -> Table:
    """Table: training speed on one GPU."""
    rows = [[r["arm"], spread_of(r["tokens_per_second"]), spread_of(r["mfu"], "")] for r in result["speed"]]
    return ["arm", "tokens/s", "MFU"], rows


def gpu_loss(result: dict[str, Any]) -> Table:
    """Table: time to a loss on one GPU."""
    rows = [
        [r["arm"], spread_of(r["seconds_to_target"]), spread_of(r["last_loss"])]
        for r in result["loss"]["summary"]
    ]
    return ["arm", "seconds to the target", "last loss"], rows


def gpu_scaling(result: dict[str, Any]) -> Table:
    """Table: training on several GPUs."""
    rows = [
        [str(r["devices"]), spread_of(r["tokens_per_second"]), f"{r['share_of_ideal']:.1%}"]
        for r in result["scaling"]
    ]
    return ["GPUs", "tokens/s", "of n times one"], rows


def _by_case(result: dict[str, Any], is_healthy: bool) -> dict[str, list[dict[str, Any]]]:
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["is_healthy"] == is_healthy:
            cases.setdefault(row["words"], []).append(row)
    return cases


def _counted(rows: list[dict[str, Any]], held_out: bool, right: bool = True) -> str:
    some = [row["right"] == right for row in rows if row["held_out"] == held_out]
    return f"{sum(some)} / {len(some)}"


def doctor_faults(result: dict[str, Any]) -> Table:
    """Table: the doctor's first finding for each fault, and the loss after its advice."""
    columns = ["planted", "named first", "right", "right, held out", "the advice followed: validation loss"]
    rows = []
    for words, runs in _by_case(result, is_healthy=False).items():
        named = ", ".join(dict.fromkeys(f"`{row['named'] or 'nothing'}`" for row in runs))
        followed: dict[str, Any] = next((row["followed"] for row in runs if row.get("followed")), {})
        losses = ["NaN" if loss is None else f"{loss:.3g}" for loss in followed.get("loss", ())]
        counts = [_counted(runs, held_out) for held_out in (False, True)]
        rows.append([words, named, *counts, " → ".join(losses)])
    every = [row for row in result["rows"] if not row["is_healthy"]]
    rows.append(["all", "", *(_counted(every, held_out) for held_out in (False, True)), ""])
    return columns, rows


def doctor_healthy(result: dict[str, Any]) -> Table:
    """Table: the number of healthy runs of which the doctor warns."""
    rows = [
        [words, *(_counted(runs, held_out, right=False) for held_out in (False, True))]
        for words, runs in _by_case(result, is_healthy=True).items()
    ]
    every = [row for row in result["rows"] if row["is_healthy"]]
    rows.append(["all", *(_counted(every, held_out, right=False) for held_out in (False, True))])
    return ["healthy run", "warned of", "warned of, held out"], rows


def peft_speed(result: dict[str, Any]) -> Table:
    """Table: fine-tuning beside PEFT and transformers' Trainer."""
    columns = ["arm", "tokens/s", "pairs/s", "MiB", "padding", "times as fast", "of the memory"]
    rows = []
    for row in result["rows"]:
        ratios = (
            [f"{row['ratio']['median']:.2f}", f"{row['memory_ratio']:.2f}"] if "ratio" in row else ["", ""]
        )
        speeds = [f"{row[name]['median']:.4g}" for name in ("tokens_per_second", "pairs_per_second")]
        size = [f"{row['mib']:,.0f}", f"{row['padding']:.0%}"]
        rows.append([f"{row['method']}, {row['arm']}", *speeds, *size, *ratios])
    return columns, rows


def scoring(result: dict[str, Any]) -> Table:
    """Table: tasks scored beside lm-evaluation-harness's hf model."""
    rows = [
        [
            row["set"],
            row["arm"],
            f"{row['questions_per_second']:.3g}",
            f"{row['ratio']:.1f}",
            f"{row['largest_difference']:.0e}" if row["largest_difference"] else "",
            f"{row['other_choices']}" if row["other_choices"] else "",
        ]
        for row in result["rows"]
    ]
    return ["set", "arm", "questions/s", "times hf", "largest difference", "other choices"], rows


def fuzz(result: dict[str, Any]) -> Table:
    """Table: damaged and hostile input, by reader."""
    accepted = ("refused", "same", "other")
    rows, sums = [], [0, 0, 0, 0, 0]
    for row in result["readers"]:
        counts = row["counts"]
        numbers = [sum(counts.values()), *(counts.get(name, 0) for name in accepted)]
        numbers.append(numbers[0] - sum(numbers[1:]))
        sums = [a + b for a, b in zip(sums, numbers)]
        rows.append([row["words"], *(f"{number:,}" for number in numbers)])
    rows.append(["all", *(f"{number:,}" for number in sums)])
    return ["what is read", "inputs", *accepted, "faults"], rows


def checking(result: dict[str, Any]) -> Table:
    """Table: what the checks of a folder cost."""
    rows = [
        [name, f"{row['with_checks']:.2f}", f"{row['without']:.2f}", f"{row['share']:+.1%}"]
        for name, row in result["rows"].items()
        if "share" in row
    ]
    return ["what", "seconds with checks", "without", "median difference"], rows


def look(result: dict[str, Any]) -> Table:
    """Table: how long each look takes."""
    rows = [
        [
            f"`{row['command'].removeprefix('minigpt ').replace('|', '/')}`",
            *(f"{row['seconds']:.1f}", f"{row['processor_seconds']:.1f}", f"{row['mib']:.0f}"),
        ]
        for row in result["rows"]
    ]
    return ["minigpt ...", "seconds", "processor seconds", "MiB at most"], rows


def masked_training(result: dict[str, Any]) -> Table:
    """Table: the same model on the same text, both ways."""
    columns = ["arm", "tokens read", "with a loss", "processor seconds", "held-out loss", "accuracy"]
    rows = [
        [
            *(row["arm"], f"{row['tokens']:,}", f"{row['positions']:,}", f"{row['seconds']:.0f}"),
            *(f"{row['loss']:.2f}", f"{row['accuracy']:.1%}"),
        ]
        for row in result["training"]
    ]
    return columns, rows


def masked_one(result: dict[str, Any]) -> Table:
    """Table: one hidden character."""
    pairs = zip(result["one gap"], result["equal time"]["one gap"])
    rows = [
        [one["how"], f"{one['right']:.1%}", f"{other['right']:.1%}", f"{one['milliseconds']:.1f}"]
        for one, other in pairs
    ]
    return ["arm", "right", "right, equal time", "processor ms"], rows


def masked_two(result: dict[str, Any]) -> Table:
    """Table: two neighbouring hidden characters."""
    found = result["equal time"]["two gaps"]
    rows = [[one["how"], f"{one['right']:.1%}", f"{one['nats']:.2f}"] for one in found]
    return ["arm", "both right", "nats for both"], rows


def masked_span(result: dict[str, Any]) -> Table:
    """Table: hidden characters in a row."""
    found = result["equal time"]["span"]
    rows = [
        [one["how"], f"{one['right']:.1%}", f"{one['known_pairs']:.1%}", f"{one['milliseconds']:.1f}"]
        for one in found
    ]
    return ["arm", "right", "pairs that the text has", "processor ms"], rows


# name in the pages -> (benchmark, values that its result must have, function that makes the table)
TABLES: dict[str, tuple[str, dict[str, Any], Callable[[dict[str, Any]], Table]]] = {
    "generate-char": ("generate", {"shape": "char"}, generate),
    "generate-gpt2": ("generate", {"shape": "gpt2"}, generate),
    "native-step": ("native_step", {"shape": "gpt2"}, native_step),
    "cold": ("generate", {"shape": "gpt2", "cold": ...}, cold),
    "generate-qwen3": ("generate", {"shape": "qwen3"}, generate),
    "context": ("context", {}, context),
    "equality": ("equality", {"rows": ...}, equality),
    "soak": ("soak", {"held": ...}, soak),
    "shakespeare": ("shakespeare", {"summary": ...}, shakespeare),
    "chinese_qa": ("chinese_qa", {"summary": ...}, chinese_qa),
    "arithmetic": ("arithmetic", {"precision": "float32"}, arithmetic),
    "arithmetic-bfloat16": ("arithmetic", {"precision": "bfloat16"}, arithmetic_in_16_bits),
    "memory": ("memory", {"optimizer": "adamw"}, memory),
    "fine_tuning": ("fine_tuning", {"summary": ...}, fine_tuning),
    "gpu-speed": ("training_gpu", {"speed": ...}, gpu_speed),
    "gpu-loss": ("training_gpu", {"loss": ...}, gpu_loss),
    "gpu-scaling": ("training_gpu", {"scaling": ...}, gpu_scaling),
    "doctor-faults": ("doctor", {"small": False}, doctor_faults),
    "doctor-healthy": ("doctor", {"small": False}, doctor_healthy),
    "scoring": ("evaluation", {}, scoring),
    "peft-speed": ("peft_speed", {"shape": "gpt2"}, peft_speed),
    "look": ("look", {}, look),
    "masked-training": ("masked_lm", {}, masked_training),
    "masked-one": ("masked_lm", {}, masked_one),
    "masked-two": ("masked_lm", {}, masked_two),
    "masked-span": ("masked_lm", {}, masked_span),
    "fuzz": ("fuzz", {}, fuzz),
    "checking": ("fuzz-cost", {}, checking),
}


def newest(folder: Path, benchmark: str, wanted: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Return the name of the newest result file, and its content."""
    found = []
    for path in folder.glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        fits = all(key in result and value in (..., result[key]) for key, value in wanted.items())
        if fits and result.get("benchmark") == benchmark and not result.get("toy"):
            found.append((result["date"], path.name, result))
    return max(found, key=lambda one: one[:2])[1:] if found else None


def rendered(name: str, language: str, folder: Path) -> str:
    """Return a table as Markdown, with the source of its numbers below."""
    benchmark, wanted, show = TABLES[name]
    found = newest(folder, benchmark, wanted)
    if found is None:
        return NOTHING[language]
    file, result = found
    columns, rows = show(result)

    chinese = {**CHINESE, **result.get("chinese", {})}

    def text(cell: str) -> str:
        return cell if language == "en" else chinese.get(cell, cell.replace(" to ", " 至 "))

    lines = [columns, ["---"] * len(columns), *rows]
    table = "\n".join("| " + " | ".join(map(text, line)) + " |" for line in lines)
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    device = f"{result['device']}; " if "device" in result else ""
    left_out = "; ".join(result.get("left_out", ()))
    threads, dot = ("threads", ".") if language == "en" else ("线程", "。")
    where = f"{device}{result['machine']}, {result['threads']} {threads}, {versions}, {result['date']}"
    missing = f"; {left_out}" if left_out else ""
    return f"{table}\n\n{where}{missing}: `benchmarks/results/{file}`{dot}"


def page(text: str, language: str, folder: Path) -> str:
    """Return the text of a page with new tables.

    Raises:
        SystemExit: for an unknown table name.
    """

    def written(match: re.Match[str]) -> str:
        if match[1] not in TABLES:
            raise SystemExit(f"there is no table {match[1]!r}; there are {', '.join(TABLES)}")
        return f"<!-- {match[1]} -->\n\n{rendered(match[1], language, folder)}\n\n<!-- end -->"

    return re.sub(r"<!-- ([\w-]+) -->\n(?:(?!<!--)[\s\S])*<!-- end -->", written, text)


def main() -> None:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; say which page is out of date")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    stale = False
    for language, path in ((language, path) for language, paths in PAGES.items() for path in paths):
        before = path.read_text(encoding="utf-8")
        after = page(before, language, options.results)
        if after != before:
            stale = True
            print(f"{path.name}: {'is out of date' if options.check else 'written anew'}")
            if not options.check:
                path.write_text(after, encoding="utf-8")
    sys.exit(1 if stale and options.check else 0)


if __name__ == "__main__":
    main()
