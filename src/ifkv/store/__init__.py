"""Stores of prefilled documents: in memory, on disk, in tiers, far away.

    >>> from ifkv.store import MemoryStore
    >>> len(MemoryStore(max_bytes=2**30))
    0

All of them follow :class:`DocumentStore`; the format on disk is described in
``docs/store-format.md``.
"""

from ifkv.store.disk import DiskStore
from ifkv.store.encoding import Encoded, encode_documents
from ifkv.store.keys import FORMAT_VERSION, document_key, key_for, key_of
from ifkv.store.lazy import StoredDocument
from ifkv.store.location import default_store_path, open_store, session_store
from ifkv.store.memory import MemoryStore
from ifkv.store.protocol import DocumentStore, StoreStats
from ifkv.store.remote import RemoteStore
from ifkv.store.sources import SourceKeeper, keeper_of
from ifkv.store.tiered import TieredStore

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
