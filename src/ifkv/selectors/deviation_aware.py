"""``deviation-aware``: the query's attention, times how far the slot moves in context."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ifkv.backends.base import Reduction
from ifkv.cost import Cost
from ifkv.errors import InvalidInputError
from ifkv.selectors.cacheblend import CacheBlend, Deviation
from ifkv.selectors.options import ALL_LAYERS, Layers
from ifkv.selectors.protocol import Ranked, Request
from ifkv.selectors.query_ranked import Query
from ifkv.selectors.registry import register
from ifkv.selectors.value_aware import ValueAware

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.cache.stitched import StitchedCache


@register
@dataclasses.dataclass(frozen=True)
class DeviationAware(Ranked):
    """Selector ``value-aware`` over all layers, times a power of the second layer's deviation.

    The error of a stale slot is how much is read from it times how wrong it is. The first factor is
    the value-aware norm (VATP, 2406.12335). For the second, CacheBlend (2405.16444) has a cheap
    estimate: the root mean square deviation of the slot's values in the second layer, after the
    first layer has run in context. With ``a`` the norm and ``d`` the deviation,

        s[j] = a[j] d[j]^power

    A power below 1 allows for the roughness of an estimate from one layer.

    Costs the sum of ``value-aware`` and ``cacheblend``.

    Attributes:
        power: Power of the deviation, above 0.
        deviation: As in ``cacheblend``.
        layers: Scoring layers.
        query: Tokens that score, as in ``attention-norm``.
        reduction: Over query tokens.
    """

    name: ClassVar[str] = "deviation-aware"
    paper: ClassVar[str] = "our own, after CacheBlend, arXiv 2405.16444, and VATP, arXiv 2406.12335"

    power: float = 0.5
    deviation: Deviation = "v"
    layers: Layers = ALL_LAYERS
    query: Query = "prompt"
    reduction: Reduction = "l2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.power <= 0:
            raise InvalidInputError(
                f"deviation-aware's option power is {self.power}, but must be above 0; without "
                "the deviation it is value-aware."
            )

    def rank(
        self, model: PreTrainedModel, cache: StitchedCache, request: Request
    ) -> tuple[Tensor, Cost]:
        """Score the slots; see `Ranked.rank`."""
        reading = ValueAware(layers=self.layers, query=self.query, reduction=self.reduction)
        moving = CacheBlend(deviation=self.deviation)
        norms, cost = reading.rank(model, cache, request)
        squares, spent = moving.rank(model, cache, request)
        return norms * squares ** (self.power / 2), cost + spent
