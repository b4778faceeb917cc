"""The reference server: serves ublk devices, and shows the attach contract (ARCHITECTURE.md).

    python -m ublkwatch.demo.server --target ram                      attach: READY, line, serve
    python -m ublkwatch.demo.server --target ram --size 64M --create 0    create the device, serve

It exits 0 when its devices are gone, 1 on an error that may pass, 78 on one that will not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import json
import mmap
import os
import signal
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from ublkwatch import uapi
from ublkwatch.async_ring import AsyncRing
from ublkwatch.ctrl import UblkCtrl
from ublkwatch.demo.faults import Faults, next_fault
from ublkwatch.demo.targets import SECTOR, Target, TargetError, TargetSpec
from ublkwatch.model import DevInfo
from ublkwatch.uapi import DevFlags
from ublkwatch.uring import Ring, address_of

EX_CONFIG: Final = 78  # sysexits.h: trying again will not help
OPEN_SECONDS: Final = 5.0
OPEN_POLL_SECONDS: Final = 0.01
ABORTED: Final = -errno.ENODEV  # UBLK_IO_RES_ABORT

RECOVERY: Final = {
    "none": DevFlags(0),
    "plain": DevFlags.USER_RECOVERY,
    "reissue": DevFlags.USER_RECOVERY | DevFlags.USER_RECOVERY_REISSUE,
    "fail_io": DevFlags.USER_RECOVERY | DevFlags.USER_RECOVERY_FAIL_IO,
}
# Other ways for the data than through a buffer of ours, and other commands than ours.
UNSUPPORTED: Final = (
    DevFlags.SUPPORT_ZERO_COPY
    | DevFlags.NEED_GET_DATA
    | DevFlags.USER_COPY
    | DevFlags.ZONED
    | DevFlags.AUTO_BUF_REG
    | DevFlags.BATCH_IO
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

    @classmethod
    def of_info(cls, info: DevInfo, dev_sectors: int) -> Geometry:
        """Take what the kernel granted."""
        return cls(
            dev_id=info.dev_id,
            char_device=f"/dev/ublkc{info.dev_id}",
            queues=info.nr_hw_queues,
            depth=info.queue_depth,
            max_io_buf_bytes=info.max_io_buf_bytes,
            flags=info.flags,
            dev_sectors=dev_sectors,
        )


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

    def wait(self) -> None:
        """Serve until the kernel has aborted every tag."""
        for queue in self.queues:
            queue.join()

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
            sender.sendto(b"READY=1", name)


def attach(spec: TargetSpec, dev_id: int | None, faults: Faults) -> None:
    """Serve a device that lost its server: the attach contract, step by step."""
    known = dev_id is not None or not spec.needs_dev_id
    target = spec.open(dev_id, create=False) if known else None
    say_ready()
    faults.at("ready")
    line = sys.stdin.buffer.readline()
    if not line:  # not needed any more
        return
    faults.at("line")
    geometry = Geometry.of_line(line)
    if target is None:
        target = spec.open(geometry.dev_id, create=False)
    device = Device(geometry, target, faults)
    device.fetch()
    faults.at("fetched")
    faults.at("live")  # as far as a server can tell: it sends no control command
    device.wait()
    faults.at("ended")


async def create(options: argparse.Namespace, spec: TargetSpec, faults: Faults) -> list[Device]:
    """Add the devices and bring them to LIVE; when one fails, all are deleted again."""
    ring = AsyncRing()
    ctrl = UblkCtrl(ring)
    devices: dict[int, Device | None] = {}
    try:
        for dev_id in options.create:
            target = spec.open(dev_id, create=True)
            info = await ctrl.add_dev(
                dev_id,
                queues=options.queues,
                depth=options.depth,
                max_io_buf_bytes=options.max_io_buf_bytes,
                flags=RECOVERY[options.recovery],
            )
            devices[dev_id] = None
            basic = basic_params(info, target, options.block_size)
            await ctrl.set_params(dev_id, {"basic": basic})
            device = Device(Geometry.of_info(info, basic["dev_sectors"]), target, faults)
            devices[dev_id] = device
            await asyncio.to_thread(device.fetch)
            faults.at("fetched")
            await ctrl.start_dev(dev_id, os.getpid())
            info = await ctrl.get_dev_info(dev_id)
            granted = f"queues={info.nr_hw_queues} depth={info.queue_depth} flags={info.flags:#x}"
            print(f"LIVE {dev_id} {granted}", flush=True)
    except BaseException:
        for dev_id, made in devices.items():
            await remove(ctrl, dev_id, made)
        raise
    finally:
        ring.close()
    faults.at("live")
    return [device for device in devices.values() if device is not None]


async def remove(ctrl: UblkCtrl, dev_id: int, device: Device | None) -> None:
    """Delete a device of ours; STOP first, since DEL_DEV waits until we have let go of it."""
    with contextlib.suppress(OSError):
        await ctrl.stop_dev(dev_id)
        if device is not None:
            await asyncio.to_thread(device.close)
        await ctrl.del_dev(dev_id)


def basic_params(info: DevInfo, target: Target, block_size: int) -> dict[str, int]:
    """Return ``struct ublk_param_basic`` for a new device."""
    shift = block_size.bit_length() - 1
    return {
        "attrs": target.attrs,
        "logical_bs_shift": shift,
        "physical_bs_shift": max(shift, 12),
        "io_opt_shift": max(shift, 12),
        "io_min_shift": shift,
        "max_sectors": info.max_io_buf_bytes // SECTOR,
        "dev_sectors": target.sectors or 0,
    }


async def control(options: argparse.Namespace) -> None:
    """--stop and --delete."""
    ring = AsyncRing()
    try:
        ctrl = UblkCtrl(ring)
        if options.stop is not None:
            await ctrl.stop_dev(options.stop)
        if options.delete is not None:
            await ctrl.del_dev(options.delete)
    finally:
        ring.close()


def size(text: str) -> int:
    """Parse bytes, or a number with K, M or G behind it."""
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper(), 1)
    return int(text[:-1] if factor > 1 else text) * factor


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m ublkwatch.demo.server", description="A ublk server to learn and test by."
    )
    add = parser.add_argument
    add("--target", choices=("null", "ram", "loop"), default="null")
    add("--file", help="of ram and loop; {dev_id} is replaced")
    add("--size", type=size, help="bytes, or with K, M, G; default: as large as the file")
    add("--dev-id", type=int, help="attach: open the target of this device before the line comes")
    add("--create", type=lambda text: [int(part) for part in text.split(",")], metavar="N[,N...]")
    add("--stop", type=int, metavar="N", help="only send STOP_DEV")
    add("--delete", type=int, metavar="N", help="only send DEL_DEV")
    add("--recovery", choices=tuple(RECOVERY), default="reissue")
    add("--queues", type=int, default=1)
    add("--depth", type=int, default=64)
    add("--max-io-buf-bytes", type=size, default=512 << 10)
    add("--block-size", type=int, default=512, help="512 or 4096")
    add("--fault", default="none", help="misbehave; see ublkwatch/demo/faults.py")
    add("--fault-file", type=Path, help="take the fault from this file's first line")
    return parser


def die_with_thread(caught: threading.ExceptHookArgs) -> None:
    """End the process: one that lacks a queue would look alive to the kernel for ever."""
    if not issubclass(caught.exc_type, SystemExit):
        print(f"server: {caught.exc_value!r}", file=sys.stderr, flush=True)
        os._exit(1)


def run(options: argparse.Namespace, spec: TargetSpec, faults: Faults) -> None:
    """Do what the command line says."""
    if options.stop is not None or options.delete is not None:
        asyncio.run(control(options))
    elif options.create is None:
        attach(spec, options.dev_id, faults)
    else:
        devices = asyncio.run(create(options, spec, faults))
        say_ready()
        for device in devices:
            device.wait()
        faults.at("ended")


def main() -> NoReturn:
    """Run the command line; never returns."""
    threading.excepthook = die_with_thread
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parser = build_parser()
    options = parser.parse_args()
    default = "/dev/shm/ublkwatch-ram-{dev_id}" if options.target == "ram" else ""  # noqa: S108
    spec = TargetSpec(options.target, options.file or default, options.size)
    if spec.kind == "loop" and not spec.file:
        parser.error("--target loop needs --file")
    try:
        faults = Faults(next_fault(options.fault_file) if options.fault_file else options.fault)
        faults.at("start")
        run(options, spec, faults)
    except (OSError, ValueError, ServerError, TargetError) as error:
        permanent = isinstance(error, (TargetError, ValueError))
        status = error.status if isinstance(error, ServerError) else EX_CONFIG if permanent else 1
        print(f"server: {error}", file=sys.stderr, flush=True)
        sys.exit(status)
    sys.exit(0)


if __name__ == "__main__":
    main()
