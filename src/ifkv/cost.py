"""What the arithmetic allows: operations of a full prefill against those of a request.

The bound counts floating-point operations alone, per decoder layer. With P the parameters of its
matrices and ``alpha = T heads head_dim / P`` the weight of attention against them,

    S(r) = (1 + alpha) / (r (1 + c alpha / 2) + (Q / T) (1 + 2 alpha) (1 + Ls / L))

where c is four times the mean normalised position of the selected rows: 2 when they are spread
evenly. The ceiling is 1 / r.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """Sizes of one decoder layer, read from its weights.

    Attributes:
        layer_parameters: Elements of the layer's weight matrices.
        attention_width: Query heads times head_dim.
        num_layers: Decoder layers.
    """

    layer_parameters: int
    attention_width: int
    num_layers: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelShape:
        """The shape of a model's first layer, which stands for all."""
        base: Any = model.base_model
        layer = base.layers[0]
        matrices = sum(p.numel() for p in layer.parameters() if p.ndim == 2)
        # o_proj takes all heads' outputs side by side, whatever the projections before it.
        return cls(matrices, layer.self_attn.o_proj.weight.shape[1], len(base.layers))


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
    scoring_layers: int,
    position: float = 0.5,
) -> float:
    """How many times sooner than a full prefill a request could answer at best, S(r).

    Args:
        shape: The model's shape.
        context_length: Slots of the context, T.
        query_length: Tokens of the prompt, Q, which are also scored.
        ratio: Share of the context that is recomputed, r.
        scoring_layers: Layers the scoring pass runs through, Ls; 0 if there is none.
        position: :func:`mean_position` of the selected rows.

    Returns:
        Operations of a full prefill over those of the request.

    >>> shape = ModelShape(layer_parameters=1, attention_width=0, num_layers=1)
    >>> round(speedup_bound(shape, context_length=10**9, query_length=1, ratio=0.15,
    ...                     scoring_layers=1), 2)
    6.67
    """
    alpha = context_length * shape.attention_width / shape.layer_parameters
    c = 4 * position
    query = query_length / context_length * (1 + 2 * alpha)
    return (1 + alpha) / (
        ratio * (1 + c * alpha / 2) + query * (1 + scoring_layers / shape.num_layers)
    )
