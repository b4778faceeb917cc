"""GET_DEV_INFO of all devices at once: one submission, on a ring that is kept for it.

What is asked stays the same for as long as the devices do, so its SQEs and buffers are laid out
once, and a glance is one system call. Before Linux 7.0 workers of the kernel answer, from then on
the call itself; either way the command takes no lock and never sleeps on a device.
"""

from __future__ import annotations

import asyncio

from ublkwatch import uapi
from ublkwatch.uring import Buffer, Ring

MOST = 32768  # devices: io_uring.c, IORING_MAX_ENTRIES
_INFO = uapi.ublksrv_ctrl_dev_info.size
_WAIT_S = 0.005  # for the kernel's workers, in the call itself; then the loop waits
_STUCK_MAX = 8  # rings


class Glance:
    """One look at many devices, on the running loop; one at a time."""

    def __init__(self) -> None:
        """Set nothing up yet."""
        self._asked: tuple[int, tuple[int, ...]] = (-1, ())
        self._ring: Ring | None = None
        self._buffer = Buffer(0)
        self._missing: set[int] = set()  # the places of those that have not answered
        self._failed: dict[int, int] = {}
        self._done: asyncio.Future[None] | None = None
        # What was given up on: each ring with its buffer, and how many answers are to come.
        self._stuck: list[tuple[Ring, Buffer, int]] = []

    @property
    def wedged(self) -> int:
        """How many commands were given up on, and are with the kernel still."""
        return sum(left for _, _, left in self._stuck)

    def begin(self, fd: int, dev_ids: tuple[int, ...]) -> asyncio.Future[None]:
        """Ask; the answer is done when the kernel is, which it is at once as a rule. OSError.

        ``fd`` is the control node's. To be followed by end().
        """
        self._free_stuck()
        self._done = asyncio.get_running_loop().create_future()
        self._missing, self._failed = set(), dict.fromkeys(range(len(dev_ids)), 0)
        if len(self._stuck) < _STUCK_MAX:
            ring = self._laid_out(fd, dev_ids)
            taken = ring.send(len(dev_ids), _WAIT_S)
            self._missing = set(range(taken))
            self._collect()
            if self._missing:
                asyncio.get_running_loop().add_reader(ring.fd, self._collect)
        else:
            self._done.set_result(None)
        return self._done

    def end(self) -> tuple[bytes, dict[int, int]]:
        """Return the answers, one behind the other, and by its place what came instead of one.

        That is an errno, or 0 where nothing has come; its bytes then mean nothing.
        """
        answers = self._buffer.bytes()
        if self._missing:
            self._give_up()
        return answers, self._failed

    def close(self) -> None:
        """Give the ring back, between two glances."""
        if self._ring is not None:
            self._ring.close()
        self._ring = None

    def _laid_out(self, fd: int, dev_ids: tuple[int, ...]) -> Ring:
        if self._ring is None or self._ring.entries < len(dev_ids):
            self.close()
            self._ring = Ring(len(dev_ids))
        elif self._asked == (fd, dev_ids):
            return self._ring
        self._asked = (fd, dev_ids)
        self._buffer = Buffer(len(dev_ids) * _INFO)
        for place, dev_id in enumerate(dev_ids):
            address = self._buffer.address + place * _INFO
            question = self.question(fd, dev_id, address)
            self._ring.lay(place, uapi.io_uring_sqe.pack(user_data=place, **question))
        return self._ring

    def question(self, fd: int, dev_id: int, address: int) -> dict[str, int | bytes]:
        """Return the SQE that asks one device, and has the answer written to an address."""
        command = {"dev_id": dev_id, "queue_id": 0xFFFF, "len": _INFO, "addr": address}
        return {
            "opcode": uapi.IORING_OP_URING_CMD,
            "fd": fd,
            "cmd_op": uapi.Cmd.GET_DEV_INFO,
            "cmd": uapi.ublksrv_ctrl_cmd.pack(**command),
        }

    def _collect(self) -> None:
        if self._ring is None or self._done is None:
            return
        for place, result in self._ring.results():
            self._missing.discard(place)
            if result < 0:
                self._failed[place] = -result
            else:
                del self._failed[place]
        if not self._missing and not self._done.done():
            asyncio.get_running_loop().remove_reader(self._ring.fd)
            self._done.set_result(None)

    def _give_up(self) -> None:
        """Leave the ring to its commands: their buffer may be written as long as they are there."""
        assert self._ring is not None
        asyncio.get_running_loop().remove_reader(self._ring.fd)
        self._stuck.append((self._ring, self._buffer, len(self._missing)))
        self._ring, self._missing = None, set()

    def _free_stuck(self) -> None:
        kept = []
        for ring, buffer, left in self._stuck:
            left -= len(ring.results())  # noqa: PLW2901 - so it reads best
            if left > 0:
                kept.append((ring, buffer, left))
            else:
                ring.close()
        self._stuck = kept
