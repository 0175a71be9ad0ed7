"""Ranked selector whose ranking of one request serves several budgets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ifkv.cost import Cost
from ifkv.selectors import Ranked, Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.cache.stitched import StitchedCache


class RankedOnce(Ranked):
    """Ranked selector that ranks the slots of one request once, however many budgets it is given.

    Args:
        selector: What ranks.
    """

    def __init__(self, selector: Ranked):
        self._selector = selector
        self._ranking: tuple[Tensor, Cost] | None = None

    def rank(
        self, model: PreTrainedModel, cache: StitchedCache, request: Request
    ) -> tuple[Tensor, Cost]:
        """Return the first call's scores and cost; every call is for the same request."""
        if self._ranking is None:
            self._ranking = self._selector.rank(model, cache, request)
        return self._ranking

    def __str__(self) -> str:
        return str(self._selector)
