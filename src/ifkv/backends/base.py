"""The attention contract that every backend fulfils.

Four operations carry the whole method: documents behind a shared prefix (ragged, block-diagonal),
rows scattered over a stitched cache (position-causal; decoding is the one-row case), query tokens
that see a whole context, and attention norms. Where something can be planned, it is planned once
per forward on index arrays and run once per layer. Log-sum-exps are natural logarithms.

Shapes: ``heads`` query heads share ``kv_heads`` key heads in equal groups; both are read from the
tensors, never from a config.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Reduction = Literal["l2", "sum"]


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """Rows of one forward over a stitched cache, planned once and used in every layer.

    Attributes:
        slots: Cache slot of each row, long ``[rows]``, ascending, on the compute device. In the
            GLOBAL geometry a slot is its position: row i sees slots 0 to ``slots[i]``.
        kv_length: Slots in use once the rows' own keys have been written.
        detail: What the backend has prepared.
    """

    slots: Tensor
    kv_length: int
    detail: Any


@dataclasses.dataclass(frozen=True)
class DocumentPlan:
    """Documents of one ragged forward.

    Attributes:
        lengths: Rows of each document; they follow one another in the batch.
        prefix_length: Tokens of the prefix that every document sees.
        detail: What the backend has prepared.
    """

    lengths: tuple[int, ...]
    prefix_length: int
    detail: Any


@dataclasses.dataclass(frozen=True)
class QueryPlan:
    """Query tokens over a whole context.

    Attributes:
        query_positions: Long ``[Q]``, on the compute device.
        context_positions: Long ``[T]``, on the compute device.
        detail: What the backend has prepared.
    """

    query_positions: Tensor
    context_positions: Tensor
    detail: Any


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

        Returns:
            ``[1, rows, heads, head_dim]``.
        """
        parts: tuple[RowPlan, ...] = plan.detail
        if len(parts) == 1:
            return self.attend_rows(
                query, keys[0], values[0], parts[0], scaling=scaling, window=window
            )
        outs = [
            self.attend_rows(rows, own_keys, own_values, part, scaling=scaling, window=window)
            for rows, own_keys, own_values, part in zip(
                query.split([len(part.slots) for part in parts], dim=2),
                keys,
                values,
                parts,
                strict=True,
            )
            if len(part.slots)
        ]
        return torch.cat(outs, dim=1)

    def decode(
        self, query: Tensor, keys: Tensor, values: Tensor, *, scaling: float
    ) -> Tensor | None:
        """One new row per sequence over all of a stitched cache, in an ordinary model call.

        That is a step of ``model.generate()``. Called in every layer, without a plan.

        Args:
            query: ``[sequences, heads, 1, head_dim]``.
            keys: ``[sequences, kv_heads, n, head_dim]``, the rows' own last.
            values: Of the same shape.
            scaling: Factor on the logits.

        Returns:
            ``[sequences, 1, heads, head_dim]``; None leaves the row to the attention that the
            model would have used without ifkv.
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

        Returns:
            The output ``[1, Q, heads, head_dim]`` and the log-sum-exp ``[1, heads, Q]`` over
            context and query tokens.
        """

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
    ) -> Tensor:
        """Norm over query tokens of the head-mean attention to each context slot (2603.05353).

        With ``a[i, j]`` the mean over heads of ``exp(q_i k_j scaling - logsumexp_i)``, it is
        ``sqrt(sum_i a[i, j]^2)`` for ``"l2"`` and ``sum_i a[i, j]`` for ``"sum"``.

        Args:
            query: ``[1, heads, Q, head_dim]``.
            context_keys: ``[1, kv_heads, T, head_dim]``.
            logsumexp: ``[1, heads, Q]``, from :meth:`attend_query`.
            plan: From :meth:`plan_query`.
            scaling: Factor on the logits.
            reduction: ``"l2"`` or ``"sum"``.
            window: As in :meth:`attend_query`.

        Returns:
            ``[T]``, float32, or float64 if the query is.
        """
