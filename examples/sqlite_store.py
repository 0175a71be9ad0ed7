"""Example of a store outside ifkv: documents in one SQLite file."""

from __future__ import annotations

import sqlite3
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from ifkv import DocumentCache
from ifkv.errors import DocumentNotFoundError, StoreCorruptionError
from ifkv.store import StoredDocument, StoreStats, document_key, key_for, key_of
from ifkv.store.codecs import resolve_codec
from ifkv.store.document_file import DocumentFile
from ifkv.store.document_reader import BytesSource, DocumentReader
from ifkv.store.format import FormatError
from ifkv.store.keys import check_document


class SqliteStore:
    """Store of documents as blobs of at most 1 GB each; it grows without a limit.

    Args:
        path: Database file; created if it does not exist.
    """

    def __init__(self, path: str | Path):
        self._path = str(path)
        self._codec = resolve_codec("exact")
        # Documents share one object for their prefix, as long as any of them is in use.
        self._prefixes: weakref.WeakValueDictionary[str, DocumentCache]
        self._prefixes = weakref.WeakValueDictionary()
        self._lock = threading.Lock()
        self._hits = self._misses = 0
        with closing(self._open()) as db, db:
            db.execute(
                "CREATE TABLE IF NOT EXISTS documents "
                "(key TEXT PRIMARY KEY, behind TEXT, tokens INTEGER, data BLOB)"
            )

    def _open(self) -> sqlite3.Connection:
        # One per call: a connection belongs to the thread that made it.
        return sqlite3.connect(self._path, timeout=60)

    def key_for(
        self, model, token_ids: Sequence[int], prefix: Sequence[int] = (), surrogate=None
    ) -> str:
        """Return the key of a document."""
        return key_for(model, token_ids, prefix, surrogate)

    def put(self, document: DocumentCache, *, replace: bool = False) -> str:
        """Store a document and its prefix in one transaction: both or neither."""
        check_document(document)
        behind = None if document.prefix is None else key_of(document.prefix)
        rows = [(document, behind)]
        if document.prefix is not None:
            rows.append((document.prefix, None))
        with closing(self._open()) as db, db:
            for part, prefix_key in rows:
                instead = "REPLACE" if replace and part is document else "IGNORE"
                db.execute(
                    f"INSERT OR {instead} INTO documents VALUES (?, ?, ?, ?)",
                    (
                        key_of(part),
                        prefix_key,
                        len(part),
                        DocumentFile(part, self._codec).tobytes(),
                    ),
                )
        if replace:
            self._forget(key_of(document))
        return key_of(document)

    def _forget(self, key: str) -> None:
        with self._lock:
            self._prefixes.pop(key, None)

    def get(self, key: str, *, lazy: bool = False) -> DocumentCache:
        """Return the document under a key, checked; `lazy` makes no difference here."""
        document = self._read(key)
        self._hits += 1
        return document

    def _read(self, key: str) -> DocumentCache:
        with self._lock:
            if (shared := self._prefixes.get(key)) is not None and key in self:
                return shared
        with closing(self._open()) as db:
            row = db.execute("SELECT data FROM documents WHERE key = ?", (key,)).fetchone()
        if row is None:
            self._misses += 1
            raise DocumentNotFoundError(
                f"no document {key} in {self._path}; prefill it and put it."
            )
        try:
            reader = DocumentReader(BytesSource(row[0]), key)
            prefix = None
            if len(reader.prefix_ids):
                none, behind = reader.prefix_ids[:0], reader.prefix_ids
                prefix = self._read(document_key(reader.header.fingerprint, none, behind))

            def read_layer(layer, out) -> None:
                reader.read_layer(layer, verify=True, out=out)

            document = StoredDocument(reader, read_layer, prefix).whole()
        except FormatError as error:
            self.delete(key)  # so that it is never served again
            raise StoreCorruptionError(
                f"document {key} in {self._path} cannot be trusted: {error}. It has been removed; "
                "prefill it again and put it.",
                key=key,
                reason=str(error),
            ) from error
        if prefix is None:
            with self._lock:
                document = self._prefixes.setdefault(key, document)
        return document

    def touch(self, key: str) -> None:
        """Do nothing: this store never evicts, so it need not know what was used last."""

    def __len__(self) -> int:
        with closing(self._open()) as db:
            (count,) = db.execute("SELECT count(*) FROM documents").fetchone()
        return int(count)

    def __contains__(self, key: object) -> bool:
        # A document whose prefix is missing cannot be served.
        query = (
            "SELECT 1 FROM documents AS d WHERE key = ? AND "
            "(behind IS NULL OR EXISTS (SELECT 1 FROM documents WHERE key = d.behind))"
        )
        with closing(self._open()) as db:
            return isinstance(key, str) and db.execute(query, (key,)).fetchone() is not None

    def delete(self, key: str) -> None:
        """Delete a document; deleting a prefix deletes the documents behind it."""
        with closing(self._open()) as db, db:
            found = db.execute("DELETE FROM documents WHERE key = ?", (key,)).rowcount
            db.execute("DELETE FROM documents WHERE behind = ?", (key,))
        if not found:
            raise DocumentNotFoundError(f"no document {key} in {self._path} to delete.")
        self._forget(key)

    def keys(self) -> Iterator[str]:
        """Return the keys of all entries."""
        with closing(self._open()) as db:
            return iter([key for (key,) in db.execute("SELECT key FROM documents ORDER BY rowid")])

    def stats(self) -> StoreStats:
        """Return the counts of what the store holds."""
        query = "SELECT count(*), coalesce(sum(tokens), 0), coalesce(sum(length(data)), 0)"
        with closing(self._open()) as db:
            found = db.execute(f"{query} FROM documents").fetchone()
        return StoreStats(*found, hits=self._hits, misses=self._misses)
