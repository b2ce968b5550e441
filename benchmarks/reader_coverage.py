"""How much of the modules that read files the tests reach: lines and branches.

    pip install coverage
    python benchmarks/reader_coverage.py              # ten minutes on two cores
    python benchmarks/reader_coverage.py --missing    # with the lines and branches that no test reaches

The tests are those of the readers, and the fuzzer in its small form. Its forked processes are counted, too.
Exits with 1 if lines or branches of all modules together are below 95 %.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LEAST = 95.0  # per cent

MODULES = (  # under minigpt/, by what they read
    # files of any kind
    *("storage/regular_files", "storage/json_files", "storage/files"),
    # data
    *("data/text_encoding", "data/file_formats", "data/json_values", "data/records", "data/reader"),
    *(
        "data/nested_records",
        "data/field_names",
        "data/chat_logs",
        "data/marked_turns",
        "data/sample_weights",
    ),
    *("data/documents", "data/dialogue_files", "data/tables", "data/drawn_tables", "data/corpus"),
    *("data/labelled", "data/preferences", "data/questions", "evaluation/tasks", "evaluation/task_shapes"),
    # tokenizers and templates
    *("tokenizer", "tokenization/definition", "tokenization/bpe_files", "tokenization/wordpiece_files"),
    *("tokenization/chat_template", "tokenization/template_sandbox"),
    # configurations, weights, indexes
    *("families/checks", "families/strict_loading", "families/family", "families/gpt2/family"),
    *("families/qwen3/family", "generation/generation_config", "storage/safetensors_header"),
    *("storage/safetensors_files", "storage/read_ahead", "weights/pretrained", "weights/classifiers"),
    *("weights/quantized_folders", "finetuning/adapters", "reference/weights"),
    # .pth files, OpenAI's release
    *("families/gpt2/pth_file", "families/gpt2/pickle_check", "families/gpt2/openai_checkpoint"),
    "families/gpt2/tensor_bundle",
    # shards, recipes, runs, training states
    *("data/memory_mapped", "training/config", "training/finetune_config", "training/checkpoint"),
    *("training/run_state", "diagnosis/record", "lens/curves"),
)
TESTS = (
    *("adapters", "bad_input", "bad_weights", "bottleneck", "bpe", "chat_template", "checkpoint"),
    *("classification", "corpus", "distillation", "doctor", "files", "finetune", "finetune_bad_input"),
    *("fuzz", "gguf", "grpo", "import_checkpoint", "json_files", "lens", "look", "masked_lm"),
    *("openai_checkpoint", "preferences", "presets", "pretrained", "quantize", "qwen3_weight_names"),
    *("read_ahead", "reference", "regular_files", "resume", "shards", "split", "tasks", "text_training"),
    *("tokenizer", "training", "weight_files", "weighted_loss"),
)
OUTSIDE = (
    *("chat_logs", "data_files", "model_folders", "odd_inputs", "one_file", "published_shapes", "tables"),
    "tokenizer_folders",
)

# os._exit and subprocesses: the fuzzer's inputs are read in processes that end in this way
SETTINGS = """[run]
branch = true
parallel = true
data_file = {data}
patch = subprocess, _exit
include =
    {files}
[report]
exclude_also =
    if TYPE_CHECKING:
    assert_never
"""


def measured(files: list[str], tests: list[str], place: Path) -> Any:
    """Run tests under coverage. Returns its report."""
    settings = place / "coveragerc"
    settings.write_text(SETTINGS.format(data=place / "data", files="\n    ".join(files)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COVERAGE_RCFILE": str(settings)}
    coverage = [sys.executable, "-m", "coverage"]
    words = ["run", "-m", "pytest", "-q", "-p", "no:randomly", "-p", "no:cacheprovider", *tests]
    tested = subprocess.run([*coverage, *words], cwd=ROOT, env=environment, check=False)
    if tested.returncode:
        raise SystemExit("the tests fail, so their coverage says little")
    report = place / "report.json"
    for words in (["combine", "-q"], ["json", "-q", "-o", str(report)]):
        subprocess.run([*coverage, *words], cwd=ROOT, env=environment, check=True)
    return json.loads(report.read_bytes())


def share(row: Any, what: str) -> float:
    """Per cent of the lines ("lines") or branches ("branches") that are reached."""
    whole = row["num_statements" if what == "lines" else "num_branches"]
    return 100.0 * float(row[f"covered_{what}"]) / whole if whole else 100.0


def show(report: Any, missing: bool) -> bool:
    """Print a table. Returns whether enough is reached."""
    rows = [(name.removeprefix("minigpt/"), file) for name, file in sorted(report["files"].items())]
    rows.append(("all", {"summary": report["totals"]}))
    print(f"{'module':<40}{'lines':>8}{'reached':>9}{'branches':>10}{'reached':>9}")
    for name, file in rows:
        row = file["summary"]
        counts = f"{row['num_statements']:>8,}{share(row, 'lines'):>8.1f}%{row['num_branches']:>10,}"
        print(f"{name:<40}{counts}{share(row, 'branches'):>8.1f}%")
        if missing and name != "all":
            for what in ("missing_lines", "missing_branches"):
                places = " ".join(str(one).replace(" ", "") for one in file[what])
                if places:
                    print(f"    {what.replace('_', ' ')}: {places}")
    return all(share(report["totals"], what) >= LEAST for what in ("lines", "branches"))


def main() -> int:
    """Run what the flags ask for; 1 if too little is reached."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--missing", action="store_true", help="name what no test reaches")
    options = parser.parse_args()
    files = [f"minigpt/{name}.py" for name in MODULES]
    if absent := [name for name in files if not (ROOT / name).is_file()]:
        raise SystemExit(f"no such module: {', '.join(absent)}")
    tests = [f"tests/test_{name}.py" for name in TESTS] + [
        f"tests/outside/test_{name}.py" for name in OUTSIDE
    ]
    with tempfile.TemporaryDirectory(prefix="reader-coverage-") as place:
        return 0 if show(measured(files, tests, Path(place)), options.missing) else 1


if __name__ == "__main__":
    sys.exit(main())
