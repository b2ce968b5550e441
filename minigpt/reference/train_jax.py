"""Train a tiny GPT on a text with JAX, which computes the gradients from the forward pass.

    pip install "minigpt[jax]"
    python -m minigpt.reference.train_jax --text poems.txt --steps 1000

jax.vmap runs the functions of `gpt2.py` on a batch, jax.value_and_grad computes the gradients, jax.jit
compiles a step. Text, initial weights, batches, Adam and output are the same as in `train_numpy.py`. So with
the same seed, this script and `train_numpy.py` print the same losses, up to rounding.
"""

from typing import Any

from minigpt.console import command_line
from minigpt.reference import gpt2
from minigpt.reference.adam import adam
from minigpt.reference.names import Tree
from minigpt.reference.train_numpy import Options, Step
from minigpt.reference.train_numpy import main as train_and_sample
from minigpt.reference.transforms import batch_loss, imported_jax

__all__ = ["main", "step"]


def step(options: Options) -> Step:
    """Return a compiled function for one step: (params, batch, Adam's state, rate) -> loss, params, state."""
    jax = imported_jax()

    @jax.jit  # type: ignore[untyped-decorator]
    def one(params: Tree, batch: Any, state: dict[str, Any], rate: float) -> Any:
        def loss_of(params: Tree) -> Any:
            every_token = jax.numpy.ones_like(batch[:, 1:])  # (B, T)
            return batch_loss(params, batch, every_token, forward=gpt2.forward, n_head=options.n_head)

        loss, gradients = jax.value_and_grad(loss_of)(params)
        return loss, *adam(params, gradients, state, rate)

    return one  # type: ignore[no-any-return]


def main(options: Options) -> dict[str, Any]:
    """Train on the text, and print losses and a sample."""
    return train_and_sample(options, step)


if __name__ == "__main__":
    command_line.run(Options, main)
