"""Many devices lost at once, and our own comings and goings beside servers that live.

Run in both guests: under systemd as process 1 each server is a unit, else it is a child of ours.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from supervisor import Supervisor, tagged

from ublkwatch.profiles import RUN_FILES

if TYPE_CHECKING:
    from conftest import Control, Fio, Load, Servers

    Watch = Callable[..., Supervisor]

NOBODY = 65534
SYSTEMD = Path("/run/systemd/system").exists()
TOP = f'launcher = "{"systemd" if SYSTEMD else "fork"}"'


def tables(dev_ids: range, *command: str | Path, more: str = "") -> str:
    argv = json.dumps([str(word) for word in command])
    return "".join(
        f"[[device]]\ndev_id = {dev_id}\ncommand = {argv}\n{more}\n" for dev_id in dev_ids
    )


def kill(pids: set[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def servers_of(supervisor: Supervisor, dev_ids: range, recoveries: int) -> list[int]:
    """Wait until all were recovered so often; return their servers' pids."""
    found = []
    for dev_id in dev_ids:
        now = supervisor.until(
            "recovered", dev_id, phase="watching", state="LIVE", recoveries=recoveries
        )
        found.append(now["server_pid"])
    return found


def goes_on(load: Fio) -> None:
    """Assert that the load was not disturbed, and end it."""
    load.wait_progress()
    load.interrupt()
    load.report()


def launched_as_wished(pid: int) -> bool:
    group = Path(f"/proc/{pid}/cgroup").read_text()
    return ("system.slice/ublkwatch-" in group) is SYSTEMD


def test_a_group_of_16_devices_in_one_process_comes_back_in_one_process(
    server: Servers, watch: Watch, fio: Load, attach: Path
) -> None:
    devices = range(16)
    creator = server(tuple(devices), depth=8)
    supervisor = watch({}, tables(devices, attach, more='group = "all"'), top=TOP)
    for dev_id in devices:
        supervisor.watching(dev_id)
    loads = [fio(dev_id, verify=0, rw="randrw", time_based=1, runtime=3600) for dev_id in (0, 15)]

    creator.kill()
    pids = servers_of(supervisor, devices, 1)

    assert set(pids) == tagged()
    assert len(set(pids)) == 1
    assert launched_as_wished(pids[0])
    for load in loads:
        goes_on(load)


def test_32_servers_killed_at_once_come_back_each_for_its_device(
    server: Servers, watch: Watch, fio: Load, attach: Path
) -> None:
    devices = range(32)
    creator = server(tuple(devices), depth=4)
    supervisor = watch({}, tables(devices, attach), top=TOP)
    for dev_id in devices:
        supervisor.watching(dev_id)
    load = fio(31, verify=0, rw="randrw", time_based=1, runtime=3600)

    creator.kill()
    first = servers_of(supervisor, devices, 1)
    assert len(set(first)) == 32
    kill(set(first))
    second = servers_of(supervisor, devices, 2)

    assert len(set(second)) == 32
    assert not set(second) & set(first)
    assert tagged() == set(second)
    goes_on(load)


def test_servers_outlive_us_however_we_end_and_are_adopted(
    server: Servers, watch: Watch, attach: Path
) -> None:
    devices = range(3)
    creator = server(tuple(devices), depth=4)
    supervisor = watch({}, tables(devices, attach), top=TOP)
    for dev_id in devices:
        supervisor.watching(dev_id)
    creator.kill()
    before = servers_of(supervisor, devices, 1)
    assert all(launched_as_wished(pid) for pid in before)

    for end in (supervisor.stop, supervisor.kill):
        end()
        assert tagged() == set(before)
        supervisor.start()
        assert [supervisor.watching(dev_id)["server_pid"] for dev_id in devices] == before

    kill({before[0]})
    assert servers_of(supervisor, range(1), 2) != before[:1]
    assert [supervisor.watching(dev_id)["server_pid"] for dev_id in (1, 2)] == before[1:]


def test_a_server_runs_as_the_user_that_the_lost_one_had(
    server: Servers, watch: Watch, attach: Path
) -> None:
    creator = server(0)
    os.chown("/dev/ublkc0", NOBODY, NOBODY)
    supervisor = watch({}, tables(range(1), attach, more=f'user = "{NOBODY}"'), top=TOP)
    supervisor.watching()
    for home in (attach, supervisor.config):
        for parent in list(home.parents)[:4]:
            parent.chmod(0o755)  # pytest's are root's alone
    creator.kill()
    (first,) = servers_of(supervisor, range(1), 1)
    assert psutil.Process(first).uids().effective == NOBODY

    supervisor.stop()
    text = supervisor.config.read_text()
    supervisor.config.write_text(text.replace(f'user = "{NOBODY}"', ""))
    supervisor.start().watching()
    kill({first})

    (second,) = servers_of(supervisor, range(1), 2)
    assert psutil.Process(second).uids().effective == NOBODY, "never root for a user's server"


def test_what_must_not_be_run_is_not_and_the_device_says_why(
    server: Servers, watch: Watch, tmp_path: Path, attach: Path
) -> None:
    theirs = tmp_path / "attach"
    theirs.write_bytes(attach.read_bytes())
    theirs.chmod(0o777)
    creator = server((0, 1, 2), depth=4)
    hangs = 'pre_recover = ["/bin/sleep", "600"]\npre_recover_timeout_s = 0.5'
    supervisor = watch(
        {},
        "attempts_max = 2\n"
        + tables(range(1), theirs)
        + tables(range(1, 2), attach, more=hangs)
        + tables(range(2, 3), attach, more='pre_recover = ["/bin/false"]'),
        top=TOP,
    )
    wrong = supervisor.until("refused", 0, phase="observed", reason="UNTRUSTED")
    assert f"chmod go-w {theirs}" in wrong["detail"]
    for dev_id in (1, 2):
        supervisor.watching(dev_id)

    creator.kill()

    hook = supervisor.until("given up", 1, phase="failed", reason="HOOK_FAILED")
    assert "pre_recover: killed after 0.5 s" in hook["detail"]
    hook = supervisor.until("given up", 2, phase="failed", reason="HOOK_FAILED")
    assert "pre_recover: exit status 1" in hook["detail"]
    supervisor.until_tagged()
    assert supervisor.until("left alone", 0, reason="UNTRUSTED")["state"] == "QUIESCED"


def test_a_device_is_registered_while_we_run_and_by_its_profile(
    server: Servers, watch: Watch, control: Control, attach: Path
) -> None:
    """Side by side: one by hand, one by what its server left, one by nobody."""
    RUN_FILES.mkdir(exist_ok=True)
    reference = server(0)
    profiled = server(1, more=("--run-dir", str(RUN_FILES)))
    nobodys = server(2)
    supervisor = watch({}, top=TOP)
    supervisor.watching(1)
    for dev_id in (0, 2):
        supervisor.until("in nobody's care", dev_id, phase="observed", reason="NO_SPEC")

    supervisor.order("register", "0", "--", str(attach))
    supervisor.watching(0)
    for each in (reference, profiled, nobodys):
        each.kill()

    for dev_id in (0, 1):
        servers_of(supervisor, range(dev_id, dev_id + 1), 1)
    assert supervisor.until("left alone", 2, phase="observed")["state"] == "QUIESCED"
    supervisor.config.write_text(supervisor.config.read_text() + "nonsense")
    supervisor.reload()
    supervisor.until_said("configuration not reloaded, the old one goes on")
    assert control.info(0).ublksrv_pid == supervisor.watching(0)["server_pid"]
