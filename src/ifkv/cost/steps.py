"""What every step of a request costs, and the full prefill that it stands in for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ifkv.cost.shape import Cost, ModelShape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


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


def spread_pairs(rows: int, context_length: int, position: float = 0.5) -> float:
    """Pairs of rows scattered over a context; with the slots at hand it is ``sum(slot + 1)``.

    Args:
        rows: Selected rows.
        context_length: Slots of the context, T.
        position: `mean_position` of the rows.

    >>> spread_pairs(10, 100)
    510.0
    """
    return rows * (position * context_length + 1)


def documents_cost(shape: ModelShape, lengths: Sequence[int], prefix_length: int) -> Cost:
    """What [ifkv.prefill_documents][] costs, once and offline, behind a prefix that is there.

    In the last layer rows give keys and values alone; its attention and MLP are not run.

    Args:
        shape: The model's shape.
        lengths: Tokens of each document.
        prefix_length: Tokens of the prefix.
    """
    rows = sum(lengths)
    pairs = sum(causal_pairs(prefix_length, length) for length in lengths)
    layer = shape.layer(rows, pairs, rows + prefix_length)
    last = shape.product(shape.attention_parameters, rows)
    return (shape.num_layers - 1) * layer + last + Cost(bytes=float(rows * shape.token_bytes))


def stitch_cost(shape: ModelShape, context_length: int) -> Cost:
    """What [ifkv.stitch][] costs: every key rotated, everything read and written once.

    A rotation (2104.09864) is three operations per element: two products and a sum.

    Args:
        shape: The model's shape.
        context_length: Slots of the context, T.
    """
    keys = context_length * shape.num_layers * shape.kv_width
    return Cost(3.0 * keys, 2.0 * context_length * shape.token_bytes)


def decode_cost(shape: ModelShape, keys: int) -> Cost:
    """What one more token costs, its logits included.

    Args:
        shape: The model's shape.
        keys: Rows of the cache once its own are there.
    """
    through = shape.num_layers * shape.layer(1, keys, keys)
    return through + shape.head() + Cost(bytes=float(shape.token_bytes))


def recompute_cost(
    shape: ModelShape,
    slots: Tensor,
    context_length: int,
    prompt_length: int = 0,
    *,
    depths: Tensor | None = None,
) -> Cost:
    """What [ifkv.recompute][] costs: selected rows and the prompt's, in one forward.

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
    """What [ifkv.score][] costs: the query as far as the deepest of the scoring layers.

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
