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

ROOT = Path(__file__).resolve().parents[1]
_PAGES = ("performance", "doctor", "evaluation", "fine_tuning", "lens", "masked_lm", "reliability")
PAGES = {
    "en": [ROOT / "docs" / f"{name}.md" for name in _PAGES],
    "zh": [ROOT / "docs" / f"{name}.zh-CN.md" for name in _PAGES],
}
NOTHING = {"en": "not yet measured", "zh": "尚未测量"}
CHINESE = {
    "arm": "程序",
    "tokens/s": "词元/秒",
    "prefill of 512, s": "读入 512 个词元，秒",
    "seconds to the target": "达到目标损失的秒数",
    "loss at the budget": "预算时间后的损失",
    "times as fast": "快几倍",
    "end of each whole run": "各次完整训练结束时",
    "seconds": "秒",
    "loss per answer character": "每个答案字的损失",
    "size": "规模",
    "parameters": "参数",
    "of sgemm": "占 sgemm",
    "times float32": "float32 的几倍",
    "the line is off by": "直线相差",
    "MiB at most": "最多 MiB",
    "estimate": "估计",
    "error": "误差",
    "import alone, MiB": "仅导入，MiB",
    "seconds an epoch": "每轮秒数",
    "last loss": "最后的损失",
    "seconds to transformers' loss": "达到 transformers 最后损失的秒数",
    "seeds that reach it": "达到的种子数",
    "of the speed with it": "是有它时的几倍",
    "minigpt float32 without the native step": "minigpt float32，没有原生步骤",
    "minigpt int8 without the native step": "minigpt int8，没有原生步骤",
    "fresh process": "新进程",
    "to its end": "到进程结束",
    "minigpt generate: first token": "minigpt generate：第一个词元",
    "import torch, read the weights": "import torch，读一遍权重",
    "weights": "权重",
    "ms = ... + ... times S": "毫秒 = …… + …… 乘 S",
    "GB/s of the slope": "斜率，GB/秒",
    "GB/s of adding up numbers": "求和，GB/秒",
    "compared": "比较",
    "trials": "次数",
    "different": "不同",
    "what": "项目",
    "seen": "结果",
    "minutes": "分钟",
    "requests": "请求",
    "cancelled": "中途取消",
    "compared with alone, different": "与单独生成比较，不同",
    "MiB after the warm-up, at the end": "预热后与结束时的 MiB",
    "threads after the warm-up, at the end": "预热后与结束时的线程",
    "promises held": "成立的承诺",
    "GPUs": "GPU 数",
    "of n times one": "占单卡的 n 倍",
    "not reached": "未达到",
    "planted": "植入的问题",
    "named first": "首先指出",
    "right": "正确",
    "right, held out": "正确（留出的种子）",
    "the advice followed: validation loss": "照建议做：验证损失",
    "healthy run": "健康的训练",
    "warned of": "警告",
    "warned of, held out": "警告（留出的种子）",
    "all": "合计",
    "nothing": "无",
    "pairs/s": "对/秒",
    "MiB": "MiB",
    "padding": "填充",
    "of the memory": "占内存",
    "autoregressive": "接着写",
    "masked": "遮住",
    "masked, equal time": "遮住，同样的时间",
    "tokens read": "读过的词元",
    "with a loss": "其中算损失的",
    "processor seconds": "处理器秒",
    "held-out loss": "留出文字的损失",
    "accuracy": "准确率",
    "right, equal time": "正确（同样的时间）",
    "both right": "两个都对",
    "nats for both": "两个的损失",
    "processor ms": "处理器毫秒",
    "pairs that the text has": "文字里有的字对",
    "masked: one pass": "遮住：看一遍",
    "masked: 1 pass": "遮住：一遍填完",
    "masked: 2 passes": "遮住：分 2 遍",
    "masked: 4 passes": "遮住：分 4 遍",
    "masked: 8 passes": "遮住：分 8 遍",
    "autoregressive: what stands before": "接着写：只看前文",
    "autoregressive: 20 candidates, each read to the end": "接着写：20 个候选字，各读到末尾",
    "together: as if they were independent": "同时填，当作互不相关",
    "one after the other": "先填一个，再填另一个",
    "the text itself": "原文",
    "questions and answers, twenty formats": "问答，二十种格式",
    "texts to learn from": "语料",
    "pairs of answers": "成对的回答",
    "texts with labels": "带标签的文本",
    "a file of questions": "问题文件",
    "tasks of an evaluation": "评测任务",
    "tokenizers: characters, BPE, WordPiece": "分词器：字符、BPE、WordPiece",
    "config.json, generation_config.json": "config.json、generation_config.json",
    "safetensors, index, shards of weights": "safetensors、索引、权重分片",
    "a model's folder": "模型文件夹",
    "the same for NumPy": "同上，NumPy 读",
    "folders of int8 and int4": "int8 与 int4 文件夹",
    "a classifier's folder": "分类器文件夹",
    "an adapter's folder": "适配器文件夹",
    "a model's folder beside its manifest": "模型文件夹，带清单",
    ".pth with other opcodes": ".pth，换了操作码",
    "OpenAI's release": "OpenAI 发布的模型",
    "chat templates": "对话模板",
    "recipes": "配方",
    "what is read": "读什么",
    "seconds with checks": "有检查，秒",
    "without": "无检查",
    "median difference": "相差的中位数",
    "minigpt generate, a small model": "minigpt generate，小模型",
    "minigpt generate, a large model": "minigpt generate，500 MB 的模型",
    "a folder of 500 MB": "在 Python 里加载 500 MB 的文件夹",
    "inputs": "输入",
    "refused": "拒绝",
    "same": "相同",
    "other": "不同",
    "faults": "错误",
    "shards of ids": "编号的分片",
    "the same with right checksums": "同上，校验和改成对的",
    "the doctor on a run": "医生看一次训练",
    "plot on a run": "画一次训练的曲线",
    "the checkpoints of a run": "一次训练的检查点",
    "training_state.json with a right checksum": "training_state.json，校验和改成对的",
    "command lines with flags drawn at random": "随机选项的命令行",
    "streams that are closed, full or broken": "关闭的、写满的、断开的输入输出",
    "signals at random moments": "随机时刻的信号",
    "set": "题目",
    "questions/s": "题/秒",
    "times hf": "hf 的几倍",
    "largest difference": "最大的差",
    "other choices": "选得不同",
    "five-shot letters": "五个示例，按字母",
    "texts": "按选项的文字",
    "cloze": "填最后一个词",
}
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
