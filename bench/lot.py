"""What a contestant is given: devices of one kind, and the commands that serve them."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from ublkwatch.ctrl import UblkCtrl

HANDOFFS = ("managed", "delegated")
TARGETS = ("null", "loop")
# Without run files, by which ublkwatch would care for its contestants' devices, too.
REFERENCE = (sys.executable, "-m", "ublkwatch.demo.server", "--run-dir=")


@dataclass(frozen=True, slots=True)
class Kind:
    """What a series of kills has in common."""

    handoff: str = "managed"
    target: str = "null"
    queues: int = 1
    depth: int = 32
    group: bool = False  # one server has all of the devices

    @property
    def title(self) -> str:
        plural = "s" * (self.queues != 1)
        return f"{self.handoff}, {self.target}, {self.queues} queue{plural} of {self.depth}"


@dataclass(frozen=True, slots=True)
class Lot:
    """A contestant's own devices, and a directory."""

    home: Path
    dev_ids: tuple[int, ...]
    kind: Kind

    @property
    def target(self) -> tuple[str, ...]:
        """The words by which a reference server is told what to serve."""
        if self.kind.target == "null":
            return ("--target", "null")
        return ("--target", "loop", "--file", f"{self.home}/disk-{{dev_id}}")

    @property
    def attach(self) -> tuple[str, ...]:
        """The command of a server that follows the attach contract; {dev_id} is to be filled."""
        return (*REFERENCE, *self.target)

    @property
    def recover(self) -> tuple[str, ...]:
        """The reference server's own recover command, which goes on as the server."""
        return (*REFERENCE, *self.target, "--recover", "{dev_id}")

    @property
    def command(self) -> tuple[str, ...]:
        return self.attach if self.kind.handoff == "managed" else self.recover


def filled(command: tuple[str, ...], dev_id: int) -> tuple[str, ...]:
    """Return the command for one device."""
    return tuple(word.replace("{dev_id}", str(dev_id)) for word in command)


async def line(ctrl: UblkCtrl, dev_id: int) -> str:
    """Return the line of the attach contract for this device."""
    info = await ctrl.get_dev_info(dev_id)
    return json.dumps(
        {
            "dev_id": dev_id,
            "char_device": f"/dev/ublkc{dev_id}",
            "queues": info.nr_hw_queues,
            "depth": info.queue_depth,
            "max_io_buf_bytes": info.max_io_buf_bytes,
            "flags": int(info.flags),
            "params": await ctrl.get_params(dev_id),
            "attempt": 1,
        }
    )
