"""A device being served: its character device, its queues, one thread for each."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import socket
import struct
import threading
import time
from dataclasses import dataclass
from typing import Any, Final

from ublkwatch import uapi
from ublkwatch.demo.faults import Faults
from ublkwatch.demo.runfile import RunFiles
from ublkwatch.demo.targets import SECTOR, Target
from ublkwatch.uapi import DevFlags
from ublkwatch.uring import Ring, address_of

EX_CONFIG: Final = 78  # sysexits.h: trying again will not help
OPEN_SECONDS: Final = 5.0
OPEN_POLL_SECONDS: Final = 0.01
ABORTED: Final = -errno.ENODEV  # UBLK_IO_RES_ABORT

# Other ways for the data than through a buffer of ours, other commands, other descriptors.
UNSUPPORTED: Final = (
    DevFlags.SUPPORT_ZERO_COPY
    | DevFlags.NEED_GET_DATA
    | DevFlags.USER_COPY
    | DevFlags.ZONED
    | DevFlags.AUTO_BUF_REG
    | DevFlags.BATCH_IO
    | DevFlags.IO_DESC_SIZE
)

# The hot path spares itself Layout's dictionaries: op_flags, nr_sectors, start_sector, (addr).
_DESC: Final = struct.Struct("<IIQ")
_DESC_SIZE: Final = uapi.ublksrv_io_desc.size
_RESULT: Final = uapi.io_uring_sqe.offsets["cmd"] + uapi.ublksrv_io_cmd.offsets["result"]


class ServerError(Exception):
    """It cannot go on; the text says why and what to do."""

    def __init__(self, text: str, status: int = 1) -> None:
        """``status`` is the exit status."""
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a server must know of a device to serve it."""

    dev_id: int
    char_device: str
    queues: int
    depth: int
    max_io_buf_bytes: int
    flags: DevFlags
    dev_sectors: int

    @classmethod
    def of_line(cls, line: bytes) -> Geometry:
        """Read the line of the attach contract; ServerError when it is not one."""
        try:
            values: dict[str, Any] = json.loads(line)
            return cls(
                dev_id=values["dev_id"],
                char_device=values["char_device"],
                queues=values["queues"],
                depth=values["depth"],
                max_io_buf_bytes=values["max_io_buf_bytes"],
                flags=DevFlags(values["flags"]),
                dev_sectors=values["params"]["basic"]["dev_sectors"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(f"standard input: not a line to attach by: {error!r}") from error


class Queue(threading.Thread):
    """One hardware queue. The thread that fetches its tags is the one the kernel talks to."""

    def __init__(
        self, fd: int, index: int, geometry: Geometry, target: Target, faults: Faults
    ) -> None:
        """Map the queue's descriptors; nothing is fetched before start()."""
        super().__init__(name=f"ublk{geometry.dev_id}q{index}", daemon=True)
        self._fd, self._index, self._geometry = fd, index, geometry
        self._serve = faults.serve(index, target.serve)
        self._tags = faults.fetches(index, geometry.depth)
        page = mmap.PAGESIZE
        most = uapi.UBLK_MAX_QUEUE_DEPTH * _DESC_SIZE
        self._descs = mmap.mmap(
            fd,
            -(-geometry.depth * _DESC_SIZE // page) * page,
            flags=mmap.MAP_SHARED | mmap.MAP_POPULATE,
            prot=mmap.PROT_READ,
            offset=index * (-(-most // page) * page),
        )
        self._ring: Ring | None = None
        self._error: Exception | None = None
        self._fetched = threading.Event()

    def wait_fetched(self) -> None:
        """Wait until all tags are with the kernel; raises what came between."""
        self._fetched.wait()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Let go of the device once its tags came back."""
        if self.ident is not None:
            self.join()
        if self._ring is not None:
            self._ring.close()
        self._descs.close()

    def run(self) -> None:
        """Fetch every tag, then serve until the kernel has aborted them all."""
        geometry = self._geometry
        try:
            size = geometry.max_io_buf_bytes
            memory = mmap.mmap(
                -1, size * geometry.depth, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            )
            start, view = address_of(memory), memoryview(memory)
            tags = range(geometry.depth)
            buffers = [view[tag * size : (tag + 1) * size] for tag in tags]
            commits = [
                self._command(uapi.UBLK_U_IO_COMMIT_AND_FETCH_REQ, tag, start + tag * size)
                for tag in tags
            ]
            self._ring = ring = Ring(geometry.depth)
            for tag in range(self._tags):
                ring.push(self._command(uapi.UBLK_U_IO_FETCH_REQ, tag, start + tag * size))
            ring.submit()
        except Exception as error:  # noqa: BLE001 - wait_fetched() raises it where it is handled
            self._error = error
            return
        finally:
            self._fetched.set()
        self._loop(ring, buffers, [(sqe[:_RESULT], sqe[_RESULT + 4 :]) for sqe in commits])

    def _loop(
        self, ring: Ring, buffers: list[memoryview], commits: list[tuple[bytes, bytes]]
    ) -> None:
        descs, serve = self._descs, self._serve
        left = self._tags
        while left:
            ring.submit(wait=1)
            for tag, status in ring.reap():
                if status == ABORTED:
                    left -= 1
                    continue
                if status < 0:
                    raise ServerError(f"{self.name} tag {tag}: {os.strerror(-status)}")
                op_flags, sectors, start = _DESC.unpack_from(descs, tag * _DESC_SIZE)
                data = buffers[tag][: sectors * SECTOR]
                result = serve(op_flags & 0xFF, start * SECTOR, data)
                if result is not None:
                    before, after = commits[tag]
                    ring.push(before + result.to_bytes(4, "little", signed=True) + after)

    def _command(self, command: int, tag: int, address: int) -> bytes:
        return uapi.io_uring_sqe.pack(
            opcode=uapi.IORING_OP_URING_CMD,
            fd=self._fd,
            cmd_op=command,
            user_data=tag,
            cmd=uapi.ublksrv_io_cmd.pack(q_id=self._index, tag=tag, addr=address),
        )


class Device:
    """A device being served: its character device and its queues."""

    def __init__(self, geometry: Geometry, target: Target, faults: Faults) -> None:
        """Check that they fit, open, and map; ServerError says what does not fit."""
        check(geometry, target)
        self.dev_id = geometry.dev_id
        self._faults = faults
        self.fd = open_char_device(geometry.char_device)
        faults.at("open", self.fd)
        self.queues: list[Queue] = []
        try:
            for index in range(geometry.queues):
                self.queues.append(Queue(self.fd, index, geometry, target, faults))
        except OSError as error:
            self.close()
            raise ServerError(f"{geometry.char_device}: cannot map its queues: {error}") from error
        faults.at("mmap")

    def fetch(self) -> None:
        """Start every queue; return when every tag is with the kernel."""
        for queue in self.queues:
            queue.start()
        for queue in self.queues:
            queue.wait_fetched()

    def threads(self) -> list[int]:
        """Return the thread of each queue that was started."""
        return [queue.native_id for queue in self.queues if queue.native_id is not None]

    def serve_to_its_end(self, run_files: RunFiles) -> None:
        """Serve until the kernel has aborted every tag, then let go of the device."""
        for queue in self.queues:
            queue.join()
        self._faults.at("ended")
        run_files.remove(self.dev_id)
        self.close()

    def close(self) -> None:
        """Let go of the device, so that it can be deleted."""
        for queue in self.queues:
            queue.close()
        os.close(self.fd)


def check(geometry: Geometry, target: Target) -> None:
    """Refuse, before the device is touched, what this server could only serve wrongly."""
    if target.sectors is not None and target.sectors != geometry.dev_sectors:
        raise ServerError(
            f"{geometry.char_device}: the device has {geometry.dev_sectors} sectors and the target "
            f"{target.sectors}; check --file and --size",
            EX_CONFIG,
        )
    if unsupported := geometry.flags & UNSUPPORTED:
        raise ServerError(f"{geometry.char_device}: cannot serve {unsupported!r}", EX_CONFIG)


def open_char_device(path: str) -> int:
    """Open it; while the kernel still lets go of the former server, or udev makes it, retry."""
    deadline = time.monotonic() + OPEN_SECONDS
    while True:
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            transient = error.errno in (errno.EBUSY, errno.ENOENT)
            if not transient or time.monotonic() > deadline:
                raise ServerError(
                    f"{path}: {error.strerror}; is the device there, and nobody else serving it?"
                ) from error
        time.sleep(OPEN_POLL_SECONDS)


def say_ready() -> None:
    """Send READY=1 as sd_notify(3) does; without NOTIFY_SOCKET nobody wants to know."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            name = "\0" + address[1:] if address.startswith("@") else address
            # A supervisor that is being restarted does not hear it, and will not need to: the
            # line comes all the same.
            with contextlib.suppress(OSError):
                sender.sendto(b"READY=1", name)
