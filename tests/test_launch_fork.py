"""What a forked server gets before it runs: its user, its limits, its control group."""

from __future__ import annotations

import asyncio
import logging
import os
import pwd
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from patience import some_turns, until
from test_launch import ECHO, SAY, SLEEP, TAG, Home, at_home, environment

from ublkwatch import cgroup
from ublkwatch.care import Job, Origin, Run
from ublkwatch.identity import Identity, Judge, UserError, looked_up, resolve
from ublkwatch.launch import Launcher
from ublkwatch.trust import TrustError

NOBODY = 65534
# A front end that exits 0 and leaves a server that cannot be found by its tag.
LEAVE = """
import os, sys
if os.fork(): os._exit(0)
os.setsid()
os.execve(sys.executable, [sys.executable, "-c", "import time; time.sleep(600)"], {})
"""


def reachable_python() -> str:
    """Return a Python that every user can execute: the tests' own may be root's alone."""
    for name in (sys.executable, "/usr/local/bin/python3", "/usr/bin/python3"):
        path = Path(name).resolve()
        if path.exists() and all(way.stat().st_mode & 0o001 for way in (path, *path.parents)):
            return str(path)
    pytest.fail("no Python here that every user can execute; try: apt-get install python3")


@pytest.fixture
def place() -> Iterator[Path]:
    """A runtime directory as /run/ublkwatch is: others can pass it."""
    directory = Path(tempfile.mkdtemp(prefix="ublkwatch-", dir="/tmp"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


async def run_as(home: Home, code: str, run: Run = Run(), origin: Origin = Origin()) -> int:  # noqa: B008 - frozen
    job = Job("test", (reachable_python(), "-c", code), run, origin)
    pid = await home.launcher.start(TAG, job)
    home.pids.append(pid)
    return pid


def status(pid: int, key: str) -> list[str]:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return line.split()[1:]
    raise AssertionError(key)


def score(pid: int) -> str:
    return Path(f"/proc/{pid}/oom_score_adj").read_text().strip()


# --- users ---------------------------------------------------------------------------------------


def test_a_server_of_another_user_reaches_its_ready_socket_and_nothing_else(place: Path) -> None:
    code = (
        SAY
        + """
import pathlib
say("READY=1")
home = pathlib.Path(os.environ["NOTIFY_SOCKET"]).parent
for name in ("stdin", "output", "lines", "new"):
    try:
        open(home / name, "a")
        print("opened", name)
    except PermissionError:
        pass
try:
    print(os.listdir(home), os.listdir(home.parent))
except PermissionError:
    print("done", flush=True)
print("got", input(), flush=True)
time.sleep(600)
"""
    )

    async def work(home: Home) -> None:
        origin = Origin(uid=NOBODY, gid=12, groups=(20, 21))
        pid = await run_as(home, code, origin=origin)
        await until(lambda: home.ready == [TAG], "it is heard")
        await until(lambda: home.printed() == "done\n", "it could open nothing")
        assert status(pid, "Uid") == [str(NOBODY)] * 4
        assert status(pid, "Gid") == ["12"] * 4
        assert set(status(pid, "Groups")) == {"20", "21"}
        home.restart()
        home.launcher.listen(TAG)
        owner = (place / "attempts" / TAG / "notify").stat()
        assert (owner.st_uid, owner.st_mode & 0o777) == (NOBODY, 0o600)
        home.launcher.write_line(TAG, "hello")
        await until(lambda: "got hello" in home.printed(), "its standard input is open")

    at_home(place, work)


def test_ready_counts_only_from_root_and_from_the_servers_own_user(place: Path) -> None:
    # A server of root's that says READY as somebody else, then as itself.
    code = (
        SAY
        + """
os.chmod(os.environ["NOTIFY_SOCKET"], 0o666)
if not os.fork():
    os.setuid(65534)
    say("READY=1")
    os._exit(0)
os.wait()
print("said", flush=True)
input()
say("READY=1")
time.sleep(600)
"""
    )

    async def work(home: Home) -> None:
        await run_as(home, code)
        await until(lambda: "said" in home.printed(), "the stranger spoke")
        await some_turns()
        assert home.ready == []
        home.launcher.write_line(TAG, "")
        await until(lambda: home.ready == [TAG], "the server is heard")

    at_home(place, work)


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", (1000, 1001, (5, 6))),
        ("root", (0, 0)),
        ("0", (0, 0)),
        ("nobody", (NOBODY, NOBODY)),
        ("65534", (NOBODY, NOBODY)),
        ("1234:5678", (1234, 5678, ())),
        ("nobody:root", (NOBODY, 0, ())),
    ],
)
def test_a_user_is_who_was_asked_for_or_who_the_lost_server_was(
    user: str, expected: tuple[object, ...]
) -> None:
    assert pwd.getpwnam("nobody").pw_uid == NOBODY
    job = Job("test", ("/bin/true",), Run(user=user), Origin(uid=1000, gid=1001, groups=(5, 6)))
    found = resolve(job)
    assert (found.uid, found.gid, found.groups)[: len(expected)] == expected


@pytest.mark.parametrize(
    "user", ["no-such-user", "4000000000", "nobody:no-such-group", "1:x:y", ":"]
)
def test_a_user_that_does_not_exist_is_named(user: str) -> None:
    with pytest.raises(UserError, match=f"user '{user}': "):
        resolve(Job("test", ("/bin/true",), Run(user=user)))


def test_a_user_who_was_met_is_known_when_nobody_answers(place: Path) -> None:
    services = [looked_up]

    def look_up(user: str) -> Identity:
        return services[0](user)  # IndexError: nobody answers

    async def work(home: Home) -> None:
        judge = Judge(look_up=look_up)
        home.restart(judge)
        judge.meet("nobody")
        judge.meet("")
        with pytest.raises(UserError, match="no-such-user"):
            judge.meet("no-such-user")
        services.clear()
        pid = await run_as(home, SLEEP, Run(user="nobody"))
        await until(lambda: home.printed() == "up\n", "it runs")
        assert status(pid, "Uid") == [str(NOBODY)] * 4

    at_home(place, work)


# --- limits and priorities -----------------------------------------------------------------------


def test_all_is_in_place_before_the_servers_first_instruction(tmp_path: Path) -> None:
    cpu = max(os.sched_getaffinity(0))
    run = Run(
        cwd="/usr",
        env=(("COLOUR", "blue and green"),),
        limits=(("nofile", "100:200"), ("core", "0")),
        oom_score_adj=321,
        cpus=(cpu,),
    )
    code = f"""
import os, resource
print(resource.getrlimit(resource.RLIMIT_NOFILE), resource.getrlimit(resource.RLIMIT_CORE),
      open("/proc/self/oom_score_adj").read().strip(), os.sched_getaffinity(0) == {{{cpu}}},
      os.getcwd(), os.environ["COLOUR"], sep="|")
"""

    async def work(home: Home) -> None:
        pid = await home.launcher.start(TAG, Job("test", (sys.executable, "-c", code), run))
        home.pids.append(pid)
        await home.exited(pid)
        assert home.printed() == "(100, 200)|(0, 0)|321|True|/usr|blue and green\n"

    at_home(tmp_path, work)


def test_a_server_whose_score_is_not_given_has_what_we_had(tmp_path: Path) -> None:
    async def work(home: Home) -> None:
        home.launcher.close()
        home.launcher = Launcher(tmp_path, home.ready.append, usual_oom_score_adj=123)
        for adjusted, expected in ((None, "123"), (321, "321")):
            job = Job("test", (sys.executable, "-c", SLEEP), Run(oom_score_adj=adjusted))
            pid = await home.launcher.start(f"{TAG}-{expected}", job)
            home.pids.append(pid)
            assert score(pid) == expected

    at_home(tmp_path, work)


def test_a_blocked_signal_is_not_the_servers_business(tmp_path: Path) -> None:
    async def work(home: Home) -> None:
        pid = await home.start(SLEEP)
        await until(lambda: "up" in home.printed(), "it runs")
        assert status(pid, "SigBlk") == ["0" * 16]

    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGTERM})
    try:
        at_home(tmp_path, work)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (Run(cwd="/no/such/directory"), "/no/such/directory"),
        (Run(limits=(("nofile", "many"),)), "limit nofile = 'many'"),
        (Run(limits=(("nonsense", "1"),)), "limit nonsense"),
        (Run(limits=(("nofile", "20:10"),)), "limit nofile = '20:10'"),
        (Run(cpus=(100_000,)), r"cpus \[100000\]"),
        (Run(unit="a.service"), "unit a.service: needs systemd, and launcher is 'fork'"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_runs(tmp_path: Path, run: Run, says: str) -> None:
    ran = tmp_path / "ran"

    async def work(home: Home) -> None:
        job = Job("test", ("/bin/sh", "-c", f"touch {ran}"), run)
        with pytest.raises(OSError, match=says):
            await home.launcher.start(TAG, job)
        await home.exited(await home.start("pass"))  # the name is free again
        assert not ran.exists()

    at_home(tmp_path, work)


def test_a_program_that_others_can_write_is_not_started(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o775)

    async def work(home: Home) -> None:
        with pytest.raises(TrustError, match=f"chmod go-w {program}"):
            await home.launcher.start(TAG, Job("test", (str(program),)))
        with pytest.raises(OSError, match="must be an absolute path"):
            await home.launcher.start(TAG, Job("test", ("sh",)))

    at_home(tmp_path, work)


# --- control groups ------------------------------------------------------------------------------


@pytest.fixture
def hierarchy() -> Iterator[Path]:
    """A control group of the tests' own; the set-up mounts the hierarchy where it is missing."""
    top = cgroup.own()
    assert top is not None, "no cgroup2 here; try: mount -t cgroup2 cgroup2 /sys/fs/cgroup"
    group = cgroup.make(top, f"ublkwatch-tests-{os.getpid()}")
    yield group
    cgroup.remove(group)
    assert not group.exists(), "something was left in it"


def test_an_attempt_is_a_control_group_double_forks_included(
    tmp_path: Path, hierarchy: Path
) -> None:
    async def work(home: Home) -> None:
        home.launcher.close()
        home.launcher = Launcher(tmp_path, home.ready.append, groups=hierarchy)
        front = await home.start(LEAVE)
        await home.exited(front)
        assert home.launcher.how_ended(front) == ("exit status 0", 0)
        (server,) = home.launcher.pids(TAG)
        await until(lambda: not environment(server), "it shed its tag")
        home.launcher.close()
        home.launcher = Launcher(tmp_path, home.ready.append)
        assert home.launcher.pids(TAG) == {server}, "our successor finds it"
        await home.launcher.end(TAG)
        assert home.launcher.pids(TAG) == set()
        assert (hierarchy / f"ublkwatch-{TAG}").exists()
        home.launcher.keep_only(set())
        assert not (hierarchy / f"ublkwatch-{TAG}").exists()

    at_home(tmp_path, work)


def test_without_a_control_group_servers_start_all_the_same_and_it_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def work(home: Home) -> None:
        home.launcher.close()
        home.launcher = Launcher(tmp_path, home.ready.append, groups=tmp_path / "missing")
        for tag in ("one", "two"):
            await home.start(ECHO, tag=tag)
            assert home.launcher.pids(tag) == set()
            await home.launcher.end(tag)
        await until(lambda: sorted(home.ready) == ["one", "two"], "both run")

    at_home(tmp_path, work)
    said = [record for record in caplog.records if "no control group" in record.message]
    assert len(said) == 1


# --- one process for several devices -------------------------------------------------------------


GROUP = (
    SAY
    + """
say("READY=1")
for line in iter(sys.stdin.buffer.raw.readline, b"stop\\n"):
    print("got", line.decode().strip(), flush=True)
    while not os.path.exists(sys.argv[1]): time.sleep(0.01)
time.sleep(600)
"""
)


def test_attempts_share_a_process_ready_and_lines_also_after_our_restart(tmp_path: Path) -> None:
    go = tmp_path / "go"

    async def work(home: Home) -> None:
        pid = await home.start(GROUP, str(go), tag="root")
        home.launcher.join("early", "root")
        await until(lambda: sorted(home.ready) == ["early", "root"], "both are told")
        home.launcher.join("late", "early")  # of a group: whoever is named stands for its root
        await until(lambda: home.ready[2:] == ["late"], "READY is told to whoever comes later")
        assert [home.launcher.root(tag) for tag in ("root", "early", "late")] == ["root"] * 3
        for tag in ("root", "early", "late"):
            home.launcher.write_line(tag, f"line of {tag}")
        await until(lambda: "got line of root" in home.printed("root"), "the first one is read")
        told = {"root": False, "early": True, "late": True}
        assert {tag: home.launcher.unread(tag) for tag in told} == told
        home.restart()
        for tag in told:
            home.launcher.listen(tag)
        assert {tag: home.launcher.unread(tag) for tag in told} == told
        home.launcher.write_line("late", "line of late")  # it waits there still: not twice
        go.touch()
        await until(lambda: "got line of late" in home.printed("root"), "all are read")
        await some_turns()
        assert home.printed("root").count("got") == 3
        assert not any(home.launcher.unread(tag) for tag in told)
        assert home.launcher.last_words("early").endswith("| got line of late")
        home.launcher.keep_only({"late"})
        names = {path.name for path in (tmp_path / "attempts").iterdir()}
        assert names == {"late", "root"}, "a home is kept while a kept tag leads to it"
        home.launcher.keep_only(set())
        assert list((tmp_path / "attempts").iterdir()) == []
        os.kill(pid, 0)

    at_home(tmp_path, work)


def test_nobody_joins_what_is_not_there(tmp_path: Path) -> None:
    async def work(home: Home) -> None:
        with pytest.raises(FileNotFoundError, match="attempt never-started"):
            home.launcher.join("late", "never-started")
        await asyncio.sleep(0)

    at_home(tmp_path, work)
