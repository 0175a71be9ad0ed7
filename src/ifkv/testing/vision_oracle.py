"""Oracle of documents with pictures: each step of the method as one dense pass.

As in `oracle`, no other code of this library takes part, and no upstream code but the vision tower,
which is run on one picture at a time. Positions are made here, from their definition.

A row of text has three equal numbers. A picture of h x w rows that starts at s has (s, s + row, s +
column) in raster order, and what follows it starts at s + max(h, w).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ifkv.testing.dense import DenseTrace, decoder, dense_rows


@dataclass(frozen=True)
class DenseRows:
    """Rows of a text, or of a document with pictures, as the first layers are given them.

    Attributes:
        token_ids: `[N]`.
        positions: Counted from the first row's, `[3, N]`.
        extent: Positions that they take.
        inputs: Inputs of the first layer, `[N, hidden]`.
        added: What DeepStack adds behind the first layers, `[levels, N, hidden]`; zero at text.
    """

    token_ids: Tensor
    positions: Tensor
    extent: int
    inputs: Tensor
    added: Tensor


@dataclass(frozen=True)
class DenseVisionContext:
    """Context of N slots with pictures; as `oracle.DenseContext`, with its rows and positions.

    Attributes:
        rows: All rows, at the positions of the ``global`` geometry.
        keys_before_rope: Keys before RoPE, `[L, H_kv, N, D]`.
        values: Values, `[L, H_kv, N, D]`.
        prefix_length: Number of prefix slots.
        document_slices: The slots of each document, in slot order.
        offsets: Positions of each document, counted from its first.
        extents: Positions that each document takes.
    """

    rows: DenseRows
    keys_before_rope: Tensor
    values: Tensor
    prefix_length: int
    document_slices: tuple[slice, ...]
    offsets: tuple[Tensor, ...]
    extents: tuple[int, ...]


@torch.no_grad()
def dense_vision_rows(
    model: Any, token_ids: Sequence[int], inputs: Mapping[str, Tensor] | None = None
) -> DenseRows:
    """Return the rows of one document.

    Args:
        model: A Qwen-VL model.
        token_ids: Its tokens, placeholders included.
        inputs: What the image processor returned for its pictures.
    """
    ids = torch.tensor(list(token_ids), dtype=torch.long)
    rows = decoder(model).embed_tokens.weight[ids].clone()
    side = model.config.vision_config.spatial_merge_size
    levels = len(getattr(model.config.vision_config, "deepstack_visual_indexes", ()))
    added = rows.new_zeros(levels, *rows.shape)
    grids = [] if inputs is None else inputs["image_grid_thw"].tolist()
    placed, start, patch, slot = [], 0, 0, 0
    for grid in [*grids, None]:
        while slot < len(ids) and ids[slot] != model.config.image_token_id:
            placed.append([start] * 3)
            slot, start = slot + 1, start + 1
        if grid is None:
            break
        assert inputs is not None
        count = grid[0] * grid[1] * grid[2]
        pixels = inputs["pixel_values"][patch : patch + count].to(rows.dtype)
        patch += count
        seen = model.model.visual(pixels, grid_thw=torch.tensor([grid]), return_dict=True)
        height, width = grid[1] // side, grid[2] // side
        own = slice(slot, slot + height * width)
        rows[own] = seen.pooler_output
        for level in range(levels):
            added[level, own] = seen.deepstack_features[level]
        for row in range(height):
            for column in range(width):
                placed.append([start, start + row, start + column])
        slot, start = own.stop, start + max(height, width)
    return DenseRows(ids, torch.tensor(placed).long().reshape(-1, 3).T, start, rows, added)


def dense_vision_prefill(model: Any, rows: DenseRows) -> DenseTrace:
    """Run a plain causal prefill."""
    count = len(rows.token_ids)
    mask = torch.ones(count, count).tril().bool()
    return dense_rows(
        model,
        rows.token_ids,
        range(count),
        rows.positions,
        mask,
        inputs=rows.inputs,
        added=rows.added,
    )


def joined_rows(parts: Sequence[DenseRows]) -> DenseRows:
    """Return rows one after another, each at the positions behind the last one's extent."""
    starts = [sum(part.extent for part in parts[:index]) for index in range(len(parts))]
    return DenseRows(
        torch.cat([part.token_ids for part in parts]),
        torch.cat([p.positions + s for p, s in zip(parts, starts, strict=True)], dim=1),
        sum(part.extent for part in parts),
        torch.cat([part.inputs for part in parts]),
        torch.cat([part.added for part in parts], dim=1),
    )


def dense_vision_stitched(
    model: Any, prefix: Sequence[int], documents: Sequence[DenseRows], order: Sequence[int]
) -> DenseVisionContext:
    """Return documents computed alone, each after the prefix, laid out one after the other."""
    before = dense_vision_rows(model, prefix)
    arranged = [documents[index] for index in order]
    start, slices = len(prefix), []
    alone = dense_vision_prefill(model, before)
    keys, values = [alone.keys_before_rope], [alone.values]
    for document in arranged:
        alone = dense_vision_prefill(model, joined_rows([before, document]))
        keys.append(alone.keys_before_rope[:, :, len(prefix) :])
        values.append(alone.values[:, :, len(prefix) :])
        slices.append(slice(start, start + len(document.token_ids)))
        start = slices[-1].stop
    return DenseVisionContext(
        joined_rows([before, *arranged]),
        torch.cat(keys, dim=2),
        torch.cat(values, dim=2),
        len(prefix),
        tuple(slices),
        tuple(document.positions for document in arranged),
        tuple(document.extent for document in arranged),
    )


def dense_vision_recompute(
    model: Any,
    context: DenseVisionContext,
    slots: Sequence[int] | Tensor,
    prompt_ids: Sequence[int] = (),
) -> DenseTrace:
    """Recompute the rows in `slots` layer by layer against the mixed cache, then answer a prompt.

    A row sees every key whose *slot* is at most its own. Returns what `oracle.dense_recompute`
    does.
    """
    whole = joined_rows([context.rows, dense_vision_rows(model, prompt_ids)])
    total, extra = len(context.rows.token_ids), len(prompt_ids)
    chosen = torch.as_tensor(slots, dtype=torch.long)
    rows = torch.cat([chosen, torch.arange(total, total + extra)])
    mask = torch.arange(total + extra)[None, :] <= rows[:, None]
    room = (0, 0, 0, extra)
    padded = [torch.nn.functional.pad(x, room) for x in (context.keys_before_rope, context.values)]
    return dense_rows(
        model,
        whole.token_ids[rows],
        rows,
        whole.positions,
        mask,
        *padded,
        inputs=whole.inputs[rows],
        added=whole.added[:, rows],
    )


def dense_vision_scores(
    model: Any,
    context: DenseVisionContext,
    query_ids: Sequence[int],
    *,
    layers: Sequence[int],
    geometry: Literal["global", "hl-hp", "tl-tp", "hl-tp"] = "global",
) -> Tensor:
    """Return the attention norm (L2) of every context slot in a geometry, `[N]`."""
    total, queries, prefix = len(context.rows.token_ids), len(query_ids), context.prefix_length
    end = context.rows.extent
    placed, behind = [context.rows.positions[:, :prefix]], prefix
    for offsets, extent in zip(context.offsets, context.extents, strict=True):
        start = {"global": behind, "tl-tp": end - extent}.get(geometry, prefix)
        placed.append(offsets + start)
        behind += extent
    asked = prefix + max(context.extents) if geometry == "hl-hp" else end
    placed.append(torch.arange(asked, asked + queries).expand(3, -1))
    slots = torch.arange(total, total + queries)
    mask = torch.arange(total + queries)[None, :] <= slots[:, None]
    room = (0, 0, 0, queries)
    padded = [torch.nn.functional.pad(x, room) for x in (context.keys_before_rope, context.values)]
    trace = dense_rows(model, query_ids, slots, torch.cat(placed, dim=1), mask, *padded)
    norms = [
        trace.attention[layer][:, :, :total].mean(0).square().sum(0).sqrt() for layer in layers
    ]
    return torch.stack(norms).mean(0)
