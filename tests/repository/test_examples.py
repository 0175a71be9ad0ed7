"""The programs under examples/, run on a tiny model. The store among them is tested with ours."""

from __future__ import annotations

import json
import sqlite3
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from server import Busy, Service, make_server
from sqlite_store import SqliteStore

import ifkv
from ifkv.errors import StoreCorruptionError
from ifkv.selectors import registry
from ifkv.testing import random_document, tiny_model, tiny_tokenizer

TEXTS = ["The lamp is red.", "The door is green."]


@pytest.fixture
def session() -> ifkv.Session:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    return ifkv.Session(tiny_model(vocab_size=len(tokenizer)), tokenizer)


# The server


@pytest.fixture
def url(session: ifkv.Session) -> Iterator[str]:
    server = make_server(Service(session, max_tokens=140), "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def post(url: str, body: Any) -> tuple[int, dict[str, Any]]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=60) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_the_server_answers_as_the_session_does(url: str, session: ifkv.Session) -> None:
    status, added = post(f"{url}/documents", {"texts": TEXTS})
    assert status == 200
    question = {"question": "Which?", "documents": added["documents"], "max_new_tokens": 4}
    status, reply = post(f"{url}/ask", question)
    assert status == 200
    expected = session.ask("Which?", documents=added["documents"], max_new_tokens=4)
    assert reply["answer"] == expected.text
    assert reply["seconds_to_first_token"] > 0


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/ask", {"question": "Which?", "documents": ["0" * 64]}, "not in the store"),
        ("/ask", {"question": "Which?", "documents": []}, "no document"),
        ("/ask", {"question": "", "documents": []}, ""),
        ("/ask", {"question": "Which?", "documents": [1]}, ""),
        ("/ask", {"question": "Which?", "ratio": "x"}, "could not convert"),
        ("/documents", {"texts": ["a" * 100]}, None),
        ("/documents", {"texts": "one string"}, "list of documents"),
        ("/documents", {"texts": [""]}, "blank"),
        ("/documents", b"{", ""),
        ("/documents", b"[]", "JSON object"),
        ("/else", {}, "/documents or /ask"),
    ],
)
def test_the_server_says_what_is_wrong(url: str, path: str, body: Any, words: str | None) -> None:
    status, reply = post(f"{url}{path}", body)
    if words is None:  # right in itself, and too long to be asked
        status, reply = post(f"{url}/ask", {"question": "Which?", **reply})
        words = "at most 140"
    assert status == 400
    assert words in reply["error"]


def test_requests_beyond_the_queue_are_refused_at_once(session: ifkv.Session) -> None:
    service = Service(session, queue=2)
    inside, release = threading.Event(), threading.Event()

    def slow() -> dict[str, Any]:
        inside.set()
        assert release.wait(60)
        return {}

    waiting = [threading.Thread(target=service._run, args=(slow,)) for _ in range(2)]
    waiting[0].start()
    assert inside.wait(60)
    waiting[1].start()
    while service._places.acquire(blocking=False):  # until the second has its place
        service._places.release()
    with pytest.raises(Busy):
        service.add(TEXTS)
    release.set()
    for thread in waiting:
        thread.join()
    assert len(service.add(TEXTS)["documents"]) == 2


# The store


def test_the_sqlite_store_serves_nothing_damaged(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "db")
    key = store.put(random_document(1, length=4))
    with sqlite3.connect(tmp_path / "db") as db:
        (data,) = db.execute("SELECT data FROM documents").fetchone()
        db.execute("UPDATE documents SET data = ?", (data[:-1] + bytes([data[-1] ^ 1]),))
    with pytest.raises(StoreCorruptionError, match="cannot be trusted"):
        store.get(key)
    assert key not in store


# The selector


def test_a_selector_of_one_s_own_takes_the_rarest_tokens(
    session: ifkv.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Importing registers it; other tests shall not find it.
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    from rare_tokens import RareTokens

    session.add(["The lamp is red.", "The lamp is red. The lamp is old."])
    ready = session.prepare("Which?", selector=RareTokens(power=2), ratio=0.1)
    assert ready.selector == "rare-tokens:power=2.0"
    ids = ready.cache.token_ids
    counts = (ids[:, None] == ids[None]).sum(dim=1)
    start = ready.cache.document_slices[0].stop
    taken = counts[ready.slots]
    left = torch.ones(len(ids), dtype=torch.bool)
    left[:start] = False
    left[ready.slots] = False
    assert 0 < len(taken) < len(ids) - start
    assert taken.max() <= counts[left].min()
