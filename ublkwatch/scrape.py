"""Serves pages to those who scrape and probe: over HTTP, and to no more of them than it can.

A small server of our own under asyncio: the client library's starts a thread for every connection,
and answers every path. Each client is bounded in time and in what it may send; where there are too
many, who came first goes, and who has asked for nothing yet before all others. So those who only
hold a connection keep nobody out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

_CONNECTIONS_MAX = 32
_REQUEST_S = 5.0
_ANSWER_S = 15.0  # Prometheus itself waits for 10
_LINGER_S = 1.0
_REQUEST_MAX = 8192
_CHUNK = 1 << 16  # what is with the kernel, or waits for it: a slow reader holds no more
_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}
_log = logging.getLogger("ublkwatch")


@dataclass(frozen=True, slots=True)
class Reply:
    """What a path answers."""

    status: int
    body: bytes
    kind: str = "text/plain; charset=utf-8"
    also: Mapping[str, str] = field(default_factory=dict)  # headers

    @classmethod
    def line(cls, status: int, text: str, **also: str) -> Reply:
        """Say one line."""
        return cls(status, f"{text}\n".encode(), also=also)


Pages = Mapping[str, Callable[[], Awaitable[Reply]]]


class Scrapes:
    """Serves pages, by their paths, for GET and HEAD."""

    def __init__(
        self, pages: Pages, *, request_s: float = _REQUEST_S, answer_s: float = _ANSWER_S
    ) -> None:
        """Serve ``pages``; a client has ``request_s`` to ask, and ``answer_s`` to read."""
        self._pages = pages
        self._request_s, self._answer_s = request_s, answer_s
        self._server: asyncio.Server | None = None
        self._clients: dict[asyncio.Task[None], bool] = {}  # in order; whether they have asked
        self.refused = 0  # how many had to go for the sake of others, ever

    @property
    def clients(self) -> int:
        """Return how many are connected."""
        return len(self._clients)

    async def start(self, address: str, port: int) -> int:
        """Listen and return the port; OSError when the address cannot be had."""
        self._server = await asyncio.start_server(self._accept, address, port, limit=_REQUEST_MAX)
        return int(self._server.sockets[0].getsockname()[1])

    def close(self) -> None:
        """Stop listening, and let go of every client."""
        if self._server is not None:
            self._server.close()
        for task in self._clients:
            task.cancel()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._clients) >= _CONNECTIONS_MAX:
            idle = (task for task, has_asked in self._clients.items() if not has_asked)
            victim = next(idle, None) or next(iter(self._clients))
            del self._clients[victim]
            victim.cancel()
            self.refused += 1
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._clients[task] = False
        task.add_done_callback(lambda done: self._clients.pop(done, None))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(self._request_s):
                method, reply = await self._hear(reader)
            task = asyncio.current_task()
            if task in self._clients:
                self._clients[task] = True
            async with asyncio.timeout(self._answer_s):
                if isinstance(reply, str):
                    reply = await self._look_up(reply)
                await _send(writer, reply, bodyless=method == b"HEAD")
            if reply.status in (400, 431):  # else what it sends still would undo our answer
                writer.write_eof()
                async with asyncio.timeout(_LINGER_S):
                    while await reader.read(_CHUNK):
                        pass
        except (OSError, asyncio.IncompleteReadError):
            pass  # a client that is gone, silent or slow
        except asyncio.CancelledError:
            pass  # turned away, or we stop: nobody waits for this task
        finally:
            if writer.transport.get_write_buffer_size():  # it does not read: no use in waiting
                writer.transport.abort()
            else:
                writer.close()

    async def _hear(self, reader: asyncio.StreamReader) -> tuple[bytes, Reply | str]:
        """Return the method, and which page is asked for, or what is wrong with the question."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return b"", Reply.line(431, f"a request has no more than {_REQUEST_MAX} bytes")
        words = head.partition(b"\r\n")[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return b"", Reply.line(400, "this is no request of HTTP/1")
        method, target, _ = words
        path = target.partition(b"?")[0].decode(errors="replace")
        if path not in self._pages:
            return method, Reply.line(404, f"there is only {', '.join(self._pages)}")
        if method not in (b"GET", b"HEAD"):
            return method, Reply.line(405, "pages are only read", Allow="GET, HEAD")
        return method, path

    async def _look_up(self, path: str) -> Reply:
        try:
            return await self._pages[path]()
        except Exception:  # noqa: BLE001 - a bug over one page harms nothing else
            _log.exception("a bug in ublkwatch, over the page %s", path)
            return Reply.line(503, "a bug in ublkwatch: its log has the details")


async def _send(writer: asyncio.StreamWriter, reply: Reply, *, bodyless: bool) -> None:
    headers = {
        "Content-Type": reply.kind,
        "Content-Length": str(len(reply.body)),
        "Cache-Control": "no-store",
        "Connection": "close",
        **reply.also,
    }
    lines = [f"HTTP/1.1 {reply.status} {_REASONS[reply.status]}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    body = memoryview(b"" if bodyless else reply.body)
    for begin in range(0, len(body), _CHUNK):
        writer.write(body[begin : begin + _CHUNK])
        await writer.drain()
    await writer.drain()
