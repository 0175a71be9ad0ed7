"""Rotate a document's keys and place its keys and values, in one Triton kernel for CUDA.

The result is bit-equal to that of `rotate`, which makes four passes over the keys: the two products
are rounded to the model's dtype before they are added. Every number is read and written once.
"""

from __future__ import annotations

# Triton comes with torch for CUDA, not with the one for CPUs that types are checked against.
import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]
from torch import Tensor

ROWS = 64


def _place_kernel(  # type: ignore[no-untyped-def]  # Triton would read a type as its own
    keys,
    values,
    cos,
    sin,
    keys_out,
    values_out,
    rows,
    heads,
    slot,
    layer_stride,
    head_stride,
    row_stride,
    rope_stride,
    out_layer_stride,
    out_head_stride,
    out_row_stride,
    half: tl.constexpr,
    head_dim: tl.constexpr,
    half_block: tl.constexpr,
    dim_block: tl.constexpr,
    row_block: tl.constexpr,
):
    layer = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    row = tl.program_id(1) * row_block + tl.arange(0, row_block)
    used = row < rows
    source = layer * layer_stride + head * head_stride + row[:, None] * row_stride
    target = (
        layer * out_layer_stride + head * out_head_stride + (slot + row)[:, None] * out_row_stride
    )
    dim = tl.arange(0, dim_block)
    whole = used[:, None] & (dim < head_dim)[None, :]
    copied = tl.load(values + source + dim[None, :], mask=whole, other=0.0)
    tl.store(values_out + target + dim[None, :], copied, mask=whole)
    pair = tl.arange(0, half_block)
    halves = used[:, None] & (pair < half)[None, :]
    turn = row[:, None] * rope_stride + pair[None, :]
    c = tl.load(cos + turn, mask=halves, other=0.0).to(tl.float32)
    s = tl.load(sin + turn, mask=halves, other=0.0).to(tl.float32)
    first = tl.load(keys + source + pair[None, :], mask=halves, other=0.0)
    second = tl.load(keys + source + half + pair[None, :], mask=halves, other=0.0)
    kind = first.dtype
    x, y = first.to(tl.float32), second.to(tl.float32)
    left = (x * c).to(kind).to(tl.float32) - (y * s).to(kind).to(tl.float32)
    right = (y * c).to(kind).to(tl.float32) + (x * s).to(kind).to(tl.float32)
    tl.store(keys_out + target + pair[None, :], left.to(kind), mask=halves)
    tl.store(keys_out + target + half + pair[None, :], right.to(kind), mask=halves)
    if 2 * half < head_dim:
        still = whole & (dim >= 2 * half)[None, :]
        kept = tl.load(keys + source + dim[None, :], mask=still, other=0.0)
        tl.store(keys_out + target + dim[None, :], kept, mask=still)


_compiled = triton.jit(_place_kernel)


def place_rotated(
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys_out: Tensor,
    values_out: Tensor,
    slot: int,
) -> None:
    """Compute `place` for float16 or bfloat16."""
    layers, heads, rows, head_dim = keys.shape
    half = cos.shape[1] // 2
    if rows == 0:
        return
    if keys.stride(-1) != 1 or keys.stride() != values.stride():
        keys, values = keys.contiguous(), values.contiguous()
    _compiled[(layers * heads, triton.cdiv(rows, ROWS))](
        keys,
        values,
        cos,
        sin,
        keys_out,
        values_out,
        rows,
        heads,
        slot,
        *keys.stride()[:3],
        cos.stride(0),
        *keys_out.stride()[:3],
        half=half,
        head_dim=head_dim,
        half_block=triton.next_power_of_2(half),
        dim_block=triton.next_power_of_2(head_dim),
        row_block=ROWS,
        enable_fp_fusion=False,  # a fused product would not be rounded before the addition
    )
