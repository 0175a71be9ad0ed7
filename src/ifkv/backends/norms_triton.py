"""Attention norms in one Triton kernel for CUDA; the results equal those of `ifkv.backends.norms`.

A program owns a block of keys and loops over rows and heads. So the mean over all heads of a row is
complete before it is squared, and no attention weight is stored. For up to 64 rows every key is
read once, and so are its values if their size counts.

Loops use ``while``, because Triton's interpreter, which runs the kernel on the CPU in the tests,
does not support ``range`` over run-time numbers with numpy 2.4 and newer.
"""

from __future__ import annotations

import torch

# Triton comes with torch for CUDA, not with the one for CPUs that types are checked against.
import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]
from torch import Tensor

from ifkv.backends.base import AttentionSpec, QueryPlan, Reduction

ROWS = 64
KEYS = 64


def _norm_kernel(  # type: ignore[no-untyped-def]  # Triton would read a type as its own
    query,
    keys,
    values,
    logsumexp,
    row_positions,
    key_positions,
    out,
    rows,
    length,
    heads,
    scaling,
    window,
    query_head_stride,
    query_row_stride,
    key_head_stride,
    key_stride,
    value_head_stride,
    value_stride,
    lse_head_stride,
    lse_row_stride,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    dim_block: tl.constexpr,
    row_block: tl.constexpr,
    key_block: tl.constexpr,
    squared: tl.constexpr,
    windowed: tl.constexpr,
    weighed: tl.constexpr,
):
    key = tl.program_id(0) * key_block + tl.arange(0, key_block)
    dim = tl.arange(0, dim_block)[None, :]
    key_used = key < length
    key_mask = key_used[:, None] & (dim < head_dim)
    total = tl.zeros((key_block,), dtype=tl.float32)
    start = 0
    while start < rows:
        row = start + tl.arange(0, row_block)
        row_used = row < rows
        row_mask = row_used[:, None] & (dim < head_dim)
        attention = tl.zeros((row_block, key_block), dtype=tl.float32)
        kv_head = 0
        while kv_head * group < heads:
            k = tl.load(
                keys + kv_head * key_head_stride + key[:, None].to(tl.int64) * key_stride + dim,
                mask=key_mask,
                other=0.0,
            )
            for member in tl.static_range(group):
                head = kv_head * group + member
                q = tl.load(
                    query + head * query_head_stride + row[:, None] * query_row_stride + dim,
                    mask=row_mask,
                    other=0.0,
                )
                lse = tl.load(
                    logsumexp + head * lse_head_stride + row * lse_row_stride,
                    mask=row_used,
                    other=0.0,
                )
                logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
                attention += tl.exp(logits - lse[:, None])
            kv_head += 1
        seen = row_used[:, None] & key_used[None, :]
        if windowed:
            at = tl.load(row_positions + row, mask=row_used, other=0)
            key_at = tl.load(key_positions + key, mask=key_used, other=0)
            distance = at[:, None] - key_at[None, :]
            seen = seen & (distance >= 0) & (distance < window)
        mean = tl.where(seen, attention / heads, 0.0)
        total += tl.sum(mean * mean if squared else mean, axis=0)
        start += row_block
    if squared:
        total = tl.sqrt(total)
    if weighed:
        sizes = tl.zeros((key_block,), dtype=tl.float32)
        kv_head = 0
        while kv_head * group < heads:
            v = tl.load(
                values
                + kv_head * value_head_stride
                + key[:, None].to(tl.int64) * value_stride
                + dim,
                mask=key_mask,
                other=0.0,
            )
            sizes += tl.sum(tl.abs(v.to(tl.float32)), axis=1)
            kv_head += 1
        total *= sizes / kv_head
    tl.store(out + key, total, mask=key_used)


_compiled = triton.jit(_norm_kernel)


def triton_attention_norm(
    query: Tensor,
    context_keys: Tensor,
    logsumexp: Tensor,
    plan: QueryPlan,
    spec: AttentionSpec,
    *,
    reduction: Reduction,
    values: Tensor | None = None,
) -> Tensor:
    """Compute `Backend.attention_norm` for float16, bfloat16 or float32."""
    _, heads, rows, head_dim = query.shape
    length = context_keys.shape[2]
    out = torch.empty(length, dtype=torch.float32, device=query.device)
    if length == 0:
        return out
    if query.stride(-1) != 1:
        query = query.contiguous()
    if context_keys.stride(-1) != 1:
        context_keys = context_keys.contiguous()
    weighed = values is not None
    if values is None:
        values = context_keys  # not read
    elif values.stride(-1) != 1:
        values = values.contiguous()
    _compiled[(triton.cdiv(length, KEYS),)](
        query,
        context_keys,
        values,
        logsumexp,
        plan.query_positions,
        plan.context_positions,
        out,
        rows,
        length,
        heads,
        spec.scaling,
        0 if spec.window is None else spec.window,
        query.stride(1),
        query.stride(2),
        context_keys.stride(1),
        context_keys.stride(2),
        values.stride(1),
        values.stride(2),
        logsumexp.stride(1),
        logsumexp.stride(2),
        group=heads // context_keys.shape[1],
        head_dim=head_dim,
        dim_block=max(16, triton.next_power_of_2(head_dim)),
        row_block=ROWS,
        key_block=KEYS,
        squared=reduction == "l2",
        windowed=spec.window is not None,
        weighed=weighed,
    )
    return out
