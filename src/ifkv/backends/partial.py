"""Attention over part of the keys with its log-sum-exp, and the merging of two parts."""

from __future__ import annotations

import torch
from torch import Tensor

from ifkv.backends.fp8 import upcast
from ifkv.backends.spec import AttentionSpec

# Logits held at once by the explicit form, in elements.
_EXPLICIT_ELEMENTS = 1 << 24


class RowMask:
    """Mask of rows and the tensors derived from it, computed once and used in every layer.

    Attributes:
        hidden: Bool ``[rows, n]``, True where a row must not attend.

    Args:
        hidden: As the attribute.
    """

    def __init__(self, hidden: Tensor):
        self.hidden = hidden
        self._biases: dict[tuple[torch.dtype, int], Tensor] = {}
        self._blind: Tensor | None = None
        self._blind_known = False

    def bias(self, dtype: torch.dtype, group: int) -> Tensor:
        """Return the bias on the logits of ``group`` heads whose rows are concatenated.

        Returns:
            ``[1, 1, group * rows, n]``: 0, or -inf where hidden.
        """
        key = (dtype, group)
        if key not in self._biases:
            bias = torch.zeros(self.hidden.shape, dtype=dtype, device=self.hidden.device)
            bias.masked_fill_(self.hidden, float("-inf"))
            self._biases[key] = bias.repeat(group, 1)[None, None]
        return self._biases[key]

    @property
    def blind(self) -> Tensor | None:
        """Return bool ``[rows]``, True for rows that see nothing; None if all rows see something.

        The first call reads the mask, so on a GPU it waits for it.
        """
        if not self._blind_known:
            blind = self.hidden.all(dim=-1)
            self._blind = blind if bool(blind.any()) else None
            self._blind_known = True
        return self._blind


def attend_partial(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    spec: AttentionSpec,
    *,
    mask: Tensor | RowMask | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute attention and log-sum-exp over the given keys; key heads are not copied.

    Args:
        query: ``[1, heads, rows, head_dim]``.
        keys: ``[1, kv_heads, n, head_dim]``.
        values: Values of the same shape.
        spec: Settings of the layer. ``mask`` and ``causal`` are its mask; a window and sinks are
            not applied (`add_sinks`).
        mask: Bool ``[rows, n]``, True where a row must not attend, or such a mask as a `RowMask`
            for many layers. If a row is all True, its output is 0 and its log-sum-exp -inf.
        causal: Let row i see keys 0 to i; only with ``rows == n`` and no mask.

    Returns:
        Output ``[1, heads, rows, head_dim]`` in the query's dtype and natural log-sum-exp
        ``[1, heads, rows]`` in float32 (float64 if the query is).
    """
    if isinstance(mask, Tensor):
        mask = RowMask(mask)
    kernel = query.device.type == "cpu" and spec.softcap is None  # the kernel has no softcap
    if kernel and keys.shape[2] > 0 and query.shape[2] > 0:
        return _attend_flash(query, keys, values, spec, mask, causal)
    if causal:
        row = torch.arange(query.shape[2], device=query.device)
        mask = RowMask(row > row[:, None])
    return _attend_explicit(query, keys, values, spec, None if mask is None else mask.hidden)


def _attend_flash(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    spec: AttentionSpec,
    mask: RowMask | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Compute attention by the CPU kernel of ``scaled_dot_product_attention``, called directly.

    The direct call also gives the log-sum-exp, and shares key heads without a copy. Except in the
    causal form, the rows of all heads that share a key head are concatenated: the kernel then uses
    fewer, larger blocks, and reads each key block once per group.
    """
    shape = query.shape
    bias = None
    if not causal:
        group = shape[1] // keys.shape[1]
        query = query.unflatten(1, (keys.shape[1], group)).flatten(2, 3)
        if mask is not None:
            bias = mask.bias(query.dtype, group)
    out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, 0.0, causal, attn_mask=bias, scale=spec.scaling
    )
    out, logsumexp = out.reshape(shape), logsumexp.reshape(shape[:3])
    if mask is not None and mask.blind is not None:
        # The kernel gives 0 instead of -inf for a row that sees nothing.
        logsumexp.masked_fill_(mask.blind, float("-inf"))
    return out, logsumexp


def _attend_explicit(
    query: Tensor, keys: Tensor, values: Tensor, spec: AttentionSpec, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute attention by an explicit softmax, a block of rows at a time."""
    heads, rows, n = query.shape[1], query.shape[2], keys.shape[2]
    step = max(1, _EXPLICIT_ELEMENTS // max(1, heads * n))
    outs, logsumexps = [], []
    for start in range(0, max(rows, 1), step):
        block = slice(start, start + step)
        part_mask = None if mask is None else mask[block]
        logits = explicit_logits(query[:, :, block], keys, spec, part_mask)
        logsumexp = logits.logsumexp(dim=-1)
        weights = logits.sub_(logsumexp.nan_to_num(neginf=0.0)[..., None]).exp_()
        groups = weights.unflatten(0, (keys.shape[1], -1)).flatten(1, 2)  # [kv, group*rows, n]
        out = torch.bmm(groups, values[0].to(weights.dtype))
        outs.append(out.view(heads, -1, values.shape[-1]).to(query.dtype))
        logsumexps.append(logsumexp)
    return torch.cat(outs, dim=1)[None], torch.cat(logsumexps, dim=1)[None]


def explicit_logits(
    query: Tensor, keys: Tensor, spec: AttentionSpec, mask: Tensor | None
) -> Tensor:
    """Compute scaled and capped logits, -inf where masked.

    Args:
        query: ``[1, heads, rows, head_dim]``.
        keys: ``[1, kv_heads, n, head_dim]``; they may be FP8, whatever the query's dtype.
        spec: Settings of the layer. ``mask`` is its mask; a window is not applied.
        mask: Bool ``[rows, n]``, True where a row must not attend; None hides nothing.

    Returns:
        ``[heads, rows, n]``, float32 (float64 if the query is).
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    kv_heads, rows = keys.shape[1], query.shape[2]
    grouped = query[0].unflatten(0, (kv_heads, -1)).flatten(1, 2).to(dtype)  # [kv, group*rows, D]
    logits = torch.bmm(grouped, upcast(keys[0], dtype).transpose(1, 2)).mul_(spec.scaling)
    if spec.softcap is not None:
        logits = logits.div_(spec.softcap).tanh_().mul_(spec.softcap)
    logits = logits.view(query.shape[1], rows, -1)
    return logits if mask is None else logits.masked_fill_(mask, float("-inf"))


def add_sinks(out: Tensor, logsumexp: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Let each head's sink take part in the softmax of whole rows.

    A sink is one more logit, without a value. So it lowers all weights of a row by one factor, and
    is added once, after all parts of the row are merged.

    Args:
        out: ``[1, heads, rows, head_dim]``.
        logsumexp: Natural, ``[1, heads, rows]``.
        spec: Settings of the layer.

    Returns:
        Output and log-sum-exp with the sinks; the given ones if there are none.
    """
    if spec.sinks is None:
        return out, logsumexp
    total = torch.logaddexp(logsumexp, spec.sinks.to(logsumexp.dtype)[None, :, None])
    return (out * (logsumexp - total).exp_()[..., None]).to(out.dtype), total


def merge_partial(
    out_a: Tensor, logsumexp_a: Tensor, out_b: Tensor, logsumexp_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge attention over two disjoint sets of keys (FlashInfer, 2501.01005, section 2.2).

    Args:
        out_a: ``[1, heads, rows, head_dim]``.
        logsumexp_a: ``[1, heads, rows]``; -inf if part a has no key for the row.
        out_b: The other part's output.
        logsumexp_b: The other part's log-sum-exp; finite where ``logsumexp_a`` is not.

    Returns:
        Output and log-sum-exp over the union.
    """
    merged = torch.logaddexp(logsumexp_a, logsumexp_b)
    weight_a = (logsumexp_a - merged).exp_()[..., None]
    weight_b = (logsumexp_b - merged).exp_()[..., None]
    return (out_a * weight_a + out_b * weight_b).to(out_a.dtype), merged
