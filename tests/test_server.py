"""Servers as processes, with real processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE_S, some_turns, until

from ublkwatch.model import TAG_VARIABLE, ServerId
from ublkwatch.server import Servers, files, read_boot_id

TAG = f"7-1-{os.getpid()}"  # two runs of these tests are not to end each other's servers
SLEEP = "import time; print('up', flush=True); time.sleep(600)"
# The last of the family has a session of its own, no parent of ours, and ignores SIGTERM.
FAMILY = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(600)
    os._exit(0)
os.wait()
time.sleep(600)
"""


@contextlib.contextmanager
def child(
    code: str = SLEEP, *, tag: str = "", arguments: tuple[str, ...] = ()
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a program; give it and the first line that it prints."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, TAG_VARIABLE: tag},
    )
    with process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def with_servers(work: Callable[[Servers, list[ServerId]], Awaitable[None]]) -> None:
    unhandled: list[dict[str, Any]] = []

    async def main() -> None:
        reported: list[ServerId] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: unhandled.append(what))
        servers = Servers(read_boot_id(), lambda server, _: reported.append(server))
        try:
            await asyncio.wait_for(work(servers, reported), PATIENCE_S)
        finally:
            servers.close()

    asyncio.run(main())
    assert unhandled == []


def identify(servers: Servers, process: subprocess.Popen[str]) -> ServerId:
    server = servers.identify(process.pid)
    assert server is not None
    return server


def test_a_living_process_is_identified_and_always_as_the_same() -> None:
    async def work(servers: Servers, _: list[ServerId]) -> None:
        with child() as (process, _line), child() as (other, _line):
            server = identify(servers, process)
            assert (server.pid, server.boot_id) == (process.pid, read_boot_id())
            assert server == servers.identify(process.pid) != servers.identify(other.pid)

    with_servers(work)


def test_a_zombie_is_nobody() -> None:
    async def work(servers: Servers, _: list[ServerId]) -> None:
        with child("") as (process, _line):
            await asyncio.to_thread(os.waitid, os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            assert servers.identify(process.pid) is None

    with_servers(work)


@pytest.mark.parametrize("pid", [1, 0, -1, (1 << 22) + 1])
def test_init_no_number_and_a_free_pid_are_nobody(pid: int) -> None:
    async def work(servers: Servers, _: list[ServerId]) -> None:
        assert servers.identify(pid) is None

    with_servers(work)


def test_the_end_of_a_watched_process_is_reported_once() -> None:
    async def work(servers: Servers, reported: list[ServerId]) -> None:
        with child() as (process, _line):
            server = identify(servers, process)
            servers.watch(server)
            servers.watch(server)
            await some_turns()
            assert reported == []
            process.kill()
            await until(lambda: reported == [server], "the end is reported")
            await some_turns()
            assert len(reported) == 1

    with_servers(work)


@pytest.mark.parametrize("other", [{"start_ticks": 1}, {"boot_id": "of another boot"}])
def test_a_reused_pid_is_reported_as_ended_at_once_and_never_killed(
    other: dict[str, int | str],
) -> None:
    async def work(servers: Servers, reported: list[ServerId]) -> None:
        with child() as (process, _line):
            server = identify(servers, process)
            former = replace(server, **other)  # type: ignore[arg-type]
            servers.watch(former)
            await until(lambda: reported == [former], "watch reports it")
            servers.kill(former)
            await until(lambda: len(reported) > 1, "kill reports it")
            assert servers.identify(process.pid) == server

    with_servers(work)


def test_watching_a_process_that_has_ended_reports_it() -> None:
    async def work(servers: Servers, reported: list[ServerId]) -> None:
        with child() as (process, _line):
            server = identify(servers, process)
            process.kill()
            process.wait()
            servers.watch(server)
            await until(lambda: reported == [server], "its end is reported")

    with_servers(work)


def test_kill_ends_the_process_and_no_other() -> None:
    async def work(servers: Servers, reported: list[ServerId]) -> None:
        with child() as (process, _line), child() as (other, _line):
            servers.kill(identify(servers, process))
            await until(lambda: reported, "its end is reported")
            assert (process.wait(), other.poll()) == (-9, None)

    with_servers(work)


def test_closing_lets_the_processes_live_unwatched() -> None:
    async def work(servers: Servers, reported: list[ServerId]) -> None:
        with child() as (process, _line):
            servers.watch(identify(servers, process))
            servers.close()
            assert process.poll() is None
            process.kill()
            process.wait()
            await some_turns()
            assert reported == []

    with_servers(work)


def test_a_whole_family_is_found_by_its_tag_and_ended() -> None:
    async def work(servers: Servers, _reported: list[ServerId]) -> None:
        with child(FAMILY, tag=TAG) as (process, last), child(tag=TAG + "0") as (other, _):
            try:
                found = await servers.tagged(TAG)
                assert {server.pid for server in found} == {process.pid, int(last)}
                await servers.end_tagged(TAG)
                assert process.wait() == -9
                assert servers.identify(int(last)) is None
                assert other.poll() is None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(last), 9)

    with_servers(work)


def test_a_process_has_the_nodes_that_it_opened(tmp_path: Path) -> None:
    (node := tmp_path / "ublkc0").touch()
    opening = f"import sys; node = open(sys.argv[1]); {SLEEP}"
    with child(opening, arguments=(str(node),)) as (holder, _), child() as (other, _):
        assert str(node) in files(holder.pid)
        assert f"{node}0" not in files(holder.pid)
        assert str(node) not in files(other.pid)
    assert files(holder.pid) == set()


LINEAGE = """
import os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(child.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("raise SystemExit(3)", 3),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("import os; os.kill(os.getpid(), 15)", -15),
    ],
)
def test_how_somebody_elses_child_ended_is_known(code: str, status: int, tmp_path: Path) -> None:
    go = tmp_path / "go"
    wait = f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)\n"
    seen: list[tuple[int, int | None]] = []

    async def story() -> None:
        servers = Servers(read_boot_id(), lambda server, how: seen.append((server.pid, how)))
        with child(LINEAGE, arguments=(wait + code,)) as (_process, line):
            server = servers.identify(int(line))
            assert server is not None
            servers.watch(server)
            go.touch()
            await until(lambda: seen, "its end is reported")
        servers.close()
        assert seen == [(server.pid, status)]

    asyncio.run(story())


def test_how_a_process_ended_that_was_somebody_else_nobody_knows() -> None:
    async def story() -> None:
        seen: list[int | None] = []
        servers = Servers(read_boot_id(), lambda _, how: seen.append(how))
        with child() as (process, _line):
            servers.watch(replace(identify(servers, process), start_ticks=1))
            await until(lambda: seen == [None], "it is reported")
        servers.close()

    asyncio.run(story())


class Drawer:
    """Keeps descriptors between two lives, as the service manager does."""

    def __init__(self) -> None:
        self.kept: dict[str, int] = {}

    def keep(self, name: str, descriptor: int) -> None:
        self.kept.setdefault(name, os.dup(descriptor))

    def take(self, name: str) -> int | None:
        return os.dup(self.kept[name]) if name in self.kept else None

    def drop(self, name: str) -> None:
        if name in self.kept:
            os.close(self.kept.pop(name))


def test_how_a_process_ended_while_nobody_watched_is_known_by_its_pidfd_that_was_kept() -> None:
    async def story() -> None:
        seen: list[int | None] = []
        drawer = Drawer()
        with child(LINEAGE, arguments=("import time; time.sleep(600)",)) as (_process, line):
            first = Servers(read_boot_id(), lambda _, __: None, keeper=drawer)
            server = first.identify(int(line))
            assert server is not None
            first.watch(server)
            first.close()
            assert len(drawer.kept) == 1
            os.kill(server.pid, 9)
            await until(lambda: first.identify(server.pid) is None, "it has ended")
            second = Servers(read_boot_id(), lambda _, how: seen.append(how), keeper=drawer)
            second.watch(server)
            await until(lambda: seen == [-9], "how it ended is known")
            assert drawer.kept == {}
            second.close()

    asyncio.run(story())
