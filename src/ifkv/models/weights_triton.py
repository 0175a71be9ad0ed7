"""Read scattered bytes of GPU memory in one launch of a Triton kernel."""

from __future__ import annotations

import torch

# Triton comes with torch for CUDA, not with the one for CPUs that types are checked against.
import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]
from torch import Tensor

BLOCK = 256


def _gather_kernel(addresses, out, count, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * block + tl.arange(0, block)
    there = at < count
    address = tl.load(addresses + at, mask=there, other=0)
    found = tl.load(address.to(tl.pointer_type(tl.uint8)), mask=there, other=0)
    tl.store(out + at, found, mask=there)


_compiled = triton.jit(_gather_kernel)


def gather_bytes(addresses: Tensor) -> Tensor:
    """Read the bytes at some addresses.

    Args:
        addresses: Long ``[n]``, on the GPU whose memory they point to. The caller keeps that
            memory from being freed.

    Returns:
        Uint8 ``[n]``, on the same GPU.
    """
    out = torch.empty(len(addresses), dtype=torch.uint8, device=addresses.device)
    _compiled[(triton.cdiv(len(addresses), BLOCK),)](addresses, out, len(addresses), block=BLOCK)
    return out
