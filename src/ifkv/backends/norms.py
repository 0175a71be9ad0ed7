"""Attention norms from queries, keys and log-sum-exps, in blocks (2603.05353, equation 7).

Attention kernels return outputs and log-sum-exps but not the attention weights, so these are
computed again: ``exp(q k scaling - logsumexp)``. The mean over heads is taken before the square, so
a block holds all heads of a row; blocks are cut along the keys.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ifkv.backends.base import QueryPlan, Reduction
from ifkv.backends.partial import explicit_logits
from ifkv.backends.spec import AttentionSpec

# Keys of a block.
NORM_BLOCK = 1024


def blocked_attention_norm(
    query: Tensor,
    context_keys: Tensor,
    logsumexp: Tensor,
    plan: QueryPlan,
    spec: AttentionSpec,
    *,
    reduction: Reduction,
    values: Tensor | None = None,
) -> Tensor:
    """Compute `Backend.attention_norm` in plain torch, a block of keys at a time."""
    norms = []
    for start in range(0, context_keys.shape[2], NORM_BLOCK):
        block = slice(start, start + NORM_BLOCK)
        mask = hidden_by_window(plan, block, spec)
        logits = explicit_logits(query, context_keys[:, :, block], spec, mask)
        attention = logits.sub_(logsumexp[0, ..., None]).exp_().mean(dim=0)  # [Q, block]
        norms.append(attention.norm(dim=0) if reduction == "l2" else attention.sum(dim=0))
    found = torch.cat(norms) if norms else logsumexp.new_zeros(0)
    return found if values is None else found * value_sizes(values)


def value_sizes(values: Tensor) -> Tensor:
    """Compute the L1 norm of each slot's values, averaged over heads.

    Args:
        values: ``[1, kv_heads, T, head_dim]``.

    Returns:
        ``[T]``, float32, or float64 if the values are.
    """
    # Converting whole tensors costs most, and 16-bit absolute values need no conversion.
    own = values[0].float() if values.itemsize == 1 else values[0]
    return own.abs().sum(dim=-1, dtype=torch.promote_types(own.dtype, torch.float32)).mean(dim=0)


def attention_norm(
    query: Tensor,
    context_keys: Tensor,
    logsumexp: Tensor,
    plan: QueryPlan,
    spec: AttentionSpec,
    *,
    reduction: Reduction,
    values: Tensor | None = None,
) -> Tensor:
    """Compute `Backend.attention_norm` by the Triton kernel on CUDA, otherwise in plain torch."""
    compute = blocked_attention_norm
    # Triton cannot convert FP8 keys on GPUs before Ada Lovelace.
    same_dtype = context_keys.dtype == query.dtype
    half = same_dtype and query.dtype in (torch.float16, torch.bfloat16)
    if query.device.type == "cuda" and half:
        with contextlib.suppress(ImportError):
            from ifkv.backends.norms_triton import triton_attention_norm as compute
    return compute(query, context_keys, logsumexp, plan, spec, reduction=reduction, values=values)


def hidden_by_window(plan: QueryPlan, block: slice, spec: AttentionSpec) -> Tensor | None:
    """Build the mask of a block of context slots: True where a query token must not attend.

    Args:
        plan: Positions of the query tokens and the context.
        block: Slots of the context.
        spec: Scaling and mask of the layer.

    Returns:
        Bool ``[Q, slots]``; None without a window, because the whole context precedes the query.
    """
    if spec.window is None:
        return None
    return spec.hidden(plan.query_positions, plan.context_positions[block])
