"""JAX transformations of the pure functions: compile them, differentiate them, run them on a batch.

    logits = compiled(gpt2.forward, n_head=12)(ids, params)                       # (T,) -> (T, V), compiled
    logits = batched(gpt2.forward, n_head=12)(ids, params)                        # (B, T) -> (B, T, V)
    loss, gradients = loss_and_gradients(gpt2.forward, n_head=12)(params, ids, mask)
    new_ids = decode(gpt2.step, n_head=12)(ids, cache, params, key, n_tokens_to_generate=20)

JAX is optional: pip install "minigpt[jax]". The functions of gpt2.py and qwen3.py run on JAX if they get
`np=jax.numpy`. Two things differ from NumPy: JAX arrays are float32 unless `jax.enable_x64(True)` is set, and
a compiled function is compiled again for each new shape.

Letters in shapes: B rows of the batch, T tokens, V entries of the vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

from minigpt.errors import InputError
from minigpt.reference import sampling
from minigpt.reference.attention import Array
from minigpt.reference.loss import next_token_losses
from minigpt.reference.names import Tree

__all__ = ["batch_loss", "batched", "compiled", "decode", "imported_jax", "loss_and_gradients"]


def imported_jax() -> Any:
    """Import JAX and return the module.

    Raises:
        InputError: if JAX is not installed; the message says how to install it.
    """
    try:
        import jax
    except ImportError:
        raise InputError('this needs JAX, which is optional: pip install "minigpt[jax]"') from None
    return jax


# functools.cache returns the same compiled function for the same arguments. Without it, jax.jit would compile
# at every call, because each functools.partial is a new function for jax.jit.
@functools.cache
def compiled(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """Compile a model's function with jax.jit.

    The `settings` are constants for the compiler, because some of them decide the shapes of arrays (n_head)
    or choose a function (gelu).
    """
    jax = imported_jax()
    return jax.jit(functools.partial(function, **settings, np=jax.numpy))  # type: ignore[no-any-return]


@functools.cache
def batched(forward: Callable[..., Any], **settings: Any) -> Callable[[Array, Tree], Array]:
    """Return a compiled function of a batch: ids (B, T), params -> logits (B, T, V).

    Padding at the end of a row needs no mask, because a token never attends to later ones.
    """
    jax = imported_jax()
    one = functools.partial(forward, **settings, np=jax.numpy)
    # in_axes=(0, None): `one` gets each row of ids, and always the same params
    return jax.jit(jax.vmap(one, in_axes=(0, None)))  # type: ignore[no-any-return]


def batch_loss(
    params: Tree, ids: Array, mask: Array, *, forward: Callable[..., Any], **settings: Any
) -> Array:
    """Return the mean loss in nats over the tokens whose mask is 1.

    Args:
        params: the weights.
        ids: ids of the tokens, (B, T+1).
        mask: (B, T), 1 where the token of ids[:, 1:] counts in the loss, 0 elsewhere, such as at padding.
        forward: `gpt2.forward` or `qwen3.forward`.
        settings: further arguments of `forward`.
    """
    jax = imported_jax()
    one = functools.partial(forward, **settings, np=jax.numpy)
    logits = jax.vmap(one, in_axes=(0, None))(ids[:, :-1], params)  # (B, T, V)
    losses = next_token_losses(logits, ids[:, 1:], jax.numpy)  # (B, T)
    return (losses * mask).sum() / mask.sum()


@functools.cache
def loss_and_gradients(
    forward: Callable[..., Any], **settings: Any
) -> Callable[[Tree, Array, Array], tuple[Array, Tree]]:
    """Return a compiled function: params, ids (B, T+1), mask (B, T) -> loss, tree of gradients."""
    jax = imported_jax()
    loss = functools.partial(batch_loss, forward=forward, **settings)
    return jax.jit(jax.value_and_grad(loss))  # type: ignore[no-any-return]


@functools.cache
def decode(step: Callable[..., Any], **settings: Any) -> Callable[..., Array]:
    """Return one compiled function that runs the whole generation loop. No Python runs between two tokens.

    The returned function takes: ids (T,), an empty cache with room for these ids and the new ones, params and
    jax.random.key(seed). It takes by keyword: n_tokens_to_generate, do_sample=False (the key is then
    ignored), temperature=1.0, top_k=0, top_p=1.0 and eos_token_id=-1. It returns n_tokens_to_generate ids;
    after an end token, all ids are end tokens. JAX compiles the function again if one of these changes: the
    number of ids, the size of the cache, n_tokens_to_generate, do_sample, top_k, top_p.
    """
    jax = imported_jax()
    np = jax.numpy

    @functools.partial(jax.jit, static_argnames=("n_tokens_to_generate", "do_sample", "top_k", "top_p"))
    def loop(
        ids: Array, cache: Any, params: Tree, key: Array, *, n_tokens_to_generate: int,
        do_sample: bool = False, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
        eos_token_id: int = -1,
    ) -> Array:  # fmt: skip
        def choose(logits: Array, count: Array) -> Array:
            if not do_sample:
                return sampling.greedy(logits, np).astype(np.int32)
            # fold_in makes a new key for each token, so each token gets its own random number
            uniform = jax.random.uniform(jax.random.fold_in(key, count))
            scores = sampling.filtered(logits, temperature, top_k, top_p, np)
            return sampling.sample(scores, uniform, np).astype(np.int32)

        def unfinished(state: Any) -> Array:
            count, written, _ = state
            return (count < n_tokens_to_generate) & (written[count - 1] != eos_token_id)

        def one_more(state: Any) -> Any:
            count, written, cache = state
            logits, cache = step(written[count - 1][None], cache, params, **settings, np=np)
            return count + 1, written.at[count].set(choose(logits, count)), cache

        logits, cache = step(ids, cache, params, **settings, np=np)
        written = np.full(n_tokens_to_generate, eos_token_id, np.int32)
        written = written.at[0].set(choose(logits, np.int32(0)))
        return jax.lax.while_loop(unfinished, one_more, (np.int32(1), written, cache))[1]

    return loop  # type: ignore[no-any-return]
