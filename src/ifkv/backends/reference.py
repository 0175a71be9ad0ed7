"""Reference backend: plain torch on any device, float64 to bfloat16.

Sorted rows are cut into tiles (`ifkv.backends.tiles`). A tile reads its keys in two parts, which
are merged by their log-sum-exps: those that all its rows see, without a mask, and the fringe
between its first and its last row. So no mask grows with the context. A tile of adjacent rows has a
causal fringe, which needs no mask either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ifkv.backends.base import Backend
from ifkv.backends.norms import blocked_attention_norm
from ifkv.backends.partial import add_sinks, attend_partial, merge_partial
from ifkv.backends.plans import (
    UNSCALED,
    DocumentPlan,
    KVScales,
    QueriesPlan,
    QueryPlan,
    Reduction,
    RowPlan,
)
from ifkv.backends.quantized import attend_quantized
from ifkv.backends.spec import AttentionSpec
from ifkv.backends.tiles import Tile, TiledRows, cut_into_tiles

# A prefix this many times shorter than its document joins the document's causal call. The unused
# rows then cost less than a second call and a merge: a quarter of the time at 24 and 120 tokens. At
# 100 and 305 tokens they cost more.
SHORT_PREFIX = 4


class ReferenceBackend(Backend):
    """Attention in plain torch, with softcap and sinks."""

    name = "reference"
    features = frozenset({"softcap", "sinks"})

    def plan_documents(
        self, lengths: tuple[int, ...], prefix_length: int, device: torch.device
    ) -> DocumentPlan:
        """Return a plan without data; see `Backend.plan_documents`."""
        return DocumentPlan(lengths, prefix_length, None)

    def attend_documents(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        prefix_keys: Tensor,
        prefix_values: Tensor,
        plan: DocumentPlan,
        spec: AttentionSpec,
    ) -> Tensor:
        """Compute the attention of documents; see `Backend.attend_documents`."""
        window = spec.window
        out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
        start, prefix = 0, plan.prefix_length
        for length in plan.lengths:
            rows = slice(start, start + length)
            start += length
            # Prefix and document together are a small cache whose last rows are computed.
            seen_keys = torch.cat((prefix_keys, keys[:, :, rows]), dim=2)
            seen_values = torch.cat((prefix_values, values[:, :, rows]), dim=2)
            own = query[:, :, rows]
            if 0 < prefix * SHORT_PREFIX <= length and (
                window is None or prefix + length <= window
            ):
                # Blank rows in place of the prefix make this one causal call.
                blank = query.new_zeros(1, query.shape[1], prefix, query.shape[3])
                padded = torch.cat((blank, own), dim=2)
                whole = attend_partial(padded, seen_keys, seen_values, spec, causal=True)
                seen = add_sinks(*whole, spec)[0]
                out[:, rows] = seen[:, :, prefix:].transpose(1, 2)
                continue
            tile = Tile(0, length, prefix, prefix + length - 1)
            slots = torch.arange(prefix, prefix + length, device=query.device)
            planned = TiledRows(slots, (tile,))
            out[:, rows] = _attend_tile(own, seen_keys, seen_values, tile, planned, spec).transpose(
                1, 2
            )
        return out

    def plan_requests(
        self, slots: Sequence[Tensor], kv_lengths: Sequence[int], device: torch.device
    ) -> RowPlan:
        """Cut the rows of each request into tiles; see `Backend.plan_requests`."""
        together = torch.cat(list(slots)).to(device)
        parts = tuple(
            TiledRows(rows, cut_into_tiles(own.tolist()))
            for rows, own in zip(together.split([len(own) for own in slots]), slots, strict=True)
        )
        return RowPlan(together, max(kv_lengths, default=0), parts)

    def attend_requests(
        self,
        query: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        plan: RowPlan,
        spec: AttentionSpec,
        *,
        scales: Sequence[KVScales] | None = None,
    ) -> Tensor:
        """Compute attention tile by tile; see `Backend.attend_requests`."""
        out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
        parts: tuple[TiledRows, ...] = plan.detail
        scales = [UNSCALED] * len(parts) if scales is None else scales
        start = 0
        for own_keys, own_values, planned, its in zip(keys, values, parts, scales, strict=True):
            scaled = spec.scaled(its.keys)
            for tile in planned.tiles:
                rows = slice(start + tile.start, start + tile.stop)
                seen = _attend_tile(query[:, :, rows], own_keys, own_values, tile, planned, scaled)
                out[:, rows] = seen.transpose(1, 2)
            stop = start + len(planned.slots)
            if its.values != 1:
                out[:, start:stop].mul_(its.values)
            start = stop
        return out

    def decode(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        spec: AttentionSpec,
        *,
        scales: KVScales = UNSCALED,
    ) -> Tensor | None:
        """Compute rows over FP8 keys; None for others, see `Backend.decode`."""
        if keys.dtype == query.dtype:
            return None
        scaled = spec.scaled(scales.keys)
        outs = [
            add_sinks(*attend_quantized(*one, scaled), spec)[0]
            for one in zip(query.split(1), keys.split(1), values.split(1), strict=True)
        ]
        return torch.cat(outs).mul_(scales.values).transpose(1, 2)

    def plan_queries(
        self, query_positions: Sequence[Tensor], context_positions: Sequence[Tensor]
    ) -> QueriesPlan:
        """Return a plan without data; see `Backend.plan_queries`."""
        pairs = zip(query_positions, context_positions, strict=True)
        return QueriesPlan(tuple(QueryPlan(*pair, None) for pair in pairs), None)

    def attend_queries(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        context_keys: Sequence[Tensor],
        context_values: Sequence[Tensor],
        plan: QueriesPlan,
        spec: AttentionSpec,
        *,
        scales: Sequence[KVScales] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute attention request by request; see `Backend.attend_queries`."""
        scales = [UNSCALED] * len(plan.parts) if scales is None else scales
        split = (x.split(plan.counts, dim=2) for x in (query, keys, values))
        requests = zip(*split, context_keys, context_values, plan.parts, scales, strict=True)
        outs, logsumexps = zip(
            *(_attend_query(spec, *request) for request in requests), strict=True
        )
        if len(outs) == 1:
            return outs[0], logsumexps[0]
        return torch.cat(outs, dim=1), torch.cat(logsumexps, dim=2)

    def attention_norm(
        self,
        query: Tensor,
        context_keys: Tensor,
        logsumexp: Tensor,
        plan: QueryPlan,
        spec: AttentionSpec,
        *,
        reduction: Reduction,
        values: Tensor | None = None,
    ) -> Tensor:
        """Compute norms in blocks of keys; see `Backend.attention_norm`."""
        return blocked_attention_norm(
            query, context_keys, logsumexp, plan, spec, reduction=reduction, values=values
        )


def _attend_query(
    spec: AttentionSpec,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    context_keys: Tensor,
    context_values: Tensor,
    plan: QueryPlan,
    scales: KVScales,
) -> tuple[Tensor, Tensor]:
    """Compute the attention of one request's query tokens over its context and themselves."""
    rows = plan.query_positions
    own_mask = mask = None
    if spec.window is not None:  # the whole context lies before the query
        own_mask, mask = spec.hidden(rows, rows), spec.hidden(rows, plan.context_positions)
    own = attend_partial(query, keys, values, spec, mask=own_mask, causal=own_mask is None)
    seen, its_logsumexp = attend_quantized(
        query, context_keys, context_values, spec.scaled(scales.keys), mask=mask
    )
    if scales.values != 1:
        seen.mul_(scales.values)
    out, logsumexp = add_sinks(*merge_partial(seen, its_logsumexp, *own), spec)
    return out.transpose(1, 2), logsumexp


def _attend_tile(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tile: Tile,
    planned: TiledRows,
    spec: AttentionSpec,
) -> Tensor:
    """Compute the attention of one tile's rows, ``[1, heads, rows, head_dim]``."""
    return add_sinks(*_attend_keys(query, keys, values, tile, planned, spec), spec)[0]


def _attend_keys(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tile: Tile,
    planned: TiledRows,
    spec: AttentionSpec,
) -> tuple[Tensor, Tensor]:
    """Compute a tile's attention to keys, without sinks, and its log-sum-exp."""
    first, end, window = tile.first, tile.last + 1, spec.window
    if tile.stop - tile.start == 1:  # no mask: it sees all slots up to its own
        begin = 0 if window is None else max(0, end - window)
        return attend_quantized(query, keys[:, :, begin:end], values[:, :, begin:end], spec)
    if window is not None and tile.last >= window:
        # The edge of the window needs a mask too: one masked call over all that the rows see.
        begin = max(0, first - window + 1)
        mask = planned.mask(tile, begin, spec)
        return attend_quantized(
            query, keys[:, :, begin:end], values[:, :, begin:end], spec, mask=mask
        )
    fringe = slice(first, end)
    if tile.adjacent:
        seen = attend_quantized(query, keys[:, :, fringe], values[:, :, fringe], spec, causal=True)
    else:
        mask = planned.mask(tile, first, dataclasses.replace(spec, window=None))
        seen = attend_quantized(query, keys[:, :, fringe], values[:, :, fringe], spec, mask=mask)
    if first == 0:
        return seen
    before = attend_quantized(query, keys[:, :, :first], values[:, :, :first], spec)
    return merge_partial(*before, *seen)
