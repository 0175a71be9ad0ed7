"""Tiles of rows for plain torch: how rows are cut, and the masks that their layers share.

A tile reads keys only up to its last row. No mask is needed for the part that all its rows see, so
only the fringe between its first and its last row has one.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ifkv.backends.partial import RowMask
from ifkv.backends.spec import AttentionSpec

# Rows of a scattered tile, and slots between its first and last row. They limit a tile's mask.
TILE_ROWS = 128
TILE_SPAN = 2048
# A run of at least this many adjacent rows becomes a causal tile.
RUN_ROWS = 128


@dataclasses.dataclass(frozen=True)
class Tile:
    """Rows that are computed together.

    Attributes:
        start: First row.
        stop: End of the rows.
        first: Slot of the first row.
        last: Slot of the last row.
    """

    start: int
    stop: int
    first: int
    last: int

    @property
    def adjacent(self) -> bool:
        """True if there is no gap between the rows' slots."""
        return self.last - self.first == self.stop - self.start - 1


def cut_into_tiles(slots: list[int]) -> tuple[Tile, ...]:
    """Cut rows into tiles: a long run of adjacent rows is one tile, the others are cut by size.

    Args:
        slots: Slots of the rows, ascending.
    """
    runs: list[tuple[int, int]] = []
    start = 0
    for row in range(1, len(slots) + 1):
        if row == len(slots) or slots[row] != slots[row - 1] + 1:
            runs.append((start, row))
            start = row
    tiles: list[Tile] = []
    open_from: int | None = None

    def close(stop: int) -> None:
        nonlocal open_from
        if open_from is not None:
            tiles.append(Tile(open_from, stop, slots[open_from], slots[stop - 1]))
            open_from = None

    for start, stop in runs:
        if stop - start >= RUN_ROWS:
            close(start)
            tiles.append(Tile(start, stop, slots[start], slots[stop - 1]))
            continue
        for row in range(start, stop):
            if open_from is not None and (
                row - open_from == TILE_ROWS or slots[row] - slots[open_from] >= TILE_SPAN
            ):
                close(row)
            if open_from is None:
                open_from = row
    close(len(slots))
    return tuple(tiles)


class TiledRows:
    """Tiles of one forward, and the masks of their fringes, which all layers share.

    A mask is as wide as its tile, at most ``TILE_SPAN``. So the masks do not grow with the context.

    Args:
        slots: Slots of the rows, long ``[rows]``, ascending, on the compute device.
        tiles: Tiles of the rows.
    """

    def __init__(self, slots: Tensor, tiles: tuple[Tile, ...]):
        self.slots = slots
        self.tiles = tiles
        self._masks: dict[tuple[Tile, int, int | None], RowMask] = {}

    def mask(self, tile: Tile, begin: int, spec: AttentionSpec) -> RowMask:
        """Return the mask of a tile's rows over the slots from ``begin`` to its last."""
        key = (tile, begin, spec.window)
        if key not in self._masks:
            rows = self.slots[tile.start : tile.stop]
            keys = torch.arange(begin, tile.last + 1, device=rows.device)
            self._masks[key] = RowMask(spec.hidden(rows, keys))
        return self._masks[key]
