"""A remote store against a real S3 server, well and ill, and against a plain web server."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from moto.server import ThreadedMotoServer

import ifkv
from faulty_proxy import FaultyProxy
from ifkv.cli import main
from ifkv.errors import (
    DocumentNotFoundError,
    InvalidInputError,
    StoreCorruptionError,
    StoreError,
    StoreNotFoundError,
    StoreUnavailableError,
    StoreWarning,
)
from ifkv.store import DiskStore, MemoryStore, RemoteStore, TieredStore, key_of, ranges
from ifkv.testing import assert_bit_equal, assert_close, random_document, tiny_model, tiny_tokenizer
from stored_documents import DOCUMENT, PREFIX, same

KEY = key_of(DOCUMENT)
TEXTS = ["The lamp is red.", "The door is green and old.", "It rains in the valley."]
QUESTION = "Which colour is the door?"
TOKENIZER = tiny_tokenizer()
FAULTS = ["throttle", "deny", "cut", "stall", "drop"]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    yield moto.get_host_and_port()
    moto.stop()


@pytest.fixture(scope="module")
def shared_proxy(server: tuple[str, int]) -> Iterator[FaultyProxy]:
    """One for all tests: to make an S3 client takes longer than they do."""
    made = FaultyProxy(*server)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("AWS_ACCESS_KEY_ID", "testing"),
            ("AWS_SECRET_ACCESS_KEY", "testing"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
            ("AWS_EC2_METADATA_DISABLED", "true"),
            ("AWS_ENDPOINT_URL", made.url),
            ("AWS_MAX_ATTEMPTS", "1"),
        ):
            patch.setenv(name, value)
        patch.delenv("AWS_PROFILE", raising=False)
        yield made
    made.close()


@pytest.fixture
def proxy(shared_proxy: FaultyProxy) -> Iterator[FaultyProxy]:
    yield shared_proxy
    shared_proxy.heal()
    shared_proxy.part = ""


def s3(proxy: FaultyProxy) -> Any:
    import s3fs

    return s3fs.S3FileSystem(endpoint_url=proxy.url, use_listings_cache=False)


@pytest.fixture
def bucket(proxy: FaultyProxy) -> str:
    name = f"bucket-{uuid4().hex}"
    s3(proxy).mkdir(name)
    proxy.part = name
    return name


def open_at(proxy: FaultyProxy, bucket: str, **options: Any) -> RemoteStore:
    return RemoteStore(f"s3://{bucket}/folder", endpoint_url=proxy.url, **options)


def hurried(store: RemoteStore, deadline: float = 0.5) -> RemoteStore:
    """The same, which waits for nothing long, and has forgotten what failed before."""
    store._files._deadline, store._files._failed = deadline, None
    return store


@pytest.fixture
def store(proxy: FaultyProxy, bucket: str) -> RemoteStore:
    made = open_at(proxy, bucket)
    made.put(DOCUMENT)
    return made


def objects(proxy: FaultyProxy, bucket: str) -> dict[str, bytes]:
    proxy.heal()
    files = s3(proxy)
    return {path: files.cat_file(path) for path in files.find(bucket)}


@pytest.mark.parametrize("lazy", [False, True])
def test_what_was_put_is_got(
    store: RemoteStore, proxy: FaultyProxy, bucket: str, lazy: bool
) -> None:
    """With a file system that takes another argument before the range."""
    before = objects(proxy, bucket)
    assert len(before) == 2
    same(store.get(KEY, lazy=lazy), DOCUMENT)
    same(open_at(proxy, bucket).get(KEY, lazy=lazy), DOCUMENT)
    assert objects(proxy, bucket) == before
    assert store.stats().corrupt == 0
    assert sorted(store.keys()) == sorted([KEY, key_of(PREFIX)])
    store.delete(KEY)
    assert KEY not in store
    for missing in (lambda: store.delete(KEY), lambda: store.get(KEY, lazy=lazy)):
        with pytest.raises(DocumentNotFoundError):
            missing()


def test_what_others_do_is_seen_at_once(proxy: FaultyProxy, bucket: str) -> None:
    store, other = open_at(proxy, bucket), open_at(proxy, bucket, skip_instance_cache=True)
    assert len(store) == 0  # a listing that must not be believed later
    other.put(DOCUMENT)
    assert KEY in store
    assert len(store) == 2
    other.delete(KEY)
    assert KEY not in store


def test_a_mistyped_bucket_is_refused_and_not_made(
    proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StoreNotFoundError, match="no bucket 'buckte'"):
        open_at(proxy, "buckte")
    model = tiny_model(vocab_size=len(TOKENIZER))
    with pytest.raises(InvalidInputError, match="no bucket 'buckte'"):
        ifkv.Session(model, TOKENIZER, store="s3://buckte/folder")
    assert not s3(proxy).exists("buckte")
    assert all("buckte" not in request.path for request in proxy.seen if request.method == "PUT")


def test_the_command_line_refuses_it_in_a_sentence(
    proxy: FaultyProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_model(vocab_size=len(TOKENIZER)).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "a.md").write_text(TEXTS[0])
    for where, words in (("s3://buckte/x", "no bucket 'buckte'"), ("abacus://x", "abacus")):
        arguments = ["encode", str(tmp_path / "a.md"), "--model", str(tmp_path / "model")]
        monkeypatch.setattr(sys, "argv", ["ifkv", *arguments, "--store", where])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        [line] = [line for line in capsys.readouterr().err.splitlines() if "Error" in line]
        assert words in line


def test_few_requests_whatever_the_number_of_layers(
    proxy: FaultyProxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = random_document(3, layers=40, length=600, prefix=None)
    store = open_at(proxy, bucket)
    key = store.put(document)
    size = 2 * document.values.nbytes
    assert size > 4 * ranges.HEAD_BYTES
    fresh = open_at(proxy, bucket)
    asked = proxy.requests(lambda: same(fresh.get(key), document))
    assert [request.method for request in asked] == ["GET", "GET"]
    monkeypatch.setattr(ranges, "PIECE_BYTES", size // 4)
    for lazy in (False, True):
        asked = proxy.requests(lambda lazy=lazy: same(fresh.get(key, lazy=lazy), document))
        assert [request.method for request in asked] == ["GET"] * 5
        assert len(set(asked)) == 5, "no byte is fetched twice"
    small = store.put(DOCUMENT)
    fresh.get(key_of(PREFIX))
    held = fresh.get(small)
    asked = proxy.requests(lambda: fresh.get(small, lazy=True).keys)
    assert len(asked) == 1, "a prefix that somebody holds is not looked for"
    del held


def test_reads_run_beside_one_another(
    proxy: FaultyProxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that each take a moment: eight of them take little longer than one."""
    document = random_document(3, layers=40, length=600, prefix=None)
    store = open_at(proxy, bucket)
    key = store.put(document)
    monkeypatch.setattr(ranges, "PIECE_BYTES", 2 * document.values.nbytes // 8)
    at_once, most, lock = 0, 0, threading.Lock()
    real = store._files.read

    def slow(*arguments: Any) -> bytes:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.1)
        with lock:
            at_once -= 1
        return real(*arguments)

    monkeypatch.setattr(store._files, "read", slow)
    same(store.get(key), document)
    assert most > 3


WRITER = """
import sys
from ifkv.store import RemoteStore
from ifkv.testing import random_document
store = RemoteStore(sys.argv[1])
prefix = random_document(1000, length=2)
for seed in map(int, sys.argv[2].split(",")):
    document = random_document(seed, prefix=prefix)
    key = store.put(document)
    assert key in store and store.get(key).keys.equal(document.keys)
"""


def test_two_processes_write_at_once(proxy: FaultyProxy, bucket: str) -> None:
    sides = ["0,1,2,3,4,5", "5,4,3,2,1,0,6"]
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, f"s3://{bucket}/folder", side])
        for side in sides
    ]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    store = open_at(proxy, bucket)
    prefix = random_document(1000, length=2)
    for seed in range(7):
        document = random_document(seed, prefix=prefix)
        same(store.get(key_of(document)), document)
    assert len(store) == 8
    assert len(objects(proxy, bucket)) == 8


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


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("ranged", [False, True])
def test_a_plain_web_server_is_read(tmp_path: Path, lazy: bool, ranged: bool) -> None:
    large = random_document(3, layers=40, length=600, prefix=None)
    with DiskStore(tmp_path) as disk:
        for document in (DOCUMENT, large):
            disk.put(document)

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            file = tmp_path / self.path.lstrip("/")
            if not ranged or not asked or not file.is_file():
                super().do_GET()  # without ranges: always the whole
                return
            start, end = map(int, asked.removeprefix("bytes=").split("-"))
            data = file.read_bytes()[start : end + 1]
            self.send_response(206)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    web = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path)))
    threading.Thread(target=web.serve_forever, args=(0.05,), daemon=True).start()
    store = RemoteStore(f"http://127.0.0.1:{web.server_address[1]}", deadline=2)
    for document in (DOCUMENT, large):
        assert key_of(document) in store
        same(store.get(key_of(document), lazy=lazy), document)
    assert key_of(random_document(5)) not in store
    with pytest.raises(DocumentNotFoundError):
        store.get(key_of(random_document(5)), lazy=lazy)
    with pytest.raises(StoreError, match="can only be read"):
        store.put(random_document(5))
    web.shutdown()
    web.server_close()
    for call in (lambda: store.get(KEY, lazy=lazy), lambda: KEY in store):
        with pytest.raises(StoreUnavailableError):  # not "not there"
            call()


def test_a_deadline_that_is_none() -> None:
    for bad in (0, -1, float("nan")):
        with pytest.raises(InvalidInputError, match="deadline is"):
            RemoteStore("memory://x", deadline=bad)


def test_a_disk_that_does_not_read_is_no_evidence_against_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many open files, for instance; nothing is set aside for it, here or at the next open."""
    with DiskStore(tmp_path) as disk:
        disk.put(DOCUMENT)
        file = disk.folder.file_of(KEY)
        real = os.open

        def full(path: Any, *arguments: Any, **options: Any) -> int:
            if str(path).endswith(".safetensors"):
                raise OSError(24, "Too many open files")
            return real(path, *arguments, **options)

        with monkeypatch.context() as patched:
            patched.setattr(os, "open", full)
            with pytest.raises(StoreUnavailableError, match=r"Too many open files.*left where"):
                disk.get(KEY)
            [first, *_] = disk.verify()
            assert isinstance(first, StoreUnavailableError)
        assert file.exists()
        same(disk.get(KEY), DOCUMENT)
    (tmp_path / "index.sqlite3").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", full)
        DiskStore(tmp_path).close()
    with DiskStore(tmp_path) as disk:
        same(disk.get(KEY), DOCUMENT)
        assert disk.folder.quarantine_files() == []
        assert_bit_equal(disk.get(KEY).keys, DOCUMENT.keys, what="keys")
