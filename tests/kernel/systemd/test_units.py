"""Servers as systemd's transient units, with the real systemd of the lab's guest.

lab/lab.py run --init systemd -- .venv/bin/python -m pytest tests/kernel/systemd
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ublkwatch.bus import Patience
from ublkwatch.care import Job, Origin, Run
from ublkwatch.launch import Launcher
from ublkwatch.model import TAG_VARIABLE
from ublkwatch.transient import SLICE
from ublkwatch.units import unit_name

DEADLINE_S = 300.0  # this bounds only hangs: several guests share few, emulated CPUs
PATIENCE = Patience(60, 60, start_s=120, leftover_s=60, autopsy_s=60)  # systemd is emulated, too
NOBODY = 65534
SAY = """
import os, socket, sys, time
def say(text):
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.sendto(text.encode(), os.environ["NOTIFY_SOCKET"])
"""
ECHO = SAY + "say('READY=1'); print('got', input(), flush=True); time.sleep(600)"
SLEEP = "import time; print('up', flush=True); time.sleep(600)"
# A front end that exits 0 and leaves the server behind, as most recover commands do.
LEAVE = "import os, time\nif os.fork(): os._exit(0)\nos.setsid(); time.sleep(600)"
PYTHON = "/usr/bin/python3"  # of whichever user: the tests' own may be root's alone


async def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {DEADLINE_S:g} s: {what}")
        await asyncio.sleep(0.02)


class Home:
    def __init__(self, directory: Path, patience: Patience) -> None:
        self.directory, self.ready, self.tags = directory, list[str](), list[str]()
        self._patience = patience
        self.launcher = self._launcher()

    def _launcher(self) -> Launcher:
        return Launcher(self.directory, self.ready.append, kind="systemd", patience=self._patience)

    async def start(
        self,
        code: str,
        *,
        tag: str = "1-1-1",
        name: str = "test",
        run: Run = Run(),  # noqa: B008 - frozen
        origin: Origin = Origin(),  # noqa: B008 - frozen
    ) -> int:
        self.tags.append(tag)
        return await self.launcher.start(tag, Job(name, (PYTHON, "-c", code), run, origin))

    def restart(self) -> None:
        self.launcher.close()
        self.launcher = self._launcher()

    async def end(self) -> None:
        for tag in self.tags:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DEADLINE_S):
                    await self.launcher.end(tag)
        self.launcher.close()


def at_home(
    directory: Path, work: Callable[[Home], Awaitable[None]], patience: Patience = PATIENCE
) -> None:
    async def main() -> None:
        home = Home(directory, patience)
        try:
            async with asyncio.timeout(2 * DEADLINE_S):
                await work(home)
        finally:
            await home.end()

    asyncio.run(main())


@pytest.fixture
def place() -> Iterator[Path]:
    """A runtime directory that servers of any user can look into."""
    directory = Path(f"/run/ublkwatch-test-{os.getpid()}-{time.monotonic_ns()}")
    directory.mkdir(mode=0o755)
    yield directory
    subprocess.run(["rm", "-r", str(directory)], check=True)


def show(unit: str, key: str) -> str:
    command = ["systemctl", "show", "--value", "-p", key, unit]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def proc(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def environment(pid: int) -> dict[str, str]:
    words = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(word.split("=", 1) for word in words if word)


def alive(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_server_is_a_service_in_our_slice_with_fifo_tag_and_ready(place: Path) -> None:
    async def work(home: Home) -> None:
        pid = await home.start(ECHO, name="ublkb7")
        unit = unit_name("ublkb7")
        assert unit == "ublkwatch-ublkb7.service"
        assert show(unit, "MainPID") == str(pid)
        assert show(unit, "Slice") == SLICE
        assert home.launcher.pids("1-1-1") == {pid}
        given = environment(pid)
        assert given[TAG_VARIABLE] == "1-1-1"
        assert given["NOTIFY_SOCKET"] == str(place / "attempts/1-1-1/notify")
        await until(lambda: home.ready == ["1-1-1"], "READY=1 is heard")
        home.launcher.write_line("1-1-1", "hello")
        await until(lambda: not home.launcher.unread("1-1-1"), "the line was read")
        journal = ["journalctl", "-q", "-o", "cat", "-t", "ublkb7"]
        await until(
            lambda: b"got hello" in subprocess.run(journal, check=True, capture_output=True).stdout,
            "the server's words are in the journal, under its name",
        )

    at_home(place, work)


def test_no_shutdown_stops_a_server_or_what_it_is_in(place: Path) -> None:
    async def work(home: Home) -> None:
        await home.start(ECHO, name="ublkb7")
        for unit in (unit_name("ublkb7"), SLICE):
            assert show(unit, "ActiveState") == "active"
            assert show(unit, "Conflicts") == ""

    at_home(place, work)


def test_user_limits_and_priorities_are_as_asked(place: Path) -> None:
    run = Run(
        user=f"{NOBODY}:{NOBODY}",
        cwd="/usr",
        env=(("COLOUR", "blue and green"),),
        limits=(("nofile", "1000:2000"), ("memlock", "infinity")),
        oom_score_adj=-500,
        cpus=(1,),
    )

    async def work(home: Home) -> None:
        pid = await home.start(ECHO, run=run)
        status = proc(pid, "status")
        assert f"Uid:\t{NOBODY}\t{NOBODY}" in status
        assert "Cpus_allowed_list:\t1\n" in status
        limits = proc(pid, "limits").splitlines()
        found = {line[:25].strip(): line[25:].split()[:2] for line in limits}
        assert found["Max open files"] == ["1000", "2000"]
        assert found["Max locked memory"] == ["unlimited", "unlimited"]
        assert proc(pid, "oom_score_adj").strip() == "-500"
        assert os.readlink(f"/proc/{pid}/cwd") == "/usr"  # noqa: PTH115
        assert environment(pid)["COLOUR"] == "blue and green"
        await until(lambda: home.ready, "a server of another user is heard")

    at_home(place, work)


def test_the_user_and_the_groups_of_the_lost_server_are_kept(place: Path) -> None:
    async def work(home: Home) -> None:
        pid = await home.start(SLEEP, origin=Origin(uid=NOBODY, gid=12, groups=(20, 21)))
        status = proc(pid, "status")
        assert f"Uid:\t{NOBODY}\t{NOBODY}\t{NOBODY}" in status
        assert "Gid:\t12\t12\t12" in status
        assert "Groups:\t12 20 21 \n" in status

    at_home(place, work)


@pytest.mark.parametrize(
    ("code", "how", "status", "words"),
    [
        ("raise SystemExit('no backing file')", "exit status 1", 1, "no backing file"),
        ("print('not needed')", "exit status 0", 0, "not needed"),
        ("import os; print('x', flush=True); os.kill(os.getpid(), 9)", "SIGKILL", None, "x"),
    ],
)
def test_systemd_says_how_a_process_ended_and_the_journal_its_last_words(
    *,
    place: Path,
    code: str,
    how: str,
    status: int | None,
    words: str,
) -> None:
    async def work(home: Home) -> None:
        pid = await home.start("input()\n" + code)
        assert home.launcher.must_ask(pid)
        home.launcher.write_line("1-1-1", "")
        await until(lambda: not alive(pid), "it ended")
        assert home.launcher.how_ended(pid) == ("unknown", None)
        deadline = time.monotonic() + DEADLINE_S
        said = await home.launcher.autopsy("1-1-1", pid)
        while said[2] != words and time.monotonic() < deadline:  # systemd or journal may be late
            assert said in ((how, status, ""), ("unknown", None, ""))
            said = await home.launcher.autopsy("1-1-1", pid)
        assert said == (how, status, words)

    at_home(place, work)


def test_words_are_found_that_the_journal_read_after_their_end(place: Path) -> None:
    async def work(home: Home) -> None:
        journald = int(show("systemd-journald", "MainPID"))
        os.kill(journald, signal.SIGSTOP)
        try:
            pid = await home.start("input(); print('the last', flush=True); raise SystemExit(1)")
            home.launcher.write_line("1-1-1", "")
            unit = unit_name("test")
            await until(lambda: show(unit, "ActiveState") == "failed", "systemd saw it")
        finally:
            os.kill(journald, signal.SIGCONT)
        deadline = time.monotonic() + DEADLINE_S
        said = await home.launcher.autopsy("1-1-1", pid)
        while not said[2] and time.monotonic() < deadline:
            said = await home.launcher.autopsy("1-1-1", pid)
        assert said == ("exit status 1", 1, "the last")

    at_home(place, work)


def test_of_a_process_that_lives_or_is_not_the_first_nothing_is_guessed(place: Path) -> None:
    async def work(home: Home) -> None:
        pid = await home.start(SLEEP)
        assert (await home.launcher.autopsy("1-1-1", pid))[:2] == ("unknown", None)
        assert (await home.launcher.autopsy("1-1-1", os.getpid()))[:2] == ("unknown", None)
        assert (await home.launcher.autopsy("9-9-9", pid))[:2] == ("unknown", None)
        assert not home.launcher.must_ask(os.getpid())

    at_home(place, work)


def test_what_a_front_end_leaves_behind_lives_on_and_is_ended_with_the_attempt(
    place: Path,
) -> None:
    async def work(home: Home) -> None:
        front = await home.start(LEAVE)
        await until(lambda: not alive(front), "the front end exits")
        await until(lambda: show(unit_name("test"), "SubState") == "exited", "systemd saw it")
        (server,) = home.launcher.pids("1-1-1")
        await asyncio.sleep(1)  # as long as systemd could take to stop what is left
        assert alive(server)
        await home.launcher.end("1-1-1")
        assert not alive(server)
        assert home.launcher.pids("1-1-1") == set()

    at_home(place, work)


@pytest.mark.parametrize("ending", ["SIGKILL", "exit", "front end"])
def test_the_next_server_takes_the_name_of_one_that_has_ended(place: Path, ending: str) -> None:
    codes = {"SIGKILL": SLEEP, "exit": "input()", "front end": LEAVE}

    async def work(home: Home) -> None:
        pids = set()
        for seq in range(1, 4):
            tag = f"1-1-{seq}"
            pid = await home.start(codes[ending], tag=tag)
            assert pid not in pids
            pids.add(pid)
            assert home.launcher.root(tag) == tag
            assert (place / "attempts" / tag / "unit").read_text().split()[0] == unit_name("test")
            if ending == "exit":
                home.launcher.write_line(tag, "")
            if ending != "SIGKILL":
                await until(lambda pid=pid: not alive(pid), "it ended")  # type: ignore[misc]
            for each in home.launcher.pids(tag):
                os.kill(each, signal.SIGKILL)

    at_home(place, work)


def test_an_attempt_that_is_over_has_no_part_in_the_next_ones_unit(place: Path) -> None:
    async def work(home: Home) -> None:
        os.kill(await home.start(SLEEP, tag="1-1-1"), signal.SIGKILL)
        pid = await home.start(SLEEP, tag="1-1-2")
        assert (place / "attempts/1-1-2/unit").read_text().split()[0] == unit_name("test")
        assert home.launcher.pids("1-1-1") == set()
        await home.launcher.end("1-1-1")
        assert alive(pid)
        assert home.launcher.pids("1-1-2") == {pid}

    at_home(place, work)


def test_beside_one_that_does_not_end_the_next_gets_a_name_of_its_own(place: Path) -> None:
    async def work(home: Home) -> None:
        first = await home.start(SLEEP, tag="1-1-1")
        second = await home.start(SLEEP, tag="1-1-2")
        assert alive(first)
        assert alive(second)
        name = (place / "attempts/1-1-2/unit").read_text().split()[0]
        assert name == "ublkwatch-test-1-1-2.service"
        assert home.launcher.pids("1-1-1") == {first}
        assert home.launcher.pids("1-1-2") == {second}

    at_home(place, work, replace(PATIENCE, leftover_s=0.5))


def test_after_our_restart_the_unit_is_found_again(place: Path) -> None:
    async def work(home: Home) -> None:
        pid = await home.start(ECHO)
        await until(lambda: home.ready, "READY=1 is heard")
        home.restart()
        home.launcher.listen("1-1-1")
        assert alive(pid)
        assert home.launcher.pids("1-1-1") == {pid}
        assert home.launcher.must_ask(pid)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not alive(pid), "it ended")
        assert (await home.launcher.autopsy("1-1-1", pid))[:2] == ("SIGKILL", None)

    at_home(place, work)


def test_an_attempt_of_which_only_the_name_was_kept_is_ended_too(place: Path) -> None:
    async def work(home: Home) -> None:
        pid = await home.start(SLEEP)
        (place / "attempts/1-1-1/cgroup").unlink()  # as if we had died before it was known
        home.restart()
        await home.launcher.end("1-1-1")
        assert not alive(pid)

    at_home(place, work)


def test_the_bus_may_go_away_and_come_back(place: Path) -> None:
    async def work(home: Home) -> None:
        await home.start(SLEEP, name="one", tag="1-1-1")
        home.launcher._units._bus.close()
        pid = await home.start(SLEEP, name="two", tag="2-1-1")
        assert home.launcher.pids("2-1-1") == {pid}

    at_home(place, work)


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (Run(cwd="/no/such/directory"), "at step CHDIR"),
        (Run(unit="ublkwatch-no-such-unit"), "not found"),
        (Run(user="no-such-user"), "no-such-user.*name, uid or uid:gid is meant"),
    ],
)
def test_what_cannot_be_started_says_why(place: Path, run: Run, says: str) -> None:
    async def work(home: Home) -> None:
        with pytest.raises(OSError, match=says):
            await home.start(SLEEP, run=run)
        await home.start(SLEEP)  # the name is free again

    at_home(place, work)


def test_a_named_unit_is_started_found_and_ended(place: Path) -> None:
    path = Path("/run/systemd/system/ublkwatch-named.service")
    path.write_text(f'[Service]\nExecStart={PYTHON} -c "{SLEEP}"\nDefaultDependencies=no\n')
    subprocess.run(["systemctl", "daemon-reload"], check=True)

    async def work(home: Home) -> None:
        run = Run(unit="ublkwatch-named")
        pid = await home.start("", run=run)
        assert show("ublkwatch-named", "MainPID") == str(pid)
        assert home.launcher.pids("1-1-1") == {pid}
        with pytest.raises(OSError, match="has processes still"):
            await home.start("", run=run, tag="1-1-2")
        await home.launcher.end("1-1-1")
        assert not alive(pid)
        assert await home.start("", run=run, tag="1-1-3") != pid

    try:
        at_home(place, work)
    finally:
        path.unlink()
        subprocess.run(["systemctl", "daemon-reload"], check=True)


def test_many_are_started_at_once(place: Path) -> None:
    async def work(home: Home) -> None:
        starts = (home.start(SLEEP, name=f"many{n}", tag=f"{n}-1-1") for n in range(16))
        pids = await asyncio.gather(*starts)
        assert len(set(pids)) == 16
        assert all(home.launcher.pids(f"{n}-1-1") == {pid} for n, pid in enumerate(pids))

    at_home(place, work)


def test_auto_is_systemd_here_and_fork_where_the_bus_is_missing(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(home: Home) -> None:
        for address, by_unit in ((None, True), ("unix:path=/no/such/bus", False)):
            if address:
                monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
            launcher = Launcher(place, home.ready.append, kind="auto", patience=PATIENCE)
            try:
                tag = f"1-1-{2 + by_unit}"
                home.tags.append(tag)
                pid = await launcher.start(tag, Job("auto", (sys.executable, "-c", SLEEP)))
                assert launcher.must_ask(pid) is by_unit
                assert launcher.pids(tag) == {pid}
                await launcher.end(tag)
            finally:
                launcher.close()

    at_home(place, work)
