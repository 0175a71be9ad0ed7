"""An HTTP proxy before a real server, which throttles, refuses, cuts, damages or stalls."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

_ERROR = "<Error><Code>{code}</Code><Message>{code}, says the proxy.</Message></Error>"


class Request(NamedTuple):
    """What somebody asked for."""

    method: str
    path: str
    bytes: str  # the range, or nothing


class FaultyProxy:
    """Passes requests on, until it is told to do something else with some of them.

    Args:
        host: Of the server behind it.
        port: Of the server behind it.

    Attributes:
        fault: None, or "throttle", "deny", "cut", "damage", "stall" or "drop".
        times: How many more requests it befalls.
        method: Those of one method only; of any if empty.
        part: What a path has in it to be seen, and befallen.
        seen: All requests so far.
    """

    def __init__(self, host: str, port: int):
        self.behind = host, port
        self.seen: list[Request] = []
        self.part = ""
        self.released = threading.Event()
        self.heal()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def heal(self) -> None:
        """Pass everything on from now on, and let go of what was stalled."""
        self.released.set()
        self.fault: str | None = None
        self.times, self.method = 0, ""

    def ail(self, fault: str, *, times: int = 10**9, method: str = "") -> None:
        """Do something to the next requests."""
        self.released.clear()
        self.times, self.method, self.fault = times, method, fault

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def _fault_of(self, request: Request) -> str | None:
        if self.part not in request.path:
            return None  # of somebody who was left behind, and still tries
        self.seen.append(request)
        if self.fault is None or self.times <= 0 or self.method not in ("", request.method):
            return None
        self.times -= 1
        return self.fault

    def _handler(self) -> Any:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                asked = self.headers.get("Range", "")[len("bytes=") :]
                fault = proxy._fault_of(Request(self.command, self.path, asked))
                if fault == "stall":
                    proxy.released.wait(60)
                if fault in ("stall", "drop"):
                    self.close_connection = True
                    return
                if fault in ("throttle", "deny"):
                    code = "SlowDown" if fault == "throttle" else "AccessDenied"
                    self.reply(503 if fault == "throttle" else 403, [], _ERROR.format(code=code))
                    return
                connection = http.client.HTTPConnection(*proxy.behind, timeout=30)
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                data, headers = answer.read(), answer.getheaders()
                connection.close()
                if fault == "damage" and data:
                    # Of a whole object the client would notice it by S3's own checksum.
                    headers = [each for each in headers if "checksum" not in each[0].lower()]
                    middle = len(data) // 2
                    data = data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :]
                self.reply(answer.status, headers, data, cut=fault == "cut")

            def reply(
                self, status: int, headers: list[tuple[str, str]], body: Any, cut: bool = False
            ) -> None:
                data = body.encode() if isinstance(body, str) else body
                self.send_response_only(status)
                length = str(len(data))
                for name, value in headers:
                    if name.lower() == "content-length":
                        length = value  # of a HEAD, which has no body
                    elif name.lower() not in ("connection", "transfer-encoding"):
                        self.send_header(name, value)
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data[: len(data) // 2] if cut else data)
                if cut:
                    self.wfile.flush()
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        for method in ("GET", "HEAD", "PUT", "POST", "DELETE"):
            setattr(Handler, f"do_{method}", Handler.answer)
        return Handler

    def requests(self, work: Callable[[], Any]) -> list[Request]:
        """What was asked for while something was done."""
        before = len(self.seen)
        work()
        return self.seen[before:]
