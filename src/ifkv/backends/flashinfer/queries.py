"""Query tokens of requests: one call over their contexts and one over the query tokens."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ifkv.backends.base import AttentionSpec, Backend
from ifkv.backends.flashinfer.calls import Call, Planned
from ifkv.backends.flashinfer.pages import (
    PagedBuffers,
    view_as_pages,
    view_as_slots,
    view_together,
)
from ifkv.backends.flashinfer.shapes import CallShape
from ifkv.backends.flashinfer.tiles import CallKind, Part
from ifkv.backends.flashinfer.wrappers import WrapperPool
from ifkv.backends.norms import attention_norm
from ifkv.backends.plans import UNSCALED, KVScales, QueriesPlan, QueryPlan, Reduction


class QueryAttention(Backend):
    """Part of the FlashInfer backend for query tokens: their attention, and attention norms."""

    _module: Any
    _pool: WrapperPool

    def plan_queries(
        self, query_positions: Sequence[Tensor], context_positions: Sequence[Tensor]
    ) -> QueriesPlan:
        """Return a plan whose calls are made in the first layer; see `Backend.plan_queries`."""
        pairs = zip(query_positions, context_positions, strict=True)
        return QueriesPlan(tuple(QueryPlan(*pair, Planned()) for pair in pairs), Planned())

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
        """Compute attention of query tokens; see `Backend.attend_queries`.

        Requests share calls under the same conditions as in ``attend_requests``.
        """
        lengths = [context.shape[2] for context in context_keys]
        scales = [UNSCALED] * len(lengths) if scales is None else scales
        pages = None
        if len(lengths) > 1 and min(lengths) > 0 and len(set(scales)) == 1:
            pages = view_together(context_keys, context_values, lengths)
        if pages is None:
            split = (x.split(plan.counts, dim=2) for x in (query, keys, values))
            requests = zip(*split, context_keys, context_values, plan.parts, scales, strict=True)
            found = [self._attend_query(spec, *request) for request in requests]
            outs, logsumexps = zip(*found, strict=True)
            if len(outs) == 1:
                return outs[0], logsumexps[0]
            return torch.cat(outs, dim=1), torch.cat(logsumexps, dim=2)
        # The query tokens' keys of a request may begin at any slot, so their pages have one slot.
        starts = tuple(itertools.accumulate(plan.counts[:-1], initial=0))
        own_pages = dataclasses.replace(view_as_slots(keys, values), first_pages=starts)
        own = self._attend_spans(query, own_pages, plan.parts, plan.detail, spec)
        seen = self._attend_spans(
            query, pages, plan.parts, plan.detail, spec, context=True, scales=scales[0]
        )
        out, logsumexp = self._module.merge_state(*seen, *own)
        return out[None], logsumexp.mul(math.log(2)).T[None]

    def _attend_query(
        self,
        spec: AttentionSpec,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        context_keys: Tensor,
        context_values: Tensor,
        plan: QueryPlan,
        scales: KVScales,
    ) -> tuple[Tensor, Tensor]:
        """Compute the attention of one request's query tokens in separate calls."""
        plans, planned = (plan,), plan.detail
        own_pages = view_as_slots(keys, values)
        own, own_logsumexp = self._attend_spans(query, own_pages, plans, planned, spec)
        if context_keys.shape[2] > 0:
            pages = view_as_pages(context_keys, context_values, context_keys.shape[2])
            seen = self._attend_spans(
                query, pages, plans, planned, spec, context=True, scales=scales
            )
            own, own_logsumexp = self._module.merge_state(*seen, own, own_logsumexp)
        return own[None], own_logsumexp.mul(math.log(2)).T[None]

    def _attend_spans(
        self,
        query: Tensor,
        buffers: PagedBuffers,
        plans: Sequence[QueryPlan],
        planned: Planned,
        spec: AttentionSpec,
        *,
        scales: KVScales = UNSCALED,
        context: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Compute attention of query tokens over their contexts, or over themselves.

        Returns:
            ``[rows, heads, head_dim]`` and base-2 log-sum-exp ``[rows, heads]``.
        """
        shape = CallShape.of(query, buffers.keys, buffers.page_size, spec)
        firsts = buffers.first_pages
        call: Call = planned.once(
            (shape, context, firsts),
            lambda: query_call(self._pool, plans, firsts, shape, context=context),
        )
        return call.run(query[0].transpose(0, 1), buffers, scales)

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
        """Compute norms by a Triton kernel on CUDA; see `Backend.attention_norm`."""
        return attention_norm(
            query, context_keys, logsumexp, plan, spec, reduction=reduction, values=values
        )


def query_call(
    pool: WrapperPool,
    plans: Sequence[QueryPlan],
    first_pages: Sequence[int],
    shape: CallShape,
    *,
    context: bool,
) -> Call:
    """Plan one call for the query tokens of all requests, each over its own keys.

    Args:
        pool: Pool that lends the wrapper.
        plans: Plan of each request; their query tokens are concatenated.
        first_pages: First page of each request's keys; its other pages follow.
        shape: Heads, dtypes and other sizes.
        context: True for the keys of the contexts, all of which are seen; False for those of the
            query tokens, which are seen causally.
    """
    kind: CallKind = "masked" if shape.window is not None else "full" if context else "causal"
    positions = [plan.context_positions if context else plan.query_positions for plan in plans]
    ends = [0, *itertools.accumulate(len(plan.query_positions) for plan in plans)]
    parts = [
        Part(index, *rows, 0, len(keys))
        for index, (rows, keys) in enumerate(zip(itertools.pairwise(ends), positions, strict=True))
    ]
    tables = [
        torch.arange(first, first - (-len(keys) // shape.page_size), dtype=torch.int32)
        for first, keys in zip(first_pages, positions, strict=True)
    ]
    asked = torch.cat([plan.query_positions for plan in plans])
    return Call(pool, kind, parts, tables, shape, asked, positions)
