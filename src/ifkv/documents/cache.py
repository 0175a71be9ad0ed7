"""The keys and values of one document."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ifkv.documents.images import ImageRows
    from ifkv.documents.surrogate import SurrogateContext


@dataclasses.dataclass(frozen=True, eq=False)
class DocumentCache:
    """Keys and values of one document, made behind a prefix and beside nothing else.

    Immutable and shared: requests read it, none writes into it.

    Attributes:
        token_ids: Long ``[n]``, on the CPU.
        prefix_ids: Long ``[P]``, on the CPU: the tokens it was encoded behind.
        keys: ``[layers, kv_heads, n, head_dim]``, after qk-norm and before the rotation.
        values: ``[layers, kv_heads, n, head_dim]``.
        fingerprint: Identity of the model that made it.
        prefix: The prefix's own rows, shared by all documents behind it; None if ``P == 0``.
        sensitivity: How far each token's values move when other text stands before the document,
            float32 ``[n]``, on the CPU; None if it was not measured (`measure_sensitivities`).
        extent: Positions that the document takes in a context; its number of tokens if None.
        surrogate: What stood between prefix and document while it was encoded; None if nothing
            did.
        images: Rows of its pictures and positions of its tokens; None for a text.
    """

    token_ids: Tensor
    prefix_ids: Tensor
    keys: Tensor
    values: Tensor
    fingerprint: str
    prefix: DocumentCache | None = None
    sensitivity: Tensor | None = None
    extent: int | None = None
    surrogate: SurrogateContext | None = None
    images: ImageRows | None = None

    @property
    def positions_taken(self) -> int:
        """Return the number of positions that the document takes in a context."""
        return len(self) if self.extent is None else self.extent

    @property
    def offsets(self) -> Tensor:
        """Return the positions of its tokens, counted from its start, ``[n]`` or ``[axes, n]``."""
        return torch.arange(len(self)) if self.images is None else self.images.positions

    @property
    def nbytes(self) -> int:
        """Return the bytes of the document's keys and values, without the prefix's and images'."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def shape(self) -> tuple[int, ...]:
        """Return ``(layers, kv_heads, n, head_dim)``."""
        return tuple(self.keys.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of keys and values."""
        return self.keys.dtype

    @property
    def lazy(self) -> bool:
        """True if rows are read from a store when they are used (`ifkv.store.lazy`)."""
        return False

    @property
    def distant(self) -> bool:
        """True if those reads wait for a network."""
        return False

    def layer(self, layer: int, *, pin_memory: bool = False) -> Tensor:
        """Return the keys and values of one layer, ``[2, kv_heads, n, head_dim]``.

        Args:
            layer: The layer's number.
            pin_memory: Read into page-locked memory, if a store reads the rows.
        """
        return torch.stack((self.keys[layer], self.values[layer]))

    def rebuilt(self, **changes: Any) -> DocumentCache:
        """Return a document in memory that differs from this one in the fields given."""
        names = [field.name for field in dataclasses.fields(DocumentCache)]
        kept = {name: getattr(self, name) for name in names if name not in changes}
        return DocumentCache(**kept, **changes)

    def __len__(self) -> int:
        return len(self.token_ids)

    def __repr__(self) -> str:
        behind = f"{len(self.prefix_ids)}"
        if self.surrogate is not None:
            behind += f" and a {self.surrogate!r}"
        return (
            f"DocumentCache({len(self)} tokens behind {behind}, "
            f"{self.nbytes / 2**20:.1f} MiB, {self.keys.dtype}, {self.fingerprint[:8]})"
        )
