"""Misbehaviour on request: what a broken server does, at named points of the good one's life."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, NoReturn

from ublkwatch.demo.targets import Serve

CRASHED: Final = 3  # exit status of a death by fault


def _exit(_fd: int) -> NoReturn:
    os._exit(CRASHED)  # no clean-up: as a crash


def _hang(_fd: int) -> NoReturn:
    while True:
        threading.Event().wait()


def _fork_away(_fd: int) -> None:
    if os.fork():
        os._exit(0)


def _leak(fd: int) -> None:
    os.set_inheritable(fd, True)
    quiet = [(os.POSIX_SPAWN_OPEN, stdio, os.devnull, os.O_RDWR, 0) for stdio in range(3)]
    child = os.posix_spawnp(
        "sleep", ["sleep", "infinity"], os.environ, file_actions=quiet, setsid=True
    )
    os.set_inheritable(fd, False)
    print(f"leak: process {child} holds the character device", file=sys.stderr, flush=True)


def _ignore_sigterm(_fd: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# The point at which it happens and what happens there. "K" and "Q" are numbers of the caller's.
_FAULTS: Final[dict[str, tuple[str, Callable[[int], None]]]] = {
    "exit-at-start": ("start", _exit),
    "hang-at-start": ("start", _hang),
    "ignore-sigterm": ("start", _ignore_sigterm),
    "exit-after-ready": ("ready", _exit),
    "hang-after-ready": ("ready", _hang),
    "fork-away": ("line", _fork_away),
    "leak": ("open", _leak),
    "exit-after-mmap": ("mmap", _exit),
    "hang-after-mmap": ("mmap", _hang),
    "exit-after-fetches:K": ("fetched", _exit),
    "hang-after-fetches:K": ("fetched", _hang),
    "exit-after-all-fetches": ("fetched", _exit),
    "hang-after-all-fetches": ("fetched", _hang),
    "stall": ("", _hang),
    "stop-queue:Q": ("ended", _hang),
}
NAMES: Final = ", ".join(_FAULTS)


class Faults:
    """One fault, or none; a good server asks it at every point and goes on."""

    def __init__(self, spec: str = "none") -> None:
        """Parse ``name`` or ``name:number``; ValueError when there is no such fault."""
        name, _, number = spec.partition(":")
        self._number = int(number) if number else 0
        if number:
            name += ":Q" if name == "stop-queue" else ":K"
        if name != "none" and name not in _FAULTS:
            raise ValueError(f"no fault is called {spec!r}; there are: {NAMES}")
        self._name = name
        self._point, self._act = _FAULTS.get(name, ("", _hang))
        self._live = threading.Event()
        self._answered = threading.Event()

    def at(self, point: str, fd: int = -1) -> None:
        """Do what the fault does at this point; ``fd`` is the character device, if it is open."""
        if point == "live":
            self._live.set()
        if point == self._point:
            self._act(fd)

    def fetches(self, queue: int, depth: int) -> int:
        """Return how many tags this queue fetches."""
        if self._name in ("exit-after-fetches:K", "hang-after-fetches:K"):
            return min(self._number, depth) if queue == 0 else 0
        return depth

    def serve(self, queue: int, serve: Serve) -> Serve:
        """Return what handles this queue's requests: ``serve`` itself when it is a good one."""
        if self._name in ("exit-after-all-fetches", "hang-after-all-fetches"):
            return lambda _op, _offset, _data: None
        if self._name == "stall":
            return self._stall(serve)
        if self._name == "stop-queue:Q" and queue == self._number:
            return self._stop(serve)
        return serve

    # Before LIVE both behave: Linux 6.12 never recovers from a START_DEV whose partition scan
    # is not answered (docs/kernel.md).

    def _stall(self, serve: Serve) -> Serve:
        def stalled(op: int, offset: int, data: memoryview) -> int | None:
            if self._answered.is_set():
                return None
            if self._live.is_set():
                self._answered.set()
            return serve(op, offset, data)

        return stalled

    def _stop(self, serve: Serve) -> Serve:
        def stopping(op: int, offset: int, data: memoryview) -> int | None:
            if self._live.is_set():
                sys.exit()  # ends this thread and no other
            return serve(op, offset, data)

        return stopping


def next_fault(path: Path) -> str:
    """Take the first line out of a file of faults; "none" when there is no line left."""
    with path.open("r+", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        lines = file.read().splitlines()
        file.seek(0)
        file.truncate()
        file.writelines(f"{line}\n" for line in lines[1:])
    return lines[0].strip() if lines else "none"
