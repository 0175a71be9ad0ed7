"""Store on disk: one file for each document, an index beside them, a byte budget over all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ifkv.documents.cache import DocumentCache
from ifkv.errors import (
    DocumentNotFoundError,
    DocumentUnreadableError,
    InvalidInputError,
    StoreFullError,
)
from ifkv.store.codecs import resolve_codec
from ifkv.store.disk_read import DiskReader, Verify
from ifkv.store.disk_write import DiskWriter
from ifkv.store.folder import Folder
from ifkv.store.index import Entry
from ifkv.store.keys import check_document, check_key, key_for, prefix_key_of
from ifkv.store.protocol import StoreStats
from ifkv.store.recovery import open_index
from ifkv.store.source_table import SourceTable
from ifkv.utils.copying import Uncopied

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.documents.source import Source
    from ifkv.documents.surrogate import SurrogateContext, Texts

# How many times a put starts again because another process has evicted its prefix meanwhile.
_ATTEMPTS = 20


class DiskStore(Uncopied):
    """Store in a folder, which several threads and processes may use at once.

    Args:
        path: The folder, on a local disk; made if it does not exist.
        max_bytes: Bytes of files to hold at most; beyond it, the least recently used are evicted.
            None for no limit. Each process enforces its budget when it puts.
        verify: When rows are checked against their checksums: ``"always"`` when they are read,
            the ``"first"`` time this object reads them, or ``"never"``. Header, tokens and key
            are always checked.
        codec: ``"exact"``, or ``"fp8"`` or ``"int8"`` to store rows in eight bits. Entries of
            another codec in the same folder are invisible, except exact ones.

    Raises:
        StoreError: The folder cannot be used.
        InvalidInputError: An option is unknown.

    Examples:
        >>> import ifkv, tempfile
        >>> from ifkv.store import DiskStore
        >>> from ifkv.testing import tiny_model
        >>> model = tiny_model("llama")
        >>> with ifkv.patch(model), tempfile.TemporaryDirectory() as folder:
        ...     with DiskStore(folder) as store:
        ...         key = store.put(ifkv.prefill_documents(model, [[5, 6, 7]], prefix=[1])[0])
        ...     with DiskStore(folder) as store:
        ...         store.key_for(model, [5, 6, 7], [1]) in store, store.get(key).token_ids
        (True, tensor([5, 6, 7]))
    """

    _instead = "open the folder once more, in another process, too: DiskStore(path)"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_bytes: int | None = None,
        verify: Verify = "first",
        codec: str = "exact",
    ):
        if max_bytes is not None and max_bytes < 0:
            raise InvalidInputError(f"max_bytes is {max_bytes}; give None or at least 0.")
        if verify not in ("always", "first", "never"):
            raise InvalidInputError(
                f"verify is {verify!r}; choose 'always', 'first' (use) or 'never'."
            )
        self.path = Path(path).expanduser().absolute()
        self.codec = resolve_codec(codec)
        self.folder = Folder(self.path)
        self.index = open_index(self.folder)
        self._writer = DiskWriter(self.folder, self.index, self.codec, max_bytes)
        self._reader = DiskReader(self.folder, self.index, verify)
        self._sources = SourceTable(self.index)
        self._hits = self._misses = 0

    @property
    def max_bytes(self) -> int | None:
        """Return the byte budget, which the next put enforces; None for no limit."""
        return self._writer.max_bytes

    @max_bytes.setter
    def max_bytes(self, max_bytes: int | None) -> None:
        self._writer.max_bytes = max_bytes

    def key_for(
        self,
        model: PreTrainedModel,
        token_ids: Sequence[int] | Tensor,
        prefix: Sequence[int] | Tensor | DocumentCache = (),
        surrogate: SurrogateContext | Texts | None = None,
    ) -> str:
        """Return the key of a document; see `DocumentStore`."""
        return key_for(model, token_ids, prefix, surrogate)

    def put(self, document: DocumentCache, *, replace: bool = False) -> str:
        """Store a document and its prefix, durably when this returns.

        Args:
            document: The document.
            replace: Replace the document under its key.

        Raises:
            StoreFullError: The budget or the disk has no room; no entry was changed, except that
                the prefix may have been stored.
            StoreError: It cannot be written for another reason.
            InvalidInputError: The document contradicts itself, or the codec cannot hold it.
        """
        check_document(document)
        prefix_key = prefix_key_of(document)
        for _ in range(_ATTEMPTS):
            if document.prefix is not None:
                self._writer.put(document.prefix, None)
            key = self._writer.put(document, prefix_key, replace=replace)
            if key is not None:
                if replace:
                    self._reader.forget(key)
                return key
        raise StoreFullError(
            f"others have evicted the document's prefix {_ATTEMPTS} times while it was being put; "
            f"the budget {self.max_bytes} is too small for all who use {self.path}."
        )

    def get(self, key: str, *, lazy: bool = False) -> DocumentCache:
        """Return a document in host memory, or ``lazy``: read layer by layer when used.

        Raises:
            DocumentNotFoundError: It or its prefix is missing.
            StoreCorruptionError: It cannot be trusted, and has been moved to quarantine.
        """
        entry = self._writer.find(check_key(key))
        if entry is None:
            self._misses += 1
            raise DocumentNotFoundError(
                f"no document {key} in the store in {self.path}; prefill it and put it."
            )
        try:
            document = self._reader.read(key, lazy=lazy)
        except DocumentNotFoundError:
            self._misses += 1
            raise
        self.index.note_use([name for name in (entry.prefix_key, key) if name])
        self._hits += 1
        return document

    def touch(self, key: str) -> None:
        """Record a use of a document that was read from a faster tier."""
        entry = self.index.find(check_key(key))
        if entry is not None:
            self.index.note_use([name for name in (entry.prefix_key, key) if name])

    def __contains__(self, key: object) -> bool:
        try:
            entry = self._writer.find(check_key(key))
        except DocumentNotFoundError:
            return False
        return entry is not None and (entry.prefix_key is None or entry.prefix_key in self)

    def __len__(self) -> int:
        return self.index.totals()[0]

    def delete(self, key: str) -> None:
        """Delete an entry, and the documents behind it if it is a prefix."""
        if not self._writer.delete(check_key(key)):
            raise DocumentNotFoundError(f"no document {key} to delete in {self.path}.")
        self._reader.forget(key)
        with self.index.transaction():
            self._sources.forget()

    def pin(self, key: str, pinned: bool = True) -> None:
        """Protect an entry (and so its prefix) from eviction, or end the protection.

        Raises:
            DocumentNotFoundError: There is no such entry.
        """
        with self.index.transaction():
            if not self.index.pin(check_key(key), pinned):
                raise DocumentNotFoundError(f"no document {key} to pin in {self.path}.")

    def keys(self) -> Iterator[str]:
        """Return the keys of all entries, least recently used first."""
        return iter([entry.key for entry in self.entries()])

    def entries(self) -> list[Entry]:
        """Return the index's entries, least recently used first."""
        return self.index.entries()

    def add_sources(self, sources: Sequence[tuple[str, Source]]) -> None:
        """Store the sources of documents; see `SourceKeeper`."""
        self._sources.add(sources)

    def sources(self, keys: Sequence[str] | None = None) -> dict[str, list[Source]]:
        """Return the sources of documents by key; see `SourceKeeper`."""
        return self._sources.find(keys)

    def stats(self) -> StoreStats:
        """Return the store's numbers."""
        documents, tokens, nbytes, pinned = self.index.totals()
        return StoreStats(
            documents,
            tokens,
            nbytes,
            self.max_bytes,
            pinned,
            self._hits,
            self._misses,
            self._writer.evictions,
            self._reader.corrupt,
        )

    def verify(self, keys: Sequence[str] | None = None) -> list[DocumentUnreadableError]:
        """Check every byte of entries; corrupt ones are moved to quarantine.

        Args:
            keys: The entries; all if None.

        Returns:
            The errors found, each a `StoreCorruptionError`, or a `StoreUnavailableError` for a
            file that could not be read.
        """
        found: list[DocumentUnreadableError] = []
        for key in self.keys() if keys is None else [check_key(key) for key in keys]:
            try:
                self._reader.check(key)
            except DocumentUnreadableError as error:
                found.append(error)
            except DocumentNotFoundError:
                continue  # evicted meanwhile
        return found

    def prune(self, max_bytes: int | None = None) -> int:
        """Evict down to a budget; remove leftovers of dead writers and the quarantine.

        Args:
            max_bytes: The budget; the store's own if None.

        Returns:
            The number of evicted entries.

        Raises:
            StoreFullError: Pinned entries alone exceed it; nothing was evicted.
        """
        evicted = self._writer.prune(self.max_bytes if max_bytes is None else max_bytes)
        with self.index.transaction():
            self._sources.forget()
        return evicted

    def close(self) -> None:
        """Close the index; lazily read documents stay readable."""
        self.index.close()

    def __enter__(self) -> DiskStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
