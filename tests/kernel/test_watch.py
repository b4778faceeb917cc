"""ublkwatch over the real driver: what issue and README promise, seen to work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import DEADLINE_S, unload_driver
from supervisor import SERVER, Supervisor

if TYPE_CHECKING:
    from conftest import Control, Load, Servers

    Watch = Callable[..., Supervisor]

KILLS = 10
QUEUES = min(2, os.cpu_count() or 1)


def endless(**options: str | int) -> dict[str, str | int]:
    return {"time_based": 1, "runtime": 3600, **options}


@pytest.mark.usefixtures("no_block_errors")
def test_reads_go_on_through_ten_kills_and_again_after_the_module_was_reloaded(
    server: Servers, watch: Watch, fio: Load, control: Control
) -> None:
    supervisor = watch({0: "null"})
    for round_ in range(2):
        creator = server(queues=QUEUES, depth=32)
        assert control.info(0).nr_hw_queues == QUEUES
        supervisor.watching()
        reader = fio(rw="randread", verify=0, **endless())
        seen = {creator.pid}
        for _ in range(KILLS if round_ == 0 else 2):
            after = supervisor.recovered(supervisor.kill_server())
            assert after["server_pid"] not in seen
            seen.add(after["server_pid"])
            reader.wait_progress()
        reader.interrupt()
        reader.report()
        creator.wait()
        control.remove(0)
        supervisor.until_gone()
        # Nothing of ours pins the module while there is no device.
        unload_driver()
        subprocess.run(["modprobe", "ublk_drv"], check=True)
    supervisor.stop()


@pytest.mark.usefixtures("no_block_errors")
@pytest.mark.parametrize("target", ["loop", pytest.param("ram", marks=pytest.mark.full)])
def test_nothing_that_was_written_is_lost_or_spoilt_across_ten_kills(
    server: Servers, watch: Watch, fio: Load, target: str
) -> None:
    server(target=target, queues=QUEUES, depth=32)
    supervisor = watch({0: target})
    supervisor.watching()
    writer = fio(size="16m", verify_backlog=64, **endless())
    for _ in range(KILLS):
        writer.wait_progress()
        supervisor.recovered(supervisor.kill_server())
    writer.wait_progress()
    writer.interrupt()
    job = writer.report()
    assert job["read"]["total_ios"] > 0  # it did verify
    # And the whole of it once more, by another fio: what it wrote is what is there.
    fio(size="4m", do_verify=1).report()
    page = metrics(supervisor)
    assert f'ublkwatch_recoveries_total{{device="ublkb0",result="success"}} {KILLS}.0' in page
    assert f"ublkwatch_recovery_duration_seconds_count {KILLS}.0" in page
    assert 'ublkwatch_device_state{device="ublkb0",state="live"} 1.0' in page
    assert 'ublkwatch_server_up{device="ublkb0"} 1.0' in page


def test_two_devices_killed_at_once_both_recover(server: Servers, watch: Watch) -> None:
    server(0)
    server(1)
    supervisor = watch({0: "null", 1: "null"})
    befores = [supervisor.watching(0), supervisor.watching(1)]
    for dev_id in (0, 1):
        supervisor.kill_server(dev_id)
    for before in befores:
        supervisor.recovered(before)


def test_a_device_whose_server_cannot_start_does_not_delay_the_other(
    server: Servers, watch: Watch, tmp_path: Path, control: Control
) -> None:
    faults = tmp_path / "faults"
    faults.write_text("hang-at-start\n" * 10)
    server(0)
    server(1)
    broken = [*server.target("null"), "--fault-file", str(faults)]
    own = f"ready_timeout_s = 3600\nattempts_max = 2\ncommand = {json.dumps([*SERVER, *broken])}"
    supervisor = watch({1: "null"}, f"[[device]]\ndev_id = 0\n{own}")
    supervisor.watching(0)
    before = supervisor.watching(1)
    supervisor.kill_server(0)
    supervisor.kill_server(1)
    supervisor.recovered(before)
    other = supervisor.device(0)
    assert other is not None
    assert other["phase"] not in ("watching", "failed")
    for attempt in (1, 2):  # nobody has the hour that each of its servers has
        shown = supervisor.until_true(
            "its server starts",
            lambda now, attempt=attempt: now["attempts"] == attempt and now["candidate_pid"],  # type: ignore[misc]
        )
        os.kill(shown["candidate_pid"], signal.SIGKILL)
    failed = supervisor.until("given up", 0, phase="failed")
    assert failed["reason"] == "DIED_BEFORE_READY"
    assert control.info(1).state == 1


def test_a_device_without_recovery_is_shown_as_such_and_left_alone(
    server: Servers, watch: Watch
) -> None:
    creator = server(recovery="none")
    supervisor = watch({0: "null"})
    shown = supervisor.until("observed", phase="observed", state="LIVE")
    assert shown["reason"] == "NO_RECOVERY_FLAG"
    assert shown["server_pid"] == creator.pid
    creator.kill()
    supervisor.until_gone()
    assert "draining" not in supervisor.said()


@pytest.mark.parametrize("how", ["stop", "delete"])
def test_a_device_that_someone_removes_disappears_without_a_fuss(
    server: Servers, watch: Watch, control: Control, how: str
) -> None:
    creator = server()
    supervisor = watch({0: "null"})
    supervisor.watching()
    if how == "stop":
        control.run(lambda ctrl: ctrl.stop_dev(0))
    else:
        control.remove(0)
    creator.wait()
    supervisor.until_gone()
    assert control.exists(0) == (how == "stop")
    assert "ERROR" not in supervisor.said()
    # It is not resurrected: a new device under the same id is another one.
    if how == "stop":
        control.remove(0)
    server()
    assert supervisor.watching()["recoveries"] == 0


def test_ublkwatch_may_be_stopped_and_started_while_a_server_is_up(
    server: Servers, watch: Watch
) -> None:
    server()
    supervisor = watch({0: "null"})
    after = supervisor.recovered(supervisor.kill_server())
    supervisor.stop()
    assert Path(f"/proc/{after['server_pid']}").exists()
    supervisor.start()
    adopted = supervisor.watching()
    assert adopted["server_pid"] == after["server_pid"]
    assert adopted["recoveries"] == 1
    supervisor.recovered(supervisor.kill_server())


def test_a_server_that_died_while_ublkwatch_was_down_is_replaced(
    server: Servers, watch: Watch
) -> None:
    creator = server()
    supervisor = watch({0: "null"})
    before = supervisor.watching()
    supervisor.stop()
    creator.kill()
    supervisor.start()
    supervisor.recovered(before)


def test_a_new_device_is_noticed_by_its_uevent(server: Servers, watch: Watch) -> None:
    supervisor = watch({0: "null"})
    supervisor.until_written()
    server()
    supervisor.watching()
    assert "no uevents" not in supervisor.said()


def metrics(supervisor: Supervisor) -> str:
    port = supervisor.said().split("metrics on port ")[-1].split()[0]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=DEADLINE_S) as page:
        text: str = page.read().decode()
    return text
