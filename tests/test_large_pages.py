"""Copies in large pages have the same numbers, wherever the memory comes from."""

import itertools
import math
import mmap
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.storage.large_pages import LargePages
from minigpt.tokenizer import Tokenizer
from minigpt.weights.pretrained import load_model, save_pretrained

PAGE = 2**21


@pytest.mark.parametrize("numbers", [0, 1, 1000, PAGE, 3 * PAGE + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_a_copy_is_the_same_in_memory_of_its_own(numbers: int, dtype: torch.dtype) -> None:
    tensor = torch.arange(numbers) % 100
    pages = LargePages()
    copy = pages.copied(tensor, dtype)
    assert torch.equal(copy, tensor.to(dtype))
    assert copy.dtype == dtype
    assert numbers == 0 or copy.data_ptr() != tensor.data_ptr()
    same = pages.copied(copy)
    assert (same.dtype, numbers == 0 or same.data_ptr() != copy.data_ptr()) == (dtype, True)


def test_a_transposed_one_becomes_contiguous() -> None:
    tensor = torch.randn(1500, 1000).t()
    copy = LargePages().copied(tensor)
    assert torch.equal(copy, tensor)
    assert copy.is_contiguous()


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (4, 4), (1, 6), (6, 1), (2, 3, 4)])
def test_what_is_its_own_is_put_in_order_in_its_place(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(2 + math.prod(shape))
    for order in itertools.permutations(range(len(shape))):
        whole = numbers.clone()
        tensor = whole[1:-1].view(shape).permute(order)
        expected = tensor.clone(memory_format=torch.contiguous_format)
        found = LargePages().copied(tensor, own=True)
        assert torch.equal(found, expected)
        assert found.is_contiguous()
        assert found.data_ptr() == whole[1:].data_ptr()
        assert (whole[0], whole[-1]) == (numbers[0], numbers[-1])  # its neighbours'
        other = LargePages().copied(tensor, torch.float64, own=True)
        assert other.data_ptr() != whole[1:].data_ptr()


def test_where_the_system_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    tensor = torch.randn(3 * PAGE // 4)
    assert torch.equal(LargePages().copied(tensor), tensor)


def test_many_lie_side_by_side_and_none_in_another() -> None:
    pages, sizes = LargePages(), [1, 5, 0, 3000, PAGE, 7, 9 * PAGE, 64, 2 * PAGE + 1]
    with ThreadPoolExecutor(4) as pool:
        copies = list(pool.map(lambda size: pages.copied(torch.full((size,), size % 101)), sizes))
    for size, copy in zip(sizes, copies):
        assert (copy == size % 101).all()
        assert copy.untyped_storage().nbytes() == copy.nbytes  # nothing of its neighbours is saved with it
        assert copy.data_ptr() % 64 == 0 or not size
        copy.zero_()
        assert copy._version == 2  # neighbours do not count each other's changes
    assert all((copy == 0).all() for copy in copies)


def test_a_model_s_weights_leave_no_gaps(tmp_path: Path) -> None:
    """Matrices smaller than a large page are next to each other, in one block."""
    words = ["<pad>", "<unk>", "<sep>", *map(chr, range(0x4E00, 0x4E00 + 497))]
    tokenizer = Tokenizer.from_word2id({word: place for place, word in enumerate(words)})
    save_pretrained(GPTLMHeadModel(GPTConfig(256, 4, 4, 0.0, 64, 500)), tmp_path, tokenizer)
    addresses = [(parameter.data_ptr(), parameter.nbytes) for parameter in load_model(tmp_path).parameters()]
    first, last = min(addresses)[0], sum(max(addresses))
    needed = sum(size for _, size in addresses)
    assert needed > 4 * PAGE
    assert last - first < needed + PAGE


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked for large pages")
def test_linux_is_asked_for_large_pages() -> None:
    """The mapping with the middle of the copy has the flag `hg`: large pages were requested."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists():
        pytest.skip("this kernel has no transparent large pages")
    copy = LargePages().copied(torch.ones(4 * PAGE))
    middle = copy.data_ptr() + copy.nbytes // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii", errors="replace").splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= middle < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            assert "hg" in line.split()
            return
    pytest.fail("the copy lies in no mapping")
