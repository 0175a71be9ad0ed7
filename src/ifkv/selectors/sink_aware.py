"""``sink-aware``: every document's first tokens, then those of the largest value-aware norm."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ifkv.backends.base import Reduction
from ifkv.cost import Cost
from ifkv.errors import InvalidInputError
from ifkv.selectors.attention_norm import Query
from ifkv.selectors.options import ALL_LAYERS, Layers
from ifkv.selectors.protocol import Ranked, Request
from ifkv.selectors.registry import register
from ifkv.selectors.value_aware import ValueAware

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.stitched_cache import StitchedCache


@register
@dataclasses.dataclass(frozen=True)
class SinkAware(Ranked):
    """The sinks at the documents' beginnings first, then ``value-aware`` over all layers.

    A document that was encoded alone makes attention sinks of its first tokens, which in context
    are none (EPIC, 2410.15332): they draw attention that full prefill would not give them, however
    little the query looks at them. Repairing a few of every document takes that wrong pull away;
    the rest of the budget goes to what the query attends to, weighed by values (VATP, 2406.12335).

    Costs what ``value-aware`` does. Scores say an order and not an amount, so a budget by mass
    means nothing here.

    Attributes:
        sinks: Tokens at the beginning of each document but the first that are taken before all
            others, among each other by their value-aware norm.
        layers: Scoring layers.
        query: Which tokens score, as in ``attention-norm``.
        reduction: Over query tokens.
    """

    name: ClassVar[str] = "sink-aware"
    paper: ClassVar[str] = "our own, after EPIC, arXiv 2410.15332, and VATP, arXiv 2406.12335"
    only_scores: ClassVar[bool] = True

    sinks: int = 8
    layers: Layers = ALL_LAYERS
    query: Query = "prompt"
    reduction: Reduction = "l2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks < 0:
            raise InvalidInputError(
                f"sink-aware's option sinks is {self.sinks}, but must be 0 (value-aware alone) or "
                "more."
            )

    def rank(
        self, model: PreTrainedModel, cache: StitchedCache, request: Request
    ) -> tuple[Tensor, Cost]:
        """See :meth:`Ranked.rank`."""
        base = ValueAware(layers=self.layers, query=self.query, reduction=self.reduction)
        scores, cost = base.rank(model, cache, request)
        above = scores.max() + 1  # norms are not negative
        for rows in cache.document_slices[1:]:
            scores[rows.start : min(rows.start + self.sinks, rows.stop)] += above
        return scores, cost
