"""The reference server against the real driver: what the other kernel tests stand on."""

from __future__ import annotations

import errno
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    DEADLINE_S,
    Attaching,
    Control,
    KernelLog,
    Load,
    Servers,
    wait_until,
)
from supervisor import SERVER

from ublkwatch.ctrl import CtrlError
from ublkwatch.demo.faults import CRASHED
from ublkwatch.model import Generation, RecoveryMode
from ublkwatch.uapi import DevFlags, DevState

SIZE = 32 << 20
# What Linux 6.12's ublk_uring_cmd_cancel_fn(), mostly inlined, says of a queue fetched in part.
PARTIAL = r"WARNING:.* ublk_(ch_uring_cmd|uring_cmd_cancel_fn)\b"


def recover(control: Control, dev_id: int, candidate: Attaching, attempt: int = 1) -> None:
    """Recover by hand, as the attach contract has it."""
    candidate.wait_ready()
    control.start_user_recovery(dev_id)
    candidate.write_line(control.line(dev_id, attempt))
    control.end_user_recovery(dev_id, candidate.pid)
    control.wait_state(dev_id, DevState.LIVE)


# --- creating ------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["null", "ram", "loop"])
def test_created_device_is_live_with_what_was_granted(server: Servers, target: str) -> None:
    reference = server(target=target, queues=2, depth=16)

    info = reference.info()
    assert info.state == DevState.LIVE
    assert info.ublksrv_pid == reference.pid
    assert (info.nr_hw_queues, info.queue_depth) == (2, 16)
    assert reference.live()[0] == {"queues": 2, "depth": 16, "flags": int(info.flags)}
    assert RecoveryMode.of(info.flags) is RecoveryMode.REISSUE
    assert int(Path("/sys/block/ublkb0/size").read_text()) * 512 == SIZE


def test_block_size_and_buffer_size_reach_the_disk(server: Servers) -> None:
    server(more=("--block-size", "4096", "--max-io-buf-bytes", "64K"))

    queue = Path("/sys/block/ublkb0/queue")
    assert (queue / "logical_block_size").read_text() == "4096\n"
    assert (queue / "max_hw_sectors_kb").read_text() == "64\n"


@pytest.mark.parametrize("target", ["ram", "loop"])
@pytest.mark.usefixtures("no_block_errors")
def test_data_verifies(server: Servers, fio: Load, target: str) -> None:
    server(target=target, queues=2)

    job = fio(fsync=64, end_fsync=1).report()

    assert job["write"]["total_ios"] == 1024
    assert job["read"]["total_ios"] == 1024


def test_one_process_serves_several_devices(server: Servers, fio: Load) -> None:
    reference = server((0, 1, 5), target="ram")

    for load in [fio(dev_id, size="1m") for dev_id in (0, 1, 5)]:
        load.report()
    assert {reference.info(dev_id).ublksrv_pid for dev_id in (0, 1, 5)} == {reference.pid}


def test_devices_are_deleted_when_one_cannot_be_created(server: Servers, control: Control) -> None:
    server(3)

    refused = server.start((4, 3), more=("--size", "1M"))

    assert refused.wait() == 1
    assert "ADD_DEV ublk 3" in refused.stderr
    assert control.exists(3)
    assert not control.exists(4)


def test_device_is_deleted_when_its_parameters_are_refused(
    server: Servers, control: Control
) -> None:
    refused = server.start(more=("--size", "1M", "--block-size", "65536"))

    assert refused.wait() == 1
    assert "SET_PARAMS ublk 0: EINVAL" in refused.stderr
    assert not control.exists(0)


def test_stopping_and_deleting_ends_the_server(server: Servers, control: Control) -> None:
    reference = server()

    subprocess.run([*SERVER, "--stop", "0", "--delete", "0"], check=True, timeout=DEADLINE_S)

    assert reference.wait() == 0
    assert not control.exists(0)


# --- dying ---------------------------------------------------------------------------------------


def test_killed_server_leaves_a_quiesced_device(server: Servers, control: Control) -> None:
    server(recovery="reissue").kill()

    control.wait_state(0, DevState.QUIESCED)


def test_killed_server_without_recovery_leaves_a_dead_device(
    server: Servers, control: Control
) -> None:
    reference = server(recovery="none")
    assert not reference.info().flags & DevFlags.USER_RECOVERY

    reference.kill()

    control.wait_state(0, DevState.DEAD)
    wait_until(lambda: not Path("/sys/block/ublkb0").exists(), DEADLINE_S, "the disk is gone")


def test_fail_io_is_what_the_kernel_makes_of_it(
    server: Servers, control: Control, generation: Generation
) -> None:
    reference = server(recovery="fail_io")
    fails = RecoveryMode.of(reference.info().flags) is RecoveryMode.FAIL_IO
    assert fails == (generation is Generation.G3)  # of G2 only 6.13 and 6.14 know it; not ours

    reference.kill()

    control.wait_state(0, DevState.FAIL_IO if fails else DevState.QUIESCED)


# --- attaching -----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["ram", "loop"])
@pytest.mark.usefixtures("no_block_errors")
def test_recovery_by_the_attach_contract_under_load(
    server: Servers, control: Control, fio: Load, target: str
) -> None:
    reference = server(target=target, queues=2)
    load = fio(size="16m", verify_backlog=64, time_based=1, runtime=3600)
    load.wait_progress()

    reference.kill()
    control.wait_state(0, DevState.QUIESCED)
    candidate = server.attach("--dev-id", "0", target=target)
    recover(control, 0, candidate)

    assert control.info(0).ublksrv_pid == candidate.pid
    load.wait_progress()
    load.interrupt()
    load.report()


GROUP = (0, 3, 7)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Return a directory for run files, and for nothing else."""
    directory = tmp_path / "run"
    directory.mkdir()
    return directory


def runs(directory: Path) -> dict[int, dict[str, Any]]:
    """Return the run files of a directory, by device."""
    found = [json.loads(path.read_text()) for path in directory.glob("*.json")]
    return {each["dev_id"]: each for each in found}


@pytest.mark.usefixtures("no_block_errors")
def test_one_process_attaches_several_devices_each_by_its_own_line(
    server: Servers, control: Control, fio: Load, run_dir: Path
) -> None:
    leaving = ("--run-dir", str(run_dir), "--group", "pool")
    reference = server(GROUP, target="ram", queues=2, more=leaving)
    assert {each["pid"] for each in runs(run_dir).values()} == {reference.pid}
    loads = [fio(each, size="2m", verify_backlog=64, time_based=1, runtime=3600) for each in GROUP]
    for load in loads:
        load.wait_progress()
    reference.kill()
    assert runs(run_dir).keys() == set(GROUP)

    candidate = server.attach(*leaving, target="ram").wait_ready()
    for dev_id in reversed(GROUP):  # in any order, and each when its START was accepted
        control.start_user_recovery(dev_id)
        candidate.send(control.line(dev_id))
        control.end_user_recovery(dev_id, candidate.pid)
        control.wait_state(dev_id, DevState.LIVE)

    assert {control.info(each).ublksrv_pid for each in GROUP} == {candidate.pid}
    for dev_id, each in runs(run_dir).items():
        assert (each["pid"], each["group"]) == (candidate.pid, "pool"), dev_id
    for load in loads:
        load.wait_progress()
        load.interrupt()
        load.report()
    # One that ends leaves the others served, and its own run file is taken back.
    control.remove(0)
    assert candidate.proc.poll() is None
    assert runs(run_dir).keys() == {3, 7}
    fio(3, size="1m").report()


def test_a_device_that_cannot_be_attached_leaves_the_others_served(
    server: Servers, control: Control, fio: Load
) -> None:
    reference = server((0, 1))
    reference.kill()
    candidate = server.attach("--fault", "none").wait_ready()
    control.start_user_recovery(0)
    candidate.send(control.line(0))
    control.end_user_recovery(0, candidate.pid)
    control.start_user_recovery(1)
    candidate.send(control.line(1) | {"flags": int(DevFlags.ZONED)})

    wait_until(lambda: "cannot serve" in candidate.stderr, DEADLINE_S, "it says so")
    assert candidate.proc.poll() is None
    fio(0, verify=0, rw="randread").report()
    candidate.send(control.line(1))  # START is still good: nobody has opened the device
    control.end_user_recovery(1, candidate.pid)
    control.wait_state(1, DevState.LIVE)


def test_run_file_is_for_root_alone_to_write_and_goes_with_the_device(
    server: Servers, control: Control, run_dir: Path
) -> None:
    reference = server(more=("--run-dir", str(run_dir)))
    path = run_dir / "0.json"
    assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (0, 0o644)
    assert runs(run_dir)[0]["command"][1:3] == ["-m", "ublkwatch.demo.server"]

    control.remove(0)

    assert reference.wait() == 0
    assert list(run_dir.iterdir()) == []


def test_standby_waits_untouched_and_leaves_quietly(server: Servers) -> None:
    server(target="ram")
    standby = server.attach("--dev-id", "0", target="ram").wait_ready()
    assert standby.char_devices() == set()

    standby.write_line(None)

    assert standby.wait() == 0
    assert standby.stderr == ""


def test_wrong_size_is_refused_before_the_device_is_touched(
    server: Servers, control: Control
) -> None:
    server().kill()
    control.wait_state(0, DevState.QUIESCED)
    candidate = server.attach("--size", "16M").wait_ready()
    control.start_user_recovery(0)

    candidate.write_line(control.line(0))

    assert candidate.wait() == 78
    assert "65536 sectors and the target 32768" in candidate.stderr
    # START is still good for one server, on every kernel: nobody has opened the device.
    second = server.attach().wait_ready()
    second.write_line(control.line(0, attempt=2))
    control.end_user_recovery(0, second.pid)
    control.wait_state(0, DevState.LIVE)


def test_missing_file_is_permanent(server: Servers) -> None:
    candidate = server.attach("--file", "/nonexistent", target="loop")

    assert candidate.wait() == 78
    assert "/nonexistent" in candidate.stderr
    assert not candidate.ready()


@pytest.mark.parametrize("line", [b"\n", b"[]\n", b'{"dev_id": 0}\n'])
def test_line_that_is_none_is_refused(server: Servers, line: bytes) -> None:
    candidate = server.attach().wait_ready()
    assert candidate.proc.stdin is not None
    candidate.proc.stdin.write(line)
    candidate.proc.stdin.close()

    assert candidate.wait() == 1
    assert "standard input" in candidate.stderr


def test_busy_device_is_given_up_in_time(server: Servers, control: Control) -> None:
    server()  # its server holds the character device
    candidate = server.attach().wait_ready()

    candidate.write_line(control.line(0))

    assert candidate.wait() == 1
    assert "/dev/ublkc0" in candidate.stderr


# --- misbehaving ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("fault", "ready"), [("exit-at-start", False), ("exit-after-ready", True)])
def test_exit_before_the_line(server: Servers, fault: str, *, ready: bool) -> None:
    candidate = server.attach("--fault", fault)

    assert candidate.wait() == CRASHED
    assert candidate.ready() == ready


@pytest.mark.parametrize(
    "fault", ["exit-after-mmap", "exit-after-fetches:3", "exit-after-all-fetches"]
)
def test_exit_half_attached(
    server: Servers, control: Control, generation: Generation, kernel_log: KernelLog, fault: str
) -> None:
    kernel_log.expect(PARTIAL)
    server(queues=2).kill()
    candidate = server.attach("--fault", fault).wait_ready()
    control.start_user_recovery(0)
    candidate.write_line(control.line(0))

    assert candidate.wait() == CRASHED
    assert control.info(0).state == DevState.QUIESCED
    if generation is Generation.G3:  # on G2 only STOP_DEV frees the device, as at the test's end
        recover(control, 0, server.attach(), attempt=2)


@pytest.mark.parametrize("fault", ["hang-after-ready", "hang-after-mmap", "hang-after-fetches:3"])
def test_hang_before_the_last_fetch_keeps_the_device_waiting(
    server: Servers, control: Control, kernel_log: KernelLog, fault: str
) -> None:
    kernel_log.expect(PARTIAL)
    server(queues=2).kill()
    candidate = server.attach("--fault", fault).wait_ready()
    control.start_user_recovery(0)
    candidate.write_line(control.line(0))
    if fault != "hang-after-ready":
        wait_until(
            lambda: candidate.char_devices() == {"/dev/ublkc0"}, DEADLINE_S, "the device is open"
        )

    async def end(ctrl: Any) -> int | None:
        operation = await ctrl.begin_end_user_recovery(0, candidate.pid)
        with pytest.raises(CtrlError) as late:
            await operation.result(1)
        operation.cancel()
        with pytest.raises(CtrlError) as cancelled:
            await operation.result(DEADLINE_S)
        assert late.value.errno == errno.ETIMEDOUT
        return cancelled.value.errno

    assert control.run(end) == errno.EINTR
    assert candidate.proc.poll() is None
    assert control.info(0).state == DevState.QUIESCED


@pytest.mark.parametrize("fault", ["hang-after-all-fetches", "stall"])
def test_live_and_silent(server: Servers, control: Control, fio: Load, fault: str) -> None:
    server().kill()
    candidate = server.attach("--fault", fault)
    recover(control, 0, candidate)

    load = fio(verify=0, rw="randread")

    inflight = Path("/sys/block/ublkb0/inflight")
    wait_until(
        lambda: int(inflight.read_text().split()[0]) == 8, DEADLINE_S, "all of fio's are held"
    )
    with pytest.raises(subprocess.TimeoutExpired):
        load.proc.wait(1)
    assert candidate.proc.poll() is None
    assert control.info(0).state == DevState.LIVE


def test_stopped_queue_is_invisible(server: Servers, control: Control, fio: Load) -> None:
    server().kill()
    candidate = server.attach("--fault", "stop-queue:0")
    recover(control, 0, candidate)
    threads = candidate.threads()

    load = fio(verify=0, rw="randread")

    wait_until(lambda: candidate.threads() < threads, DEADLINE_S, "the queue's thread returns")
    with pytest.raises(subprocess.TimeoutExpired):
        load.proc.wait(1)
    assert candidate.proc.poll() is None
    assert control.info(0).state == DevState.LIVE


def test_leaked_descriptor_keeps_the_device_busy(
    server: Servers, control: Control, generation: Generation
) -> None:
    reference = server(more=("--fault", "leak"))
    holder = int(reference.stderr.split()[2])
    try:
        reference.kill()
        if generation is Generation.G3:  # as long as the last descriptor is not closed
            wait_until(lambda: control.info(0).ublksrv_pid == -1, DEADLINE_S, "no server")
            assert control.info(0).state == DevState.LIVE
        else:
            control.wait_state(0, DevState.QUIESCED)
        with pytest.raises(CtrlError) as busy:
            control.run(lambda ctrl: ctrl.start_user_recovery(0))
        assert busy.value.errno == errno.EBUSY
    finally:
        subprocess.run(["kill", "-9", str(holder)], check=True)
    control.wait_state(0, DevState.QUIESCED)


def test_fork_away_serves_from_the_child(server: Servers, control: Control) -> None:
    server().kill()
    candidate = server.attach("--fault", "fork-away").wait_ready()
    control.start_user_recovery(0)
    candidate.write_line(control.line(0))
    assert candidate.wait() == 0
    children = Path("/proc")

    def opener() -> int | None:
        for process in children.glob("[0-9]*"):
            try:
                links = [str(fd.readlink()) for fd in (process / "fd").iterdir()]
            except OSError:
                continue
            if "/dev/ublkc0" in links:
                return int(process.name)
        return None

    wait_until(lambda: opener() is not None, DEADLINE_S, "the child has the device open")
    child = opener()
    assert child is not None
    control.end_user_recovery(0, child)
    assert control.info(0).state == DevState.LIVE
    subprocess.run(["kill", "-9", str(child)], check=True)


def test_ignored_sigterm(server: Servers) -> None:
    stubborn, meek = server.attach("--fault", "ignore-sigterm"), server.attach()
    for process in (stubborn, meek):
        process.wait_ready()
        process.proc.terminate()

    assert meek.wait() == -15
    assert stubborn.proc.poll() is None


def test_fault_file_is_used_up_line_by_line(server: Servers, tmp_path: Path) -> None:
    script = tmp_path / "faults"
    script.write_text("exit-at-start\nnone\nexit-after-ready\n")
    endings = []
    for _ in range(4):
        candidate = server.attach("--fault-file", str(script))
        candidate.write_line(None)
        endings.append(candidate.wait())

    assert endings == [CRASHED, 0, CRASHED, 0]
    assert script.read_text() == ""
