"""The metrics page, asked over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from ublkwatch.metrics import Metrics, Page

CLIENTS_MAX = 16
SERVED_FOR_S = 5.0
PATIENCE_S = 15.0

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[[], Awaitable[Streams]]


def serve(work: Callable[[Connect], Awaitable[None]]) -> None:
    """Run a test against a page; whatever the page did not handle fails it."""
    unhandled: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, what: unhandled.append(what))
        page = Page(Metrics(list))
        port = await page.start("127.0.0.1", 0)
        opened: list[asyncio.StreamWriter] = []

        async def connect() -> Streams:
            streams = await asyncio.open_connection("127.0.0.1", port)
            opened.append(streams[1])
            return streams

        try:
            await asyncio.wait_for(work(connect), PATIENCE_S)
        finally:
            page.close()
            for writer in opened:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

    asyncio.run(main())
    assert unhandled == []


async def ask(connect: Connect, request: str) -> tuple[str, str]:
    """Return head and body of the answer; both are empty when there was none."""
    reader, writer = await connect()
    writer.write(request.encode())
    try:
        answer = (await reader.read()).decode()
    except ConnectionResetError:  # closed before it had read all that we sent
        answer = ""
    head, _, body = answer.partition("\r\n\r\n")
    return head, body


def get(path: str, verb: str = "GET") -> str:
    return f"{verb} {path} HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize("path", ["/metrics", "/metrics?name=x"])
def test_the_page_is_served_whole(path: str) -> None:
    async def work(connect: Connect) -> None:
        head, body = await ask(connect, get(path))
        assert head.startswith("HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=")
        assert f"Content-Length: {len(body.encode())}\r\n" in head
        assert "ublkwatch_build_info{" in body
        assert body.endswith("\n")

    serve(work)


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        (get("/"), "404 Not Found"),
        (get("/metricsx"), "404 Not Found"),
        (get("/metrics", "POST"), "405 Method Not Allowed"),
        ("GET /metrics\r\n\r\n", "405 Method Not Allowed"),
        ("\r\n\r\n", "405 Method Not Allowed"),
    ],
)
def test_everything_else_is_refused(request_text: str, status: str) -> None:
    async def work(connect: Connect) -> None:
        head, body = await ask(connect, request_text)
        assert head.splitlines()[0] == f"HTTP/1.1 {status}"
        assert "ublkwatch_" not in body

    serve(work)


def test_head_is_answered_without_a_body() -> None:
    async def work(connect: Connect) -> None:
        head, body = await ask(connect, get("/metrics", "HEAD"))
        assert head.startswith("HTTP/1.1 200 OK")
        assert "Content-Length: 0" not in head
        assert body == ""

    serve(work)


@pytest.mark.parametrize("request_text", ["x" * 100_000, "GET /metrics HTTP/1.1\r\nHo"])
def test_a_client_that_does_not_speak_http_harms_nobody(request_text: str) -> None:
    async def work(connect: Connect) -> None:
        _, writer = await connect()
        writer.write(request_text.encode())
        writer.write_eof()
        head, _ = await ask(connect, get("/metrics"))
        assert "200 OK" in head

    serve(work)


def test_an_endless_request_line_is_cut_off_without_an_answer() -> None:
    async def work(connect: Connect) -> None:
        assert await ask(connect, "x" * 100_000) == ("", "")

    serve(work)


def test_silent_clients_are_bounded_in_number_and_time_and_others_are_served() -> None:
    async def work(connect: Connect) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        silent = [await connect() for _ in range(CLIENTS_MAX - 1)]
        head, _ = await ask(connect, get("/metrics"))
        assert "200 OK" in head
        silent.append(await connect())
        assert await ask(connect, get("/metrics")) == ("", "")
        assert loop.time() - began < SERVED_FOR_S
        for reader, _ in silent:
            assert await reader.read() == b""
        assert loop.time() - began >= SERVED_FOR_S
        head, _ = await ask(connect, get("/metrics"))
        assert "200 OK" in head

    serve(work)
