"""Documents behind a URL: S3, GCS, NFS and whatever else fsspec reaches."""

from __future__ import annotations

import contextlib
import importlib
import secrets
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from ifkv.copying import Uncopied
from ifkv.documents import DocumentCache
from ifkv.errors import DocumentNotFoundError, StoreCorruptionError, StoreError
from ifkv.store.codecs import resolve_codec
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
from ifkv.store.reading import BytesSource, DocumentReader, Source
from ifkv.store.writing import DocumentFile

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Object stores, where an upload appears whole or not at all and a rename is a copy.
_ATOMIC = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "memory"}
# Fetched at once when a file is opened: its header, in one request.
_HEAD_BYTES = 2**18


class RemoteStore(Uncopied):
    """Documents at a URL, one object each, without an index and without a budget.

    Everything read is checked against its checksums. Put a disk store before it, so that each
    document is fetched once: ``TieredStore(DiskStore(...), RemoteStore(...))``. ``in`` looks for
    the document's own object only, and deleting a prefix leaves the documents behind it, which
    come back when the prefix is put again.

    Args:
        url: Such as ``"s3://bucket/folder"`` or ``"file:///mnt/nfs/folder"``.
        codec: ``"exact"``, ``"fp8"`` or ``"int8"``.
        **storage_options: For fsspec: credentials, endpoints, and so on.

    Raises:
        StoreError: fsspec, or the package it needs for this kind of URL, is not installed.
    """

    _instead = "open the place once more, in another process, too: RemoteStore(url)"

    def __init__(self, url: str, *, codec: str = "exact", **storage_options: Any):
        try:
            fsspec: Any = importlib.import_module("fsspec.core")
            self._files, root = fsspec.url_to_fs(url, **storage_options)
        except (ImportError, ValueError) as error:
            raise StoreError(
                f"the store {url} cannot be opened: {error}. Run pip install -e '.[remote]' in "
                "the clone of ifkv, and install what fsspec needs for this kind of URL (s3fs for "
                "s3://, gcsfs for gs://)."
            ) from error
        self.url = url
        self._root = root.rstrip("/")
        self.codec = resolve_codec(codec)
        protocol = self._files.protocol
        names = {protocol} if isinstance(protocol, str) else set(protocol)
        self._atomic = bool(names & _ATOMIC)
        self._prefixes: weakref.WeakValueDictionary[str, DocumentCache] = (
            weakref.WeakValueDictionary()
        )
        self._lock = threading.Lock()
        self._hits = self._misses = self._corrupt = 0

    def key_for(
        self,
        model: PreTrainedModel,
        token_ids: Sequence[int] | Tensor,
        prefix: Sequence[int] | Tensor | DocumentCache = (),
    ) -> str:
        """The key of a document; see :class:`ifkv.store.DocumentStore`."""
        return key_for(model, token_ids, prefix)

    def put(self, document: DocumentCache, *, replace: bool = False) -> str:
        """Upload a document and its prefix, unless they are there.

        Args:
            document: The document.
            replace: Upload the document, not its prefix, even so.

        Raises:
            StoreError: The upload failed.
            InvalidInputError: The document contradicts itself, or the codec cannot hold it.
        """
        check_document(document)
        for part in (document.prefix, document):
            if part is not None and ((replace and part is document) or key_of(part) not in self):
                self._upload(key_of(part), DocumentFile(part, self.codec).tobytes())
        key = key_of(document)
        if replace:
            self._forget(key)
        return key

    def _forget(self, key: str) -> None:
        """Fetch an object anew the next time, whoever still holds what was fetched before."""
        with self._lock:
            self._prefixes.pop(key, None)

    def _upload(self, key: str, data: bytes) -> None:
        target = self._path(key)
        written = target if self._atomic else f"{self._root}/tmp/{secrets.token_hex(8)}.tmp"
        try:
            for path in {target, written}:
                self._files.makedirs(self._files._parent(path), exist_ok=True)
            self._files.pipe_file(written, data)
            if written != target:
                self._files.mv(written, target)
        except Exception as error:  # each file system has exceptions of its own
            raise StoreError(f"uploading {key} to {self.url} failed: {error}") from error

    def get(self, key: str, *, lazy: bool = False) -> DocumentCache:
        """The document under a key: fetched in one request, or ``lazy``, in one per layer."""
        check_key(key)
        with self._lock:
            shared = self._prefixes.get(key)
        if shared is not None and key in self:
            self._hits += 1
            return shared
        path = self._path(key)
        try:
            if lazy:
                source: Source = _RangeSource(self._files, path)
            else:
                source = BytesSource(self._files.cat_file(path))
        except FileNotFoundError:
            self._misses += 1
            raise DocumentNotFoundError(
                f"no document {key} at {self.url}; prefill it and put it."
            ) from None
        try:
            reader = DocumentReader(source, key)
        except (FormatError, OSError) as error:
            self._distrust(key, error)
        prefix = None
        if len(reader.prefix_ids):
            behind = reader.prefix_ids[:0]
            prefix = self.get(document_key(reader.header.fingerprint, behind, reader.prefix_ids))

        def read_layer(layer: int, out: Tensor) -> None:
            try:
                reader.read_layer(layer, verify=True, out=out)
            except (FormatError, OSError) as error:
                self._distrust(key, error)

        stored = StoredDocument(reader, read_layer, prefix)
        document = stored if lazy else stored.whole()
        if not lazy and prefix is None:
            with self._lock:
                document = self._prefixes.setdefault(key, document)
        self._hits += 1
        return document

    def touch(self, key: str) -> None:
        """Nothing: there is no budget, so no order of use."""

    def __contains__(self, key: object) -> bool:
        try:
            return bool(self._files.exists(self._path(check_key(key))))
        except DocumentNotFoundError:
            return False

    def __len__(self) -> int:
        return len(self._sizes())

    def delete(self, key: str) -> None:
        """Remove a document's object."""
        try:
            self._files.rm_file(self._path(check_key(key)))
        except FileNotFoundError:
            raise DocumentNotFoundError(f"no document {key} to delete at {self.url}.") from None
        self._forget(key)

    def keys(self) -> Iterator[str]:
        """Keys of all entries, in their own order."""
        return iter(sorted(self._sizes()))

    def stats(self) -> StoreStats:
        """What is there; tokens are not known without reading every object, and given as 0."""
        sizes = self._sizes()
        return StoreStats(
            documents=len(sizes),
            nbytes=sum(sizes.values()),
            hits=self._hits,
            misses=self._misses,
            corrupt=self._corrupt,
        )

    def _sizes(self) -> dict[str, int]:
        self._files.invalidate_cache()
        found = self._files.find(f"{self._root}/documents", detail=True)
        names = {path.rpartition("/")[2].removesuffix(SUFFIX): info for path, info in found.items()}
        return {name: info["size"] for name, info in names.items() if KEY_PATTERN.fullmatch(name)}

    def _path(self, key: str) -> str:
        return f"{self._root}/documents/{key[:2]}/{key}{SUFFIX}"

    def _distrust(self, key: str, error: Exception) -> NoReturn:
        """Set an object aside, if we may, and say so."""
        self._corrupt += 1
        with contextlib.suppress(Exception):
            target = f"{self._root}/quarantine/{secrets.token_hex(4)}-{key}{SUFFIX}"
            self._files.makedirs(self._files._parent(target), exist_ok=True)
            self._files.mv(self._path(key), target)
        raise StoreCorruptionError(
            f"the stored document {key} at {self.url} cannot be trusted: {error}. Prefill it again "
            "and put it.",
            key=key,
            reason=str(error),
        ) from error


class _RangeSource:
    """An object read by ranges; its beginning is fetched when it is opened."""

    def __init__(self, files: Any, path: str):
        self._files = files
        self._path = path
        self.size = int(files.info(path)["size"])
        self._head = memoryview(files.cat_file(path, 0, min(self.size, _HEAD_BYTES)))

    def read_into(self, offset: int, target: memoryview) -> None:
        end = offset + target.nbytes
        if end <= self._head.nbytes:
            target[:] = self._head[offset:end]
            return
        piece = memoryview(self._files.cat_file(self._path, offset, end))
        if piece.nbytes != target.nbytes:
            raise FormatError(f"it ends at byte {offset + piece.nbytes}")
        target[:] = piece
