"""Train a tiny GPT on a text with only NumPy. The gradients (`backward.py`) and Adam are written by hand.

    python -m minigpt.reference.train_numpy --text poems.txt --steps 300

Each character of the text is a token. The script prints losses and a sample. The first loss is about the log
of the vocabulary size, because the model still guesses at random. The script is for study; use `minigpt
train` for real training. `minigpt.reference.train_jax` does the same with JAX, which computes the gradients
itself.

Letters in shapes: B rows of the batch, T tokens of a row.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from minigpt.console import command_line
from minigpt.errors import InputError, printable
from minigpt.reference import gpt2, names
from minigpt.reference.adam import adam, adam_state
from minigpt.reference.backward import loss_and_gradients
from minigpt.storage.regular_files import read_text

__all__ = ["Options", "initial_weights", "main", "random_batch", "train"]


@dataclass(frozen=True, kw_only=True)
class Options(command_line.CommandOptions):
    """Train a tiny GPT on a text, with one token per character."""

    text: Path
    """text file in UTF-8"""
    steps: int = 300
    """number of steps"""
    batch_size: int = 8
    """number of rows in a batch"""
    block_size: int = 32
    """number of tokens in a row; the model sees at most this many"""
    n_embd: int = 64
    """width of the model: numbers in the vector of a token"""
    n_head: int = 4
    """number of attention heads"""
    n_layer: int = 2
    """number of blocks"""
    learning_rate: float = 3e-3
    """first learning rate; it falls to a tenth along a cosine"""
    seed: int = 0
    """seed of weights, batches and sample; the same seed gives the same run"""
    sample: int = 200
    """number of characters to generate at the end"""


def initial_weights(rng: numpy.random.Generator, shapes: dict[str, tuple[int, ...]]) -> names.Tree:
    """Make the initial weights as GPT-2 does: normal(0, 0.02); biases are 0, weights of norms are 1.

    A matrix whose output is added to the residual stream gets a smaller standard deviation than 0.02, because
    the stream is the sum of the outputs of all blocks.
    """
    n_layer = names.layer_count(shapes, "h.")
    arrays = {}
    for name, shape in shapes.items():
        scale = 0.02 / math.sqrt(2 * n_layer) if name.endswith("c_proj.weight") else 0.02
        drawn = rng.normal(0, scale, shape) if len(shape) == 2 else numpy.full(shape, "ln_" in name)
        arrays[name] = drawn.astype(numpy.float32)
        if name.endswith(".bias"):
            arrays[name] = numpy.zeros(shape, numpy.float32)
    return names.tree(arrays)


def random_batch(rng: numpy.random.Generator, ids: Any, B: int, T: int) -> Any:
    """Return B pieces of the text, (B, T+1): T tokens to read, and the token after each of them."""
    starts = rng.integers(0, len(ids) - T, B)  # (B,)
    return ids[starts[:, None] + numpy.arange(T + 1)]  # (B, T+1)


def batch_loss_and_gradients(params: names.Tree, batch: Any, n_head: int) -> tuple[float, names.Tree]:
    """Return loss and gradients, as means over the rows of a batch (B, T+1)."""
    losses, gradients = zip(*(loss_and_gradients(params, row, n_head=n_head) for row in batch), strict=True)
    return sum(losses) / len(batch), names.map_tree(lambda *rows: sum(rows) / len(batch), *gradients)


Step = Callable[[names.Tree, Any, dict[str, Any], float], tuple[float, names.Tree, dict[str, Any]]]


def step(options: Options) -> Step:
    """Return a function for one step: (params, batch, Adam's state, learning rate) -> loss, params, state."""

    def one(params: names.Tree, batch: Any, state: dict[str, Any], rate: float) -> Any:
        loss, gradients = batch_loss_and_gradients(params, batch, options.n_head)
        return loss, *adam(params, gradients, state, rate)

    return one


def train(options: Options, step: Step, ids: Any, V: int) -> Iterator[tuple[float, names.Tree]]:
    """Yield the loss before each step and the weights after it."""
    rng = numpy.random.default_rng(options.seed)
    shapes = gpt2.shapes(V, options.block_size, options.n_embd, options.n_layer)
    params = initial_weights(rng, shapes)
    state = adam_state(params)
    for number in range(options.steps):
        rate = options.learning_rate * (0.55 + 0.45 * math.cos(math.pi * number / options.steps))
        batch = random_batch(rng, ids, options.batch_size, options.block_size)  # (B, T+1)
        loss, params, state = step(params, batch, state, rate)
        yield float(loss), params


def main(options: Options, make_step: Callable[[Options], Step] = step) -> dict[str, Any]:
    """Read the text, train, and print losses and a sample."""
    for name in ("steps", "batch_size", "block_size", "n_embd", "n_head", "n_layer"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} must be at least 1: got {getattr(options, name)}")
    if options.n_embd % options.n_head:
        raise InputError(f"--n_head must divide --n_embd: got {options.n_head}, {options.n_embd}")
    try:
        text = read_text(options.text)
    except UnicodeDecodeError:
        raise InputError(f"{options.text} is not UTF-8") from None
    if len(text) <= options.block_size:
        raise InputError(f"{options.text} has {len(text)} characters: more than --block_size are needed")
    characters = sorted(set(text))
    index = {character: number for number, character in enumerate(characters)}
    ids = numpy.array([index[character] for character in text])
    print(f"{len(text):,} characters, {len(characters):,} different ones")
    losses, params = [], names.tree({})
    for loss, params in train(options, make_step(options), ids, len(characters)):  # noqa: B007 -- used below
        losses.append(loss)
        number = len(losses)
        if number % max(1, options.steps // 10) == 0 or number == 1:
            print(f"step {number:6}  loss {loss:.4f}", flush=True)
    params = names.map_tree(numpy.asarray, params)
    written = [index.get("\n", 0)]
    rng = numpy.random.default_rng(options.seed)
    # The model has block_size positions. When all of them are used, generation starts again with only the
    # last block_size / 2 tokens as its prompt.
    while len(written) <= options.sample:
        context = written[-max(1, options.block_size // 2) :]
        count = min(options.block_size - len(context), options.sample + 1 - len(written))
        if count < 1:
            break
        written += gpt2.generate(
            context, params, n_head=options.n_head, n_tokens_to_generate=count, rng=rng, temperature=0.8
        )
    sample = "".join(characters[i] for i in written[1:])
    print("\n".join(map(printable, sample.split("\n"))))
    return {"losses": losses, "sample": sample}


if __name__ == "__main__":
    command_line.run(Options, main)
