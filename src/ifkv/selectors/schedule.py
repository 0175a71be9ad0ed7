"""Budgets per layer: the highest-scored slots all the way down, the others in the first layers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ifkv.errors import InvalidInputError
from ifkv.steps.select import budget

if TYPE_CHECKING:
    from ifkv.cache.stitched import StitchedCache
    from ifkv.selectors.protocol import Selection


def layer_depths(cache: StitchedCache, selection: Selection, ratios: Sequence[float]) -> Tensor:
    """Compute the depth of each selected slot from one recompute ratio per layer.

    The slots are ranked by score. Each layer recomputes the highest ones, as many as its ratio
    allows. Select under the first layer's ratio, and give the result to
    ``ifkv.recompute(..., depths=...)``.

    Args:
        cache: The stitched cache that was selected from.
        selection: A selection with scores.
        ratios: One recompute ratio per layer, none larger than the one before.

    Returns:
        Long ``[k]``, for ``selection.slots``.

    Raises:
        InvalidInputError: A selection without scores, ratios that grow, or not one per layer.
    """
    if selection.scores is None:
        raise InvalidInputError(
            "the selection has no scores to rank its slots by; a budget for everything or nothing "
            "needs no ratio per layer."
        )
    if len(ratios) != len(cache.layers):
        raise InvalidInputError(
            f"there are {len(ratios)} ratios for {len(cache.layers)} layers; give one for each."
        )
    counts = [budget(cache.budget_length, ratio) for ratio in ratios]
    if any(later > sooner for sooner, later in itertools.pairwise(ratios)):
        raise InvalidInputError(
            f"the ratios {list(ratios)} grow with depth, but a row that was left out of a layer "
            "cannot come back; give ratios that fall or stay."
        )
    order = selection.scores[selection.slots].argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    allowed = torch.tensor(counts, device=order.device)
    return (rank[:, None] < allowed).sum(dim=1)
