"""Questions per second in lm-evaluation-harness: minigpt's model beside the harness's own `hf` model.

    python benchmarks/evaluation.py --data ../shared/data --output benchmarks/results/NAME.json
    python benchmarks/evaluation.py --toy

Both models read the same folder, a GPT-2 of 124M parameters with random weights, and answer the same requests
through the harness's own interface: five-shot multiple choice (CMMLU, letters), multiple choice without
shots (ARC, texts), and a cloze (LAMBADA, the last word). Blocks of questions take turns, so that other
programs slow all arms equally. The result has the largest difference of a log-likelihood from `hf`, and the
number of choices that differ. With --toy the model is tiny and the questions are made up. The last line is
JSON.
"""

import sys
from pathlib import Path

# run as a script: import minigpt from this checkout, and the other files of this folder
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import os
import random
import tempfile
import time
from typing import Any

import torch

import minigpt
from benchmarks.sizes import SIZES
from benchmarks.turns import add_flags, finish, surroundings
from minigpt.console.terminal import table
from minigpt.evaluation.harness import IS_INSTALLED
from minigpt.evaluation.options import TaskOptions
from minigpt.evaluation.prompts import Prompter, choose_shots
from minigpt.evaluation.tasks import Task, read_tasks
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.tokenization.bpe import BpeTokenizer

SETS = {"five-shot letters": ("cmmlu", 5), "texts": ("mc_english/arc_easy.jsonl", 0), "cloze": ("lambada", 0)}
WORDS = "the cat dog sat ran on a mat hill red big of and is was far near old new".split()  # noqa: SIM905


def made_up(folder: Path) -> Path:
    """Write small made-up sets in the same formats. Returns the folder."""
    generator = random.Random(0)

    def words(n: int) -> str:
        return " ".join(generator.choices(WORDS, k=n))

    def distinct(n: int) -> list[str]:
        return [f"{words(3)} {i}" for i in range(n)]

    listed = [{"question": words(8), **dict(zip("ABCD", distinct(4))), "answer": "B"} for _ in range(20)]
    texts = [{"query": f"Question: {words(8)}", "choices": distinct(4), "gold": 1} for _ in range(16)]
    cloze = [{"context": words(20), "continuation": generator.choice(WORDS)} for _ in range(16)]
    for name, rows in (
        ("cmmlu/test.jsonl", listed[5:]),
        ("cmmlu/dev.jsonl", listed[:5]),
        ("mc_english/arc_easy.jsonl", texts),
        ("lambada/test.jsonl", cloze),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def requests_of(task: Task, shots: int, tokenizer: BpeTokenizer, count: int) -> list[list[tuple[str, str]]]:
    """Return (context, continuation) of each question, as the harness passes them. Subjects stay together."""
    own = choose_shots(task, TaskOptions(shots=shots))
    prompter = Prompter(tokenizer, "text", tokenizer.eos_token_id)
    found = []
    for one in task.examples[:count]:
        context = prompter.text(one, own.get(one.subject, []))
        answers = one.scored or one.references
        found.append([(context, one.delimiter + answer) for answer in answers])
    return found


def main() -> None:
    """Measure every arm on every set, and print the table and one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser)
    parser.add_argument("--data", type=Path, help="folder of the sets")
    parser.add_argument("--questions", type=int, default=64, help="questions of each set")
    parser.add_argument("--block", type=int, default=16, help="questions in a turn")
    parser.add_argument("--batch_size", type=int, default=8, help="of the hf model")
    options = parser.parse_args()
    if not IS_INSTALLED:
        sys.exit("benchmarks/evaluation.py needs lm-evaluation-harness: pip install 'minigpt[evaluate]'")
    if options.data is None and not options.toy:
        sys.exit("benchmarks/evaluation.py needs --data FOLDER, or --toy")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as work:
        rows = measure(options, Path(work))
    columns = ("set", "arm", "questions per second", "times hf", "largest difference", "other choices")
    cells = [
        [row["set"], row["arm"], f"{row['questions_per_second']:.2f}", f"{row['ratio']:.1f}",
         f"{row['largest_difference']:.1e}", row["other_choices"]]
        for row in rows
    ]  # fmt: skip
    table("questions per second", columns, cells, range(2, 6))
    packages = ("lm-eval", "transformers")
    numbers = surroundings("evaluation", options.data, options.threads, packages)
    numbers |= {"toy": options.toy, "questions": options.questions, "batch_size": options.batch_size}
    finish({**numbers, "rows": rows}, options.output)


def measure(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Return a row for each set and arm."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    data = made_up(work / "data") if options.toy else options.data
    tasks = {name: read_tasks([data / path])[0] for name, (path, _) in SETS.items()}
    texts = [one.prompt for task in tasks.values() for one in task.examples[:2000]]
    tokenizer = BpeTokenizer.train(texts, 400 if options.toy else 20_000)
    shape = SIZES["toy" if options.toy else "124M"] | {"block_size": 1024, "dropout": 0.0}
    torch.manual_seed(0)
    size = max(tokenizer.get_vocab_size(), shape["vocab_size"])
    model = GPTLMHeadModel(GPTConfig(**{**shape, "vocab_size": size}))
    with torch.no_grad():  # initial weights give nearly equal scores, whose order means nothing
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)
    folder = work / "model"
    minigpt.save_pretrained(model, folder, tokenizer)
    arms = {
        "hf": get_model("hf")(
            pretrained=str(folder), device="cpu", dtype="float32", batch_size=options.batch_size
        ),
        "minigpt float32": get_model("minigpt")(pretrained=str(folder), device="cpu"),
        "minigpt int8": get_model("minigpt")(pretrained=str(folder), device="cpu", precision="int8"),
    }
    rows = []
    for name, task in tasks.items():
        questions = requests_of(task, SETS[name][1], tokenizer, options.questions)
        seconds, found = dict.fromkeys(arms, 0.0), {arm: list[list[float]]() for arm in arms}
        for start in range(0, len(questions), options.block):
            block = questions[start : start + options.block]
            for arm, lm in arms.items():
                instances = [
                    Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i)
                    for one in block
                    for i, pair in enumerate(one)
                ]
                began = time.perf_counter()
                answers = iter(lm.loglikelihood(instances, disable_tqdm=True))
                seconds[arm] += time.perf_counter() - began
                found[arm] += [[next(answers)[0] for _ in one] for one in block]
        for arm in arms:
            pairs = list(zip(found["hf"], found[arm]))
            rows.append({
                "set": name,
                "arm": arm,
                "questions_per_second": round(len(questions) / seconds[arm], 3),
                "ratio": round(seconds["hf"] / seconds[arm], 2),
                "largest_difference": max(abs(x - y) for a, b in pairs for x, y in zip(a, b)),
                "other_choices": sum(a.index(max(a)) != b.index(max(b)) for a, b in pairs),
            })  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
