"""ublkwatch is SIGKILLed at each point of a recovery, and started again, as systemd would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from dying import POINTS
from supervisor import DEADLINE_S, Supervisor, tagged

if TYPE_CHECKING:
    from conftest import Load, Servers

    Watch = Callable[..., Supervisor]

DYING = (sys.executable, str(Path(__file__).with_name("dying.py")))


@pytest.mark.usefixtures("no_block_errors")
# Before one step there is what was behind the step before it.
@pytest.mark.parametrize(
    "point",
    [pytest.param(it, marks=pytest.mark.full) if it.startswith("before") else it for it in POINTS],
)
def test_a_recovery_is_finished_by_the_next_ublkwatch(
    server: Servers, watch: Watch, fio: Load, tmp_path: Path, point: str
) -> None:
    starts = tmp_path / "starts"
    starts.write_text("none\n" * 5)  # a server takes away one line when it starts
    server(target="ram", depth=8)
    command = [*server.target("ram"), "--fault-file", str(starts)]
    supervisor = watch({0: command}, command=(*DYING, point))
    supervisor.watching()
    writer = fio(size="4m", verify_backlog=64, time_based=1, runtime=3600)
    writer.wait_progress()
    before = supervisor.kill_server()
    assert supervisor.proc is not None
    assert supervisor.proc.wait(DEADLINE_S) == -signal.SIGKILL, supervisor.said()
    supervisor.command = ()
    supervisor.start()
    after = supervisor.recovered(before)
    supervisor.until_tagged(after["server_pid"])  # one server, and no stray
    assert len(starts.read_text().splitlines()) == 4  # one was started, and no second
    writer.wait_progress()
    writer.interrupt()
    writer.report()


def test_what_comes_after_the_recovery_is_watched_as_ever(server: Servers, watch: Watch) -> None:
    server()
    supervisor = watch({0: "null"})
    for _ in range(2):
        before = supervisor.watching()
        supervisor.kill()
        supervisor.start()
        assert supervisor.watching()["server_pid"] == before["server_pid"]
        supervisor.recovered(supervisor.kill_server())


@pytest.mark.full  # what it learns, a stall of all of us shows as well
def test_a_supervisor_that_was_stopped_for_a_minute_does_nothing_wrong_afterwards(
    server: Servers, watch: Watch
) -> None:
    server()
    supervisor = watch({0: "null"})
    before = supervisor.watching()
    assert supervisor.proc is not None
    os.kill(supervisor.proc.pid, signal.SIGSTOP)
    with pytest.raises(psutil.TimeoutExpired):
        psutil.Process(before["server_pid"]).wait(60)  # it lives on, for that minute
    os.kill(supervisor.proc.pid, signal.SIGCONT)
    supervisor.recovered(supervisor.kill_server())
    assert supervisor.said().count("-> draining") == 1


def test_a_stall_of_all_of_us_in_the_middle_of_a_recovery_costs_no_attempt(
    server: Servers, watch: Watch, tmp_path: Path
) -> None:
    """As a suspend would: when time goes on, every deadline has passed, and nobody is to blame."""
    faults = tmp_path / "faults"
    faults.write_text("none\n")
    server()
    command = [*server.target("null"), "--fault-file", str(faults)]
    supervisor = watch({0: command}, "ready_timeout_s = 60")
    before = supervisor.kill_server()
    supervisor.until("a server starts", phase="draining")
    assert supervisor.proc is not None
    family = {supervisor.proc.pid} | tagged()
    for pid in family:
        os.kill(pid, signal.SIGSTOP)
    with pytest.raises(subprocess.TimeoutExpired):
        supervisor.proc.wait(65)
    for pid in family:
        os.kill(pid, signal.SIGCONT)
    assert supervisor.recovered(before)["attempts"] == 1
    assert "all deadlines are put off" in supervisor.said()


def test_a_clock_that_steps_changes_nothing(server: Servers, watch: Watch) -> None:
    server()
    supervisor = watch({0: "null"})
    supervisor.watching()
    for step_s in (7200, -7200):
        began = time.monotonic()
        time.clock_settime(time.CLOCK_REALTIME, time.time() + step_s)
        after = supervisor.recovered(supervisor.kill_server())
        assert 0 < after["last_held_s"] < time.monotonic() - began
    assert supervisor.said().count("-> draining") == 2
