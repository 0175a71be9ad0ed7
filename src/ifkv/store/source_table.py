"""The sources of a disk store's documents: a table in its index."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ifkv.documents.source import Source
from ifkv.errors import StoreError
from ifkv.store.index import Index


class SourceTable:
    """Sources by key. If a damaged index is rebuilt, its sources are lost.

    Args:
        index: The index of the store.
    """

    def __init__(self, index: Index):
        self._index = index

    def add(self, sources: Sequence[tuple[str, Source]]) -> None:
        """Add sources; the lock is taken only if one of them is new.

        Raises:
            StoreError: They cannot be written.
        """
        known = self.find([key for key, _ in sources])
        new = [(key, source) for key, source in sources if source not in known.get(key, ())]
        if not new:
            return
        with self._index.transaction():
            for key, source in new:
                self._index.run(
                    "INSERT OR IGNORE INTO sources (key, source) VALUES (?, ?)",
                    (key, source.to_json()),
                )

    def find(self, keys: Sequence[str] | None = None) -> dict[str, list[Source]]:
        """Return sources by key, in the order in which they were added; all if ``keys`` is None.

        Raises:
            StoreError: A stored source cannot be read.
        """
        where = "" if keys is None else "WHERE key IN (SELECT value FROM json_each(?))"
        parameters = () if keys is None else (json.dumps(list(keys)),)
        rows, _ = self._index.run(
            f"SELECT key, source FROM sources {where} ORDER BY id", parameters
        )
        found: dict[str, list[Source]] = {}
        try:
            for key, text in rows:
                found.setdefault(key, []).append(Source.from_json(text))
        except ValueError as error:
            raise StoreError(
                f"the index holds a source that cannot be read: {error}. Delete index.sqlite3 in "
                "the store's folder; the index is then made anew from the files."
            ) from error
        return found

    def forget(self) -> None:
        """Remove the sources of documents that are not there. Only within a transaction."""
        self._index.run("DELETE FROM sources WHERE key NOT IN (SELECT key FROM documents)")
