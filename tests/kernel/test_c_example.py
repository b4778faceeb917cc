"""The attach contract's example in C: compiled, and recovered under by ublkwatch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from supervisor import Supervisor

if TYPE_CHECKING:
    from conftest import Control, Load, Servers

    Watch = Callable[..., Supervisor]


@pytest.mark.usefixtures("no_block_errors")
def test_fio_verifies_through_a_recovery_under_the_c_server(
    server: Servers, watch: Watch, fio: Load, attach: Path
) -> None:
    reference = server(target="loop", queues=2)
    prefix = server.target("loop")[3].removesuffix("{dev_id}")
    command = json.dumps([str(attach), prefix])
    supervisor = watch({}, f"[[device]]\ndev_id = 0\ncommand = {command}")
    before = supervisor.watching()
    load = fio(size="16m", verify_backlog=64, time_based=1, runtime=3600)
    load.wait_progress()

    reference.kill()
    after = supervisor.recovered(before)

    program = Path(f"/proc/{after['server_pid']}/exe").readlink()
    assert program == attach
    load.wait_progress()
    # The C server's own death, too: data written by it is found by the next one.
    supervisor.recovered(supervisor.kill_server())
    load.wait_progress()
    load.interrupt()
    load.report()


def test_it_serves_several_devices_and_ends_with_the_last(
    server: Servers, control: Control, fio: Load, attach: Path
) -> None:
    server((0, 1), queues=2).kill()
    candidate = server.attach_program(attach).wait_ready()
    for dev_id in (1, 0):
        control.start_user_recovery(dev_id)
        candidate.send(control.line(dev_id))
        control.end_user_recovery(dev_id, candidate.pid)
    for dev_id in (0, 1):
        fio(dev_id, verify=0, rw="randrw").report()
        assert control.info(dev_id).ublksrv_pid == candidate.pid

    control.remove(1)
    assert candidate.proc.poll() is None
    control.remove(0)

    assert candidate.wait() == 0
    assert candidate.stderr == ""


def test_it_is_not_needed(server: Servers, attach: Path) -> None:
    candidate = server.attach_program(attach).wait_ready()

    candidate.write_line(None)

    assert candidate.wait() == 0


@pytest.mark.parametrize(
    ("change", "prefix", "status", "says"),
    [
        ({"flags": 1 << 8}, "", 78, "more than this program can"),
        ({}, "/nonexistent-", 78, "/nonexistent-0: No such file"),
        ({"dev_id": 99999}, "", 1, "/dev/ublkc99999: No such file"),
    ],
)
def test_what_it_cannot_do_is_said_before_the_device_is_touched(  # noqa: PLR0917 - a row
    server: Servers,
    control: Control,
    attach: Path,
    change: dict[str, int],
    prefix: str,
    status: int,
    says: str,
) -> None:
    server()  # LIVE: were the device opened, that would be EBUSY
    candidate = server.attach_program(attach, *([prefix] if prefix else [])).wait_ready()

    candidate.write_line(control.line(0) | change)

    assert candidate.wait() == status
    assert says in candidate.stderr
