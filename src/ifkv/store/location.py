"""Where stores are when nobody says, and which kind of store a path or URL means."""

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

# Host memory before a session's disk: documents of the last questions, so that the next is hot.
SESSION_MEMORY_BYTES = 2 * 2**30


def open_store(
    where: str | os.PathLike[str] | None = None,
    *,
    max_bytes: int | None = None,
    codec: str = "exact",
) -> DocumentStore:
    """Open the store at a path or URL.

    Args:
        where: A folder, or a URL such as ``s3://bucket/folder``. If None: what ``IFKV_STORE``
            names, or `default_store_path`.
        max_bytes: The budget of a folder. If None a folder that is named has none; the default
            one has what it holds and half of what is free on its disk now, so that a cache never
            fills a disk.
        codec: How new documents are stored.

    Returns:
        A `DiskStore` or a `RemoteStore`.

    Raises:
        StoreError: It cannot be opened.
    """
    named = where if where is not None else os.environ.get("IFKV_STORE")
    if named is not None and "://" in str(named):
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
    """The store that a session means: its own object, or what is at a place, behind some memory.

    Args:
        where: A store, which is taken as it is; or what `open_store` takes.

    Raises:
        InvalidInputError: It is something else.
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
