"""Pending tokens of a context: their rows join the next pass over the cache.

A pass over few rows costs mostly the reading of the weights. So tokens between the rows of a
conversation and its new documents get no pass to themselves: the scoring pass runs them up to its
deepest layer, and the recompute runs the layers that remain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ifkv.cache.pending import PendingTokens
from ifkv.forward.layers import embed
from ifkv.steps.rows_pass import RowsPass

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.cache.stitched import StitchedCache
    from ifkv.forward.passes import AttentionPass, LayerCall
    from ifkv.patching.handle import PatchHandle


def defer(model: PreTrainedModel, cache: StitchedCache, token_ids: Sequence[int]) -> None:
    """Append tokens to a cache's context and leave their rows to the next passes over it.

    Until [ifkv.recompute][] has run, only scoring passes may read the cache's rows. That recompute
    must not name a slot before these tokens: the layers of the scoring pass would have read its
    old row, deeper layers would read its new one.

    Args:
        model: A patched model.
        cache: A stitched cache that ends with its context and has no pending tokens.
        token_ids: The tokens; nothing happens if there are none.
    """
    if token_ids:
        slots = cache.add_tokens(token_ids)
        cache.pending = PendingTokens(slots, embed(model, cache.token_ids[int(slots[0]) :]))


def pending_in(
    model: PreTrainedModel, caches: Sequence[StitchedCache], deepest: int
) -> list[StitchedCache]:
    """Return the caches whose pending tokens must join a pass that runs up to layer ``deepest``.

    Caches that share their pending tokens are named once. Tokens that an earlier, shallower pass
    has run begin again with the first layer.
    """
    found = {}
    for cache in caches:
        pending = cache.pending
        if pending is None or not len(pending.slots) or 0 < pending.layer >= deepest:
            continue
        if pending.layer:
            slots = pending.slots.to(cache.token_ids.device)
            pending.hidden = embed(model, cache.token_ids[slots])
            pending.layer = 0
        found[id(pending)] = cache
    return list(found.values())


class PendingPass:
    """Attention pass that runs pending tokens in front of the rows of another pass.

    In every layer the keys and values of the pending tokens are written first, so that the other
    rows, which stand behind them, see them. Each kind of row attends as in a separate pass.

    Attributes:
        positions: Of all pending tokens, long, on the model's device.
        hidden: Input of the first layer at the pending tokens, ``[1, n, hidden]``.

    Args:
        model: A patched model.
        handle: Its handle.
        caches: The caches that `pending_in` returned.
        inner: The pass of the other rows.
        deepest: The last layer of the pass. It computes only keys and values of the pending
            tokens, because their next pass begins with this layer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        handle: PatchHandle,
        caches: Sequence[StitchedCache],
        inner: AttentionPass,
        deepest: int,
    ):
        self._pending = [cache.pending for cache in caches if cache.pending is not None]
        self._counts = [len(each.slots) for each in self._pending]
        plan = handle.backend.plan_requests(
            [each.slots for each in self._pending],
            [cache.context_length for cache in caches],
            model.device,
        )
        self._first = RowsPass(handle, caches, self._counts, plan, skip_attention_in=deepest)
        self._inner = inner
        self._rows = sum(self._counts)
        self.positions = self._first.positions
        self.hidden = torch.cat([each.hidden for each in self._pending], dim=1)

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, **unread: object
    ) -> tuple[Tensor, Tensor]:
        """Write the pending rows; hand the others to the inner pass."""
        rows = self._rows
        self._first.update(keys[:, :, :rows], values[:, :, :rows], layer_idx)
        return self._inner.update(keys[:, :, rows:], values[:, :, rows:], layer_idx)

    def attend(self, call: LayerCall) -> Tensor:
        """Compute the attention of each kind of row as in a separate pass."""
        first, rest = call.query[:, :, : self._rows], call.query[:, :, self._rows :]
        # Keys and values are the inner pass's; the pending rows read theirs from the caches.
        return torch.cat(
            (
                self._first.attend(call._replace(query=first)),
                self._inner.attend(call._replace(query=rest)),
            ),
            dim=1,
        )

    def keep_progress(self, hidden: Tensor, layer: int) -> None:
        """Record that the pending tokens have run up to a layer.

        Args:
            hidden: Input of ``layer``, pending tokens first, ``[1, n + others, hidden]``.
            layer: The deepest layer of the pass, which computed only keys and values.
        """
        parts = hidden[:, : self._rows].clone().split(self._counts, dim=1)
        for pending, part in zip(self._pending, parts, strict=True):
            pending.hidden, pending.layer = part, layer
