"""Threads that add overlapping documents: each is prefilled once, and nobody waits for ever."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ifkv
from ifkv.errors import StoreFullError
from ifkv.store import DiskStore, MemoryStore, TieredStore
from ifkv.store import populate as encoding
from ifkv.testing import shared_tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MODEL = shared_tiny_model(vocab_size=len(TOKENIZER))
TEXTS = [f"Lamp number {number} is red." for number in range(11)]


def session_over(store: Any) -> ifkv.Session:
    return ifkv.Session(MODEL, TOKENIZER, store=store)


@pytest.fixture
def prefills(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, ...]]:
    """How often each document was prefilled."""
    return count_prefills(monkeypatch)


def count_prefills(patch: pytest.MonkeyPatch) -> Counter[tuple[int, ...]]:
    seen: Counter[tuple[int, ...]] = Counter()
    lock, real = threading.Lock(), ifkv.prefill_documents

    def counted(model: Any, documents: Any, **options: Any) -> Any:
        with lock:
            seen.update(tuple(ids.tolist()) for ids in documents)
        return real(model, documents, **options)

    patch.setattr(encoding, "prefill_documents", counted)
    return seen


def together(works: list[Callable[[], Any]]) -> list[Any]:
    """Run at once; what each returned or raised. None of them may hang."""
    results: list[Any] = [None] * len(works)
    start = threading.Barrier(len(works))

    def run(index: int) -> None:
        start.wait()
        try:
            results[index] = works[index]()
        except Exception as error:
            results[index] = error

    threads = [
        threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(works))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "somebody waits for ever"
    return results


@pytest.mark.parametrize("kind", ["memory", "disk", "several"])
def test_six_threads_prefill_each_text_once(
    tmp_path: Path, prefills: Counter[tuple[int, ...]], kind: str
) -> None:
    """In one session, and in sessions whose store objects are at one place."""
    if kind == "several":
        sessions = [session_over(TieredStore(MemoryStore(), DiskStore(tmp_path))) for _ in range(6)]
    else:
        sessions = [session_over(MemoryStore() if kind == "memory" else DiskStore(tmp_path))] * 6
    parts = [TEXTS[start : start + 6] for start in range(6)]
    results = together(
        [
            lambda session=session, part=part: session.add(part, batch_tokens=1)
            for session, part in zip(sessions, parts, strict=True)
        ]
    )
    assert set(prefills.values()) == {1}
    assert len(prefills) == 11
    assert sum({id(one): one.prefilled for one in sessions}.values()) == 11
    for part, keys, session in zip(parts, results, sessions, strict=True):
        assert keys == session.add(part)
        assert all(key in session.store for key in keys)
    if kind != "several":
        assert sorted(sessions[0].keys) == sorted({key for keys in results for key in keys})


def test_when_the_first_fails_another_takes_over(
    monkeypatch: pytest.MonkeyPatch, prefills: Counter[tuple[int, ...]]
) -> None:
    store = MemoryStore()
    session = session_over(store)
    real, failed = store.put, []

    def full(document: Any, **options: Any) -> str:
        if not failed:
            failed.append(document)
            raise StoreFullError("no room")
        return real(document, **options)

    monkeypatch.setattr(store, "put", full)
    results = together([lambda: session.add(TEXTS)] * 6)
    [error] = [each for each in results if isinstance(each, Exception)]
    assert isinstance(error, StoreFullError)
    assert session.prefilled == 11
    assert set(prefills.values()) == {2}
    assert all(key in store for keys in results if keys is not error for key in keys)


@given(
    st.lists(st.lists(st.sampled_from(range(6)), min_size=1, max_size=6), min_size=2, max_size=5),
    st.sampled_from([1, 16, 1000]),
    st.sets(st.integers(0, 4)),
)
def test_any_overlap_in_any_order_ends(
    lists: list[list[int]], batch_tokens: int, failing: set[int]
) -> None:
    """Also where some of the puts fail: who did not fail has all that it asked for."""
    store = MemoryStore()
    session = session_over(store)
    puts, lock, real = 0, threading.Lock(), store.put

    def sometimes(document: Any, **options: Any) -> str:
        nonlocal puts
        with lock:
            puts += 1
            number = puts - 1
        if number in failing:
            raise StoreFullError("no room")
        return real(document, **options)

    store.put = sometimes  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        seen = count_prefills(patch)
        results = together(
            [
                lambda own=own: session.add([TEXTS[i] for i in own], batch_tokens=batch_tokens)
                for own in lists
            ]
        )
    if not failing:
        assert set(seen.values()) == {1}
    assert sum(isinstance(each, Exception) for each in results) <= len(failing)
    for keys in results:
        if isinstance(keys, list):
            assert all(key in store for key in keys)
            assert torch.equal(store.get(keys[0]).prefix_ids, torch.tensor(session.prefix_ids))
        else:
            assert isinstance(keys, StoreFullError)
