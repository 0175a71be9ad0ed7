"""``random``: the control that any selector must beat."""

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
class Random(Ranked):
    """Selector of random slots, each as likely as any other: the control. Costs nothing.

    No paper; every comparison needs it.

    Attributes:
        seed: Seed of the draw, which depends only on it and on the context's length.
    """

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "none: a control"
    only_scores: ClassVar[bool] = True

    seed: int = 0

    def rank(
        self, model: PreTrainedModel, cache: StitchedCache, request: Request
    ) -> tuple[Tensor, Cost]:
        """Score the slots; see `Ranked.rank`."""
        generator = torch.Generator().manual_seed(self.seed)
        scores = torch.rand(cache.context_length, generator=generator, dtype=torch.float64)
        return scores.to(model.device), Cost()
