"""An S3 that fails, stalls and answers slowly: a server between the tested one and a real one, with rules.

A rule looks at each request and says what becomes of it. It may wait for something, too: then the request does.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from support.s3 import BUCKET, S3, SIGNED


@dataclass(frozen=True)
class Asked:
    """One request. `key`: of the object, "" for the bucket itself."""

    method: str
    key: str
    body: bytes
    headers: frozenset[str] = frozenset()  # their names, in small letters

    @property
    def is_of_chunk(self) -> bool:
        return self.key.endswith(".chunk")


@dataclass(frozen=True)
class Answer:
    """What a rule may say instead of nothing, which lets a request through.

    `status`: answered without asking the store. `code`: in its body. `cut`: so many bytes of the store's answer arrive,
    then the connection ends; `drop`: none does. `after`: the store was asked first, and did it.
    """

    status: int = 0
    code: str = ""
    cut: int | None = None
    drop: bool = False
    after: bool = False


Rule = Callable[[Asked], Answer | None]


class Proxied:
    """The store behind the proxy, and what it was asked. `rule` may be changed at any time."""

    def __init__(self, s3: S3) -> None:
        self.s3 = s3
        self.rule: Rule = lambda _: None
        self.hides_conditions = False  # a store that knows no conditional put
        self.asked: list[Asked] = []
        self.done: list[Asked] = []
        self._lock = threading.Lock()
        self.under_way = 0  # requests for chunks
        self.under_way_max = 0

    def count(self, method: str, part: str = "") -> int:
        """How many requests with this method and a key with this part came."""
        return sum(asked.method == method and part in asked.key for asked in self.asked)

    @contextlib.contextmanager
    def counting(self, asked: Asked) -> Iterator[None]:
        with self._lock:
            self.asked.append(replace(asked, body=b""))
            self.under_way += asked.is_of_chunk
            self.under_way_max = max(self.under_way_max, self.under_way)
        try:
            yield
        finally:
            with self._lock:
                self.done.append(replace(asked, body=b""))
                self.under_way -= asked.is_of_chunk


@contextlib.contextmanager
def proxied(upstream: S3) -> Iterator[Proxied]:
    """A proxy in front of `upstream` until the block ends; its rules are let go of first by whoever set them."""
    host, _, port = upstream.endpoint.partition("://")[2].partition(":")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = urlsplit(self.path)
            names = frozenset(name.lower() for name in self.headers)
            asked = Asked(self.command, parts.path.removeprefix(f"/{BUCKET}").lstrip("/"), body, names)
            with found.counting(asked):
                answer = found.rule(asked)
                if answer is None or answer.after or answer.cut is not None:
                    status, headers, content = self.ask(body)
                else:
                    status, headers, content = 0, [], b""
                if answer is not None and answer.drop:
                    self.close_connection = True
                    return
                if answer is not None and answer.status:
                    status, headers = answer.status, []
                    content = f"<Error><Code>{answer.code}</Code></Error>".encode() if answer.code else b""
            cut = None if answer is None else answer.cut
            self.answer(status, headers, content, cut)

        def ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            connection = http.client.HTTPConnection(host, int(port), timeout=60)
            headers = dict(self.headers.items())
            if headers.pop("x-goog-if-generation-match", None) == "0":
                headers["if-none-match"] = "*"  # so Google says "only if there is none"
            if headers.get("authorization", "").startswith("Bearer"):
                headers["authorization"] = SIGNED
            if found.hides_conditions:
                headers.pop("if-none-match", None)
            connection.request(self.command, self.path, body or None, headers)
            reply = connection.getresponse()
            content = reply.read()
            connection.close()
            dropped = ["transfer-encoding", "connection", "date", "server"]
            if self.command != "HEAD":  # it tells the length of what a GET would bring
                dropped.append("content-length")
            return reply.status, [(n, v) for n, v in reply.getheaders() if n.lower() not in dropped], content

        def answer(self, status: int, headers: list[tuple[str, str]], content: bytes, cut: int | None) -> None:
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            if "content-length" not in (name.lower() for name, _ in headers):
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[:cut])
            if cut is not None:
                self.close_connection = True

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

        def log_message(self, format: str, *args: object) -> None:
            return None

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: object, client_address: object) -> None:
            return None  # who asked has gone: that is what some tests are about

    with Server(("127.0.0.1", 0), Handler) as server:
        found = Proxied(replace(upstream, endpoint=f"http://127.0.0.1:{server.server_address[1]}"))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield found
        finally:
            server.shutdown()
            thread.join()
