"""ublkwatch.service as it ships, under the real systemd of the lab's guest, over the real driver.

lab/lab.py run --init systemd -- .venv/bin/python -m pytest tests/kernel/systemd/test_service.py
"""

from __future__ import annotations

import contextlib
import grp
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from supervisor import worker_of

from ublkwatch.transient import SLICE

if TYPE_CHECKING:
    from conftest import Fio, Load, Servers

TOP = Path(__file__).parents[3]
NAME = "ublkwatch.service"
PROGRAM = Path(sys.executable).with_name("ublkwatch")
CONFIG = Path("/etc/ublkwatch/ublkwatch.toml")
STATUS = Path("/run/ublkwatch/status.json")
STOP_S = 30.0  # the unit's TimeoutStopSec: behind it systemd waits once more, and gives up
DEADLINE_S = 300.0  # as long as emulated starts beside other guests may take


def systemctl(*words: str) -> str:
    """Run it; it must succeed, within the time that a service has to start or stop."""
    done = subprocess.run(
        ["systemctl", *words], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, f"{words}: {done.stderr}\n{journal()}"
    return done.stdout.strip()


def journal() -> str:
    command = ["journalctl", "-q", "-o", "short-monotonic", "-u", NAME, "-n", "60"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def shown(key: str) -> str:
    return systemctl("show", "--value", "-p", key, NAME)


def main_pid() -> int:
    return int(shown("MainPID"))


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {DEADLINE_S:g} s: {what}\n{journal()}")
        time.sleep(0.2)


def device(dev_id: int = 0) -> dict[str, Any]:
    """Return the device as the service that runs now has it; empty before it has written."""
    try:
        document = json.loads(STATUS.read_text())
    except FileNotFoundError:
        return {}
    if document["supervisor_pid"] != main_pid():
        return {}
    return next((each for each in document["devices"] if each["dev_id"] == dev_id), {})


def watch_ublkb0(attach: Path, settings: str = "") -> None:
    """Start the service on a configuration of its own."""
    CONFIG.parent.mkdir(exist_ok=True)
    CONFIG.write_text(f'{settings}\n[[device]]\ndev_id = 0\ncommand = ["{attach}"]\n')
    systemctl("start", NAME)  # returns when it is ready: it has seen every device


def watching(recoveries: int) -> dict[str, Any]:
    wanted = {"phase": "watching", "state": "LIVE", "recoveries": recoveries}
    until(lambda: wanted.items() <= device().items(), f"watched after {recoveries} recoveries")
    return device()


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    pidfd = os.pidfd_open(pid)
    signal.pidfd_send_signal(pidfd, number)
    os.close(pidfd)


@pytest.fixture
def service(server: Servers) -> Iterator[None]:
    """Install it as users do; only what the tests' place and patience need is another one."""
    del server  # its devices go behind the service
    drop_in = Path(f"/run/systemd/system/{NAME}.d/test.conf")
    drop_in.parent.mkdir(exist_ok=True)
    private = "PrivateTmp=no\n" if any(map(TOP.is_relative_to, ("/tmp", "/var/tmp"))) else ""
    drop_in.write_text(f"[Service]\nWatchdogSec=40\nTimeoutStartSec=600\n{private}")
    ublkwatch("install-systemd")
    yield
    ublkwatch("install-systemd", "--remove")
    drop_in.unlink()
    systemctl("daemon-reload")


def ublkwatch(*words: str, program: Path = PROGRAM) -> str:
    """Run the installed program; it must succeed."""
    done = subprocess.run(
        [str(program), *words],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        cwd="/",
    )
    assert done.returncode == 0, f"{words}: {done.stderr}\n{journal()}"
    return done.stdout


def as_member(group: str, *words: str) -> str:
    """Run ublkwatch as a user who is nobody but a member of a group."""
    done = subprocess.run(
        ["/usr/bin/python3", "-m", "ublkwatch", *words],  # the tests' own may be root's alone
        user=65534,
        group=65534,
        extra_groups=[grp.getgrnam(group).gr_gid] if group else [],
        cwd=TOP,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    return done.stdout if done.returncode == 0 else f"status {done.returncode}"


def start_and_reload_at_once() -> None:
    """Start it, and have it told to reload as soon as it is not its end by Unix' own rule."""
    systemctl("start", "--no-block", NAME)
    until(lambda: main_pid() and minds_hangup(main_pid()), "it minds SIGHUP")
    early = main_pid()
    assert shown("ActiveState") == "activating"
    kill(early, signal.SIGHUP)
    until(lambda: shown("ActiveState") == "active", "it is ready all the same")
    assert main_pid() == early


def minds_hangup(pid: int) -> bool:
    """Tell whether SIGHUP is blocked or caught."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        status = Path(f"/proc/{pid}/status").read_text()
        masks = re.findall(r"^Sig(?:Blk|Cgt):\s*(\w+)$", status, re.MULTILINE)
        return any(int(mask, 16) & 1 << signal.SIGHUP - 1 for mask in masks)
    return False


def goes_on(load: Fio) -> None:
    load.wait_progress()
    load.interrupt()
    load.report()


@pytest.mark.timeout(1200)
def test_the_service_recovers_and_its_own_comings_and_goings_harm_nothing(
    server: Servers, service: None, fio: Load, attach: Path
) -> None:
    del service
    creator = server(0)
    watch_ublkb0(attach, 'admin_group = "disk"')
    assert device()["phase"] in ("observed", "watching")
    until(lambda: shown("StatusText") == "1 device: 1 well", "systemctl status says how it goes")
    load = fio(0, verify=0, rw="randrw", time_based=1, runtime=1200)

    creator.kill()
    first = watching(recoveries=1)["server_pid"]
    group = Path(f"/proc/{first}/cgroup").read_text()
    assert f"{SLICE}/ublkwatch-ublkb0.service" in group, "not in our cgroup, nor in our sandbox"
    assert "its server is watched" in as_member("disk", "explain", "ublkb0")
    assert as_member("", "explain", "ublkb0") == "status 77"

    systemctl("reload", NAME)
    assert shown("ActiveState") == "active"

    # Stopped in its tracks, it feeds the watchdog no more; systemd kills it, and starts it again.
    before = main_pid()
    kill(before, signal.SIGSTOP)
    kill(first)
    until(lambda: main_pid() not in (0, before), "another one runs")
    now = watching(recoveries=2)
    second = now["server_pid"]
    assert second != first
    if tells_how_it_ended():  # by the pidfd that systemd had kept
        assert (now["cause"], now["cause_detail"]) == ("signal", "SIGKILL")
    assert shown("NRestarts") == "1"
    assert "watchdog" in journal().lower()

    systemctl("restart", NAME)
    assert watching(recoveries=2)["server_pid"] == second
    systemctl("stop", NAME)
    assert Path(f"/proc/{second}").exists()
    kill(second)  # while nobody is there
    start_and_reload_at_once()
    assert watching(recoveries=3)["server_pid"] != second
    goes_on(load)


def tells_how_it_ended() -> bool:
    """Tell whether a pidfd knows that of a process that is gone (Linux 6.15)."""
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int(minor)) >= (6, 15)


@pytest.mark.timeout(1200)
def test_a_worker_that_is_stuck_in_the_kernel_holds_up_neither_a_stop_nor_a_start(
    server: Servers, service: None, fio: Load, attach: Path
) -> None:
    """STOP_DEV sleeps behind requests that a server sits on: its worker cannot be killed."""
    del service
    stuck, creator = server(1, more=("--fault", "stall")), server(0)
    watch_ublkb0(attach)
    worker = worker_of(main_pid())
    group = Path(f"/proc/{worker}/cgroup")
    until(lambda: f"ublkwatch-worker-{worker}.scope" in group.read_text(), "it is set apart")
    fio(1, rw="randread", verify=0)
    stop = subprocess.Popen([str(PROGRAM), "stop", "1", "--force", "--yes"])
    try:
        until(lambda: "D" in states_of(worker), "STOP_DEV sleeps")
        began = time.monotonic()
        systemctl("stop", NAME)
        assert time.monotonic() - began < STOP_S
        assert "D" in states_of(worker), "else nothing was stuck"
        systemctl("start", NAME)
        creator.kill()
        watching(recoveries=1)
    finally:
        stuck.kill()
        stop.wait(DEADLINE_S)


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """Return an installation of its own, as the README has it; its libraries are the tests'."""
    home = Path("/opt/ublkwatch")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    (packages,) = home.glob("lib/*/site-packages")
    shutil.copytree(TOP / "ublkwatch", packages / "ublkwatch")
    (packages / "libraries.pth").write_text(f"{Path(psutil.__file__).parents[1]}\n")
    program = home / "bin/ublkwatch"
    program.write_text(
        f"#!{home}/bin/python\nfrom ublkwatch.cli import main\nraise SystemExit(main())\n"
    )
    program.chmod(0o755)
    yield home
    shutil.rmtree(home)


@pytest.mark.timeout(1200)
def test_a_new_version_takes_over_what_the_old_one_has(
    server: Servers, service: None, elsewhere: Path, attach: Path
) -> None:
    del service
    creator = server(0)
    watch_ublkb0(attach)
    creator.kill()
    first = watching(recoveries=1)["server_pid"]

    (init,) = elsewhere.glob("lib/*/site-packages/ublkwatch/__init__.py")
    text, count = re.subn(r'(?m)^__version__ = ".*"$', '__version__ = "99.0"', init.read_text())
    assert count == 1
    init.write_text(text)
    ublkwatch("install-systemd", program=elsewhere / "bin/ublkwatch")
    systemctl("restart", NAME)  # as --now does, which does not wait as long
    assert watching(recoveries=1)["server_pid"] == first
    assert "; 99.0 runs" in ublkwatch("version", program=elsewhere / "bin/ublkwatch")
    kill(first)
    assert watching(recoveries=2)["server_pid"] != first


def states_of(pid: int) -> set[str]:
    """Return the states of a process' threads, of which io_uring's may sleep for it."""
    found = set()
    for task in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.add(task.read_text().rpartition(")")[2].split()[0])
    return found
