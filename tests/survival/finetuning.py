"""Part finetune: SIGKILL at random instants of `minigpt finetune`, for each method and each task."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from tests.survival.bench import Bench
from tests.survival.children import finished, start
from tests.survival.runs import digest

METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full", "precision": "auto"},
    "freeze": {"method": "freeze", "train_only": "attention"},
    "lora": {"method": "lora", "r": 2, "lora_dropout": 0.1},
    "dora": {"method": "lora", "r": 2, "use_dora": True},
    "adapter": {"method": "adapter", "bottleneck_size": 4},
    "lora, int8": {"method": "lora", "r": 2, "base_precision": "int8", "precision": "auto"},
    "classification": {"task": "classification", "method": "full"},
    "dpo": {"task": "dpo", "method": "lora", "r": 2},
    "mlm": {"task": "mlm", "method": "full"},
    "grpo": {"task": "grpo", "method": "full", "beta": 0.1},
    "grpo, answers used twice": {"task": "grpo", "method": "lora", "r": 2, "num_iterations": 2},
    "distillation": {"method": "full", "alpha": 0.7},
}
REWARDED: dict[str, Any] = {
    "reward": "length", "reward_length": 4, "num_generations": 3, "max_completion_length": 6,
}  # fmt: skip


def finetuning(bench: Bench) -> None:
    """Check that each chain of killed runs ends with the bits of the run that was not killed."""
    base = bench.runs.folder / "reference" / "best"
    assert bench.reference.end, "the reference is the model that all begin with"
    files = data_of_tasks(bench.runs.folder)
    for name, method in METHODS.items():
        more = {**method, **files.get(method.get("task", ""), {}), "model": base, "learning_rate": 1e-2}
        more["max_steps"] = bench.options.short_steps
        if name == "distillation":
            more["teacher"] = base
        folder = name.replace(", ", "-").replace(" ", "-")
        began = time.monotonic()
        assert bench.runs.run(f"undisturbed-{folder}", **more) == 0, bench.runs.said()
        longest = time.monotonic() - began

        def anywhere(output: Path, instant: float, more: dict[str, Any] = more) -> bool | None:
            child = start(bench.runs.argv(output.name, **more), bench.runs.log)
            time.sleep(instant)
            os.kill(child, signal.SIGKILL)
            code = finished(child)
            return None if code == 0 else code == -signal.SIGKILL

        # Before the first checkpoint, all methods do the same, which the part `kill` examines.
        earliest = 0.0 if bench.options.full else longest / 3
        instants = [bench.random.uniform(earliest, longest) for _ in range(max(2, bench.options.kills // 10))]
        expected = digest(bench.runs.folder / f"undisturbed-{folder}")
        held = bench.chain(f"finetune-{folder}", instants, anywhere, expected, **more)
        what = f"fine-tuning, {name}: SIGKILL at random instants"
        bench.table.add("finetune", what, len(instants), held)


def data_of_tasks(folder: Path) -> dict[str, dict[str, Any]]:
    """Write the data of the tasks that need their own. Returns the flags of each task."""
    things = "天地日月山水花草木石火土"
    labelled = [f"{one}是{other}色,{number % 2}" for number, one in enumerate(things) for other in "黑红青绿"]
    pairs = [
        {"prompt": f"{one}是什么颜色？", "chosen": f"{one}是{other}色。", "rejected": f"{other}。"}
        for one in things
        for other in "黑红"
    ]
    (folder / "labelled.csv").write_text("\n".join(["text,label", *labelled]) + "\n", encoding="utf-8")
    lines = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs]
    (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "text.txt").write_text("。".join(labelled) * 4, encoding="utf-8")
    return {
        "classification": {"train_data": folder / "labelled.csv", "val_data": folder / "labelled.csv"},
        "dpo": {"train_data": folder / "pairs.jsonl", "val_data": folder / "pairs.jsonl"},
        "mlm": {"text": folder / "text.txt"},
        "grpo": REWARDED,
    }
