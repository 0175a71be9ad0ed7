"""A session and its store: where it is, what it keeps, what it does when a document is lost."""

from __future__ import annotations

import re
import time
import warnings
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import torch

import ifkv
from ifkv.errors import (
    InvalidInputError,
    StoreCorruptionError,
    StoreError,
    StoreFullError,
    StoreWarning,
)
from ifkv.store import (
    DiskStore,
    MemoryStore,
    RemoteStore,
    StoredDocument,
    TieredStore,
    default_store_path,
    key_of,
    location,
    open_store,
)
from ifkv.testing import assert_bit_equal, assert_close, random_document, tiny_model, tiny_tokenizer

TEXTS = ["The lamp is red.", "The door is green and old.", "It rains in the valley."]
QUESTION = "Which colour is the door?"
TOKENIZER = tiny_tokenizer()


def make(store: Any = None, **options: Any) -> ifkv.Session:
    options = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 2048} | options
    return ifkv.Session(tiny_model(**options), TOKENIZER, store=store)


def wanted(**options: Any) -> ifkv.Answer:
    """The answer of a session that has never stored anything on a disk."""
    session = make(MemoryStore(), num_layers=6)
    session.add(TEXTS)
    return session.ask(QUESTION, **{"max_new_tokens": 4, **options})


def same(answer: ifkv.Answer, other: ifkv.Answer) -> None:
    assert_close(answer.first_logits, other.first_logits, what="first logits", tolerance=1e-6)
    assert answer.token_ids.tolist() == other.token_ids.tolist()


def flip(store: DiskStore, key: str, offset: int) -> None:
    """Change one bit of a document's file."""
    with store.folder.file_of(key).open("r+b") as file:
        file.seek(offset, 2 if offset < 0 else 0)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


@pytest.fixture
def no_forward(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it, and from then on no document may be prefilled."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a document was prefilled")

    return lambda: monkeypatch.setattr("ifkv.documents.prefill.run_layers", refuse)


def test_by_default_documents_outlive_the_session_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_forward: Any
) -> None:
    monkeypatch.delenv("IFKV_STORE")
    monkeypatch.delenv("IFKV_CACHE", raising=False)
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    first = make()
    keys = first.add(TEXTS)
    assert first.prefilled == 3
    with DiskStore(tmp_path / "ifkv" / "store") as store:
        assert all(key in store for key in keys)
    no_forward()
    second = make()
    assert second.add(TEXTS) == keys
    assert second.prefilled == 0
    same(second.ask(QUESTION, max_new_tokens=2), first.ask(QUESTION, max_new_tokens=2))


def test_environment_variables_move_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IFKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("IFKV_STORE", str(tmp_path / "mine"))
    make().add(TEXTS[:1])
    assert default_store_path() == tmp_path / "mine"
    assert not (tmp_path / "cache").exists()
    monkeypatch.delenv("IFKV_STORE")
    make().add(TEXTS[:1])
    assert default_store_path() == tmp_path / "cache" / "store"
    for folder in (tmp_path / "mine", tmp_path / "cache" / "store"):
        with DiskStore(folder) as store:
            assert store.stats().documents == 2  # and a prefix
    monkeypatch.setenv("IFKV_STORE", f"memory://{tmp_path}")
    assert isinstance(open_store(), RemoteStore)
    with pytest.raises(InvalidInputError, match="IFKV_STORE is memory"):
        default_store_path()


def test_a_path_or_a_url_is_opened(tmp_path: Path) -> None:
    for where in (tmp_path / "a", str(tmp_path / "a"), f"memory://{tmp_path}"):
        session = make(where)
        keys = session.add(TEXTS)
        store = session.store
        assert isinstance(store, TieredStore)
        assert all(key in store.slow for key in keys)
        session.ask(QUESTION, max_new_tokens=1)
        assert all(key in store.fast for key in keys)
        assert session.prefilled == (0 if where == str(tmp_path / "a") else 3)
        assert len(store) == 4


def test_memory_only_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IFKV_STORE", str(tmp_path / "store"))
    session = make(MemoryStore())
    session.add(TEXTS)
    session.ask(QUESTION, max_new_tokens=1)
    assert not (tmp_path / "store").exists()


def test_a_folder_that_cannot_be_made_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("IFKV_STORE", str(tmp_path / "file" / "store"))
    with pytest.raises(StoreError, match=r"file/store cannot be used.*IFKV_STORE.*MemoryStore\(\)"):
        make()


def test_the_default_store_leaves_half_of_the_free_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DiskStore(default_store_path()) as store:
        store.put(random_document(0))
        held = store.stats().nbytes
    usage = type("Usage", (), {"free": 3 * held})
    monkeypatch.setattr(location.shutil, "disk_usage", lambda _: usage)
    opened = open_store()
    assert isinstance(opened, DiskStore)
    assert opened.max_bytes == held + 3 * held // 2
    for seed in range(1, 5):
        opened.put(random_document(seed))
    assert opened.stats().documents == 2
    assert open_store(max_bytes=7).stats().max_bytes == 7
    assert open_store(tmp_path).stats().max_bytes is None
    with pytest.raises(InvalidInputError, match=r"max_bytes is 7, but a store behind a URL"):
        open_store(f"memory://{tmp_path}", max_bytes=7)


def test_an_interrupted_add_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    session = make()
    real, batches = ifkv.prefill_documents, []

    def interrupted(model: Any, documents: Any, **options: Any) -> Any:
        batches.append(len(documents))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return real(model, documents, **options)

    monkeypatch.setattr("ifkv.store.populate.prefill_documents", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.add(TEXTS, batch_tokens=1)
    assert session.keys == []
    again = make()
    keys = again.add(TEXTS, batch_tokens=1)
    assert again.prefilled == 1
    assert batches == [1, 1, 1, 1]
    assert again.keys == keys


def test_progress_counts_all_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    session = make(MemoryStore())
    session.add(TEXTS, progress=True)
    tokens = sum(len(session.format.document_ids(text)) for text in TEXTS)
    shown = capsys.readouterr()
    assert f"{tokens}/{tokens} tokens" in shown.err
    assert shown.out == ""
    session.add(TEXTS)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("ratio", [0, 0.15, 1])
@pytest.mark.parametrize("reorder", [False, True])
def test_answers_from_disk_are_those_from_memory(
    tmp_path: Path, ratio: float, reorder: bool
) -> None:
    options = {"ratio": ratio, "reorder": reorder}
    disk = DiskStore(tmp_path)
    session = make(disk, num_layers=6)
    session.add(TEXTS)
    ready = session.prepare(QUESTION, **options)
    assert (ready.cache.loader is None) == reorder, "what is read twice is read whole"
    same(session.ask(QUESTION, max_new_tokens=4, **options), wanted(**options))
    tiered = make(TieredStore(MemoryStore(), disk), num_layers=6)
    tiered.add(TEXTS)
    for loaded in (not reorder, False):  # the second time everything is in memory
        ready = tiered.prepare(QUESTION, **options)
        assert (ready.cache.loader is not None) == loaded
        assert_bit_equal(ready.logits.float(), wanted(**options).first_logits, what="logits")


def test_timings_give_the_load_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make(DiskStore(tmp_path), num_layers=6)
    session.add(TEXTS)
    real = StoredDocument.layer

    def slow(self: StoredDocument, layer: int, *, pin_memory: bool = False) -> torch.Tensor:
        time.sleep(0.05)
        return real(self, layer, pin_memory=pin_memory)

    session.ask(QUESTION, max_new_tokens=1)
    monkeypatch.setattr(StoredDocument, "layer", slow)
    answer = session.ask(QUESTION, ratio=0.5, max_new_tokens=1)
    steps = {name: seconds for name, seconds in answer.timings.items() if name != "decode"}
    assert steps["load"] > 0.1
    assert steps["select"] + steps["recompute and prompt"] + steps["stitch"] < steps["load"]
    assert sum(steps.values()) <= answer.ttft_seconds


@pytest.mark.parametrize(("added", "reorder"), [(True, False), (False, False), (True, True)])
def test_what_is_found_corrupt_on_the_way_is_prefilled_again(
    tmp_path: Path, added: bool, reorder: bool
) -> None:
    """In the last rows of two files; documents that were only opened are known by their tokens."""
    disk = DiskStore(tmp_path)
    session = make(disk, num_layers=6)
    keys = session.add(TEXTS)
    if not added:
        session = make(disk, num_layers=6)
    for key in keys[1:]:
        flip(disk, key, -1)
    with pytest.warns(StoreWarning) as warned:
        answer = session.ask(QUESTION, documents=keys, reorder=reorder, max_new_tokens=4)
    told = sorted(str(one.message) for one in warned)
    for text, key in zip(told, sorted(keys[1:]), strict=True):
        assert re.search(rf"document {key[:16]} .* was prefilled again from its tokens\.$", text)
    # The second's rows may have been looked at, and set aside, while the first's were awaited.
    assert any("does not match its checksum" in text for text in told)
    same(answer, wanted(reorder=reorder))
    assert disk.stats().corrupt == 2
    assert all(key in disk for key in keys)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(session.ask(QUESTION, max_new_tokens=4, documents=keys, reorder=reorder), answer)
    assert disk.verify() == []


@pytest.mark.parametrize("offset", [0, 100])
def test_a_file_that_is_no_document_any_more_is_made_again(tmp_path: Path, offset: int) -> None:
    disk = DiskStore(tmp_path)
    session = make(disk, num_layers=6)
    keys = session.add(TEXTS)
    flip(disk, keys[1], offset)
    with pytest.warns(StoreWarning, match="could not be trusted"):
        same(session.ask(QUESTION, max_new_tokens=4), wanted())
    stranger = make(disk, num_layers=6)
    flip(disk, keys[0], offset)
    with pytest.raises(StoreCorruptionError, match="This session cannot: its text is not known"):
        stranger.ask(QUESTION, documents=keys)
    stranger.add(TEXTS)
    same(stranger.ask(QUESTION, documents=keys, max_new_tokens=4), wanted())


def test_a_corrupt_prefix_is_made_again_with_a_document(tmp_path: Path) -> None:
    disk = DiskStore(tmp_path)
    session = make(disk, num_layers=6)
    keys = session.add(TEXTS)
    prefix = disk.get(keys[0]).prefix
    assert prefix is not None
    name = key_of(prefix)
    del prefix
    flip(disk, name, -1)
    fresh = make(DiskStore(tmp_path), num_layers=6)
    fresh.engine.library._origins.update(session.engine.library._origins)
    with pytest.warns(StoreWarning, match="could not be trusted") as warned:
        same(fresh.ask(QUESTION, documents=keys, max_new_tokens=4), wanted())
    assert len(warned) == 1
    assert name in disk


def test_what_was_evicted_is_made_again_unless_the_weights_have_changed() -> None:
    store = MemoryStore()
    session = make(store, num_layers=6)
    keys = session.add(TEXTS)
    store.delete(keys[1])
    with pytest.warns(StoreWarning, match="is no longer in the store and was prefilled again"):
        same(session.ask(QUESTION, max_new_tokens=4), wanted())
    assert session.prefilled == 4
    store.delete(keys[1])
    model: Any = session.model
    with torch.no_grad():
        model.base_model.layers[0].self_attn.k_proj.weight.mul_(1.1)
    with pytest.raises(InvalidInputError, match="the weights have changed; add"):
        session.ask(QUESTION)


def test_an_answer_does_not_need_the_store_to_take_the_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = DiskStore(tmp_path)
    session = make(disk, num_layers=6)
    keys = session.add(TEXTS)
    flip(disk, keys[2], -1)

    def full(_: ifkv.DocumentCache) -> str:
        raise StoreFullError("no room")

    monkeypatch.setattr(disk, "put", full)
    with pytest.warns(StoreWarning, match="It could not be stored: no room"):
        same(session.ask(QUESTION, max_new_tokens=4), wanted())
