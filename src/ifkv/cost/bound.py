"""Bound on speed: operations of a full prefill divided by those of a request.

It counts only floating-point operations, per decoder layer. With P the parameters of the layer's
matrices and ``alpha = T heads head_dim / P`` the share of attention relative to them,

    S(r) = (1 + alpha) / (r (1 + c alpha / 2) + (Q / T) (1 + 2 alpha) (1 + Ls / L))

where c is four times the mean normalised position of the selected rows: 2 if they are spread
evenly. For c >= 2 the bound is below 1 / r. Where layers have a sliding window, each alpha is
multiplied by the share of its pairs that lie within it, averaged over the layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ifkv.cost.pairs import causal_pairs, spread_pairs

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ifkv.cost.shape import ModelShape


def mean_position(slots: Tensor, context_length: int) -> float:
    """Compute the mean position of selected rows, relative to the context's length.

    Args:
        slots: Slots of the rows, long ``[k]``.
        context_length: Slots of the context, T.

    Returns:
        A number from 0 to 1; 0.5 for rows spread evenly, and without rows.
    """
    if len(slots) == 0:
        return 0.5
    return float(slots.double().mean()) / context_length


def speedup_bound(
    shape: ModelShape,
    *,
    context_length: int,
    query_length: int,
    ratio: float,
    scoring_layers: int = 0,
    position: float = 0.5,
    selection_flops: float = 0.0,
) -> float:
    """Compute the bound S(r): how many times faster to the first token than a full prefill.

    Args:
        shape: The model's shape.
        context_length: Slots of the context, T.
        query_length: Tokens of the prompt, Q; the scoring pass runs over the same tokens.
        ratio: Share of the context that is recomputed, r.
        scoring_layers: Layers of the scoring pass, Ls; 0 without one.
        position: `mean_position` of the selected rows.
        selection_flops: Operations of the selection, if it is no scoring pass.

    Returns:
        Operations of a full prefill divided by those of the request.

    >>> from ifkv.cost import ModelShape
    >>> shape = ModelShape(layer_parameters=1, attention_width=0, num_layers=1)
    >>> round(speedup_bound(shape, context_length=10**9, query_length=1, ratio=0.15,
    ...                     scoring_layers=1), 2)
    6.67
    """
    alpha = context_length * shape.attention_width / shape.layer_parameters
    c = 4 * position
    full = _share(shape, lambda window: causal_pairs(0, context_length, window))
    rows = _share(shape, lambda window: spread_pairs(1, context_length, position, window))
    asked = _share(shape, lambda window: causal_pairs(context_length, 1, window))
    query = query_length / context_length * (1 + 2 * alpha * asked)
    whole = 2.0 * context_length * shape.layer_parameters * shape.num_layers
    return (1 + alpha * full) / (
        ratio * (1 + c * alpha * rows / 2)
        + query * (1 + scoring_layers / shape.num_layers)
        + selection_flops / whole
    )


def _share(shape: ModelShape, count_in: Callable[[int | None], float]) -> float:
    """Return the share of pairs that lie within the layers' windows; 1 without windows."""
    if not shape.windows:
        return 1.0
    return shape.pairs(count_in) / (shape.num_layers * count_in(None))
