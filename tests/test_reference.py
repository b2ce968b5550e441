"""minigpt.reference alone: caches, compiled and batched twins, sampling, files, training."""

import functools
import importlib.util
import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.numpy

from minigpt.errors import InputError
from minigpt.reference import (
    attention,
    gpt2,
    names,
    qwen3,
    sampling,
    train_jax,
    train_numpy,
    transforms,
    weights,
)
from minigpt.storage.files import atomic_folder

ROOT = Path(__file__).parents[1]
needs_jax = pytest.mark.skipif(
    importlib.util.find_spec("jax") is None, reason='JAX is not installed: pip install "minigpt[jax]"'
)
FAMILIES = [pytest.param(gpt2, id="gpt2"), pytest.param(qwen3, id="qwen3")]
SETTINGS: dict[Any, dict[str, Any]] = {gpt2: {"n_head": 4}, qwen3: {"rope_theta": 1e4}}
SHAPES = {gpt2: gpt2.shapes(31, 24, 16, 2), qwen3: qwen3.shapes(31, 16, 20, 2, 4, 2, 6, False)}
V, N = 31, 24


@functools.cache
def random_tensors(family: Any) -> dict[str, Any]:
    """Return random float32 weights, so that a missing term changes the result."""
    rng = numpy.random.default_rng(1)
    return {
        name: (rng.normal(0, 0.4, shape) + ("norm" in name or "ln_" in name)).astype(numpy.float32)
        for name, shape in SHAPES[family].items()
    }


def random_params(family: Any) -> names.Tree:
    return names.tree(random_tensors(family))


def some_ids(T: int, seed: int = 2) -> list[int]:
    ids: list[int] = numpy.random.default_rng(seed).integers(0, V, T).tolist()
    return ids


def assert_close(actual: Any, expected: Any) -> None:
    """Compare in float32, with sums in another order; see tests/parity/test_reference_parity.py."""
    assert numpy.asarray(actual).dtype == numpy.float32
    numpy.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


# -- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("ids", "count", "message"),
    [
        ([], 1, "the prompt is empty"),
        ([-1], 1, r"at least 0 and below the vocabulary's size, 31: got -1"),
        ([3, 31], 1, r"at least 0 and below the vocabulary's size, 31: got 31"),
        ([3], -1, r"n_tokens_to_generate must be at least 0: got -1"),
    ],
)
def test_bad_prompts(family: Any, ids: list[int], count: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        family.generate(ids, random_params(family), **SETTINGS[family], n_tokens_to_generate=count)


def test_gpt2_ends_at_its_last_position() -> None:
    params = random_params(gpt2)
    assert len(gpt2.generate(some_ids(20), params, n_head=4, n_tokens_to_generate=4)) == 4
    with pytest.raises(
        InputError, match="24 positions: after a prompt of 20 tokens at most 4 new ones are possible, not 5"
    ):
        gpt2.generate(some_ids(20), params, n_head=4, n_tokens_to_generate=5)
    with pytest.raises(InputError, match="at most 0 new ones are possible"):
        gpt2.generate(some_ids(30), params, n_head=4, n_tokens_to_generate=5)


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": math.nan}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}]
)
def test_bad_sampling_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        gpt2.generate([1], random_params(gpt2), n_head=4, n_tokens_to_generate=1, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_must_be_the_model_s(family: Any) -> None:
    good = random_tensors(family)
    assert names.flat(family.params_from_names(good)).keys() == good.keys()
    prefix, layer = {gpt2: ("transformer.", "h"), qwen3: ("model.", "layers")}[family]
    prefixed = {(name if name == "lm_head.weight" else prefix + name): array for name, array in good.items()}
    assert names.flat(family.params_from_names(prefixed)).keys() == good.keys()
    first = next(name for name in good if name.startswith(f"{layer}.1."))
    without = {name: array for name, array in good.items() if name != first}
    with pytest.raises(InputError, match=f"missing: {first}"):
        family.params_from_names(without)
    with pytest.raises(InputError, match=r"unexpected: extra\.weight"):
        family.params_from_names({**good, "extra.weight": good[first]})
    with pytest.raises(InputError, match=rf"of the wrong shape: {first} is \(3,\), not \(16,\)"):
        family.params_from_names({**good, first: numpy.zeros(3)})
    with pytest.raises(InputError, match="twice"):
        family.params_from_names({**good, prefix + first: good[first]})
    with pytest.raises(InputError, match="these are not"):
        family.params_from_names({})
    hole = {name.replace(f"{layer}.1.", f"{layer}.3."): array for name, array in good.items()}
    with pytest.raises(InputError, match=rf"missing: {layer}\.1\."):
        family.params_from_names(hole)


def test_old_gpt2_files() -> None:
    good = random_tensors(gpt2)
    mask = {"h.0.attn.bias": numpy.tri(24)[None, None], "h.0.attn.masked_bias": numpy.array(-1e4)}
    head = {"lm_head.weight": good["wte.weight"].copy()}
    assert names.flat(gpt2.params_from_names({**good, **mask, **head})).keys() == good.keys()
    with pytest.raises(InputError, match=r"lm_head\.weight differs"):
        gpt2.params_from_names({**good, "lm_head.weight": good["wte.weight"] + 1})


GOOD_CONFIG: dict[Any, dict[str, Any]] = {
    gpt2: {"model_type": "gpt2", "n_head": 4, "n_embd": 16, "n_layer": 2, "vocab_size": V, "n_positions": N},
    qwen3: {
        "model_type": "qwen3",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "head_dim": 6,
        "rope_theta": 10000,
    },
}


@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        (gpt2, {"model_type": "llama"}),
        (gpt2, {"activation_function": "relu"}),
        (gpt2, {"activation_function": ["gelu"]}),
        (gpt2, {"layer_norm_epsilon": 1e-6}),
        (gpt2, {"scale_attn_by_inverse_layer_idx": True}),
        (gpt2, {"n_head": 0}),
        (gpt2, {"n_head": "4"}),
        (gpt2, {"n_head": 3}),
        (qwen3, {"model_type": "qwen2"}),
        (qwen3, {"hidden_act": "gelu"}),
        (qwen3, {"attention_bias": True}),
        (qwen3, {"use_sliding_window": True}),
        (qwen3, {"rope_scaling": {"type": "yarn"}}),
        (qwen3, {"rope_parameters": {"rope_type": "yarn"}}),
        (qwen3, {"rope_theta": -1}),
        (qwen3, {"rms_norm_eps": "1e-6"}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else value.__name__.rpartition(".")[2],
)
def test_configurations_of_other_models(family: Any, wrong: dict[str, Any]) -> None:
    family.settings(GOOD_CONFIG[family])
    with pytest.raises(InputError, match=next(iter(wrong))):
        family.settings({**GOOD_CONFIG[family], **wrong})


def test_both_ways_to_write_rope_theta() -> None:
    old = {"model_type": "qwen3", "rope_theta": 5000, "rope_scaling": None, "sliding_window": None}
    new = {"model_type": "qwen3", "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}}
    assert qwen3.settings(old) == qwen3.settings(new) == {"rope_theta": 5000.0, "eps": 1e-6}


def test_without_jax_the_rest_works_and_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)  # as if it were not installed
    message = r'pip install "minigpt\[jax\]"'

    def forward(ids: Any, params: Any, np: Any) -> Any:
        raise AssertionError("never compiled")

    for make in (transforms.compiled, transforms.batched, transforms.loss_and_gradients, transforms.decode):
        with pytest.raises(InputError, match=message):
            make(forward)
    with pytest.raises(InputError, match=message):
        train_jax.step(train_numpy.Options(text=tmp_path))
    assert len(gpt2.generate([1], random_params(gpt2), n_head=4, n_tokens_to_generate=3)) == 3


def test_no_torch_and_no_jax_is_loaded() -> None:
    modules = ", ".join(
        f"minigpt.reference.{path.stem}" for path in (ROOT / "minigpt/reference").glob("[a-z]*.py")
    )
    code = f"import sys, {modules}; print({{'torch', 'jax', 'transformers'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("set()\n", "")


# -- the model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_no_token_sees_a_later_one(family: Any) -> None:
    params, ids = random_params(family), some_ids(12)
    before = family.forward(ids, params, **SETTINGS[family])
    after = family.forward([*ids[:7], *some_ids(5, seed=9)], params, **SETTINGS[family])
    numpy.testing.assert_array_equal(before[:7], after[:7])
    assert (before[7:] != after[7:]).any(axis=1).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 1, 4, 1], [1, 11]], ids=str)
def test_the_cache_changes_nothing(family: Any, chunks: list[int]) -> None:
    params, ids, settings = random_params(family), some_ids(12), SETTINGS[family]
    expected = family.forward(ids, params, **settings)
    heads = {"n_head": 4} if family is gpt2 else {}
    cache = family.cache_for(params, 12, **heads)
    for end, chunk in zip(numpy.cumsum(chunks), chunks, strict=True):
        logits, cache = family.step(ids[end - chunk : end], cache, params, **settings)
        assert logits.shape == (V,)
        assert_close(logits, expected[end - 1])
        assert int(cache["length"]) == end


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_and_without_cache(family: Any) -> None:
    params, settings = random_params(family), SETTINGS[family]
    for seed in range(5):
        ids = some_ids(5, seed)
        cached = family.generate(ids, params, **settings, n_tokens_to_generate=15)
        assert cached == family.generate(ids, params, **settings, n_tokens_to_generate=15, use_cache=False)
        assert len(cached) == 15
        assert all(type(token) is int for token in cached)
        for n, token in enumerate(cached):  # each is the most likely one after what came before
            assert token == family.forward([*ids, *cached[:n]], params, **settings)[-1].argmax()
    assert family.generate([1], params, **settings, n_tokens_to_generate=0) == []


def test_the_end_token_stops() -> None:
    params = random_params(gpt2)
    free = gpt2.generate(some_ids(3), params, n_head=4, n_tokens_to_generate=10)
    end = free[4]
    expected = free[: free.index(end)]
    for eos in (end, [end], [V + 5, end]):
        assert (
            gpt2.generate(some_ids(3), params, n_head=4, n_tokens_to_generate=10, eos_token_id=eos)
            == expected
        )


def test_gelus() -> None:
    x = numpy.linspace(-6, 6, 1001)
    exact = numpy.array([number * 0.5 * math.erfc(-number / math.sqrt(2)) for number in x])
    numpy.testing.assert_allclose(gpt2.gelu_exact(x), exact, atol=1e-15)
    difference = numpy.abs(gpt2.gelu_tanh(x) - exact).max()
    assert 1e-4 < difference < 5e-4  # as the paper's approximation is
    assert gpt2.gelu_exact(x.astype(numpy.float32)).dtype == numpy.float32


def test_silu_does_not_overflow() -> None:
    x = numpy.array(
        [-1e4, -100, -1, 0, 1, 100, 1e4], numpy.float32
    )  # exp(1e4) would warn, which is an error here
    expected = [0, 0, -1 / (1 + math.e), 0, 1 / (1 + 1 / math.e), 100, 1e4]
    numpy.testing.assert_allclose(qwen3.silu(x), expected, rtol=1e-6, atol=1e-6)


def test_rotation_tells_only_the_distance() -> None:
    rng = numpy.random.default_rng(3)
    q, k = rng.normal(size=(1, 1, 8)), rng.normal(size=(1, 1, 8))

    def score(at_q: int, at_k: int) -> float:
        turned = [
            qwen3.rotate(x, *qwen3.rotation(numpy.array([at]), 8, 100.0, numpy.dtype("float64")))
            for x, at in ((q, at_q), (k, at_k))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), rel=1e-12)
    assert score(0, 0) == pytest.approx(float((q * k).sum()), rel=1e-12)
    assert score(9, 4) != pytest.approx(score(9, 5), rel=1e-3)


def test_grouped_heads_are_repeated_heads() -> None:
    rng = numpy.random.default_rng(4)
    q, k, v = rng.normal(size=(6, 5, 4)), rng.normal(size=(2, 5, 4)), rng.normal(size=(2, 5, 4))
    repeated = attention.attend(q, k.repeat(3, axis=0), v.repeat(3, axis=0), numpy.arange(5))
    numpy.testing.assert_allclose(attention.attend(q, k, v, numpy.arange(5)), repeated, rtol=1e-12)


def test_trees_go_there_and_back() -> None:
    for family in (gpt2, qwen3):
        tensors = random_tensors(family)
        assert names.flat(names.tree(tensors)).keys() == tensors.keys()
        assert all(names.flat(names.tree(tensors))[name] is array for name, array in tensors.items())


# -- JAX ---------------------------------------------------------------------------------------------------


@needs_jax
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_its_rows(family: Any) -> None:
    params, settings = random_params(family), SETTINGS[family]
    rows = numpy.array(
        [some_ids(9), some_ids(9, 5), [*some_ids(4, 6), *([0] * 5)]]
    )  # the last one right-padded
    logits = transforms.batched(family.forward, **settings)(rows, params)
    for row, of_row in zip(rows, logits, strict=True):
        assert_close(of_row, family.forward(row, params, **settings))
    assert_close(logits[2, :4], family.forward(rows[2, :4], params, **settings))


@needs_jax
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_generation_is_numpys(family: Any) -> None:
    import jax

    params, settings, ids = random_params(family), SETTINGS[family], some_ids(5)
    expected = family.generate(ids, params, **settings, n_tokens_to_generate=8)
    assert family.generate(ids, params, **settings, n_tokens_to_generate=8, np=jax.numpy) == expected
    sampled = [
        family.generate(
            ids, params, **settings, n_tokens_to_generate=8, rng=numpy.random.default_rng(3), np=np
        )
        for np in (numpy, jax.numpy)
    ]
    assert sampled[0] == sampled[1]
    if family is qwen3:
        return  # `decode` does not know which model it runs: one is enough, and compiling takes seconds
    cache = gpt2.cache_for(params, 13, n_head=4, np=jax.numpy)
    decode, key = transforms.decode(family.step, **settings), jax.random.key(0)
    run = functools.partial(decode, numpy.array(ids), cache, params, n_tokens_to_generate=8)
    assert run(key).tolist() == expected
    end = expected[3]
    cut = expected.index(end)
    assert run(key, eos_token_id=end).tolist() == expected[:cut] + [end] * (8 - cut)
    drawn = functools.partial(run, do_sample=True, top_k=20, top_p=0.99)
    first = drawn(key, temperature=2.0).tolist()
    assert first == drawn(key, temperature=2.0).tolist()
    assert first != drawn(jax.random.key(1), temperature=2.0).tolist()
    assert all(0 <= token < V for token in first)
    assert drawn(key, temperature=1e-3).tolist() == expected  # so cold that only the most likely one is left


@needs_jax
def test_a_function_is_compiled_once() -> None:
    assert transforms.compiled(gpt2.step, n_head=4) is transforms.compiled(gpt2.step, n_head=4)
    assert transforms.compiled(gpt2.step, n_head=4) is not transforms.compiled(gpt2.step, n_head=2)


@needs_jax
def test_sampling_in_jax_is_numpys() -> None:
    import jax

    rng = numpy.random.default_rng(7)
    for options in ((0.7, 5, 1.0), (1.3, 0, 0.8), (1.0, 3, 0.5)):
        logits = rng.normal(0, 2, 13).astype(numpy.float32)
        ours = sampling.filtered(logits, *options)
        theirs = sampling.filtered(jax.numpy.asarray(logits), *options, np=jax.numpy)
        numpy.testing.assert_allclose(theirs, ours, rtol=1e-6)
        for uniform in (0.0, 0.3, 0.999):
            assert sampling.sample(theirs, uniform, jax.numpy) == sampling.sample(ours, uniform)


# -- sampling ----------------------------------------------------------------------------------------------


def test_samples_come_as_often_as_they_should() -> None:
    logits = numpy.log(numpy.array([0.1, 0.0005, 0.5, 0.2, 0.1995]))
    n = 10_000
    drawn = [int(sampling.sample(logits, (i + 0.5) / n)) for i in range(n)]  # each number of a fine grid once
    counts = numpy.bincount(drawn, minlength=5) / n
    numpy.testing.assert_allclose(counts, [0.1, 0.0005, 0.5, 0.2, 0.1995], atol=1.01 / n)


def test_filters_against_their_definitions() -> None:
    rng = numpy.random.default_rng(8)
    for _ in range(50):
        logits = rng.normal(0, 2, 9).round(1)  # rounded: ties occur
        k, p = int(rng.integers(1, 9)), float(rng.uniform(0.05, 0.99))
        kept = numpy.isfinite(sampling.filtered(logits, top_k=k))
        lowest = sorted(logits)[-k]
        assert kept.tolist() == [number >= lowest for number in logits]
        kept = numpy.isfinite(sampling.filtered(logits, top_p=p))
        probabilities = attention.softmax(logits)
        assert probabilities[kept].sum() >= p - 1e-12  # enough, but for rounding
        assert (
            kept.sum() == 1 or probabilities[kept].sum() - probabilities[kept].min() < p + 1e-12
        )  # none too many
        assert probabilities[kept].min() >= probabilities[~kept].max(initial=0)  # the most likely ones
        assert kept[logits.argmax()] or (logits == logits.max()).sum() > 1
    numpy.testing.assert_array_equal(sampling.filtered(logits), logits)
    numpy.testing.assert_array_equal(sampling.filtered(logits, 0.5), logits * 2)
    assert numpy.isfinite(sampling.filtered(logits, top_p=1e-9)).sum() == 1


def test_what_is_filtered_out_is_never_drawn() -> None:
    logits = sampling.filtered(numpy.arange(6.0), top_k=2)
    ends = (0.0, 0.5, float(numpy.nextafter(1, 0)))
    assert {int(sampling.sample(logits, uniform)) for uniform in ends} == {4, 5}


def test_sampling_follows_its_generator() -> None:
    def run(seed: int, **options: Any) -> list[int]:
        rng = numpy.random.default_rng(seed)
        return gpt2.generate([1], random_params(gpt2), n_head=4, n_tokens_to_generate=20, rng=rng, **options)

    assert run(0) == run(0) != run(1)
    greedy = gpt2.generate([1], random_params(gpt2), n_head=4, n_tokens_to_generate=20)
    assert run(0, top_k=1) == run(0, temperature=1e-4) == run(0, top_p=1e-6) == greedy


# -- files -------------------------------------------------------------------------------------------------


def save(folder: Path, family: Any, tensors: dict[str, Any] | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    found = {numpy.str_(name).item(): array for name, array in (tensors or random_tensors(family)).items()}
    safetensors.numpy.save_file(found, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**GOOD_CONFIG[family], **config}))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_read(family: Any, tmp_path: Path) -> None:
    config, params = weights.load(save(tmp_path, family))
    assert config == GOOD_CONFIG[family]
    for name, array in names.flat(params).items():
        numpy.testing.assert_array_equal(array, random_tensors(family)[name])
        assert type(array) is numpy.ndarray
        assert not array.flags.writeable  # it is the file
    _, in_double = weights.load(tmp_path, dtype=numpy.float64)
    assert {array.dtype.name for array in names.flat(in_double).values()} == {"float64"}
    logits = family.forward([1, 2], in_double, **family.settings(config))
    assert logits.dtype == numpy.float64


def test_a_tied_head_that_is_written_twice(tmp_path: Path) -> None:
    _, params = weights.load(save(tmp_path, qwen3, tie_word_embeddings=True))
    assert "lm_head" not in params
    headless = {name: array for name, array in random_tensors(qwen3).items() if name != "lm_head.weight"}
    folder = save(tmp_path / "headless", qwen3, headless, tie_word_embeddings=False)
    with pytest.raises(InputError, match="tie_word_embeddings False, not True"):
        weights.load(folder)


def test_numbers_of_each_width(tmp_path: Path) -> None:
    values = [0.0, -0.0, 1.0, -1.5, 2.0**-10, 384.0]  # exact in each of them
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
    content = {kind: numpy.array(values, dtype).tobytes() for kind, dtype in kinds.items()}
    # bfloat16 is the upper half of a float32; little-endian: its bytes 2 and 3
    content["BF16"] = numpy.array(values, "<f4").view("<u2")[1::2].tobytes()
    header, place = {}, 0
    for kind, data in content.items():
        header[kind] = {"dtype": kind, "shape": [2, 3], "data_offsets": [place, place + len(data)]}
        place += len(data)
    header["empty"] = {"dtype": "F32", "shape": [0, 4], "data_offsets": [place, place]}
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(header, b"".join(content.values())))
    found = weights.read_safetensors(path)
    for kind in content:
        assert found[kind].dtype == ("float64" if kind == "F64" else "float32")
        assert found[kind].shape == (2, 3)
        assert found[kind].ravel().tolist() == values
        assert math.copysign(1, found[kind].ravel()[1]) == -1
    assert found["empty"].shape == (0, 4)


def file_of(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int = 0, stop: int = 8, dtype: Any = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, stop]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is too short"),
        (b"\x01\x00", "it is too short"),
        (struct.pack("<Q", 1000) + b"{}", "its header is longer than the file"),
        (struct.pack("<Q", 2**63) + b"{}", "its header is longer than the file"),
        (file_of(b"{broken", b""), "not a safetensors file"),
        (file_of(b"\xff\xfe", b""), "not a safetensors file"),
        (file_of(b"[" * 5000, b""), "not a safetensors file"),
        (file_of([], b""), "not a safetensors file"),
        (file_of({"a": 3}, b""), "not a safetensors file"),
        (file_of({"a": {"dtype": "F32"}}, b""), "not a safetensors file"),
        (file_of({"a": entry(dtype="I8", shape=[8])}, b"x" * 8), "a is I8"),
        (file_of({"a": entry(dtype=["F32"])}, b"x" * 8), "not a safetensors file"),
        (file_of({"a": entry(shape=[3])}, b"x" * 8), "are not those of F32"),
        (file_of({"a": entry(shape=[-1, -2])}, b"x" * 8), "that make sense"),
        (file_of({"a": entry(shape=[2.0])}, b"x" * 8), "that make sense"),
        (file_of({"a": entry(shape=[True, 2])}, b"x" * 8), "that make sense"),
        (file_of({"a": entry(8, 0, shape=[2])}, b"x" * 8), "bytes"),
        (file_of({"a": entry(8, 16)}, b"x" * 16), "are not those of F32"),
        (file_of({"a": entry(), "b": entry(4, 12)}, b"x" * 12), "the bytes of b are not"),
        (file_of({"a": entry(), "b": entry()}, b"x" * 8), "the bytes of b are not"),
        (file_of({"a": entry()}, b"x" * 7), "its tensors end at byte"),
        (file_of({"a": entry()}, b"x" * 9), "its tensors end at byte"),
        (file_of(b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), b"x" * 8), "comes twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)  # fmt: skip
def test_damaged_files(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        weights.read_safetensors(path)
    assert str(path) in str(error.value)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(
        {"a": numpy.ones(4, numpy.float32), "b": numpy.ones((2, 2), numpy.float32)}, path
    )
    content = path.read_bytes()
    assert set(weights.read_safetensors(path)) == {"a", "b"}
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match="damaged"):
            weights.read_safetensors(path)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        weights.load(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"config\.json is missing"):
        weights.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not JSON"):
        weights.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="must hold a JSON object"):
        weights.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match=r"config\.json: model_type must be gpt2, qwen3: got 'llama'"):
        weights.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_head": 0}')
    with pytest.raises(InputError, match=r"config\.json: n_head must be"):
        weights.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(GOOD_CONFIG[gpt2]))
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        weights.load(tmp_path)


@pytest.mark.parametrize(
    ("family", "key"),
    [
        (gpt2, "n_layer"),
        (gpt2, "vocab_size"),
        (gpt2, "n_positions"),
        (qwen3, "hidden_size"),
        (qwen3, "head_dim"),
    ],
)
def test_a_configuration_of_another_size(family: Any, key: str, tmp_path: Path) -> None:
    wrong: dict[str, Any] = {key: 3}
    folder = save(tmp_path, family, **wrong)
    with pytest.raises(InputError, match=f"another size: {key} 3, not"):
        weights.load(folder)


def test_weights_that_are_not_numbers(tmp_path: Path) -> None:
    spoilt = dict(random_tensors(gpt2))
    spoilt["ln_f.bias"] = numpy.array([math.nan] + [0.0] * 15, numpy.float32)
    with pytest.raises(InputError, match=r"ln_f\.bias holds NaN or infinity"):
        weights.load(save(tmp_path, gpt2, spoilt))


def shard(folder: Path) -> dict[str, str]:
    """Write GPT-2 in two files with an index. Return the index's map."""
    tensors = random_tensors(gpt2)
    places = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(places.values()):
        safetensors.numpy.save_file({n: tensors[n] for n in tensors if places[n] == file}, folder / file)
    (folder / "config.json").write_text(json.dumps(GOOD_CONFIG[gpt2]))
    write_index(folder, places)
    return places


def write_index(folder: Path, places: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_shards(tmp_path: Path) -> None:
    places = shard(tmp_path)
    _, params = weights.load(tmp_path)
    for name, array in names.flat(params).items():
        numpy.testing.assert_array_equal(array, random_tensors(gpt2)[name])
    for wrong, message in (
        (None, "weight_map must be an object"),
        ({**places, "wte.weight": "../part-0.safetensors"}, "in a .safetensors file beside it"),
        ({**places, "wte.weight": 3}, "in a .safetensors file beside it"),
        ({**places, "wte.weight": "part-1.safetensors"}, "do not agree on what it holds: wte.weight"),
        ({**places, "new": "part-1.safetensors"}, "do not agree on what it holds: new"),
        ({**places, "new": "part-2.safetensors"}, r"part-2.safetensors is missing"),
    ):
        write_index(tmp_path, wrong)
        with pytest.raises(InputError, match=message):
            weights.load(tmp_path)


def test_a_flipped_bit_is_noticed_where_there_is_a_manifest(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        save(folder, gpt2)

    goal = tmp_path / "model"
    atomic_folder(goal, write)
    weights.load(goal)
    path = goal / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="does not match its checksum"):
        weights.load(goal)


# -- training ----------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("春眠不觉晓，处处闻啼鸟。\n夜来风雨声，花落知多少？\n" * 20, encoding="utf-8")
    return path


SMALL = {"batch_size": 4, "block_size": 12, "n_embd": 16, "n_head": 2, "n_layer": 1, "learning_rate": 1e-2}


def test_numpy_learns(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train_numpy.main(train_numpy.Options(text=text, steps=60, sample=30, **SMALL))  # type: ignore[arg-type]
    losses = result["losses"]
    characters = len(set(text.read_text(encoding="utf-8")))
    assert losses[0] == pytest.approx(
        math.log(characters), abs=0.05
    )  # small first weights: nearly a uniform guess
    # A repeated poem can be memorised. The loss is far below that of guessing, for any random numbers.
    assert sum(losses[-5:]) / 5 < losses[0] / 2
    assert len(result["sample"]) == 30
    assert set(result["sample"]) <= set(text.read_text(encoding="utf-8"))
    printed = capsys.readouterr().out
    assert f"step     60  loss {losses[-1]:.4f}" in printed
    assert printed.endswith(result["sample"] + "\n")


@needs_jax
def test_jax_learns_the_same(text: Path) -> None:
    options = train_numpy.Options(text=text, steps=8, sample=4, **SMALL)  # type: ignore[arg-type]
    ours, theirs = train_numpy.main(options), train_jax.main(options)
    # float32: Adam divides by the root of squares, which makes of rounding noise a step of full size where a
    # gradient is nearly zero; hence loose, but each step's loss falls by ten times this
    numpy.testing.assert_allclose(theirs["losses"], ours["losses"], rtol=2e-3)
    assert theirs["losses"][-1] < theirs["losses"][0] - 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_head": 3}, "--n_head must divide --n_embd: got 3, 16"),
        ({"n_head": 0}, "--n_head must be at least 1: got 0"),
        ({"steps": 0}, "--steps must be at least 1: got 0"),
        ({"block_size": 1000}, "more than --block_size are needed"),
    ],
)
def test_training_options(text: Path, change: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train_numpy.main(train_numpy.Options(text=text, **{**SMALL, **change}))  # type: ignore[arg-type]


def test_a_text_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "gbk.txt").write_bytes("春眠不觉晓".encode("gbk"))
    with pytest.raises(InputError, match="is not UTF-8"):
        train_numpy.main(train_numpy.Options(text=tmp_path / "gbk.txt"))


def test_the_door_of_training(text: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "minigpt.reference.train_numpy",
        "--text",
        str(text),
        "--steps",
        "2",
        "--json",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout.splitlines()[-1])["losses"]) == 2
    done = subprocess.run(
        [*command[:-3], "--step", "2"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "did you mean '--steps'?" in done.stderr
