"""Masked against autoregressive: the same model learns one corpus both ways. What can each way do?

    python benchmarks/masked_lm.py --output benchmarks/results/NAME.json    # some minutes on two cores
    python benchmarks/masked_lm.py --text novel.txt --steps 2000
    python benchmarks/masked_lm.py --toy

The corpus is the questions and answers of `data/data.jsonl`, one pair a line, in characters; a tenth of the
lines is held out. All models begin with the same random weights, and have the same batches and settings.

- `autoregressive`: predicts each token from those before it. `--steps` steps.
- `masked`: 15 % of the tokens are hidden, and predicted from both sides. The same steps, so the same tokens.
- `masked, equal time`: goes on until it has had the processor time of `autoregressive`.

Then, on held-out lines: the loss and accuracy of each on its own task; one hidden character, filled by all;
two neighbouring ones, together and one after the other; and eight hidden characters in a row, written in one
step or in several (the most certain first), beside the autoregressive model. `known pairs` is the share of
neighbouring characters that stand next to each other anywhere in the training text: a judge that is neither
of the models. Time is processor time, which does not depend on what else the machine does. The last line is
JSON.
"""

import sys
from pathlib import Path

# run as a script: import minigpt from this checkout, and the other files of this folder
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import functools
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.turns import add_flags, finish, surroundings
from minigpt.console.terminal import table
from minigpt.data.reader import read_conversations
from minigpt.families.registry import LanguageModel, new_model
from minigpt.finetuning.masked_lm import both_ways, mask_token_id
from minigpt.generation.api import generate_ids
from minigpt.generation.options import GenerationOptions
from minigpt.model import GPTConfig
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.training.config import TrainConfig
from minigpt.training.finetune_config import FinetuneConfig
from minigpt.training.loop import Trainer
from minigpt.training.resolve import resolve
from minigpt.training.run_data import TextData, read_data
from minigpt.weights.pretrained import save_pretrained

SHAPE = {"n_layer": 3, "n_embd": 128, "n_head": 4}
TOY_SHAPE = {"n_layer": 1, "n_embd": 32, "n_head": 2}
SPAN = 8  # hidden characters in a row
CANDIDATES = 20  # that the autoregressive model compares for a gap
DATA = Path(__file__).resolve().parents[1] / "data" / "data.jsonl"


def main() -> None:
    """Train, measure, print the tables, the machine, and one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, help="a text, of which the last tenth of the lines is held out")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--block_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--gaps", type=int, default=300, help="held-out gaps of each kind")
    parser.add_argument("--seed", type=int, default=1)
    add_flags(parser)
    options = parser.parse_args()
    if options.toy:
        options.steps, options.gaps = 4, 5
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        numbers = measure(options, Path(folder))
    shown: list[tuple[str, ...]] = [
        (
            row["arm"],
            f"{row['tokens']:,}",
            f"{row['positions']:,}",
            f"{row['seconds']:.0f}",
            f"{row['loss']:.3f}",
            f"{row['accuracy']:.1%}",
        )
        for row in numbers["training"]
    ]
    columns = ("", "tokens read", "with a loss", "processor s", "held-out loss", "accuracy")
    table("learning, each measured on its own task", columns, shown, range(1, 6))
    shown = [(row["how"], f"{row['right']:.1%}", f"{row['milliseconds']:.1f}") for row in numbers["one gap"]]
    table("one hidden character", ("", "right", "processor ms"), shown, (1, 2))
    shown = [(row["how"], f"{row['right']:.1%}", f"{row['nats']:.2f}") for row in numbers["two gaps"]]
    table("two neighbouring hidden characters", ("", "both right", "nats for both"), shown, (1, 2))
    shown = [
        (row["how"], f"{row['right']:.1%}", f"{row['known_pairs']:.1%}", f"{row['milliseconds']:.1f}")
        for row in numbers["span"]
    ]
    table(f"{SPAN} hidden characters", ("", "right", "known pairs", "processor ms"), shown, (1, 2, 3))
    for line in numbers["examples"]:
        print("  " + "   ".join(f"{name}: {text}" for name, text in line.items()))
    finish(numbers, options.output)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train the models, and ask them."""
    train, val = corpus(options)
    (folder / "train.txt").write_text(train, encoding="utf-8")
    (folder / "val.txt").write_text(val, encoding="utf-8")
    tokenizer = Tokenizer.from_word2id(build_vocabulary([train, val]))
    torch.manual_seed(options.seed)
    size = tokenizer.get_vocab_size()
    shape: dict[str, Any] = TOY_SHAPE if options.toy else SHAPE
    config = GPTConfig(vocab_size=size, block_size=options.block_size, dropout=0.0, bias=True, **shape)
    save_pretrained(new_model(config), folder / "start", tokenizer)
    causal = trainer_of(options, folder, masked=False)
    hidden = trainer_of(options, folder, masked=True)
    rows = [trained("autoregressive", causal, lambda _: causal.progress.steps_done < options.steps)]
    rows.append(trained("masked", hidden, lambda _: hidden.progress.steps_done < options.steps))
    equal = ask(causal.model, hidden.model, hidden.data, val, train, options)
    spent, goal = rows[1]["seconds"], rows[0]["seconds"]
    last = 2 * options.steps  # the schedule is constant, so more steps change nothing before
    rows.append(
        trained(
            "masked, equal time",
            hidden,
            lambda seconds: spent + seconds < goal and hidden.progress.steps_done < last,
            before=spent,
            positions=rows[1]["positions"],
        )
    )
    longer = ask(causal.model, hidden.model, hidden.data, val, train, options)
    return {
        **surroundings("masked_lm", options.text or DATA, options.threads),
        "toy": options.toy,
        "characters": {"train": len(train), "val": len(val)},
        "vocabulary": size,
        "parameters": config.parameter_count(),
        "batch": {"tokens": options.batch_size * options.block_size, **counted(causal, hidden)},
        "gaps": options.gaps,
        "training": rows,
        **equal,
        "equal time": {name: longer[name] for name in ("one gap", "two gaps", "span")},
    }


def corpus(options: argparse.Namespace) -> tuple[str, str]:
    """Return the training text and the held-out one."""
    if options.text:
        lines = options.text.read_text(encoding="utf-8").splitlines(keepends=True)
    else:
        pairs, _ = read_conversations(DATA)
        lines = [f"{pair.question}{pair.answer}\n" for pair in pairs]
        np.random.default_rng(0).shuffle(lines)
    last = len(lines) * 9 // 10
    return "".join(lines[:last]), "".join(lines[last:])


def trainer_of(options: argparse.Namespace, folder: Path, masked: bool) -> Trainer:
    """Return a run from the common weights."""
    start = {"task": "mlm", "model": folder / "start"} if masked else {"init_from": folder / "start"}
    kind: type[TrainConfig] = FinetuneConfig if masked else TrainConfig
    given = {
        **start,
        "recipe": "finetune",
        "text": folder / "train.txt",
        "val_text": folder / "val.txt",
        "output": folder / ("masked" if masked else "causal"),
        "block_size": options.block_size,
        "batch_size": options.batch_size,
        "tokens_per_batch": 0,
        "max_steps": 2 * options.steps,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "constant",
        "precision": "float32",
        "device": "cpu",
        "threads": options.threads,
        "seed": options.seed,
        "report_to": "none",
    }
    config = resolve(given, kind)
    return Trainer(config, read_data(config))


def trained(
    arm: str,
    trainer: Trainer,
    goes_on: Callable[[float], bool],
    before: float = 0.0,
    positions: int = 0,
) -> dict[str, Any]:
    """Train while `goes_on(seconds)`. Returns the arm's row.

    Args:
        before: processor seconds that it has had.
        positions: targets that it has had.
    """
    seconds = 0.0
    while goes_on(seconds):
        for batch in trainer.step.batches(trainer.progress.steps_done):
            positions += trainer.step.loss.count(batch)
        began = time.process_time()
        trainer.step()
        seconds += time.process_time() - began
    trainer.step.read_metrics()
    data, model = trainer.data, trainer.model
    assert isinstance(data, TextData)
    report = trainer.evaluate()
    steps = trainer.progress.steps_done
    return {
        "arm": arm,
        "steps": steps,
        "tokens": trainer.progress.tokens_seen,
        "positions": positions,
        "seconds": round(before + seconds, 2),
        "loss": round(report.loss, 4),
        "accuracy": round(accuracy(trainer, model), 4),
    }


@torch.no_grad()
def accuracy(trainer: Trainer, model: LanguageModel) -> float:
    """Return the share of the held-out targets that the model finds most probable."""
    right = total = 0
    for batch in trainer.data.val.in_order(16):
        ids, targets, positions = trainer.step.loss.select(batch)
        assert ids is not None
        assert targets is not None
        is_masked = hasattr(trainer.step.loss, "hide")
        hidden = model.base_model(ids, both_ways(ids)) if is_masked else model.base_model(ids)
        hidden = hidden.flatten(0, 1)
        found = model.lm_head(hidden if positions is None else hidden[positions]).argmax(1)
        right, total = right + int((found == targets).sum()), total + len(targets)
    return right / total


def counted(causal: Trainer, hidden: Trainer) -> dict[str, int]:
    """Return how many positions of a batch carry a loss; the second batch, because the first may be short."""
    pairs = (("autoregressive", causal), ("masked", hidden))
    return {name: run.step.loss.count(run.step.batches(1)[0]) for name, run in pairs}


def _pieces(windows: Tensor, rows: int) -> Sequence[Tensor]:
    """Cut windows (N, T) into pieces of some rows, to save memory."""
    return torch.split(windows, rows)


# -- gaps --------------------------------------------------------------------------------------------------


class Gaps:
    """Held-out windows with hidden places, and both models.

    Args:
        val: the held-out text.
        train: the training text.
    """

    def __init__(
        self, causal: LanguageModel, hidden: LanguageModel, data: Any, val: str, train: str, options: Any
    ) -> None:
        self.causal, self.hidden, self.tokenizer = causal.eval(), hidden.eval(), data.tokenizer
        mask = mask_token_id(self.tokenizer)
        assert mask is not None
        self.mask, T = mask, options.block_size
        self.vocabulary = causal.config.vocab_size
        ids = self.tokenizer.encode_array(val).astype(np.int64)
        starts = np.linspace(0, len(ids) - T, options.gaps).astype(int)
        self.windows = torch.from_numpy(np.stack([ids[start : start + T] for start in starts]))  # (N, T)
        self.place = T // 2
        self.pairs = set(itertools.pairwise(self.tokenizer.encode_array(train).tolist()))

    @torch.no_grad()
    def masked(self, windows: Tensor) -> Tensor:
        """Log-probabilities of the masked model at all places, (N, T, V); those of [MASK] are left out."""
        found = [
            self.hidden(some, both_ways(some))[..., : self.vocabulary].float().log_softmax(-1)
            for some in _pieces(windows, 32)
        ]
        return torch.cat(found)

    @torch.no_grad()
    def behind(self, windows: Tensor) -> Tensor:
        """Log-probability of each token but the first under the autoregressive model, (N, T - 1)."""
        found = []
        for some in _pieces(windows, 64):
            logps = self.causal(some[:, :-1]).float().log_softmax(-1)
            found.append(logps.gather(2, some[:, 1:, None])[..., 0])
        return torch.cat(found)

    @torch.no_grad()
    def next_tokens(self, windows: Tensor) -> Tensor:
        """Log-probabilities of the token behind the windows, (N, V)."""
        return torch.cat([self.causal(some)[:, -1].float().log_softmax(-1) for some in _pieces(windows, 64)])

    def with_masks(self, *places: int) -> Tensor:
        """Return the windows with hidden places."""
        changed = self.windows.clone()
        changed[:, list(places)] = self.mask
        return changed

    def shown(self, window: Tensor, first: int, last: int) -> str:
        """Return a window as text, with brackets around a part."""
        parts = (window[first - 6 : first], window[first:last], window[last : last + 6])
        before, inside, after = (self.tokenizer.decode(part.tolist()).replace("\n", "/") for part in parts)
        return f"{before}[{inside}]{after}"


def ask(
    causal: LanguageModel, hidden: LanguageModel, data: Any, val: str, train: str, options: Any
) -> dict[str, Any]:
    """Fill gaps with both models."""
    gaps = Gaps(causal, hidden, data, val, train, options)
    spans, examples = span(gaps)
    return {"one gap": one_gap(gaps), "two gaps": two_gaps(gaps), "span": spans, "examples": examples}


def timed(function: Callable[[], Tensor], count: int) -> tuple[Tensor, float]:
    """Return what a function returns, and its processor time in milliseconds for each of `count` gaps."""
    began = time.process_time()
    found = function()
    return found, round(1000 * (time.process_time() - began) / count, 2)


def one_gap(gaps: Gaps) -> list[dict[str, Any]]:
    """One hidden character: the masked model, and the autoregressive one without and with what follows."""
    place, truth, n = gaps.place, gaps.windows[:, gaps.place], len(gaps.windows)

    def rescored() -> Tensor:
        left = gaps.next_tokens(gaps.windows[:, :place])
        candidates = left.topk(min(CANDIDATES, left.shape[1])).indices  # (N, k)
        k = candidates.shape[1]
        rows = gaps.windows.repeat_interleave(k, 0)  # (N * k, T)
        rows[:, place] = candidates.flatten()
        scores = gaps.behind(rows)[:, place - 1 :].sum(1).view(n, k)
        return candidates.gather(1, scores.argmax(1, keepdim=True))[:, 0]

    ways = {
        "masked: one pass": lambda: gaps.masked(gaps.with_masks(place))[:, place].argmax(1),
        "autoregressive: what stands before": lambda: gaps.next_tokens(gaps.windows[:, :place]).argmax(1),
        f"autoregressive: {CANDIDATES} candidates, each read to the end": rescored,
    }
    rows = []
    for how, way in ways.items():
        found, milliseconds = timed(way, n)
        right = float((found == truth).float().mean())
        rows.append({"how": how, "right": round(right, 4), "milliseconds": milliseconds})
    return rows


def two_gaps(gaps: Gaps) -> list[dict[str, Any]]:
    """Two neighbouring hidden characters: predicted together, and the second one after the first."""
    a, b = gaps.place, gaps.place + 1
    truth = gaps.windows[:, [a, b]]  # (N, 2)
    both = gaps.masked(gaps.with_masks(a, b))[:, [a, b]]  # (N, 2, V)
    together = both.argmax(2)
    nats = -both.gather(2, truth[..., None])[..., 0]  # (N, 2)
    # of the truth: the second one, while the first stands there
    known = gaps.masked(gaps.with_masks(b))[:, b].gather(1, truth[:, 1:])[:, 0]
    first = both.max(2).values.argmax(1)  # (N,): the one of which the model is surer
    rows, places = torch.arange(len(first)), torch.tensor([a, b])
    windows = gaps.with_masks(a, b)
    windows[rows, places[first]] = together[rows, first]
    again = gaps.masked(windows)[rows, places[1 - first]].argmax(1)
    in_turn = together.clone()
    in_turn[rows, 1 - first] = again

    def row(how: str, found: Tensor, cost: Tensor) -> dict[str, Any]:
        right = float((found == truth).all(1).float().mean())
        return {"how": how, "right": round(right, 4), "nats": round(float(cost.mean()), 4)}

    return [
        row("together: as if they were independent", together, nats.sum(1)),
        row("one after the other", in_turn, nats[:, 0] - known),
    ]


def span(gaps: Gaps) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Some hidden characters in a row, written by the masked model in 1 to SPAN passes, and by the other."""
    first = gaps.place - SPAN // 2
    last, n = first + SPAN, len(gaps.windows)
    truth = gaps.windows[:, first:last]

    def iterated(passes: int) -> Tensor:
        windows = gaps.with_masks(*range(first, last))
        for number in range(passes):
            logps = gaps.masked(windows)[:, first:last]  # (N, SPAN, V)
            sure, best = logps.max(2)
            is_hidden = windows[:, first:last] == gaps.mask
            # as many as must be known after this pass: the surest of the hidden ones
            count = math.ceil(SPAN * (number + 1) / passes) - math.ceil(SPAN * number / passes)
            chosen = sure.masked_fill(~is_hidden, -math.inf).topk(count).indices  # (N, count)
            windows[:, first:last] = windows[:, first:last].scatter(1, chosen, best.gather(1, chosen))
        return windows[:, first:last]

    def written() -> Tensor:
        options = GenerationOptions(max_new_tokens=SPAN)
        prompts = gaps.windows[:, :first].tolist()
        found = generate_ids(gaps.causal, prompts, options, None)
        return torch.tensor([one.ids[:SPAN] for one in found])

    ways: dict[str, Callable[[], Tensor]] = {
        f"masked: {passes} pass{'es' if passes > 1 else ''}": functools.partial(iterated, passes)
        for passes in (1, 2, 4, SPAN)
    }
    ways["autoregressive: what stands before"] = written
    rows, texts = list[dict[str, Any]](), {"text": truth}
    for how, way in ways.items():
        texts[how], milliseconds = timed(way, n)
        right = float((texts[how] == truth).float().mean())
        rows.append({"how": how, "right": round(right, 4), "milliseconds": milliseconds})
    for row in [*rows, {"how": "text"}]:
        filled = gaps.windows.clone()
        filled[:, first:last] = texts[row["how"]]
        row["known_pairs"] = round(known_pairs(gaps, filled[:, first - 1 : last + 1]), 4)
        if row["how"] == "text":
            rows.append({**row, "how": "the text itself", "right": 1.0, "milliseconds": 0.0})
    few = [0, n // 3, 2 * n // 3]
    examples = []
    for number in few:
        line = {}
        for how in ("text", "masked: 1 pass", f"masked: {SPAN} passes"):
            window = gaps.windows[number].clone()
            window[first:last] = texts[how][number]
            line[how] = gaps.shown(window, first, last)
        examples.append(line)
    return rows, examples


def known_pairs(gaps: Gaps, rows: Tensor) -> float:
    """Return the share of neighbouring tokens that are neighbours in the training text, too."""
    found: Sequence[bool] = [pair in gaps.pairs for row in rows.tolist() for pair in itertools.pairwise(row)]
    return sum(found) / len(found)


if __name__ == "__main__":
    main()
