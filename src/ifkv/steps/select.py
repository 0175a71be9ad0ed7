"""Choose the slots to recompute: one global top-k of the scores, the same for every layer."""

from __future__ import annotations

from fractions import Fraction
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ifkv.cache.checks import check_stitched
from ifkv.cache.stitched import StitchedCache
from ifkv.errors import InvalidInputError


def budget(length: int, ratio: float) -> int:
    """Return the number of slots of a recompute ratio: ``max(1, floor(ratio * length))``.

    The product is exact in the decimal number that was written: 0.29 of 100 is 29, although the
    nearest float times 100 is not. A ratio of 0 gives no slot.

    Args:
        length: Slots of the context, T.
        ratio: Between 0 and 1.

    Raises:
        InvalidInputError: The ratio lies outside [0, 1].

    >>> budget(100, 0.29), budget(5, 0.01), budget(5, 0)
    (29, 1, 0)
    """
    given: Any = ratio  # callers may pass another type
    if isinstance(given, bool) or not isinstance(given, Real) or not 0 <= float(given) <= 1:
        raise InvalidInputError(
            f"ratio is {ratio!r}, but must be a number from 0 (recompute nothing) to 1 "
            "(everything)."
        )
    if ratio == 0:
        return 0
    return max(1, int(Fraction(str(ratio)) * length))


def select(
    cache: StitchedCache, scores: Tensor, *, ratio: float = 0.15, protect_first: bool = True
) -> Tensor:
    """Return the slots with the highest scores, within the budget.

    Args:
        cache: The stitched cache that was scored.
        scores: ``[T]``, finite.
        ratio: Recompute ratio r: ``max(1, floor(r T))`` slots, fewer if there are fewer
            candidates; none if r is 0.
        protect_first: Leave out the slots that a stitched cache holds exactly: the prefix, and the
            first document if it was encoded without a surrogate context. Ignored if the cache
            names its candidates.

    Returns:
        Long ``[k]``, ascending, on the scores' device. Of equal scores the lower slot wins, so
        that selections are nested in the ratio.

    Raises:
        InvalidInputError: The ratio lies outside [0, 1], or scores are not finite or not ``[T]``.
    """
    check_stitched(cache)
    check_scores(cache, scores)
    return top_slots(cache, scores, budget(cache.budget_length, ratio), protect_first=protect_first)


def top_slots(
    cache: StitchedCache, scores: Tensor, count: int, *, protect_first: bool = True
) -> Tensor:
    """Return the ``count`` slots with the highest of checked scores; arguments of `select`."""
    if cache.candidates is not None:
        among = cache.candidates.to(scores.device)
        ranked = torch.sort(scores[among], descending=True, stable=True).indices
        return among[ranked[:count]].sort().values
    start = cache.exact_length if protect_first else 0
    candidates = scores[start:]
    ranked = torch.sort(candidates, descending=True, stable=True).indices
    return ranked[:count].sort().values + start


def check_scores(cache: StitchedCache, scores: Tensor) -> None:
    """Refuse scores that are not one finite number per slot; errors of `select`."""
    length = cache.context_length
    if not isinstance(scores, Tensor):
        raise InvalidInputError(
            f"scores are of type {type(scores).__name__}; a tensor is wanted, as ifkv.score "
            "returns it."
        )
    if scores.shape != (length,):
        raise InvalidInputError(
            f"scores have shape {tuple(scores.shape)}, but the cache has {length} slots: give one "
            "score each, as ifkv.score returns them."
        )
    if not bool(torch.isfinite(scores).all()):
        raise InvalidInputError("scores hold NaN or infinity; nothing sensible can be selected.")
