"""``cacheblend``: slots whose keys or values change most in the second layer (2405.16444)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ifkv.backends.base import RowPlan
from ifkv.cache.checks import check_cache
from ifkv.cost import Cost, ModelShape, causal_pairs
from ifkv.errors import InvalidInputError
from ifkv.forward.layers import embed, run_attention, run_layers
from ifkv.forward.passes import LayerCall
from ifkv.selectors.protocol import Ranked, Request
from ifkv.selectors.registry import register

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.cache.stitched import StitchedCache
    from ifkv.patching.handle import PatchHandle

Deviation = Literal["v", "k", "kv"]

# Rows that run at once. Nothing is written, so blocks do not depend on each other.
BLOCK_ROWS = 4096


@register
@dataclasses.dataclass(frozen=True)
class CacheBlend(Ranked):
    """Selector of the slots whose second layer's values deviate most from the stitched ones.

    CacheBlend (2405.16444), "high KV deviation" tokens: the first layer runs for all rows, which
    makes the second layer's keys and values exact. The slots whose mean squared deviation is
    largest are recomputed; the question plays no part. The paper filters again in every layer; its
    released code selects once, as this does. That code compares values, LMCache's rotated keys.

    Costs one whole layer, with its causal attention, and the projections of the next, for all rows
    but prefix and first document, which are exact: for n such rows ``2 n (P + P_a) + 4 W p``
    operations, with P elements of a layer's matrices, P_a of its attention block's, W = heads
    times head_dim and p pairs of a row and a slot up to its own.

    Attributes:
        deviation: Deviation of values, of rotated keys, or the sum of both.
    """

    name: ClassVar[str] = "cacheblend"
    paper: ClassVar[str] = "CacheBlend, arXiv 2405.16444"

    deviation: Deviation = "v"

    def rank(
        self, model: PreTrainedModel, cache: StitchedCache, request: Request
    ) -> tuple[Tensor, Cost]:
        """Score the slots; see `Ranked.rank`. Prefix and first document deviate by 0."""
        handle = check_cache(model, cache)
        if len(cache.layers) < 2:
            raise InvalidInputError(
                "cacheblend compares the second layer's keys and values, but the model has "
                f"{len(cache.layers)}, which is exact without recompute; use another selector."
            )
        start, total = cache.first_candidate, cache.context_length
        scores = torch.zeros(total, dtype=torch.float32, device=model.device)
        for first in range(start, total, BLOCK_ROWS):
            rows = torch.arange(first, min(first + BLOCK_ROWS, total))
            scores[first : first + len(rows)] = self._deviations(model, handle, cache, rows)
        return scores, _cost(ModelShape.of(model), start, total)

    @torch.no_grad()
    def _deviations(
        self, model: PreTrainedModel, handle: PatchHandle, cache: StitchedCache, rows: Tensor
    ) -> Tensor:
        """Compute the deviations of adjacent rows, ``[rows]``."""
        plan = handle.backend.plan_requests([rows], [cache.context_length], model.device)
        hidden = embed(model, cache.token_ids[plan.slots])
        positions = cache.positions_at(plan.slots)
        rotation = handle.rope.rotation(positions, hidden.dtype)
        run = _SecondLayer(handle, cache, plan)
        pictures = cache.pictures_at(rows)
        hidden = run_layers(model, hidden, positions, rotation, run, 1, pictures=pictures)
        run_attention(model, hidden, positions, rotation, run, 1)
        assert run.fresh is not None
        keys, values = run.fresh
        old_keys, old_values = cache.layers[1].rows(slice(int(rows[0]), int(rows[-1]) + 1))
        result = torch.zeros(len(rows), dtype=torch.float32, device=model.device)
        if "k" in self.deviation:
            result += _mean_square(keys - old_keys)
        if "v" in self.deviation:
            result += _mean_square(values - old_values)
        return result


def _mean_square(difference: Tensor) -> Tensor:
    """Average ``[1, kv_heads, rows, head_dim]`` over heads and dimensions, float32 ``[rows]``."""
    return difference.float().square().mean(dim=(0, 1, 3))


def _cost(shape: ModelShape, start: int, total: int) -> Cost:
    rows = total - start
    pairs = causal_pairs(start, rows, shape.window(0))
    compared = Cost(bytes=2.0 * rows * shape.row_bytes)
    return (
        shape.layer(rows, pairs, total) + shape.product(shape.attention_parameters, rows) + compared
    )


class _SecondLayer:
    """Attention pass of rows through the first layer, which keeps the second's keys and values.

    The first layer's keys and values are exact in a stitched cache, so nothing is written.

    Attributes:
        fresh: The second layer's keys and values of the rows, ``[1, kv_heads, rows, head_dim]``.
    """

    def __init__(self, handle: PatchHandle, cache: StitchedCache, plan: RowPlan):
        self._backend = handle.backend
        self._cache = cache
        self._plan = plan
        self.fresh: tuple[Tensor, Tensor] | None = None

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, **unread: object
    ) -> tuple[Tensor, Tensor]:
        if layer_idx == 1:
            self.fresh = keys, values
            return keys, values
        layer = self._cache.layers[layer_idx]
        return layer.key_buffer, layer.value_buffer

    def attend(self, call: LayerCall) -> Tensor:
        if call.layer_idx == 1:
            return call.query.transpose(1, 2)  # not read: the layer runs for its keys and values
        scales = [self._cache.layers[call.layer_idx].scales]
        return self._backend.attend_requests(
            call.query, [call.keys], [call.values], self._plan, call.spec, scales=scales
        )
