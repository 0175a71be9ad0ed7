"""Stores of prefilled documents: in memory, on disk, in tiers, far away.

    >>> from ifkv.store import MemoryStore
    >>> len(MemoryStore(max_bytes=2**30))
    0

All of them follow `DocumentStore`; the format on disk is described in
``docs/store-format.md``.

Names are loaded when they are first used, so that what needs no torch does not wait for it.

Belongs here: keeping documents: formats, keys, codecs, memory, disk, remote, tiers.
Not here: making documents (`ifkv.documents`) and placing them in a request (`ifkv.cache`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ifkv.utils.lazy import lazily

if TYPE_CHECKING:
    from ifkv.store.default_path import default_store_path
    from ifkv.store.disk import DiskStore
    from ifkv.store.keys import FORMAT_VERSION, document_key, key_for, key_of
    from ifkv.store.lazy import StoredDocument
    from ifkv.store.location import open_store, session_store
    from ifkv.store.memory import MemoryStore
    from ifkv.store.populate import Encoded, encode_documents
    from ifkv.store.protocol import DocumentStore, StoreStats
    from ifkv.store.remote import RemoteStore
    from ifkv.store.sources import SourceKeeper, keeper_of
    from ifkv.store.tiered import TieredStore

_HOME = {
    "DiskStore": "disk",
    "DocumentStore": "protocol",
    "Encoded": "populate",
    "FORMAT_VERSION": "keys",
    "MemoryStore": "memory",
    "RemoteStore": "remote",
    "SourceKeeper": "sources",
    "StoreStats": "protocol",
    "StoredDocument": "lazy",
    "TieredStore": "tiered",
    "default_store_path": "default_path",
    "document_key": "keys",
    "encode_documents": "populate",
    "keeper_of": "sources",
    "key_for": "keys",
    "key_of": "keys",
    "open_store": "location",
    "session_store": "location",
}

__all__ = [
    "FORMAT_VERSION",
    "DiskStore",
    "DocumentStore",
    "Encoded",
    "MemoryStore",
    "RemoteStore",
    "SourceKeeper",
    "StoreStats",
    "StoredDocument",
    "TieredStore",
    "default_store_path",
    "document_key",
    "encode_documents",
    "keeper_of",
    "key_for",
    "key_of",
    "open_store",
    "session_store",
]

__getattr__ = lazily(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted(__all__)
