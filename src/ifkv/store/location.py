"""Opening of stores: the default place, and the kind of store of a path or URL."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ifkv.errors import InvalidInputError, StoreError
from ifkv.store.default_path import default_store_path
from ifkv.store.disk import DiskStore
from ifkv.store.memory import MemoryStore
from ifkv.store.protocol import DocumentStore
from ifkv.store.remote import RemoteStore
from ifkv.store.tiered import TieredStore

# Host memory in front of a session's disk, for the documents of the last questions.
SESSION_MEMORY_BYTES = 2 * 2**30


def open_store(
    where: str | os.PathLike[str] | None = None,
    *,
    max_bytes: int | None = None,
    codec: str = "exact",
) -> DocumentStore:
    """Open the store at a path or URL.

    Args:
        where: A folder, or a URL such as ``s3://bucket/folder``. If None: the value of
            ``IFKV_STORE``, or `default_store_path`.
        max_bytes: The budget of a folder. If None, a named folder has no budget. The default
            folder then has its present size plus half of its disk's free bytes, so that a cache
            never fills a disk.
        codec: The codec of new documents.

    Returns:
        A `DiskStore` or a `RemoteStore`.

    Raises:
        InvalidInputError: A URL is given a budget, or the codec is unknown.
        StoreError: It cannot be opened.
    """
    named = where if where is not None else os.environ.get("IFKV_STORE")
    if named is not None and "://" in str(named):
        if max_bytes is not None:
            raise InvalidInputError(
                f"max_bytes is {max_bytes}, but a store behind a URL ({named}) has no budget. "
                "Leave it out, or put a DiskStore that has one in front, by a TieredStore."
            )
        return RemoteStore(str(named), codec=codec)
    path = default_store_path() if where is None else Path(where)
    try:
        store = DiskStore(path, max_bytes=max_bytes, codec=codec)
    except StoreError as error:
        if where is not None:
            raise
        raise StoreError(
            f"{error} Set IFKV_STORE to it, or keep documents in memory with store=MemoryStore()."
        ) from error
    if where is None and max_bytes is None:
        store.max_bytes = store.stats().nbytes + shutil.disk_usage(store.path).free // 2
    return store


def session_store(where: DocumentStore | str | os.PathLike[str] | None) -> DocumentStore:
    """Return a session's store: the object given, or the store at a place behind some memory.

    Args:
        where: A store, which is returned; or an argument of `open_store`.

    Raises:
        InvalidInputError: ``where`` is something else.
        StoreError: It cannot be opened.
    """
    if where is None or isinstance(where, str | os.PathLike):
        return TieredStore(MemoryStore(SESSION_MEMORY_BYTES), open_store(where))
    if not isinstance(where, DocumentStore):
        raise InvalidInputError(
            f"store is of type {type(where).__name__}; give a path, a URL, a store such as "
            "ifkv.store.MemoryStore(), or nothing for the user's cache folder."
        )
    return where
