"""``two-round``: recompute some slots, score again, then choose the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ifkv.backends.base import Reduction
from ifkv.cache.checks import check_answerable, check_cache
from ifkv.cost import Cost, ModelShape, recompute_cost
from ifkv.errors import InvalidInputError
from ifkv.selectors.attention_norm import AttentionNorm
from ifkv.selectors.budget import Budget
from ifkv.selectors.options import DEFAULT_LAYERS, Layers
from ifkv.selectors.protocol import Request, Selection, Selector, without_scores
from ifkv.selectors.query_ranked import Query
from ifkv.selectors.registry import register
from ifkv.steps.recompute import recompute
from ifkv.steps.select import check_scores, top_slots

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.cache.stitched import StitchedCache


@register
@dataclasses.dataclass(frozen=True)
class TwoRound(Selector):
    """Selector by attention norm in two rounds; the first round's slots are recomputed between.

    Our own. A stitched cache has sinks that a full prefill has not, and they draw attention from
    other slots. Once the worst of them are repaired, the query attends to other slots. The first
    round chooses ``share`` of the budget's slots; the second scores the repaired cache and chooses
    the rest. Then the repaired rows are restored, and the request's recompute repairs them again:
    recomputing a subset first changes nothing.

    Costs ``attention-norm`` twice and the recomputation of the first round's slots.

    Attributes:
        share: Share of the budget for the first round; between 0 and 1, rounded down.
        layers: Scoring layers.
        query: Tokens that score, as in ``attention-norm``.
        reduction: Over query tokens.
    """

    name: ClassVar[str] = "two-round"
    paper: ClassVar[str] = "our own, after arXiv 2603.05353"
    only_scores: ClassVar[bool] = True

    share: float = 0.5
    layers: Layers = DEFAULT_LAYERS
    query: Query = "prompt"
    reduction: Reduction = "l2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share < 1:
            raise InvalidInputError(
                f"two-round's option share is {self.share}, but must lie between 0 and 1; with "
                "either, attention-norm does the same in one round."
            )

    def select(
        self,
        model: PreTrainedModel,
        cache: StitchedCache,
        request: Request,
        budget: Budget | float,
    ) -> Selection:
        """Choose slots; see `Selector.select`. The scores are the second round's."""
        check_cache(model, cache)
        check_answerable(cache, "two-round")
        allowed = Budget.of(budget)
        decided = without_scores(cache, allowed)
        if decided is not None:
            return decided
        rule = AttentionNorm(layers=self.layers, query=self.query, reduction=self.reduction)
        scores, cost = rule.rank(model, cache, request)
        whole = allowed.pick(cache, scores, request.groups)
        smooth = allowed.smoothed(cache, scores, request.groups)
        first = top_slots(cache, smooth, int(self.share * len(whole)))
        if len(first) == 0:
            return Selection(whole, scores, cost, scores)
        with repaired(model, cache, first):
            scores, spent = rule.rank(model, cache, request)
        check_scores(cache, scores)
        shape = ModelShape.of(model)
        cost += spent + recompute_cost(shape, first, cache.context_length)
        # Rows saved and restored, in every layer.
        cost += Cost(bytes=8.0 * len(first) * len(cache.layers) * shape.row_bytes)
        left = allowed.smoothed(cache, scores, request.groups).double()
        left[first] = left.min() - 1
        rest = top_slots(cache, left, len(whole) - len(first))
        return Selection(torch.cat((first, rest)).sort().values, scores, cost, scores)


@contextmanager
def repaired(model: PreTrainedModel, cache: StitchedCache, slots: Tensor) -> Iterator[None]:
    """Recompute slots for the block; restore their rows after it.

    Args:
        model: A patched model.
        cache: A request's cache, which nobody else is reading.
        slots: Long ``[k]``.
    """
    at = slots.to(cache.token_ids.device)
    saved = [(layer.key_buffer[:, :, at], layer.value_buffer[:, :, at]) for layer in cache.layers]
    try:
        recompute(model, cache, slots)
        yield
    finally:
        for layer, (keys, values) in zip(cache.layers, saved, strict=True):
            layer.write(at, keys, values)
