"""A remote store over a plain web server, with ranges and without."""

from __future__ import annotations

import functools
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ifkv.errors import (
    DocumentNotFoundError,
    StoreError,
    StoreUnavailableError,
)
from ifkv.store import DiskStore, RemoteStore, key_of
from ifkv.testing import random_document
from stored_documents import DOCUMENT, same


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
    for call in (lambda: store.get(key_of(DOCUMENT), lazy=lazy), lambda: key_of(DOCUMENT) in store):
        with pytest.raises(StoreUnavailableError):  # not "not there"
            call()
