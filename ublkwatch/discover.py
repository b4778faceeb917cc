"""Which ublk devices there are: sysfs for the truth, uevents for news of it.

The only home of pyroute2, 33 MiB that only a daemon needs: it knows what a uevent looks like. The
socket is ours, since pyroute2's under asyncio came with 0.9, which no Debian has, and keeps ENOBUFS
to itself. Uevents are hints: a device's appearing and vanishing is announced, a crash is not
(research: no uevent at all on a change of state), and what is known to be lost leads to a new look
at everything.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

from ublkwatch.model import Traffic

_SYSFS = Path("/sys")
# Documentation/block/stat.rst: read, write, discard and flush requests completed.
_COMPLETED = (0, 4, 11, 15)
_IN_FLIGHT = 8
_KOBJECT_UEVENT = 15  # include/uapi/linux/netlink.h: NETLINK_KOBJECT_UEVENT
_KERNEL_GROUP = 1  # uevents as the kernel sends them; group 2 repeats udevd's view of them
_DISKSEQ_MAX = 64  # of a number in 64 bits
_UEVENT_MAX = 8192  # lib/kobject_uevent.c: UEVENT_BUFFER_SIZE is 2048, and a header before it


def dev_ids(sysfs: Path = _SYSFS) -> set[int]:
    """Return the ids of all devices, started or not; none while the module is not loaded."""
    return set(_numbered(sysfs / "class/ublk-char", "ublkc"))


def present(sysfs: Path = _SYSFS) -> dict[int, int | None]:
    """Return all devices as dev_ids() does, each with a number for this life of its disk.

    None stands for no disk. The number means nothing, but that a disk that comes in another's
    place has another one: a name in sysfs has its inode's for as long as it is there, and the
    kernel gives none of them out twice in a boot (fs/kernfs/dir.c, __kernfs_new_node()). So two
    directories say of all devices what instance() says of one.
    """
    disks = _numbered(sysfs / "block", "ublkb")
    return {dev_id: disks.get(dev_id) for dev_id in _numbered(sysfs / "class/ublk-char", "ublkc")}


def _numbered(directory: Path, prefix: str) -> dict[int, int]:
    """Return the inode of each name that is this prefix and a number."""
    try:
        with os.scandir(directory) as entries:
            found = {entry.name: entry.inode() for entry in entries}
    except FileNotFoundError:
        return {}
    at = len(prefix)
    return {
        int(name[at:]): inode
        for name, inode in found.items()
        if name.startswith(prefix) and name[at:].isdecimal()
    }


def instance(dev_id: int, boot_id: str, sysfs: Path = _SYSFS) -> str | None:
    """Name this life of the device; None while it has no disk.

    The kernel numbers disks in the order of their appearance and never twice in a boot
    (``diskseq``, Linux 5.15), so the same dev_id with another number is another device.
    """
    try:
        # By descriptor: it is read with every look at a device, and a file object takes longer.
        file = os.open(f"{sysfs}/block/ublkb{dev_id}/diskseq", os.O_RDONLY | os.O_CLOEXEC)
        try:
            diskseq = os.read(file, _DISKSEQ_MAX)
        finally:
            os.close(file)
    except OSError:
        return None
    return f"{boot_id}/{diskseq.decode().strip()}"


def traffic(dev_id: int, sysfs: Path = _SYSFS) -> Traffic | None:
    """Return what the block layer counts of a device's disk; None while it has none.

    Neither file waits for the device (measured with a server that is stopped, and with a STOP_DEV
    that hangs), and partitions are counted in. With queue/iostats off both stand still. What
    ``inflight`` leaves out are flushes, and (measured on 7.3) what waits behind a QUIESCE_DEV.
    """
    home = sysfs / f"block/ublkb{dev_id}"
    try:
        counts = [int(count) for count in (home / "stat").read_text().split()]
        inflight = counts[_IN_FLIGHT]
        driven = sum(map(int, (home / "inflight").read_text().split()))
    except (OSError, ValueError, IndexError):
        return None
    completed = sum(counts[at] for at in _COMPLETED if at < len(counts))
    return Traffic(inflight, completed, parked=max(0, inflight - driven))


async def follow_uevents(look: Callable[[], None]) -> None:
    """Call ``look`` when a ublk device came or went, and when uevents were lost. Endless; OSError.

    Anybody may send to a socket like this one, but only the kernel has the port 0.
    """
    parse = await asyncio.to_thread(load_uevents)
    kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    with socket.socket(socket.AF_NETLINK, kind, _KOBJECT_UEVENT) as uevents:
        uevents.bind((0, _KERNEL_GROUP))
        look()  # what came before is lost, as in a gap
        loop, last = asyncio.get_running_loop(), None
        while True:
            try:
                data, (port, _) = await loop.sock_recvfrom(uevents, _UEVENT_MAX)
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # there were more than the socket holds
                    raise
                look()
                continue
            if port == 0:
                event = parse(data)
                number = int(event.get("SEQNUM", 0))
                if not event or asks_for_look(str(event.get("DEVPATH", "")), number, last):
                    look()
                last = number


def load_uevents() -> Callable[[bytes], Mapping[str, str]]:
    """Import what follow_uevents() needs: beforehand, and in a thread; ImportError."""
    from pyroute2.netlink.uevent import MarshalUevent  # noqa: PLC0415 - see above

    marshal = MarshalUevent()

    def parse(data: bytes) -> Mapping[str, str]:
        try:
            return dict(next(iter(marshal.parse(data))))
        except (ValueError, LookupError):  # such as a network interface whose name is no UTF-8
            return {}

    return parse


def asks_for_look(path: str, number: int, last: int | None) -> bool:
    """Tell whether a uevent speaks of ublk, or shows that some before it were lost."""
    return "ublk" in path or (last is not None and number > last + 1)
