"""Geometries: which positions documents and query get while they are scored (2603.05353, sec. 4).

A *slot* is an index into the cache, a *position* is what RoPE sees. Slots always run prefix first,
then the documents one after another; the geometry decides the positions. A document takes as many
positions as its *extent* says, which need not be its length.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from ifkv.errors import InvalidInputError
from ifkv.models.rope import join_positions

Geometry = Literal["global", "hl-hp", "tl-tp", "hl-tp"]
GEOMETRIES: tuple[str, ...] = get_args(Geometry)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Slots and positions of prefix and documents in a stitched cache.

    Attributes:
        positions: Position of each slot, long ``[T]`` or ``[axes, T]``, on the CPU.
        document_slices: Slots of each document, in the cache's order.
        prefix_length: Slots of the prefix, which come first.
        query_position: Position of the first token behind the context.
        geometry: The geometry's name.
        extent: Positions that the whole context takes, laid out one part after another.
        plain: Whether every slot is its own position, also of rows appended later.
    """

    positions: Tensor
    document_slices: list[slice]
    prefix_length: int
    query_position: int
    geometry: Geometry
    extent: int
    plain: bool

    @property
    def length(self) -> int:
        """Return the number of slots."""
        return self.positions.shape[-1]


def layout(
    prefix_length: int,
    lengths: list[int],
    geometry: str,
    extents: list[int] | None = None,
    offsets: list[Tensor] | None = None,
) -> Layout:
    """Lay documents out in a geometry.

    ``global``: one after another, as in a full prefill. ``hl-hp``: all start behind the prefix and
    overlap, the query follows the longest. ``tl-tp``: all end where the context ends. ``hl-tp``:
    all start behind the prefix, the query follows the whole context.

    Args:
        prefix_length: Tokens of the prefix.
        lengths: Tokens of each document.
        geometry: One of ``GEOMETRIES``.
        extents: Positions that each document takes; its number of tokens if None.
        offsets: Positions of each document's tokens, counted from its start; consecutive if None.

    Raises:
        InvalidInputError: The geometry is unknown.
    """
    if geometry not in GEOMETRIES:
        raise InvalidInputError(
            f"geometry {geometry!r} is unknown; choose one of {', '.join(GEOMETRIES)}."
        )
    extents = lengths if extents is None else extents
    steps = [torch.arange(length) for length in lengths]
    offsets = steps if offsets is None else offsets
    total = prefix_length + sum(extents)
    slices: list[slice] = []
    positions = [torch.arange(prefix_length)]
    slot = behind = prefix_length
    for length, extent, own in zip(lengths, extents, offsets, strict=True):
        slices.append(slice(slot, slot + length))
        start = {"global": behind, "tl-tp": total - extent}.get(geometry, prefix_length)
        positions.append(own + start)
        slot += length
        behind += extent
    query_position = total
    if geometry == "hl-hp":
        query_position = prefix_length + max(extents, default=0)
    consecutive = all(map(torch.equal, offsets, steps))
    plain = geometry == "global" and extents == lengths and consecutive
    name = cast(Geometry, geometry)
    every = join_positions(positions)
    return Layout(every, slices, prefix_length, query_position, name, total, plain)
