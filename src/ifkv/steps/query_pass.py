"""The attention pass of query tokens over stitched caches, and a measure's view of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ifkv.backends.base import AttentionSpec, Backend, QueryPlan
from ifkv.cache.stitched import StitchedCache
from ifkv.forward.passes import LayerCall
from ifkv.patching.handle import PatchHandle


@dataclasses.dataclass(frozen=True)
class QueryView:
    """View of one layer of a scoring pass, for a measure.

    Valid only during the call: clone any tensor you keep.

    Attributes:
        backend: The model's attention backend.
        layer_idx: The layer.
        query: Rotated, ``[1, heads, Q, head_dim]``.
        context_keys: Rotated, ``[1, kv_heads, T, head_dim]``; views of the cache, not to be
            written. They are float8 in an FP8 cache, whatever the query's dtype.
        context_values: As the keys, up to a factor.
        logsumexp: Of the attention over context and query tokens, ``[1, heads, Q]``.
        plan: The pass's plan, which holds the positions.
        spec: How the layer attends; its scaling includes the scale of FP8 keys.
        value_scale: Factor on the context values.
    """

    backend: Backend
    layer_idx: int
    query: Tensor
    context_keys: Tensor
    context_values: Tensor
    logsumexp: Tensor
    plan: QueryPlan
    spec: AttentionSpec
    value_scale: float = 1.0


Measure = Callable[[QueryView], Tensor]


class ScoringPass:
    """Attention pass of query tokens over stitched caches, which are only read.

    Attributes:
        measured: For each request, the measure's results in the scoring layers passed so far.

    Args:
        handle: The model's handle.
        caches: The cache of each request.
        layers: The scoring layers.
        positions: Of each request's query tokens, which follow one another.
        measure: Called once for each request in each scoring layer.
    """

    def __init__(
        self,
        handle: PatchHandle,
        caches: Sequence[StitchedCache],
        layers: Sequence[int],
        positions: Sequence[Tensor],
        measure: Measure,
    ):
        self._backend = handle.backend
        self._caches = caches
        self._layers = frozenset(layers)
        contexts = [cache.positions for cache in caches]
        if any(context.ndim > 1 for context in contexts):
            # Backends need positions for windows alone, which no model of several axes has.
            contexts = [
                torch.arange(cache.context_length, device=at.device)
                for cache, at in zip(caches, positions, strict=True)
            ]
            positions = [
                torch.arange(len(at), device=at.device) + len(context)
                for at, context in zip(positions, contexts, strict=True)
            ]
        self._plan = handle.backend.plan_queries(positions, contexts)
        self._measure = measure
        self.measured: list[list[Tensor]] = [[] for _ in caches]

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, **unread: object
    ) -> tuple[Tensor, Tensor]:
        """Return keys and values unchanged; nothing is written to a cache."""
        return keys, values

    def attend(self, call: LayerCall) -> Tensor:
        """Compute the queries' attention; in a scoring layer, also call the measure."""
        layers = [cache.layers[call.layer_idx] for cache in self._caches]
        lengths = [cache.context_length for cache in self._caches]
        context_keys = [
            layer.key_buffer[:, :, :length] for layer, length in zip(layers, lengths, strict=True)
        ]
        context_values = [
            layer.value_buffer[:, :, :length] for layer, length in zip(layers, lengths, strict=True)
        ]
        out, logsumexp = self._backend.attend_queries(
            call.query,
            call.keys,
            call.values,
            context_keys,
            context_values,
            self._plan,
            call.spec,
            scales=[layer.scales for layer in layers],
        )
        if call.layer_idx not in self._layers:
            return out
        counts = self._plan.counts
        queries, logsumexps = [call.query], [logsumexp]
        if len(counts) > 1:
            queries, logsumexps = call.query.split(counts, dim=2), logsumexp.split(counts, dim=2)
        for index, layer in enumerate(layers):
            view = QueryView(
                backend=self._backend,
                layer_idx=call.layer_idx,
                query=queries[index],
                context_keys=context_keys[index],
                context_values=context_values[index],
                logsumexp=logsumexps[index],
                plan=self._plan.parts[index],
                spec=call.spec.scaled(layer.scales.keys),
                value_scale=layer.scales.values,
            )
            self.measured[index].append(self._measure(view))
        return out
