"""Servers that live while I/O hangs in them, on the real driver: the kernel says all is well."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import DEADLINE_S, wait_until
from supervisor import Supervisor
from test_orders import ublkwatch

from ublkwatch.profiles import RUN_FILES
from ublkwatch.uapi import DevState
from ublkwatch.verbs import Exit

if TYPE_CHECKING:
    from conftest import Control, Load, Servers

    Watch = Callable[..., Supervisor]

RUN = ("--run-dir", str(RUN_FILES))


@pytest.mark.usefixtures("no_block_errors")
def test_a_server_that_is_stopped_is_found_and_forgotten_when_it_goes_on(
    server: Servers,
    watch: Watch,
    fio: Load,
    control: Control,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pid = server().pid
    supervisor = watch({0: "null"}, "stall_timeout_s = 10")
    supervisor.watching()
    load = fio(rw="randread", verify=0, time_based=1, runtime=3600)
    load.wait_progress()
    os.kill(pid, signal.SIGSTOP)
    supervisor.until(
        "the stall shows, and why",
        ailment="stall",
        explanation="stalled: its server has requests and completes none "
        f"(process {pid}: its process is stopped: SIGSTOP, or a debugger)",
    )
    assert control.info(0).state == DevState.LIVE, "as far as the kernel knows"
    assert ublkwatch(supervisor, "explain", "0") == Exit.OK
    assert "Next:    nothing by itself, as on_stall says" in capsys.readouterr().out
    assert ublkwatch(supervisor, "status") == Exit.UNHEALTHY
    assert capsys.readouterr().out.startswith("1 device: 1 in trouble\n")
    os.kill(pid, signal.SIGCONT)
    supervisor.until("it is well again", ailment=None)
    load.wait_progress()
    load.interrupt()
    load.report()
    after = supervisor.watching()
    assert (after["recoveries"], after["server_pid"]) == (0, pid)


@pytest.mark.usefixtures("no_block_errors")
def test_a_flush_that_hangs_alone_is_a_stall(server: Servers, watch: Watch) -> None:
    """It is in no count of /sys/block/ublkb0/inflight."""
    pid = server(target="loop", size="16M").pid
    supervisor = watch({0: "loop"}, "stall_timeout_s = 2")
    supervisor.watching()
    os.kill(pid, signal.SIGSTOP)
    flush = "import os; os.fsync(os.open('/dev/ublkb0', os.O_RDWR))"
    with subprocess.Popen([sys.executable, "-c", flush]) as waiting:
        supervisor.until("the stall shows", ailment="stall")
        assert waiting.poll() is None
        supervisor.order("recover", "0", "--yes")
        supervisor.until("it is recovered", phase="watching", recoveries=1)
        assert waiting.wait(DEADLINE_S) == 0


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "mnt"
    place.mkdir()
    yield place
    subprocess.run(["umount", place], check=False)


@pytest.mark.usefixtures("no_block_errors")
def test_a_mounted_file_system_outlives_servers_that_hang(
    server: Servers, watch: Watch, mount: Path
) -> None:
    """The first one is ended by the policy, the second one by an operator."""
    server(target="ram", size="64M", queues=2)
    supervisor = watch({0: "ram"}, 'stall_timeout_s = 10\non_stall = "kill"')
    supervisor.watching()
    subprocess.run(["mkfs.ext4", "-q", "/dev/ublkb0"], check=True)
    subprocess.run(["mount", "/dev/ublkb0", mount], check=True)
    busy = """i=0; while [ ! -e "$0/stop" ]; do head -c 200000 /dev/urandom >"$0/f$((i % 8))" &&
        sync -f "$0" || exit 1; i=$((i + 1)); done"""
    with subprocess.Popen(["sh", "-c", busy, str(mount)]) as writer:
        content = os.urandom(1 << 20)
        (mount / "kept").write_bytes(content)
        for order in (None, "recover"):
            before = supervisor.watching()
            if order:
                supervisor.config.write_text(
                    supervisor.config.read_text().replace('on_stall = "kill"', 'on_stall = "alert"')
                )
                supervisor.reload()
                supervisor.until_true("reloaded", lambda now: "on_stall" not in now["care"])
            os.kill(before["server_pid"], signal.SIGSTOP)
            if order:
                supervisor.until("the stall shows", ailment="stall")
                supervisor.order(order, "0", "--yes")
            after = supervisor.recovered(before)
            assert after["detected_by"] == "stall"
        (mount / "stop").touch()
        assert writer.wait(DEADLINE_S) == 0
    subprocess.run(["umount", mount], check=True)
    subprocess.run(["fsck.ext4", "-fn", "/dev/ublkb0"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["mount", "-o", "ro", "/dev/ublkb0", mount], check=True)
    read = hashlib.sha256((mount / "kept").read_bytes()).hexdigest()
    assert read == hashlib.sha256(content).hexdigest()


@pytest.mark.usefixtures("no_block_errors")
def test_a_queue_that_lost_its_thread_has_a_new_one_at_once(
    server: Servers, watch: Watch, fio: Load, tmp_path: Path
) -> None:
    """Never without a thread for as long as a stall takes to be one: that time is an hour."""
    server(target="ram", queues=2)
    RUN_FILES.mkdir(mode=0o755, exist_ok=True)
    faults = tmp_path / "faults"
    faults.write_text("stop-queue:0\n")
    command = [*server.target("ram"), *RUN, "--fault-file", str(faults)]
    supervisor = watch({0: command}, "stall_timeout_s = 3600\nstable_s = 3600")
    supervisor.watching()
    load = fio(numjobs=2, size="2m", offset_increment="2m", time_based=1, runtime=3600,
               verify_backlog=64)  # fmt: skip
    load.wait_progress()
    supervisor.kill_server()
    after = supervisor.until("the second one lost a queue", phase="watching", recoveries=2)
    assert after["detected_by"] == "dead_queue"
    assert supervisor.said().count("ServerAils") == 1
    wait_until(lambda: faults.read_text() == "", DEADLINE_S, "the fault was taken")
    load.wait_progress()
    load.interrupt()
    load.report()


def test_a_file_system_can_be_unmounted_when_the_time_of_its_io_is_over(
    server: Servers, watch: Watch, control: Control, mount: Path, tmp_path: Path
) -> None:
    server(target="ram", size="64M")
    faults = tmp_path / "faults"
    faults.write_text("exit-at-start\n" * 99)
    command = [*server.target("ram"), "--fault-file", str(faults)]
    supervisor = watch({0: command}, "hold_timeout_s = 4\nattempts_max = 99")
    supervisor.watching()
    subprocess.run(["mkfs.ext4", "-q", "/dev/ublkb0"], check=True)
    subprocess.run(["mount", "/dev/ublkb0", mount], check=True)
    supervisor.kill_server()
    write = 'echo 1 >"$0/file" && sync -f "$0"'
    with subprocess.Popen(["sh", "-c", write, str(mount)], stderr=subprocess.DEVNULL) as waiting:
        supervisor.until("its time is over", phase="failed", stopped=True)
        assert waiting.wait(DEADLINE_S) != 0, "it was told that its write is lost"
    subprocess.run(["umount", mount], check=True, timeout=DEADLINE_S)
    control.remove(0)
    supervisor.until_gone()
    server(target="ram", size="64M")
    supervisor.watching()
