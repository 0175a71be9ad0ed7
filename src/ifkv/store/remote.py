"""Store behind a URL: S3, GCS, NFS and all else that fsspec reaches."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from torch import Tensor

from ifkv.documents.cache import DocumentCache
from ifkv.errors import (
    DocumentNotFoundError,
    StoreCorruptionError,
    StoreUnavailableError,
)
from ifkv.store.codecs import resolve_codec
from ifkv.store.document_file import DocumentFile
from ifkv.store.document_reader import DocumentReader
from ifkv.store.far_files import FarFiles
from ifkv.store.folder import SUFFIX
from ifkv.store.format import FormatError
from ifkv.store.keys import (
    KEY_PATTERN,
    check_document,
    check_key,
    document_key,
    key_for,
    key_of,
)
from ifkv.store.lazy import StoredDocument
from ifkv.store.protocol import StoreStats
from ifkv.store.ranges import ObjectRanges
from ifkv.store.source_objects import SourceObjects
from ifkv.utils.copying import Uncopied

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.documents.source import Source
    from ifkv.documents.surrogate import SurrogateContext, Texts

T = TypeVar("T")

# How many times bytes are requested that do not match their checksums: a network may damage them.
_READS = 3


class RemoteStore(Uncopied):
    """Store at a URL, one object for each document, without an index or a budget.

    All bytes read are checked against their checksums. Put a disk store before it, so that each
    document is fetched once: ``TieredStore(DiskStore(...), RemoteStore(...))``. ``in`` looks only
    for the document's object, not its prefix's. Deleting a prefix leaves the documents behind it,
    which can be read again when the prefix is put again.

    No object is moved or removed because of damaged bytes, since the network may have damaged them.
    Bytes that do not match their checksums are requested again; after three times they are a
    ``StoreCorruptionError``. This store object then treats the document as missing, so that the
    next put replaces it. Errors of the file system, and its silence, are a
    ``StoreUnavailableError``.

    Args:
        url: Such as ``"s3://bucket/folder"`` or ``"file:///mnt/nfs/folder"``; the bucket must
            exist.
        codec: ``"exact"``, ``"fp8"`` or ``"int8"``.
        deadline: Seconds after which a request has failed, repetitions by the file system
            included; plus one second for each MiB that it moves.
        **storage_options: Options of fsspec: credentials, endpoints, and so on.

    Raises:
        InvalidInputError: ``codec`` is unknown, or ``deadline`` is not positive.
        StoreNotFoundError: fsspec, or the package it needs for this kind of URL, is not installed;
            or there is no such bucket.
    """

    _instead = "open the place once more, in another process, too: RemoteStore(url)"

    def __init__(
        self, url: str, *, codec: str = "exact", deadline: float = 30.0, **storage_options: Any
    ):
        self.codec = resolve_codec(codec)
        self.url = url
        self._files = FarFiles(url, deadline, storage_options)
        self._root = self._files.root
        self._sources = SourceObjects(self._files, f"{self._root}/sources")
        self._prefixes: weakref.WeakValueDictionary[str, DocumentCache] = (
            weakref.WeakValueDictionary()
        )
        self._lock = threading.Lock()
        self._distrusted: set[str] = set()
        self._hits = self._misses = self._corrupt = 0

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
        """Upload a document and its prefix, unless they exist.

        Args:
            document: The document.
            replace: Upload the document, not its prefix, even if it exists.

        Raises:
            StoreUnavailableError: The upload failed.
            StoreError: The URL is read-only.
            InvalidInputError: The document contradicts itself, or the codec cannot hold it.
        """
        check_document(document)
        if document.prefix is not None:
            self._put_one(document.prefix, replace=False)
        return self._put_one(document, replace=replace)

    def _put_one(self, document: DocumentCache, *, replace: bool) -> str:
        key = key_of(document)
        if replace or key not in self:
            self._files.write(self._path(key), DocumentFile(document, self.codec).tobytes())
            self._forget(key)
        return key

    def _forget(self, key: str) -> None:
        """Forget a shared or distrusted object, so that the next get fetches it."""
        with self._lock:
            self._prefixes.pop(key, None)
            self._distrusted.discard(key)

    def get(self, key: str, *, lazy: bool = False) -> DocumentCache:
        """Return a document: whole, or ``lazy``: its head now, its rows when they are used.

        One request fetches the head, and all of a document of up to 256 KiB; the rest comes in
        pieces of 8 MiB, several at once.

        Raises:
            DocumentNotFoundError: It or its prefix is missing.
            StoreCorruptionError: It cannot be trusted.
            StoreUnavailableError: It cannot be read now.
        """
        with self._lock:
            shared = self._prefixes.get(check_key(key))
        if shared is None or key not in self:
            shared = self._read(key, lazy=lazy)
        self._hits += 1
        return shared

    def _read(self, key: str, *, lazy: bool) -> DocumentCache:
        source, reader = self._open(key)
        prefix = self._prefix_of(reader)

        def read_layer(layer: int, out: Tensor) -> None:
            def read() -> None:
                reader.read_layer(layer, verify=True, out=out)

            try:
                self._sure(key, read, source.read_anew)
            except FileNotFoundError as error:
                reason = "it was removed while it was being read"
                raise StoreUnavailableError(
                    f"the stored document {key} at {self.url} cannot be read: {reason}.",
                    key=key,
                    reason=reason,
                ) from error

        stored = StoredDocument(reader, read_layer, prefix, distant=True)
        if lazy:
            return stored
        source.fetch_all()
        document = stored.whole()
        if prefix is None:
            with self._lock:
                document = self._prefixes.setdefault(key, document)
        return document

    def _open(self, key: str) -> tuple[ObjectRanges, DocumentReader]:
        path = self._path(key)

        def read() -> tuple[ObjectRanges, DocumentReader]:
            source = ObjectRanges(self._files, path)
            try:
                reader = DocumentReader(source, key)
            except FormatError:
                source.check_arrived()
                raise
            source.size = reader.nbytes
            return source, reader

        try:
            return self._sure(key, read, lambda: None)
        except FileNotFoundError:
            self._misses += 1
            raise DocumentNotFoundError(
                f"no document {key} at {self.url}; prefill it and put it."
            ) from None

    def _prefix_of(self, reader: DocumentReader) -> DocumentCache | None:
        if len(reader.prefix_ids) == 0:
            return None
        behind = reader.prefix_ids[:0]
        key = document_key(reader.header.fingerprint, behind, reader.prefix_ids)
        with self._lock:
            shared = self._prefixes.get(key)
        return self._read(key, lazy=False) if shared is None else shared

    def touch(self, key: str) -> None:
        """Do nothing: without a budget there is no order of use."""

    def __contains__(self, key: object) -> bool:
        try:
            name = check_key(key)
        except DocumentNotFoundError:
            return False
        return name not in self._distrusted and self._files.exists(self._path(name))

    def __len__(self) -> int:
        return len(self._sizes())

    def delete(self, key: str) -> None:
        """Delete a document's object."""
        try:
            self._files.remove(self._path(check_key(key)))
        except FileNotFoundError:
            raise DocumentNotFoundError(f"no document {key} to delete at {self.url}.") from None
        self._forget(key)

    def add_sources(self, sources: Sequence[tuple[str, Source]]) -> None:
        """Store the sources of documents; see `SourceKeeper`."""
        self._sources.add(sources)

    def sources(self, keys: Sequence[str] | None = None) -> dict[str, list[Source]]:
        """Return the sources of documents by key; see `SourceKeeper`."""
        return self._sources.find(keys)

    def keys(self) -> Iterator[str]:
        """Return the keys of all entries, in alphabetical order."""
        return iter(sorted(self._sizes()))

    def stats(self) -> StoreStats:
        """Return the store's numbers; tokens, which only the objects' headers hold, are 0."""
        sizes = self._sizes()
        return StoreStats(
            documents=len(sizes),
            nbytes=sum(sizes.values()),
            hits=self._hits,
            misses=self._misses,
            corrupt=self._corrupt,
        )

    def _sizes(self) -> dict[str, int]:
        found = self._files.sizes(f"{self._root}/documents")
        names = {path.rpartition("/")[2].removesuffix(SUFFIX): size for path, size in found.items()}
        return {name: size for name, size in names.items() if KEY_PATTERN.fullmatch(name)}

    def _path(self, key: str) -> str:
        return f"{self._root}/documents/{key[:2]}/{key}{SUFFIX}"

    def _sure(self, key: str, read: Callable[[], T], again: Callable[[], None]) -> T:
        """Read from an object until the bytes match their checksums, up to three times.

        Args:
            key: The document's key.
            read: Reads and checks; raises ``FormatError``.
            again: Called before each further read.

        Raises:
            StoreCorruptionError: The bytes were damaged each time.
            StoreUnavailableError: They could not be read.
        """
        for left in reversed(range(_READS)):
            try:
                return read()
            except FormatError as error:
                if left == 0:
                    self._distrust(key, error)
                again()
            except StoreUnavailableError as error:
                error.key = key
                raise
        raise AssertionError("a loop that returns or raises")

    def _distrust(self, key: str, error: FormatError) -> NoReturn:
        """Treat a document as missing until it is put again; its object is not changed."""
        with self._lock:
            self._corrupt += 1
            self._distrusted.add(key)
        raise StoreCorruptionError(
            f"the stored document {key} at {self.url} cannot be trusted: {error}, each of the "
            f"{_READS} times that it was read. Prefill it again and put it, which replaces it.",
            key=key,
            reason=str(error),
        ) from error
