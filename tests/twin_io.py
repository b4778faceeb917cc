"""The machine that a twin's devices share, and their I/O: queues, requests, what became of each.

Sections are those of the research into the driver, as in twin_device.py.
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from processes import Process

from ublkwatch.model import Generation, RecoveryMode
from ublkwatch.uapi import DevState


@dataclass
class Timing:
    """How long the kernel takes: (least, most) seconds (3.2)."""

    command_s: tuple[float, float] = (0.0001, 0.002)
    cancel_s: tuple[float, float] = (0.004, 0.03)  # from a ring's end to the cancelled commands
    release_s: tuple[float, float] = (0.001, 0.02)  # from the last close to OPEN being cleared
    io_s: tuple[float, float] = (0.0002, 0.004)
    block_timeout_s: float = 30.0  # the block layer's, G2's last resort (3.1, "saturated")


class Pulse:
    """Wakes whoever waits for something to change; each looks for himself."""

    def __init__(self) -> None:
        self._waiters: list[asyncio.Future[None]] = []

    def beat(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter


@dataclass
class Kernel:
    """What all devices of a machine share."""

    generation: Generation
    rng: random.Random
    timing: Timing
    note: Callable[[str], None]
    pulse: Pulse = field(default_factory=Pulse)


@dataclass
class Queue:
    depth: int
    fetched: set[int] = field(default_factory=set)
    daemon: Process | None = None  # set by the fetch that completes the queue (9.1)
    fetcher: Process | None = None  # who fetched anything of it
    in_server: list[asyncio.Future[int]] = field(default_factory=list)  # requests in its hands
    cancelled: bool = False

    @property
    def ready(self) -> bool:
        return len(self.fetched) == self.depth

    def reset(self) -> None:
        self.fetched.clear()
        self.daemon, self.fetcher, self.cancelled = None, None, False


@dataclass
class Io:
    """What became of the requests: the oracle."""

    issued: int = 0
    completed: int = 0
    failed: int = 0
    waiting: list[asyncio.Future[int]] = field(default_factory=list)


class DeviceIo:
    """A device as far as requests see it (3.3)."""

    def __init__(self, kernel: Kernel, mode: RecoveryMode, queues: int, depth: int) -> None:
        self.mode, self.io = mode, Io()
        self.queues = [Queue(depth) for _ in range(queues)]
        self.state = DevState.DEAD
        self.server: Process | None = None  # who was the last to open the character device
        self.pulse, self.timing, self._rng = kernel.pulse, kernel.timing, kernel.rng

    def delay(self, span: tuple[float, float]) -> float:
        return self._rng.uniform(*span)

    @property
    def idle(self) -> bool:
        """No request is in a server's hands: what STOP_DEV waits for, holding the mutex (3.8)."""
        return not any(queue.in_server for queue in self.queues)

    def submit(self) -> asyncio.Future[int]:
        """One request from above; its outcome is 0 or an errno."""
        request = asyncio.get_running_loop().create_future()
        self.io.issued += 1
        if self.state is DevState.FAIL_IO:
            self._answer(request, errno.EREMOTEIO)
        elif self.state is DevState.DEAD:
            self._answer(request, errno.EIO)
        elif self.state is DevState.QUIESCED:
            self.io.waiting.append(request)
        else:
            self._dispatch(request)
        return request

    def _dispatch(self, request: asyncio.Future[int]) -> None:
        """Give a request to its queue's server; a queue that is being cancelled takes none."""
        queue = self._rng.choice(self.queues)
        server = self.server
        if (
            server is None
            or not server.alive
            or not queue.ready
            or queue.cancelled
            or len(queue.in_server) >= queue.depth
        ):
            self.io.waiting.append(request)
            return
        queue.in_server.append(request)
        delay = self.delay(self.timing.io_s)
        asyncio.get_running_loop().call_later(delay, self._served, queue, server)

    def _served(self, queue: Queue, server: Process) -> None:
        if not queue.in_server or server is not self.server or not server.alive or server.silent:
            return
        self._answer(queue.in_server.pop(0), 0)
        if self.io.waiting and self.state is DevState.LIVE:
            self._dispatch(self.io.waiting.pop(0))
        self.pulse.beat()

    def _answer(self, request: asyncio.Future[int], error: int) -> None:
        if error:
            self.io.failed += 1
        else:
            self.io.completed += 1
        if not request.done():
            request.set_result(error)

    def _give_back(self, queue: Queue) -> None:
        """The server is gone: its requests are sent again, or have failed (3.3)."""
        returned, queue.in_server = queue.in_server, []
        if self.mode is RecoveryMode.REISSUE and self.state is not DevState.DEAD:
            self.io.waiting += returned
        else:
            for request in returned:
                self._answer(request, errno.EIO)

    def _fail_waiting(self, error: int = errno.EIO) -> None:
        waiting, self.io.waiting = self.io.waiting, []
        for request in waiting:
            self._answer(request, error)
