"""A bucket of an S3 server behind a proxy that can fail, and remote stores over it."""

from __future__ import annotations

from typing import Any

from faulty_proxy import FaultyProxy
from ifkv.store import RemoteStore, key_of
from stored_documents import DOCUMENT

KEY = key_of(DOCUMENT)


def s3(proxy: FaultyProxy) -> Any:
    import s3fs

    return s3fs.S3FileSystem(endpoint_url=proxy.url, use_listings_cache=False)


def open_at(proxy: FaultyProxy, bucket: str, **options: Any) -> RemoteStore:
    return RemoteStore(f"s3://{bucket}/folder", endpoint_url=proxy.url, **options)


def hurried(store: RemoteStore, deadline: float = 0.5) -> RemoteStore:
    """The same, which waits for nothing long, and has forgotten what failed before."""
    store._files._deadline, store._files._failed = deadline, None
    return store


def objects(proxy: FaultyProxy, bucket: str) -> dict[str, bytes]:
    proxy.heal()
    files = s3(proxy)
    return {path: files.cat_file(path) for path in files.find(bucket)}
