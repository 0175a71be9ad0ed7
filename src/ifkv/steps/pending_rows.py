"""Rows of a context that have not run yet: they run along with the next pass over the cache.

A pass over few rows costs mostly the reading of the weights. Tokens that come between the rows of
a conversation and its new documents therefore get no pass of their own: the scoring pass carries
them as deep as it goes, and the recompute takes them on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ifkv.cache.pending import OwedRows
from ifkv.cache.stitched import positions_of
from ifkv.forward.layers import embed
from ifkv.steps.rows_pass import RowsPass

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.cache.stitched import StitchedCache
    from ifkv.forward.passes import AttentionPass, LayerCall
    from ifkv.patching.handle import PatchHandle


def owe(model: PreTrainedModel, cache: StitchedCache, token_ids: Sequence[int]) -> None:
    """Lengthen a cache's context by tokens whose rows the next passes run along.

    Whatever reads the cache's rows before [ifkv.recompute][] must be a scoring pass. No slot
    before these tokens may be recomputed with them: in the layers that a scoring pass carried them
    through they would have seen it as it was, in deeper ones as it is then.

    Args:
        model: A patched model.
        cache: A stitched cache that ends with its context and owes nothing.
        token_ids: The tokens.
    """
    if token_ids:
        slots = cache.add_tokens(token_ids)
        cache.owed = OwedRows(slots, embed(model, cache.token_ids[int(slots[0]) :]))


def owing(
    model: PreTrainedModel, caches: Sequence[StitchedCache], deepest: int
) -> list[StitchedCache]:
    """Those of the caches whose owed rows a pass as deep as this has to run along, each once.

    Rows that an earlier pass carried, but not so deep, begin again with the first layer.
    """
    found = {}
    for cache in caches:
        owed = cache.owed
        if owed is None or not len(owed.slots) or 0 < owed.layer >= deepest:
            continue
        if owed.layer:
            owed.hidden = embed(model, cache.token_ids[owed.slots.to(cache.token_ids.device)])
            owed.layer = 0
        found[id(owed)] = cache
    return list(found.values())


class Carrying:
    """A pass in front of whose rows those run that caches owe.

    In every layer the owed rows' keys and values are written first, so that the others, which
    stand behind them, see them. Each kind of row attends as in a pass of its own.

    Attributes:
        positions: Of all owed rows, long, on the model's device.
        hidden: What the first layer is given of them, ``[1, n, hidden]``.

    Args:
        model: A patched model.
        handle: Its handle.
        caches: Caches that `owing` has named.
        inner: The pass of the other rows.
        deepest: The last layer that it runs. Owed rows run there for their keys and values alone:
            the next pass begins with this layer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        handle: PatchHandle,
        caches: Sequence[StitchedCache],
        inner: AttentionPass,
        deepest: int,
    ):
        self._owed = [cache.owed for cache in caches if cache.owed is not None]
        self._counts = [len(owed.slots) for owed in self._owed]
        plan = handle.backend.plan_requests(
            [owed.slots for owed in self._owed],
            [cache.context_length for cache in caches],
            model.device,
        )
        self._first = RowsPass(handle, caches, self._counts, plan, skip_attention_in=deepest)
        self._inner = inner
        self._rows = sum(self._counts)
        self.positions = positions_of(caches, plan.slots, self._counts)
        self.hidden = torch.cat([owed.hidden for owed in self._owed], dim=1)

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, **unread: object
    ) -> tuple[Tensor, Tensor]:
        """Write the owed rows; the others are the inner pass's."""
        rows = self._rows
        self._first.update(keys[:, :, :rows], values[:, :, :rows], layer_idx)
        return self._inner.update(keys[:, :, rows:], values[:, :, rows:], layer_idx)

    def attend(self, call: LayerCall) -> Tensor:
        """Each kind of row as in a pass of its own."""
        first, rest = call.query[:, :, : self._rows], call.query[:, :, self._rows :]
        # Keys and values are the inner pass's; the owed rows find theirs in the caches.
        return torch.cat(
            (
                self._first.attend(call._replace(query=first)),
                self._inner.attend(call._replace(query=rest)),
            ),
            dim=1,
        )

    def carried(self, hidden: Tensor, layer: int) -> None:
        """Keep how far the owed rows have come.

        Args:
            hidden: What ``layer`` was given, the owed rows first, ``[1, n + others, hidden]``.
            layer: The deepest layer that was run, for its keys and values.
        """
        parts = hidden[:, : self._rows].clone().split(self._counts, dim=1)
        for owed, part in zip(self._owed, parts, strict=True):
            owed.hidden, owed.layer = part, layer
