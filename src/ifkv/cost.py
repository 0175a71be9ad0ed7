"""What things cost in operations and bytes, and what the arithmetic allows.

Costs are those of the arithmetic a method asks for, counted from the model's own shapes: a product
with a matrix is two operations per element and row; attention four per query head's dimension and
pair of a row and a key it sees. Norms, rotations, softmax and the vocabulary's matrix (one row,
the same for every method) are left out, and a sliding window is not taken off. Bytes are those of
weights, keys and values, each read or written once per layer and pass.

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
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True)
class Cost:
    """Operations and bytes; costs add up, and are multiplied by numbers.

    Attributes:
        flops: Floating-point operations.
        bytes: Bytes of weights, keys and values read or written.

    >>> Cost(2.0, 1.0) + 2 * Cost(1.0)
    Cost(flops=4.0, bytes=1.0)
    """

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.flops * times, self.bytes * times)

    __rmul__ = __mul__


NO_COST = Cost()


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """Sizes of one decoder layer, read from its weights.

    Attributes:
        layer_parameters: Elements of the layer's weight matrices.
        attention_width: Query heads times head_dim.
        num_layers: Decoder layers.
        attention_parameters: Elements of the matrices of its attention block.
        kv_width: Key heads times head_dim: elements of one row's keys.
        element_size: Bytes of an element.
    """

    layer_parameters: int
    attention_width: int
    num_layers: int
    attention_parameters: int = 0
    kv_width: int = 0
    element_size: int = 0

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelShape:
        """The shape of a model's first layer, which stands for all."""
        base: Any = model.base_model
        layer = base.layers[0]
        matrices = sum(p.numel() for p in layer.parameters() if p.ndim == 2)
        attention = sum(p.numel() for p in layer.self_attn.parameters() if p.ndim == 2)
        # o_proj takes all heads' outputs side by side, whatever the projections before it; what
        # those give beside the queries is keys and values.
        weight = layer.self_attn.o_proj.weight
        hidden, width = weight.shape
        kv_width = (attention // hidden - 2 * width) // 2
        return cls(matrices, width, len(base.layers), attention, kv_width, weight.element_size())

    def product(self, parameters: int, rows: int) -> Cost:
        """Rows through matrices of so many elements."""
        return Cost(2.0 * parameters * rows, float(parameters * self.element_size))

    def attention(self, pairs: float, keys: int) -> Cost:
        """Attention over so many pairs of a row and a key it sees, reading keys and values."""
        return Cost(4.0 * self.attention_width * pairs, 2.0 * keys * self.row_bytes)

    def layer(self, rows: int, pairs: float, keys: int) -> Cost:
        """Rows through one whole decoder layer."""
        return self.product(self.layer_parameters, rows) + self.attention(pairs, keys)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's keys, or values, in one layer."""
        return self.kv_width * self.element_size


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
        position: :func:`mean_position` of the selected rows.
        selection_flops: Operations spent on choosing the rows, in place of ``scoring_layers``.

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
    whole = 2.0 * context_length * shape.layer_parameters * shape.num_layers
    return (1 + alpha) / (
        ratio * (1 + c * alpha / 2)
        + query * (1 + scoring_layers / shape.num_layers)
        + selection_flops / whole
    )


def causal_pairs(context_length: int, rows: int) -> float:
    """Pairs of a row and a key it sees: rows that follow a context, each seeing those before it.

    >>> causal_pairs(10, 2), causal_pairs(0, 3)
    (23.0, 6.0)
    """
    return rows * context_length + rows * (rows + 1) / 2


def prefill_cost(shape: ModelShape, length: int) -> Cost:
    """A full prefill of ``length`` tokens, its keys and values written."""
    layer = shape.layer(length, causal_pairs(0, length), length)
    return shape.num_layers * (layer + Cost(bytes=2.0 * length * shape.row_bytes))


def recompute_cost(
    shape: ModelShape,
    slots: Tensor,
    context_length: int,
    prompt_length: int = 0,
    *,
    depths: Tensor | None = None,
) -> Cost:
    """What :func:`ifkv.recompute` costs: selected rows and the prompt's, in one forward.

    In the last layer all rows give keys and values, and only the prompt's last is run whole.

    Args:
        shape: The model's shape.
        slots: Long ``[k]``, the selected rows.
        context_length: Slots of the context, T.
        prompt_length: Rows of the prompt.
        depths: Long ``[k]``: in how many layers each row is recomputed; in all if None.
    """
    total, keys = Cost(), context_length + prompt_length
    for layer in range(shape.num_layers):
        alive = slots if depths is None else slots[depths > layer]
        rows = len(alive) + prompt_length
        if rows == 0:
            break
        total += Cost(bytes=2.0 * rows * shape.row_bytes)
        if layer == shape.num_layers - 1:
            total += shape.product(shape.attention_parameters, rows)
        else:
            pairs = float((alive.double() + 1).sum()) + causal_pairs(context_length, prompt_length)
            seen = keys if prompt_length else int(alive.max()) + 1
            total += shape.layer(rows, pairs, seen)
    return total + shape.layer(1, keys, keys) if prompt_length else total


def scoring_cost(
    shape: ModelShape, query_length: int, context_length: int, layers: Sequence[int]
) -> Cost:
    """What :func:`ifkv.score` costs: the query as far as the deepest of the scoring layers.

    The deepest layer runs without its MLP. Where a layer scores, the query's products with the
    context's keys are made once more.

    Args:
        shape: The model's shape.
        query_length: Scoring tokens, Q.
        context_length: Slots of the context, T.
        layers: Scoring layers, counted from 0.
    """
    deepest, pairs = max(layers), causal_pairs(context_length, query_length)
    attention = shape.attention(pairs, context_length)
    norms = Cost(
        2.0 * shape.attention_width * query_length * context_length,
        float(context_length * shape.row_bytes),
    )
    return (
        deepest * shape.layer(query_length, pairs, context_length)
        + shape.product(shape.attention_parameters, query_length)
        + attention
        + len(set(layers)) * norms
    )
