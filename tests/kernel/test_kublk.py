"""kublk, the kernel's own test server: one that nobody here wrote, and that recovers itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import device_ids, wait_until
from supervisor import DEADLINE_S, SERVER, Supervisor, processes
from test_modes import Disk

if TYPE_CHECKING:
    from conftest import Control, Load, Servers

    Watch = Callable[..., Supervisor]

LAB = Path(__file__).parent.parent.parent / "lab/lab.py"
KILLS = 4


class Kublk:
    """Starts kublk's devices; they are recovered by the same arguments that made them."""

    def __init__(self, program: str) -> None:
        self.program = program

    def add(self, dev_id: int, *arguments: str) -> None:
        """Return when it is LIVE: its server has left for the background by then."""
        done = self._run("add", "-n", str(dev_id), *arguments)
        assert done.returncode == 0, done.stdout
        assert dev_id in device_ids()

    def table(self, dev_id: int, *arguments: str) -> str:
        """Return what ublkwatch is told of it."""
        command = json.dumps([self.program, "recover", "-n", str(dev_id), *arguments])
        return f'[[device]]\ndev_id = {dev_id}\nhandoff = "delegated"\ncommand = {command}\n'

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=DEADLINE_S,
        )


@pytest.fixture
def kublk(server: Servers) -> Iterator[Kublk]:  # noqa: ARG001 - its devices go with the others
    found = subprocess.run([sys.executable, LAB, "kublk"], capture_output=True, check=True)
    program = found.stdout.decode().strip()
    yield Kublk(program)
    subprocess.run(["pkill", "-KILL", "-x", "kublk"], check=False)
    # One that is killed ends when the kernel has let go of its device.
    wait_until(
        lambda: not processes(lambda p: p.name() == "kublk" and p.status() != "zombie"),
        DEADLINE_S,
        "no kublk is left",
    )


@pytest.mark.usefixtures("no_block_errors")
def test_its_devices_live_through_kills_beside_one_of_the_reference_server(
    server: Servers, watch: Watch, kublk: Kublk, fio: Load
) -> None:
    arguments = ("-t", "null", "-q", "2", "-d", "64", "-r", "1", "-i", "1")
    kublk.add(0, *arguments)
    server(1, target="ram")
    managed = json.dumps([*SERVER, *server.target("ram")])
    supervisor = watch(
        {}, kublk.table(0, *arguments) + f"[[device]]\ndev_id = 1\ncommand = {managed}\n"
    )
    for dev_id in (0, 1):
        supervisor.watching(dev_id)
    # Held to a rate: a server in C and fio would leave an emulated machine nothing for the others.
    steady: dict[str, int | str] = {"time_based": 1, "runtime": "1h", "rate_iops": 300}
    reads = fio(0, rw="randread", verify=0, size="64m", **steady)
    verified = fio(1, **steady)
    for _ in range(KILLS):
        reads.wait_progress()
        supervisor.recovered(supervisor.kill_server(0))
    both = [supervisor.kill_server(dev_id) for dev_id in (0, 1)]
    for before in both:
        supervisor.recovered(before)
    for load in (reads, verified):
        load.wait_progress()
        load.interrupt()
        assert load.report()["error"] == 0
    assert supervisor.watching(0)["recoveries"] == KILLS + 1


def test_a_recovery_that_fails_takes_the_device_along_and_it_is_let_go(
    watch: Watch, kublk: Kublk, control: Control, tmp_path: Path
) -> None:
    backing = tmp_path / "backing"
    with backing.open("wb") as file:
        file.truncate(1 << 24)
    arguments = ("-t", "loop", "-q", "1", "-d", "16", "-r", "1", str(backing))
    kublk.add(0, *arguments)
    supervisor = watch({}, kublk.table(0, *arguments))
    supervisor.watching()
    with Disk() as disk:
        backing.unlink()
        supervisor.kill_server()
        read = disk.read()
        supervisor.until_gone()
        assert read.outcome() != 0
    assert not control.exists(0)
    # What took the device is told, and nothing is started for a device that is no more.
    assert supervisor.said().count("next: Spawn") == 1, supervisor.said()
