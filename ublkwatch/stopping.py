"""`ublkwatch stop`: ends a device's disk, unless somebody uses it.

By TRY_STOP_DEV where the driver has it, which refuses a disk that is open by itself. Both may sleep
on the device, so a control worker sends them.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ublkwatch.model import DevInfo
from ublkwatch.uapi import DevFlags, DevState
from ublkwatch.usage import Usage
from ublkwatch.wire import Answer

TIMEOUT_S = 60.0


class Ctrl(Protocol):
    """ctrl.UblkCtrl."""

    async def get_dev_info(self, dev_id: int) -> DevInfo: ...


class Workers(Protocol):
    """ctrl_worker.Workers."""

    async def call(
        self, command: str, dev_id: int, key: str, *, timeout_s: float
    ) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Stopper:
    """Stops devices, through the daemon or without it."""

    ctrl: Ctrl
    workers: Workers
    features: DevFlags | None
    usage: Callable[[int], Usage]

    async def objection(self, dev_id: int, *, force: bool) -> str:
        """Return why the device must not be stopped now, or ""."""
        try:
            info = await self.ctrl.get_dev_info(dev_id)
        except OSError as error:
            return "there is no such device" if error.errno == errno.ENODEV else str(error)
        if info.state is DevState.DEAD:
            return "it has no disk that could be stopped: its state is DEAD"
        return "" if force else await self.in_use(dev_id)

    async def in_use(self, dev_id: int) -> str:
        """Return who uses the disk, in words, or ""."""
        found = await asyncio.to_thread(self.usage, dev_id)
        if found.uses:
            return f"it is in use: {found}"
        if found.unseen:
            return f"who uses it cannot be seen: of {found.unseen} processes we may not look"
        return ""

    def prospect(self, dev_id: int, *, force: bool) -> Answer:
        """Say what stop() would do."""
        what = f"{self._command(force=force)} would be sent, and /dev/ublkb{dev_id} removed"
        lost = "; I/O on it would end in errors" if force else ""
        left = f"/dev/ublkc{dev_id} would stay, for its own program to delete or to start again"
        return Answer("", (what + lost, left), f"the disk /dev/ublkb{dev_id} is removed{lost}")

    async def stop(self, dev_id: int, *, force: bool) -> Answer:
        """Stop it, whoever uses it: objection() comes before.

        TimeoutError: the command is with the kernel still, and will be done some time.
        """
        command = self._command(force=force)
        try:
            await self.workers.call(command, dev_id, f"stop {dev_id}", timeout_s=TIMEOUT_S)
        except OSError as error:
            match error.errno:
                case errno.EBUSY:
                    return Answer("somebody has just opened it")
                case errno.ENODEV:
                    return Answer("it has no disk any more")
                case errno.ETIMEDOUT:
                    raise TimeoutError(
                        f"{command} was not answered within {TIMEOUT_S:g} s: its server has "
                        "requests and does not complete them; once that is ended, it goes through"
                    ) from error
            return Answer(str(error))
        return Answer("", (f"stopped by {command}: /dev/ublkb{dev_id} is removed",))

    def _command(self, *, force: bool) -> str:
        tries = self.features is not None and self.features & DevFlags.SAFE_STOP_DEV
        return "TRY_STOP_DEV" if tries and not force else "STOP_DEV"
