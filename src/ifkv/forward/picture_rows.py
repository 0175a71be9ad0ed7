"""Rows of pictures among the rows of a forward: what the first layers are given for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PictureRows(NamedTuple):
    """Rows of pictures among the rows of one forward.

    A row of text enters the first layer as its token's embedding. A row of a picture enters as the
    output of the vision tower, and with DeepStack (2406.04334) a level of the tower is added to it
    behind each of the first layers. Without that it would be wrong from the second layer on.

    Attributes:
        at: Which rows they are, long ``[m]``, ascending, on the model's device.
        rows: Inputs of the first layer, ``[m, hidden]``.
        deep: What is added behind layer l, ``[levels, m, hidden]``; None without DeepStack.
    """

    at: Tensor
    rows: Tensor
    deep: Tensor | None

    def entering(self, hidden: Tensor) -> Tensor:
        """Return the inputs of the first layer, with the pictures' in place of embeddings.

        Args:
            hidden: Embeddings of all rows, ``[1, rows, hidden]``.
        """
        return hidden.index_copy(1, self.at, self.rows[None])

    def behind(self, hidden: Tensor, layer_idx: int) -> Tensor:
        """Return the output of a layer, with what DeepStack adds.

        Args:
            hidden: Output of the layer, ``[1, rows, hidden]``.
            layer_idx: The layer.
        """
        if self.deep is None or layer_idx >= len(self.deep):
            return hidden
        return hidden.index_add(1, self.at, self.deep[layer_idx][None])

    def among(self, kept: Tensor) -> PictureRows | None:
        """Return those among some of the rows; None if there are none.

        Args:
            kept: The rows that stay, long, ascending, on the same device.
        """
        stay = torch.isin(self.at, kept)
        if not bool(stay.any()):
            return None
        deep = None if self.deep is None else self.deep[:, stay]
        return PictureRows(torch.searchsorted(kept, self.at[stay]), self.rows[stay], deep)


def side_by_side(parts: Sequence[tuple[PictureRows | None, int]]) -> PictureRows | None:
    """Join the rows of pictures of several requests or documents.

    Args:
        parts: For each its rows of pictures, and the number of all its rows.
    """
    found, start = [], 0
    for part, count in parts:
        if part is not None:
            found.append(part._replace(at=part.at + start))
        start += count
    if not found:
        return None
    deep = [part.deep for part in found if part.deep is not None]
    return PictureRows(
        torch.cat([part.at for part in found]),
        torch.cat([part.rows for part in found]),
        torch.cat(deep, dim=1) if deep else None,
    )
