"""Speed of fine-tuning: minigpt compared with PEFT and transformers' Trainer, on the same weights and data.

    python benchmarks/peft_speed.py --output benchmarks/results/NAME.json                # about six minutes
    python benchmarks/peft_speed.py --data ../shared/data/instruct_zh/alpaca_zh_demo.jsonl
    python benchmarks/peft_speed.py --toy

The weights are random ones of GPT-2's shape (124M), made here; both programs load the same folder. The data
is instruction pairs in characters: `--data`, or generated pairs with lengths like those of instruction sets
(prompts of about 18 tokens, answers of about 160, with a long tail). Both programs get the same ids, the same
number of pairs per batch, the same longest length and the same threads, and compute in float32. No dropout,
no gradient checkpointing. Both learn every pair once. The arms, for each method:

- `transformers`: Trainer in its usual form, with the optimiser that it chooses. A collator pads to the
  longest pair of the batch, and labels outside of the answers are -100, as TRL sets them. For LoRA, the model
  is PEFT's.
- `transformers, by length`: the same with train_sampling_strategy="group_by_length" (only with
  `--by_length`).
- `minigpt`: what `minigpt finetune` does, with the same number of pairs in a batch.

Each arm is a process of its own. They take turns: some steps each. The first step of an arm is not timed.
`tokens/s` counts tokens of the pairs, not padding. `mib` is the peak memory of the process, with everything
that it imports. `ratio_of_processor_time` compares tokens per second of processor time, which depends less on
what else the machine does. The last line is JSON.
"""

import sys
from pathlib import Path

# run as a script: import minigpt from this checkout, and the other files of this folder
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import IO, Any

import numpy as np

from benchmarks.turns import add_flags, finish, shown_spread, spread, surroundings

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257},
    "small": {"n_layer": 6, "n_embd": 384, "n_head": 6, "vocab_size": 20000},
    "tiny": {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 2000},
}
METHODS = ("lora", "full")
OURS, THEIRS, BY_LENGTH = "minigpt", "transformers", "transformers, by length"
RATES = {"lora": 1e-3, "full": 1e-4}


def main() -> None:
    """Measure all methods. Print the table, the machine, and one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="JSONL file of pairs; left out: generated ones")
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--by_length", action="store_true", help="a third arm: Trainer groups by length, too")
    parser.add_argument("--batch_size", type=int, default=8, help="pairs")
    parser.add_argument("--max_length", type=int, default=384, help="tokens of a pair")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2, help="of an arm's turn")
    parser.add_argument("--r", type=int, default=8, help="rank of LoRA, on all linear layers of the blocks")
    parser.add_argument("--child", nargs=2, metavar=("ARM", "METHOD"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    add_flags(parser)
    options = parser.parse_args()
    if options.toy:
        options.shape, options.batch_size, options.max_length, options.rounds = "tiny", 4, 384, 2
    if options.child:
        run_child(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        numbers = measure(options, Path(folder))
    from minigpt.console.terminal import table

    shown = [
        (
            f"{row['method']}: {row['arm']}",
            *(f"{row[k]['median']:g}" for k in ("tokens_per_second", "pairs_per_second")),
            *(f"{row['mib']:,.0f}", f"{row['padding']:.0%}", *_compared(row)),
        )
        for row in numbers["rows"]
    ]
    columns = ("", "tokens/s", "pairs/s", "MiB", "padding", "times as fast", "of the memory")
    table(f"median of {options.rounds} rounds (least to most)", columns, shown, range(1, 7))
    if numbers["left_out"]:
        print(f"left out: {'; '.join(numbers['left_out'])}")
    finish(numbers, options.output)


def _compared(row: dict[str, Any]) -> tuple[str, str]:
    """Format an arm's comparison with Trainer."""
    if "ratio" not in row:
        return "", ""
    return shown_spread(row["ratio"]), f"{row['memory_ratio']:.2f}"


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make weights and data; the arms of each method take turns."""
    pairs = prepare(options, folder)
    needed = ("transformers", "accelerate", "peft")
    left_out = [f"{name} is not installed" for name in needed if importlib.util.find_spec(name) is None]
    arms = [OURS] if left_out else [THEIRS, *([BY_LENGTH] if options.by_length else []), OURS]
    rows = []
    for method in options.methods:
        with contextlib.ExitStack() as stack:
            children = {arm: stack.enter_context(Child(arm, method, options, folder)) for arm in arms}
            found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
            for number in range(options.rounds):
                for arm in arms if number % 2 == 0 else reversed(arms):
                    found[arm].append(children[arm].turn())
                    print(f"{method}, {arm}: {json.dumps(found[arm][-1])}", file=sys.stderr, flush=True)
            ends = {arm: child.end() for arm, child in children.items()}
        rows += [summary(arm, method, found, ends) for arm in arms]
    return {
        **surroundings("peft_speed", options.data, options.threads, needed),
        "toy": options.toy,
        "shape": options.shape,
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "rounds": options.rounds,
        "steps": options.steps,
        "r": options.r,
        "pairs": pairs,
        "left_out": left_out,
        "rows": rows,
    }


def summary(
    arm: str, method: str, found: dict[str, list[dict[str, float]]], ends: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Return an arm's row: medians over the rounds, and how it compares with Trainer, round by round."""

    def speeds(name: str, what: str) -> list[float]:
        return [turn[what] / turn["seconds"] for turn in found[name]]

    total = {what: sum(turn[what] for turn in found[arm]) for what in found[arm][0]}
    row: dict[str, Any] = {
        "method": method,
        "arm": arm,
        "trained": int(ends[arm]["trained"]),
        "tokens_per_second": spread(speeds(arm, "tokens")),
        "pairs_per_second": spread(speeds(arm, "pairs")),
        "padding": round(1 - total["tokens"] / total["places"], 3),
        "total": {what: round(value, 3) for what, value in total.items()},
        "mib": ends[arm]["mib"],
    }
    if arm != THEIRS and THEIRS in found:
        pairs = zip(speeds(arm, "tokens"), speeds(THEIRS, "tokens"))
        row["ratio"] = spread([ours / theirs for ours, theirs in pairs])
        theirs = {what: sum(turn[what] for turn in found[THEIRS]) for what in total}
        for name, what in (("totals", "seconds"), ("processor_time", "processor")):
            ratio = total["tokens"] / total[what] * theirs[what] / theirs["tokens"]
            row[f"ratio_of_{name}"] = round(ratio, 3)
        row["memory_ratio"] = round(row["mib"] / ends[THEIRS]["mib"], 3)
    return row


# -- weights and data --------------------------------------------------------------------------------------


def prepare(options: argparse.Namespace, folder: Path) -> int:
    """Write vocabulary, pairs, ids and weights. Returns the number of pairs.

    The pairs are just enough for all turns and the first step, so that every arm learns each of them once.
    """
    import torch

    from minigpt.data.reader import read_conversations
    from minigpt.families.registry import new_model
    from minigpt.model import GPTConfig
    from minigpt.tokenizer import Tokenizer, build_vocabulary
    from minigpt.weights.pretrained import save_pretrained

    count = options.batch_size * (1 + options.rounds * options.steps)
    if options.data:
        found, _ = read_conversations(options.data)
        pairs = [(each.question, each.exchanges[0].answer) for each in found]
    else:
        pairs = generated(count)
    # longer pairs are cut, so that both programs learn pairs of at most max_length tokens
    most = options.max_length - 3
    pairs = [(asked[: most // 2], said[: most - len(asked[: most // 2])]) for asked, said in pairs]
    some = [pairs[number % len(pairs)] for number in range(count)]
    characters = {character for pair in some for text in pair for character in text}
    shape = dict(SHAPES[options.shape])
    codes = itertools.chain(range(0x3400, 0xD7A0), range(0x20000, 0x30000))  # more than any vocabulary here
    more = (chr(code) for code in codes if chr(code) not in characters)
    missing = (
        shape["vocab_size"] - Tokenizer.from_word2id(build_vocabulary(["".join(characters)])).get_vocab_size()
    )
    if missing < 0:
        raise SystemExit(f"the data has {len(characters):,} different characters: give a larger --shape")
    whole = "".join(characters) + "".join(next(more) for _ in range(missing))
    tokenizer = Tokenizer.from_word2id(build_vocabulary([whole]))
    for name, part in (("train", some), ("val", some[:2])):
        lines = [json.dumps({"question": q, "answer": a}, ensure_ascii=False) + "\n" for q, a in part]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    torch.manual_seed(0)
    config = GPTConfig(**shape, block_size=1024, dropout=0.0, bias=True)
    save_pretrained(new_model(config), folder / "weights", tokenizer)
    return int(count)


def generated(count: int) -> list[tuple[str, str]]:
    """Make pairs of random characters, with lengths like those of instruction sets."""
    random = np.random.default_rng(0)

    def text(median: float, sigma: float) -> str:
        length = max(2, round(random.lognormal(np.log(median), sigma)))
        return "".join(map(chr, random.integers(0x4E00, 0x4E00 + 1500, length)))

    return [(text(18, 0.4), text(160, 0.8)) for _ in range(count)]


# -- processes ---------------------------------------------------------------------------------------------


class Child:
    """An arm in a process of its own, which waits between its turns."""

    def __init__(self, arm: str, method: str, options: argparse.Namespace, folder: Path) -> None:
        names = ("batch_size", "max_length", "rounds", "steps", "r", "threads")
        flags = [text for name in names for text in (f"--{name}", str(getattr(options, name)))]
        threads = str(options.threads)
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--child", arm, method, "--folder", str(folder), *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        )
        self.name = f"{arm}, {method}"

    def __enter__(self) -> "Child":
        self._read()  # ready, after its first step
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def turn(self) -> dict[str, float]:
        """Train for a turn. Returns its seconds, tokens, pairs and places (tokens with padding)."""
        self._write("turn")
        return self._read()

    def end(self) -> dict[str, float]:
        """End the process. Returns its peak memory and the number of trained parameters."""
        self._write("end")
        found = self._read()
        self.process.wait()
        return found

    def _write(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()

    def _read(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: the process ended, its message is above")
        found: dict[str, float] = json.loads(line)
        return found


class Turns:
    """In a child: waits for the parent's word before each turn, and measures the turn.

    Args:
        steps: of a turn.
        out: where the parent reads.
    """

    def __init__(self, steps: int, out: IO[str]) -> None:
        self._steps, self._out = steps, out
        self._done = -1  # the first step is not timed
        self._sums = {"tokens": 0.0, "pairs": 0.0, "places": 0.0}
        self._began = self._processor = 0.0

    def step_done(self, lengths: list[int], width: int) -> None:
        """After each step: lengths of the pairs, and the width to which they were padded."""
        self._done += 1
        if self._done:
            self._sums["tokens"] += sum(lengths)
            self._sums["pairs"] += len(lengths)
            self._sums["places"] += len(lengths) * width
        if self._done == self._steps:
            seconds = {"seconds": time.perf_counter() - self._began}
            seconds |= {"processor": time.process_time() - self._processor}
            self.say({**seconds, **self._sums})
        if self._done == 0:
            self.say({})
        if self._done in (0, self._steps):
            self._sums = dict.fromkeys(self._sums, 0.0)
            self._done = 0
            word = sys.stdin.readline().strip()
            if word != "turn":
                raise EndOfTurns
            self._began, self._processor = time.perf_counter(), time.process_time()

    def say(self, found: dict[str, float]) -> None:
        """Write a line for the parent."""
        self._out.write(json.dumps(found) + "\n")
        self._out.flush()


class EndOfTurns(Exception):  # noqa: N818  # no error
    """The parent has all turns that it wants."""


def run_child(options: argparse.Namespace) -> None:
    """Be an arm. What libraries print goes to standard error."""
    arm, method = options.child
    turns = Turns(options.steps, sys.stdout)
    with contextlib.redirect_stdout(sys.stderr):
        train = ours if arm == OURS else theirs
        trained = train(options, method, turns, arm == BY_LENGTH)
    turns.say({"mib": peak_memory(), "trained": trained})


def peak_memory() -> float:
    """Return this process's peak memory in MiB.

    On Linux it is that of the program (VmHWM): ru_maxrss begins with the size of the process that started it.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return round(int(line.split()[1]) / 2**10, 1)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(most / (2**20 if sys.platform == "darwin" else 2**10), 1)  # bytes on macOS, KiB elsewhere


def ours(options: argparse.Namespace, method: str, turns: Turns, _: bool) -> int:
    """Train with minigpt, as `minigpt finetune` does. Returns the number of trained parameters."""
    from minigpt.training.loop import Trainer

    trainer = Trainer(config_of(options, method), read(options, method))
    trained = sum(one.numel() for one in trainer.model.parameters() if one.requires_grad)
    with contextlib.suppress(EndOfTurns):
        while True:
            (batch,) = trainer.step.batches(trainer.progress.steps_done)
            trainer.step()
            lengths = (batch.token_mask.sum(1) + 1).tolist()  # a row's first token is no target
            turns.step_done(lengths, batch.input_ids.shape[1] + 1)
    return trained


def config_of(options: argparse.Namespace, method: str) -> Any:
    """Return minigpt's configuration."""
    from minigpt.training.finetune_config import FinetuneConfig
    from minigpt.training.resolve import resolve

    given = {
        "model": options.folder / "weights",
        "train_data": options.folder / "train.jsonl",
        "val_data": options.folder / "val.jsonl",
        "output": options.folder / "output",
        "method": method,
        "learning_rate": RATES[method],
        "batch_size": options.batch_size,
        "tokens_per_batch": 0,
        "max_length": options.max_length,
        "num_train_epochs": 1.0,
        "precision": "float32",
        "device": "cpu",
        "threads": options.threads,
        "report_to": "none",
        **({"r": options.r} if method == "lora" else {}),
    }
    return resolve(given, FinetuneConfig)


def read(options: argparse.Namespace, method: str) -> Any:
    """Return minigpt's data."""
    from minigpt.training.run_data import read_data

    return read_data(config_of(options, method))


def theirs(options: argparse.Namespace, method: str, turns: Turns, by_length: bool) -> int:
    """Train with transformers' Trainer, and PEFT for LoRA. Returns the number of trained parameters."""
    import torch
    import transformers

    from benchmarks.fine_tuning import Pairs, padded

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    data = Pairs(read(options, method).train)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        options.folder / "weights", dtype=torch.float32, attn_implementation="sdpa"
    )
    if method == "lora":
        import peft

        model = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=options.r,
                lora_alpha=16,
                lora_dropout=0.0,
                target_modules=["c_attn", "c_proj", "c_fc"],
                fan_in_fan_out=True,
                task_type="CAUSAL_LM",
            ),
        )
    shapes: list[tuple[list[int], int]] = []

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        batch = padded(rows)
        shapes.append((batch["attention_mask"].sum(1).tolist(), batch["input_ids"].shape[1]))
        return batch

    arguments = transformers.TrainingArguments(
        output_dir=str(options.folder / "theirs"),
        num_train_epochs=1,
        per_device_train_batch_size=options.batch_size,
        learning_rate=RATES[method],
        lr_scheduler_type="cosine",
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        **({"train_sampling_strategy": "group_by_length"} if by_length else {}),
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=collate,
        callbacks=[callback(transformers.TrainerCallback, lambda: turns.step_done(*shapes.pop(0)))],
    )
    with contextlib.suppress(EndOfTurns):
        trainer.train()
    return sum(one.numel() for one in model.parameters() if one.requires_grad)


def callback(base: type, done: Callable[[], None]) -> Any:
    """Make a callback that Trainer calls after each step."""

    class AfterSteps(base):  # type: ignore[misc]
        """Calls `done`."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            done()

    return AfterSteps()


if __name__ == "__main__":
    main()
