"""What the service manager is told of us: sd_notify(3), by plain datagrams.

Without a manager that listens nothing is told. What we start must not speak in our name, so its
variables are taken out of the environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, MutableMapping

_STATUS_MAX = 200  # characters


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
        self._said = ""

    async def attend(self, ready: asyncio.Event, progresses: Callable[[], bool]) -> None:
        """Tell once that we are ready; then for ever, as often as is wanted, that we progress."""
        await ready.wait()
        self.ready()
        while self.watchdog_s is not None:
            if progresses():
                self.alive()
            await asyncio.sleep(self.watchdog_s / 3)

    def ready(self) -> None:
        """Tell that every device was looked at once, or that a reload is over."""
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

    def _tell(self, *lines: str) -> None:
        if not self._address:
            return
        # Its queue may be full, or itself be restarted: the next word will do.
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as line,
        ):
            line.sendto("\n".join(lines).encode(), self._address)
