"""Read bytes that lie scattered over a card's memory in one launch of Triton."""

from __future__ import annotations

import torch

# Triton comes with torch for CUDA, not with the one for CPUs that types are checked against.
import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]
from torch import Tensor

BLOCK = 256


def _peek_kernel(addresses, out, count, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * block + tl.arange(0, block)
    there = at < count
    address = tl.load(addresses + at, mask=there, other=0)
    found = tl.load(address.to(tl.pointer_type(tl.uint8)), mask=there, other=0)
    tl.store(out + at, found, mask=there)


_compiled = triton.jit(_peek_kernel)


def peek(addresses: Tensor) -> Tensor:
    """The bytes at some addresses.

    Args:
        addresses: Long ``[n]``, on the card whose memory they lie in. Whoever calls keeps what lies
            there from being freed.

    Returns:
        Uint8 ``[n]``, there.
    """
    out = torch.empty(len(addresses), dtype=torch.uint8, device=addresses.device)
    _compiled[(triton.cdiv(len(addresses), BLOCK),)](addresses, out, len(addresses), block=BLOCK)
    return out
