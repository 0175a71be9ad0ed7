"""Answer questions over cached documents by HTTP: one model, one lock, the standard library.

python examples/server.py --model path/to/model --store path/to/store
"""

from __future__ import annotations

import argparse
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import ifkv
from ifkv.errors import IfkvError

MAX_BODY = 8 * 2**20


class Busy(Exception):
    """Raised when too many requests wait already."""


class Service:
    """Session that one request at a time may use, while a few others wait.

    Args:
        session: Session that answers.
        queue: Requests that may wait or run at once.
        max_tokens: Most tokens of context that a question may have.
    """

    def __init__(self, session: ifkv.Session, *, queue: int = 16, max_tokens: int = 32_768):
        self._session = session
        self._max_tokens = max_tokens
        self._places = threading.BoundedSemaphore(queue)
        self._model = threading.Lock()

    def add(self, texts: list[str]) -> dict[str, Any]:
        """Encode documents and return their keys."""
        return self._run(lambda: {"documents": self._session.add(texts)})

    def ask(self, question: str, documents: list[str], **options: Any) -> dict[str, Any]:
        """Answer a question over documents."""

        def work() -> dict[str, Any]:
            length = len(self._session.context_ids(documents))
            if length > self._max_tokens:
                raise ValueError(f"{length} tokens of context; at most {self._max_tokens} here.")
            answer = self._session.ask(question, documents=documents, **options)
            return {
                "answer": answer.text,
                "finish_reason": answer.finish_reason,
                "seconds_to_first_token": answer.ttft_seconds,
            }

        return self._run(work)

    def _run(self, work: Any) -> dict[str, Any]:
        if not self._places.acquire(blocking=False):
            raise Busy
        try:
            with self._model:
                return work()
        finally:
            self._places.release()


class Handler(BaseHTTPRequestHandler):
    """Handler of POST /documents and POST /ask, with JSON in and out."""

    service: Service
    timeout = 30  # seconds for a client to send its request

    def do_POST(self) -> None:
        """Answer a request; tell the client about its own errors only, and log ours."""
        try:
            status, body = 200, self._answer(self._body())
        except Busy:
            status, body = 503, {"error": "too many requests wait; try again"}
        except (IfkvError, ValueError, TypeError) as error:
            status, body = 400, {"error": str(error)}
        except Exception as error:
            self.log_error("%r", error)
            status, body = 500, {"error": "internal error"}
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> dict[str, Any]:
        length = int(self.headers.get("Content-Length", 0))
        if not 0 < length <= MAX_BODY:
            raise ValueError(f"a body of 1 to {MAX_BODY} bytes is needed; this one has {length}.")
        body = json.loads(self.rfile.read(length))
        if not isinstance(body, dict):
            raise ValueError("the body must be a JSON object.")
        return body

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        if self.path == "/documents":
            return self.service.add(body.get("texts", []))
        if self.path == "/ask":
            # Only options that any client may set: some of generate()'s are expensive.
            tokens = body.get("max_new_tokens")  # None: the model's generation config decides
            ratio = float(body.get("ratio", 0.15))
            return self.service.ask(
                body.get("question", ""),
                body.get("documents", []),
                ratio=ratio,
                max_new_tokens=None if tokens is None else min(int(tokens), 512),
            )
        raise ValueError(f"there is no {self.path}; POST to /documents or /ask.")


def make_server(service: Service, host: str, port: int) -> ThreadingHTTPServer:
    """Return a server that is not running yet; port 0 takes a free port."""
    handler = type("BoundHandler", (Handler,), {"service": service})
    return ThreadingHTTPServer((host, port), handler)


def main() -> None:
    """Load a model and serve it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ifkv.store import DiskStore, MemoryStore, TieredStore, default_store_path

    parser = argparse.ArgumentParser(description="Questions over cached documents by HTTP.")
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--store", default=str(default_store_path()), help="folder")
    parser.add_argument("--dtype", default="float32", help="as in ifkv encode")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--queue", type=int, default=16, help="requests that may wait")
    parser.add_argument("--max-tokens", type=int, default=32_768, help="most tokens of context")
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=given.dtype).eval()
    store = TieredStore(MemoryStore(4 * 2**30), DiskStore(given.store, max_bytes=100 * 2**30))
    session = ifkv.Session(model, AutoTokenizer.from_pretrained(given.model), store=store)
    service = Service(session, queue=given.queue, max_tokens=given.max_tokens)
    make_server(service, "127.0.0.1", given.port).serve_forever()


if __name__ == "__main__":
    main()
