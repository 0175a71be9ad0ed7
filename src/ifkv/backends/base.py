"""The attention contract that every backend fulfils.

Four operations carry the whole method: documents behind a shared prefix (ragged, block-diagonal),
rows scattered over a stitched cache (position-causal; decoding is the one-row case), query tokens
that see a whole context, and attention norms. Where something can be planned, it is planned once
per forward on index arrays and run once per layer. Log-sum-exps are natural logarithms.

Shapes: ``heads`` query heads share ``kv_heads`` key heads in equal groups; both are read from the
tensors, never from a config. A stitched cache may hold 8-bit rows (:mod:`ifkv.rounding`): keys and
values are then float8, whatever the query is, and stand for themselves times their scales.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ifkv.backends.plans import (
    UNSCALED,
    DocumentPlan,
    KVScales,
    QueriesPlan,
    QueryPlan,
    Reduction,
    RowPlan,
)

__all__ = ["Backend", "DocumentPlan", "QueryPlan", "Reduction", "RowPlan"]


class Backend(ABC):
    """One implementation of the contract.

    Attributes:
        name: What ``ifkv.patch(model, backend=...)`` calls it.
    """

    name: str

    @abstractmethod
    def plan_documents(
        self, lengths: tuple[int, ...], prefix_length: int, device: torch.device
    ) -> DocumentPlan:
        """Plan a ragged batch of documents."""

    @abstractmethod
    def attend_documents(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        prefix_keys: Tensor,
        prefix_values: Tensor,
        plan: DocumentPlan,
        *,
        scaling: float,
        window: int | None,
    ) -> Tensor:
        """Attention of documents that see the prefix and, causally, themselves.

        Args:
            query: ``[1, heads, rows, head_dim]``, rotated to local positions.
            keys: ``[1, kv_heads, rows, head_dim]``, rotated to local positions.
            values: ``[1, kv_heads, rows, head_dim]``.
            prefix_keys: ``[1, kv_heads, prefix_length, head_dim]``, rotated.
            prefix_values: ``[1, kv_heads, prefix_length, head_dim]``.
            plan: From :meth:`plan_documents`.
            scaling: Factor on the logits.
            window: A row sees keys fewer than this many positions behind it; None sees all.

        Returns:
            ``[1, rows, heads, head_dim]``.
        """

    @abstractmethod
    def plan_rows(self, slots: Tensor, kv_length: int, device: torch.device) -> RowPlan:
        """Plan position-causal rows.

        Args:
            slots: Long ``[rows]`` on the CPU, ascending and unique.
            kv_length: Slots in use once the rows' keys are written; above the last slot.
            device: Where attention will run.
        """

    @abstractmethod
    def attend_rows(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        plan: RowPlan,
        *,
        scaling: float,
        window: int | None,
        scales: KVScales = UNSCALED,
    ) -> Tensor:
        """Position-causal attention of scattered rows: each sees the slots up to its own.

        Slots behind the last row are never read.

        Args:
            query: ``[1, heads, rows, head_dim]``.
            keys: ``[1, kv_heads, >= kv_length, head_dim]``, the rows' own keys written.
            values: Of the same shape.
            plan: From :meth:`plan_rows`.
            scaling: Factor on the logits.
            window: As in :meth:`attend_documents`.
            scales: Of keys and values.

        Returns:
            ``[1, rows, heads, head_dim]``.
        """

    def plan_requests(
        self, slots: Sequence[Tensor], kv_lengths: Sequence[int], device: torch.device
    ) -> RowPlan:
        """Plan position-causal rows of several requests, each over a cache of its own.

        Args:
            slots: For each request its rows' slots, as in :meth:`plan_rows`; none is allowed.
            kv_lengths: For each request its slots in use, as in :meth:`plan_rows`.
            device: Where attention will run.

        Returns:
            A plan for :meth:`attend_requests`; its ``slots`` are those of all requests, one
            request after the other.
        """
        parts = tuple(
            self.plan_rows(own, length, device)
            for own, length in zip(slots, kv_lengths, strict=True)
        )
        together = torch.cat([part.slots for part in parts])
        return RowPlan(together, max(kv_lengths, default=0), parts)

    def attend_requests(
        self,
        query: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        plan: RowPlan,
        *,
        scaling: float,
        window: int | None,
        scales: Sequence[KVScales] | None = None,
    ) -> Tensor:
        """Position-causal attention of several requests' rows, each over its own cache.

        A backend that can run requests together does; this one runs them one by one.

        Args:
            query: ``[1, heads, rows, head_dim]``, the requests' rows one after the other.
            keys: For each request ``[1, kv_heads, >= its kv_length, head_dim]``.
            values: Of the same shapes.
            plan: From :meth:`plan_requests`.
            scaling: Factor on the logits.
            window: As in :meth:`attend_documents`.
            scales: For each request those of its keys and values; 1 if None.

        Returns:
            ``[1, rows, heads, head_dim]``.
        """
        parts: tuple[RowPlan, ...] = plan.detail
        scales = [UNSCALED] * len(parts) if scales is None else scales
        outs = [
            self.attend_rows(
                rows, own_keys, own_values, part, scaling=scaling, window=window, scales=own_scales
            )
            for rows, own_keys, own_values, part, own_scales in zip(
                query.split([len(part.slots) for part in parts], dim=2),
                keys,
                values,
                parts,
                scales,
                strict=True,
            )
            if len(part.slots) or len(parts) == 1
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    def decode(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scaling: float,
        scales: KVScales = UNSCALED,
    ) -> Tensor | None:
        """One new row per sequence over all of a stitched cache, in an ordinary model call.

        That is a step of ``model.generate()``. Called in every layer, without a plan.

        Args:
            query: ``[sequences, heads, 1, head_dim]``.
            keys: ``[sequences, kv_heads, n, head_dim]``, the rows' own last.
            values: Of the same shape.
            scaling: Factor on the logits.
            scales: Of keys and values.

        Returns:
            ``[sequences, 1, heads, head_dim]``; None leaves the row to the attention that the
            model would have used without ifkv (over 8-bit rows: widened for it).
        """
        return None

    def plan_query(self, query_positions: Tensor, context_positions: Tensor) -> QueryPlan:
        """Plan query tokens over a context.

        Args:
            query_positions: Long ``[Q]``, on the compute device; only windows read positions.
            context_positions: Long ``[T]``, on the compute device.
        """
        return QueryPlan(query_positions, context_positions, None)

    @abstractmethod
    def attend_query(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        context_keys: Tensor,
        context_values: Tensor,
        plan: QueryPlan,
        *,
        scaling: float,
        window: int | None,
        scales: KVScales = UNSCALED,
    ) -> tuple[Tensor, Tensor]:
        """Attention of query tokens that see a whole context and, causally, themselves.

        Args:
            query: ``[1, heads, Q, head_dim]``.
            keys: The query tokens' own, ``[1, kv_heads, Q, head_dim]``.
            values: Of the same shape.
            context_keys: ``[1, kv_heads, T, head_dim]``.
            context_values: Of the same shape.
            plan: From :meth:`plan_query`.
            scaling: Factor on the logits.
            window: As in :meth:`attend_documents`; distances are between positions.
            scales: Of the context's keys and values.

        Returns:
            The output ``[1, Q, heads, head_dim]`` and the log-sum-exp ``[1, heads, Q]`` over
            context and query tokens.
        """

    def plan_queries(
        self, query_positions: Sequence[Tensor], context_positions: Sequence[Tensor]
    ) -> QueriesPlan:
        """Plan query tokens of several requests, each over a context of its own.

        Args:
            query_positions: For each request, as in :meth:`plan_query`.
            context_positions: For each request, as in :meth:`plan_query`.
        """
        pairs = zip(query_positions, context_positions, strict=True)
        return QueriesPlan(tuple(self.plan_query(*pair) for pair in pairs), None)

    def attend_queries(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        context_keys: Sequence[Tensor],
        context_values: Sequence[Tensor],
        plan: QueriesPlan,
        *,
        scaling: float,
        window: int | None,
        scales: Sequence[KVScales],
    ) -> tuple[Tensor, Tensor]:
        """Attention of several requests' query tokens, each over its own context and itself.

        A backend that can run requests together does; this one runs them one by one.

        Args:
            query: ``[1, heads, Q, head_dim]``, the requests' tokens one after the other.
            keys: The query tokens' own, ``[1, kv_heads, Q, head_dim]``.
            values: Of the same shape.
            context_keys: For each request ``[1, kv_heads, T, head_dim]``.
            context_values: Of the same shapes.
            plan: From :meth:`plan_queries`.
            scaling: Factor on the logits.
            window: As in :meth:`attend_query`.
            scales: For each request those of its context's keys and values.

        Returns:
            As :meth:`attend_query`, the requests' tokens one after the other.
        """
        how: dict[str, Any] = {"scaling": scaling, "window": window}
        if len(plan.parts) == 1:
            own, context = (query, keys, values), (context_keys[0], context_values[0])
            return self.attend_query(*own, *context, plan.parts[0], scales=scales[0], **how)
        split = (x.split(plan.counts, dim=2) for x in (query, keys, values))
        requests = zip(*split, context_keys, context_values, plan.parts, scales, strict=True)
        found = [self.attend_query(*tensors, scales=its, **how) for *tensors, its in requests]
        outs, logsumexps = zip(*found, strict=True)
        return torch.cat(outs, dim=1), torch.cat(logsumexps, dim=2)

    @abstractmethod
    def attention_norm(
        self,
        query: Tensor,
        context_keys: Tensor,
        logsumexp: Tensor,
        plan: QueryPlan,
        *,
        scaling: float,
        reduction: Reduction,
        window: int | None,
        values: Tensor | None = None,
    ) -> Tensor:
        """Norm over query tokens of the head-mean attention to each context slot (2603.05353).

        With ``a[i, j]`` the mean over heads of ``exp(q_i k_j scaling - logsumexp_i)``, it is
        ``sqrt(sum_i a[i, j]^2)`` for ``"l2"`` and ``sum_i a[i, j]`` for ``"sum"``.

        Args:
            query: ``[1, heads, Q, head_dim]``.
            context_keys: ``[1, kv_heads, T, head_dim]``.
            logsumexp: ``[1, heads, Q]``, from :meth:`attend_query`.
            plan: From :meth:`plan_query`.
            scaling: Factor on the logits, the scale of 8-bit context keys included.
            reduction: ``"l2"`` or ``"sum"``.
            window: As in :meth:`attend_query`.
            values: Of the context, ``[1, kv_heads, T, head_dim]``: each slot's norm is multiplied
                by the L1 norm of its values, averaged over heads (2406.12335). Not if None.

        Returns:
            ``[T]``, float32, or float64 if the query is.
        """
