"""Disposable processes for the control commands that may sleep on a device.

A process that waits for a device's mutex cannot be killed, so the daemon never does: START, END,
GET_PARAMS and their like are sent by a worker, started beforehand. When a command outlives its
deadline the worker is retired: it gets no new commands, finishes what is pending, and is then left
alone; another takes its place. A worker ends when the daemon's end of its line is closed, and the
kernel then cancels what can be cancelled.

On the line: one JSON object a line, ``{"id", "command", "dev_id", ...}`` and ``{"id", "error"}``;
the worker's first is a hello.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import socket
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from ublkwatch.armour import Armour
from ublkwatch.async_ring import AsyncRing
from ublkwatch.ctrl import CtrlError, UblkCtrl, metered, patiently
from ublkwatch.meter import Meter

_log = logging.getLogger("ublkwatch")

# The worker keeps the deadline itself; the daemon waits this much longer for its word.
_GRACE_S = 1.0
_START_S = 60.0
_HELLO = 0  # the id of a worker's first message, which answers nothing
_IN_FLIGHT_MAX = 256
_BUSY_PAUSE_S = 0.001
_BUSY_PAUSE_MAX_S = 0.05


class Workers:
    """The daemon's side: hands commands to the current worker, retires it when it is stuck."""

    def __init__(
        self,
        start: Callable[[], socket.socket],
        meter: Meter | None = None,
        settle: Callable[[int], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        """``start`` starts a worker process and returns our end of its line; it may take time.

        ``settle`` is done beside its work once it is there, with its pid; it raises nothing.
        """
        self._start = start
        self._settle = settle
        self._settling: set[asyncio.Task[None]] = set()
        self._meter = meter or Meter()
        self._current: _Line | None = None
        self._retired: list[_Line] = []  # those that still have something to finish
        self._calls: dict[str, asyncio.Event] = {}  # by key: set when it is cancelled
        self._starting = asyncio.Lock()  # two calls at a time start one worker, not two
        self.retired = 0  # how many, ever

    async def prepare(self) -> None:
        """Have a worker ready before it is needed; OSError when none could be had.

        Its start counts for no command's deadline: it said nothing yet that could be late.
        """
        async with self._starting:
            if self._current is None or self._current.closed:
                line = await _Line.open(await asyncio.to_thread(self._start))
                try:
                    async with asyncio.timeout(_START_S):
                        await line.hello.wait()
                except TimeoutError:
                    line.close()
                if line.closed:
                    raise OSError(errno.EIO, "the control worker did not start")
                self._current = line
                if self._settle is not None:
                    task = asyncio.create_task(self._settle(line.pid))
                    self._settling.add(task)
                    task.add_done_callback(self._settling.discard)

    async def call(
        self, command: str, dev_id: int, key: str, *, timeout_s: float, **arguments: float
    ) -> dict[str, Any]:
        """Run a command and return its answer; CtrlError when it failed or was not answered.

        ``key`` names it for cancel(), which may come before the command is sent: then it is not.
        END sleeps until a server has attached or it is cancelled: its time counts from then on.
        ETIMEDOUT retires the worker.
        """
        work = self._call(command, dev_id, key, timeout_s, arguments)
        return await metered(self._meter, command, work)

    async def _call(
        self, command: str, dev_id: int, key: str, timeout_s: float, arguments: dict[str, float]
    ) -> dict[str, Any]:
        cancelled = self._calls[key] = asyncio.Event()
        try:
            await self.prepare()
            line = self._current
            assert line is not None
            if cancelled.is_set():
                raise CtrlError(errno.EINTR, command, dev_id)
            request = {"command": command, "dev_id": dev_id, "timeout_s": timeout_s, **arguments}
            asked = asyncio.ensure_future(line.ask(key, request))
            if command == "END_USER_RECOVERY":
                await _either(asked, cancelled)
            if not await patiently(asked, timeout_s + _GRACE_S):
                line.late(key)
                asked.cancel()
                self._retire(line, command, dev_id)
                raise CtrlError(errno.ETIMEDOUT, command, dev_id)
        finally:
            if self._calls.get(key) is cancelled:
                del self._calls[key]
        answer = asked.result()
        if answer["error"] == errno.ETIMEDOUT:
            self._retire(line, command, dev_id)
        if answer["error"]:
            raise CtrlError(answer["error"], command, dev_id)
        return answer

    def cancel(self, key: str) -> None:
        """Interrupt the command of that name, whichever worker has it; its answer comes."""
        if key in self._calls:
            self._calls[key].set()
        for line in (*self._retired, *([self._current] if self._current else [])):
            line.cancel(key)

    @property
    def wedged(self) -> int:
        """How many commands were not answered in time, and are with the kernel still.

        A worker that said so itself does not end before such a command does.
        """
        lines = (*self._retired, *([self._current] if self._current else []))
        return sum(len(line.overdue) for line in lines)

    def close(self) -> None:
        """Let go of the workers: they end, or, where a command holds one, it is left alone."""
        for task in self._settling:
            task.cancel()
        for line in (*self._retired, *([self._current] if self._current else [])):
            line.close()

    def _retire(self, line: _Line, command: str, dev_id: int) -> None:
        if line is self._current:
            self._current = None
            self.retired += 1
            self._retired = [other for other in self._retired if not other.closed] + [line]
            _log.error(
                "%s ublk %d was not answered: its control worker is retired", command, dev_id
            )
        line.retire()


async def _either(answer: asyncio.Future[dict[str, Any]], cancelled: asyncio.Event) -> None:
    cancel = asyncio.ensure_future(cancelled.wait())
    waited: set[asyncio.Future[Any]] = {answer, cancel}
    try:
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    finally:
        cancel.cancel()


class _Line:
    """The line to one worker."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._keys: dict[str, int] = {}
        self._next = 1
        self._retired = False
        self.closed = False
        self.overdue: set[int] = set()  # what was not answered in time
        self.pid = 0  # as it says
        self.hello = asyncio.Event()  # it has said that it is there, or it has ended
        self._listener = asyncio.create_task(self._listen(reader))

    @classmethod
    async def open(cls, ours: socket.socket) -> _Line:
        return cls(*await asyncio.open_unix_connection(sock=ours))

    async def ask(self, key: str, request: dict[str, Any]) -> dict[str, Any]:
        number, self._next = self._next, self._next + 1
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self._keys[key] = number
        self._send({"id": number, **request})
        try:
            return await asyncio.shield(answer)
        finally:
            self._keys.pop(key, None)

    def cancel(self, key: str) -> None:
        if key in self._keys:
            self._send({"id": self._keys[key], "command": "cancel"})

    def late(self, key: str) -> None:
        if (number := self._keys.get(key)) is not None:
            self.overdue.add(number)

    def retire(self) -> None:
        self._retired = True
        if not self._answers:
            self._let_go()

    def _let_go(self) -> None:
        """Have the worker end; the line does when it has, which may be never."""
        with contextlib.suppress(OSError):  # it has ended
            self._writer.write_eof()

    def close(self) -> None:
        self.closed = True
        self._listener.cancel()
        self._writer.close()

    def _send(self, message: dict[str, Any]) -> None:
        self._writer.write(json.dumps(message).encode() + b"\n")

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                answer = json.loads(line)
                if answer["id"] == _HELLO:
                    self.pid = answer["pid"]
                    self.hello.set()
                waiting = self._answers.pop(answer["id"], None)
                self.overdue.discard(answer["id"])
                if answer.get("error") == errno.ETIMEDOUT:
                    self.overdue.add(answer["id"])
                if waiting is not None and not waiting.done():
                    waiting.set_result(answer)
                if self._retired and not self._answers:
                    self._let_go()
        # The worker is gone, and with it all that it had under way.
        self.closed = True
        self.overdue.clear()
        self.hello.set()
        for waiting in self._answers.values():
            if not waiting.done():
                waiting.set_result({"error": errno.EIO})
        self._writer.close()


class _Worker:
    """The worker's side."""

    def __init__(self, ring: AsyncRing, writer: asyncio.StreamWriter) -> None:
        self._ctrl = UblkCtrl(ring)
        self._writer = writer
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._cancels: dict[int, asyncio.Event] = {}

    def take(self, request: dict[str, Any]) -> None:
        number = request["id"]
        if request["command"] == "cancel":
            if number in self._cancels:
                self._cancels[number].set()
            return
        self._cancels[number] = asyncio.Event()
        self._tasks[number] = asyncio.create_task(self._answer(number, request))

    async def _answer(self, number: int, request: dict[str, Any]) -> None:
        answer: dict[str, Any] = {"id": number, "error": 0}
        try:
            answer |= await self._run(request, self._cancels[number])
        except OSError as error:
            answer["error"] = error.errno or errno.EIO
        del self._tasks[number], self._cancels[number]
        self._writer.write(json.dumps(answer).encode() + b"\n")

    async def _run(self, request: dict[str, Any], cancelled: asyncio.Event) -> dict[str, Any]:
        dev_id, timeout_s = request["dev_id"], request["timeout_s"]
        match request["command"]:
            case "GET_PARAMS":
                return {"params": await self._ctrl.get_params(dev_id, timeout_s=timeout_s)}
            case "START_USER_RECOVERY":
                await self._start(dev_id, timeout_s, request["busy_s"], cancelled)
            case "END_USER_RECOVERY":
                await self._end(dev_id, request["pid"], cancelled)
            case "STOP_DEV":
                await self._ctrl.stop_dev(dev_id, timeout_s=timeout_s)
            case "TRY_STOP_DEV":
                await self._ctrl.try_stop_dev(dev_id, timeout_s=timeout_s)
            case unknown:
                raise CtrlError(errno.EOPNOTSUPP, unknown, dev_id)
        return {}

    async def _start(
        self, dev_id: int, timeout_s: float, busy_s: float, cancelled: asyncio.Event
    ) -> None:
        """Send START until it is accepted: EBUSY while the old server's files are being closed."""
        limit_s = timeout_s - busy_s  # the rest is for the one that sleeps on the device's mutex
        pause_s = _BUSY_PAUSE_S
        while True:
            try:
                return await self._ctrl.start_user_recovery(dev_id, timeout_s=limit_s)
            except CtrlError as error:
                if error.errno != errno.EBUSY or busy_s <= 0:
                    raise
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(cancelled.wait(), pause_s)
                raise CtrlError(errno.EINTR, "START_USER_RECOVERY", dev_id)
            busy_s -= pause_s  # and not by the clock, which goes on while we are stopped
            pause_s = min(_BUSY_PAUSE_MAX_S, pause_s * 1.25)

    async def _end(self, dev_id: int, pid: int, cancelled: asyncio.Event) -> None:
        """Send END; it sleeps in the kernel until the server attached or the daemon cancels it."""
        operation = await self._ctrl.begin_end_user_recovery(dev_id, pid)
        result = asyncio.create_task(operation.result(float("inf")))
        cancel = asyncio.create_task(cancelled.wait())
        await asyncio.wait({result, cancel}, return_when=asyncio.FIRST_COMPLETED)
        cancel.cancel()
        if not result.done():
            operation.cancel()
        await result


async def _serve(line: socket.socket, *, lock_memory: bool) -> None:
    line.setblocking(False)
    reader, writer = await asyncio.open_unix_connection(sock=line)
    ring = AsyncRing(_IN_FLIGHT_MAX)
    ring.limit_workers(_IN_FLIGHT_MAX)
    worker = _Worker(ring, writer)
    if lock_memory:
        Armour().lock()  # where it cannot be, the daemon has said so; the rest is inherited
    writer.write(json.dumps({"id": _HELLO, "pid": os.getpid()}).encode() + b"\n")
    with contextlib.suppress(ConnectionError):
        while request := await reader.readline():
            worker.take(json.loads(request))
    # No tidying up: the daemon is gone or has let go of us, and the kernel cancels what it can.
    os._exit(0)


def main() -> None:
    """Serve the daemon on standard input, which is our end of the line."""
    line = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.close(nothing)
    asyncio.run(_serve(line, lock_memory="lock-memory" in sys.argv))


if __name__ == "__main__":
    main()
