"""Huge pages for caches in CPU memory, because a new allocation in them is quick to write.

Every request allocates its whole stitched cache and writes it once. With pages of 4 KiB most of
that time goes into page faults. Linux gives huge pages to allocations that ask for them. Those of
torch ask only if the process was started with ``THP_MEM_ALLOC_ENABLE=1``.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# A smaller tensor may contain no whole, aligned huge page of 2 MiB.
SMALLEST = 4 << 20


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised tensor, in huge pages on a CPU whose system has them.

    Args:
        shape: Shape of the tensor.
        dtype: Dtype of the tensor.
        device: Device of the tensor.

    Returns:
        A contiguous tensor, like `torch.empty`.
    """
    # A tensor made under inference_mode could not be written outside of it later.
    with torch.inference_mode(False):
        made = torch.empty(tuple(shape), dtype=dtype, device=device)
    advise = _madvise() if device.type == "cpu" and made.nbytes >= SMALLEST else None
    if advise is not None:
        start = -(-made.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        # This is advice. If the kernel cannot follow it, ordinary pages are used.
        advise(start, made.data_ptr() + made.nbytes - start, mmap.MADV_HUGEPAGE)
    return made


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """Return the C library's ``madvise``; None on systems without huge pages."""
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    madvise.restype = ctypes.c_int
    found: Callable[[int, int, int], int] = madvise
    return found
