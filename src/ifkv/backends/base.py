"""Attention contract: the interface of all backends.

The method needs four operations: documents behind a shared prefix (ragged, block-diagonal), rows
scattered over stitched caches (position-causal; decoding is the case of one row), query tokens that
see whole contexts, and attention norms. Rows and queries belong to a list of requests, each with
its own cache; a single request is a list of one. A forward is planned once, on index arrays, and
the plan is run in every layer. Log-sum-exps are natural logarithms.

Shapes: ``heads`` query heads share ``kv_heads`` key heads in equal groups. Both are read from the
tensors and never from a config. A stitched cache may hold FP8 rows (`ifkv.cache.fp8_layer`): its
keys and values are then float8, whatever the query's dtype, and must be multiplied by their scales.
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
    """Base class of attention backends.

    Attributes:
        name: Name of the backend for ``ifkv.patch(model, backend=...)``.
        features: Fields of `AttentionSpec` that it supports beyond ``scaling`` and ``window``.
    """

    name: str
    features: ClassVar[frozenset[str]] = frozenset()

    def supports(self, spec: AttentionSpec) -> bool:
        """True if every field of the spec that is set is ``scaling``, ``window`` or a feature."""
        return spec.extras.keys() <= self.features

    def check_spec(self, spec: AttentionSpec) -> None:
        """Raise if this backend does not support the attention of a layer.

        Raises:
            UnsupportedModelError: The spec has a field that is not among the features.
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
        """Plan a ragged batch of documents.

        Args:
            lengths: Rows of each document.
            prefix_length: Rows of the prefix.
            device: Device of the attention.
        """

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
        """Compute the attention of documents; rows see the prefix and, causally, their document.

        Args:
            query: ``[1, heads, rows, head_dim]``, rotated to local positions.
            keys: ``[1, kv_heads, rows, head_dim]``, rotated to local positions.
            values: ``[1, kv_heads, rows, head_dim]``.
            prefix_keys: ``[1, kv_heads, prefix_length, head_dim]``, rotated.
            prefix_values: ``[1, kv_heads, prefix_length, head_dim]``.
            plan: From `plan_documents`.
            spec: Scaling and mask of the layer.

        Returns:
            ``[1, rows, heads, head_dim]``.
        """

    @abstractmethod
    def plan_requests(
        self, slots: Sequence[Tensor], kv_lengths: Sequence[int], device: torch.device
    ) -> RowPlan:
        """Plan position-causal rows of requests, each over its own cache.

        Args:
            slots: Slots of each request's rows, long ``[rows]`` on the CPU, ascending and unique;
                may be empty.
            kv_lengths: Slots in use of each request after the rows' keys are written; greater than
                its last slot.
            device: Device of the attention.

        Returns:
            A plan for `attend_requests`. Its ``slots`` are those of all requests, concatenated.
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

        Slots behind the last row of a request are never read.

        Args:
            query: ``[1, heads, rows, head_dim]``, the rows of all requests concatenated.
            keys: Keys of each request, ``[1, kv_heads, >= its kv_length, head_dim]``, with those of
                the rows already written.
            values: Values of each request, of the same shapes.
            plan: From `plan_requests`.
            spec: Scaling and mask of the layer.
            scales: Scales of each request's keys and values; 1 if None.

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

        This is a step of ``model.generate()``. It is called in every layer, without a plan.

        Args:
            query: ``[sequences, heads, 1, head_dim]``.
            keys: ``[sequences, kv_heads, n, head_dim]``; the last are those of the new rows.
            values: Values of the same shape.
            spec: Scaling and mask of the layer; the window hides nothing here.
            scales: Scales of keys and values.

        Returns:
            ``[sequences, 1, heads, head_dim]``; None to use the attention that the model had
            before the patch, with FP8 keys and values dequantized for it.
        """
        return None

    @abstractmethod
    def plan_queries(
        self, query_positions: Sequence[Tensor], context_positions: Sequence[Tensor]
    ) -> QueriesPlan:
        """Plan query tokens of requests, each over its own context.

        Args:
            query_positions: Positions of each request's query tokens, long ``[Q]``, on the compute
                device. Only windows read positions.
            context_positions: Positions of each request's context, long ``[T]``, on the compute
                device.
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
        """Compute the attention of query tokens over their context and, causally, themselves.

        Args:
            query: ``[1, heads, Q, head_dim]``, the tokens of all requests concatenated.
            keys: Keys of the query tokens, ``[1, kv_heads, Q, head_dim]``.
            values: Values of the query tokens, of the same shape.
            context_keys: Keys of each request's context, ``[1, kv_heads, T, head_dim]``.
            context_values: Values of each request's context, of the same shapes.
            plan: From `plan_queries`.
            spec: Scaling and mask of the layer; distances are between positions.
            scales: Scales of each context's keys and values; 1 if None.

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
        """Compute each context slot's norm of the head-mean attention over queries (2603.05353).

        With ``a[i, j]`` the mean over heads of ``exp(q_i k_j scaling - logsumexp_i)``, the norm is
        ``sqrt(sum_i a[i, j]^2)`` for ``"l2"`` and ``sum_i a[i, j]`` for ``"sum"``.

        Args:
            query: Query tokens of one request, ``[1, heads, Q, head_dim]``.
            context_keys: ``[1, kv_heads, T, head_dim]``.
            logsumexp: ``[1, heads, Q]``, from `attend_queries`.
            plan: The request's part of a plan from `plan_queries`.
            spec: Scaling and mask of the layer; the scaling includes the scale of FP8 keys.
            reduction: ``"l2"`` or ``"sum"``.
            values: Values of the context, ``[1, kv_heads, T, head_dim]``. If given, each slot's
                norm is multiplied by the mean over heads of the L1 norm of its values (2406.12335).

        Returns:
            ``[T]``, float32, or float64 if the query is.
        """
