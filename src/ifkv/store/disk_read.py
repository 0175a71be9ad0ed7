"""Reads of a disk store: open, check and share entries; move corrupt files to quarantine."""

from __future__ import annotations

import threading
import weakref
from typing import Literal, NoReturn

from torch import Tensor

from ifkv.documents.cache import DocumentCache
from ifkv.errors import DocumentNotFoundError, StoreCorruptionError, StoreUnavailableError
from ifkv.store.document_reader import DocumentReader, FileSource
from ifkv.store.folder import Folder
from ifkv.store.format import FormatError
from ifkv.store.index import Index
from ifkv.store.keys import document_key
from ifkv.store.lazy import StoredDocument

Verify = Literal["always", "first", "never"]


class DiskReader:
    """Reader of a folder's documents.

    Attributes:
        corrupt: Number of entries moved to quarantine.

    Args:
        folder: The files.
        index: Their index.
        verify: When rows are checked.
    """

    def __init__(self, folder: Folder, index: Index, verify: Verify):
        self._folder = folder
        self._index = index
        self._verify = verify
        self._lock = threading.Lock()
        # Layers whose checksums have matched, and the identity of their file.
        self._sound: dict[str, tuple[tuple[int, ...], set[int]]] = {}
        self._prefixes: weakref.WeakValueDictionary[str, DocumentCache] = (
            weakref.WeakValueDictionary()
        )
        self.corrupt = 0

    def read(self, key: str, *, lazy: bool) -> DocumentCache:
        """Read the document of an entry.

        Raises:
            DocumentNotFoundError: Its file or its prefix is missing.
            StoreCorruptionError: It cannot be trusted, and has been moved to quarantine.
            StoreUnavailableError: It could not be read.
        """
        with self._lock:
            shared = self._prefixes.get(key)
        if shared is not None:
            return shared
        source, reader = self._open(key)
        prefix = self._prefix_of(reader)
        document = StoredDocument(reader, self._layer_reader(key, source, reader), prefix)
        if lazy:
            return document
        whole = document.whole()
        source.close()
        if prefix is None:  # it may be a prefix: one object for all documents behind it
            with self._lock:
                whole = self._prefixes.setdefault(key, whole)
        return whole

    def forget(self, key: str) -> None:
        """Forget the shared object of a prefix, so that the next read opens its file."""
        with self._lock:
            self._prefixes.pop(key, None)

    def check(self, key: str) -> None:
        """Read an entry and check every byte of it.

        Raises:
            DocumentNotFoundError: Its file is missing.
            StoreCorruptionError: It cannot be trusted, and has been moved to quarantine.
            StoreUnavailableError: It could not be read.
        """
        source, reader = self._open(key)
        try:
            for layer in range(reader.header.shape[0]):
                reader.read_layer(layer, verify=True)
        except (FormatError, OSError) as error:
            self.refuse(key, source, error)
        finally:
            source.close()

    def _open(self, key: str) -> tuple[FileSource, DocumentReader]:
        try:
            source = FileSource(self._folder.file_of(key))
        except FileNotFoundError:
            with self._index.transaction():
                if not self._folder.file_of(key).exists():  # lost: remove the entry, too
                    self._index.remove(key)
            raise DocumentNotFoundError(
                f"document {key} has just been evicted, or its file was removed; prefill it and "
                "put it."
            ) from None
        except (FormatError, OSError) as error:
            self.refuse(key, None, error)
        try:
            return source, DocumentReader(source, key)
        except (FormatError, OSError) as error:
            self.refuse(key, source, error)

    def _prefix_of(self, reader: DocumentReader) -> DocumentCache | None:
        if len(reader.prefix_ids) == 0:
            return None
        header = reader.header
        key = document_key(header.fingerprint, reader.prefix_ids[:0], reader.prefix_ids)
        if self._index.find(key) is None:
            raise DocumentNotFoundError(
                f"the prefix {key} that document {header.key} was encoded behind is gone; prefill "
                "the document and put it, which stores the prefix anew."
            )
        prefix = self.read(key, lazy=False)
        layers, kv_heads, _, head_dim = header.shape
        found = (*prefix.keys.shape[:2], prefix.keys.shape[3])
        if found != (layers, kv_heads, head_dim) or prefix.keys.dtype != header.dtype:
            self.refuse(
                header.key, None, FormatError(f"its rows do not fit those of its prefix {key}")
            )
        return prefix

    def _layer_reader(self, key: str, source: FileSource, reader: DocumentReader) -> _LayerReader:
        with self._lock:
            identity, layers = self._sound.get(key, (source.identity, set()))
            if identity != source.identity:
                layers = set()
            self._sound[key] = (source.identity, layers)
        return _LayerReader(self, key, source, reader, self._verify, layers)

    def refuse(self, key: str, source: FileSource | None, error: Exception) -> NoReturn:
        """Move an entry that cannot be trusted to quarantine, and raise the error.

        A file that was put there meanwhile stays. So does one that the system could not read, since
        that says nothing about its bytes.

        Raises:
            StoreCorruptionError: It was read, and cannot be trusted.
            StoreUnavailableError: It could not be read.
        """
        path = self._folder.file_of(key)
        reason = str(error)
        if isinstance(error, OSError):
            raise StoreUnavailableError(
                f"the stored document {key} cannot be read: {reason}. It was left where it is; "
                "mend what keeps it from being read, or delete it.",
                key=key,
                reason=reason,
            ) from error
        where = None
        with self._index.transaction():
            try:
                status = path.lstat()
                same = source is None or source.identity[:2] == (status.st_dev, status.st_ino)
            except OSError:
                same = False
            if same:
                self._index.remove(key)
                where = self._folder.quarantine(path, reason)
        with self._lock:
            self.corrupt += 1
            self._sound.pop(key, None)
        aside = f"It has been set aside as {where}. " if where is not None else ""
        raise StoreCorruptionError(
            f"the stored document {key} cannot be trusted: {reason}. {aside}Prefill it again and "
            "put it.",
            key=key,
            reason=reason,
        ) from error


class _LayerReader:
    """Reader of one entry's layers for a `StoredDocument`."""

    def __init__(
        self,
        owner: DiskReader,
        key: str,
        source: FileSource,
        reader: DocumentReader,
        verify: Verify,
        sound: set[int],
    ):
        self._owner, self._key, self._source, self._reader = owner, key, source, reader
        self._verify, self._sound = verify, sound

    def __call__(self, layer: int, out: Tensor) -> None:
        check = self._verify == "always" or (self._verify == "first" and layer not in self._sound)
        try:
            self._reader.read_layer(layer, verify=check, out=out)
        except (FormatError, OSError) as error:
            self._owner.refuse(self._key, self._source, error)
        if check:
            self._sound.add(layer)
