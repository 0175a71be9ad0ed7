"""Cost of every step of a request, and of the full prefill that it replaces."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ifkv.cost.pairs import causal_pairs, query_pairs, slot_pairs
from ifkv.cost.shape import Cost, ModelShape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def prefill_cost(shape: ModelShape, length: int) -> Cost:
    """Return the cost of a full prefill of ``length`` tokens, with its keys and values written."""
    through = shape.layers(length, lambda window: causal_pairs(0, length, window), length)
    return through + Cost(bytes=float(length * shape.token_bytes))


def documents_cost(shape: ModelShape, lengths: Sequence[int], prefix_length: int) -> Cost:
    """Return the cost of [ifkv.prefill_documents][] behind a prefix that is already encoded.

    The last layer only makes keys and values; its attention and MLP do not run.

    Args:
        shape: The model's shape.
        lengths: Tokens of each document.
        prefix_length: Tokens of the prefix.
    """
    rows = sum(lengths)
    through = shape.layers(
        rows,
        lambda window: sum(causal_pairs(prefix_length, length, window) for length in lengths),
        rows + prefix_length,
        shape.num_layers - 1,
    )
    last = shape.product(shape.attention_parameters, rows)
    return through + last + Cost(bytes=float(rows * shape.token_bytes))


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
    through = shape.layers(1, lambda window: causal_pairs(keys - 1, 1, window), keys)
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
            window = shape.window(layer)
            pairs = slot_pairs(alive, window) + causal_pairs(context_length, prompt_length, window)
            seen = keys if prompt_length else int(alive.max()) + 1
            total += shape.layer(rows, pairs, seen)
    if prompt_length == 0:
        return total
    return total + shape.layer(1, causal_pairs(keys - 1, 1, shape.window(-1)), keys)


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
    deepest = max(layers)

    def pairs(window: int | None) -> float:
        return causal_pairs(context_length, query_length, window)

    return (
        shape.layers(query_length, pairs, context_length, deepest)
        + shape.product(shape.attention_parameters, query_length)
        + shape.attention(pairs(shape.window(deepest)), context_length)
        + norms_cost(shape, query_length, context_length, layers)
    )


def norms_cost(
    shape: ModelShape, query_length: int, context_length: int, layers: Sequence[int]
) -> Cost:
    """Return the cost of the query's second products with the context's keys in scoring layers.

    Args:
        shape: The model's shape.
        query_length: Scoring tokens, Q.
        context_length: Slots of the context, T.
        layers: Scoring layers, counted from 0.
    """
    cost = Cost(bytes=float(len(set(layers)) * context_length * shape.row_bytes))
    for layer in set(layers):
        pairs = query_pairs(context_length, query_length, shape.window(layer))
        cost += Cost(2.0 * shape.attention_width * pairs)
    return cost
