"""Where stores are when nobody says, and which kind of store a path or URL means."""

from __future__ import annotations

import os
from pathlib import Path

from ifkv.store.disk import DiskStore
from ifkv.store.protocol import DocumentStore
from ifkv.store.remote import RemoteStore


def default_store_path() -> Path:
    """Where ``IFKV_STORE`` points; else ``store`` in ``IFKV_CACHE`` or the user's cache folder."""
    import platformdirs

    if given := os.environ.get("IFKV_STORE"):
        return Path(given).expanduser().absolute()
    cache = os.environ.get("IFKV_CACHE") or platformdirs.user_cache_path("ifkv")
    return Path(cache).expanduser().absolute() / "store"


def open_store(
    where: str | os.PathLike[str] | None = None,
    *,
    max_bytes: int | None = None,
    codec: str = "exact",
) -> DocumentStore:
    """Open the store at a path or URL.

    Args:
        where: A folder, or a URL such as ``s3://bucket/folder``; the default store if None.
        max_bytes: The budget of a folder.
        codec: How new documents are stored.

    Returns:
        A :class:`DiskStore` or a :class:`RemoteStore`.

    Raises:
        StoreError: It cannot be opened.
    """
    if where is not None and "://" in str(where):
        return RemoteStore(str(where), codec=codec)
    path = default_store_path() if where is None else Path(where)
    return DiskStore(path, max_bytes=max_bytes, codec=codec)
