"""The attention pass of query tokens over stitched caches, and what a measure sees of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torch import Tensor

from ifkv.backends.base import AttentionSpec, Backend, QueryPlan
from ifkv.cache.stitched import StitchedCache
from ifkv.forward.passes import LayerCall
from ifkv.patching.handle import PatchHandle


@dataclasses.dataclass(frozen=True)
class QueryView:
    """What one layer of a scoring pass has to look at.

    Its tensors are as they are until the measure returns: what is to be kept has to be a copy.

    Attributes:
        backend: The model's attention backend.
        layer_idx: The layer.
        query: Rotated, ``[1, heads, Q, head_dim]``.
        context_keys: Rotated, ``[1, kv_heads, T, head_dim]``; views of the cache, not to be
            written, and perhaps float8, whatever the query is.
        context_values: As the keys, up to a factor.
        logsumexp: Of the attention over context and query tokens, ``[1, heads, Q]``.
        plan: The pass's plan, which holds the positions.
        spec: How the layer attends; its scaling is for these context keys as they are.
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
    """Query tokens over stitched caches that are only read; scores are taken on the way.

    Attributes:
        measured: For each request what was measured in each scoring layer passed so far.

    Args:
        handle: The model's handle.
        caches: The cache of each request.
        layers: Where to measure.
        positions: Of each request's query tokens, which follow one another.
        measure: What to measure.
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
        self._plan = handle.backend.plan_queries(positions, [cache.positions for cache in caches])
        self._measure = measure
        self.measured: list[list[Tensor]] = [[] for _ in caches]

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, **unread: object
    ) -> tuple[Tensor, Tensor]:
        """Keep nothing: the query's keys and values live for one layer."""
        return keys, values

    def attend(self, call: LayerCall) -> Tensor:
        """The queries' attention; in a scoring layer, the contexts' norms too."""
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
