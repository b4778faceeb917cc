"""The control client without a driver: what it says, and what it keeps open.

A regular file stands for the control node: a command on it ends with EOPNOTSUPP.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import virtual
from notes import Notes

from ublkwatch import uapi
from ublkwatch.async_ring import AsyncRing, Operation
from ublkwatch.ctrl import CtrlError, UblkCtrl, patiently, unpack_dev_info
from ublkwatch.uapi import DevFlags, DevState
from ublkwatch.uring import Buffer

OP_READ = 22


@pytest.fixture
def node(tmp_path: Path) -> Path:
    path = tmp_path / "ublk-control"
    path.touch()
    return path


def is_open(node: Path) -> bool:
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            if descriptor.readlink() == node:
                return True
        except FileNotFoundError:
            continue  # the descriptor by which we list them
    return False


def on_ring(work: Callable[[AsyncRing], Awaitable[None]], entries: int = 8) -> None:
    async def main() -> None:
        ring = AsyncRing(entries)
        try:
            await work(ring)
        finally:
            ring.close()

    asyncio.run(main())


def test_a_missing_node_is_named_with_the_way_out(tmp_path: Path) -> None:
    async def work(ring: AsyncRing) -> None:
        with pytest.raises(OSError, match=r"ublk-control.*modprobe ublk_drv") as caught:
            await UblkCtrl(ring, tmp_path / "ublk-control").get_features()
        assert caught.value.errno == errno.ENOENT

    on_ring(work)


def test_a_failed_command_names_command_device_errno_and_meaning(node: Path) -> None:
    async def work(ring: AsyncRing) -> None:
        with pytest.raises(CtrlError) as caught:
            await UblkCtrl(ring, node).get_dev_info(7)
        assert str(caught.value) == (
            "GET_DEV_INFO ublk 7: EOPNOTSUPP (this kernel's ublk_drv does not know the command)"
        )
        assert (caught.value.errno, caught.value.dev_id) == (errno.EOPNOTSUPP, 7)

    on_ring(work)


def test_an_error_without_a_device_or_a_name_of_ours_still_reads_well() -> None:
    assert str(CtrlError(errno.EPERM, "GET_FEATURES", None)).startswith("GET_FEATURES: EPERM (no ")
    assert str(CtrlError(errno.ENOSPC, "ADD_DEV", 3)) == (
        "ADD_DEV ublk 3: ENOSPC (No space left on device)"
    )
    assert str(CtrlError(524, "ADD_DEV", 3)) == "ADD_DEV ublk 3: 524 (Unknown error 524)"


def test_the_node_is_open_only_while_a_command_is_under_way(node: Path) -> None:
    async def work(ring: AsyncRing) -> None:
        ctrl = UblkCtrl(ring, node)
        assert not is_open(node)
        first = await ctrl.begin_end_user_recovery(1, 100)
        second = await ctrl.begin_end_user_recovery(2, 100)
        assert is_open(node)
        for operation in (first, second):
            with pytest.raises(CtrlError, match="END_USER_RECOVERY"):
                await operation.result(5)
        await asyncio.sleep(0)
        assert not is_open(node)
        with pytest.raises(CtrlError, match="STOP_DEV"):
            await ctrl.stop_dev(1)
        await asyncio.sleep(0)
        assert not is_open(node)

    on_ring(work)


def test_a_command_that_finds_no_slot_times_out_and_leaves_nothing_open(node: Path) -> None:
    async def work(ring: AsyncRing) -> None:
        reading, writing = os.pipe()
        stuck = Buffer(8)
        await ring.start(buffer=stuck, opcode=OP_READ, fd=reading, addr=stuck.address, len=8)
        with pytest.raises(CtrlError, match="GET_FEATURES: ETIMEDOUT"):
            await UblkCtrl(ring, node).get_features(timeout_s=0.02)
        assert not is_open(node)
        assert ring.in_flight == 1
        os.close(reading)
        os.close(writing)

    on_ring(work, entries=2)


class Mute(AsyncRing):
    """A ring whose kernel answers nothing until the test does."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []

    async def start(self, **_: Any) -> Operation:
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.operations.append(Operation(len(self.operations), None, done))
        return self.operations[-1]


def test_a_command_without_an_answer_is_wedged_until_one_comes(node: Path) -> None:
    async def work() -> None:
        ring, notes = Mute(), Notes()
        ctrl = UblkCtrl(ring, node, notes)
        with pytest.raises(CtrlError, match="GET_DEV_INFO ublk 1: ETIMEDOUT"):
            await ctrl.get_dev_info(1, timeout_s=0)
        assert ctrl.wedged == 1
        ring.operations[0].done.set_result(0)
        await asyncio.sleep(0)
        assert ctrl.wedged == 0
        assert notes.commands == [("GET_DEV_INFO", errno.ETIMEDOUT)]

    asyncio.run(work())


def test_a_command_that_fails_is_told_and_not_wedged(node: Path) -> None:
    async def work(ring: AsyncRing) -> None:
        notes = Notes()
        ctrl = UblkCtrl(ring, node, notes)
        with pytest.raises(CtrlError) as caught:
            await ctrl.stop_dev(1)
        assert notes.commands == [("STOP_DEV", caught.value.errno)]
        assert ctrl.wedged == 0
        ctrl = UblkCtrl(ring, Path("/dev/null"), notes)
        await ctrl.get_features()
        assert notes.commands[1:] == [("GET_FEATURES", 0)]

    on_ring(work)


def test_the_features_are_those_that_the_kernel_wrote() -> None:
    async def work(ring: AsyncRing) -> None:
        # /dev/null takes any command for done, and writes nothing.
        assert await UblkCtrl(ring, Path("/dev/null")).get_features() == DevFlags(0)

    on_ring(work)


def test_dev_info_is_unpacked_by_name() -> None:
    data = uapi.ublksrv_ctrl_dev_info.pack(
        dev_id=5,
        state=2,
        flags=DevFlags.USER_RECOVERY | DevFlags.ZONED,
        nr_hw_queues=2,
        queue_depth=64,
        max_io_buf_bytes=4096,
        ublksrv_pid=-1,
        ublksrv_flags=9,
        owner_uid=10,
        owner_gid=11,
    )
    info = unpack_dev_info(data)
    assert (info.dev_id, info.state, info.ublksrv_pid) == (5, DevState.QUIESCED, -1)
    assert info.flags == DevFlags.USER_RECOVERY | DevFlags.ZONED
    assert (info.nr_hw_queues, info.queue_depth, info.max_io_buf_bytes) == (2, 64, 4096)
    assert (info.ublksrv_flags, info.owner_uid, info.owner_gid) == (9, 10, 11)


def test_a_state_that_we_do_not_know_stays_a_number() -> None:
    info = unpack_dev_info(uapi.ublksrv_ctrl_dev_info.pack(state=77))
    assert info.state == 77
    assert not isinstance(info.state, DevState)


def test_a_flag_that_we_do_not_know_is_kept() -> None:
    info = unpack_dev_info(uapi.ublksrv_ctrl_dev_info.pack(flags=1 << 63))
    assert int(info.flags) == 1 << 63


def test_patience_counts_only_the_time_in_which_we_ran() -> None:
    async def wait() -> tuple[float, bool]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, virtual.Loop)
        nobody: asyncio.Future[None] = loop.create_future()
        loop.call_later(3, loop.jump, 3600)  # as a SIGSTOP does
        came = await patiently(nobody, 10)
        return loop.time(), came

    ended_at, came = virtual.run(wait())
    assert not came
    assert 3609 < ended_at < 3611
