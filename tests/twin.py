"""A model of ublk_drv's control plane: the commands, who waits in them, and what interrupts that.

Sections are those of the research into the driver, as in twin_device.py, which has the device. The
table of conformance.py runs against this model and against the real driver.
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Callable, Coroutine
from typing import Any

from processes import Process
from twin_device import Device, KernelOops
from twin_io import Kernel, Timing

from ublkwatch.ctrl import CtrlError
from ublkwatch.model import DevInfo, Generation
from ublkwatch.uapi import DevFlags, DevState

FEATURES = {Generation.G2: 0x1FE, Generation.G3: 0x1FFFFF}  # 0.1
_RECOVERY = DevFlags.USER_RECOVERY
_REISSUE = DevFlags.USER_RECOVERY_REISSUE
_FAIL_IO = DevFlags.USER_RECOVERY_FAIL_IO
_ON_G3_ALONE = ("UPDATE_SIZE", "QUIESCE_DEV", "TRY_STOP_DEV")  # 1.5
PARAMS = {"basic": {"dev_sectors": 2048}}


class Command:
    """A control command with the kernel. ``done`` becomes 0 or an errno, and may never."""

    def __init__(self, driver: Driver, name: str, dev_id: int, arguments: dict[str, int]) -> None:
        self.name, self.dev_id, self.arguments = name, dev_id, arguments
        self.interrupted = False
        self.granted: DevInfo | None = None  # ADD_DEV's answer
        self._driver = driver
        self.done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(), name=f"{name} {dev_id}")

    def cancel(self) -> None:
        """ASYNC_CANCEL, or the issuer's death: ends an interruptible wait with EINTR (3.6)."""
        self.interrupted = True
        self._driver.pulse.beat()

    async def result(self) -> None:
        """Wait for the answer, raise it when it is an error; the command itself goes on."""
        if error := await asyncio.shield(self.done):
            raise CtrlError(error, self.name, self.dev_id)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait where the kernel waits interruptibly."""
        while not condition():
            if self.interrupted:
                await asyncio.sleep(self._driver.rng.uniform(0.0005, 0.05))
                raise OSError(errno.EINTR, self.name)
            await self._driver.pulse.wait()

    async def _run(self) -> None:
        error = 0
        try:
            await asyncio.sleep(self._driver.command_delay())
            error = await self._driver.execute(self)
        except OSError as refused:
            error = refused.errno or errno.EIO
        except KernelOops as oops:
            # It dies holding the device's mutex, and answers no more.
            self._driver.oopses.append(str(oops))
            return
        self._driver.note(f"{self.name} ublk {self.dev_id}: {errno.errorcode.get(error, '0')}")
        self.done.set_result(error)


class Driver:
    """The module: its devices, and /dev/ublk-control."""

    def __init__(
        self,
        generation: Generation,
        rng: random.Random | None = None,
        timing: Timing | None = None,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.generation, self.note = generation, note
        self.rng = rng or random.Random(0)  # noqa: S311 - chance that can be replayed
        self.timing = timing or Timing()
        self.kernel = Kernel(generation, self.rng, self.timing, note)
        self.pulse = self.kernel.pulse
        self._reaping: set[asyncio.Task[None]] = set()
        self.devices: dict[int, Device] = {}
        self.oopses: list[str] = []  # where the real kernel would have crashed
        self.pending: list[Command] = []  # with the kernel just now
        self._diskseq = 0
        self._ctl_mutex = asyncio.Lock()  # ublk_ctl_mutex: ADD and DEL of all devices (6.2)

    # --- what anybody may ask --------------------------------------------------------------------

    def send(self, name: str, dev_id: int, **arguments: int) -> Command:
        return Command(self, name, dev_id, arguments)

    async def call(self, name: str, dev_id: int, **arguments: int) -> Command:
        """Send and wait; CtrlError when the answer is an error."""
        command = self.send(name, dev_id, **arguments)
        await command.result()
        return command

    def info(self, dev_id: int) -> DevInfo:
        """GET_DEV_INFO: takes no lock and never waits (6.2)."""
        return self._device(dev_id).info()

    def present(self) -> dict[int, int | None]:
        """/sys/class/ublk-char: from ADD_DEV to DEL_DEV, each with its disk in /sys/block (5.2)."""
        found = (dev_id for dev_id, device in self.devices.items() if not device.removed)
        return {dev_id: self.diskseq(dev_id) for dev_id in found}

    def diskseq(self, dev_id: int) -> int | None:
        """/sys/block/ublkbN/diskseq: while there is a disk (5.2)."""
        device = self.devices.get(dev_id)
        return device.diskseq if device else None

    def open(self, dev_id: int, process: Process) -> Device:
        """open("/dev/ublkcN")."""
        device = self.devices.get(dev_id)
        if device is None:
            raise OSError(errno.ENOENT, f"/dev/ublkc{dev_id}")
        device.opened_by(process)
        return device

    def command_delay(self) -> float:
        return self.rng.uniform(*self.timing.command_s)

    # --- the commands ----------------------------------------------------------------------------

    async def execute(self, command: Command) -> int:
        """Run it; order of the checks as in 1.5: device, then dispatch."""
        if command.name == "ADD_DEV":
            async with self._ctl_mutex:
                return self._add(command)
        if command.name == "GET_FEATURES":
            return 0
        device = self._device(command.dev_id)
        handler: Callable[[Command, Device], Coroutine[Any, Any, int]] | None = getattr(
            self, f"_{command.name.lower()}", None
        )
        if handler is None or (device.g2 and command.name in _ON_G3_ALONE):
            return errno.EOPNOTSUPP
        self.pending.append(command)
        try:
            return await handler(command, device)
        finally:
            self.pending.remove(command)
            self.pulse.beat()

    def _device(self, dev_id: int) -> Device:
        if dev_id not in self.devices:
            raise CtrlError(errno.ENODEV, "GET_DEV_INFO", dev_id)
        return self.devices[dev_id]

    def _add(self, command: Command) -> int:
        """ADD_DEV: G3 refuses nonsense, G2 clears what it does not know, in silence (2.7)."""
        queues, depth = command.arguments["queues"], command.arguments["depth"]
        flags = DevFlags(command.arguments["flags"])
        if not 0 < queues <= 4096 or not 0 < depth <= 4096:
            return errno.EINVAL
        if command.dev_id in self.devices:
            return errno.EEXIST
        if self.generation is Generation.G2:
            flags &= ~(_FAIL_IO | DevFlags.QUIESCE)
        else:
            modes = flags & (_REISSUE | _FAIL_IO)
            if modes == _REISSUE | _FAIL_IO or (modes and not flags & _RECOVERY):
                return errno.EINVAL
        if flags & DevFlags.UNPRIVILEGED_DEV:
            flags &= ~(_RECOVERY | _REISSUE)  # 1.6
        dev_id = command.dev_id
        if dev_id < 0:
            dev_id = next(free for free in range(len(self.devices) + 1) if free not in self.devices)
        info = DevInfo(dev_id, DevState.DEAD, flags, queues, depth, 1 << 19, -1)
        self.devices[dev_id] = Device(self.kernel, info)
        command.granted = info
        return 0

    async def _get_dev_info(self, _command: Command, device: Device) -> int:
        """Without the node's path nobody is told of an unprivileged device (1.6)."""
        return errno.EINVAL if device.flags & DevFlags.UNPRIVILEGED_DEV else 0

    async def _get_queue_affinity(self, _command: Command, _device: Device) -> int:
        return 0

    async def _get_params(self, _command: Command, device: Device) -> int:
        """Waits for the mutex, uninterruptibly (6.2)."""
        async with device.mutex:
            return 0

    async def _set_params(self, _command: Command, device: Device) -> int:
        """EACCES once there is a disk (2.8)."""
        async with device.mutex:
            return 0 if device.diskseq is None else errno.EACCES

    async def _update_size(self, _command: Command, device: Device) -> int:
        async with device.mutex:
            return errno.ENODEV if device.diskseq is None else 0  # 2.8

    async def _start_dev(self, command: Command, device: Device) -> int:
        """Waits, interruptibly and without the mutex, until every tag is fetched (2.5, 6.2)."""
        pid = command.arguments.get("pid", 0)
        if pid <= 0:
            return errno.EINVAL
        await command.until(lambda: device.attached)
        async with device.mutex:
            self._diskseq += 1
            return device.start_dev(pid, self._diskseq)

    async def _start_user_recovery(self, _command: Command, device: Device) -> int:
        """Waits for the mutex, uninterruptibly; an oops keeps it for ever (2.3, 6.2)."""
        await device.mutex.acquire()
        error = device.start_recovery()
        device.mutex.release()
        return error

    async def _end_user_recovery(self, command: Command, device: Device) -> int:
        """Waits, interruptibly and without the mutex, until every tag is fetched (2.4, 3.6)."""
        await command.until(lambda: device.attached)
        async with device.mutex:
            return device.end_recovery(command.arguments.get("pid", 0))

    async def _stop_dev(self, command: Command, device: Device) -> int:
        """Always 0; on LIVE it waits, with the mutex, for the server's requests (2.6, 3.8)."""
        del command
        async with device.mutex:
            while device.state is DevState.LIVE and not device.idle:
                await self.pulse.wait()
            device.remove_disk()
            return 0

    async def _try_stop_dev(self, command: Command, device: Device) -> int:
        """ENODEV without a disk; nobody has the block device open here (2.6)."""
        if device.diskseq is None:
            return errno.ENODEV
        return await self._stop_dev(command, device)

    async def _quiesce_dev(self, _command: Command, device: Device) -> int:
        """A polite kill: the server's idle commands are aborted, and it should end (8.1)."""
        async with device.mutex:
            if not device.flags & DevFlags.QUIESCE:
                return errno.EOPNOTSUPP
            if device.diskseq is None:
                return errno.ENODEV
            if not device.is_down and device.server is not None:
                device.on_abort(device.server)
            return 0

    async def _del_dev_async(self, command: Command, device: Device) -> int:
        """0 once the disk is gone; the id is free when nobody holds the device (2.6)."""
        await self._stop_dev(command, device)
        device.removed = True
        self._reaping.add(asyncio.create_task(self._free(device)))
        return 0

    async def _del_dev(self, command: Command, device: Device) -> int:
        """Waits, interruptibly, until nobody holds the device; deletion goes on anyhow (2.6)."""
        async with self._ctl_mutex:
            await self._stop_dev(command, device)
            device.removed = True
        self._reaping.add(asyncio.create_task(self._free(device)))
        await command.until(lambda: self.devices.get(device.dev_id) is not device)
        return 0

    async def _free(self, device: Device) -> None:
        """Free the id: an open ublkcN, a pending END or START_DEV hold it (2.6, 3.6)."""
        while self._held(device):
            await self.pulse.wait()
        if self.devices.get(device.dev_id) is device:
            del self.devices[device.dev_id]
            self.note(f"the kernel: ublk {device.dev_id} is deleted")
            self.pulse.beat()

    def _held(self, device: Device) -> bool:
        waiting = ("END_USER_RECOVERY", "START_DEV")
        return device.open or any(
            command.dev_id == device.dev_id and command.name in waiting for command in self.pending
        )
