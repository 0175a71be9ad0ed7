"""Stitching documents that a store reads layer by layer, while the cache is in use."""

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import ifkv
from ifkv.cache import loading as layer_loading
from ifkv.cache.layer import StitchedLayer
from ifkv.errors import StoreCorruptionError
from ifkv.store import DiskStore, MemoryStore, RemoteStore, StoredDocument, TieredStore
from ifkv.testing import assert_bit_equal, tiny_model

DOCUMENTS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]
PROMPT = [20, 21, 22]


@pytest.fixture
def model() -> Iterator[PreTrainedModel]:
    made = tiny_model("qwen3", num_layers=6, dtype=torch.bfloat16)
    with ifkv.patch(made):
        yield made


@pytest.fixture
def made(model: PreTrainedModel) -> list[ifkv.DocumentCache]:
    return ifkv.prefill_documents(model, DOCUMENTS, prefix=[1, 2])


@pytest.fixture
def store(tmp_path: Path, made: list[ifkv.DocumentCache]) -> DiskStore:
    disk = DiskStore(tmp_path)
    for document in made:
        disk.put(document)
    return disk


def lazily(store: DiskStore, made: list[ifkv.DocumentCache]) -> list[ifkv.DocumentCache]:
    from ifkv.store import key_of

    return [store.get(key_of(document), lazy=True) for document in made]


@pytest.mark.parametrize("ahead", [0, 2**30])
@pytest.mark.parametrize("order", [None, [2, 0, 1]])
def test_equals_what_was_never_stored(
    model: PreTrainedModel,
    made: list[ifkv.DocumentCache],
    store: DiskStore,
    order: list[int] | None,
    ahead: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layer_loading, "AHEAD_BYTES", ahead)
    wanted = ifkv.stitch(model, made, order=order)
    for documents in (lazily(store, made), [made[0], *lazily(store, made)[1:]]):
        cache = ifkv.stitch(model, documents, order=order)
        for layer, other in zip(cache.layers, wanted.layers, strict=True):
            assert_bit_equal(layer.keys, other.keys, what="keys")
            assert_bit_equal(layer.values, other.values, what="values")


def test_the_whole_method_over_a_store(
    model: PreTrainedModel, made: list[ifkv.DocumentCache], store: DiskStore
) -> None:
    def answer(documents: list[ifkv.DocumentCache]) -> tuple[torch.Tensor, ...]:
        cache = ifkv.stitch(model, documents)
        scores = ifkv.score(model, cache, PROMPT)
        slots = ifkv.select(cache, scores, ratio=0.5)
        logits = ifkv.recompute(model, cache, slots, prompt_ids=PROMPT)
        assert logits is not None
        return scores, logits, ifkv.generate(model, cache, PROMPT, max_new_tokens=4)

    wanted = answer(made)
    tiers = TieredStore(MemoryStore(), store)
    for _ in range(2):  # cold, then promoted
        for found, truth in zip(answer(lazily(tiers, made)), wanted, strict=True):  # type: ignore[arg-type]
            assert_bit_equal(found, truth, what="results")
    assert tiers.fast.stats().documents == 4


def test_a_remote_store_is_read_by_ranges(
    model: PreTrainedModel, made: list[ifkv.DocumentCache], tmp_path: Path
) -> None:
    remote = RemoteStore(f"memory://{tmp_path}")
    keys = [remote.put(document) for document in made]
    cache = ifkv.stitch(model, [remote.get(key, lazy=True) for key in keys])
    wanted = ifkv.stitch(model, made)
    assert_bit_equal(cache.layers[-1].keys, wanted.layers[-1].keys, what="keys")


def test_early_layers_are_used_before_late_ones_have_been_read(
    model: PreTrainedModel,
    made: list[ifkv.DocumentCache],
    store: DiskStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate, read = threading.Event(), set()
    real = StoredDocument.layer

    def gated(self: StoredDocument, layer: int, *, pin_memory: bool = False) -> torch.Tensor:
        if layer >= 5:
            assert gate.wait(30)
        read.add(layer)
        return real(self, layer, pin_memory=pin_memory)

    monkeypatch.setattr(StoredDocument, "layer", gated)
    documents = lazily(store, made)
    cache = ifkv.stitch(model, documents)  # returns at once: nothing has to be there yet
    scores = ifkv.score(model, cache, PROMPT, layers=[3])  # needs layers 0 to 3
    assert 5 not in read
    gate.set()
    wanted = ifkv.stitch(model, made)
    assert_bit_equal(scores, ifkv.score(model, wanted, PROMPT, layers=[3]), what="scores")
    assert_bit_equal(cache.layers[5].keys, wanted.layers[5].keys, what="keys")
    assert cache.loader is not None
    assert cache.loader.wait_seconds >= 0


def test_no_more_is_read_ahead_than_memory_allows(
    model: PreTrainedModel,
    made: list[ifkv.DocumentCache],
    store: DiskStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layer_loading, "AHEAD_BYTES", 0)
    read = set()
    real = StoredDocument.layer

    def counted(self: StoredDocument, layer: int, *, pin_memory: bool = False) -> torch.Tensor:
        read.add(layer)
        return real(self, layer, pin_memory=pin_memory)

    monkeypatch.setattr(StoredDocument, "layer", counted)
    cache = ifkv.stitch(model, lazily(store, made))
    assert cache.layers[0].keys is not None
    assert max(read) <= 2


def test_corruption_found_on_the_way_is_an_error_and_stays_one(
    model: PreTrainedModel, made: list[ifkv.DocumentCache], store: DiskStore
) -> None:
    from ifkv.store import key_of

    documents = lazily(store, made)
    file = store.folder.file_of(key_of(made[1]))
    with file.open("r+b") as opened:
        opened.seek(-1, 2)
        last = opened.read(1)[0]
        opened.seek(-1, 2)
        opened.write(bytes([last ^ 1]))
    cache = ifkv.stitch(model, documents)
    assert_bit_equal(
        cache.layers[0].keys, ifkv.stitch(model, made).layers[0].keys, what="keys of layer 0"
    )
    for _ in range(2):
        with pytest.raises(StoreCorruptionError, match=r"layers.0005.values"):
            ifkv.recompute(model, cache, [3], prompt_ids=PROMPT)
    assert key_of(made[1]) not in store
    store.put(made[1])
    again = ifkv.stitch(model, lazily(store, made))
    assert ifkv.recompute(model, again, [3], prompt_ids=PROMPT) is not None


def test_two_threads_may_meet_at_a_layer_that_is_being_loaded() -> None:
    """One is done with loading between the other's look and its call."""

    class Overtaken(StitchedLayer):
        calls = 0
        looks = 0

        @property
        def settle(self) -> Callable[[], None] | None:  # type: ignore[override]
            self.looks += 1
            return self.fill if self.looks == 1 else None

        @settle.setter
        def settle(self, value: Callable[[], None] | None) -> None:
            assert value is None

        def fill(self) -> None:
            self.calls += 1

    layer = Overtaken(torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4, 2), 3)
    assert layer.key_buffer.shape == (1, 1, 4, 2)
    assert layer.calls == 1


def test_a_length_waits_for_no_rows(
    model: PreTrainedModel, made: list[ifkv.DocumentCache], store: DiskStore
) -> None:
    cache = ifkv.stitch(model, lazily(store, made))
    assert cache.get_seq_length() == cache.context_length
    assert (cache.appended, cache.kv_dtype) == (0, None)
    assert repr(cache)
    assert all(layer.settle is not None for layer in cache.layers)


def test_copies_are_of_rows_that_are_there(
    model: PreTrainedModel, made: list[ifkv.DocumentCache], store: DiskStore
) -> None:
    wanted = ifkv.stitch(model, made)
    for duplicate in (copy.deepcopy, lambda c: c.clone(), lambda c: pickle.loads(pickle.dumps(c))):
        cache = duplicate(ifkv.stitch(model, lazily(store, made)))
        for layer, other in zip(cache.layers, wanted.layers, strict=True):
            assert_bit_equal(layer.keys, other.keys, what="keys")
            assert_bit_equal(layer.values, other.values, what="values")


def test_a_dropped_cache_leaves_no_threads(
    model: PreTrainedModel, made: list[ifkv.DocumentCache], store: DiskStore
) -> None:
    import gc
    import time

    def readers() -> int:
        return sum(thread.name.startswith("ifkv-load") for thread in threading.enumerate())

    cache = ifkv.stitch(model, lazily(store, made))
    del cache
    gc.collect()
    deadline = time.monotonic() + 10
    while readers() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert readers() == 0


@pytest.mark.gpu
def test_on_cuda(made: list[ifkv.DocumentCache], store: DiskStore) -> None:
    """Page-locked buffers and a copy stream; made on the CPU, used on the device."""
    from ifkv.store import key_of

    model = tiny_model("qwen3", num_layers=6, dtype=torch.bfloat16).to("cuda")
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=[1, 2])
        keys = [store.put(document) for document in documents]
        assert keys == [key_of(document) for document in made]
        wanted = ifkv.stitch(model, [store.get(key) for key in keys])
        cache = ifkv.stitch(model, [store.get(key, lazy=True) for key in keys])
        for layer, other in zip(cache.layers, wanted.layers, strict=True):
            assert_bit_equal(layer.keys, other.keys, what="keys")
            assert_bit_equal(layer.values, other.values, what="values")
