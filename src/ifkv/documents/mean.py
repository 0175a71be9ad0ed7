"""Mean of several encodings of the same documents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ifkv.documents.cache import DocumentCache


class Mean:
    """Mean of keys and values over encodings of the same documents.

    Sums of several are kept in a wider dtype where there is one, so that rows which are equal in
    all encodings, as those of the first layer are, stay as they are.
    """

    def __init__(self) -> None:
        self._sums: list[tuple[Tensor, Tensor]] = []
        self._dtype: torch.dtype | None = None
        self._count = 0

    def add(self, documents: Sequence[DocumentCache]) -> None:
        """Add one encoding of all documents."""
        self._count += 1
        rows = [(document.keys, document.values) for document in documents]
        if self._count == 1:
            self._sums = rows
            return
        if self._dtype is None:
            self._dtype = documents[0].dtype
            self._sums = [(_widened(keys), _widened(values)) for keys, values in self._sums]
        for (keys, values), (more_keys, more_values) in zip(self._sums, rows, strict=True):
            keys += more_keys
            values += more_values

    def rows(self) -> list[tuple[Tensor, Tensor]]:
        """Return the mean keys and values of each document, in its dtype."""
        if self._dtype is None:
            return self._sums
        return [
            ((keys / self._count).to(self._dtype), (values / self._count).to(self._dtype))
            for keys, values in self._sums
        ]


def _widened(rows: Tensor) -> Tensor:
    wider = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
    return rows.to(wider.get(rows.dtype, torch.float64), copy=True)
