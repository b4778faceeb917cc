"""What the service manager is told of us, and keeps for us: sd_notify(3), by plain datagrams.

Without a manager that listens nothing is told. What we start must not speak in our name, so its
variables are taken out of the environment. What it keeps are descriptors, which it hands to our
next life (sd_listen_fds(3)); nothing depends on them.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Awaitable, Callable, MutableMapping

_STATUS_MAX = 200  # characters
_LISTEN_FDS_START = 3


class Manager:
    """The service manager, as far as it is spoken to; never waits, never fails."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        """Take what it left in the environment."""
        address = environment.pop("NOTIFY_SOCKET", "")
        # A first "@" stands for the zero of an abstract address.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        usec, pid = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", "")
        meant = pid in ("", str(os.getpid()))
        # How long we may be silent until we are killed; None: it does not watch us.
        self.watchdog_s = int(usec) / 1e6 if usec.isdigit() and int(usec) and meant else None
        self.up = asyncio.Event()  # the first READY was told
        self._said = ""
        self._kept = _handed_over(environment)

    async def attend(
        self, comes_up: Callable[[], Awaitable[object]], progresses: Callable[[], bool]
    ) -> None:
        """Tell once that we are ready; then for ever, as often as is wanted, that we progress."""
        await comes_up()
        self.ready()
        self.up.set()
        for name in list(self._kept):  # whoever it is of is not known any more
            os.close(self._kept[name])
            self.drop(name)
        while self.watchdog_s is not None:
            if progresses():
                self.alive()
            await asyncio.sleep(self.watchdog_s / 3)

    def ready(self) -> None:
        """Tell that every device was looked at once and is shown, or that a reload is over."""
        self._tell("READY=1")

    def reloading(self) -> None:
        """Tell that the configuration is read anew; ready() is to follow."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """Tell that we end."""
        self._tell("STOPPING=1")

    def alive(self) -> None:
        """Tell that we progress, which has to be told within watchdog_s again and again."""
        self._tell("WATCHDOG=1")

    def says(self, text: str) -> None:
        """Have `systemctl status` show a line; the same one is told once."""
        line = " ".join(text.split())[:_STATUS_MAX]
        if line != self._said:
            self._said = line
            self._tell(f"STATUS={line}")

    def keep(self, name: str, descriptor: int) -> None:
        """Have a duplicate of a descriptor kept for our next life, under a name without ":"."""
        # FDPOLL=0: a pidfd that is readable is one whose process has ended, and of use yet.
        self._tell("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", descriptor=descriptor)

    def take(self, name: str) -> int | None:
        """Return the descriptor that our former life had kept under a name; it is the caller's."""
        return self._kept.pop(name, None)

    def drop(self, name: str) -> None:
        """Have what was kept under a name forgotten."""
        self._kept.pop(name, None)
        self._tell("FDSTOREREMOVE=1", f"FDNAME={name}")

    def _tell(self, *lines: str, descriptor: int | None = None) -> None:
        if not self._address:
            return
        ancillary = []
        if descriptor is not None:
            rights = array.array("i", [descriptor])
            ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, rights))
        # Its queue may be full, or itself be restarted: the next word will do.
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as line,
        ):
            line.sendmsg(["\n".join(lines).encode()], ancillary, 0, self._address)


def _handed_over(environment: MutableMapping[str, str]) -> dict[str, int]:
    """Return by name what the manager kept of our former life."""
    count, pid = environment.pop("LISTEN_FDS", ""), environment.pop("LISTEN_PID", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdigit():
        return {}
    kept = dict(zip(names, range(_LISTEN_FDS_START, _LISTEN_FDS_START + int(count)), strict=False))
    for descriptor in kept.values():
        os.set_inheritable(descriptor, False)
    return kept
