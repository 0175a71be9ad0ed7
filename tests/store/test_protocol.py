"""What every store promises."""

import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlite_store import SqliteStore

import ifkv
from ifkv.errors import (
    DocumentNotFoundError,
    InvalidInputError,
    NotPatchedError,
    StoreError,
    StoreFullError,
)
from ifkv.store import (
    DiskStore,
    DocumentStore,
    MemoryStore,
    RemoteStore,
    TieredStore,
    document_key,
    key_for,
    key_of,
)
from ifkv.testing import random_document, tiny_model
from stored_documents import BEHIND, DOCUMENT, OTHER_SURROGATE, PREFIX, same

MAKERS: dict[str, Callable[[Path], DocumentStore]] = {
    "memory": lambda _: MemoryStore(),
    "disk": lambda path: DiskStore(path),
    "tiered": lambda path: TieredStore(MemoryStore(), DiskStore(path)),
    "remote-local": lambda path: RemoteStore(path.as_uri()),
    "remote-memory": lambda path: RemoteStore(f"memory://{path}"),
    "example": lambda path: SqliteStore(path / "documents.sqlite3"),
    "three-tiers": lambda path: TieredStore(
        MemoryStore(200), TieredStore(DiskStore(path / "disk"), RemoteStore(f"memory://{path}"))
    ),
}


@pytest.fixture(params=MAKERS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DocumentStore]:
    made = MAKERS[request.param](tmp_path)
    yield made
    if isinstance(made, DiskStore):
        made.close()


def test_round_trip(store: DocumentStore) -> None:
    assert isinstance(store, DocumentStore)
    documents = [random_document(i, prefix=PREFIX, length=2 + i) for i in range(3)]
    documents.append(random_document(9, dtype=torch.bfloat16, sensitivity=True))
    documents.append(BEHIND)
    keys = [store.put(document) for document in documents]
    assert keys == [key_of(document) for document in documents]
    for lazy in (False, True):
        for key, document in zip(keys, documents, strict=True):
            assert key in store
            same(store.get(key, lazy=lazy), document)
    assert sorted(store.keys()) == sorted([*keys, key_of(PREFIX)])
    assert store.stats().documents == 6
    assert store.stats().hits == 10  # no reading of a prefix counts


def test_what_stood_before_a_document_is_never_mixed_up(store: DocumentStore) -> None:
    """The same tokens alone, behind one surrogate context and behind another."""
    alone, other = DOCUMENT, BEHIND.rebuilt(surrogate=OTHER_SURROGATE, keys=2 * DOCUMENT.keys)
    for document in (BEHIND, alone, other):
        key = store.put(document)
        same(store.get(key), document)
    assert len({key_of(each) for each in (alone, BEHIND, other)}) == 3
    for document in (alone, BEHIND, other):
        same(store.get(key_of(document)), document)
    store.delete(key_of(BEHIND))
    assert key_of(BEHIND) not in store
    assert key_of(alone) in store
    assert key_of(other) in store


def test_what_another_store_reads_lazily_can_be_put(store: DocumentStore, tmp_path: Path) -> None:
    document = random_document(1, prefix=PREFIX, sensitivity=True)
    with DiskStore(tmp_path / "other") as other:
        key = store.put(other.get(other.put(document), lazy=True))
        same(store.get(key), document)


def test_the_prefix_is_one_object_for_all_who_hold_it(store: DocumentStore) -> None:
    if isinstance(store, TieredStore):
        store = store.slow
    keys = [store.put(random_document(i, prefix=PREFIX)) for i in range(2)]
    first, second = store.get(keys[0]), store.get(keys[1], lazy=True)
    assert first.prefix is not None
    assert first.prefix is second.prefix
    assert store.get(key_of(PREFIX)) is first.prefix


def test_the_same_document_is_stored_once(store: DocumentStore) -> None:
    document = random_document(0, prefix=PREFIX)
    assert store.put(document) == store.put(random_document(0, prefix=PREFIX))
    assert store.stats().documents == 2


def test_a_document_is_replaced_when_that_is_asked_for(store: DocumentStore) -> None:
    for prefix in (PREFIX, None):
        plain = random_document(1, prefix=prefix, length=4)
        better = dataclasses.replace(plain, sensitivity=torch.rand(4))
        other = random_document(2, prefix=prefix)
        key, others_key = store.put(plain), store.put(other)
        held = store.get(key)
        assert store.put(better) == key
        same(store.get(key), plain)
        assert store.put(better, replace=True) == key
        for lazy in (False, True):
            same(store.get(key, lazy=lazy), better)
        same(store.get(others_key), other)
        same(held, plain)
        store.delete(key)
        assert key not in store
        assert store.put(better, replace=True) == key, "also where there is none"
        now = store.get(key)
        same(now, better)
        store.delete(key)
        store.put(plain)
        same(store.get(key), plain)
        same(now, better)


@pytest.mark.parametrize("make", [MemoryStore, DiskStore])
def test_what_is_replaced_stays_pinned_and_counts_once(
    tmp_path: Path, make: type[MemoryStore] | type[DiskStore]
) -> None:
    store = MemoryStore() if make is MemoryStore else DiskStore(tmp_path)
    documents = [random_document(i, prefix=PREFIX, length=4) for i in range(3)]
    keys = [store.put(document) for document in documents]
    store.pin(keys[0])
    better = dataclasses.replace(documents[0], sensitivity=torch.rand(4))
    store.put(better, replace=True)
    stats = store.stats()
    assert (stats.documents, stats.tokens, stats.pinned) == (4, 3 * 4 + 3, 1)
    store.delete(key_of(PREFIX))
    stats = store.stats()
    assert (stats.documents, stats.nbytes, stats.pinned) == (0, 0, 0)


def test_a_replacement_that_has_no_room_leaves_what_is_there(tmp_path: Path) -> None:
    document = random_document(1, length=4)
    with DiskStore(tmp_path) as store:
        key = store.put(document)
        store.max_bytes = store.stats().nbytes
        with pytest.raises(StoreFullError):
            store.put(dataclasses.replace(document, sensitivity=torch.rand(4)), replace=True)
        same(store.get(key), document)


def test_an_exact_document_replaced_in_a_store_of_eight_bits_stays_exact(tmp_path: Path) -> None:
    document = random_document(1, prefix=PREFIX, length=4)
    better = dataclasses.replace(document, sensitivity=torch.rand(4))
    with DiskStore(tmp_path) as exact, DiskStore(tmp_path, codec="int8") as small:
        key = exact.put(document)
        small.put(better, replace=True)
        same(exact.get(key), better)


def test_absent(store: DocumentStore) -> None:
    key = key_of(random_document(0))
    assert key not in store
    with pytest.raises(KeyError, match=f"^no document {key}.*prefill it"):
        store.get(key)
    with pytest.raises(DocumentNotFoundError):
        store.delete(key)
    assert store.stats().misses == 1


@pytest.mark.parametrize("key", ["", "../../etc/passwd", "0" * 63, "0" * 64 + "\n", "A" * 64, 7])
def test_what_is_no_key_is_in_no_store(store: DocumentStore, key: Any) -> None:
    assert key not in store
    for operation in (store.get, store.delete):
        with pytest.raises(DocumentNotFoundError):
            operation(key)


def test_delete(store: DocumentStore) -> None:
    keys = [store.put(random_document(i, prefix=PREFIX)) for i in range(2)]
    store.delete(keys[0])
    assert keys[0] not in store
    same(store.get(keys[1]), random_document(1, prefix=PREFIX))
    store.delete(key_of(PREFIX))
    with pytest.raises(DocumentNotFoundError):
        store.get(keys[1])
    store.put(random_document(1, prefix=PREFIX))
    same(store.get(keys[1]), random_document(1, prefix=PREFIX))


def test_contradictory_documents_are_refused(store: DocumentStore) -> None:
    good = random_document(0, prefix=PREFIX)
    other = random_document(1001, length=3)
    for bad in (
        dataclasses.replace(good, prefix=None),
        dataclasses.replace(good, prefix=other),
        dataclasses.replace(good, prefix=good),
        dataclasses.replace(good, prefix=dataclasses.replace(PREFIX, fingerprint="1" * 32)),
        dataclasses.replace(good, prefix=dataclasses.replace(PREFIX, keys=PREFIX.keys[:1])),
        dataclasses.replace(good, keys=good.keys[:, :, :-1]),
        dataclasses.replace(good, values=good.values.double()),
        dataclasses.replace(good, token_ids=good.token_ids[:0]),
        good.keys,
    ):
        with pytest.raises(InvalidInputError):
            store.put(bad)  # type: ignore[arg-type]
    assert store.stats().documents == 0


def test_threads_share_a_store(store: DocumentStore) -> None:
    documents = [random_document(i % 6, prefix=PREFIX) for i in range(24)]
    errors: list[BaseException] = []

    def work(start: int) -> None:
        try:
            for document in documents[start:] + documents[:start]:
                same(store.get(store.put(document)), document)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert store.stats().documents == 7


def test_key_covers_all_that_decides_rows_and_nothing_else() -> None:
    ids, none = torch.tensor([1, 2, 3]), torch.tensor([], dtype=torch.long)
    keys = {
        document_key("a", none, ids),
        document_key("b", none, ids),
        document_key("a", ids[:1], ids[1:]),
        document_key("a", ids[:2], ids[2:]),
        document_key("a", ids, ids),
        document_key("a", none, ids[:2]),
    }
    assert len(keys) == 6
    model = tiny_model("llama", num_layers=1)
    with pytest.raises(NotPatchedError):
        key_for(model, [1, 2])
    with ifkv.patch(model):
        document = ifkv.prefill_documents(model, [[5, 6]], prefix=[1])[0]
        assert key_for(model, [5, 6], [1]) == key_of(document)
        assert key_for(model, torch.tensor([5, 6]), document.prefix or ()) == key_of(document)
        behind = {
            key_of(ifkv.prefill_documents(model, [[5, 6]], prefix=[1], surrogate=texts)[0])
            for texts in ([7, 8], [[7, 8]], [[7], [8]], [[8], [7]], [8, 7])
        }
        assert behind == {
            key_for(model, [5, 6], [1], texts) for texts in ([7, 8], [[8], [7]], [8, 7])
        }
        assert len(behind | {key_of(document)}) == 4


def test_memory_store_drops_the_least_recently_used() -> None:
    size = random_document(0).nbytes
    store = MemoryStore(3 * size)
    keys = [store.put(random_document(i)) for i in range(3)]
    store.get(keys[0])
    store.pin(keys[1])
    store.put(random_document(3))
    assert [key in store for key in keys] == [True, True, False]
    assert store.stats().evictions == 1
    assert store.stats().pinned == 1
    with pytest.raises(StoreFullError, match="Raise max_bytes"):
        store.put(random_document(4, length=20))
    with pytest.raises(InvalidInputError, match="max_bytes is -1"):
        MemoryStore(-1)


def test_a_url_that_cannot_be_opened_says_what_to_install() -> None:
    with pytest.raises(StoreError, match=r"pip install -e '\.\[remote\]' in the clone of ifkv"):
        RemoteStore("abacus://documents")
