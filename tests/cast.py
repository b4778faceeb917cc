"""Servers on the twin's stage: a good one, and every way in which one can be bad.

A kind is a name: "good", "exit-after-mmap", "hang-at-start", ... "exit" and "hang" happen at a
point of the good one's life; the other names are characters of their own (SPECIAL).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

from processes import Process, Processes
from twin import Driver
from twin_device import CharFile, Device

from ublkwatch.ctrl import CtrlError
from ublkwatch.uapi import DevState

POINTS = (
    *("at-start", "after-ready", "after-line", "after-open", "after-mmap", "after-some-tags"),
    *("after-one-queue", "after-all", "after-live", "after-a-while"),
)
SPECIAL = (
    *("good", "no-start", "slow-start", "slow-attach", "twice-ready", "mute", "leak"),
    *("fork-away", "silent", "slow-launch"),
)
KINDS = (*(f"{act}-{point}" for act in ("exit", "hang") for point in POINTS), *SPECIAL)
_OPEN_PATIENCE_S = 10.0
_BUSY_S = 32.0


@dataclass
class Home:
    """What an attempt has in the runtime directory: its FIFO, its socket."""

    lines: list[str] = field(default_factory=list)
    said: str = ""  # the last line of its output
    read: bool = False  # a server has taken its line
    notify: Callable[[], None] = lambda: None
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    async def line(self) -> str:
        await self.arrived.wait()
        self.read = True
        return self.lines[0]

    def write(self, line: str) -> None:
        self.lines.append(line)
        self.arrived.set()


class Cast:
    """Starts servers and lets them live."""

    def __init__(
        self,
        driver: Driver,
        processes: Processes,
        rng: random.Random,
        note: Callable[[str, str], None],
    ) -> None:
        self.driver, self.processes, self._rng, self._note = driver, processes, rng, note
        self.lined: dict[int, set[Process]] = {}  # who has read a line, by device
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, kind: str, dev_id: int, tag: str, home: Home, way: str = "line") -> Process:
        """Start a server of a kind: it waits for its line, attaches at once ("start"), or is a
        tool that recovers the device by itself ("delegated").
        """
        assert kind in KINDS
        process = self.processes.start(kind if way == "line" else f"{kind}, {way},", tag)
        life = self._delegated if way == "delegated" else self._serve
        self.live(process, life(process, kind, dev_id, home if way == "line" else None))
        return process

    def create(self, kind: str, dev_id: int) -> Process:
        """Start a device's first server, which also sends START_DEV."""
        process = self.processes.start(f"creator-{kind}")
        self.live(process, self._create(process, kind, dev_id))
        return process

    def live(self, process: Process, life: object) -> None:
        """Let a process do something; its death ends that."""
        assert asyncio.iscoroutine(life)
        process.task = asyncio.create_task(life, name=str(process))
        self._tasks.add(process.task)
        process.on_end.append(lambda: self._note(str(process), f"ends: {process.how}"))

    # --- lives -----------------------------------------------------------------------------------

    async def _create(self, process: Process, kind: str, dev_id: int) -> None:
        device = await self._attach(process, "good", dev_id)
        await self.driver.call("START_DEV", dev_id, pid=process.pid)
        await self._serve_on(process, kind, device)

    async def _serve(self, process: Process, kind: str, dev_id: int, home: Home | None) -> None:
        await self._pause(0.01, 0.3)
        if kind == "slow-start":
            await self._pause(5, 40)
        await self._at("at-start", process, kind)
        if home is not None:
            if kind != "mute":
                home.notify()
            if kind == "twice-ready":
                home.notify()
            await self._at("after-ready", process, kind)
            await home.line()
            self.lined.setdefault(dev_id, set()).add(process)
        await self._at("after-line", process, kind)
        if kind == "fork-away":
            child = self.processes.start("forked", process.tag)
            self.live(child, self._go_on(child, "good", dev_id))
            self._exit(process, "exit status 0")
        await self._go_on(process, kind, dev_id)

    async def _go_on(self, process: Process, kind: str, dev_id: int) -> None:
        if kind == "slow-attach":
            await self._pause(1, 10)
        device = await self._attach(process, kind, dev_id)
        await self._serve_on(process, kind, device)

    async def _serve_on(self, process: Process, kind: str, device: Device) -> None:
        if kind == "leak":
            child = self.processes.start("leaked", process.tag)
            for file in process.files:
                assert isinstance(file, CharFile)
                file.share(child)
            child.on_end.append(lambda: self._note(str(child), f"ends: {child.how}"))
        while device.state is not DevState.LIVE or device.server is not process:
            await self.driver.pulse.wait()
        process.silent = kind in ("silent", "hang-after-live")
        await self._at("after-live", process, kind)
        await self._pause(1.5, 6)
        process.silent = process.silent or kind == "hang-after-a-while"
        await self._at("after-a-while", process, kind)
        await asyncio.Event().wait()

    async def _attach(self, process: Process, kind: str, dev_id: int) -> Device:
        """Open, map, fetch every tag: as the attach contract says."""
        clock = asyncio.get_running_loop().time
        give_up = clock() + _OPEN_PATIENCE_S
        while (device := self._try_open(process, dev_id)) is None:
            if clock() >= give_up:
                self._exit(process, "exit status 1")
            await asyncio.sleep(0.02)
        self._note(str(process), f"opens /dev/ublkc{dev_id}")
        device.on_abort = self._abort
        await self._at("after-open", process, kind)
        try:
            device.mmap(process)
            await self._at("after-mmap", process, kind)
            await self._fetch(process, kind, device)
        except OSError as error:
            self._note(str(process), str(error))
            self._exit(process, "exit status 1")
        self._note(str(process), "has fetched every tag")
        process.silent = kind == "hang-after-all"
        await self._at("after-all", process, kind, short=True)
        return device

    def _try_open(self, process: Process, dev_id: int) -> Device | None:
        try:
            return self.driver.open(dev_id, process)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOENT):
                raise
            return None

    async def _fetch(self, process: Process, kind: str, device: Device) -> None:
        for number, queue in enumerate(device.queues):
            for tag in range(queue.depth):
                await device.fetch(process, number, tag)
                if number == tag == 0:
                    await self._at("after-some-tags", process, kind)
            await self._pause(0.0005, 0.01)
            if number == 0:
                await self._at("after-one-queue", process, kind)

    async def _delegated(
        self, process: Process, kind: str, dev_id: int, _home: Home | None
    ) -> NoReturn:
        """A tool that sends START, serves in a child that it daemonised, and sends END itself."""
        await self._pause(0.01, 0.3)
        if kind == "slow-start":
            await self._pause(5, 40)
        await self._at("at-start", process, kind)
        try:
            await self._send_start(dev_id)
            await self._at("after-line", process, kind)
            child = self.processes.start(f"{kind}, daemon,", process.tag)
            self.live(child, self._go_on(child, kind, dev_id))
            end = self.driver.send("END_USER_RECOVERY", dev_id, pid=child.pid)
            process.on_end.append(end.cancel)  # as the kernel does for what a dead one waits for
            failed = bool(await asyncio.shield(end.done))
        except CtrlError as error:
            self._note(str(process), str(error))
            failed = True
        self._exit(process, "exit status 237" if failed else "exit status 0")

    async def _send_start(self, dev_id: int) -> None:
        """Send START, again while EBUSY: as ublksrv does (9.2), for as long."""
        clock = asyncio.get_running_loop().time
        give_up = clock() + _BUSY_S
        while True:
            try:
                await self.driver.call("START_USER_RECOVERY", dev_id)
            except CtrlError as error:
                if error.errno != errno.EBUSY or clock() > give_up:
                    raise
            else:
                return
            await asyncio.sleep(0.05)

    # --- what happens to them --------------------------------------------------------------------

    async def _at(self, point: str, process: Process, kind: str, *, short: bool = False) -> None:
        """Exit or hang here, if that is what it does."""
        act, _, where = kind.partition("-")
        if where != point:
            return
        if not short:
            await self._pause(0, 0.02)
        if act == "exit":
            self._exit(process, "exit status 3")
        self._note(str(process), f"hangs {point}")
        await asyncio.Event().wait()

    def _exit(self, process: Process, how: str) -> NoReturn:
        process.end(how)
        raise asyncio.CancelledError

    def _abort(self, process: Process) -> None:
        """The device was stopped: a server whose loop runs finds its commands aborted, and ends."""
        if not process.silent and "hang" not in process.name:
            delay = self._rng.uniform(0.001, 0.05)
            asyncio.get_running_loop().call_later(delay, process.end, "exit status 0")

    async def _pause(self, least: float, most: float) -> None:
        await asyncio.sleep(self._rng.uniform(least, most))


def holder(device: Device) -> Process | None:
    """Return who serves: the living process that has the character device open."""
    if device.file is None:
        return None
    living = [process for process in device.file.holders if process.alive]
    return device.file.opener if device.file.opener in living else next(iter(living), None)


def close_all(process: Process) -> None:
    """Let a process close what it has open, and live on."""
    for file in list(process.files):
        with contextlib.suppress(ValueError):
            file.closed_by(process, dying=False)
