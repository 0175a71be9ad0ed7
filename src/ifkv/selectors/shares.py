"""A share of any budget for slots that another order than the scores' puts first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ifkv.errors import InvalidInputError

if TYPE_CHECKING:
    from ifkv.stitched_cache import StitchedCache


def with_share(scores: Tensor, cache: StitchedCache, queue: Tensor, share: float) -> Tensor:
    """Raise the scores of slots that queue up, so that they get a share of any budget.

    Number i of the queue (from 0) is scored just above number ``floor(i / share) - i`` of all slots
    by their own scores, unless it stands higher already. As i of the queue come before it, it is
    then among the first ``floor(i / share) + 1``.

    Args:
        scores: ``[T]``; left as they are.
        cache: The cache that was scored.
        queue: Long, slots in order. Those that cannot be chosen take no place.
        share: Above 0 and at most one half, so that each of the queue has a place of its own.

    Returns:
        ``[T]``, of the scores' dtype.
    """
    candidates = cache.candidate_slots.to(scores.device)
    ranked = scores[candidates].sort(descending=True).values
    queue = queue.to(scores.device)
    queue = queue[torch.isin(queue, candidates)]
    number = torch.arange(len(queue), device=queue.device)
    places = (number / share).long() - number
    queue, places = queue[places < len(ranked)], places[places < len(ranked)]
    above = torch.nextafter(ranked[places], torch.full_like(ranked[places], torch.inf))
    raised = scores.clone()
    raised[queue] = torch.maximum(scores[queue], above)
    return raised


def check_share(selector: str, share: float, instead: str) -> None:
    """Refuse a share that is none.

    Args:
        selector: Its name.
        share: The option's value.
        instead: What to do instead of a share of 0.

    Raises:
        InvalidInputError: It is not above 0 and at most one half.
    """
    if not 0 < share <= 0.5:
        raise InvalidInputError(
            f"{selector}'s option share is {share}, but must be above 0 and at most 0.5; {instead}."
        )
