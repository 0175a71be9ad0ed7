"""Tiles of rows for FlashInfer, and the spans of keys that each tile reads.

FlashInfer computes the rows of a request in tiles of 128: rows of one head in fa3, rows times the
query heads that share a key head in fa2. Rows of one tile read the same keys, so a tile should hold
neighbours. Adjacent rows are a request with FlashInfer's own causal mask, which is right-aligned:
rows a to b are the last of b + 1. Other rows read their keys in two parts, merged by their
log-sum-exps. One is the whole pages before the first of 128 rows, which all of them see, without a
mask. The other is the fringe around the rows, with a mask, in tiles of ``128 / group`` rows. For
15 % of 32k rows this reads 1.006 times the keys that the rows see, 97 % of them without a mask. A
mask over all keys of a tile took more than four times as long (H100).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ifkv.backends.spec import AttentionSpec

# Size of FlashInfer's largest query tile: rows of one head in fa3, of all heads of a group in fa2.
TILE_ROWS = 128
# Rows that share one span of keys read without a mask.
SPLIT_ROWS = 128

# Masking of a call: no key hidden, right-aligned causal, or by a mask.
CallKind = Literal["full", "causal", "masked"]
MaskForm = Literal["positions", "split"]


class Part(NamedTuple):
    """Rows ``start`` to ``stop`` of a forward, and the slots of their sequence that they read."""

    sequence: int
    start: int
    stop: int
    begin: int
    end: int


class SequenceTile:
    """Consecutive rows of a forward that belong to one sequence.

    Attributes:
        sequence: Index of the sequence whose cache the rows read.
        start: First row.
        stop: End of the rows.
        first: Slot of the first row.
        last: Slot of the last row.

    Args:
        sequence: As the attribute.
        start: As the attribute.
        slots: Slots of the rows, ascending.
    """

    def __init__(self, sequence: int, start: int, slots: Sequence[int]):
        self.sequence = sequence
        self.start = start
        self.stop = start + len(slots)
        self.first, self.last = slots[0], slots[-1]
        self._slots = slots

    @property
    def adjacent(self) -> bool:
        """True if there is no gap between the rows' slots."""
        return self.last - self.first == self.stop - self.start - 1

    def pieces(self, rows: int) -> Iterator[SequenceTile]:
        """Yield the tile cut into tiles of at most ``rows`` rows."""
        for at in range(0, len(self._slots), rows):
            yield SequenceTile(self.sequence, self.start + at, self._slots[at : at + rows])

    def part(self, begin: int) -> Part:
        """Return the part of the rows that reads from slot ``begin`` to the last row's slot."""
        return Part(self.sequence, self.start, self.stop, begin, self.last + 1)


def cut_rows(slots: Sequence[Tensor], tile_rows: int, *, whole_runs: bool) -> list[SequenceTile]:
    """Cut the rows of one or several sequences into tiles.

    Args:
        slots: Slots of each sequence's rows, long on the CPU, ascending and unique; may be empty.
            Rows are numbered through all sequences.
        tile_rows: Largest number of rows of a tile.
        whole_runs: Make one tile of every run of at least ``tile_rows`` adjacent rows.
    """
    tiles: list[SequenceTile] = []
    offset = 0
    for sequence, own in enumerate(slots):
        every = own.tolist()
        for start, stop in _ranges(own, tile_rows, whole_runs):
            tiles.append(SequenceTile(sequence, offset + start, every[start:stop]))
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
    slots: Sequence[Tensor], group: int, page_size: int, window: int | None
) -> dict[CallKind, list[Part]]:
    """Assign every row to kinds of calls, with the keys that it reads in each.

    Each row is in either ``"causal"`` or ``"masked"``. Some of the masked rows are in ``"full"``
    too, for keys that all rows of their tile see.

    Args:
        slots: As in `cut_rows`.
        group: Query heads per key head.
        page_size: Slots of a page; parts begin at whole pages.
        window: Slots that a row sees, its own included; None has no window. FlashInfer's own window
            assumes adjacent rows, so windows go into the mask.
    """
    last = max((int(own[-1]) for own in slots if len(own)), default=0)
    if window is not None and last < window:
        window = None  # it hides nothing: it reaches slot 0 from every row
    parts: dict[CallKind, list[Part]] = {"full": [], "causal": [], "masked": []}
    small = max(1, TILE_ROWS // group)
    tiles = cut_rows(slots, SPLIT_ROWS, whole_runs=window is None)
    # If there are other tiles, a short run is cheaper among them than in a separate call.
    run = 1 if all(tile.adjacent for tile in tiles) else SPLIT_ROWS
    for tile in tiles:
        if window is None and tile.adjacent and tile.stop - tile.start >= run:
            parts["causal"].append(tile.part(0))
            continue
        seen_by_all = tile.first // page_size * page_size if window is None else 0
        if seen_by_all:
            rows = tile.sequence, tile.start, tile.stop
            parts["full"].append(Part(*rows, 0, seen_by_all))
        for piece in tile.pieces(small):
            out_of_sight = 0 if window is None else max(0, piece.first - window + 1)
            begin = max(seen_by_all, out_of_sight // page_size * page_size)
            parts["masked"].append(piece.part(begin))
    return parts


def mask_of_parts(
    parts: Sequence[Part],
    row_positions: Tensor,
    key_positions: Sequence[Tensor] | None,
    spec: AttentionSpec,
) -> Tensor:
    """Build a mask in FlashInfer's format, with all requests and rows concatenated.

    Args:
        parts: Rows and span of each request.
        row_positions: Positions of all rows, long ``[rows]``, on the compute device.
        key_positions: Positions of each sequence's slots, long ``[slots]``; the slots if None.
        spec: Scaling and mask of the layer.

    Returns:
        Bool ``[sum of rows times keys]``, True where a row attends.
    """
    # All at once, because a loop over hundreds of requests costs milliseconds of launches.
    device = row_positions.device
    rows = torch.cat([torch.arange(part.start, part.stop) for part in parts])
    heights = torch.tensor([part.stop - part.start for part in parts])
    widths = torch.tensor([part.end - part.begin for part in parts]).repeat_interleave(heights)
    ends = widths.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    starts = [0] * len(parts)
    if key_positions is not None:
        offsets = [0, *itertools.accumulate(map(len, key_positions))]
        starts = [offsets[part.sequence] for part in parts]
    # Entry e of a row is the key at index e + first.
    begins = torch.tensor([part.begin + at for part, at in zip(parts, starts, strict=True)])
    firsts = begins.repeat_interleave(heights) - (ends - widths)
    of_row = torch.stack((rows, widths, firsts)).to(torch.int32).to(device, non_blocking=True)
    positions, widths = row_positions[of_row[0]].to(torch.int32), of_row[1]
    # 32 bits and in place, because these are the only large tensors beside the mask.
    keys = torch.arange(total, dtype=torch.int32, device=device)
    keys += of_row[2].repeat_interleave(widths, output_size=total)
    if key_positions is not None:
        keys = torch.cat(list(key_positions)).to(torch.int32)[keys]
    distance = keys.neg_().add_(positions.repeat_interleave(widths, output_size=total))
    return spec.near(distance)
