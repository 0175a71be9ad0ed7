"""Documents with pictures: what is given, and what is kept of it beside keys and values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ifkv.forward.picture_rows import PictureRows

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class ImageDocument:
    """Document with pictures, for [ifkv.prefill_documents][].

    Attributes:
        token_ids: Its tokens. Each row of a picture has the model's placeholder, with the marks
            around a picture as the model's processor writes them.
        inputs: What the model's image processor returned for its pictures, in their order:
            ``pixel_values`` and ``image_grid_thw``.
    """

    token_ids: Sequence[int] | Tensor
    inputs: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class ImageRows:
    """Pictures of a document: what is needed to run their rows again, and where they stand.

    All tensors are on the CPU. Of these rows only those that are recomputed go to the device.

    Attributes:
        at: Which tokens are rows of pictures, long ``[m]``, ascending.
        rows: Inputs of the first layer, ``[m, hidden]``, in the model's dtype.
        deep: What DeepStack adds behind the first layers, ``[levels, m, hidden]``; None without.
        positions: Of all tokens of the document, counted from its start, long ``[axes, n]``.
        identity: SHA-256 over what the image processor returned. Two pictures of one size have the
            same token ids and differ here.
    """

    at: Tensor
    rows: Tensor
    deep: Tensor | None
    positions: Tensor
    identity: str

    @property
    def nbytes(self) -> int:
        """Return the bytes of the rows."""
        return self.rows.nbytes + (0 if self.deep is None else self.deep.nbytes)

    def all_rows(self, device: torch.device) -> PictureRows:
        """Return all rows, for a forward of the whole document."""
        return self.rows_at(self.at, self.at, device)

    def rows_at(self, tokens: Tensor, at: Tensor, device: torch.device) -> PictureRows:
        """Return the rows of some tokens of pictures, for a forward.

        Args:
            tokens: Among `at`, long ``[k]``, ascending.
            at: Which rows of the forward they are, long ``[k]``.
            device: The model's.
        """
        import torch

        index = torch.searchsorted(self.at, tokens)
        whole = len(index) == len(self.at)
        rows = self.rows if whole else self.rows[index]
        deep = self.deep if whole or self.deep is None else self.deep[:, index]
        return PictureRows(
            at.to(device),
            rows.to(device, non_blocking=True),
            None if deep is None else deep.to(device, non_blocking=True),
        )
