"""Where a session's documents are from: what it was told, and what its store keeps."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence

from ifkv.errors import StoreError
from ifkv.source import Source
from ifkv.store import DocumentStore, keeper_of


class Catalog:
    """Sources of documents by key: a session's own, then those that its store keeps.

    Args:
        store: The session's store; what it cannot keep lasts as long as the session.
    """

    def __init__(self, store: DocumentStore):
        self._keeper = keeper_of(store)
        self._own: dict[str, list[Source]] = {}
        self._lock = threading.Lock()

    def add(self, keys: Sequence[str], sources: Sequence[Source | None]) -> None:
        """Note where documents are from, here and in the store.

        Raises:
            StoreError: The store cannot write it down.
        """
        known = [(key, one) for key, one in zip(keys, sources, strict=True) if one is not None]
        with self._lock:
            for key, source in known:
                own = self._own.setdefault(key, [])
                if source not in own:
                    own.append(source)
        if known and self._keeper is not None:
            self._keeper.add_sources(known)

    def find(self, keys: Sequence[str] | None = None) -> dict[str, list[Source]]:
        """Return sources by key, the session's own first; of all keys if None.

        Raises:
            StoreError: The store's cannot be read.
        """
        found = {} if self._keeper is None else self._keeper.sources(keys)
        with self._lock:
            for key in self._own if keys is None else keys:
                own = self._own.get(key, [])
                found[key] = list(dict.fromkeys([*own, *found.get(key, [])]))
        return {key: sources for key, sources in found.items() if sources}

    def first(self, keys: Sequence[str]) -> list[Source | None]:
        """Return one source for each key, or None; an answer does not fail for want of them."""
        found: dict[str, list[Source]] = {}
        with contextlib.suppress(StoreError):
            found = self.find(keys)
        return [found[key][0] if key in found else None for key in keys]
