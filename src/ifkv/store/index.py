"""The index of a disk store: SQLite beside the files, and the lock that all processes share."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sqlite3
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ifkv.errors import StoreError, StoreFullError

# Connections of a parent process: a child must neither use nor close them.
_abandoned: list[sqlite3.Connection] = []
# Seconds to wait for another process that is writing.
BUSY_SECONDS = 60.0
# Uses to remember while other processes keep the database busy.
_MAX_NOTED = 1000

_SCHEMA = """
CREATE TABLE IF NOT EXISTS documents (
    key TEXT PRIMARY KEY,
    prefix_key TEXT,
    fingerprint TEXT NOT NULL,
    codec TEXT NOT NULL,
    tokens INTEGER NOT NULL,
    nbytes INTEGER NOT NULL,
    pinned INTEGER NOT NULL DEFAULT 0,
    used INTEGER NOT NULL,
    created REAL NOT NULL,
    surrogate TEXT
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS documents_used ON documents (used);
CREATE INDEX IF NOT EXISTS documents_prefix ON documents (prefix_key);
CREATE TABLE IF NOT EXISTS sources (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL,
    source TEXT NOT NULL,
    UNIQUE (key, source)
);
"""
_COLUMNS = "key, prefix_key, fingerprint, codec, tokens, nbytes, pinned, used, created, surrogate"
_NEXT = "(SELECT coalesce(max(used), 0) + 1 FROM documents)"


@dataclasses.dataclass(frozen=True)
class Entry:
    """Entry of the index.

    Attributes:
        key: The document's key.
        prefix_key: The key of its prefix's rows, or None.
        fingerprint: Identity of the model that made it.
        codec: The codec of its rows.
        tokens: Number of its tokens.
        nbytes: Size of its file.
        pinned: Whether it is protected from eviction.
        used: Number of its last use; the smallest was used least recently.
        created: Seconds since the epoch.
        surrogate: Identity of the surrogate context that it was encoded behind, or None.
    """

    key: str
    prefix_key: str | None
    fingerprint: str
    codec: str
    tokens: int
    nbytes: int
    pinned: bool | int = False
    used: int = 0
    created: float = 0.0
    surrogate: str | None = None


class Index:
    """Entries of a disk store.

    Files appear and disappear only within `transaction`. Its lock is the database's write lock,
    which threads and processes share, and which the system releases when a process dies.

    Args:
        path: The database file; made if it does not exist.

    Raises:
        sqlite3.Error: It cannot be opened, is no database, or is a damaged one.
    """

    def __init__(self, path: Path):
        self._path = path
        self._lock = threading.RLock()
        self._process = 0
        self._noted: list[str] = []
        self._connection: sqlite3.Connection | None = None
        (state,) = self._open().execute("PRAGMA quick_check(1)").fetchone()
        if state != "ok":
            raise sqlite3.DatabaseError(state)

    def _open(self) -> sqlite3.Connection:
        """Return this process's connection; a forked child opens another."""
        if self._connection is not None and self._process != os.getpid():
            _abandoned.append(self._connection)
            self._connection = None
        if self._connection is None:
            connection = sqlite3.connect(
                self._path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            # NORMAL: a power cut may lose the last commits, never consistency. The next open adds
            # files without an entry again.
            _until_free(connection, "PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            _until_free(connection, "BEGIN IMMEDIATE")
            for statement in _SCHEMA.split(";"):
                connection.execute(statement)
            columns = connection.execute("PRAGMA table_info(documents)").fetchall()
            if "surrogate" not in {column[1] for column in columns}:  # an older release made it
                connection.execute("ALTER TABLE documents ADD COLUMN surrogate TEXT")
            connection.execute("COMMIT")
            self._connection, self._process = connection, os.getpid()
        return self._connection

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Hold the lock; changes inside become visible together, or not at all.

        Raises:
            StoreFullError: The disk is full.
            StoreError: The database cannot be written for another reason.
        """
        with self._lock:
            self.run("BEGIN IMMEDIATE")
            try:
                yield
                self.run("COMMIT")
            except BaseException:
                with contextlib.suppress(StoreError):  # SQLite may have rolled back by itself
                    self.run("ROLLBACK")
                raise

    def run(self, statement: str, parameters: tuple[Any, ...] = ()) -> tuple[list[Any], int]:
        """Run one statement.

        Returns:
            Its rows, and the number of rows that it changed.

        Raises:
            StoreFullError: The disk is full.
            StoreError: The database failed for another reason.
        """
        try:
            with self._lock:
                cursor = self._open().execute(statement, parameters)
                return cursor.fetchall(), cursor.rowcount
        except sqlite3.Error as error:
            if "disk is full" in str(error):
                raise StoreFullError(
                    f"the disk under {self._path} is full: the index could not be written. "
                    "Nothing was changed; make room there."
                ) from error
            raise StoreError(
                f"the index {self._path} failed: {error}. Open the store again; an index that is "
                "damaged is then made anew from the files."
            ) from error

    def find(self, key: str) -> Entry | None:
        """Return the entry of a key; None if there is none."""
        return next(iter(self._select("WHERE key = ?", key)), None)

    def entries(self) -> list[Entry]:
        """Return all entries, least recently used first."""
        return self._select("ORDER BY used")

    def behind(self, prefix_key: str) -> list[Entry]:
        """Return the entries of documents that were encoded behind a prefix."""
        return self._select("WHERE prefix_key = ?", prefix_key)

    def add(self, entry: Entry) -> None:
        """Add an entry as the one used last, or replace the one under its key."""
        values = dataclasses.astuple(entry)[:7]
        self.run(
            f"INSERT OR REPLACE INTO documents ({_COLUMNS}) "
            f"VALUES (?, ?, ?, ?, ?, ?, ?, {_NEXT}, ?, ?)",
            (*values, time.time(), entry.surrogate),
        )

    def touch(self, keys: Collection[str]) -> None:
        """Mark entries as used, in order."""
        for key in keys:
            self.run(f"UPDATE documents SET used = {_NEXT} WHERE key = ?", (key,))

    def note_use(self, keys: Collection[str]) -> None:
        """Mark entries as used; if another process is writing, keep them for a later call."""
        with self._lock:
            self._noted += keys
            connection = self._open()
            connection.execute("PRAGMA busy_timeout = 0")
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                del self._noted[:-_MAX_NOTED]
                return
            finally:
                connection.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
            noted, self._noted = self._noted, []
            try:
                self.touch(noted)
                self.run("COMMIT")
            except StoreError:  # a read must not fail because its use cannot be recorded
                with contextlib.suppress(StoreError):
                    self.run("ROLLBACK")

    def remove(self, key: str) -> None:
        """Remove an entry, if it is there."""
        self.run("DELETE FROM documents WHERE key = ?", (key,))

    def pin(self, key: str, pinned: bool) -> bool:
        """Set whether an entry may be evicted.

        Returns:
            True if there is one.
        """
        return self.run("UPDATE documents SET pinned = ? WHERE key = ?", (pinned, key))[1] > 0

    def totals(self) -> tuple[int, int, int, int]:
        """Return the numbers of entries, tokens, bytes and pinned entries."""
        rows, _ = self.run(
            "SELECT count(*), coalesce(sum(tokens), 0), coalesce(sum(nbytes), 0), "
            "coalesce(sum(pinned), 0) FROM documents"
        )
        documents, tokens, nbytes, pinned = rows[0]
        return documents, tokens, nbytes, pinned

    def oldest(self, keep: Collection[str]) -> Entry | None:
        """Return the oldest entry that is not pinned, no other's prefix, and not in ``keep``."""
        marks = ", ".join("?" * len(keep))
        found = self._select(
            f"WHERE pinned = 0 AND key NOT IN ({marks}) AND NOT EXISTS "
            "(SELECT 1 FROM documents AS other WHERE other.prefix_key = documents.key) "
            "ORDER BY used LIMIT 1",
            *keep,
        )
        return next(iter(found), None)

    def close(self) -> None:
        """Close the connection; the next use opens another."""
        with self._lock:
            if self._connection is not None and self._process == os.getpid():
                self._connection.close()
            self._connection = None

    def _select(self, rest: str, *parameters: str) -> list[Entry]:
        rows, _ = self.run(f"SELECT {_COLUMNS} FROM documents {rest}", parameters)
        return [Entry(**dict(zip(_COLUMNS.split(", "), row, strict=True))) for row in rows]


def _until_free(connection: sqlite3.Connection, statement: str) -> None:
    """Run a statement that may meet another process's lock before the timeout applies."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute(statement)
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.005)
