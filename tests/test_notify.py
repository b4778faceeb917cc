"""The service manager is told what it has to know, over a real socket."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ublkwatch.notify import Manager


class Listener:
    """Stands where systemd does."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.setblocking(False)

    def heard(self) -> list[str]:
        found = []
        try:
            while True:
                found.append(self.socket.recv(4096).decode())
        except BlockingIOError:
            return found


@pytest.fixture(params=["path", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Listener, str]]:
    name = f"{tmp_path}/notify" if request.param == "path" else f"@ublkwatch-test-{os.getpid()}"
    listening = Listener(name.replace("@", "\0"))
    yield listening, name
    listening.socket.close()


def test_it_hears_each_word_in_its_form(listener: tuple[Listener, str]) -> None:
    listening, name = listener
    manager = Manager({"NOTIFY_SOCKET": name})
    manager.ready()
    manager.says("2 devices,\nall well")
    manager.says("2 devices, all well")
    manager.alive()
    manager.reloading()
    manager.stopping()
    first, status, alive, reloading, stopping = listening.heard()
    assert (first, alive, stopping) == ("READY=1", "WATCHDOG=1", "STOPPING=1")
    assert status == "STATUS=2 devices, all well"
    assert reloading.startswith("RELOADING=1\nMONOTONIC_USEC=")


def test_what_we_start_cannot_speak_for_us() -> None:
    environment = {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "30000000", "PATH": "/bin"}
    environment["WATCHDOG_PID"] = str(os.getpid())
    assert Manager(environment).watchdog_s == 30.0
    assert environment == {"PATH": "/bin"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"},
        {"WATCHDOG_USEC": "soon"},
        {"WATCHDOG_USEC": "0"},
    ],
)
def test_who_does_not_watch_us_need_not_be_told(environment: dict[str, str]) -> None:
    assert Manager(environment).watchdog_s is None


def test_a_manager_that_is_away_or_does_not_read_holds_nobody_up(tmp_path: Path) -> None:
    nobody = Manager({"NOTIFY_SOCKET": str(tmp_path / "gone")})
    nobody.ready()
    listening = Listener(str(tmp_path / "deaf"))
    with contextlib.closing(listening.socket):
        overwhelm(listening, tmp_path)


def overwhelm(listening: Listener, tmp_path: Path) -> None:
    deaf = Manager({"NOTIFY_SOCKET": str(tmp_path / "deaf")})
    for number in range(5000):  # far more than its queue takes
        deaf.says(f"line {number}")
    assert 0 < len(listening.heard()) < 5000
    deaf.alive()
    assert listening.heard() == ["WATCHDOG=1"]


def test_a_descriptor_is_kept_under_its_name(listener: tuple[Listener, str]) -> None:
    listening, name = listener
    manager = Manager({"NOTIFY_SOCKET": name})
    with tempfile.TemporaryFile() as file:
        manager.keep("server-7-100", file.fileno())
        said, descriptors, _, _ = socket.recv_fds(listening.socket, 4096, 1)
        assert said == b"FDSTORE=1\nFDNAME=server-7-100\nFDPOLL=0"
        (kept,) = descriptors
        assert os.path.samestat(os.fstat(kept), os.fstat(file.fileno()))
        os.close(kept)
    manager.drop("server-7-100")
    assert listening.heard() == ["FDSTOREREMOVE=1\nFDNAME=server-7-100"]


HEIR = """
import asyncio, os
from ublkwatch.notify import Manager

async def live():
    os.environ["LISTEN_PID"] = str(os.getpid())
    manager = Manager(os.environ)
    taken = manager.take("one")
    assert os.read(taken, 100) == b"what one holds"
    assert not os.get_inheritable(taken)
    assert manager.take("one") is None and manager.take("three") is None
    assert not any(name.startswith("LISTEN") for name in os.environ)
    ready = asyncio.Event()
    ready.set()
    await manager.attend(ready.wait, lambda: True)
    assert manager.up.is_set()
    try:
        os.fstat(4)
    except OSError:
        print("the other one is closed")

asyncio.run(live())
"""


def test_what_was_kept_is_there_for_the_next_life_and_the_rest_is_let_go(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(f"what {name} holds")
    shell = f"exec 3<{tmp_path}/one 4<{tmp_path}/two; exec {sys.executable} -c '{HEIR}'"
    environment = {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "one:two"}
    done = subprocess.run(
        ["/bin/sh", "-c", shell],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "the other one is closed\n", done.stderr
