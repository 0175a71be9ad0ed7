"""Writes of a disk store: data first, then the index; room is made under one lock."""

from __future__ import annotations

import dataclasses
from typing import NoReturn

from ifkv.documents.cache import DocumentCache
from ifkv.errors import StoreFullError
from ifkv.store.codecs import Codec, resolve_codec
from ifkv.store.document_file import DocumentFile
from ifkv.store.folder import Folder
from ifkv.store.index import Entry, Index
from ifkv.store.keys import key_of


class DiskWriter:
    """Writer of a folder's documents.

    Attributes:
        evictions: Number of entries evicted to stay within the budget.
        max_bytes: The budget, or None.

    Args:
        folder: The files.
        index: Their index.
        codec: The codec of new entries.
        max_bytes: The budget, or None.
    """

    def __init__(self, folder: Folder, index: Index, codec: Codec, max_bytes: int | None):
        self._folder = folder
        self._index = index
        self._codec = codec
        self.max_bytes = max_bytes
        self.evictions = 0

    def find(self, key: str) -> Entry | None:
        """Return the entry of a key if this codec may see it and its file exists, else None."""
        entry = self._index.find(key)
        if entry is None or entry.codec not in ("exact", self._codec.name):
            return None
        return entry if self._folder.file_of(key).is_file() else None

    def put(
        self, document: DocumentCache, prefix_key: str | None, *, replace: bool = False
    ) -> str | None:
        """Store one document behind a prefix that is stored already.

        Args:
            document: The document.
            prefix_key: The prefix's key; the prefix is not evicted for the document.
            replace: Replace an existing entry; its pin and codec are kept.

        Returns:
            Its key; None if the prefix is missing.

        Raises:
            StoreFullError: The budget or the disk has no room.
            StoreError: It cannot be written for another reason.
            InvalidInputError: The codec cannot hold it.
        """
        key = key_of(document)
        used = [key] if prefix_key is None else [prefix_key, key]
        before = self.find(key)
        if before is not None and not replace:
            with self._index.transaction():
                self._index.touch(used)
            return key
        # A store in eight bits sees exact entries of other stores, and leaves them exact.
        codec = self._codec if before is None else resolve_codec(before.codec)
        file = DocumentFile(document, codec)
        if self.max_bytes is not None and file.nbytes > self.max_bytes:
            self._refuse(file.nbytes, file.nbytes - self.max_bytes)
        entry = Entry(
            key,
            prefix_key,
            document.fingerprint,
            codec.name,
            len(document),
            file.nbytes,
            surrogate=None if document.surrogate is None else document.surrogate.identity,
        )
        with self._folder.written(file) as temporary, self._index.transaction():
            now = self.find(key)
            if now is not None and not replace:
                return key  # another process was faster
            if prefix_key is not None and self.find(prefix_key) is None:
                return None
            self._index.add(dataclasses.replace(entry, pinned=now is not None and now.pinned))
            self._index.touch(used)
            victims = self._choose_victims(self.max_bytes, used, file.nbytes)
            with self._folder.full_disk_named(file.nbytes):
                self._folder.publish(temporary, key)
            self._discard(victims)
        return key

    def delete(self, key: str) -> bool:
        """Delete an entry and the documents behind it.

        Returns:
            True if there was one.
        """
        with self._index.transaction():
            if self._index.find(key) is None:
                return False
            for name in [*(entry.key for entry in self._index.behind(key)), key]:
                self._index.remove(name)
                self._folder.discard(name)
        return True

    def prune(self, budget: int | None) -> int:
        """Evict down to a budget; remove leftovers of dead writers and the quarantine.

        Returns:
            The number of evicted entries.

        Raises:
            StoreFullError: Pinned entries alone exceed it; nothing was evicted.
        """
        with self._index.transaction():
            victims = self._choose_victims(budget, [], 0)
            self._discard(victims)
            self._folder.clean_temporary()
            self._folder.clear_quarantine()
        return len(victims)

    def _choose_victims(self, budget: int | None, keep: list[str], needed: int) -> list[str]:
        """Remove entries from the index until the rest fits; their files stay."""
        victims: list[str] = []
        if budget is None:
            return victims
        excess = self._index.totals()[2] - budget
        while excess > 0:
            oldest = self._index.oldest(keep)
            if oldest is None:
                self._refuse(needed, excess)
            self._index.remove(oldest.key)
            victims.append(oldest.key)
            excess -= oldest.nbytes
        return victims

    def _discard(self, victims: list[str]) -> None:
        for key in victims:
            self._folder.discard(key)
        self.evictions += len(victims)

    def _refuse(self, needed: int, excess: int) -> NoReturn:
        raise StoreFullError(
            f"a document of {needed} bytes does not fit into the store's budget: {excess} bytes "
            "too many, all that can be evicted counted. Raise max_bytes, unpin entries, or split "
            "the document."
        )
