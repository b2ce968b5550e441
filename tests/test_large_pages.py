"""Copies in large pages: the same numbers, wherever the memory comes from."""

import re
import sys
from pathlib import Path

import pytest
import torch

from minigpt import large_pages
from minigpt.large_pages import copied

PAGE = 2**21


@pytest.mark.parametrize("numbers", [0, 1, 1000, PAGE, 3 * PAGE + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_a_copy_is_the_same_in_memory_of_its_own(numbers: int, dtype: torch.dtype) -> None:
    tensor = torch.arange(numbers) % 100
    copy = copied(tensor, dtype)
    assert torch.equal(copy, tensor.to(dtype))
    assert copy.dtype == dtype
    assert numbers == 0 or copy.data_ptr() != tensor.data_ptr()
    same = copied(copy)
    assert (same.dtype, numbers == 0 or same.data_ptr() != copy.data_ptr()) == (dtype, True)


def test_a_transposed_one_becomes_contiguous() -> None:
    tensor = torch.randn(1500, 1000).t()
    assert torch.equal(copied(tensor), tensor)
    assert copied(tensor).is_contiguous()


def test_where_the_system_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_pages, "_madvise", lambda: None)
    tensor = torch.randn(3 * PAGE // 4)
    assert torch.equal(copied(tensor), tensor)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked for large pages")
def test_linux_is_asked_for_large_pages() -> None:
    """`hg` among the flags of the mapping that holds the middle of the copy: advised to be huge."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists():
        pytest.skip("this kernel has no transparent large pages")
    copy = copied(torch.ones(4 * PAGE))
    middle = copy.data_ptr() + copy.nbytes // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii", errors="replace").splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= middle < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            assert "hg" in line.split()
            return
    pytest.fail("the copy lies in no mapping")
