"""/dev/ublk-control: one coroutine per control command.

What each command means, returns and waits for: docs/kernel.md; source: drivers/block/ublk_drv.c,
ublk_ctrl_uring_cmd() and the functions that it calls.

GET_DEV_INFO, GET_FEATURES and GET_QUEUE_AFFINITY take no lock and never sleep on a device. Every
other command can sleep uninterruptibly on the device's mutex, and then the process that issued it
cannot even be killed: those are for ctrl_worker's processes, never for the daemon's own.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Collection
from pathlib import Path
from typing import Any, TypeVar

from ublkwatch import uapi
from ublkwatch.async_ring import AsyncRing, Operation
from ublkwatch.glance import MOST, Glance
from ublkwatch.meter import Meter
from ublkwatch.model import DevInfo, errno_name
from ublkwatch.uapi import Cmd, DevFlags, DevState
from ublkwatch.uring import Buffer

T = TypeVar("T")

CONTROL = Path("/dev/ublk-control")

_MEANING = {
    errno.EPERM: "no CAP_SYS_ADMIN in the initial user namespace",
    errno.ENODEV: "there is no such device",
    errno.EBUSY: "the device is in use: its character device is still open, or it is LIVE",
    errno.EINVAL: "the device's flags or state do not allow it",
    errno.EOPNOTSUPP: "this kernel's ublk_drv does not know the command",
    errno.EINTR: "it was cancelled while it waited",
    errno.ETIMEDOUT: "the kernel did not answer in time",
}


_GLANCE_S = 2.0  # for all; who has not answered by then is asked alone
_BEAT_S = 0.5  # of patience: what a stall of ours counts at most


class CtrlError(OSError):
    """A control command that failed: names command, device, errno and what that means."""

    def __init__(self, code: int, command: str, dev_id: int | None) -> None:
        """``dev_id`` is None for a command that is about no device."""
        name = errno_name(code)
        meaning = _MEANING.get(code, os.strerror(code))
        where = "" if dev_id is None else f" ublk {dev_id}"
        super().__init__(code, f"{command}{where}: {name} ({meaning})")
        self.command = command
        self.dev_id = dev_id

    def __str__(self) -> str:
        """Return the message alone: it already names the errno."""
        return str(self.strerror)


class UblkCtrl:
    """A client of /dev/ublk-control.

    The node is open only while a command is under way, so that nothing of ours pins the module
    when no device exists.
    """

    def __init__(
        self,
        ring: AsyncRing,
        node: Path = CONTROL,
        meter: Meter | None = None,
        glance: Glance | None = None,
    ) -> None:
        """``glance`` may be one that asks otherwise."""
        self._ring = ring
        self._node = node
        self._meter = meter or Meter()
        self._wedged = 0
        self._fd = -1
        self._users = 0
        self._glance = glance or Glance()
        self._seen: dict[int, tuple[bytes, DevInfo]] = {}  # at the last glance
        self._glanced: tuple[tuple[int, ...], bytes] = ((), b"")  # where nothing failed
        self._infos: dict[int, DevInfo | CtrlError] = {}

    @property
    def wedged(self) -> int:
        """How many commands were not answered in time, and are with the kernel still."""
        return self._wedged + self._glance.wedged

    def close(self) -> None:
        """Give back what get_dev_infos() has of its own."""
        self._glance.close()

    async def get_features(self, *, timeout_s: float = 5) -> DevFlags:
        """Return what the driver can do; CtrlError on Linux before 6.5, which cannot say."""
        answer = Buffer(uapi.UBLK_FEATURES_LEN)
        await self._run(Cmd.GET_FEATURES, None, buffer=answer, timeout_s=timeout_s)
        return DevFlags(int.from_bytes(answer.bytes(), "little"))

    async def get_dev_info(self, dev_id: int, *, timeout_s: float = 5) -> DevInfo:
        """Return the device's info; CtrlError ENODEV when there is none. Works in every state."""
        answer = Buffer(uapi.ublksrv_ctrl_dev_info.size)
        await self._run(Cmd.GET_DEV_INFO, dev_id, buffer=answer, timeout_s=timeout_s)
        return unpack_dev_info(answer.bytes())

    async def get_dev_infos(self, dev_ids: Collection[int]) -> dict[int, DevInfo | CtrlError]:
        """Return what get_dev_info() returns or raises, of each, with one submission for all.

        Of a device that is as it was the last time it is the very same object. Who is not answered
        in time is left out: ask it alone. OSError where nobody can be asked so.
        """
        if not dev_ids:
            return {}
        asked, clock = tuple(sorted(dev_ids)[:MOST]), asyncio.get_running_loop().time
        fd, began = self._open(), clock()
        try:
            try:
                await patiently(self._glance.begin(fd, asked), _GLANCE_S)
            finally:
                answers, failed = self._glance.end()
        finally:
            self._release()
        self._meter.answered("GET_DEV_INFO", len(asked) - len(failed), clock() - began)
        for code in filter(None, failed.values()):
            self._meter.command("GET_DEV_INFO", code, clock() - began)
        if failed or self._glanced != (asked, answers):
            self._infos = self._taken(asked, answers, failed)
            self._glanced = ((), b"") if failed else (asked, answers)
        return self._infos

    def _taken(
        self, asked: tuple[int, ...], answers: bytes, failed: dict[int, int]
    ) -> dict[int, DevInfo | CtrlError]:
        infos: dict[int, DevInfo | CtrlError] = {}
        seen, size = {}, uapi.ublksrv_ctrl_dev_info.size
        for place, dev_id in enumerate(asked):
            if place not in failed:
                answer = answers[place * size : (place + 1) * size]
                before = self._seen.get(dev_id)
                same = before is not None and before[0] == answer
                seen[dev_id] = before if before and same else (answer, unpack_dev_info(answer))
                infos[dev_id] = seen[dev_id][1]
            elif code := failed[place]:
                infos[dev_id] = CtrlError(code, "GET_DEV_INFO", dev_id)
        self._seen = seen
        return infos

    async def get_queue_affinity(
        self, dev_id: int, queue: int, *, timeout_s: float = 5
    ) -> frozenset[int]:
        """Return the CPUs whose requests go to that queue."""
        answer = Buffer(1024)  # 8,192 CPUs, the most that x86-64 and arm64 are built for
        await self._run(
            Cmd.GET_QUEUE_AFFINITY, dev_id, buffer=answer, data=queue, timeout_s=timeout_s
        )
        mask = int.from_bytes(answer.bytes(), "little")
        return frozenset(cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1)

    async def get_params(self, dev_id: int, *, timeout_s: float = 30) -> dict[str, dict[str, int]]:
        """Return the device's parameters; may sleep on the device's mutex."""
        answer = Buffer(uapi.ublk_params.pack(len=uapi.ublk_params.size))
        await self._run(Cmd.GET_PARAMS, dev_id, buffer=answer, timeout_s=timeout_s)
        return uapi.unpack_params(answer.bytes())

    async def set_params(self, dev_id: int, params: uapi.Params, *, timeout_s: float = 30) -> None:
        """Set the parameters of a device that was not started yet (EACCES afterwards)."""
        buffer = Buffer(uapi.pack_params(params))
        await self._run(Cmd.SET_PARAMS, dev_id, buffer=buffer, timeout_s=timeout_s)

    async def add_dev(  # noqa: PLR0913 - the command's own arguments
        self,
        dev_id: int,
        *,
        queues: int,
        depth: int,
        max_io_buf_bytes: int = 512 << 10,
        flags: DevFlags | int = 0,
        timeout_s: float = 30,
    ) -> DevInfo:
        """Add a device (-1: the kernel chooses the id) and return what was granted.

        The kernel caps the queues at the CPU count, and Linux 6.12 clears unknown flags without a
        word: believe the answer only.
        """
        # The kernel compares the header's dev_id with the info's, so both get it (as unsigned).
        info = uapi.ublksrv_ctrl_dev_info.pack(
            nr_hw_queues=queues,
            queue_depth=depth,
            max_io_buf_bytes=max_io_buf_bytes,
            dev_id=dev_id & 0xFFFFFFFF,
            flags=flags,
        )
        answer = Buffer(info)
        await self._run(Cmd.ADD_DEV, dev_id, buffer=answer, timeout_s=timeout_s)
        return unpack_dev_info(answer.bytes())

    async def start_dev(self, dev_id: int, pid: int, *, timeout_s: float = 30) -> None:
        """Make the disk appear; sleeps until the server ``pid`` fetched every tag."""
        await self._run(Cmd.START_DEV, dev_id, data=pid, timeout_s=timeout_s)

    async def stop_dev(self, dev_id: int, *, timeout_s: float = 60) -> None:
        """Remove the disk; sleeps, holding the device's mutex, while a server sits on requests."""
        await self._run(Cmd.STOP_DEV, dev_id, timeout_s=timeout_s)

    async def try_stop_dev(self, dev_id: int, *, timeout_s: float = 60) -> None:
        """As stop_dev(), but EBUSY while somebody has the disk open (Linux 7.0)."""
        await self._run(Cmd.TRY_STOP_DEV, dev_id, timeout_s=timeout_s)

    async def del_dev(self, dev_id: int, *, timeout_s: float = 60) -> None:
        """Delete the device; sleeps until nobody has it open. Never sent by the supervisor."""
        await self._run(Cmd.DEL_DEV, dev_id, timeout_s=timeout_s)

    async def start_user_recovery(self, dev_id: int, *, timeout_s: float = 30) -> None:
        """Begin a recovery once: EBUSY while the character device is open or the state LIVE."""
        await self._run(Cmd.START_USER_RECOVERY, dev_id, timeout_s=timeout_s)

    async def begin_end_user_recovery(self, dev_id: int, pid: int) -> CtrlOperation:
        """Send END_USER_RECOVERY and return at once; it ends when every tag was fetched."""
        return await self._begin(Cmd.END_USER_RECOVERY, dev_id, data=pid)

    async def end_user_recovery(self, dev_id: int, pid: int, *, timeout_s: float = 30) -> None:
        """Finish a recovery; ``pid`` opened the character device (checked from Linux 6.17 on)."""
        operation = await self.begin_end_user_recovery(dev_id, pid)
        await operation.result(timeout_s)

    async def _run(
        self,
        command: Cmd,
        dev_id: int | None,
        *,
        timeout_s: float,
        buffer: Buffer | None = None,
        data: int = 0,
    ) -> None:
        await metered(
            self._meter, command.name, self._ask(command, dev_id, timeout_s, buffer, data)
        )

    async def _ask(
        self,
        command: Cmd,
        dev_id: int | None,
        timeout_s: float,
        buffer: Buffer | None,
        data: int,
    ) -> None:
        deadline = asyncio.get_running_loop().time() + timeout_s
        try:
            async with asyncio.timeout_at(deadline):
                operation = await self._begin(command, dev_id, buffer=buffer, data=data)
        except TimeoutError:  # every slot is taken by a command that never came back
            raise CtrlError(errno.ETIMEDOUT, command.name, dev_id) from None
        try:
            await operation.result(deadline - asyncio.get_running_loop().time())
        except CtrlError:
            if not operation.done.done():
                self._wedged += 1
                operation.done.add_done_callback(self._unwedge)
            raise

    def _unwedge(self, _: asyncio.Future[int]) -> None:
        self._wedged -= 1

    async def _begin(
        self, command: Cmd, dev_id: int | None, *, buffer: Buffer | None = None, data: int = 0
    ) -> CtrlOperation:
        fd = self._open()
        try:
            operation = await self._ring.start(
                buffer=buffer,
                opcode=uapi.IORING_OP_URING_CMD,
                fd=fd,
                cmd_op=command,
                cmd=uapi.ublksrv_ctrl_cmd.pack(
                    dev_id=(dev_id or 0) & 0xFFFFFFFF,
                    queue_id=0xFFFF,
                    len=buffer.size if buffer else 0,
                    addr=buffer.address if buffer else 0,
                    data=data,
                ),
            )
        except BaseException:
            self._release()
            raise
        operation.done.add_done_callback(lambda _: self._release())
        return CtrlOperation(self._ring, operation, command.name, dev_id)

    def _open(self) -> int:
        if not self._users:
            try:
                self._fd = os.open(self._node, os.O_RDWR | os.O_CLOEXEC)
            except OSError as error:
                hint = "modprobe ublk_drv" if error.errno == errno.ENOENT else "run as root"
                raise OSError(
                    error.errno, f"{self._node}: {error.strerror}; try: {hint}"
                ) from error
        self._users += 1
        return self._fd

    def _release(self) -> None:
        self._users -= 1
        if not self._users:
            os.close(self._fd)


class CtrlOperation:
    """A control command under way."""

    def __init__(
        self, ring: AsyncRing, operation: Operation, command: str, dev_id: int | None
    ) -> None:
        self._ring = ring
        self._operation = operation
        self._command = command
        self._dev_id = dev_id

    @property
    def done(self) -> asyncio.Future[int]:
        """Return its answer to come."""
        return self._operation.done

    def cancel(self) -> None:
        """Ask the kernel to interrupt it; result() then mostly raises EINTR."""
        self._ring.cancel(self._operation)

    async def result(self, timeout_s: float) -> None:
        """Wait for the answer; CtrlError when it is an error, or ETIMEDOUT when none came.

        After a timeout the command is still with the kernel, and its buffer with us.
        """
        if not await patiently(self._operation.done, timeout_s):
            raise CtrlError(errno.ETIMEDOUT, self._command, self._dev_id)
        result = self._operation.done.result()
        if result < 0:
            raise CtrlError(-result, self._command, self._dev_id)


async def metered(meter: Meter, command: str, work: Awaitable[T]) -> T:
    """Wait for a command, and tell how it ended; OSError as it has it."""
    clock = asyncio.get_running_loop().time
    began = clock()
    try:
        answer = await work
    except OSError as error:
        meter.command(command, error.errno or errno.EIO, clock() - began)
        raise
    meter.command(command, 0, clock() - began)
    return answer


async def patiently(answer: asyncio.Future[Any], timeout_s: float) -> bool:
    """Wait for an answer, and tell whether it came; seconds count in which we ourselves ran.

    After a SIGSTOP or a suspend a deadline has passed without anybody having been late: a stall
    counts one beat, however long it was.
    """
    while timeout_s > 0 and not answer.done():
        beat_s = min(_BEAT_S, timeout_s)
        await asyncio.wait({answer}, timeout=beat_s)
        timeout_s -= beat_s
    return answer.done()


def unpack_dev_info(data: bytes) -> DevInfo:
    """Return the kernel's answer as a DevInfo."""
    raw = uapi.ublksrv_ctrl_dev_info.unpack(data)
    try:
        state: DevState | int = DevState(raw["state"])
    except ValueError:  # a newer kernel's; the machine keeps its hands off
        state = raw["state"]
    return DevInfo(
        dev_id=raw["dev_id"],
        state=state,
        flags=DevFlags(raw["flags"]),
        nr_hw_queues=raw["nr_hw_queues"],
        queue_depth=raw["queue_depth"],
        max_io_buf_bytes=raw["max_io_buf_bytes"],
        ublksrv_pid=raw["ublksrv_pid"],
        ublksrv_flags=raw["ublksrv_flags"],
        owner_uid=raw["owner_uid"],
        owner_gid=raw["owner_gid"],
    )
