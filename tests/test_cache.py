"""The cache: reading in pieces gives the same result as reading at once, in memory that is allocated once."""

from typing import Any

import pytest
import torch
from torch import Tensor

from minigpt.errors import InputError
from minigpt.generation.api import GenerationOptions, generate_ids
from minigpt.generation.cache import KeyValueCache, cache_bytes
from minigpt.model import GPTConfig, GPTLMHeadModel

CONFIG = GPTConfig(n_embd=24, n_head=3, n_layer=2, block_size=16, vocab_size=40, dropout=0.0)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Joined:
    """The slow twin of the cache, which concatenates tensors."""

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


@pytest.mark.parametrize("slots", [[1, 2, 3], [4, 0, 2]])  # side by side, or not
@pytest.mark.parametrize("pieces", [[10], [1] * 10, [3, 1, 4, 2], [9, 1]])
@torch.inference_mode()
def test_reading_in_pieces_is_reading_at_once(pieces: list[int], slots: list[int]) -> None:
    torch.manual_seed(0)
    model = GPTLMHeadModel(CONFIG).double().eval()
    ids = torch.randint(40, (3, 10), generator=torch.Generator().manual_seed(1))
    cache = KeyValueCache(CONFIG, slots=5, max_length=10, dtype=torch.float64)
    logits = torch.cat(
        [
            model(piece, past_key_values=cache.view(slots, [piece.shape[1]] * 3))
            for piece in torch.split(ids, pieces, dim=1)
        ],
        dim=1,
    )
    assert [cache.length(slot) for slot in slots] == [10] * 3
    # the same sums in double precision, in another order: some hundred roundings of 1e-16
    torch.testing.assert_close(logits, model(ids), rtol=0, atol=1e-13)


@torch.inference_mode()
def test_it_equals_its_slow_twin_while_rows_change_places() -> None:
    cache, twin = KeyValueCache(CONFIG, slots=6, max_length=12), Joined()
    rows = 6
    for turn, (T, keep) in enumerate([(4, [0, 5, 2, 3]), (1, [3, 1, 0]), (2, [0, 0, 2]), (1, [1]), (3, [0])]):
        view = cache.view(range(rows), [T] * rows)
        for layer in range(CONFIG.n_layer):
            k, v = (numbers(rows, 3, T, 8, seed=10 * turn + 2 * layer + i) for i in (0, 1))
            for ours, theirs in zip(view.update(layer, k, v), twin.update(layer, k, v)):
                assert torch.equal(ours, theirs)
        view.advance(T)
        twin.advance(T)
        cache.copy(keep, range(len(keep)))
        twin.held = {layer: (k[keep], v[keep]) for layer, (k, v) in twin.held.items()}
        rows = len(keep)
        assert [cache.length(slot) for slot in range(rows)] == [twin.length] * rows


@torch.inference_mode()
def test_copies_of_unlike_lengths_take_their_lengths_along() -> None:
    cache = KeyValueCache(CONFIG, slots=3, max_length=5)
    for slot, T in ((0, 4), (1, 2)):
        view = cache.view([slot], [T])
        for layer in range(2):
            view.update(layer, numbers(1, 3, T, 8, seed=slot), numbers(1, 3, T, 8, seed=9))
        view.advance(T)
    before = [[half.clone() for half in cache.columns(slot, 0, 4 - 2 * slot)] for slot in (0, 1)]
    cache.copy([1, 0, 0], [0, 1, 2])
    assert [cache.length(slot) for slot in range(3)] == [2, 4, 4]
    for slot, source in ((0, 1), (1, 0), (2, 0)):
        for ours, theirs in zip(cache.columns(slot, 0, cache.length(slot)), before[source]):
            assert torch.equal(ours, theirs)


def test_memory_is_taken_once() -> None:
    cache = KeyValueCache(CONFIG, slots=5, max_length=12)
    # keys and values x layers x slots x heads x tokens x channels of a head x bytes of a float32
    assert cache.bytes == cache_bytes(CONFIG, 5, 12) == 2 * 2 * 5 * 3 * 12 * 8 * 4
    view = cache.view(range(5), [2] * 5)
    first, _ = view.update(1, numbers(5, 3, 2, 8), numbers(5, 3, 2, 8))
    view.advance(2)
    second, _ = cache.view(range(5)).update(1, numbers(5, 3, 1, 8), numbers(5, 3, 1, 8))
    assert first.data_ptr() == second.data_ptr()  # a view of the same memory, not a copy
    assert second.shape == (5, 3, 3, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_memory_is_zero_and_aligned_for_vectors(dtype: torch.dtype) -> None:
    cache = KeyValueCache(CONFIG, slots=3, max_length=7, dtype=dtype)
    for tensor in cache.layer(0):
        assert (tensor.dtype, bool(tensor.any()), tensor.data_ptr() % 64) == (dtype, False, 0)


def test_overflow_is_an_error_with_both_numbers() -> None:
    cache = KeyValueCache(CONFIG, slots=2, max_length=7)
    cache.advance(1, 5)
    with pytest.raises(InputError, match=r"room for 7 tokens: got 5 \+ 3 = 8"):
        cache.view([0, 1], [3, 3])
    assert cache.length(1) == 5
    assert cache.reserve(1, 2) == 5  # as many as fit


def test_forgetting_the_last_tokens() -> None:
    cache = KeyValueCache(CONFIG, slots=1, max_length=7)
    k, v = numbers(1, 3, 5, 8), numbers(1, 3, 5, 8, seed=1)
    view = cache.view([0], [5])
    view.update(0, k, v)
    view.advance(5)
    cache.truncate(0, 3)
    held, _ = cache.view([0], [2]).update(0, k[:, :, :2], v[:, :, :2])
    assert torch.equal(held, torch.cat([k[:, :, :3], k[:, :, :2]], dim=2))
    for length in (-1, 4):
        with pytest.raises(InputError, match=f"the slot holds 3 tokens: cannot keep {length}"):
            cache.truncate(0, length)


def test_slots_are_allocated_from_the_lowest_on_and_come_back_empty() -> None:
    cache = KeyValueCache(CONFIG, slots=3, max_length=4)
    assert [cache.allocate() for _ in range(3)] == [0, 1, 2]
    cache.advance(1, 3)
    cache.free(2)
    cache.free(1)
    assert (cache.n_free, cache.allocate(), cache.length(1), cache.n_free) == (2, 1, 0, 1)
    with pytest.raises(AssertionError, match="a slot is freed once"):
        cache.free(2)


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
    small = GenerationOptions(max_new_tokens=5, max_cache_mib=0.2)
    assert len(generate_ids(model, [[3]], small, None)[0].ids) == 5


def test_what_is_read_anew_for_each_token_needs_one_layer_s_memory() -> None:
    model = GPTLMHeadModel(GPTConfig(n_embd=64, n_head=2, n_layer=5, block_size=64, vocab_size=40))
    one_layer = cache_bytes(model.config, 2, 50) / 5 / 2**20
    values: dict[str, Any] = {"max_new_tokens": 48, "max_cache_mib": one_layer * 1.01}
    prompts = [[3, 4, 5], [6]]
    with pytest.raises(InputError, match="max_cache_mib"):
        generate_ids(model, prompts, GenerationOptions(**values), None)
    found = generate_ids(model, prompts, GenerationOptions(**values, use_cache=False), None)
    assert found == generate_ids(model, prompts, GenerationOptions(max_new_tokens=48), None)
