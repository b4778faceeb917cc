"""The observer: sees both sides by the same means, and belongs to neither.

Two means. The kernel's tracing, with CLOCK_MONOTONIC for its clock, says when the new server was
exec'ed and when it sent READY=1; until then it costs next to nothing. From READY on GET_DEV_INFO,
asked every millisecond, says when the device is LIVE under that server.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from ublkwatch.ctrl import UblkCtrl
from ublkwatch.uapi import DevState

_INSTANCES = Path("/sys/kernel/tracing/instances")
_POLL_S = 0.001
_EVENTS = {
    "sched/sched_process_exec": None,
    "syscalls/sys_enter_sendto": f"len == {len(b'READY=1')}",
}
_LINE = re.compile(r"-(?P<tid>\d+) +\[\d+\].*? (?P<at>\d+\.\d+): (?P<what>\w+)")
_NAMES = {"sched_process_exec": "spawned", "sys_sendto": "ready"}


def moments(trace: str, pid: int) -> dict[str, float]:
    """Return when that process was exec'ed ("spawned") and first said READY=1 ("ready")."""
    found: dict[str, float] = {}
    for line in trace.splitlines():
        match = _LINE.search(line)
        if match and int(match["tid"]) == pid and match["what"] in _NAMES:
            found.setdefault(_NAMES[match["what"]], float(match["at"]))
    return found


class Trace:
    """A tracing instance of our own, which disturbs nobody else's."""

    def __init__(self, home: Path) -> None:
        self._fd = os.open(home / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._seen = bytearray()
        self._ready = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._fd, self._read)

    @classmethod
    @contextlib.contextmanager
    def running(cls) -> Iterator[Trace]:
        home = _INSTANCES / f"ublkwatch-bench-{os.getpid()}"
        home.mkdir()
        try:
            (home / "trace_clock").write_text("mono")
            (home / "buffer_percent").write_text("0")  # a single event is worth waking up for
            for event, condition in _EVENTS.items():
                if condition is not None:
                    (home / "events" / event / "filter").write_text(condition)
                (home / "events" / event / "enable").write_text("1")
            trace = cls(home)
            try:
                yield trace
            finally:
                trace.close()
        finally:
            home.rmdir()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)

    def clear(self) -> None:
        """Forget what was seen so far."""
        self._read()
        self._seen.clear()
        self._ready.clear()

    async def ready(self) -> None:
        """Wait until somebody has said READY=1 since clear()."""
        await self._ready.wait()

    def moments(self, pid: int) -> dict[str, float]:
        """As moments(), of what was traced since clear()."""
        self._read()
        return moments(self._seen.decode(errors="replace"), pid)

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._fd, 1 << 16):
                self._seen += data
                if b" sys_sendto(" in data:
                    self._ready.set()


async def until_live(
    ctrl: UblkCtrl, trace: Trace, dev_id: int, former: int, deadline_s: float
) -> tuple[float, int]:
    """Wait until the device is LIVE under another pid; return when, and the pid. TimeoutError.

    It cannot be before its new server said READY=1, and until then every CPU is that server's.
    """
    async with asyncio.timeout(deadline_s):
        await trace.ready()
        while True:
            info = await ctrl.get_dev_info(dev_id)
            now = time.monotonic()
            if info.state is DevState.LIVE and info.ublksrv_pid != former:
                return now, info.ublksrv_pid
            await asyncio.sleep(_POLL_S)
