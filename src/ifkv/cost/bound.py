"""The bound on speed: operations of a full prefill against those of a request.

It counts floating-point operations alone, per decoder layer. With P the parameters of its
matrices and ``alpha = T heads head_dim / P`` the weight of attention against them,

    S(r) = (1 + alpha) / (r (1 + c alpha / 2) + (Q / T) (1 + 2 alpha) (1 + Ls / L))

where c is four times the mean normalised position of the selected rows: 2 when they are spread
evenly. For those and for later ones it is below 1 / r.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ifkv.cost.shape import ModelShape


def mean_position(slots: Tensor, context_length: int) -> float:
    """Mean of the selected rows' positions, as a share of the context's length.

    Args:
        slots: Long ``[k]``.
        context_length: Slots of the context, T.

    Returns:
        Between 0 and 1; 0.5 for rows spread evenly. 0.5 if there are none.
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
    """How many times sooner than a full prefill a request could answer at best, S(r).

    Args:
        shape: The model's shape.
        context_length: Slots of the context, T.
        query_length: Tokens of the prompt, Q, which are also scored.
        ratio: Share of the context that is recomputed, r.
        scoring_layers: Layers the scoring pass runs through, Ls; 0 if there is none.
        position: `mean_position` of the selected rows.
        selection_flops: Operations spent on choosing the rows, in place of ``scoring_layers``.

    Returns:
        Operations of a full prefill over those of the request.

    >>> from ifkv.cost import ModelShape
    >>> shape = ModelShape(layer_parameters=1, attention_width=0, num_layers=1)
    >>> round(speedup_bound(shape, context_length=10**9, query_length=1, ratio=0.15,
    ...                     scoring_layers=1), 2)
    6.67
    """
    alpha = context_length * shape.attention_width / shape.layer_parameters
    c = 4 * position
    query = query_length / context_length * (1 + 2 * alpha)
    whole = 2.0 * context_length * shape.layer_parameters * shape.num_layers
    return (1 + alpha) / (
        ratio * (1 + c * alpha / 2)
        + query * (1 + scoring_layers / shape.num_layers)
        + selection_flops / whole
    )
