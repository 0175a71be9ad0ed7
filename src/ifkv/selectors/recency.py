"""``recency``: the tokens next to the question."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ifkv.cost import Cost
from ifkv.selectors.protocol import Ranked, Request
from ifkv.selectors.registry import register

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.cache.stitched import StitchedCache


@register
@dataclasses.dataclass(frozen=True)
class Recency(Ranked):
    """Selector of the last slots of the context, next to the question. Costs nothing.

    The recent window of StreamingLLM (2309.17453), as a control for the effect of nearness alone.
    """

    name: ClassVar[str] = "recency"
    paper: ClassVar[str] = "StreamingLLM's recent window, arXiv 2309.17453: a control"
    only_scores: ClassVar[bool] = True

    def rank(
        self, model: PreTrainedModel, cache: StitchedCache, request: Request
    ) -> tuple[Tensor, Cost]:
        """Score the slots by their place in the context, between 0 and 1; see `Ranked.rank`."""
        total = cache.context_length
        return torch.arange(total, device=model.device, dtype=torch.float64) / total, Cost()
