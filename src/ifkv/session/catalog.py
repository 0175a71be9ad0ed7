"""Sources of a session's documents: those it was given, and those that its store keeps."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Sequence

from ifkv.documents.source import Source
from ifkv.errors import StoreError, StoreWarning
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
        """Note where documents are from, here and, with a warning if it cannot, in the store."""
        known = [(key, one) for key, one in zip(keys, sources, strict=True) if one is not None]
        with self._lock:
            for key, source in known:
                own = self._own.setdefault(key, [])
                if source not in own:
                    own.append(source)
        if known and self._keeper is not None:
            try:
                self._keeper.add_sources(known)
            except StoreError as error:
                warnings.warn(
                    f"where documents are from is known to this session only: {error}",
                    StoreWarning,
                    stacklevel=3,
                )

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
        with self._lock:
            found = {key: self._own[key] for key in keys if key in self._own}
        if missing := [key for key in keys if key not in found]:
            with contextlib.suppress(StoreError):
                found.update(self.find(missing))
        return [found[key][0] if key in found else None for key in keys]
