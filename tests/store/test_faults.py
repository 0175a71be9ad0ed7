"""A remote store over an S3 server that fails: one family of errors, and answers all the same."""

from __future__ import annotations

import contextlib
import functools
import socket
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ifkv
from faulty_proxy import FaultyProxy
from ifkv.errors import (
    InvalidInputError,
    StoreCorruptionError,
    StoreUnavailableError,
    StoreWarning,
)
from ifkv.store import DiskStore, MemoryStore, RemoteStore, TieredStore, key_of, ranges
from ifkv.testing import assert_close, random_document, tiny_model, tiny_tokenizer
from s3_bucket import KEY, hurried, objects, open_at, s3
from stored_documents import DOCUMENT, PREFIX, same

TEXTS = ["The lamp is red.", "The door is green and old.", "It rains in the valley."]
QUESTION = "Which colour is the door?"
TOKENIZER = tiny_tokenizer()
FAULTS = ["throttle", "deny", "cut", "stall", "drop"]


@pytest.fixture
def store(proxy: FaultyProxy, bucket: str) -> RemoteStore:
    made = open_at(proxy, bucket)
    made.put(DOCUMENT)
    return made


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_family_of_errors_within_the_deadline(
    store: RemoteStore, proxy: FaultyProxy, bucket: str, fault: str
) -> None:
    """For everything that a store does; and the objects are there as before."""
    before = objects(proxy, bucket)
    lazy = store.get(KEY, lazy=True)
    assert lazy.lazy
    calls: list[Callable[[], Any]] = [
        lambda: store.get(KEY),
        lambda: store.get(KEY, lazy=True),
        lambda: store.put(random_document(7)),
        lambda: store.delete(KEY),
        lambda: list(store.keys()),
        lambda: KEY in store,
    ]
    for call in calls:
        proxy.ail(fault)
        hurried(store)
        started = time.monotonic()
        if fault == "cut":  # of a HEAD or a short answer nothing is missing
            with contextlib.suppress(StoreUnavailableError):
                call()
        else:
            with pytest.raises(StoreUnavailableError, match=bucket) as caught:
                call()
            assert caught.value.reason
        assert time.monotonic() - started < 20
        proxy.heal()
        if fault == "cut":
            hurried(store, 60).put(DOCUMENT)
    after = objects(proxy, bucket)
    for path, data in before.items():
        assert after[path] == data
    assert store._corrupt == 0


def test_a_store_that_was_long_silent_rests(store: RemoteStore, proxy: FaultyProxy) -> None:
    """A question over many documents does not wait for each of them."""
    proxy.ail("stall")
    hurried(store, 1.2)
    with pytest.raises(StoreUnavailableError, match="no answer within"):
        store.get(KEY)
    started = time.monotonic()
    for _ in range(50):
        with pytest.raises(StoreUnavailableError, match="no answer within"):
            store.get(KEY)
    assert time.monotonic() - started < 1.2
    proxy.heal()
    assert store._files._failed is not None
    store._files._deadline = 60
    store._files._failed = (time.monotonic() - 11, "")
    same(store.get(KEY), DOCUMENT)


@pytest.mark.parametrize("fault", ["throttle", "cut", "drop", "damage"])
@pytest.mark.parametrize("lazy", [False, True])
def test_what_happens_once_is_not_noticed(
    store: RemoteStore, proxy: FaultyProxy, bucket: str, fault: str, lazy: bool
) -> None:
    before = objects(proxy, bucket)
    proxy.ail(fault, times=1, method="GET")
    same(store.get(KEY, lazy=lazy), DOCUMENT)
    document = random_document(3, layers=40, length=600, prefix=None)
    key = store.put(document)
    found = store.get(key, lazy=lazy)
    proxy.ail(fault, times=1, method="GET")
    same(found, document)
    assert proxy.times == (0 if lazy else 1)
    store.delete(key)
    assert objects(proxy, bucket) == before
    assert store.stats().corrupt == 0


@pytest.mark.parametrize("lazy", [False, True])
def test_what_is_damaged_each_time_is_refused_and_left_where_it_is(
    store: RemoteStore, proxy: FaultyProxy, bucket: str, lazy: bool
) -> None:
    before = objects(proxy, bucket)
    proxy.ail("damage", method="GET")
    for _ in range(2):
        with pytest.raises(StoreCorruptionError, match="each of the 3 times") as caught:
            _ = store.get(KEY, lazy=lazy).keys
        assert caught.value.key in (KEY, key_of(PREFIX))
    proxy.heal()
    assert objects(proxy, bucket) == before
    # To others it is as good as ever; here a put replaces it, with the same.
    same(open_at(proxy, bucket).get(KEY, lazy=lazy), DOCUMENT)
    assert caught.value.key not in store
    store.put(DOCUMENT)
    assert caught.value.key in store
    same(store.get(KEY, lazy=lazy), DOCUMENT)
    assert objects(proxy, bucket) == before


@pytest.mark.parametrize("size", ["nothing", "half", "a byte too few"])
def test_an_object_that_is_too_short_is_corrupt_and_is_replaced(
    proxy: FaultyProxy, bucket: str, size: str
) -> None:
    """Its server says that it is so short; a body that was cut is not such evidence."""
    store = open_at(proxy, bucket)
    for document in (DOCUMENT, random_document(3, layers=40, length=600, prefix=None)):
        key = store.put(document)
        path = store._path(key)
        data = s3(proxy).cat_file(path)
        kept = {"nothing": 0, "half": len(data) // 2, "a byte too few": len(data) - 1}[size]
        s3(proxy).pipe_file(path, data[:kept])
        for lazy in (False, True):
            with pytest.raises(StoreCorruptionError):
                _ = store.get(key, lazy=lazy).keys
        store.put(document)
        same(store.get(key), document)


def test_no_credentials(
    proxy: FaultyProxy, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    store = open_at(proxy, bucket, skip_instance_cache=True)
    with pytest.raises(StoreUnavailableError, match=r"NoCredentials.*check .*the credentials"):
        _ = KEY in store


def test_a_server_that_is_gone(proxy: FaultyProxy) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    store = RemoteStore("s3://bucket/x", endpoint_url=f"http://127.0.0.1:{port}", deadline=2)
    for call in (lambda: KEY in store, lambda: store.get(KEY), lambda: store.put(DOCUMENT)):
        with pytest.raises(StoreUnavailableError, match="s3://bucket/x"):
            call()


def session_over(store: Any, **options: Any) -> ifkv.Session:
    model = tiny_model(vocab_size=len(TOKENIZER), dtype=torch.float32, num_layers=6)
    return ifkv.Session(model, TOKENIZER, store=store, **options)


@functools.cache
def wanted() -> ifkv.Answer:
    session = session_over(MemoryStore())
    session.add(TEXTS)
    return session.ask(QUESTION, max_new_tokens=4)


def as_wanted(answer: ifkv.Answer) -> None:
    assert_close(answer.first_logits, wanted().first_logits, what="logits", tolerance=1e-6)
    assert answer.token_ids.tolist() == wanted().token_ids.tolist()


@pytest.mark.parametrize("fault", [*FAULTS, "damage"])
def test_a_question_goes_on_by_prefilling(proxy: FaultyProxy, bucket: str, fault: str) -> None:
    store = open_at(proxy, bucket)
    session, stranger = session_over(store), session_over(store)
    keys = session.add(TEXTS)
    before = objects(proxy, bucket)
    hurried(store)
    proxy.ail(fault, method="" if fault == "stall" else "GET")
    with pytest.warns(StoreWarning, match="prefilled again"):
        as_wanted(session.ask(QUESTION, max_new_tokens=4))
    assert session.prefilled == 6
    for answer in (
        lambda: session.ask_many([QUESTION], max_new_tokens=4)[0],
        lambda: session.conversation().ask(QUESTION, max_new_tokens=4),
    ):
        with pytest.warns(StoreWarning, match="prefilled again"):
            assert answer().token_ids.tolist() == wanted().token_ids.tolist()
    wrong = StoreCorruptionError if fault == "damage" else StoreUnavailableError
    with pytest.raises(wrong, match=r"its text is not known here. add\(\) its text again"):
        stranger.ask(QUESTION, documents=keys)
    assert objects(proxy, bucket) == before


def test_a_fault_that_comes_while_rows_are_read(
    proxy: FaultyProxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The requests for the heads are answered; those for the rows are not."""
    monkeypatch.setattr(ranges, "HEAD_BYTES", 4096)
    store = open_at(proxy, bucket)
    session = session_over(store)
    keys = session.add(TEXTS)
    prefix = store.get(keys[0]).prefix  # somebody holds it
    real = session.engine.library.get

    def then_ail(*arguments: Any, **options: Any) -> Any:
        found = real(*arguments, **options)
        if options.get("lazy"):
            hurried(store)
            proxy.ail("drop")
        return found

    monkeypatch.setattr(session.engine.library, "get", then_ail)
    for asked in (
        lambda: session.ask(QUESTION, max_new_tokens=4),
        lambda: session.ask_many([QUESTION], max_new_tokens=4)[0],
        lambda: session.conversation().ask(QUESTION, max_new_tokens=4),
    ):
        hurried(store, 60)
        proxy.heal()
        with pytest.warns(StoreWarning, match=r"could not be read .* prefilled again"):
            as_wanted(asked())
    assert session.prefilled == 12
    del prefix


def test_what_was_made_for_want_of_a_store_is_kept_near(proxy: FaultyProxy, bucket: str) -> None:
    remote = open_at(proxy, bucket)
    session_over(remote).add(TEXTS)
    near = MemoryStore()
    session = session_over(TieredStore(near, remote))
    session.add(TEXTS)
    assert session.prefilled == 0
    proxy.ail("deny")
    with pytest.warns(StoreWarning, match=r"could not be read \(PermissionError"):
        as_wanted(session.ask(QUESTION, max_new_tokens=4))
    assert session.prefilled == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_wanted(session.ask(QUESTION, max_new_tokens=4))
    assert session.prefilled == 3


def test_a_damaged_tier_is_passed_over_for_a_sound_one(
    tmp_path: Path, proxy: FaultyProxy, bucket: str
) -> None:
    disk = DiskStore(tmp_path)
    store = TieredStore(disk, open_at(proxy, bucket))
    store.put(DOCUMENT)
    file = disk.folder.file_of(KEY)
    file.write_bytes(file.read_bytes()[:-9] + bytes(9))
    same(store.get(KEY), DOCUMENT)
    assert disk.stats().corrupt == 1
    same(disk.get(KEY), DOCUMENT)


def test_a_deadline_that_is_none() -> None:
    for bad in (0, -1, float("nan")):
        with pytest.raises(InvalidInputError, match="deadline is"):
            RemoteStore("memory://x", deadline=bad)
