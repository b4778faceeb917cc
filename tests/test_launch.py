"""The fork launcher, with real servers: small Python programs."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from patience import PATIENCE_S, until

from ublkwatch import trust
from ublkwatch.apart import Apart
from ublkwatch.care import Job
from ublkwatch.identity import Judge
from ublkwatch.launch import Launcher
from ublkwatch.model import TAG_VARIABLE

TAG = f"7-1-{os.getpid()}"  # two runs of these tests are not to end each other's servers
SAY = """
import os, socket, sys, time
def say(text):
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.sendto(text.encode(), os.environ["NOTIFY_SOCKET"])
"""
SLEEP = SAY + "print('up', flush=True); time.sleep(600)"
ECHO = SAY + "say('READY=1'); print('got', input(), flush=True); time.sleep(600)"


class Home:
    """A launcher on a runtime directory, and what it reported."""

    def __init__(self, runtime_dir: Path) -> None:
        self.runtime_dir = runtime_dir
        self.ready: list[str] = []
        self.launcher = Launcher(runtime_dir, self.ready.append)
        self.pids: list[int] = []

    async def start(self, code: str, *arguments: str, tag: str = TAG) -> int:
        pid = await self.launcher.start(tag, Job("test", (sys.executable, "-c", code, *arguments)))
        self.pids.append(pid)
        return pid

    def restart(self, judge: Judge | None = None) -> None:
        """Do as a ublkwatch that ends and begins again."""
        self.launcher.close()
        self.ready = []
        self.launcher = Launcher(self.runtime_dir, self.ready.append, judge=judge)

    def printed(self, tag: str = TAG) -> str:
        path = self.runtime_dir / "attempts" / tag / "output"
        return path.read_text() if path.exists() else ""

    async def exited(self, pid: int) -> None:
        await until(
            lambda: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG), "it exited"
        )

    def end(self) -> None:
        self.launcher.close()
        for pid in self.pids:
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            except (ProcessLookupError, ChildProcessError):
                continue  # it has ended, and was waited for


def at_home(runtime_dir: Path, work: Callable[[Home], Awaitable[None]]) -> None:
    async def main() -> None:
        home = Home(runtime_dir)
        try:
            await asyncio.wait_for(work(home), PATIENCE_S)
        finally:
            home.end()

    asyncio.run(main())


def test_a_server_has_its_own_session_three_descriptors_and_a_clean_environment(
    tmp_path: Path,
) -> None:
    os.environ["UBLKWATCH_TEST_OWN"] = "ours alone"
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)

    async def work(home: Home) -> None:
        pid = await home.start(SLEEP)
        await until(lambda: "up" in home.printed(), "the server runs")
        assert os.getsid(pid) == os.getpgid(pid) == pid
        assert {entry.name for entry in os.scandir(f"/proc/{pid}/fd")} == {"0", "1", "2"}
        given = environment(pid)
        assert given.keys() <= {*allowed, TAG_VARIABLE, "NOTIFY_SOCKET"}
        assert given[TAG_VARIABLE] == TAG
        assert given["PATH"] == os.environ["PATH"]

    allowed = {"PATH", "LANG", "LC_ALL", "TZ", "HOME"}
    try:
        at_home(tmp_path, work)
    finally:
        del os.environ["UBLKWATCH_TEST_OWN"]
        os.close(reading)
        os.close(writing)


def environment(pid: int) -> dict[str, str]:
    words = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(word.split("=", 1) for word in words if word)


def test_the_line_waits_for_a_server_that_reads_later(tmp_path: Path) -> None:
    go = tmp_path / "go"
    code = "import os, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.01)\n" + ECHO

    async def work(home: Home) -> None:
        await home.start(code, str(go))
        home.launcher.write_line(TAG, '{"dev_id": 7}')
        go.touch()
        await until(lambda: 'got {"dev_id": 7}\n' in home.printed(), "the server got its line")

    at_home(tmp_path, work)


def test_the_launchers_end_is_no_end_of_file_and_the_next_one_writes_the_line(
    tmp_path: Path,
) -> None:
    async def work(home: Home) -> None:
        pid = await home.start(ECHO)
        await until(lambda: home.ready, "the server is ready")
        home.restart()
        home.launcher.write_line(TAG, "from the next one")
        await until(lambda: "got from the next one" in home.printed(), "the line arrived")
        assert home.launcher.how_ended(pid) == ("unknown", None)

    at_home(tmp_path, work)


def test_ready_is_told_with_its_tag_and_other_messages_are_not(tmp_path: Path) -> None:
    noise = SAY + "say('STATUS=READY=1'); say('READY=10'); say('X\\nREADY=1'); time.sleep(600)"

    async def work(home: Home) -> None:
        await home.start(noise, tag="noisy")
        await until(lambda: home.ready, "READY=1 in the third message is heard")
        await home.start(ECHO)
        await until(lambda: len(home.ready) > 1, "the other is heard")
        assert home.ready == ["noisy", TAG]

    at_home(tmp_path, work)


def test_after_a_restart_ready_is_heard_again(tmp_path: Path) -> None:
    code = SAY + "input(); say('READY=1'); time.sleep(600)"

    async def work(home: Home) -> None:
        await home.start(code)
        home.restart()
        home.launcher.listen(TAG)
        home.launcher.listen("never-started")
        home.launcher.write_line(TAG, "")
        await until(lambda: home.ready == [TAG], "READY=1 is heard")

    at_home(tmp_path, work)


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("raise SystemExit(3)", ("exit status 3", 3)),
        ("pass", ("exit status 0", 0)),
        ("import os; os.kill(os.getpid(), 9)", ("SIGKILL", None)),
        ("import os; os.kill(os.getpid(), 40)", ("signal 40", None)),
    ],
)
def test_how_a_child_ended_is_told_once(
    tmp_path: Path, code: str, how: tuple[str, int | None]
) -> None:
    async def work(home: Home) -> None:
        pid = await home.start(code)
        await home.exited(pid)
        assert home.launcher.how_ended(pid) == how
        assert home.launcher.how_ended(pid) == ("unknown", None)

    at_home(tmp_path, work)


@pytest.mark.parametrize("program", ["/no/such/program", "/etc/passwd"])
def test_a_program_that_cannot_be_started_is_an_oserror_and_the_tag_is_free_again(
    tmp_path: Path, program: str
) -> None:
    async def work(home: Home) -> None:
        with pytest.raises(OSError, match=program):
            await home.launcher.start(TAG, Job("test", (program,)))
        await home.start(ECHO)
        await until(lambda: home.ready, "the next one with this tag starts")

    at_home(tmp_path, work)


def test_a_line_that_nobody_read_is_told_from_one_that_was_read(tmp_path: Path) -> None:
    async def work(home: Home) -> None:
        deaf = await home.start("pass", tag="deaf")
        assert not home.launcher.unread("deaf"), "no line was written yet"
        home.launcher.write_line("deaf", "hello")
        await home.exited(deaf)
        assert home.launcher.unread("deaf")
        reader = await home.start("input()", tag="reader")
        home.launcher.write_line("reader", "hello")
        await home.exited(reader)
        assert not home.launcher.unread("reader")
        assert not home.launcher.unread("never-started")

    at_home(tmp_path, work)


def test_after_a_restart_a_line_is_called_unread_only_where_that_is_certain(tmp_path: Path) -> None:
    async def work(home: Home) -> None:
        await home.start(SLEEP, tag="waiting")
        home.launcher.write_line("waiting", "once")
        await home.start("input(); " + SLEEP, tag="busy")
        home.launcher.write_line("busy", "once")
        await until(lambda: not home.launcher.unread("busy"), "the line was read")
        home.restart()
        for tag in ("waiting", "busy"):
            home.launcher.write_line(tag, "again")
        assert home.launcher.unread("waiting"), "the first line waits still, and alone"
        assert not home.launcher.unread("busy"), "the first line was read, the second one waits"

    at_home(tmp_path, work)


@pytest.mark.parametrize(
    ("script", "within_s", "expected"),
    [
        ('[ "$UBLKWATCH_DEVICE" = ublkb7 ] && exit 20', PATIENCE_S, ("exit status 20", 20)),
        ("kill -9 $$", PATIENCE_S, ("SIGKILL", None)),
        ("sleep 600", 0.5, ("killed after 0.5 s", None)),
    ],
)
def test_the_operators_command_decides_within_its_time(
    tmp_path: Path, script: str, within_s: float, expected: tuple[str, int | None]
) -> None:
    async def work(home: Home) -> None:
        about = {"UBLKWATCH_DEVICE": "ublkb7"}
        assert await home.launcher.decide(("/bin/sh", "-c", script), about, within_s) == expected

    at_home(tmp_path, work)


class Hanging(Judge):
    """One who looks at a file system that hangs, until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        super().__init__(self._check)

    def _check(self, path: Path, root: Path) -> None:
        if path.name == "hung":
            self.go.wait(PATIENCE_S)
        trust.check_executable(path, root)


def test_file_systems_that_hang_keep_no_other_server_from_being_started(tmp_path: Path) -> None:
    judge = Hanging()

    async def work(home: Home) -> None:
        asyncio.get_running_loop().set_default_executor(Apart())
        home.restart(judge)
        job = Job("test", ("/mnt/hung",))
        launcher, stuck = home.launcher, list[asyncio.Task[object]]()
        for number in range(50):
            stuck.append(asyncio.create_task(launcher.start(f"{TAG}-{number}", job)))
            stuck.append(asyncio.create_task(launcher.decide(("/mnt/hung",), {}, PATIENCE_S)))
        await home.start(ECHO)
        await until(lambda: home.ready == [TAG], "another server is up")
        assert not any(task.done() for task in stuck)
        for task in stuck:
            task.cancel()

    try:
        at_home(tmp_path, work)
    finally:
        judge.go.set()


def test_an_operators_command_that_never_runs_is_given_up(tmp_path: Path) -> None:
    judge = Hanging()

    async def work(home: Home) -> None:
        asyncio.get_running_loop().set_default_executor(Apart())
        home.restart(judge)
        assert await home.launcher.decide(("/hung",), {}, 0.1) == ("killed after 0.1 s", None)

    try:
        at_home(tmp_path, work)
    finally:
        judge.go.set()


def test_an_operators_command_that_exec_refuses_says_why(tmp_path: Path) -> None:
    command = tmp_path / "command"
    command.write_bytes(b"\x7fELF, and nothing else")
    command.chmod(0o755)

    async def work(home: Home) -> None:
        how, code = await home.launcher.decide((str(command),), {}, PATIENCE_S)
        assert code is None
        assert "Exec format error" in how

    at_home(tmp_path, work)


def test_an_operators_command_that_is_missing_decides_nothing(tmp_path: Path) -> None:
    async def work(home: Home) -> None:
        how, code = await home.launcher.decide((str(tmp_path / "missing"),), {}, PATIENCE_S)
        assert code is None
        assert "No such file" in how

    at_home(tmp_path, work)


@pytest.mark.parametrize(
    ("says", "init", "expected"),
    [("stopping", ".", "True"), ("running", ".", "False"), ("stopping", "nowhere", "False")],
)
def test_whether_the_host_shuts_down_is_asked_of_systemd_where_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, init: str, expected: str
) -> None:
    tool = tmp_path / "systemctl"
    tool.write_text(f'#!/bin/sh\n[ "$1" = is-system-running ] && echo {says}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    async def ask() -> bool:
        launcher = Launcher(tmp_path, lambda _: None, tmp_path / init, answer_s=PATIENCE_S)
        return await launcher.shutting_down()

    assert str(asyncio.run(ask())) == expected


def test_a_systemctl_that_ends_at_its_very_deadline_is_no_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "systemctl"
    tool.write_text("#!/bin/sh\nsleep 0.5\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    asking: list[asyncio.Task[bool]] = []

    async def ask() -> None:
        for step in range(20):
            answer_s = 0.85 + step / 100
            launcher = Launcher(tmp_path, lambda _: None, tmp_path, answer_s=answer_s)
            asking.append(asyncio.create_task(launcher.shutting_down()))
            await asyncio.sleep(0)
        await asyncio.sleep(0.3)
        time.sleep(0.7)  # noqa: ASYNC251 - the loop is held up, until all have ended
        while not all(task.done() for task in asking):
            time.sleep(0.005)  # noqa: ASYNC251 - so that one deadline comes after each step of it
            await asyncio.sleep(0)
        assert await asyncio.gather(*asking) == [False] * 20

    asyncio.run(ask())


def test_where_systemctl_is_missing_nothing_shuts_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    async def ask() -> bool:
        return await Launcher(tmp_path, lambda _: None, tmp_path).shutting_down()

    assert asyncio.run(ask()) is False


def test_whoever_is_lost_together_asks_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tmp_path / "asked"
    tool = tmp_path / "systemctl"
    tool.write_text(f"#!/bin/sh\necho again >> {asked}\nsleep 0.1\necho stopping\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    async def ask() -> list[bool]:
        launcher = Launcher(tmp_path, lambda _: None, tmp_path, answer_s=PATIENCE_S)
        return await asyncio.gather(*(launcher.shutting_down() for _ in range(100)))

    assert asyncio.run(ask()) == [True] * 100
    assert 1 <= len(asked.read_text().splitlines()) <= 2
