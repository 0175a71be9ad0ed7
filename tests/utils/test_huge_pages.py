"""Memory for caches: what torch.empty would give, in other pages."""

import mmap
import re
import sys
from pathlib import Path

import pytest
import torch

from ifkv.utils import huge_pages as memory
from ifkv.utils.huge_pages import SMALLEST, empty

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(3, 5), (2, 1, 3, 64, 16), (7, 0), (2048, 2049)])
def test_gives_what_was_asked_for(dtype, shape):
    made = empty(shape, dtype, CPU)
    assert (made.shape, made.dtype, made.device) == (torch.Size(shape), dtype, CPU)
    assert made.is_contiguous()


def test_asks_for_whole_pages_within_the_tensor(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "_madvise", lambda: lambda *given: asked.append(given))
    small, large = (empty((n,), torch.uint8, CPU) for n in (SMALLEST - 1, 5 << 20))
    ((start, size, _),) = asked
    assert small.nbytes < SMALLEST
    assert start % mmap.PAGESIZE == 0
    assert large.data_ptr() <= start < large.data_ptr() + mmap.PAGESIZE
    assert start + size == large.data_ptr() + large.nbytes


def test_other_devices_are_left_alone(monkeypatch):
    monkeypatch.setattr(memory, "_madvise", lambda: pytest.fail("asked for pages of a GPU"))
    assert empty((8 << 20,), torch.float16, torch.device("meta")).device.type == "meta"


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are Linux's")
def test_the_kernel_marks_the_memory():
    mode = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not mode.exists() or "[never]" in mode.read_text():
        pytest.skip("this kernel gives no huge pages")
    made = empty((64 << 20,), torch.uint8, CPU)
    middle, flags = made.data_ptr() + made.nbytes // 2, ""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= middle < int(span[2], 16)
        elif inside and line.startswith("VmFlags:"):
            flags = line
    assert " hg" in flags
