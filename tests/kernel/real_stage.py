"""The conformance table's stage over the real driver: puppets act, /dev/ublk-control answers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, Literal

from conformance import Actor
from conformance_steps import How
from puppets import BUFFER, PACKET, SECTOR

from ublkwatch import uapi
from ublkwatch.async_ring import AsyncRing
from ublkwatch.ctrl import UblkCtrl, unpack_dev_info
from ublkwatch.model import DevInfo, Generation
from ublkwatch.uapi import DevFlags

PATIENCE_S = 0.5
# The driver's own longest wait is the block layer's 30 s; an emulated machine adds to all.
DEADLINE_S = 300.0
POLL_S = 0.005
SIZE = 32 << 20
CHAR_DEVICES = Path("/sys/class/ublk-char")
PUPPETS = Path(__file__).parent / "puppets.py"


class Puppets:
    """The process that forks all others."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._line = ours
        with theirs:
            self._process = subprocess.Popen([sys.executable, str(PUPPETS)], stdin=theirs.fileno())

    def make(self, what: str) -> Puppet:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(self._line, [json.dumps({"be": what}).encode()], [theirs.fileno()])
        return Puppet(json.loads(self._line.recv(PACKET))["pid"], ours)

    def close(self) -> None:
        self._line.close()
        self._process.wait(DEADLINE_S)


class Puppet:
    """A process that takes orders; Actor, when it is a server."""

    def __init__(self, pid: int, line: socket.socket) -> None:
        self.pid = pid
        self.got = "0"
        self.line = line
        self._pidfd = os.pidfd_open(pid)
        line.setblocking(False)

    async def do(self, fds: tuple[int, ...] = (), /, **order: object) -> dict[str, Any]:
        """Give an order, return what it said."""
        socket.send_fds(self.line, [json.dumps(order).encode()], fds)
        return await self.said()

    async def said(self) -> dict[str, Any]:
        packet = await asyncio.get_running_loop().sock_recv(self.line, PACKET)
        if not packet:
            raise AssertionError(f"the puppet {self.pid} has died")
        answer: dict[str, Any] = json.loads(packet)
        return answer

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def reaped(self) -> bool:
        """Wait until there is no such process; False when it does not end in time."""
        clock = asyncio.get_running_loop().time
        give_up = clock() + DEADLINE_S
        while not self._gone():
            if clock() > give_up:
                return False
            await asyncio.sleep(POLL_S)
        return True

    def _gone(self) -> bool:
        if not select.select([self._pidfd], [], [], 0)[0]:
            return False
        try:
            signal.pidfd_send_signal(self._pidfd, 0)
        except ProcessLookupError:
            return True
        return False

    def close(self) -> None:
        self.line.close()
        os.close(self._pidfd)


class RealSent:
    """A command with the sender, or a reader's read."""

    def __init__(self, sender: Puppet | None = None, number: int = 0) -> None:
        self.answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.content = b""
        self._sender, self._number = sender, number

    def cancel(self) -> None:
        assert self._sender is not None, "reads are not cancelled"
        self._sender.line.send(json.dumps({"cancel": self._number}).encode())


class RealStage:
    """One device of the driver of this machine."""

    patience_s = PATIENCE_S
    deadline_s = DEADLINE_S

    def __init__(self, puppets: Puppets, dev_id: int, generation: Generation) -> None:
        self.generation = generation
        self._puppets = puppets
        self._dev_id = dev_id
        self._queues = self._depth = 0
        # The driver wants it with a command for an unprivileged device, and with no other.
        self._path = ""
        self._actors: list[Puppet] = []
        self._readers: list[Puppet] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count(1)
        self._sent: dict[int, RealSent] = {}
        self._ring = AsyncRing()
        self._ctrl = UblkCtrl(self._ring)
        self._sender = self._make_sender()

    # --- commands ---

    def _make_sender(self) -> Puppet:
        sender = self._puppets.make("sender")

        async def listen() -> None:
            while True:
                said = await sender.said()
                sent = self._sent.pop(said["id"])
                sent.content = bytes.fromhex(said["content"])
                sent.answer.set_result(said["answer"])

        self._task(listen())
        return sender

    def _task(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(asyncio.create_task(work))

    async def _end_tasks(self) -> None:
        """End them before their sockets are closed: another could get the same descriptor."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    def send(self, command: str, pid: int = 0) -> RealSent:
        content = {
            "GET_DEV_INFO": bytes(uapi.ublksrv_ctrl_dev_info.size),
            "GET_PARAMS": uapi.ublk_params.pack(len=uapi.ublk_params.size),
            "SET_PARAMS": self._params(),
        }.get(command, b"")
        if command == "GET_FEATURES":
            sent = self._send(command, content=bytes(uapi.UBLK_FEATURES_LEN))
            word = RealSent()

            async def read_word() -> None:
                await sent.answer
                word.answer.set_result(hex(int.from_bytes(sent.content, "little")))

            self._task(read_word())
            return word
        return self._send(command, data=pid, content=content)

    def _send(
        self,
        command: str,
        *,
        data: int = 0,
        content: bytes = b"",
        path: str = "",
        unprivileged: bool = False,
    ) -> RealSent:
        number = next(self._numbers)
        sent = self._sent[number] = RealSent(self._sender, number)
        order = {
            "id": number,
            "command": command,
            "dev_id": self._dev_id,
            "data": data,
            "content": content.hex(),
            "path": path,
            "unprivileged": unprivileged,
        }
        self._sender.line.send(json.dumps(order).encode())
        return sent

    def _params(self) -> bytes:
        basic = {"logical_bs_shift": 9, "physical_bs_shift": 12, "io_opt_shift": 12}
        basic |= {"io_min_shift": 9, "max_sectors": BUFFER // SECTOR, "dev_sectors": SIZE // SECTOR}
        return uapi.pack_params({"basic": basic})

    async def add(self, *, queues: int, depth: int, flags: DevFlags) -> tuple[str, DevFlags]:
        info = uapi.ublksrv_ctrl_dev_info.pack(
            nr_hw_queues=queues,
            queue_depth=depth,
            max_io_buf_bytes=BUFFER,
            dev_id=self._dev_id,
            flags=flags,
        )
        unprivileged = bool(flags & DevFlags.UNPRIVILEGED_DEV)
        sent = self._send("ADD_DEV", content=info, unprivileged=unprivileged)
        answer = await sent.answer
        if answer != "0":
            return answer, DevFlags(0)
        granted = unpack_dev_info(sent.content)
        assert (granted.nr_hw_queues, granted.queue_depth) == (queues, depth), "too few CPUs"
        self._queues, self._depth = queues, depth
        if granted.flags & DevFlags.UNPRIVILEGED_DEV:
            self._path = f"/dev/ublkc{self._dev_id}"
        params = self._send("SET_PARAMS", content=self._params(), path=self._path)
        assert await params.answer == "0"
        return answer, granted.flags

    async def info(self) -> DevInfo:
        return await self._ctrl.get_dev_info(self._dev_id)

    # --- processes ---

    async def serve(self, how: How, *, give_up_s: float) -> Puppet:
        actor = self._puppets.make("server")
        self._actors.append(actor)
        await self._attach(actor, how, give_up_s)
        return actor

    async def attach(self, actor: Actor, how: How) -> None:
        await self._attach(_puppet(actor), how, DEADLINE_S)

    async def _attach(self, actor: Puppet, how: How, give_up_s: float) -> None:
        said = await actor.do(
            do="attach",
            how=how,
            give_up_s=give_up_s,
            path=f"/dev/ublkc{self._dev_id}",
            queues=self._queues,
            depth=self._depth,
        )
        actor.got = said["got"]

    async def hush(self, actor: Actor) -> None:
        await _puppet(actor).do(do="hush")

    async def fork(self, actor: Actor) -> Puppet:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            said = await _puppet(actor).do((theirs.fileno(),), do="fork")
        child = Puppet(said["pid"], ours)
        self._actors.append(child)
        return child

    async def close(self, actor: Actor, what: Literal["rings", "device"]) -> None:
        await _puppet(actor).do(do="close", what=what)

    async def kill(self, actor: Actor) -> None:
        puppet = _puppet(actor)
        puppet.kill()
        assert await puppet.reaped(), f"the killed process {actor.pid} does not end"

    def read(self) -> RealSent:
        reader = self._puppets.make("reader")
        self._readers.append(reader)
        sent = RealSent()

        async def outcome() -> None:
            # Far from the others: adjacent ones may be merged.
            offset = len(self._readers) << 20
            path = f"/dev/ublkb{self._dev_id}"
            sent.answer.set_result((await reader.do(path=path, offset=offset))["answer"])

        self._task(outcome())
        return sent

    # --- the end ---

    async def clear(self) -> None:
        """End every process, then remove the device; AssertionError when that does not work."""
        for actor in (*self._actors, self._sender):  # with the sender end its pending ENDs
            actor.kill()
        ended = [await actor.reaped() for actor in (*self._actors, self._sender)]
        await self._end_tasks()
        self._sender.close()
        self._sender = self._make_sender()
        left = []
        for command in ("STOP_DEV", "DEL_DEV"):
            sent = self._send(command, path=self._path)
            await asyncio.wait({sent.answer}, timeout=DEADLINE_S)
            if not sent.answer.done() or sent.answer.result() not in ("0", "ENODEV"):
                left.append(command)
        for reader in (*self._readers, self._sender):
            reader.kill()
            ended.append(await reader.reaped())
        await self._end_tasks()
        for puppet in (*self._actors, *self._readers, self._sender):
            puppet.close()
        self._ring.close()
        assert not left, f"not done: {left}"
        assert all(ended), "processes are left over"
        assert not (CHAR_DEVICES / f"ublkc{self._dev_id}").exists(), "the device is left over"


def _puppet(actor: Actor) -> Puppet:
    assert isinstance(actor, Puppet)
    return actor


@contextlib.contextmanager
def puppets() -> Iterator[Puppets]:
    made = Puppets()
    yield made
    made.close()
