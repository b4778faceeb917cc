"""Ten minutes of mixed load, in which no server that lives is said to hang."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from conftest import DEADLINE_S

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import Load, Servers
    from supervisor import Supervisor

    Watch = Callable[..., Supervisor]

MINUTES = 10
PAUSE_MAX_S = 3.0  # of a server: a slow backend
STALL_S = 8  # less than the default of 30 s, so more is asked of it


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.usefixtures("no_block_errors")
def test_ten_minutes_of_mixed_load_without_a_false_alarm(
    server: Servers, watch: Watch, fio: Load, tmp_path: Path
) -> None:
    """A busy file system, writes that are verified, reads at full speed, an idle device."""
    targets = {0: "ram", 1: "loop", 2: "null", 3: "ram"}
    pids = [server(dev_id, target=target).pid for dev_id, target in targets.items()]
    supervisor = watch(targets, f"stall_timeout_s = {STALL_S}")
    for dev_id in targets:
        supervisor.watching(dev_id)
    mount = tmp_path / "mnt"
    mount.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "/dev/ublkb0"], check=True)
    subprocess.run(["mount", "/dev/ublkb0", mount], check=True)
    endless: dict[str, str | int] = {"time_based": 1, "runtime": 3600}
    loads = [
        fio(1, rw="randrw", fsync=32, verify_backlog=64, rate_iops=100, **endless),
        fio(2, rw="randread", verify=0, iodepth=2, **endless),
    ]
    busy = """i=0; while [ ! -e "$0/stop" ]; do head -c 200000 /dev/urandom >"$0/f$((i % 8))" &&
        sync -f "$0" || exit 1; i=$((i + 1)); done"""
    dice = random.Random(6)  # noqa: S311 - chance that can be replayed
    with subprocess.Popen(["sh", "-c", busy, str(mount)]) as writer:
        end = time.monotonic() + MINUTES * 60
        while time.monotonic() < end:
            pid = dice.choice(pids)
            os.kill(pid, signal.SIGSTOP)
            time.sleep(dice.uniform(0, PAUSE_MAX_S))
            os.kill(pid, signal.SIGCONT)
            time.sleep(dice.uniform(0, PAUSE_MAX_S))
            ailing = [it["device"] for it in supervisor.status()["devices"] if it["ailment"]]
            assert not ailing, supervisor.said()
        (mount / "stop").touch()
        assert writer.wait(DEADLINE_S) == 0
    for load in loads:
        load.interrupt()
        assert load.report()["read"]["total_ios"] > 0
    subprocess.run(["umount", mount], check=True)
    assert "ServerAils" not in supervisor.said()
    for dev_id, pid in enumerate(pids):
        after = supervisor.watching(dev_id)
        assert (after["server_pid"], after["recoveries"]) == (pid, 0)
