"""Processes that do as they are told: servers, strangers, readers, senders of control commands.

One process, started once, forks them all: an interpreter takes half a second to start in the lab's
guest, a fork a few milliseconds. It is told ``{"be": ...}`` with a socket, and the puppet takes its
orders from that: one JSON object a packet, each answered by one. A puppet ends with its socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import mmap
import os
import select
import signal
import socket
import time
from pathlib import Path
from typing import Any, NoReturn

from ublkwatch import uapi
from ublkwatch.async_ring import AsyncRing, Operation
from ublkwatch.model import errno_name
from ublkwatch.uapi import Cmd, IoOp
from ublkwatch.uring import Buffer, Ring, address_of

PACKET = 65536
SECTOR = 512
BUFFER = 64 << 10
NOBODY = 65534
_DESC = uapi.ublksrv_io_desc.size
_POLL_S = 0.005
_ENTRIES = 64


class Server:
    """All that holds a character device open; one thread, one ring for all of its queues."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._fd = -1
        self._maps: list[mmap.mmap] = []
        self._ring: Ring | None = None
        self._memory: mmap.mmap | None = None
        self._fetched: set[tuple[int, int]] = set()
        self._depth = 0
        self._quiet = False
        self._refused = ""

    def run(self) -> None:
        while True:
            line, rings = self._line.fileno(), [self._ring.fd] if self._ring else []
            readable, _, _ = select.select([line, *rings], [], [])
            if line in readable:
                packet, fds, _, _ = socket.recv_fds(self._line, PACKET, 1)
                if not packet:
                    os._exit(0)
                order = json.loads(packet)
                self._line.send(json.dumps(self._do(order, fds)).encode())
            elif rings:
                self._serve()

    def _do(self, order: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        match order["do"]:
            case "attach":
                return {"got": self._attach(order)}
            case "hush":
                self._quiet = True
            case "close":
                self._close(order["what"])
            case "fork":
                return {"pid": self._fork(fds[0])}
        return {}

    def _attach(self, order: dict[str, Any]) -> str:
        queues, depth, how = order["queues"], order["depth"], order["how"]
        if how == "nothing":
            return "0"
        if self._fd < 0 and (refused := self._open(order["path"], order["give_up_s"])):
            return f"open {refused}"
        if how == "opened":
            return "0"
        try:
            if not self._maps:
                self._map(queues, depth)
        except OSError as error:
            return f"mmap {errno_name(error.errno or 0)}"
        tags = {
            "mapped": [],
            "some tags": [(0, 0)],
            "one queue": [(0, tag) for tag in range(depth)],
            "all": [(queue, tag) for queue in range(queues) for tag in range(depth)],
        }[how]
        return self._fetch([tag for tag in tags if tag not in self._fetched])

    def _open(self, path: str, give_up_s: float) -> str:
        give_up = time.monotonic() + give_up_s
        while True:
            try:
                self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > give_up:
                    return errno_name(error.errno or 0)
            else:
                return ""
            time.sleep(_POLL_S)

    def _map(self, queues: int, depth: int) -> None:
        page = mmap.PAGESIZE
        most = -(-uapi.UBLK_MAX_QUEUE_DEPTH * _DESC // page) * page
        for queue in range(queues):
            self._maps.append(
                mmap.mmap(
                    self._fd,
                    -(-depth * _DESC // page) * page,
                    flags=mmap.MAP_SHARED | mmap.MAP_POPULATE,
                    prot=mmap.PROT_READ,
                    offset=queue * most,
                )
            )
        self._depth = depth
        self._memory = mmap.mmap(
            -1, queues * depth * BUFFER, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )

    def _fetch(self, tags: list[tuple[int, int]]) -> str:
        if not tags:
            return "0"
        self._ring = self._ring or Ring(_ENTRIES)
        for queue, tag in tags:
            self._push(uapi.UBLK_U_IO_FETCH_REQ, queue, tag)
            self._fetched.add((queue, tag))
        self._ring.submit()  # a refusal is there when it returns
        self._serve()
        refused, self._refused = self._refused, ""
        return f"fetch {refused}" if refused else "0"

    def _push(self, command: int, queue: int, tag: int, result: int = 0) -> None:
        assert self._ring is not None
        assert self._memory is not None
        address = address_of(self._memory) + (queue * self._depth + tag) * BUFFER
        self._ring.push(
            uapi.io_uring_sqe.pack(
                opcode=uapi.IORING_OP_URING_CMD,
                fd=self._fd,
                cmd_op=command,
                user_data=queue << 16 | tag,
                cmd=uapi.ublksrv_io_cmd.pack(q_id=queue, tag=tag, addr=address, result=result),
            )
        )

    def _serve(self) -> None:
        """Answer what has come, or keep it."""
        assert self._ring is not None
        for user_data, status in self._ring.reap():
            if status < 0:
                self._refused = errno_name(-status)
            elif not self._quiet:
                queue, tag = user_data >> 16, user_data & 0xFFFF
                desc = uapi.ublksrv_io_desc.unpack(self._maps[queue][tag * _DESC :][:_DESC])
                data = desc["op_flags"] & 0xFF in (IoOp.READ, IoOp.WRITE)
                done = desc["nr_sectors"] * SECTOR if data else 0
                self._push(uapi.UBLK_U_IO_COMMIT_AND_FETCH_REQ, queue, tag, done)
        self._ring.submit()

    def _close(self, what: str) -> None:
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        if what == "device":
            for descs in self._maps:
                descs.close()
            self._maps.clear()
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1

    def _fork(self, line: int) -> int:
        told, tell = os.pipe()
        child = os.fork()
        if child:
            os.close(line)
            os.close(tell)
            os.read(told, 1)
            os.close(told)
            return child
        self._line.close()
        self._line = socket.socket(fileno=line)
        self._close("rings")
        os.write(tell, b".")
        os.close(told)
        os.close(tell)
        self.run()
        raise AssertionError


def read(line: socket.socket) -> None:
    """Read a block, once, past the page cache."""
    order = json.loads(line.recv(PACKET))
    answer = "0"
    try:
        disk = os.open(order["path"], os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        if not os.preadv(disk, [mmap.mmap(-1, mmap.PAGESIZE)], order["offset"]):
            answer = "end of file"  # a disk that is being removed has no size any more
        os.close(disk)
    except OSError as error:
        answer = errno_name(error.errno or 0)
    line.send(json.dumps({"answer": answer}).encode())


class Sender:
    """Sends control commands, of which any may sleep and cost this process its life."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._ring = AsyncRing(_ENTRIES)
        self._ring.limit_workers(_ENTRIES)
        self._control = os.open("/dev/ublk-control", os.O_RDWR | os.O_CLOEXEC)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._operations: dict[int, Operation] = {}

    def take(self) -> None:
        try:
            packet = self._line.recv(PACKET)
        except ConnectionResetError:
            packet = b""
        if not packet:
            os._exit(0)
        order = json.loads(packet)
        if "cancel" in order:
            if order["cancel"] in self._operations:
                self._ring.cancel(self._operations[order["cancel"]])
        else:
            self._tasks[order["id"]] = asyncio.create_task(self._send(order))

    async def _send(self, order: dict[str, Any]) -> None:
        """Send it; with a ``path`` as the driver wants it for an unprivileged device."""
        path = order["path"].encode() + b"\0" if order["path"] else b""
        content = path + bytes.fromhex(order["content"])
        buffer = Buffer(content) if content else None
        dev_id = order["dev_id"]
        if order["unprivileged"]:
            os.seteuid(NOBODY)
        operation = self._operations[order["id"]] = await self._ring.start(
            buffer=buffer,
            opcode=uapi.IORING_OP_URING_CMD,
            fd=self._control,
            cmd_op=Cmd[order["command"]],
            cmd=uapi.ublksrv_ctrl_cmd.pack(
                dev_id=dev_id & 0xFFFFFFFF,
                queue_id=0xFFFF,
                len=buffer.size if buffer else 0,
                addr=buffer.address if buffer else 0,
                data=order["data"] & 0xFFFFFFFFFFFFFFFF,
                dev_path_len=len(path),
            ),
        )
        result = await operation.done
        if order["unprivileged"]:
            os.seteuid(0)
        answer = {
            "id": order["id"],
            "answer": errno_name(-result) if result < 0 else "0",
            "content": buffer.bytes()[len(path) :].hex() if buffer else "",
        }
        self._line.send(json.dumps(answer).encode())
        del self._tasks[order["id"]], self._operations[order["id"]]


async def send(line: socket.socket) -> None:
    asyncio.get_running_loop().add_reader(line, Sender(line).take)
    await asyncio.Event().wait()


def become(what: str, line: socket.socket) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        match what:
            case "server":
                Server(line).run()
            case "reader":
                read(line)
            case "sender":
                asyncio.run(send(line))
    finally:
        os._exit(0)


def main() -> None:
    """Fork puppets until standard input, our socket, ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # they are reaped without our doing
    orders = socket.socket(fileno=os.dup(0))
    while True:
        packet, fds, _, _ = socket.recv_fds(orders, PACKET, 1)
        if not packet:
            return
        child = os.fork()
        if not child:
            orders.close()
            with contextlib.suppress(OSError):
                os.close(0)
            become(json.loads(packet)["be"], socket.socket(fileno=fds[0]))
        os.close(fds[0])
        orders.send(json.dumps({"pid": child}).encode())


if __name__ == "__main__":
    assert Path("/dev/ublk-control").exists()
    main()
