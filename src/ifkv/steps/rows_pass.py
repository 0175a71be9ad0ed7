"""The attention pass of rows scattered over stitched caches."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ifkv.backends.base import RowPlan
from ifkv.cache.stitched import StitchedCache
from ifkv.forward.passes import LayerCall
from ifkv.models.rope import join_positions
from ifkv.patching.handle import PatchHandle


class RowsPass:
    """Attention pass of rows scattered over stitched caches: written, then position-causal.

    Args:
        handle: The model's handle.
        caches: The cache of each request.
        counts: Rows of each request, which follow one another.
        plan: From `Backend.plan_requests`, of the same requests.
        write: Write the rows' keys and values; False if they have been written.
        skip_attention_in: Layer that is run for its keys and values alone.
    """

    def __init__(
        self,
        handle: PatchHandle,
        caches: Sequence[StitchedCache],
        counts: Sequence[int],
        plan: RowPlan,
        *,
        write: bool = True,
        skip_attention_in: int | None = None,
    ):
        self._backend = handle.backend
        self._caches = caches
        self._counts = list(counts)
        self._slots = plan.slots.split(self._counts)
        self._plan = plan
        self._write = write
        self._skip = skip_attention_in

    @property
    def positions(self) -> Tensor:
        """Return the positions of the rows, long ``[rows]`` or ``[axes, rows]``."""
        if all(cache.plain for cache in self._caches):
            return self._plan.slots
        parts = zip(self._caches, self._slots, strict=True)
        return join_positions([cache.positions_at(own) for cache, own in parts])

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, **unread: object
    ) -> tuple[Tensor, Tensor]:
        """Write the rows at their slots; `attend` reads the whole buffers."""
        if self._write:
            parts = zip(
                self._caches,
                self._slots,
                keys.split(self._counts, dim=2),
                values.split(self._counts, dim=2),
                strict=True,
            )
            for cache, slots, own_keys, own_values in parts:
                cache.layers[layer_idx].write(slots, own_keys, own_values)
        return keys, values

    def attend(self, call: LayerCall) -> Tensor:
        """Compute the position-causal attention of the rows."""
        if call.layer_idx == self._skip:
            return call.query.transpose(1, 2)  # not read: the layer runs for its keys and values
        layers = [cache.layers[call.layer_idx] for cache in self._caches]
        return self._backend.attend_requests(
            call.query,
            [layer.key_buffer for layer in layers],
            [layer.value_buffer for layer in layers],
            self._plan,
            call.spec,
            scales=[layer.scales for layer in layers],
        )
