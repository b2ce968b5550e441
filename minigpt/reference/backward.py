"""GPT-2's gradients in NumPy, written by hand: for each function f there is a function f_backward.

    loss, gradients = loss_and_gradients(params, ids, n_head=4)          # gradients: a tree like params

`f_backward(g, x, weights)` gets the arguments of f, and g: the gradient of the loss with respect to the
result of f. It returns the gradients with respect to x and to the weights. It computes the values inside f
again from x. So the forward pass keeps only the inputs of the blocks.

Only the chain rule is needed: if y = f(x), then dloss/dx = dloss/dy * f'(x).

The functions compute one sequence. The gradient of a batch is the mean over its sequences.

Letters in shapes: T tokens, C channels, H heads, D = C / H channels of a head, V entries of the vocabulary, N
positions.
"""

import math
from typing import Any

import numpy as np

from minigpt.reference.attention import Array, attend, softmax
from minigpt.reference.gpt2 import GELUS, attention_forward, block, layer_norm, linear
from minigpt.reference.loss import next_token_losses
from minigpt.reference.names import Tree

__all__ = ["loss_and_gradients"]


def linear_backward(g: Array, x: Array, weight: Array, bias: Array) -> tuple[Array, Tree]:
    """Gradients of y = x @ weight + bias, from g = dloss/dy (T, out) and x (T, in)."""
    # gradients with respect to x (T, in), weight (in, out) and bias (out,)
    return g @ weight.T, {"weight": x.T @ g, "bias": g.sum(axis=0)}


def layer_norm_backward(g: Array, x: Array, weight: Array, bias: Array) -> tuple[Array, Tree]:
    """Gradients of y = normed * weight + bias, normed = (x - mean) / deviation; g = dloss/dy and x (T, C)."""
    centred = x - x.mean(axis=-1, keepdims=True)  # (T, C)
    deviation = np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + 1e-5)  # (T, 1)
    normed = centred / deviation  # (T, C)
    d = g * weight  # (T, C): gradient with respect to normed
    # Adding a constant to x, or scaling x, does not change `normed`. So the gradient must be zero in these
    # two directions: the next line removes both parts from d.
    d = d - d.mean(axis=-1, keepdims=True) - normed * (d * normed).mean(axis=-1, keepdims=True)  # (T, C)
    return d / deviation, {"weight": (g * normed).sum(axis=0), "bias": g.sum(axis=0)}  # (T, C); (C,), (C,)


def gelu_tanh_backward(g: Array, x: Array) -> Array:
    """Gradient of y = x/2 (1 + tanh u) with u = c (x + 0.044715 x^3): g * y', where g is dloss/dy.

    y' = (1 + tanh u)/2 + x/2 (1 - tanh^2 u) u'
    """
    c = math.sqrt(2 / math.pi)
    t = np.tanh(c * (x + 0.044715 * (x * x * x)))
    return g * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * (x * x)))


def gelu_exact_backward(g: Array, x: Array) -> Array:
    """Gradient of y = x P(x): g (P(x) + x p(x)). P is the normal distribution function, p its density."""
    share = np.fromiter(
        (0.5 * math.erfc(-number) for number in (x * math.sqrt(0.5)).ravel().tolist()), x.dtype
    )
    density = np.exp(-0.5 * (x * x)) / math.sqrt(2 * math.pi)
    return g * (share.reshape(x.shape) + x * density)


GELUS_BACKWARD = {"tanh": gelu_tanh_backward, "exact": gelu_exact_backward}


def mlp_backward(g: Array, x: Array, c_fc: Tree, c_proj: Tree, gelu: str) -> tuple[Array, Tree]:
    """Gradients of y = linear(gelu(linear(x))); g = dloss/dy and x (T, C)."""
    u = linear(x, **c_fc)  # (T, 4C)
    d, of_proj = linear_backward(g, GELUS[gelu](u), **c_proj)  # (T, 4C)
    d, of_fc = linear_backward(GELUS_BACKWARD[gelu](d, u), x, **c_fc)  # (T, C)
    return d, {"c_fc": of_fc, "c_proj": of_proj}


def attend_backward(g: Array, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """Gradients of y = softmax(q k^T / sqrt(D)) v, causal, for q, k and v; g = dloss/dy; all (H, T, D)."""
    T, D = q.shape[1:]
    scores = q @ k.swapaxes(1, 2) / math.sqrt(D)  # (H, T, T)
    weights = softmax(np.where(np.tri(T, dtype=bool), scores, -math.inf))  # (H, T, T)
    d_weights = g @ v.swapaxes(1, 2)  # (H, T, T)
    # The weights of a row always sum to 1. So a gradient that is the same for all weights of a row has no
    # effect, and the subtraction removes it. A masked key has weight 0, so the product makes its gradient 0,
    # and the mask is not needed here.
    d_scores = weights * (d_weights - (d_weights * weights).sum(axis=-1, keepdims=True))  # (H, T, T)
    d_scores = d_scores / math.sqrt(D)
    return d_scores @ k, d_scores.swapaxes(1, 2) @ q, weights.swapaxes(1, 2) @ g  # (H, T, D) each


def attention_backward(g: Array, x: Array, c_attn: Tree, c_proj: Tree, n_head: int) -> tuple[Array, Tree]:
    """Gradients of y = linear(attend(heads of linear(x))); g = dloss/dy and x (T, C)."""
    T, C = x.shape
    q, k, v = linear(x, **c_attn).reshape(T, 3, n_head, C // n_head).transpose(1, 2, 0, 3)  # (H, T, D) each
    out = attend(q, k, v, np.arange(T))  # (T, C)
    d, of_proj = linear_backward(g, out, **c_proj)  # (T, C)
    d_heads = d.reshape(T, n_head, C // n_head).transpose(1, 0, 2)  # (T, H, D) -> (H, T, D)
    d_qkv = np.stack(attend_backward(d_heads, q, k, v))  # (3, H, T, D)
    d, of_attn = linear_backward(d_qkv.transpose(2, 0, 1, 3).reshape(T, 3 * C), x, **c_attn)  # (T, C)
    return d, {"c_attn": of_attn, "c_proj": of_proj}


def block_backward(
    g: Array, x: Array, ln_1: Tree, attn: Tree, ln_2: Tree, mlp: Tree, n_head: int, gelu: str
) -> tuple[Array, Tree]:
    """Gradients of y = m + mlp(ln_2(m)) with m = x + attention(ln_1(x)); g = dloss/dy and x (T, C).

    In the code, m is `middle`.
    """
    normed = layer_norm(x, **ln_1)  # (T, C)
    middle = x + attention_forward(normed, **attn, n_head=n_head, positions=np.arange(len(x)))[0]  # (T, C)
    d, of_mlp = mlp_backward(g, layer_norm(middle, **ln_2), **mlp, gelu=gelu)
    d, of_ln_2 = layer_norm_backward(d, middle, **ln_2)
    g = g + d  # (T, C): dloss/dmiddle; g comes through the residual stream, d through the MLP
    d, of_attn = attention_backward(g, normed, **attn, n_head=n_head)
    d, of_ln_1 = layer_norm_backward(d, x, **ln_1)
    return g + d, {"ln_1": of_ln_1, "attn": of_attn, "ln_2": of_ln_2, "mlp": of_mlp}


def next_token_losses_backward(logits: Array, targets: Array, mask: Array) -> Array:
    """Gradient of the loss with respect to the logits, (T, V) -> (T, V).

    The loss is the mean of -log softmax(logits)[target] over the positions whose mask is 1. The gradient is
    simple: the predicted probabilities minus the one-hot target, divided by the number of these positions.
    """
    g = softmax(logits)  # (T, V)
    g[np.arange(len(targets)), targets] -= 1
    return g * (mask / mask.sum())[:, None]


def loss_and_gradients(
    params: Tree, ids: Array, mask: Array | None = None, *, n_head: int, gelu: str = "tanh"
) -> tuple[float, dict[str, Any]]:
    """Return the mean loss in nats of predicting ids[1:] from ids[:-1], and the tree of its gradients.

    Args:
        params: the weights.
        ids: ids of the tokens, (T+1,).
        mask: (T,), 1 where the token of ids[1:] counts in the loss, else 0. Default: 1 everywhere.
        n_head: number of heads.
        gelu: "tanh" or "exact".
    """
    ids = np.asarray(ids)
    # (T,) each: the tokens that the model reads, and for each of them the next token
    given, targets = ids[:-1], ids[1:]
    wte, wpe, ln_f = params["wte"]["weight"], params["wpe"]["weight"], params["ln_f"]
    mask = np.ones(len(targets), wte.dtype) if mask is None else np.asarray(mask, wte.dtype)
    # forward pass
    positions = np.arange(len(given))
    inputs = [wte[given] + wpe[positions]]  # (T, C) each: inputs of the blocks and of ln_f
    for weights in params["h"]:
        inputs.append(block(inputs[-1], **weights, n_head=n_head, gelu=gelu, positions=positions)[0])
    hidden = layer_norm(inputs[-1], **ln_f)  # (T, C)
    logits = hidden @ wte.T  # (T, V)
    loss = float((next_token_losses(logits, targets) * mask).sum() / mask.sum())
    # backward pass
    g = next_token_losses_backward(logits, targets, mask)  # (T, V)
    d_wte = g.T @ hidden  # (V, C): the gradient that wte gets as the output matrix
    g, of_ln_f = layer_norm_backward(g @ wte, inputs[-1], **ln_f)  # (T, C)
    of_blocks: list[Tree] = []
    for weights, x in zip(reversed(params["h"]), reversed(inputs[:-1]), strict=True):
        g, of_block = block_backward(g, x, **weights, n_head=n_head, gelu=gelu)  # (T, C)
        of_blocks.insert(0, of_block)
    # Add the gradient that wte gets as the embedding. If a token occurs twice in `given`, np.add.at adds both
    # gradients; `d_wte[given] += g` would add only one.
    np.add.at(d_wte, given, g)
    d_wpe = np.zeros_like(wpe)  # (N, C)
    d_wpe[positions] = g
    return loss, {"wte": {"weight": d_wte}, "wpe": {"weight": d_wpe}, "h": of_blocks, "ln_f": of_ln_f}
