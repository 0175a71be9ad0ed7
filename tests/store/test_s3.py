"""A remote store against a real S3 server that is well; `test_faults.py` has one that is not."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import ifkv
from faulty_proxy import FaultyProxy
from ifkv.cli import main
from ifkv.errors import (
    DocumentNotFoundError,
    InvalidInputError,
    StoreNotFoundError,
)
from ifkv.store import RemoteStore, key_of, ranges
from ifkv.testing import random_document, tiny_model, tiny_tokenizer
from s3_bucket import KEY, objects, open_at, s3
from stored_documents import DOCUMENT, PREFIX, same

TEXTS = ["The lamp is red.", "The door is green and old.", "It rains in the valley."]
QUESTION = "Which colour is the door?"
TOKENIZER = tiny_tokenizer()


@pytest.fixture
def store(proxy: FaultyProxy, bucket: str) -> RemoteStore:
    made = open_at(proxy, bucket)
    made.put(DOCUMENT)
    return made


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
