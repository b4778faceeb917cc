"""Which ublk devices there are: sysfs for the truth, uevents for news of it.

The only home of pyroute2, which is imported late: it costs 120 ms and 33 MiB. Uevents are hints:
a device's appearing and vanishing is announced, a crash is not (research: no uevent at all on a
change of state), and a gap in their sequence numbers leads to a new look at everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ublkwatch.model import Traffic

_SYSFS = Path("/sys")
# Documentation/block/stat.rst: read, write, discard and flush requests completed.
_COMPLETED = (0, 4, 11, 15)
_IN_FLIGHT = 8
_KERNEL_GROUP = 1  # uevents as the kernel sends them; group 2 repeats udevd's view of them


def dev_ids(sysfs: Path = _SYSFS) -> set[int]:
    """Return the ids of all devices, started or not; none while the module is not loaded."""
    with contextlib.suppress(FileNotFoundError):
        names = [path.name for path in (sysfs / "class/ublk-char").iterdir()]
        return {int(name[5:]) for name in names if re.fullmatch(r"ublkc\d+", name)}
    return set()


def instance(dev_id: int, boot_id: str, sysfs: Path = _SYSFS) -> str | None:
    """Name this life of the device; None while it has no disk.

    The kernel numbers disks in the order of their appearance and never twice in a boot
    (``diskseq``, Linux 5.15), so the same dev_id with another number is another device.
    """
    try:
        diskseq = (sysfs / f"block/ublkb{dev_id}/diskseq").read_text().strip()
    except OSError:
        return None
    return f"{boot_id}/{diskseq}"


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


def _load_pyroute2() -> Any:
    from pyroute2.netlink.uevent import AsyncUeventSocket  # noqa: PLC0415 - see above

    return AsyncUeventSocket


async def follow_uevents(look: Callable[[], None]) -> None:
    """Call ``look`` when a ublk device came or went, and when uevents were lost. Endless."""
    last = None
    socket_type = await asyncio.to_thread(_load_pyroute2)  # the loop has more to do than to wait
    async with socket_type() as socket:
        await socket.bind(groups=_KERNEL_GROUP)
        look()  # what came before is lost, as in a gap
        while True:
            async for message in socket.get():
                number = int(message.get("SEQNUM", 0))
                if asks_for_look(str(message.get("DEVPATH", "")), number, last):
                    look()
                last = number


def asks_for_look(path: str, number: int, last: int | None) -> bool:
    """Tell whether a uevent speaks of ublk, or shows that some before it were lost."""
    return "ublk" in path or (last is not None and number > last + 1)
