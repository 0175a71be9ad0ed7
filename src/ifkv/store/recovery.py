"""Recovery of a disk store after a crash, a lost index or foreign files."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

from ifkv.errors import StoreError
from ifkv.store.folder import Folder
from ifkv.store.index import Entry, Index
from ifkv.store.keys import document_key

if TYPE_CHECKING:
    from ifkv.store.document_reader import FileSource

INDEX_NAME = "index.sqlite3"


def open_index(folder: Folder) -> Index:
    """Open a folder's index and make index and files agree.

    Temporary files of dead writers are removed. A complete file without an entry (its writer died
    just before the entry, or the index was lost) gets one; its rows are checked when they are first
    used, like all rows. Files that are no documents are moved to quarantine. Entries without a file
    are removed.

    Args:
        folder: The folder.

    Returns:
        The index.

    Raises:
        StoreError: The index can be neither opened nor made anew.
    """
    path = folder.path / INDEX_NAME
    try:
        try:
            index = Index(path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise  # locked, or not writable: not damaged
            # A damaged index can be rebuilt from the files, except uses, pins and sources.
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    path.with_name(INDEX_NAME + suffix).rename(
                        folder.quarantined / f"damaged-{INDEX_NAME}{suffix}"
                    )
            index = Index(path)
        with index.transaction():
            folder.clean_temporary()
            _reconcile(folder, index)
    except sqlite3.Error as error:
        raise StoreError(f"the index {path} cannot be used: {error}.") from error
    return index


def _reconcile(folder: Folder, index: Index) -> None:
    entries = {entry.key for entry in index.entries()}
    found = list(folder.files())
    present = {key for key, _ in found if key in entries}
    strange = [(key, path) for key, path in found if key not in entries]
    if strange:
        present |= _taken_up(folder, index, strange)
    for key in entries - present:
        index.remove(key)


def _taken_up(folder: Folder, index: Index, strange: list[tuple[str | None, Path]]) -> set[str]:
    """Add files without an entry to the index, or quarantine them; return the added keys."""
    from ifkv.store.document_reader import FileSource
    from ifkv.store.format import FormatError

    taken = set()
    for key, path in strange:
        try:
            if key is None:
                raise FormatError("it does not belong among the documents")
            index.add(describe(key, FileSource(path)))
            taken.add(key)
        except FormatError as error:
            folder.quarantine(path, str(error))
        except OSError:  # says nothing about the file: try again at the next open
            continue
    return taken


def describe(key: str, source: FileSource) -> Entry:
    """Return the index entry of a file, after checking all of it but its rows.

    Raises:
        FormatError: It is not a document of this key.
        OSError: It cannot be read.
    """
    from ifkv.store.document_reader import DocumentReader

    try:
        reader = DocumentReader(source, key)
    finally:
        source.close()
    header, prefix_key = reader.header, None
    if len(reader.prefix_ids):
        prefix_key = document_key(header.fingerprint, reader.prefix_ids[:0], reader.prefix_ids)
    return Entry(
        key,
        prefix_key,
        header.fingerprint,
        header.codec.name,
        len(reader.token_ids),
        source.size,
        surrogate=None if reader.surrogate is None else reader.surrogate.identity,
    )
