"""The pages, asked over real sockets: by those who speak HTTP, and by those who do not."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import tracemalloc
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from patience import PATIENCE_S, until
from test_metrics import WATCHED, Scraped

from ublkwatch.health import Health
from ublkwatch.metrics import Metrics
from ublkwatch.probes import Probes
from ublkwatch.scrape import Reply, Scrapes

CLIENTS_MAX = 32
MANY = 200
LONG_S = 10 * PATIENCE_S  # nothing is over because its time is
BIG = bytes(20 << 20)  # more than all buffers of the kernel's hold

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[[], Awaitable[Streams]]
Work = Callable[[Connect, Scrapes], Awaitable[None]]


async def hello() -> Reply:
    return Reply.line(200, "hello")


async def big() -> Reply:
    return Reply(200, BIG)


async def bug() -> Reply:
    raise RuntimeError("a bug")


def serve(work: Work, *, request_s: float = LONG_S, answer_s: float = LONG_S) -> None:
    """Run a test against pages; whatever the server did not handle fails it."""
    unhandled: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, what: unhandled.append(what))
        pages = {"/hello": hello, "/big": big, "/bug": bug}
        scrapes = Scrapes(pages, request_s=request_s, answer_s=answer_s)
        async with listening(scrapes) as connect:
            await asyncio.wait_for(work(connect, scrapes), PATIENCE_S)

    asyncio.run(main())
    assert unhandled == []


@contextlib.asynccontextmanager
async def listening(scrapes: Scrapes | Probes) -> Any:
    if isinstance(scrapes, Probes):
        port = await scrapes.start({"enabled": True, "address": "127.0.0.1", "port": 0})
    else:
        port = await scrapes.start("127.0.0.1", 0)
    opened: list[asyncio.StreamWriter] = []

    async def connect() -> Streams:
        streams = await asyncio.open_connection("127.0.0.1", port, limit=1 << 16)
        opened.append(streams[1])
        return streams

    try:
        yield connect
    finally:
        scrapes.close()
        for writer in opened:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


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


@pytest.mark.parametrize("path", ["/hello", "/hello?name=x"])
def test_a_page_is_served_whole(path: str) -> None:
    async def work(connect: Connect, _: Scrapes) -> None:
        head, body = await ask(connect, get(path))
        assert head.startswith("HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\n")
        assert "Content-Length: 6\r\n" in head
        assert body == "hello\n"

    serve(work)


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        (get("/"), "404 Not Found"),
        (get("/hellox"), "404 Not Found"),
        (get("/\udcff".encode(errors="surrogateescape").decode("latin-1")), "404 Not Found"),
        (get("/hello", "POST"), "405 Method Not Allowed"),
        (get("/hello", "BREW"), "405 Method Not Allowed"),
        ("GET /hello\r\n\r\n", "400 Bad Request"),
        ("GET  /hello HTTP/1.1\r\n\r\n", "400 Bad Request"),
        ("PRI * HTTP/2.0\r\n\r\n", "400 Bad Request"),
        ("\r\n\r\n", "400 Bad Request"),
        (get("/hello") + "x" * 1000, "200 OK"),
        ("x" * 100_000, "431 Request Header Fields Too Large"),
        ("GET /hello HTTP/1.1\r\n" + "x: y\r\n" * 3000, "431 Request Header Fields Too Large"),
        (get("/bug"), "503 Service Unavailable"),
    ],
)
def test_every_question_has_its_answer(request_text: str, status: str) -> None:
    async def work(connect: Connect, _: Scrapes) -> None:
        head, body = await ask(connect, request_text)
        assert head.splitlines()[0] == f"HTTP/1.1 {status}"
        assert body.count("\n") == 1
        assert ("Allow: GET, HEAD" in head) == status.startswith("405")

    serve(work)


def test_head_is_answered_without_a_body() -> None:
    async def work(connect: Connect, _: Scrapes) -> None:
        head, body = await ask(connect, get("/hello", "HEAD"))
        assert head.startswith("HTTP/1.1 200 OK")
        assert "Content-Length: 6\r\n" in head
        assert body == ""

    serve(work)


def test_a_client_that_goes_amid_its_question_harms_nobody() -> None:
    async def work(connect: Connect, scrapes: Scrapes) -> None:
        _, writer = await connect()
        writer.write(b"GET /hello HTTP/1.1\r\nHo")
        writer.write_eof()
        await until(lambda: not scrapes.clients, "it is let go")
        head, body = await ask(connect, get("/hello"))
        assert ("200 OK" in head, body) == (True, "hello\n")

    serve(work)


def test_a_silent_client_has_its_time_and_no_more() -> None:
    async def work(connect: Connect, scrapes: Scrapes) -> None:
        reader, _ = await connect()
        assert await reader.read() == b""
        assert scrapes.refused == 0

    serve(work, request_s=0.2)


def test_a_slow_reader_has_its_time_and_no_more() -> None:
    async def work(connect: Connect, scrapes: Scrapes) -> None:
        reader, writer = await connect()
        writer.write(get("/big").encode())
        await until(lambda: scrapes.clients, "it is served")
        await until(lambda: not scrapes.clients, "it is let go")
        got = 0
        with contextlib.suppress(ConnectionResetError):
            while data := await reader.read(1 << 16):
                got += len(data)
        assert got < len(BIG)

    serve(work, answer_s=0.2)


def test_200_silent_clients_keep_no_scrape_out() -> None:
    async def work(connect: Connect, scrapes: Scrapes) -> None:
        for _ in range(MANY):
            await connect()
        for _ in range(3):
            _, body = await ask(connect, get("/hello"))
            assert body == "hello\n"
        await until(lambda: scrapes.refused >= MANY - CLIENTS_MAX, "the oldest have to go")

    serve(work)


def test_who_has_asked_is_let_go_after_those_who_have_not() -> None:
    async def work(connect: Connect, scrapes: Scrapes) -> None:
        reader, writer = await connect()
        writer.write(get("/big").encode())
        begun = await reader.readexactly(100)
        for _ in range(MANY):
            await connect()
        await until(lambda: scrapes.refused > 100, "silent ones have to go")
        rest = await reader.read(-1)
        assert (begun + rest).endswith(BIG[-1000:])
        assert len(rest) > len(BIG) - 100

    serve(work)


def test_200_clients_that_do_not_read_keep_no_scrape_out_and_take_no_memory() -> None:
    async def work(connect: Connect, scrapes: Scrapes) -> None:
        gc.collect()
        tracemalloc.start()
        try:
            for _ in range(MANY):
                reader, writer = await connect()
                reader._transport.pause_reading()  # type: ignore[attr-defined]
                writer.write(get("/big").encode())
            for _ in range(3):
                head, body = await ask(connect, get("/hello"))
                assert ("200 OK" in head, body) == (True, "hello\n")
            await until(lambda: scrapes.refused >= MANY - CLIENTS_MAX, "the oldest have to go")
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert most < len(BIG)  # of which no client has a copy

    serve(work)


# --- what is served -------------------------------------------------------------------------------


class Supervisor:
    """Health and metrics, whose clock and polls the test has."""

    def __init__(self) -> None:
        self.now, self.polls = 100.0, 0
        self.health = Health(lambda: self.polls, 1.0, lambda: self.now)
        self.metrics: Metrics = Scraped(WATCHED).metrics

    def asks(self, *paths: str) -> list[tuple[str, str]]:
        """Return the first line of the head, and the body, of each page."""

        async def main() -> list[tuple[str, str]]:
            async with listening(Probes(self.metrics, self.health)) as connect:
                answers = [await ask(connect, get(path)) for path in paths]
                return [(head.splitlines()[0], body) for head, body in answers]

        return asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


GOOD = ("HTTP/1.1 200 OK", "ok\n")
BAD = "HTTP/1.1 503 Service Unavailable"


def test_the_metrics_are_served() -> None:
    ((status, body),) = Supervisor().asks("/metrics")
    assert status == "HTTP/1.1 200 OK"
    assert 'ublkwatch_server_up{device="ublkb0"} 1.0\n' in body


def test_it_is_ready_when_all_devices_were_looked_at() -> None:
    supervisor = Supervisor()
    before = (BAD, "the first look at all devices is not over\n")
    assert supervisor.asks("/readyz", "/healthz") == [before, GOOD]
    supervisor.polls = 1
    assert supervisor.asks("/readyz", "/healthz") == [GOOD, GOOD]


def test_it_is_unwell_when_no_poll_comes_to_its_end() -> None:
    supervisor = Supervisor()
    supervisor.polls = 1
    supervisor.health.beat(0)
    supervisor.now += 100
    supervisor.health.wrote()
    supervisor.health.beat(0)
    said = "no look at all devices was over for 100 s\n"
    assert supervisor.asks("/healthz", "/readyz") == [(BAD, said), GOOD]
    supervisor.polls = 2
    supervisor.health.beat(0)
    assert supervisor.asks("/healthz") == [GOOD]


def test_it_is_unwell_while_the_runtime_directory_cannot_be_written() -> None:
    supervisor = Supervisor()
    supervisor.health.wrote("No space left on device")
    said = "the runtime directory cannot be written: No space left on device\n"
    assert supervisor.asks("/healthz") == [(BAD, said)]
    supervisor.health.wrote()
    assert supervisor.asks("/healthz") == [GOOD]


def test_it_is_unwell_when_a_write_hangs() -> None:
    supervisor = Supervisor()
    supervisor.now += 100
    supervisor.polls = 1
    supervisor.health.beat(0)
    said = "nothing was written to the runtime directory for 100 s\n"
    assert supervisor.asks("/healthz") == [(BAD, said)]


def test_the_lag_is_the_largest_of_the_last_minute() -> None:
    supervisor = Supervisor()
    assert supervisor.health.lag_s() == 0
    for now, late_s in ((110, 0.5), (120, 2), (130, 1), (140, 0.1)):
        supervisor.now = now
        supervisor.health.beat(late_s)
    for now, expected in ((140, 2), (179, 2), (181, 1), (191, 0.1), (201, 0)):
        supervisor.now = now
        assert supervisor.health.lag_s() == expected
