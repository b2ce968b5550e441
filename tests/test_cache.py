"""The cache: reading in pieces gives what reading at once gives, in memory that was taken once."""

import pytest
import torch
from torch import Tensor

from minigpt.errors import InputError
from minigpt.families.qwen3.model import Qwen3Config
from minigpt.generation.api import GenerationOptions, generate_ids, generate_output
from minigpt.generation.cache import KeyValueCache, cache_bytes
from minigpt.generation.quantized_cache import QuantizedCache, quantized_bytes
from minigpt.model import GPTConfig, GPTLMHeadModel, eager_attention

CONFIG = GPTConfig(n_embd=24, n_head=3, n_layer=2, block_size=16, vocab_size=40, dropout=0.0)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Joined:
    """The slow twin: concatenates."""

    def __init__(self) -> None:
        self.length = 0
        self.held: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.held:
            old_k, old_v = self.held[layer]
            k, v = torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2)
        self.held[layer] = (k, v)
        return k, v

    def advance(self, tokens: int) -> None:
        self.length += tokens


@pytest.mark.parametrize("pieces", [[10], [1] * 10, [3, 1, 4, 2], [9, 1]])
@torch.inference_mode()
def test_reading_in_pieces_is_reading_at_once(pieces: list[int]) -> None:
    torch.manual_seed(0)
    model = GPTLMHeadModel(CONFIG).double().eval()
    ids = torch.randint(40, (3, 10), generator=torch.Generator().manual_seed(1))
    cache = KeyValueCache(CONFIG, batch_size=3, max_length=10, dtype=torch.float64)
    logits = torch.cat(
        [model(piece, past_key_values=cache) for piece in torch.split(ids, pieces, dim=1)], dim=1
    )
    assert cache.length == 10
    # the same sums in double precision, in another order: some hundred roundings of 1e-16
    torch.testing.assert_close(logits, model(ids), rtol=0, atol=1e-13)


@torch.inference_mode()
def test_it_equals_its_slow_twin_while_rows_leave() -> None:
    cache, twin = KeyValueCache(CONFIG, batch_size=6, max_length=12), Joined()
    rows = 6
    for turn, (T, keep) in enumerate([(4, [0, 5, 2, 3]), (1, [3, 1, 0]), (2, [0, 1, 2]), (1, [1]), (3, [0])]):
        for layer in range(CONFIG.n_layer):
            k, v = (numbers(rows, 3, T, 8, seed=10 * turn + 2 * layer + i) for i in (0, 1))
            for ours, theirs in zip(cache.update(layer, k, v), twin.update(layer, k, v)):
                assert torch.equal(ours, theirs)
        cache.advance(T)
        twin.advance(T)
        cache.select(torch.tensor(keep))
        twin.held = {layer: (k[keep], v[keep]) for layer, (k, v) in twin.held.items()}
        rows = len(keep)
        assert (cache.rows, cache.length) == (rows, twin.length)


def test_memory_is_taken_once() -> None:
    cache = KeyValueCache(CONFIG, batch_size=5, max_length=12)
    # keys and values x layers x rows x heads x tokens x channels of a head x bytes of a float32
    assert cache.bytes == 2 * 2 * 5 * 3 * 12 * 8 * 4
    first, _ = cache.update(1, numbers(5, 3, 2, 8), numbers(5, 3, 2, 8))
    cache.advance(2)
    second, _ = cache.update(1, numbers(5, 3, 1, 8), numbers(5, 3, 1, 8))
    assert first.data_ptr() == second.data_ptr()  # a view of the same memory, not a copy
    assert second.shape == (5, 3, 3, 8)


def test_overflow_is_an_error_with_both_numbers() -> None:
    cache = KeyValueCache(CONFIG, batch_size=2, max_length=7)
    cache.update(0, numbers(2, 3, 5, 8), numbers(2, 3, 5, 8))
    cache.advance(5)
    with pytest.raises(InputError, match=r"room for 7 tokens: got 5 \+ 3 = 8"):
        cache.update(0, numbers(2, 3, 3, 8), numbers(2, 3, 3, 8))
    assert cache.length == 5
    cache.update(0, numbers(2, 3, 2, 8), numbers(2, 3, 2, 8))  # as much as there is room for


def test_rows_must_be_the_batch_s() -> None:
    cache = KeyValueCache(CONFIG, batch_size=4, max_length=7)
    with pytest.raises(InputError, match="holds 4 rows: got keys of 1"):  # broadcasting would hide it
        cache.update(0, numbers(1, 3, 2, 8), numbers(1, 3, 2, 8))


def test_forgetting_the_last_tokens() -> None:
    cache = KeyValueCache(CONFIG, batch_size=2, max_length=7)
    k, v = numbers(2, 3, 5, 8), numbers(2, 3, 5, 8, seed=1)
    cache.update(0, k, v)
    cache.advance(5)
    cache.truncate(3)
    held, _ = cache.update(0, k[:, :, :2], v[:, :, :2])
    assert torch.equal(held, torch.cat([k[:, :, :3], k[:, :, :2]], dim=2))
    for length in (-1, 4):
        with pytest.raises(InputError, match=f"the cache holds 3 tokens: cannot keep {length}"):
            cache.truncate(length)


# -- int8 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, Qwen3Config(40, 24, 40, 2, 4, 2, 64)])
def test_whole_numbers_take_about_a_quarter(config: GPTConfig | Qwen3Config) -> None:
    exact, rounded = KeyValueCache(config, 3, 10), QuantizedCache(config, 3, 10)
    assert exact.bytes == cache_bytes(config, 3, 10)
    assert rounded.bytes == quantized_bytes(config, 3, 10)
    # a byte instead of four for each number, and four more for each head's vector
    assert rounded.bytes / exact.bytes == 1 / 4 + 1 / config.head_dim


def test_whole_numbers_are_off_by_half_a_step_and_attention_by_as_much_as_that_explains() -> None:
    D = 8
    exact, rounded = KeyValueCache(CONFIG, 3, 12), QuantizedCache(CONFIG, 3, 12)
    sizes = torch.tensor([1e-6, 1.0, 1e3, 0.0])[:, None]  # one token's outlier costs no other precision
    found = {}
    for layer in range(2):
        k, v = (numbers(3, 3, 4, D, seed=layer + i) * sizes for i in (0, 10))
        for name, cache in (("exact", exact), ("rounded", rounded)):
            found[name] = cache.update(layer, k, v)
    for cache in (exact, rounded):
        cache.advance(4)
    k, v = numbers(3, 3, 2, D, seed=20), numbers(3, 3, 2, D, seed=21)
    found = {name: cache.update(1, k, v) for name, cache in (("exact", exact), ("rounded", rounded))}
    off = []
    for true, near in zip(found["exact"], found["rounded"]):
        half_step = true.abs().amax(dim=-1, keepdim=True) / 254
        # 1e-5: the scale, the quotient and the product are rounded to 24 bits, of 127 steps
        assert bool(((near - true).abs() <= half_step * (1 + 1e-5 * 254)).all())
        off.append(half_step * (1 + 1e-5 * 254))
    q = numbers(3, 3, 2, D, seed=22)
    visible = torch.ones(2, 6, dtype=torch.bool)
    true, weights = eager_attention(q, *found["exact"], visible)
    near, _ = eager_attention(q, *found["rounded"], visible)
    # A score is off by at most sum|q| * off(k) / sqrt(D) =: d. A weight's factor lies then between exp(-2 d)
    # and exp(2 d), d the largest of the row; the output is off by what the weights are, plus off(v).
    d = (q.abs().sum(-1, keepdim=True) * off[0].mT / D**0.5).amax(-1, keepdim=True)  # (B, H, T, 1)
    largest = found["exact"][1].abs().amax(-1, keepdim=True).amax(-2, keepdim=True)
    bound = (torch.exp(2 * d) - 1) * largest + (weights @ off[1]) * torch.exp(2 * d) + 1e-5 * largest
    assert bool(((near - true).abs() <= bound).all())


@torch.inference_mode()
def test_in_whole_numbers_too_reading_in_pieces_is_reading_at_once() -> None:
    torch.manual_seed(0)
    model = GPTLMHeadModel(CONFIG).double().eval()
    ids = torch.randint(40, (3, 10), generator=torch.Generator().manual_seed(1))
    logits = []
    for pieces in ([10], [3, 1, 4, 2]):
        cache = QuantizedCache(CONFIG, 3, 10, dtype=torch.float64)
        found = [model(piece, past_key_values=cache) for piece in torch.split(ids, pieces, dim=1)]
        logits.append(torch.cat(found, dim=1))
    # double precision, in another order: about 1e-16, where that does not turn a rounding to whole numbers
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-12)
    # and of the exact ones it is not far: weights of 0.02 make small scores, where 1 % of a value is little
    torch.testing.assert_close(logits[0], model(ids), rtol=0, atol=0.02 * float(model(ids).abs().max()))


def test_generation_with_whole_numbers() -> None:
    torch.manual_seed(0)
    model = GPTLMHeadModel(CONFIG).eval()
    prompts = [[3, 4, 5], [6], [7, 8, 9, 3, 4, 5]]
    plain = GenerationOptions(max_new_tokens=8)
    rounded = GenerationOptions(max_new_tokens=8, cache_implementation="quantized")
    together = generate_ids(model, prompts, rounded, 2)
    assert together == [generate_ids(model, [prompt], rounded, 2)[0] for prompt in prompts]
    # shown to be in use: the logits differ, a little
    mine, theirs = (
        generate_output(
            model, [[3, 4]],
            GenerationOptions(max_new_tokens=4, output_logits=True, cache_implementation=kind), None,
        ).logits
        for kind in (plain.cache_implementation, rounded.cache_implementation)
    )  # fmt: skip
    assert mine is not None
    assert theirs is not None
    assert not torch.equal(mine[1], theirs[1])


def test_memory_that_is_not_allowed_is_not_taken() -> None:
    model = GPTLMHeadModel(GPTConfig(n_embd=512, n_head=8, n_layer=1, block_size=1024, vocab_size=40))
    prompts = [[3]] * 10
    # keys and values x layers x rows x tokens (1 + 499 new, the last never read) x channels x 4 bytes / 2**20
    needed = 2 * 1 * 10 * 499 * 512 * 4 / 2**20 + 2 * 10 * 512 * 4 / 2**20
    options = GenerationOptions(max_new_tokens=500, max_cache_mib=19)
    with pytest.raises(
        InputError, match=f"max_cache_mib=19 is too little: .*500 tokens takes {needed:.2f} MiB"
    ):
        generate_ids(model, prompts, options, None)
    with pytest.raises(InputError, match=r"max_cache_mib must be from 1e-06 to .*: got max_cache_mib=0"):
        GenerationOptions(max_cache_mib=0)
    with pytest.raises(InputError, match="cache_implementation must be one of static, quantized: got"):
        GenerationOptions(cache_implementation="offloaded")  # type: ignore[arg-type]
    small = GenerationOptions(max_new_tokens=5, max_cache_mib=0.2)
    assert len(generate_ids(model, [[3]], small, None)[0].ids) == 5
