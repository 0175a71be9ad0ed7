"""The attention contract that every backend fulfils.

Four operations carry the whole method: documents behind a shared prefix (ragged, block-diagonal),
rows scattered over stitched caches (position-causal; decoding is the one-row case), query tokens
that see whole contexts, and attention norms. Rows and queries come as those of a list of requests,
each over a cache of its own; a single request is a list of one. What can be planned is planned
once per forward on index arrays and run once per layer. Log-sum-exps are natural logarithms.

Shapes: ``heads`` query heads share ``kv_heads`` key heads in equal groups; both are read from the
tensors, never from a config. A stitched cache may hold FP8 rows (`ifkv.cache.fp8_layer`): keys and
values are then float8, whatever the query is, and stand for themselves times their scales.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

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
from ifkv.backends.spec import AttentionSpec
from ifkv.errors import UnsupportedModelError

__all__ = ["AttentionSpec", "Backend", "DocumentPlan", "QueryPlan", "Reduction", "RowPlan"]


class Backend(ABC):
    """One implementation of the contract.

    Attributes:
        name: What ``ifkv.patch(model, backend=...)`` calls it.
        features: Names of the fields of `AttentionSpec` that it can do beyond ``scaling``
            and ``window``.
    """

    name: str
    features: ClassVar[frozenset[str]] = frozenset()

    def check_spec(self, spec: AttentionSpec) -> None:
        """Raise if a layer attends in a way that this backend has not been taught.

        Raises:
            UnsupportedModelError: The spec asks for a field that is not among the features.
        """
        for name, value in spec.extras.items():
            if name not in self.features:
                shown = value if isinstance(value, float) else "given"
                raise UnsupportedModelError(
                    f"a layer attends with {name} ({shown}), which the backend {self.name!r} "
                    "cannot do; its answers would be wrong. Use a backend that can, or a model "
                    "without it."
                )

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
        spec: AttentionSpec,
    ) -> Tensor:
        """Compute attention of documents that see the prefix and, causally, themselves.

        Args:
            query: ``[1, heads, rows, head_dim]``, rotated to local positions.
            keys: ``[1, kv_heads, rows, head_dim]``, rotated to local positions.
            values: ``[1, kv_heads, rows, head_dim]``.
            prefix_keys: ``[1, kv_heads, prefix_length, head_dim]``, rotated.
            prefix_values: ``[1, kv_heads, prefix_length, head_dim]``.
            plan: From `plan_documents`.
            spec: How the layer attends.

        Returns:
            ``[1, rows, heads, head_dim]``.
        """

    @abstractmethod
    def plan_requests(
        self, slots: Sequence[Tensor], kv_lengths: Sequence[int], device: torch.device
    ) -> RowPlan:
        """Plan position-causal rows of requests, each over a cache of its own.

        Args:
            slots: For each request its rows' slots, long ``[rows]`` on the CPU, ascending and
                unique; none is allowed.
            kv_lengths: For each request its slots in use once the rows' keys are written; above
                the last slot.
            device: Where attention will run.

        Returns:
            A plan for `attend_requests`; its ``slots`` are those of all requests, one
            request after the other.
        """

    @abstractmethod
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
        """Compute position-causal attention of scattered rows: each sees the slots up to its own.

        Slots behind a request's last row are never read.

        Args:
            query: ``[1, heads, rows, head_dim]``, the requests' rows one after the other.
            keys: For each request ``[1, kv_heads, >= its kv_length, head_dim]``, the rows' own
                keys written.
            values: Of the same shapes.
            plan: From `plan_requests`.
            spec: How the layer attends.
            scales: For each request those of its keys and values; 1 if None.

        Returns:
            ``[1, rows, heads, head_dim]``.
        """

    def decode(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        spec: AttentionSpec,
        *,
        scales: KVScales = UNSCALED,
    ) -> Tensor | None:
        """Compute one new row per sequence over all of a stitched cache, in an ordinary model call.

        That is a step of ``model.generate()``. Called in every layer, without a plan.

        Args:
            query: ``[sequences, heads, 1, head_dim]``.
            keys: ``[sequences, kv_heads, n, head_dim]``, the rows' own last.
            values: Of the same shape.
            spec: How the layer attends; its window hides nothing here.
            scales: Of keys and values.

        Returns:
            ``[sequences, 1, heads, head_dim]``; None leaves the row to the attention that the
            model would have used without ifkv (over 8-bit rows: widened for it).
        """
        return None

    @abstractmethod
    def plan_queries(
        self, query_positions: Sequence[Tensor], context_positions: Sequence[Tensor]
    ) -> QueriesPlan:
        """Plan query tokens of requests, each over a context of its own.

        Args:
            query_positions: For each request long ``[Q]``, on the compute device; only windows
                read positions.
            context_positions: For each request long ``[T]``, on the compute device.
        """

    @abstractmethod
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
        """Compute attention of query tokens that see their context and, causally, themselves.

        Args:
            query: ``[1, heads, Q, head_dim]``, the requests' tokens one after the other.
            keys: The query tokens' own, ``[1, kv_heads, Q, head_dim]``.
            values: Of the same shape.
            context_keys: For each request ``[1, kv_heads, T, head_dim]``.
            context_values: Of the same shapes.
            plan: From `plan_queries`.
            spec: How the layer attends; distances are between positions.
            scales: For each request those of its context's keys and values; 1 if None.

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
        spec: AttentionSpec,
        *,
        reduction: Reduction,
        values: Tensor | None = None,
    ) -> Tensor:
        """Norm over query tokens of the head-mean attention to each context slot (2603.05353).

        With ``a[i, j]`` the mean over heads of ``exp(q_i k_j scaling - logsumexp_i)``, it is
        ``sqrt(sum_i a[i, j]^2)`` for ``"l2"`` and ``sum_i a[i, j]`` for ``"sum"``.

        Args:
            query: ``[1, heads, Q, head_dim]``, of one request.
            context_keys: ``[1, kv_heads, T, head_dim]``.
            logsumexp: ``[1, heads, Q]``, from `attend_queries`.
            plan: The request's part of a plan from `plan_queries`.
            spec: How the layer attends; its scaling includes the scale of 8-bit context keys.
            reduction: ``"l2"`` or ``"sum"``.
            values: Of the context, ``[1, kv_heads, T, head_dim]``: each slot's norm is multiplied
                by the L1 norm of its values, averaged over heads (2406.12335). Not if None.

        Returns:
            ``[T]``, float32, or float64 if the query is.
        """
