"""Cost of every step of a request, and of the full prefill that it replaces."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ifkv.cost.shape import Cost, ModelShape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def causal_pairs(context_length: int, rows: int) -> float:
    """Count the pairs of a row and a key it sees, for rows right behind a context.

    >>> causal_pairs(10, 2), causal_pairs(0, 3)
    (23.0, 6.0)
    """
    return rows * context_length + rows * (rows + 1) / 2


def prefill_cost(shape: ModelShape, length: int) -> Cost:
    """Return the cost of a full prefill of ``length`` tokens, with its keys and values written."""
    layer = shape.layer(length, causal_pairs(0, length), length)
    return shape.num_layers * (layer + Cost(bytes=2.0 * length * shape.row_bytes))


def spread_pairs(rows: int, context_length: int, position: float = 0.5) -> float:
    """Estimate the pairs of a row and a key for rows scattered over a context.

    If the slots are known, the number is ``sum(slot + 1)``.

    Args:
        rows: Selected rows.
        context_length: Slots of the context, T.
        position: `mean_position` of the rows.

    >>> spread_pairs(10, 100)
    510.0
    """
    return rows * (position * context_length + 1)


def documents_cost(shape: ModelShape, lengths: Sequence[int], prefix_length: int) -> Cost:
    """Return the cost of [ifkv.prefill_documents][] behind a prefix that is already encoded.

    The last layer only makes keys and values; its attention and MLP do not run.

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
    """Return the cost of [ifkv.stitch][]: keys rotated, keys and values read and written once.

    A rotation (2104.09864) takes three operations per element: two products and a sum.

    Args:
        shape: The model's shape.
        context_length: Slots of the context, T.
    """
    keys = context_length * shape.num_layers * shape.kv_width
    return Cost(3.0 * keys, 2.0 * context_length * shape.token_bytes)


def decode_cost(shape: ModelShape, keys: int) -> Cost:
    """Return the cost of one decoding step, with its logits.

    Args:
        shape: The model's shape.
        keys: Rows of the cache, the new token's included.
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
    """Return the cost of [ifkv.recompute][]: selected rows and the prompt in one forward.

    The last layer makes keys and values of all rows, and runs in full only for the prompt's last.

    Args:
        shape: The model's shape.
        slots: Long ``[k]``, the selected rows.
        context_length: Slots of the context, T.
        prompt_length: Rows of the prompt.
        depths: Number of layers in which each row is recomputed, long ``[k]``; all if None.
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
    """Return the cost of [ifkv.score][]: the query runs up to the deepest scoring layer.

    The deepest layer runs without its MLP. Each scoring layer multiplies the query with the
    context's keys a second time.

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
