"""Stores that keep where their documents are from, beside the documents and outside their keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from ifkv.documents.source import Source
from ifkv.store.tiered import TieredStore


@runtime_checkable
class SourceKeeper(Protocol):
    """What a store offers that keeps sources; a `DocumentStore` need not.

    A key stands for a text, and the same text may be found in several places: each key has a list
    of sources. They last as long as the entry, through its being evicted and made again.
    """

    def add_sources(self, sources: Sequence[tuple[str, Source]]) -> None:
        """Keep sources by key; one that is there already stays as it is.

        Raises:
            StoreError: They cannot be written.
        """
        ...

    def sources(self, keys: Sequence[str] | None = None) -> dict[str, list[Source]]:
        """Return sources by key, those kept first in front; of all keys if None.

        Raises:
            StoreError: They cannot be read.
        """
        ...


def keeper_of(store: object) -> SourceKeeper | None:
    """Return the part of a store that keeps sources, the slowest that does; None if none does."""
    if isinstance(store, TieredStore):
        slow = keeper_of(store.slow)
        return keeper_of(store.fast) if slow is None else slow  # an empty store is false
    return store if isinstance(store, SourceKeeper) else None
