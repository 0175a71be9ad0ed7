"""``sink-aware``: value-aware norms, and a share for every document's first tokens."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ifkv.backends.base import Reduction
from ifkv.errors import InvalidInputError
from ifkv.selectors.options import ALL_LAYERS, Layers
from ifkv.selectors.query_ranked import Query
from ifkv.selectors.registry import register
from ifkv.selectors.value_aware import ValueAware

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.cache.stitched import StitchedCache


@register
@dataclasses.dataclass(frozen=True)
class SinkAware(ValueAware):
    """Selector ``value-aware`` over all layers, with a share for sinks at documents' beginnings.

    The first tokens of a document encoded alone become attention sinks, which they are not in
    context (EPIC, 2410.15332): they draw attention that full prefill would not give them, however
    little the query attends to them. Repairing a few of every document removes that error. The rest
    of the budget goes to the slots that the query attends to, weighted by values (VATP,
    2406.12335).

    Beginnings queue up, all documents' first tokens before their second ones. They get their share
    of any budget until the queue is empty.

    Costs the same as ``value-aware``.

    Attributes:
        sinks: Tokens at the beginning of each document that queue up; not of the first document
            if it is exact.
        share: Their share of a budget: above 0, at most 0.5.
        layers: Scoring layers.
        query: Which tokens score, as in ``attention-norm``.
        reduction: As in ``value-aware``.
    """

    name: ClassVar[str] = "sink-aware"
    paper: ClassVar[str] = "our own, after EPIC, arXiv 2410.15332, and VATP, arXiv 2406.12335"
    only_scores: ClassVar[bool] = True

    sinks: int = 64
    share: float = 0.35
    layers: Layers = ALL_LAYERS
    query: Query = "question"
    reduction: Reduction = "l2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks < 0:
            raise InvalidInputError(
                f"{self.name}'s option sinks is {self.sinks}, but must be 0 (no share for the "
                "beginnings) or more."
            )
        if not 0 < self.share <= 0.5:
            raise InvalidInputError(
                f"{self.name}'s option share is {self.share}, but must be above 0 and at most 0.5; "
                "for no sinks at all, set sinks=0."
            )

    def settle(self, model: PreTrainedModel, cache: StitchedCache, scores: Tensor) -> Tensor:
        """Raise the documents' beginnings until they get their share."""
        if not cache.stale_slices or self.sinks == 0:
            return scores
        return _raised(scores, cache, self.sinks, self.share)


# All of it is queued on the GPU without waiting: no shape depends on a result.
def _raised(scores: Tensor, cache: StitchedCache, sinks: int, share: float) -> Tensor:
    """Raise the scores of documents' beginnings until they get a share of any budget.

    The first tokens of all documents that are not exact queue up, all first ones before all second
    ones.
    Number i of the queue (from 0) is scored just above number ``floor(i / share) - i`` of all slots
    by their unraised scores, unless it is higher already. As i of the queue come before it, it is
    then among the first ``floor(i / share) + 1``. A share of at most one half gives each a distinct
    place.
    """
    device = scores.device
    bounds = torch.tensor([(rows.start, rows.stop) for rows in cache.stale_slices])
    starts, stops = bounds.to(device, non_blocking=True).unbind(1)
    queue = starts + torch.arange(sinks, device=device)[:, None]
    there = queue < stops
    queue = torch.where(there, queue, 0).flatten()
    candidates = cache.candidate_slots.to(device, non_blocking=True)
    chosen_from = torch.zeros_like(scores, dtype=torch.bool)
    chosen_from[candidates] = True
    queues = there.flatten() & chosen_from[queue]
    every = 1 / Fraction(str(share))  # exact in the number that was written
    number = queues.cumsum(0) - 1
    places = number * every.numerator // every.denominator - number
    ranked = scores[candidates].sort(descending=True).values
    counts = queues & (places < len(ranked))
    at = ranked[places.clamp(0, max(0, len(ranked) - 1))] if len(ranked) else scores[queue]
    above = torch.nextafter(at, torch.full_like(at, torch.inf))
    raised = torch.where(counts, torch.maximum(scores[queue], above), -torch.inf)
    return scores.scatter_reduce(0, queue, raised.to(scores.dtype), "amax")
