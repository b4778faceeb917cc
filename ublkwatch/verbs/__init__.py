"""What the verbs of the command line share: exit codes, and how people write devices and times."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import select
import sys
import time
from enum import IntEnum
from pathlib import Path
from typing import Any

from ublkwatch.config import Config

_CAP_SYS_ADMIN = 21
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Exit(IntEnum):
    """How ublkwatch ends; the README has the same table."""

    OK = 0
    FAILED = 1  # something went wrong that is none of the below
    USAGE = 2  # the command line
    NOT_RUNNING = 3  # ublkwatch is not running
    REFUSED = 4  # an order was refused, or there is no such device
    UNHEALTHY = 5  # status: a device is neither watched nor observed; doctor: something is bad
    UNAVAILABLE = 69  # no /dev/ublk-control, or io_uring is disabled (EX_UNAVAILABLE)
    STATE = 73  # a directory cannot be written, is in use, or is on a ublk device (EX_CANTCREAT)
    NO_PERMISSION = 77  # no CAP_SYS_ADMIN, or not root (EX_NOPERM)
    CONFIG = 78  # the configuration (EX_CONFIG)


def say(code: Exit, message: str) -> Exit:
    """Say in one line on standard error why this ends with ``code``."""
    print(f"ublkwatch: {message}", file=sys.stderr)
    return code


def dev_id_of(text: str) -> int:
    """Understand a device, as an argument."""
    match = re.fullmatch(r"(?:(?:/dev/)?ublk[bc])?([0-9]{1,7})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no device; write N, ublkbN or /dev/ublkbN")
    return int(match[1])


def seconds(text: str, at_most: float = 30 * 86400) -> float:
    """Understand a time, as an argument."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd])", text)
    value = float(match[1]) * _UNITS_S[match[2]] if match else 0
    if not 0 < value <= at_most:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 90s, 30m, 2h or up to 30d")
    return value


def clock(wall: float) -> str:
    """Write a wall time, for people."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(wall))


def pause(seconds: float) -> bool:
    """Wait; return False, at once, where nobody reads our output any more."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)  # errors are told always
    return not output.poll(seconds * 1000)


def document_of(settings: Config) -> dict[str, Any]:
    """Return the status document of the daemon that runs, or ran last; OSError, ValueError.

    One that says the same as before is not written anew, but its file's time is.
    """
    with (settings.runtime_dir / "status.json").open() as file:
        document: dict[str, Any] = json.load(file)
        confirmed = os.fstat(file.fileno()).st_mtime
    return document | {"written_at": max(document["written_at"], confirmed)}


def locked(path: Path) -> bool:
    """Tell whether a daemon holds the lock."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return _listed(path)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _listed(path: Path) -> bool:
    """Ask the kernel's list of locks, for who may not open the file; where it is silent, say yes.

    The file is root's alone: who could open it could take the lock, and keep the daemon out.
    """
    try:
        found = path.stat()
        device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
        locks = Path("/proc/locks").read_text()  # proc_locks(5)
    except OSError:
        return True
    return f" {device}:{found.st_ino} " in locks


def operators(settings: Config) -> str:
    """Name who may give orders, and look at what is not for everybody."""
    return f"root, and group {settings.admin_group}," if settings.admin_group else "root"


def may_administer() -> bool:
    """Root in a container may lack the capability: it is what the kernel asks for, not the uid."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_SYS_ADMIN & 1)
    return False


def not_allowed(what: str) -> Exit:
    """Say that the capability is missing, and how to come by it; return the exit code."""
    if os.geteuid():
        how = "try sudo"
    else:  # in a container, or under a unit, that took it away
        how = "give this container or unit that capability (`ublkwatch doctor` says what else)"
    return say(Exit.NO_PERMISSION, f"{what}: no CAP_SYS_ADMIN, which ublk's commands need; {how}")
