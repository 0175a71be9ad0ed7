"""Attention over FP8 keys and values in plain torch, which upcasts a block of them at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ifkv.backends.fp8 import upcast
from ifkv.backends.partial import RowMask, attend_partial
from ifkv.backends.spec import AttentionSpec

# Slots of a block.
BLOCK_SLOTS = 4096


def attend_quantized(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    spec: AttentionSpec,
    *,
    mask: Tensor | RowMask | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute `attend_partial` over keys and values that may be FP8; scales are the caller's.

    The causal form upcasts all keys at once, because they are no more than the queries.
    """
    if keys.dtype == query.dtype:
        return attend_partial(query, keys, values, spec, mask=mask, causal=causal)
    count = keys.shape[2]
    step = count if causal else BLOCK_SLOTS
    state: tuple[Tensor, Tensor] | None = None
    for start in range(0, max(1, count), max(1, step)):
        block = slice(start, start + step)
        seen = mask
        if mask is not None and count > step:
            seen = (mask.hidden if isinstance(mask, RowMask) else mask)[:, block]
        part = attend_partial(
            query,
            upcast(keys[:, :, block], query.dtype),
            upcast(values[:, :, block], query.dtype),
            spec,
            mask=seen,
            causal=causal,
        )
        state = part if state is None else _merge(state, part)
    assert state is not None
    return state


def _merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge two states like `merge_partial`; a row may see nothing of both."""
    total = torch.logaddexp(a[1], b[1])
    base = total.masked_fill(total.isneginf(), 0.0)
    weights = [(own - base).exp()[..., None] for own in (a[1], b[1])]
    return (a[0] * weights[0] + b[0] * weights[1]).to(a[0].dtype), total
