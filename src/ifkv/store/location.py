"""Where stores are when nobody says, and which kind of store a path or URL means."""

from __future__ import annotations

import os
from pathlib import Path

from ifkv.store.disk import DiskStore
from ifkv.store.protocol import DocumentStore
from ifkv.store.remote import RemoteStore

VARIABLE = "IFKV_STORE"


def default_store_path() -> Path:
    """The store in the platform's user cache folder, or where ``IFKV_STORE`` points."""
    import platformdirs

    given = os.environ.get(VARIABLE)
    return Path(given) if given else platformdirs.user_cache_path("ifkv") / "store"


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
