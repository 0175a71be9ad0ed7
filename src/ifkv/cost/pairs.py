"""Pairs of a row and a key that it sees, with and without a sliding window.

A row sees the keys up to its own position, and under a window no more than the nearest ones: as
many as `AttentionSpec.visible` shows, with which the tests compare these counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def causal_pairs(context_length: float, rows: float, window: int | None = None) -> float:
    """Count the pairs of a row and a key it sees, for rows right behind a context.

    Args:
        context_length: Slots of the context.
        rows: Rows behind it.
        window: Sliding window of the layer; None has none.

    >>> causal_pairs(10, 2), causal_pairs(0, 3), causal_pairs(10, 2, window=4)
    (23.0, 6.0, 8.0)
    """
    pairs = rows * context_length + rows * (rows + 1) / 2
    if window is not None:
        # The rows behind the window's end see this many keys too many, in a row 1, 2, 3 and so on.
        before, after = (max(0, n - window) for n in (context_length, context_length + rows))
        pairs -= (after * (after + 1) - before * (before + 1)) / 2
    return pairs


def query_pairs(context_length: int, query_length: int, window: int | None = None) -> float:
    """Count the pairs of a query token and a slot of the context before it that it sees.

    Args:
        context_length: Slots of the context, T.
        query_length: Query tokens, Q.
        window: Sliding window of the layer; None has none.
    """
    own = causal_pairs(0, query_length, window)
    return causal_pairs(context_length, query_length, window) - own


def spread_pairs(
    rows: int, context_length: int, position: float = 0.5, window: int | None = None
) -> float:
    """Estimate the pairs of a row and a key for rows scattered over a context.

    If the slots are known, `slot_pairs` counts them.

    Args:
        rows: Selected rows.
        context_length: Slots of the context, T.
        position: `mean_position` of the rows. Under a window the rows count as spread evenly over
            the longest part of the context that has this middle.
        window: Sliding window of the layer; None has none.

    >>> spread_pairs(10, 100), spread_pairs(10, 100, 0.7, window=40)
    (510.0, 400.0)
    """
    pairs = rows * (position * context_length + 1)
    if window is None or rows == 0:
        return pairs
    both = 2 * position * context_length + 1  # the part's begin and end, added
    begin = max(0.0, both - context_length)
    length = both - 2 * begin
    return rows * causal_pairs(begin, length, window) / length


def slot_pairs(slots: Tensor, window: int | None = None) -> float:
    """Count the pairs of a row and a key it sees, for rows at known slots.

    Args:
        slots: Slots of the rows, long ``[k]``.
        window: Sliding window of the layer; None has none.
    """
    seen = slots.double() + 1
    return float((seen if window is None else seen.clamp(max=window)).sum())
