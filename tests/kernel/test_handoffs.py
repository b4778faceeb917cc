"""Servers that wait for no line: those that attach as they start, or recover by themselves."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from supervisor import DEADLINE_S, SERVER, UBLKWATCH, Supervisor
from test_modes import Disk

from ublkwatch.model import Generation
from ublkwatch.uapi import DevState

if TYPE_CHECKING:
    from conftest import Control, Servers

    Watch = Callable[..., Supervisor]

DELEGATED, AT_START = 'handoff = "delegated"', 'attach = "start"'
# What a device's table says of its server, and what its command line does.
WAYS = {
    0: (DELEGATED, ["--recover", "0"]),
    1: (DELEGATED, ["--recover", "1", "--daemonize"]),
    2: (AT_START, ["--attach", "2"]),
    3: (AT_START, ["--attach", "3", "--daemonize"]),
}


def device(dev_id: int, says: str, arguments: list[str]) -> str:
    command = json.dumps([*SERVER, *arguments])
    return f"[[device]]\ndev_id = {dev_id}\n{says}\ncommand = {command}\n"


def test_every_way_to_attach_brings_the_device_back_and_once_more(
    server: Servers, watch: Watch, generation: Generation, control: Control
) -> None:
    creator = server(tuple(WAYS))
    null = server.target("null")
    tables = [device(dev_id, says, [*null, *more]) for dev_id, (says, more) in WAYS.items()]
    supervisor = watch({}, "\n".join(tables))
    befores = [supervisor.watching(dev_id) for dev_id in WAYS]
    with contextlib.ExitStack() as stack:
        disks = [stack.enter_context(Disk(dev_id)) for dev_id in WAYS]
        creator.kill()
        reads = [disk.read() for disk in disks]
        afters = [supervisor.recovered(before) for before in befores]
        assert [read.outcome() for read in reads] == [0] * len(WAYS)
    for after in afters:
        assert after["attempts"] == 1, supervisor.said()
        # G2 keeps the pid that END gave it, that of the process which has left, too.
        if generation is Generation.G3 or after["dev_id"] != 3:
            assert control.info(after["dev_id"]).ublksrv_pid == after["server_pid"]
    for before in [supervisor.kill_server(dev_id) for dev_id in WAYS]:
        supervisor.recovered(before)


def test_a_recover_command_that_fails_is_run_again_where_that_cannot_harm(
    server: Servers, watch: Watch, generation: Generation, control: Control, tmp_path: Path
) -> None:
    faults = tmp_path / "faults"
    faults.write_text("exit-after-ready\n")
    creator = server(0)
    arguments = [*server.target("null"), "--recover", "0", "--fault-file", str(faults)]
    supervisor = watch({}, device(0, DELEGATED, arguments))
    before = supervisor.watching()
    with Disk() as disk:
        creator.kill()
        read = disk.read()
        if generation is Generation.G2:
            failed = supervisor.until("given up", phase="failed", reason="DELEGATE_FAILED")
            assert "exit status 3" in failed["explanation"]
            assert control.info(0).state == DevState.QUIESCED
            assert not read.done
            retry = [*UBLKWATCH, "retry", "0", "--config", str(supervisor.config)]
            subprocess.run(retry, check=True, timeout=DEADLINE_S)
        after = supervisor.recovered(before)
        assert after["attempts"] == 2
        assert read.outcome() == 0
