"""Oracle that the library is tested against: each step of the method as one dense pass.

Every function is `dense.dense_rows` with the rows, positions and mask that define the step. No
other code of this library takes part. See `dense` for the vocabulary, the shapes and the
arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ifkv.testing.dense import DenseTrace, dense_rows


@dataclass(frozen=True)
class DenseContext:
    """Context of N slots: prefix, then documents one after the other.

    Attributes:
        token_ids: Token ids `[N]`, in slot order.
        keys_before_rope: Keys before RoPE, `[L, H_kv, N, D]`.
        values: Values, `[L, H_kv, N, D]`.
        prefix_length: Number of prefix slots.
        document_slices: The slots of each document, in slot order.
    """

    token_ids: Tensor
    keys_before_rope: Tensor
    values: Tensor
    prefix_length: int
    document_slices: tuple[slice, ...]


def dense_forward(
    model: Any, token_ids: Sequence[int] | Tensor, positions: Sequence[int] | Tensor, mask: Tensor
) -> DenseTrace:
    """Run T tokens at any `positions` `[T]` under any boolean `mask` `[T, T]`."""
    return dense_rows(model, token_ids, range(len(token_ids)), positions, mask)


def dense_prefill(model: Any, token_ids: Sequence[int] | Tensor) -> DenseTrace:
    """Run a plain causal prefill of T tokens at positions 0 to T - 1."""
    length = len(token_ids)
    return dense_forward(model, token_ids, range(length), torch.ones(length, length).tril().bool())


def dense_stitched(
    model: Any,
    prefix: Sequence[int],
    documents: Sequence[Sequence[int]],
    order: Sequence[int] | None = None,
) -> DenseContext:
    """Return documents computed alone, each after the prefix, laid out one after the other.

    A document sees the prefix and itself, at local positions `len(prefix), len(prefix) + 1, ...`.
    Keys are before RoPE, so the documents' later positions do not matter here.
    """
    arranged = [list(documents[i]) for i in (range(len(documents)) if order is None else order)]
    start, slices = len(prefix), []
    keys, values = [], []
    if prefix:
        alone = dense_prefill(model, prefix)
        keys.append(alone.keys_before_rope)
        values.append(alone.values)
    for document in arranged:
        alone = dense_prefill(model, [*prefix, *document])
        keys.append(alone.keys_before_rope[:, :, len(prefix) :])
        values.append(alone.values[:, :, len(prefix) :])
        slices.append(slice(start, start + len(document)))
        start += len(document)
    return DenseContext(
        token_ids=torch.tensor([*prefix, *(t for d in arranged for t in d)], dtype=torch.long),
        keys_before_rope=torch.cat(keys, dim=2),
        values=torch.cat(values, dim=2),
        prefix_length=len(prefix),
        document_slices=tuple(slices),
    )


def dense_recompute(
    model: Any,
    context: DenseContext,
    slots: Sequence[int] | Tensor,
    prompt_ids: Sequence[int] = (),
) -> DenseTrace:
    """Recompute the rows in `slots` layer by layer against the mixed cache, then answer a prompt.

    Slot and position coincide, and a row sees every key whose position is at most its own. Prompt
    rows follow the context. Slots may come in any order.

    Returns:
        Keys and values of the T context slots and the Q prompt slots (`N = T + Q`), and the logits
        of the selected rows followed by those of the prompt rows.
    """
    total, extra = len(context.token_ids), len(prompt_ids)
    chosen = torch.as_tensor(slots, dtype=torch.long)
    rows = torch.cat([chosen, torch.arange(total, total + extra)])
    ids = torch.cat([context.token_ids[chosen], torch.tensor(list(prompt_ids), dtype=torch.long)])
    positions = torch.arange(total + extra)
    mask = positions[None, :] <= rows[:, None]
    room = (0, 0, 0, extra)  # zeros behind the context for the prompt's keys and values
    padded = [torch.nn.functional.pad(x, room) for x in (context.keys_before_rope, context.values)]
    return dense_rows(model, ids, rows, positions, mask, *padded)


def dense_scores(
    model: Any,
    context: DenseContext,
    query_ids: Sequence[int],
    *,
    layers: Sequence[int],
    key_positions: Sequence[int] | Tensor | None = None,
    query_positions: Sequence[int] | Tensor | None = None,
    reduction: Literal["l2", "sum"] = "l2",
) -> Tensor:
    """Return the attention norm of every context slot (arXiv 2603.05353), `[T]`.

    Query tokens see the whole context, at whatever positions its slots are, and each other
    causally. Attention is averaged over heads, reduced over query tokens by the L2 norm or the sum,
    and averaged over `layers`.

    Args:
        model: A Hugging Face `*ForCausalLM`.
        context: The stitched context.
        query_ids: Q query tokens.
        layers: Layer indices, negative ones counting from the last.
        key_positions: Position of every context slot, `[T]`; None means the slot number.
        query_positions: Positions of the query tokens, `[Q]`; None means T, T + 1, ...
        reduction: Reduction over query tokens, "l2" or "sum".
    """
    total, queries = len(context.token_ids), len(query_ids)
    keys_at = torch.arange(total) if key_positions is None else torch.as_tensor(key_positions)
    asked_at = torch.arange(total, total + queries)
    if query_positions is not None:
        asked_at = torch.as_tensor(query_positions)
    slots = torch.arange(total, total + queries)
    mask = torch.arange(total + queries)[None, :] <= slots[:, None]  # by slot: all of the context
    room = (0, 0, 0, queries)
    padded = [torch.nn.functional.pad(x, room) for x in (context.keys_before_rope, context.values)]
    trace = dense_rows(model, query_ids, slots, torch.cat([keys_at, asked_at]), mask, *padded)
    per_layer = []
    for layer in layers:
        mean_over_heads = trace.attention[layer][:, :, :total].mean(0)  # [Q, T]
        norm = mean_over_heads.square().sum(0).sqrt()
        per_layer.append(norm if reduction == "l2" else mean_over_heads.sum(0))
    return torch.stack(per_layer).mean(0)
