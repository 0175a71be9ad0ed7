"""Stores that keep sources beside the documents and outside their keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from ifkv.documents.source import Source
from ifkv.store.tiered import TieredStore


@runtime_checkable
class SourceKeeper(Protocol):
    """Store that keeps sources, which a `DocumentStore` need not do.

    A key stands for a text, and the same text may have several sources: each key has a list. The
    list lasts as long as the entry, also if that is evicted and made again.
    """

    def add_sources(self, sources: Sequence[tuple[str, Source]]) -> None:
        """Add sources by key; those that exist are kept.

        Raises:
            StoreError: They cannot be written.
        """
        ...

    def sources(self, keys: Sequence[str] | None = None) -> dict[str, list[Source]]:
        """Return sources by key, in the order in which they were added; of all keys if None.

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
