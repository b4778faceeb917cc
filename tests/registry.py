"""A registry of container images, as far as a push needs one (OCI's distribution specification)."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class Registry(ThreadingHTTPServer):
    """What was pushed: blobs by their digests, manifests by their names and tags."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.blobs: set[str] = set()
        self.manifests: dict[str, bytes] = {}

    @property
    def name(self) -> str:
        """What stands before an image's name."""
        return f"127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Registry

    def do_GET(self) -> None:
        self._answer(200 if self.path == "/v2/" else 404)

    def do_HEAD(self) -> None:
        self._answer(200 if self.path.rpartition("/")[2] in self.server.blobs else 404)

    def do_POST(self) -> None:
        self._answer(202, Location=f"{self.path}1", Range="0-0")

    def do_PATCH(self) -> None:
        length = len(self._body())
        self._answer(202, Location=self.path, Range=f"0-{length - 1}")

    def do_PUT(self) -> None:
        body, url = self._body(), urlsplit(self.path)
        if "/manifests/" in url.path:
            self.server.manifests[url.path] = body
        else:
            self.server.blobs.update(parse_qs(url.query)["digest"])
        self._answer(201, Location=url.path)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def registry() -> Iterator[Registry]:
    """Run one on loopback."""
    with Registry() as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        try:
            yield made
        finally:
            made.shutdown()
            thread.join()
