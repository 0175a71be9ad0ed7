"""Tiers: what is used moves up, and what a faster tier serves counts as used in the slower one."""

from pathlib import Path

import pytest

from ifkv.errors import StoreError
from ifkv.store import DiskStore, MemoryStore, RemoteStore, StoredDocument, TieredStore
from ifkv.testing import random_document
from stored_documents import PREFIX, same


def test_tiers_promote_and_survive_a_small_fast_tier(tmp_path: Path) -> None:
    slow, fast = DiskStore(tmp_path), MemoryStore()
    key = slow.put(random_document(0, prefix=PREFIX))
    store = TieredStore(fast, slow)
    store.get(key)
    assert key in fast
    fast.delete(key)
    document = store.get(key, lazy=True)
    assert isinstance(document, StoredDocument)
    document.layer(0)
    assert key not in fast  # until all of it has been read
    document.layer(1)
    assert key in fast
    same(fast.get(key), random_document(0, prefix=PREFIX))
    tiny = TieredStore(MemoryStore(1), slow)
    same(tiny.get(tiny.put(random_document(1))), random_document(1))


def test_what_is_used_in_memory_is_not_evicted_from_the_disk(tmp_path: Path) -> None:
    size = DiskStore(tmp_path / "a")
    size.put(random_document(0))
    disk = DiskStore(tmp_path / "b", max_bytes=3 * size.stats().nbytes)
    store = TieredStore(MemoryStore(), disk)
    keys = [store.put(random_document(seed)) for seed in range(3)]
    store.get(keys[0])  # from memory
    store.put(random_document(3))
    assert [key in disk for key in keys] == [True, False, True]
    store.pin(keys[2])
    for seed in range(4, 8):
        store.put(random_document(seed))
    assert [key in disk for key in keys] == [False, False, True]
    with pytest.raises(StoreError, match="evicts nothing"):
        TieredStore(MemoryStore(), RemoteStore(f"memory://{tmp_path}")).pin(keys[0])
