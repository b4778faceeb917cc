"""The way to the driver: io_uring, /dev/ublk-control, and what it can do; why not, and the way out.

What is closed is told by errno, and by what /proc says of the gates that give it.
"""

from __future__ import annotations

import errno
from pathlib import Path

from ublkwatch.async_ring import AsyncRing
from ublkwatch.ctrl import CtrlError, UblkCtrl
from ublkwatch.uapi import DevFlags

_RING_ENTRIES = 256


class UnavailableError(Exception):
    """Something that cannot be done without is missing; says what, and the way out."""

    def __init__(self, message: str, *, permission: bool = False) -> None:
        """``permission``: it is there, but not for us."""
        super().__init__(message)
        self.permission = permission


def open_ring() -> AsyncRing:
    """Return a ring for the running loop; UnavailableError names the gate that is closed."""
    try:
        return AsyncRing(_RING_ENTRIES)
    except OSError as error:
        raise UnavailableError("; try: ".join(gate(error))) from error


async def ask_features(ctrl: UblkCtrl) -> DevFlags | None:
    """Return GET_FEATURES' answer, None before Linux 6.5; UnavailableError."""
    try:
        return await ctrl.get_features()
    except CtrlError as error:
        if error.errno == errno.EPERM:
            raise UnavailableError(str(error), permission=True) from error
        return None
    except OSError as error:
        denied = error.errno in (errno.EACCES, errno.EPERM)
        raise UnavailableError(str(error.strerror), permission=denied) from error


def gate(error: OSError, root: Path = Path("/")) -> tuple[str, str]:
    """Say what keeps io_uring_setup from working, and the way out, by errno and /proc."""
    seccomp = _field(root / "proc/self/status", "Seccomp:") == "2"
    sysctl = _read(root / "proc/sys/kernel/io_uring_disabled")
    profile = "allow io_uring_setup, io_uring_enter and io_uring_register in the seccomp profile"
    match error.errno:
        case errno.EPERM if sysctl in ("1", "2"):
            who = "nobody" if sysctl == "2" else "only CAP_SYS_ADMIN, and io_uring_group,"
            what = f"kernel.io_uring_disabled = {sysctl}: {who} may use io_uring"
            return what, "sysctl kernel.io_uring_disabled=0"
        case errno.EPERM if seccomp:
            return "io_uring is forbidden by a seccomp filter (Docker's, containerd's?)", profile
        case errno.EPERM | errno.EACCES:
            return "io_uring is forbidden here, by a security module perhaps", "see the audit log"
        case errno.ENOSYS if seccomp:
            return "io_uring is hidden by a seccomp filter (podman's, CRI-O's?)", profile
        case errno.ENOSYS:
            return "this kernel has no io_uring", "a kernel with CONFIG_IO_URING"
        case errno.ENOMEM:
            return "io_uring has no memory to lock", "raise RLIMIT_MEMLOCK (LimitMEMLOCK=)"
    return f"io_uring: {error.strerror}", "see io_uring_setup(2)"


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _field(path: Path, name: str) -> str:
    lines = (line for line in _read(path).splitlines() if line.startswith(name))
    return next(lines, name).split(maxsplit=1)[-1].strip()
