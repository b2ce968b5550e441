"""Part finetune: SIGKILL at random instants of `minigpt finetune`, for each method."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from tests.survival.bench import Bench
from tests.survival.children import finished, start
from tests.survival.runs import digest

METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "freeze": {"method": "freeze", "train_only": "attention"},
    "lora": {"method": "lora", "r": 2, "lora_dropout": 0.1},
    "dora": {"method": "lora", "r": 2, "use_dora": True},
    "adapter": {"method": "adapter", "bottleneck_size": 4},
    "lora, int8": {"method": "lora", "r": 2, "base_precision": "int8"},
}


def finetuning(bench: Bench) -> None:
    """Each chain of killed runs must end with the bits of the run that was not killed."""
    base = bench.runs.folder / "reference" / "best"
    assert bench.reference.end, "the reference is the model that all begin with"
    for name, method in METHODS.items():
        more = {**method, "model": base, "learning_rate": 1e-2}
        began = time.monotonic()
        assert bench.runs.run(f"undisturbed-{name}", **more) == 0, bench.runs.said()
        longest = time.monotonic() - began

        def anywhere(output: Path, instant: float, more: dict[str, Any] = more) -> bool | None:
            child = start(bench.runs.argv(output.name, **more), bench.runs.log)
            time.sleep(instant)
            os.kill(child, signal.SIGKILL)
            code = finished(child)
            return None if code == 0 else code == -signal.SIGKILL

        instants = [bench.random.uniform(0, longest) for _ in range(max(3, bench.options.kills // 10))]
        expected = digest(bench.runs.folder / f"undisturbed-{name}")
        held = bench.chain(f"finetune-{name}", instants, anywhere, expected, **more)
        what = f"fine-tuning, {name}: SIGKILL at random instants"
        bench.table.add("finetune", what, len(instants), held)
