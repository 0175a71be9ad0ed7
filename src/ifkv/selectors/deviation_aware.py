"""``deviation-aware``: half by what the query looks at, half by what changes in context."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ifkv.backends.base import Reduction
from ifkv.cost import Cost
from ifkv.selectors.attention_norm import Query
from ifkv.selectors.cacheblend import CacheBlend, Deviation
from ifkv.selectors.options import ALL_LAYERS, Layers
from ifkv.selectors.protocol import Ranked, Request
from ifkv.selectors.registry import register
from ifkv.selectors.shares import check_share, with_share
from ifkv.selectors.sink_aware import SinkAware

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.stitched_cache import StitchedCache


@register
@dataclasses.dataclass(frozen=True)
class DeviationAware(Ranked):
    """``sink-aware``, and a share for the slots whose second layer's values move most.

    Rules that ask the query and CacheBlend's (2405.16444), which looks at what the context changes
    whoever asks, fail on different questions: where the stitched documents mislead the query, its
    attention cannot say what to repair. Each gets its share of the budget, and slots that both put
    first are paid for once.

    Costs what ``sink-aware`` and ``cacheblend`` do together.

    Attributes:
        share: Of the budget, for the slots that deviate: above 0, at most 0.5.
        deviation: As in ``cacheblend``.
        layers: Scoring layers.
        query: Which tokens score, as in ``attention-norm``.
        reduction: Over query tokens.
    """

    name: ClassVar[str] = "deviation-aware"
    paper: ClassVar[str] = "our own, after CacheBlend, arXiv 2405.16444"

    share: float = 0.5
    deviation: Deviation = "v"
    layers: Layers = ALL_LAYERS
    query: Query = "prompt"
    reduction: Reduction = "l2"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.name, self.share, "for none use sink-aware, for all cacheblend")

    def rank(
        self, model: PreTrainedModel, cache: StitchedCache, request: Request
    ) -> tuple[Tensor, Cost]:
        """See :meth:`Ranked.rank`."""
        asking = SinkAware(layers=self.layers, query=self.query, reduction=self.reduction)
        moving = CacheBlend(deviation=self.deviation)
        scores, cost = asking.rank(model, cache, request)
        deviations, spent = moving.rank(model, cache, request)
        queue = deviations.sort(descending=True, stable=True).indices
        return with_share(scores, cache, queue, self.share), cost + spent
