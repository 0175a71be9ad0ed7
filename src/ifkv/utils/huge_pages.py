"""Memory for caches: on a CPU, in huge pages, where a fresh allocation is quick to write.

A request allocates its whole stitched cache anew and writes it once; on pages of 4 KiB, most of
the time goes into page faults. Linux gives huge pages to allocations that ask for them, which
torch's do only if the process was started with ``THP_MEM_ALLOC_ENABLE=1``.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Smaller tensors have no room for a huge page of 2 MiB wherever they begin.
SMALLEST = 4 << 20


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `torch.empty`, asking for huge pages on a CPU where the system has them.

    Args:
        shape: Of the tensor.
        dtype: Of the tensor.
        device: Of the tensor.

    Returns:
        A contiguous tensor, not initialised.
    """
    # Memory first written under inference_mode could not be written outside of it later on.
    with torch.inference_mode(False):
        made = torch.empty(tuple(shape), dtype=dtype, device=device)
    advise = _madvise() if device.type == "cpu" and made.nbytes >= SMALLEST else None
    if advise is not None:
        start = -(-made.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        # Advice: a kernel that cannot follow it says so, and nothing is lost.
        advise(start, made.data_ptr() + made.nbytes - start, mmap.MADV_HUGEPAGE)
    return made


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The C library's ``madvise``; None where there are no huge pages to ask for."""
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    madvise.restype = ctypes.c_int
    found: Callable[[int, int, int], int] = madvise
    return found
