"""``epic``: the first tokens of every document (2410.15332)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ifkv.cost import Cost
from ifkv.errors import InvalidInputError
from ifkv.selectors.budget import Budget
from ifkv.selectors.protocol import Ranked, Request, Selection
from ifkv.selectors.registry import register

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.cache.stitched import StitchedCache


@register
@dataclasses.dataclass(frozen=True)
class Epic(Ranked):
    """Selector of the first tokens of every document but the first. Costs nothing.

    EPIC's LegoLink (2410.15332): the first tokens of a document encoded alone become attention
    sinks, which they are not in context. The paper takes the same number of tokens, 2 to 32, of
    each document.

    Attributes:
        by: Division of a budget: ``share`` takes the same share of every document, ``tokens`` the
            same number, or all tokens of a shorter document.
        tokens: The most tokens of each document, even if the budget allows more; 0 is no limit.
            With a limit, a budget for everything does not select everything.
    """

    name: ClassVar[str] = "epic"
    paper: ClassVar[str] = "EPIC, arXiv 2410.15332"
    only_scores: ClassVar[bool] = True

    by: Literal["share", "tokens"] = "share"
    tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 0:
            raise InvalidInputError(
                f"epic's option tokens is {self.tokens}, but must be 0 (no limit) or more."
            )

    def rank(
        self, model: PreTrainedModel, cache: StitchedCache, request: Request
    ) -> tuple[Tensor, Cost]:
        """Score the slots; see `Ranked.rank`. A document's scores fall from 1 to 0 or more."""
        scores = torch.zeros(cache.context_length, dtype=torch.float64)
        longest = max(rows.stop - rows.start for rows in cache.document_slices)
        for rows in cache.document_slices:
            length = rows.stop - rows.start
            place = torch.arange(length, dtype=torch.float64)
            scores[rows] = 1 - place / (length if self.by == "share" else longest)
        return scores.to(model.device), Cost()

    def select(
        self,
        model: PreTrainedModel,
        cache: StitchedCache,
        request: Request,
        budget: Budget | float,
    ) -> Selection:
        """Choose slots; see `Ranked.select`."""
        chosen = super().select(model, cache, request, budget)
        if not self.tokens:
            return chosen
        allowed = torch.zeros(cache.context_length, dtype=torch.bool)
        for rows in cache.stale_slices:
            allowed[rows.start : min(rows.start + self.tokens, rows.stop)] = True
        kept = chosen.slots[allowed.to(chosen.slots.device)[chosen.slots]]
        return dataclasses.replace(chosen, slots=kept)
