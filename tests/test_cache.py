"""The cache: reading in pieces gives what reading at once gives, in memory that was taken once."""

import pytest
import torch
from torch import Tensor

from minigpt.command_line import InputError
from minigpt.inference.cache import KeyValueCache
from minigpt.model import GPTConfig, GPTLMHeadModel

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
