"""Examines a training run, explains problems in plain words, and recommends what to try.

    minigpt doctor output
    minigpt doctor output/demo --no_deep      # faster: the best checkpoint is not loaded
    minigpt doctor output/demo --language zh

The doctor reads the run's files (run.json, metrics.jsonl, the newest checkpoint's state), the data files that
the run names (if they still exist), and the best checkpoint. It changes nothing. The exit code is always 0.
Causes are printed before their consequences. Recommended commands can be run without changes.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.console import command_line
from minigpt.console.flags import POSITIONAL
from minigpt.console.language import chosen_language

if TYPE_CHECKING:
    from minigpt.console.language import Language
    from minigpt.diagnosis.findings import Finding


@dataclass(frozen=True, kw_only=True)
class Options(command_line.CommandOptions):
    """Say in plain words what looks wrong with a training run, and what to try."""

    run: Path = field(default=Path("output"), metadata=POSITIONAL)
    """folder of the run, as `minigpt train --output` made it"""
    deep: bool = True
    """also load the best checkpoint, and measure and ask it on some held-out pairs"""
    curve: Path | None = None
    """reference curve to compare with instead of the recipe's"""
    save_curve: Path | None = None
    """write the curve of this run, which must be finished, as a reference for others"""


_LABELS: dict[str, dict[str, Any]] = {
    "en": {
        "title": "{run}: step {steps} of {total}",
        "columns": ("", "what", "numbers"),
        "levels": {"ok": "ok", "note": "note", "warning": "warning", "error": "error"},
        "try": "Try: ",
        "unknown": "unknown",
        "saved": "{file}: {points} points of a reference curve",
        "numbers": {},
    },
    "zh": {
        "title": "{run}：第 {steps} 步，共 {total} 步",
        "columns": ("", "项目", "数值"),
        "levels": {"ok": "正常", "note": "提示", "warning": "警告", "error": "错误"},
        "try": "建议：",
        "unknown": "未知",
        "saved": "{file}：参考曲线，{points} 个点",
        "numbers": {
            "after": "之后",
            "answers": "回答",
            "before": "之前",
            "checks": "检查",
            "clipped_ratio_first": "起初未结束",
            "clipped_ratio_last": "最后未结束",
            "completion_length_first": "起初长度",
            "completion_length_last": "最后长度",
            "count": "个数",
            "decay": "权重衰减",
            "end": "结束符",
            "enough": "足够",
            "error": "误差",
            "exact_match_first": "起初答对",
            "exact_match_last": "最后答对",
            "examples": "样本",
            "expected": "预期",
            "gap": "差距",
            "largest": "最大",
            "last": "最后",
            "limit": "上限",
            "lines": "行数",
            "loss": "损失",
            "low": "低点",
            "minimum": "最低",
            "moved": "移动",
            "norm": "范数",
            "other": "别的",
            "own": "自己的",
            "pairs": "对数",
            "parameters": "参数",
            "peak": "最高",
            "questions": "问题",
            "rate": "学习率",
            "reference": "参考",
            "reward": "奖励",
            "reward_first": "起初奖励",
            "reward_last": "最后奖励",
            "share": "占比",
            "start": "起点",
            "step": "第几步",
            "steps": "步数",
            "targets": "目标词元",
            "times": "倍数",
            "tokens": "词元",
            "total": "总步数",
            "train": "训练",
            "uniform": "乱猜",
            "unigram": "词频",
            "usual": "平常",
            "val": "验证",
            "vocab": "词表",
            "warmup": "预热",
        },
    },
}


def main(options: Options) -> dict[str, Any]:
    """Read the files of a training run, examine them, and print the findings."""
    from minigpt.diagnosis.curves import read_curve, save_curve
    from minigpt.diagnosis.examination import examine
    from minigpt.diagnosis.record import read_record

    language = chosen_language(options.language)
    labels = _LABELS[language]
    record = read_record(options.run)
    curve = None if options.curve is None else read_curve(options.curve)
    points = None if options.save_curve is None else save_curve(record, options.save_curve)
    findings = examine(record, curve, options.deep)
    total = f"{record.total_steps:,}" if record.total_steps else labels["unknown"]
    _show(
        findings,
        language,
        labels["title"].format(run=options.run, steps=f"{record.steps_done:,}", total=total),
    )
    if points is not None:
        print(labels["saved"].format(file=options.save_curve, points=points))
    return {
        "run": options.run,
        "steps": record.steps_done,
        "total_steps": record.total_steps or None,
        "worst": findings[0].level,
        "findings": [found.as_dict() for found in findings],
    }


def _show(findings: "list[Finding]", language: "Language", title: str) -> None:
    from minigpt.console.terminal import table
    from minigpt.errors import printable

    labels = _LABELS[language]
    rows = [
        (labels["levels"][found.level], found.code, _numbers(found.numbers, labels["numbers"]))
        for found in findings
    ]
    print(printable(title))  # printed separately, because a title of a table is wrapped to the table's width
    table("", labels["columns"], rows)
    for found in findings:
        print(f"\n[{labels['levels'][found.level]}] {printable(found.text(language))}")
        if advice := found.advice(language):
            print(printable(f"{labels['try']}{advice}"))
        for command in found.commands:
            print(printable(f"    {command}"))


def _numbers(numbers: dict[str, Any], names: dict[str, str]) -> str:
    """Return the numbers of a finding as one text, for a cell of the table. `names`: key -> printed name."""
    shown = {names.get(key, key): value for key, value in numbers.items() if not isinstance(value, str)}
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in shown.items()
    )


if __name__ == "__main__":
    command_line.run(Options, main)
