"""Others act on the device as well: operators, other supervisors, a kernel that does not answer."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import DEADLINE_S, wait_until
from supervisor import SERVER, Supervisor, tagged

from ublkwatch.uapi import DevState

if TYPE_CHECKING:
    from conftest import Control, Load, Servers

    Watch = Callable[..., Supervisor]


def faulty(server: Servers, tmp_path: Path, *faults: str) -> list[str]:
    """Return a command whose first servers misbehave as told."""
    path = tmp_path / f"faults-{faults[0]}"
    path.write_text("".join(f"{fault}\n" for fault in faults))
    return [*server.target("null"), "--fault-file", str(path)]


def test_somebody_elses_recovery_wins_the_race_and_is_adopted(
    server: Servers, watch: Watch, control: Control, tmp_path: Path
) -> None:
    server()
    command = faulty(server, tmp_path, "hang-at-start")
    supervisor = watch({0: command}, "ready_timeout_s = 3600")
    supervisor.watching()
    rival = server.attach().wait_ready()
    supervisor.kill_server()
    supervisor.until("draining", phase="draining")
    supervisor.until_empty(Path(command[-1]))  # its new server hangs now, and has not by chance
    control.start_user_recovery(0)
    rival.write_line(control.line(0))
    control.end_user_recovery(0, rival.pid)
    supervisor.until("adopted", phase="watching", server_pid=rival.pid)
    supervisor.until_tagged()
    assert "starting" not in supervisor.said()
    supervisor.recovered(supervisor.kill_server())


@pytest.mark.parametrize("how", ["stop", "delete"])
def test_a_device_removed_in_the_middle_of_a_recovery_stays_removed(
    server: Servers, watch: Watch, control: Control, tmp_path: Path, how: str
) -> None:
    creator = server()
    supervisor = watch({0: faulty(server, tmp_path, "hang-after-ready")}, "attach_timeout_s = 3600")
    supervisor.watching()
    supervisor.kill_server()
    supervisor.until("END is with the kernel", phase="attaching")
    creator.kill()
    if how == "stop":
        control.run(lambda ctrl: ctrl.stop_dev(0))
    else:
        control.remove(0)  # it returns only when our END let go of the device
    supervisor.until_gone()
    supervisor.until_tagged()
    assert "ERROR" not in supervisor.said()
    if how == "stop":
        control.remove(0)
    assert not control.exists(0)
    server()  # the id is free again
    assert supervisor.watching()["recoveries"] == 0


def sits_on_requests() -> bool:
    """Tell whether ublk 0 has requests in flight, and has completed none for a second."""
    looks = []
    for pause_s in (1, 0):
        fields = Path("/sys/block/ublkb0/stat").read_text().split()
        looks.append((fields[0], fields[8]))
        time.sleep(pause_s)
    return looks[0] == looks[1] and looks[0][1] != "0"


def test_a_command_that_never_returns_harms_nobody_else(
    server: Servers, watch: Watch, fio: Load
) -> None:
    stuck = server(0, more=("--fault", "stall"))
    server(1)
    fio(0, rw="randread", verify=0)
    # Paced, as a reader at full speed leaves an emulated machine no time for anybody else.
    reader = fio(1, rw="randread", verify=0, time_based=1, runtime=3600, rate_iops=200)
    reader.wait_progress()
    wait_until(sits_on_requests, DEADLINE_S, "the first server sits on requests")
    # STOP_DEV sleeps, with the device's mutex, behind the requests that the server sits on.
    stop = subprocess.Popen([*SERVER, "--stop", "0"])
    supervisor = watch({0: "null", 1: "null"})
    supervisor.recovered(supervisor.kill_server(1))
    supervisor.until_said("its control worker is retired")
    supervisor.recovered(supervisor.kill_server(1))
    reader.wait_progress()
    supervisor.stop()
    stuck.kill()  # and so STOP_DEV returns, and the retired worker ends
    stop.wait(DEADLINE_S)
    supervisor.until_no_workers()


def test_a_dev_id_that_was_reused_between_two_looks_is_another_device(
    server: Servers, watch: Watch, control: Control
) -> None:
    creator = server()
    supervisor = watch({0: "null"})
    supervisor.watching()
    assert supervisor.proc is not None
    os.kill(supervisor.proc.pid, signal.SIGSTOP)
    creator.kill()
    control.remove(0)
    other = server(target="ram", size="16M")
    other.kill()
    control.wait_state(0, DevState.QUIESCED)
    os.kill(supervisor.proc.pid, signal.SIGCONT)
    supervisor.until("left alone", phase="observed", reason="NEVER_SEEN_LIVE")
    assert control.info(0).state == DevState.QUIESCED
    assert "starting" not in supervisor.said()
    assert tagged() == set()


def test_what_was_kept_before_a_reboot_is_no_spec_for_a_device_of_today(
    server: Servers, watch: Watch, control: Control
) -> None:
    creator = server()
    supervisor = watch({0: "null"})
    supervisor.watching()
    spec = supervisor.home / "state/specs/0.json"
    supervisor.until_exists(spec)
    supervisor.stop()
    # As after a reboot: the state directory as it was, another boot id, an empty tmpfs.
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    spec.write_text(spec.read_text().replace(boot_id, "0" * len(boot_id)))
    shutil.rmtree(supervisor.home / "run")
    creator.kill()
    control.wait_state(0, DevState.QUIESCED)
    supervisor.start()
    supervisor.until("left alone", phase="observed", reason="NEVER_SEEN_LIVE")
    assert tagged() == set()
    assert "draining" not in supervisor.said().split("stopped; the servers live on")[-1]
