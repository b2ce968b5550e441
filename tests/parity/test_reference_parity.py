"""minigpt.reference compared with its oracles: it gives transformers' logits and torch's gradients.

Both are compared in double precision, which shows a missing term, and in float32, which users have. The tests
run with NumPy, and with JAX if it is installed.
"""

import contextlib
import copy
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch.nn import functional as F

from minigpt.families.gpt2.family import FAMILY
from minigpt.generation import sampling as torch_sampling
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.reference import backward, gpt2, names, qwen3, sampling, weights
from minigpt.reference.adam import adam, adam_state
from minigpt.tokenizer import Tokenizer
from minigpt.weights.pretrained import save_pretrained

transformers = pytest.importorskip("transformers", reason="transformers, the oracle here, is not installed")
needs_jax = pytest.mark.skipif(
    importlib.util.find_spec("jax") is None,
    reason='JAX is not installed: pip install "minigpt[jax]"',
)

GPT2_SHAPES = [  # n_embd, n_head, n_layer, n_positions, vocab_size
    (8, 1, 1, 4, 11),
    (16, 4, 2, 16, 29),
    (24, 3, 3, 7, 50),
    (32, 2, 1, 33, 5),
    (20, 5, 2, 12, 101),
]
QWEN3_SHAPES = [  # hidden_size, intermediate_size, layers, heads, key_value_heads, head_dim, vocab_size, tied
    (8, 12, 1, 1, 1, 4, 11, True),
    (16, 20, 2, 4, 2, 6, 29, False),  # head_dim * heads is not hidden_size, as in Qwen3-0.6B
    (24, 40, 3, 6, 2, 8, 50, True),
    (12, 8, 1, 4, 1, 2, 7, False),
    (20, 32, 2, 2, 2, 16, 101, True),
]
GELUS = {"tanh": "gelu_new", "exact": "gelu"}


def assert_close(actual: Any, expected: Any, dtype: Any) -> None:
    """Sums in another order, some hundred terms each.

    A sum of n terms is off by at most n ulp of the sum of their sizes, and in practice by about the root of
    that: 1e-13 in double precision, 1e-5 in single, for logits up to ten. The bounds leave a factor for the
    layers that follow each other, and would still see a missing 1e-5 under a root.
    """
    bound = {"float64": 1e-10, "float32": 1e-4}[numpy.dtype(dtype).name]
    expected = expected.detach().numpy() if isinstance(expected, torch.Tensor) else numpy.asarray(expected)
    actual = numpy.asarray(actual)
    assert actual.shape == expected.shape
    assert actual.dtype == dtype
    assert numpy.abs(actual - expected).max() <= bound * max(1, numpy.abs(expected).max())


def random_weights(model: torch.nn.Module) -> None:
    """Set all weights, biases and norms to random values, so that a missing term changes the result."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


@functools.cache
def gpt2_oracle(shape: tuple[int, ...], gelu: str = "tanh") -> Any:
    n_embd, n_head, n_layer, n_positions, vocab_size = shape
    config = GPTConfig(n_embd, n_head, n_layer, 0.0, n_positions, vocab_size, True, gelu)  # type: ignore[arg-type]
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**FAMILY.config_to_hugging_face(config), attn_implementation="eager")
    )
    random_weights(theirs.double().eval())
    return theirs


@functools.cache
def qwen3_oracle(shape: tuple[Any, ...]) -> Any:
    hidden, intermediate, layers, heads, key_value_heads, head_dim, vocab_size, tied = shape
    theirs = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            head_dim=head_dim,
            vocab_size=vocab_size,
            tie_word_embeddings=tied,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,  # not the default: that it is read shows too
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            attn_implementation="eager",
        )
    )
    random_weights(theirs.double().eval())
    return theirs


def arrays(model: Any, dtype: Any = "float64") -> dict[str, Any]:
    return {name: tensor.detach().numpy().astype(dtype) for name, tensor in model.state_dict().items()}


@pytest.fixture
def qwen3_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers' Qwen3 compute norms, angles and softmax in float64 instead of float32."""
    module = transformers.models.qwen3.modeling_qwen3
    double = {name: getattr(torch, name) for name in dir(torch)}
    double |= {"float32": torch.float64, "float": torch.float64}
    monkeypatch.setattr(module, "torch", SimpleNamespace(**double))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def with_exact_angles(model: Any) -> Any:
    """Replace the RoPE frequencies, which transformers computed in float32, by exact ones."""
    rotary = model.model.rotary_emb
    D = model.config.head_dim
    rotary.inv_freq = 1 / 1e6 ** (torch.arange(0, D, 2, dtype=torch.float64) / D)
    return model


def some_ids(V: int, T: int, seed: int = 4) -> Any:
    return numpy.random.default_rng(seed).integers(0, V, T)


@contextlib.contextmanager
def double_precision() -> Iterator[Any]:
    """Return JAX with float64 switched on."""
    import jax

    with jax.enable_x64(True):
        yield jax


# ------------------------------------------------------------------------------------------------- logits


@pytest.mark.parametrize("gelu", GELUS)
@pytest.mark.parametrize("shape", GPT2_SHAPES, ids=str)
def test_gpt2_logits(shape: tuple[int, ...], gelu: str) -> None:
    theirs = gpt2_oracle(shape, gelu)
    settings = gpt2.settings(theirs.config.to_dict())
    assert settings == {"n_head": shape[1], "gelu": gelu}
    ids = some_ids(shape[4], shape[3])
    expected = theirs(torch.tensor(ids)[None]).logits[0]
    for dtype in ("float64", "float32"):
        params = gpt2.params_from_names(arrays(theirs, dtype))
        assert_close(gpt2.forward(ids, params, **settings), expected, dtype)


@pytest.mark.parametrize("shape", QWEN3_SHAPES, ids=str)
def test_qwen3_logits_in_single_precision(shape: tuple[Any, ...]) -> None:
    theirs = qwen3_oracle(shape)
    settings = qwen3.settings(theirs.config.to_dict())
    assert settings == {"rope_theta": 1e6, "eps": 1e-5}
    ids = some_ids(shape[6], 20)
    params = qwen3.params_from_names(arrays(theirs, "float32"))
    assert ("lm_head" in params) == (not shape[7]) or numpy.array_equal(
        params["lm_head"]["weight"], params["embed_tokens"]["weight"]
    )
    expected = theirs(torch.tensor(ids)[None]).logits[0]
    assert_close(qwen3.forward(ids, params, **settings), expected, "float32")


@pytest.mark.usefixtures("qwen3_in_double")
@pytest.mark.parametrize("shape", QWEN3_SHAPES, ids=str)
def test_qwen3_logits_in_double_precision(shape: tuple[Any, ...]) -> None:
    theirs = with_exact_angles(qwen3_oracle(shape))
    ids = some_ids(shape[6], 20)
    expected = theirs(torch.tensor(ids)[None]).logits[0]
    assert expected.dtype == torch.float64
    params = qwen3.params_from_names(arrays(theirs))
    assert_close(qwen3.forward(ids, params, rope_theta=1e6, eps=1e-5), expected, "float64")


@needs_jax
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    ("family", "shape"),
    [(gpt2, GPT2_SHAPES[1]), (qwen3, QWEN3_SHAPES[1]), (gpt2, GPT2_SHAPES[4]), (qwen3, QWEN3_SHAPES[0])],
    ids=["gpt2-1", "qwen3-1", "gpt2-4", "qwen3-0"],
)
def test_jax_computes_what_numpy_does(family: Any, shape: tuple[Any, ...], dtype: str) -> None:
    from minigpt.reference.transforms import compiled

    theirs = gpt2_oracle(shape) if family is gpt2 else qwen3_oracle(shape)
    params, settings = (
        family.params_from_names(arrays(theirs, dtype)),
        family.settings(theirs.config.to_dict()),
    )
    ids = some_ids(theirs.config.vocab_size, 9)
    expected = family.forward(ids, params, **settings)
    with double_precision() if dtype == "float64" else contextlib.nullcontext():
        assert_close(compiled(family.forward, **settings)(ids, params), expected, dtype)
        if shape in (GPT2_SHAPES[1], QWEN3_SHAPES[1]):
            import jax

            on_jax = jax.tree.map(jax.numpy.asarray, params)
            assert_close(family.forward(ids, on_jax, **settings, np=jax.numpy), expected, dtype)


def test_greedy_generation_is_transformers() -> None:
    for family, theirs in ((gpt2, gpt2_oracle(GPT2_SHAPES[3])), (qwen3, qwen3_oracle(QWEN3_SHAPES[2]))):
        params = family.params_from_names(arrays(theirs))
        ids = some_ids(theirs.config.vocab_size, 4).tolist()
        new = family.generate(
            ids, params, **family.settings(theirs.config.to_dict()), n_tokens_to_generate=12
        )
        expected = theirs.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, 4, dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        assert new == expected[0, 4:].tolist()


# ---------------------------------------------------------------------------------------------- gradients


def relative(actual: Any, expected: Any) -> float:
    """Return the largest difference of a tree's arrays, each relative to the array's largest number."""
    there = names.flat(expected)
    here = names.flat(actual)
    assert here.keys() == there.keys()
    pairs = [(numpy.asarray(here[name]), numpy.asarray(array)) for name, array in there.items()]
    return max(float(numpy.abs(a - b).max() / max(numpy.abs(b).max(), 1e-6)) for a, b in pairs)


def torch_gradients(theirs: Any, ids: Any, mask: Any, prefix: str) -> tuple[float, Any]:
    """Return torch's mean loss where the mask is 1, and its gradients; ids (B, T+1), mask (B, T)."""
    theirs.zero_grad()
    ids, mask = torch.tensor(ids), torch.tensor(mask)
    losses = F.cross_entropy(theirs(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    loss = (losses * mask.flatten()).sum() / mask.sum()
    loss.backward()
    return loss.item(), names.tree(
        {name.removeprefix(prefix): parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    )


@pytest.mark.parametrize("gelu", GELUS)
@pytest.mark.parametrize("shape", GPT2_SHAPES, ids=str)
def test_numpy_gradients_are_torchs(shape: tuple[int, ...], gelu: str) -> None:
    theirs = gpt2_oracle(shape, gelu)
    ids = some_ids(shape[4], shape[3] + 1)
    ids[-1] = ids[0]  # a token that comes twice, as is usual
    mask = numpy.arange(shape[3]) > 0  # the first is not to be learned
    loss, expected = torch_gradients(theirs, ids[None], mask[None].astype(float), "transformer.")
    for dtype, bound in (("float64", 1e-10), ("float32", 1e-4)):
        params = gpt2.params_from_names(arrays(theirs, dtype))
        ours, gradients = backward.loss_and_gradients(params, ids, mask, n_head=shape[1], gelu=gelu)
        assert ours == pytest.approx(loss, rel=bound)
        assert {array.dtype.name for array in names.flat(gradients).values()} == {dtype}
        # The keys' bias has no gradient at all (softmax does not see it); in c_attn.bias it is rounding noise
        # beside those of the queries and values, as which it is measured.
        assert relative(gradients, expected) <= bound


@needs_jax
def test_jax_gradients_are_torchs_and_numpys() -> None:
    from minigpt.reference.transforms import loss_and_gradients

    shape = GPT2_SHAPES[1]
    theirs = gpt2_oracle(shape)
    batch = some_ids(29, 27).reshape(3, 9)
    mask = (numpy.arange(8) < numpy.array([[8], [5], [2]])).astype(float)  # right padding of two rows
    loss, expected = torch_gradients(theirs, batch, mask, "transformer.")
    params = gpt2.params_from_names(arrays(theirs))
    with double_precision():
        ours, gradients = loss_and_gradients(gpt2.forward, n_head=shape[1])(params, batch, mask)
        assert float(ours) == pytest.approx(loss, rel=1e-12)
        assert relative(gradients, expected) <= 1e-10
        # the content of padding has no influence
        batch[1, 6:], batch[2, 3:] = 7, 8
        again, _ = loss_and_gradients(gpt2.forward, n_head=shape[1])(params, batch, mask)
        assert float(again) == pytest.approx(loss, rel=1e-12)
        row = loss_and_gradients(gpt2.forward, n_head=shape[1])(params, batch[1:2], mask[1:2])
    numpys = backward.loss_and_gradients(params, batch[1], mask[1], n_head=shape[1])
    assert float(row[0]) == pytest.approx(numpys[0], rel=1e-12)
    assert relative(numpys[1], row[1]) <= 1e-10


@needs_jax
@pytest.mark.usefixtures("qwen3_in_double")
def test_jax_gradients_of_qwen3_are_torchs() -> None:
    from minigpt.reference.transforms import loss_and_gradients

    shape = QWEN3_SHAPES[1]
    theirs = with_exact_angles(qwen3_oracle(shape))
    batch, mask = some_ids(29, 18).reshape(2, 9), numpy.ones((2, 8))
    loss, expected = torch_gradients(theirs, batch, mask, "model.")
    with double_precision():
        params = qwen3.params_from_names(arrays(theirs))
        ours, gradients = loss_and_gradients(qwen3.forward, rope_theta=1e6, eps=1e-5)(params, batch, mask)
        assert float(ours) == pytest.approx(loss, rel=1e-12)
        assert relative(gradients, expected) <= 1e-10


@needs_jax
def test_the_exact_gelu_in_jax() -> None:
    x = numpy.linspace(-5, 5, 101)
    with double_precision() as jax:
        value, gradient = jax.vmap(jax.value_and_grad(lambda x: gpt2.gelu_exact(x, jax.numpy)))(x)
        assert_close(value, gpt2.gelu_exact(x), "float64")
        assert_close(gradient, backward.gelu_exact_backward(numpy.ones_like(x), x), "float64")


def test_adam_is_torchs() -> None:
    rng = numpy.random.default_rng(5)
    start = {"a": {"w": rng.normal(size=(3, 4))}, "b": [rng.normal(size=5)]}
    leaves = [torch.nn.Parameter(torch.tensor(array)) for array in names.flat(start).values()]
    theirs = torch.optim.Adam(leaves, lr=0.01, betas=(0.9, 0.99), eps=1e-8)
    params, state = start, adam_state(start)
    for _ in range(5):
        gradients = names.map_tree(lambda p: rng.normal(size=p.shape), start)
        for leaf, gradient in zip(leaves, names.flat(gradients).values(), strict=True):
            leaf.grad = torch.tensor(gradient)
        theirs.step()
        params, state = adam(params, gradients, state, 0.01)
    for leaf, array in zip(leaves, names.flat(params).values(), strict=True):
        numpy.testing.assert_allclose(array, leaf.detach().numpy(), rtol=1e-12)  # a handful of operations


# --------------------------------------------------------------------------------------------- directories


@pytest.mark.parametrize(("bias", "gelu"), [(False, "exact"), (True, "tanh"), (False, "tanh")])
def test_our_own_checkpoints(bias: bool, gelu: Any, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_word2id(
        {word: i for i, word in enumerate(["<pad>", "<unk>", "<sep>", *"你好吗我"])}
    )
    model = GPTLMHeadModel(GPTConfig(16, 2, 2, 0.1, 12, 7, bias, gelu)).eval()
    random_weights(model)
    save_pretrained(model, tmp_path, tokenizer)
    config, params = weights.load(tmp_path)
    assert config["minigpt_bias"] == bias
    ids = some_ids(7, 12)
    expected = model(torch.tensor(ids)[None])[0]
    assert_close(gpt2.forward(ids, params, **gpt2.settings(config)), expected, "float32")
    _, in_double = weights.load(tmp_path, dtype=numpy.float64)
    expected = model.double()(torch.tensor(ids)[None])[0]
    assert_close(gpt2.forward(ids, in_double, **gpt2.settings(config)), expected, "float64")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("limit", ["1GB", "4KB"], ids=["one file", "sharded"])
def test_folders_that_transformers_wrote(dtype: torch.dtype, limit: str, tmp_path: Path) -> None:
    for family, theirs in ((gpt2, gpt2_oracle(GPT2_SHAPES[1])), (qwen3, qwen3_oracle(QWEN3_SHAPES[1]))):
        narrow = copy.deepcopy(theirs).to(dtype)
        folder = tmp_path / family.__name__
        narrow.save_pretrained(folder, max_shard_size=limit)
        assert (folder / "model.safetensors.index.json").exists() == (limit == "4KB")
        config, params = weights.load(folder)
        width = "float64" if dtype == torch.float64 else "float32"
        prefix = {gpt2: "transformer.", qwen3: "model."}[family]
        expected = {name.removeprefix(prefix): p.detach() for name, p in narrow.named_parameters()}
        found = names.flat(params)
        assert found.keys() == expected.keys()
        for name, array in found.items():  # each half-precision number is a float32 too: to the bit
            numpy.testing.assert_array_equal(array, expected[name].to(getattr(torch, width)).numpy())
            assert array.dtype == width
        assert len(family.generate([3, 1], params, **family.settings(config), n_tokens_to_generate=3)) == 3


# ------------------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize(
    "options", [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.8), (0.5, 7, 0.6), (1.0, 99, 0.01)]
)
def test_sampling_is_the_torch_room_s(options: tuple[float, int, float]) -> None:
    rng = numpy.random.default_rng(6)
    for _ in range(20):
        logits = rng.normal(0, 3, 13)
        theirs = torch_sampling.filtered(torch.tensor(logits)[None], *options)
        ours = sampling.filtered(logits, *options)
        numpy.testing.assert_array_equal(ours, theirs[0].numpy())
        uniform = rng.random()
        assert int(sampling.sample(ours, uniform)) == int(
            torch_sampling.sample(theirs, torch.tensor([uniform], dtype=torch.float64))
        )
