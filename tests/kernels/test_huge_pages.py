"""Tensors on large pages are tensors like others."""

import re
from pathlib import Path

import pytest
import torch

from tokenmill.kernels import huge_pages


@pytest.mark.parametrize("shape", [(0, 16), (3,), (2, 511, 1024), (5, 512, 1024), (4096, 2048)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.bfloat16], ids=str)
def test_shape_and_content(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = huge_pages.empty(shape, dtype)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    expected = torch.arange(tensor.numel()).view(shape).to(dtype)
    assert torch.equal(tensor.copy_(expected), expected)
    if tensor.nbytes >= huge_pages.PAGE:
        assert tensor.data_ptr() % huge_pages.PAGE == 0


def test_linux_backs_them_with_large_pages() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text(encoding="ascii"):
        pytest.skip("Linux grants no large pages here")
    tensor = huge_pages.empty((16, 1 << 20), torch.uint8)
    tensor.fill_(1)
    address = tensor.data_ptr()
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE):
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", mapping)
        if bounds and int(bounds[1], 16) <= address < int(bounds[2], 16):
            # hg: somebody asked for them. Whether there were any left is not ours to promise.
            assert re.search(r"^VmFlags:.*\bhg\b", mapping, re.MULTILINE)
            return
    raise AssertionError("no mapping holds the tensor")


def test_without_madvise_it_is_an_ordinary_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_madvise", lambda: None)
    assert huge_pages.empty((3 << 20,), torch.uint8).untyped_storage().nbytes() == 3 << 20
