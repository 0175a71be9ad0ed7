"""Rows sorted by slot, cut into tiles, and what each tile has to read.

FlashInfer packs the query heads that share a key head with the rows of a request into tiles of 128.
Rows of one tile read the same keys, so a tile should hold neighbours: sorted rows are cut every
``128 / group`` rows, and each tile reads keys only up to its last row. Rows without a gap between
them are a request whose causal mask FlashInfer knows by itself, since it is right-aligned: rows a
to b are the last of b + 1. Other tiles are read in two parts, merged by their log-sum-exps: whole
pages before the tile's first row, which all its rows see, without a mask; and the fringe around the
rows themselves with one. For 15 % of 32k rows that reads 1.006 times the keys the rows see,
99 % of them without a mask; masks over all of a tile's keys would take 80 MB and slow it all down.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

# Packed rows (rows times query heads per key head) of FlashInfer's largest query tile.
PACKED_ROWS = 128

# What a call asks of FlashInfer: nothing hidden, right-aligned causal, or a mask given.
CallKind = Literal["full", "causal", "masked"]
MaskForm = Literal["split", "tiles", "positions"]


@dataclasses.dataclass(frozen=True)
class Tile:
    """Rows ``start`` to ``stop`` of a forward; they belong to one sequence.

    Attributes:
        sequence: Whose cache the rows read.
        start: First row.
        stop: End of the rows.
        first: Slot of the first row.
        last: Slot of the last row.
    """

    sequence: int
    start: int
    stop: int
    first: int
    last: int

    @property
    def adjacent(self) -> bool:
        """Whether the rows' slots follow one another without a gap."""
        return self.last - self.first == self.stop - self.start - 1


@dataclasses.dataclass(frozen=True)
class Part:
    """Keys that some rows read in one request: slots ``begin`` to ``end`` of a sequence."""

    sequence: int
    start: int
    stop: int
    begin: int
    end: int


def cut_rows(slots: Sequence[Tensor], tile_rows: int, *, whole_runs: bool) -> list[Tile]:
    """Cut the rows of one or several sequences into tiles.

    Args:
        slots: For each sequence its rows' slots, long on the CPU, ascending and unique; may be
            empty. Rows are numbered through all sequences.
        tile_rows: Rows of a tile at most.
        whole_runs: Keep runs of at least ``tile_rows`` adjacent rows whole, as tiles of their own.
    """
    tiles: list[Tile] = []
    offset = 0
    for sequence, own in enumerate(slots):
        for start, stop in _ranges(own, tile_rows, whole_runs):
            ends = int(own[start]), int(own[stop - 1])
            tiles.append(Tile(sequence, offset + start, offset + stop, *ends))
        offset += len(own)
    return tiles


def _ranges(slots: Tensor, tile_rows: int, whole_runs: bool) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []

    def chop(start: int, stop: int) -> None:
        for at in range(start, stop, tile_rows):
            ranges.append((at, min(at + tile_rows, stop)))

    done = 0
    if whole_runs and len(slots):
        gaps = (slots[1:] != slots[:-1] + 1).nonzero().flatten() + 1
        starts = torch.cat((gaps.new_zeros(1), gaps))
        stops = torch.cat((gaps, gaps.new_tensor([len(slots)])))
        long = stops - starts >= tile_rows
        for start, stop in zip(starts[long].tolist(), stops[long].tolist(), strict=True):
            chop(done, start)
            ranges.append((start, stop))
            done = stop
    chop(done, len(slots))
    return ranges


def parts_of_rows(
    slots: Sequence[Tensor], group: int, page_size: int, window: int | None, form: MaskForm
) -> dict[CallKind, list[Part]]:
    """Decide what every row reads, and in which kind of call.

    Each row is in exactly one of ``"causal"`` and ``"masked"``; some of the masked ones are in
    ``"full"`` too, for keys that their masked part leaves out.

    Args:
        slots: As in :func:`cut_rows`.
        group: Query heads per key head.
        page_size: Slots of a page; parts begin at whole pages.
        window: Slots that a row sees, its own included; None sees all. FlashInfer's own window
            takes rows for adjacent, so windows go into the mask.
        form: ``"split"`` as in the module's docstring; ``"tiles"`` and ``"positions"`` read all of
            a tile's keys in its masked part.
    """
    tile_rows = max(1, PACKED_ROWS // group)
    last = max((int(own[-1]) for own in slots if len(own)), default=0)
    if window is not None and last < window:
        window = None  # reaches back beyond slot 0 from every row
    parts: dict[CallKind, list[Part]] = {"full": [], "causal": [], "masked": []}
    for tile in cut_rows(slots, tile_rows, whole_runs=window is None):
        rows, end = (tile.sequence, tile.start, tile.stop), tile.last + 1
        if window is not None:
            begin = max(0, tile.first - window + 1) // page_size * page_size
            parts["masked"].append(Part(*rows, begin, end))
        elif tile.adjacent:
            parts["causal"].append(Part(*rows, 0, end))
        else:
            begin = tile.first // page_size * page_size if form == "split" else 0
            parts["masked"].append(Part(*rows, begin, end))
            if begin:
                parts["full"].append(Part(*rows, 0, begin))
    return parts


def mask_of_parts(
    parts: Sequence[Part],
    row_positions: Tensor,
    key_positions: Sequence[Tensor] | None,
    window: int | None,
) -> Tensor:
    """The mask FlashInfer wants: True where a row looks, request after request, rows in order.

    Args:
        parts: What each request reads.
        row_positions: Long ``[rows]``, on the compute device.
        key_positions: For each sequence long ``[slots]``; a slot is its position if None.
        window: Positions that a row sees, its own included; None sees all.

    Returns:
        Bool ``[sum of rows times keys]``.
    """
    device = row_positions.device
    total = sum((part.stop - part.start) * (part.end - part.begin) for part in parts)
    mask = torch.empty(total, dtype=torch.bool, device=device)
    slots = torch.arange(max(part.end for part in parts), device=device)
    done = 0
    for part in parts:
        rows = row_positions[part.start : part.stop, None]
        positions = slots if key_positions is None else key_positions[part.sequence]
        keys = positions[None, part.begin : part.end]
        size = rows.shape[0] * keys.shape[1]
        block = mask[done : done + size].view(rows.shape[0], keys.shape[1])
        torch.le(keys, rows, out=block)
        if window is not None:
            block &= keys > rows - window
        done += size
    return mask
