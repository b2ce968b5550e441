"""Compares the results of the same weights in minigpt's PyTorch, transformers, NumPy and JAX.

    python benchmarks/parity.py                    # tiny random shapes of both families; takes seconds
    python benchmarks/parity.py --gpt2_124m        # also GPT-2's 124M shape; 4 GiB of memory

Weights are random (nothing is downloaded). transformers draws them, so large that the logits have a usual
size. A difference is the largest over all entries and shapes: absolute, and relative to the largest entry of
the expected array. Gradients are those of every weight, for the mean loss of next-token prediction. The
script prints a table for the README and, last, one JSON object.
"""

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from minigpt.families.registry import FAMILIES
from minigpt.generation.cache import KeyValueCache
from minigpt.reference import backward, gpt2, qwen3, transforms
from minigpt.reference.names import flat

GPT2 = [  # n_embd, n_head, n_layer, vocab_size, n_positions
    (16, 2, 1, 29, 16),
    (32, 4, 2, 97, 24),
    (48, 3, 3, 50, 40),
    (64, 8, 2, 301, 33),
    (24, 1, 5, 64, 64),
]
GPT2_124M = (768, 12, 12, 50257, 1024)
QWEN3 = [  # hidden, heads, key/value heads, head_dim, layers, vocabulary, intermediate, rope_theta, tied
    (16, 2, 2, 8, 1, 29, 40, 10_000.0, True),
    (32, 4, 2, 16, 2, 97, 96, 1_000_000.0, True),
    (48, 6, 1, 8, 3, 50, 64, 10_000.0, False),
    (64, 8, 4, 8, 2, 301, 170, 500_000.0, False),
    (24, 3, 3, 16, 4, 64, 72, 1_000_000.0, True),
]


@dataclass
class Difference:
    """The largest difference so far."""

    absolute: float = 0.0
    relative: float = 0.0

    def add(self, got: Any, expected: Any) -> None:
        """Compare two arrays of equal shape. NaN counts as an infinite difference."""
        got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
        assert got.shape == expected.shape, (got.shape, expected.shape)
        off = np.abs(got - expected).max()
        off = float("inf") if np.isnan(off) else float(off)
        self.absolute = max(self.absolute, off)
        self.relative = max(self.relative, off / float(np.abs(expected).max()))


@dataclass
class Row:
    """A row of the table."""

    logits: Difference = field(default_factory=Difference)
    gradients: Difference | None = None

    def add_gradients(self, got: dict[str, Any], expected: dict[str, Any]) -> None:
        """Compare the gradients of all weights, relative to the largest entry of all of them."""
        self.gradients = self.gradients or Difference()
        assert got.keys() == expected.keys(), got.keys() ^ expected.keys()
        names = sorted(expected)
        joined = [np.concatenate([np.ravel(np.asarray(d[name])) for name in names]) for d in (got, expected)]
        self.gradients.add(*joined)


def oracle(family: str, shape: tuple[Any, ...], dtype: torch.dtype, scale: float) -> Any:
    """Make a model of transformers with random weights."""
    if family == "gpt2":
        C, H, L, V, N = shape
        config = transformers.GPT2Config(
            n_embd=C, n_head=H, n_layer=L, vocab_size=V, n_positions=N, initializer_range=scale,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model: Any = transformers.GPT2LMHeadModel(config)
    else:
        C, H, G, D, L, V, inner, theta, tied = shape
        config = transformers.Qwen3Config(
            hidden_size=C, num_attention_heads=H, num_key_value_heads=G, head_dim=D, num_hidden_layers=L,
            vocab_size=V, intermediate_size=inner, max_position_embeddings=64, initializer_range=scale,
            rope_parameters={"rope_type": "default", "rope_theta": theta}, tie_word_embeddings=tied,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        model = transformers.Qwen3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or ".ln_" in name or name.endswith("bias"):  # these are otherwise all ones or zeros
            torch.nn.init.normal_(parameter, 0.0 if name.endswith("bias") else 1.0, 0.1)
    return model.to(dtype).eval()


def loss_gradients(model: Any, logits: Callable[[Any], Tensor], ids: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the mean loss, under the model's own names."""
    model.zero_grad()
    F.cross_entropy(logits(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(
    family: str,
    shape: tuple[Any, ...],
    dtype: torch.dtype,
    rows: dict[str, Row],
    scale: float,
    T: int,
    B: int,
) -> float:
    """Add one shape to the table. Returns its largest logit."""
    theirs = oracle(family, shape, dtype, scale)
    names = FAMILIES[family]
    values = json.loads(theirs.config.to_json_string(use_diff=False))
    config = names.config_from_hugging_face(values)
    tensors = dict(theirs.state_dict())
    if getattr(config, "tie_word_embeddings", True):
        tensors.pop("lm_head.weight")  # a copy of the embedding
    ours = names.on_meta(config)
    names.load_state(ours, names.from_hugging_face(tensors, config, dtype), assign=True)
    ours.eval()
    reference: Any = gpt2 if family == "gpt2" else qwen3
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    params = reference.params_from_names(arrays)
    settings = reference.settings(values)

    ids = torch.randint(config.vocab_size, (B, T + 1))
    given = ids[:, :-1]
    with torch.no_grad():
        expected = theirs(given).logits  # (B, T, V)
        got = ours(given)  # (B, T, V)
    rows["transformers"].logits.add(got, expected)
    for row in range(B):
        rows["NumPy"].logits.add(reference.forward(given[row].numpy(), params, **settings), got[row])
    own = names.from_hugging_face(loss_gradients(theirs, lambda x: theirs(x).logits, ids), config, dtype)
    gradients = loss_gradients(ours, ours, ids)
    rows["transformers"].add_gradients(gradients, own)
    if family == "gpt2":
        each = [backward.loss_and_gradients(params, row.numpy(), **settings)[1] for row in ids]
        rows["NumPy"].add_gradients(_named(names, _mean(each), config, dtype), gradients)

    with jax.enable_x64(dtype == torch.float64):
        tree = jax.tree.map(jax.numpy.asarray, params)
        for row in range(B):
            plain = reference.forward(given[row].numpy(), tree, **settings, np=jax.numpy)
            rows["JAX"].logits.add(plain, got[row])
        rows["JAX, jit and vmap"].logits.add(
            transforms.batched(reference.forward, **settings)(given.numpy(), tree), got
        )
        mask = np.ones((B, T), arrays[next(iter(arrays))].dtype)
        _, by_jax = transforms.loss_and_gradients(reference.forward, **settings)(tree, ids.numpy(), mask)
        rows["JAX, jit and vmap"].add_gradients(_named(names, flat(by_jax), config, dtype), gradients)

    with torch.no_grad():
        cache = KeyValueCache(config, B, T, dtype=dtype)
        steps = [ours(given[:, t : t + 1], past_key_values=cache.view(range(B))) for t in range(T)]
        rows[ROWS[4]].logits.add(torch.cat(steps, dim=1), got)
        lengths = [T - row * (T // (2 * B)) for row in range(B)]
        padded = torch.zeros(B, T, dtype=torch.int64)
        real = torch.zeros(B, T, dtype=torch.bool)
        for row, length in enumerate(lengths):
            padded[row, T - length :], real[row, T - length :] = given[row, :length], True
        places = (real.long().cumsum(-1) - 1).clamp(min=0)
        batch = ours(padded, attention_mask=real, position_ids=places)
        for row, length in enumerate(lengths):
            alone = ours(given[row : row + 1, :length])[0]
            rows[ROWS[5]].logits.add(batch[row, T - length :], alone)
    return float(expected.abs().max())


def _mean(trees: list[Any]) -> dict[str, Any]:
    flats = [flat(tree) for tree in trees]
    return {name: np.mean([one[name] for one in flats], axis=0) for name in flats[0]}


def _named(names: Any, arrays: dict[str, Any], config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Return the gradients of a reference under minigpt's names, transposed as there."""
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    return dict(names.from_hugging_face(tensors, config, dtype))


ROWS = (
    "transformers",
    "NumPy",
    "JAX",
    "JAX, jit and vmap",
    "itself token by token, with a cache",
    "itself row by row, not in a padded batch",
)


def measure(
    family: str, shapes: list[tuple[Any, ...]], dtype: torch.dtype, scale: float, T: int, B: int
) -> dict[str, Any]:
    """Print one table, and return it for the JSON line."""
    rows = {name: Row() for name in ROWS}
    largest = max(compare(family, shape, dtype, rows, scale, T, B) for shape in shapes)
    kind = str(dtype).removeprefix("torch.")
    what = f"{len(shapes)} random shapes" if len(shapes) > 1 else "the 124M shape"
    print(f"\n{family}, {what}, {kind}; logits up to {largest:.1f}\n")
    print("| minigpt and | logits: absolute | relative | gradients: absolute | relative |")
    print("|---|---|---|---|---|")
    for name, row in rows.items():
        cells = [d for d in (row.logits, row.gradients) if d]
        texts = [f"{number:.1e}" for d in cells for number in (d.absolute, d.relative)]
        print(f"| {' | '.join([name, *texts, *[''] * (4 - len(texts))])} |")
    return {
        "family": family, "shapes": shapes, "dtype": kind, "largest_logit": largest,
        "rows": {
            name: {"logits": vars(row.logits), "gradients": row.gradients and vars(row.gradients)}
            for name, row in rows.items()
        },
    }  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpt2_124m", action="store_true", help="GPT-2's 124M shape too; 4 GiB of memory")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    tables = [
        measure(family, shapes, dtype, 0.2, 16, 3)
        for dtype in (torch.float32, torch.float64)
        for family, shapes in (("gpt2", GPT2), ("qwen3", QWEN3))
    ]
    if options.gpt2_124m:
        tables.append(measure("gpt2", [GPT2_124M], torch.float32, 0.02, 64, 2))
    versions = {module.__name__: module.__version__ for module in (torch, transformers, jax, np)}
    print()
    print(
        json.dumps(
            {"tables": tables, "versions": versions, "machine": platform.processor() or platform.machine()}
        )
    )


if __name__ == "__main__":
    main()
