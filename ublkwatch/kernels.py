"""Kernels whose ublk_drv or io_uring is known to be bad, by version. Pure.

Taken from changelogs, advisories and reports; only few of these kernels were booted by us. A
version is a hint: distributions mend older ones, and some of them do not say so in its number.
How the driver behaves is told by its features; this is about bugs, which have no bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

Version = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Bug:
    """What is wrong from a version on, until another one."""

    since: Version
    until: Version  # the first one without it, in this line of development
    what: str


BUGS = (
    Bug((0, 0, 0), (6, 1, 0), "ublk has no user recovery: a device is lost with its server"),
    Bug((6, 1, 0), (6, 5, 0), "the driver has no GET_FEATURES: ublkwatch only observes"),
    Bug((6, 5, 0), (6, 7, 0), "a crash is noticed up to 5 s late; nobody has tried ublkwatch here"),
    Bug((6, 1, 0), (6, 10, 11), "a second START_USER_RECOVERY can crash the kernel"),
    Bug((6, 12, 0), (6, 12, 25), "requests may be lost when a device is recovered with reissue"),
    Bug((6, 12, 0), (6, 12, 73), "CVE-2025-68823: reading the partition table can deadlock"),
    Bug((6, 15, 0), (6, 18, 42), "CVE-2026-68173: END_USER_RECOVERY may be done too early"),
    Bug((6, 19, 0), (7, 1, 6), "CVE-2026-68173: END_USER_RECOVERY may be done too early"),
    Bug((6, 17, 0), (6, 18, 8), "servers in a container's pid namespace cannot attach (EINVAL)"),
    Bug((6, 18, 4), (6, 18, 5), "ADD_DEV can crash the kernel (ublk_init_queues)"),
    Bug((6, 18, 40), (6, 18, 41), "io_uring may lose control commands: they are never answered"),
    Bug((7, 0, 0), (7, 1, 0), "io_uring may lose control commands: they are never answered"),
    Bug((7, 2, 0), (7, 2, 7), "I/O may fail after a recovery (force_abort is not cleared)"),
)


def version(release: str) -> Version | None:
    """Understand what uname(2) says."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", release)
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else None


def bugs(release: str) -> Iterator[Bug]:
    """Yield what is known to be wrong with a kernel."""
    found = version(release)
    for bug in BUGS:
        if found is not None and bug.since <= found < bug.until:
            yield bug
