"""Tokens per second on a CPU at batch 1, greedy: minigpt, transformers, CTranslate2 and llama.cpp.

    python benchmarks/generate.py --shape char                 # 4 layers x 256; only transformers as peer
    python benchmarks/generate.py --shape gpt2 --tokenizer DIR --output benchmarks/results/NAME.json
    python benchmarks/generate.py --shape qwen3 --tokenizer DIR             # the 0.6B shape; 8 GiB of memory
    python benchmarks/generate.py --shape toy --rounds 1                    # takes seconds
    python benchmarks/generate.py --shape gpt2 --native_step                # the cost of a missing C compiler

Weights are random; nothing is downloaded. DIR holds the files of a GPT-2 or Qwen3 tokenizer, which the
formats of the peers need. Peers are the installed packages: transformers, ctranslate2, and xllamacpp
(llama.cpp for Python). A missing one is left out and named. Each measurement is a process of its own, so that
the threads of one library do not disturb another. The arms take turns, so that other programs slow all of
them equally.

Decoding: (N - 1) tokens / (time for N tokens - time for 1), after a prompt of 32. Prefill: a prompt of 512
and one token. Cold: from the start of a process to its first token, and for comparison the time of `import
torch` and of reading the weights once. minigpt's greedy tokens must equal those of transformers. The last
line is JSON.

--native_step measures minigpt only, with the native step and without it (as if there were no C compiler).
"""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT, PREFILL, NEW = 32, 512, 128
NEW_WITHOUT = 32  # number of new tokens without the native step: fewer, because this is slow
SHAPES: dict[str, dict[str, Any]] = {
    "toy": {"n_embd": 64, "n_head": 2, "n_layer": 2, "vocab_size": 300, "block_size": 640},
    "char": {"n_embd": 256, "n_head": 4, "n_layer": 4, "vocab_size": 4825, "block_size": 640},
    "gpt2": {"n_embd": 768, "n_head": 12, "n_layer": 12, "bias": True, "gelu": "tanh"}
    | {"vocab_size": 50257, "block_size": 1024},
    "qwen3": {},  # the preset 0.6B
}
ARMS = {  # name of an arm -> package that it needs
    "minigpt float32": "minigpt",
    "minigpt float16": "minigpt",
    "minigpt bfloat16": "minigpt",
    "minigpt int8": "minigpt",
    "transformers float32": "transformers",
    "ctranslate2 int8": "ctranslate2",
    "llama.cpp f32": "xllamacpp",
    "llama.cpp f16": "xllamacpp",
    "llama.cpp q8_0": "xllamacpp",
}
WITHOUT = " without the native step"
NATIVE_STEP_ARMS = [f"minigpt {precision}{how}" for precision in ("float32", "int8") for how in ("", WITHOUT)]


def prompt_ids(length: int) -> list[int]:
    """Return a prompt whose ids are in every vocabulary here."""
    return [3 + i * 7 % 250 for i in range(length)]


# -- preparing the models ------------------------------------------------------------------------------------


def prepare(shape: str, tokenizer: Path | None, work: Path) -> list[str]:
    """Write the model in every format that an installed peer reads. Returns the arms that can run."""
    import torch

    from minigpt.families.qwen3.model import Qwen3ForCausalLM
    from minigpt.families.qwen3.presets import preset
    from minigpt.model import GPTConfig, GPTLMHeadModel
    from minigpt.tokenization.bpe import BpeTokenizer
    from minigpt.tokenizer import Tokenizer
    from minigpt.weights.pretrained import AnyTokenizer, save_pretrained

    torch.manual_seed(0)
    chosen: AnyTokenizer
    if shape == "qwen3":
        model: Any = Qwen3ForCausalLM(preset("0.6B").config())
    else:
        model = GPTLMHeadModel(GPTConfig(dropout=0.0, **SHAPES[shape]))
    if tokenizer is None:
        # 一, the question of `cold`, and as many other characters as the vocabulary needs
        rest = ["一", *map(chr, range(0x20000, 0x20000 + model.config.vocab_size - 4))]
        chosen = Tokenizer.from_word2id({w: i for i, w in enumerate(["<pad>", "<unk>", "<sep>", *rest])})
    else:
        chosen = BpeTokenizer.from_folder(tokenizer)
    folder = work / "model"
    save_pretrained(model, folder, chosen)
    arms = [name for name, package in ARMS.items() if importlib.util.find_spec(package)]
    if tokenizer is None:  # llama.cpp and CTranslate2 need a BPE tokenizer
        return [name for name in arms if name.startswith(("minigpt", "transformers"))]
    for dtype in ("f32", "f16", "q8_0"):
        if f"llama.cpp {dtype}" in arms:
            command = ["-m", "minigpt", "convert", "--model", folder, "--dtype", dtype]
            command += ["--output", work / f"{dtype}.gguf"]
            subprocess.run([sys.executable, *map(str, command)], check=True, stdout=subprocess.DEVNULL)
    if "ctranslate2 int8" in arms:
        if shape == "gpt2":
            import ctranslate2

            ctranslate2.converters.TransformersConverter(str(folder)).convert(
                str(work / "ctranslate2"), quantization="int8", force=True
            )
        else:
            arms.remove("ctranslate2 int8")
    return arms


# -- one measurement, in a process of its own ----------------------------------------------------------------


def writer(arm: str, work: Path, threads: int) -> Callable[[list[int], int], list[int]]:
    """Return the function (prompt, number of new tokens) -> ids that is timed."""
    kind, _, precision = arm.removesuffix(WITHOUT).partition(" ")
    if kind == "llama.cpp":
        return _llama(work / f"{precision}.gguf", threads)
    if kind == "ctranslate2":
        return _ctranslate2(work / "ctranslate2", threads)
    import torch

    torch.set_num_threads(threads)
    if kind == "transformers":
        return _transformers(work / "model")
    from minigpt.generation import native
    from minigpt.generation.api import GenerationOptions, generate_ids
    from minigpt.generation.native_library import system_build
    from minigpt.weights.pretrained import load_model
    from minigpt.weights.quantized import set_precision

    if arm.endswith(WITHOUT):
        native.library = lambda: None
    elif system_build().library is None:
        raise SystemExit(f"{arm} cannot be measured: {system_build().reason}")
    model = set_precision(load_model(work / "model"), precision)  # type: ignore[arg-type]
    return lambda ids, new: generate_ids(model, [ids], GenerationOptions(max_new_tokens=new), None)[0].ids


def _transformers(folder: Path) -> Callable[[list[int], int], list[int]]:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None

    def write(ids: list[int], new: int) -> list[int]:
        given = torch.tensor([ids])
        out = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=new, do_sample=False, pad_token_id=0
        )
        written: list[int] = out[0, len(ids) :].tolist()
        return written

    return write


def _ctranslate2(folder: Path, threads: int) -> Callable[[list[int], int], list[int]]:
    import ctranslate2

    model = ctranslate2.Generator(str(folder), intra_threads=threads, compute_type="int8")
    tokens = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))

    def write(ids: list[int], new: int) -> list[int]:
        result = model.generate_batch(
            [[tokens[i] for i in ids]], max_length=new, min_length=new, include_prompt_in_result=False
        )
        written: list[int] = result[0].sequences_ids[0]
        return written

    return write


def _llama(file: Path, threads: int) -> Callable[[list[int], int], list[int]]:
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.verbosity = str(file), 1024, 1, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(settings)

    def write(ids: list[int], new: int) -> list[int]:
        server.handle_completions(
            {"prompt": ids, "n_predict": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        )
        return []

    return write


def measure(arm: str, work: Path, threads: int) -> dict[str, Any]:
    """Measure one arm."""
    write = writer(arm, work, threads)
    new = NEW_WITHOUT if arm.endswith(WITHOUT) else NEW

    def timed(length: int, new: int) -> tuple[float, list[int]]:
        start = time.perf_counter()
        ids = write(prompt_ids(length), new)
        return time.perf_counter() - start, ids

    timed(PROMPT, 4)
    (one, _), (all_of_them, ids) = timed(PROMPT, 1), timed(PROMPT, new)
    return {
        "decode_per_second": (new - 1) / (all_of_them - one),
        "prefill_seconds": timed(PREFILL, 1)[0],
        "ids": ids[:48],
    }


COLD = """
import torch
from pathlib import Path
content = Path({!r}).read_bytes()
print(len(content), flush=True)
"""


def cold(work: Path, threads: int) -> dict[str, tuple[float, float]]:
    """Return the seconds of a fresh process to its first output and to its end.

    It measures `minigpt generate`. For comparison, it measures what every such program must do: import torch,
    and read the weights once.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # users have compiled modules (.pyc files)
    first = ["-m", "minigpt", "generate", "--model", str(work / "model"), "--question", "一", "--stream"]
    first += ["--max_new_tokens", "1", "--threads", str(threads)]
    reading = ["-c", COLD.format(str(work / "model" / "model.safetensors"))]
    _timed([sys.executable, *reading], environment)  # warm-up, so that all files are in the page cache
    return {
        name: _timed([sys.executable, *command], environment)
        for name, command in {"first_token": first, "torch_and_reading": reading}.items()
    }


def _timed(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    start = time.perf_counter()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        if not process.stdout.read(1):
            raise RuntimeError(f"no output: {' '.join(command)}")
        first = time.perf_counter() - start
        process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {' '.join(command)}")
    return first, time.perf_counter() - start


# -- all arms, in turns --------------------------------------------------------------------------------------


def run(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Prepare the models, let the arms take turns, print the results."""
    arms = prepare(options.shape, options.tokenizer, work)
    missing = [name for name in ARMS if name not in arms]
    if missing:
        print(f"left out (not installed, or not for this shape): {', '.join(missing)}")
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    started: list[dict[str, tuple[float, float]]] = []
    for _ in range(options.rounds):
        take_turns(found, options, work)
        started.append(cold(work, options.threads))
    rows = print_rows(found, options)
    same = found["minigpt float32"][0]["ids"] == found.get("transformers float32", [{}])[0].get("ids")
    fresh = {
        name: {
            moment: spread([one[name][place] for one in started])
            for place, moment in enumerate(("first", "end"))
        }
        for name in started[0]
    }
    print(f"\ngreedy tokens equal transformers': {same}")
    for name, text in {"first_token": "first token", "torch_and_reading": "import torch, read"}.items():
        first, end = (fresh[name][moment]["median"] for moment in ("first", "end"))
        print(f"fresh process, {text}: {first:.2f} s, to its end {end:.2f} s")
    packages = {"torch", "transformers", "ctranslate2", "xllamacpp", "numpy"}
    return {
        "benchmark": "generate",
        "shape": options.shape,
        "threads": options.threads,
        "rounds": options.rounds,
        "rows": rows,
        "same_ids": same,
        "cold": fresh,
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in sorted(packages) if version(name)},
    }


def run_native_step(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Measure minigpt with the native step and without it, in turns."""
    from minigpt.diagnosis.installation import instructions, processor

    prepare(options.shape, None, work)
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in NATIVE_STEP_ARMS}
    for _ in range(options.rounds):
        take_turns(found, options, work)
    rows = print_rows(found, options)
    print()
    for row in rows:
        if row["arm"].endswith(WITHOUT):
            # pairs of measurements of one round
            twins = zip(found[row["arm"]], found[row["arm"].removesuffix(WITHOUT)])
            speeds = [without["decode_per_second"] / beside["decode_per_second"] for without, beside in twins]
            row["share"] = spread(speeds)
            print("{arm}: {share[median]:.2g} of the speed with it".format(**row))
    there = ", ".join(name for name, is_there in instructions().items() if is_there)
    return {
        "benchmark": "native_step",
        "shape": options.shape,
        "toy": options.shape == "toy",
        "threads": options.threads,
        "rounds": options.rounds,
        "rows": rows,
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {processor()} ({there})",
        "versions": {name: version(name) for name in ("numpy", "torch")},
    }


def take_turns(found: dict[str, list[dict[str, Any]]], options: argparse.Namespace, work: Path) -> None:
    """Measure each arm once more, in a process of its own."""
    for arm, measured in found.items():
        command = [sys.executable, __file__, "--arm", arm, "--work", str(work)]
        command += ["--threads", str(options.threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "GOMP_SPINCOUNT": "10000"}
        done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
        measured.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"round {len(measured)} of {options.rounds}", file=sys.stderr)


def print_rows(found: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print a table with the spread of each arm's rounds. Returns its rows."""
    rows = [row_of(arm, runs) for arm, runs in found.items()]
    print(
        f"\n{options.shape}, {options.threads} threads, median of {options.rounds} rounds (least to most)\n"
    )
    print("| | tokens/s | prefill of 512, s |\n|---|---|---|")
    for row in rows:
        cells = [
            "{median:.4g} ({least:.4g} to {most:.4g})".format(**row[key]) for key in ("decode", "prefill")
        ]
        print(f"| {row['arm']} | {' | '.join(cells)} |")
    return rows


def row_of(arm: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the spread of an arm's rounds."""
    return {
        "arm": arm,
        "decode": spread([one["decode_per_second"] for one in runs]),
        "prefill": spread([one["prefill_seconds"] for one in runs]),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Return the median, the smallest and the largest value."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def version(package: str) -> str:
    """Return the version of an installed package, or nothing."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def main() -> None:
    """Parse the flags; measure one arm, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="toy")
    parser.add_argument("--tokenizer", type=Path, help="folder of GPT-2's or Qwen3's tokenizer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--native_step", action="store_true", help="minigpt with it and without it")
    parser.add_argument("--work", type=Path, help="folder for the models; default: a temporary one")
    parser.add_argument("--output", type=Path, help="also write the JSON object here")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(measure(options.arm, options.work, options.threads)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        measured = run_native_step if options.native_step else run
        result = measured(options, options.work or Path(temporary))
    text = json.dumps(result, ensure_ascii=False)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
