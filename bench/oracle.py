"""The oracle: the fastest recovery by the same means, for ublkwatch to be compared with.

It knows more than any supervisor can: it kills the server itself, so it has nothing to detect; it
has one device and no second thoughts: no record to commit, no state to ask for, no failure to
survive. It is a running process that did all this before. From the kill on it starts the server (by
ublkwatch's own launcher) and sends START_USER_RECOVERY every millisecond, at the same time; the
line goes out when both are done, and END right behind it.

On standard input: one JSON object a line, ``{"pid": the server to kill}``. On standard output the
moments of that recovery, in seconds of CLOCK_MONOTONIC, and the new server's pid.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import json
import os
import signal
import sys
import time
from pathlib import Path

from ublkwatch.async_ring import AsyncRing
from ublkwatch.care import Job
from ublkwatch.ctrl import CtrlError, UblkCtrl
from ublkwatch.launch import Launcher

RECOVERY_S = 60.0
START_EVERY_S = 0.001


class Oracle:
    """Recovers one device, as often as it is told to."""

    def __init__(self, ctrl: UblkCtrl, dev_id: int, command: tuple[str, ...], home: Path) -> None:
        """``command`` starts a server by the attach contract; ``home`` is for the launcher."""
        self._ctrl = ctrl
        self._dev_id = dev_id
        self._command = command
        self._launcher = Launcher(home, self._heard)
        self._line = ""
        self._round = 0
        self._ready = asyncio.Event()

    async def prepare(self) -> None:
        """Learn all that the line will say."""
        info = await self._ctrl.get_dev_info(self._dev_id)
        self._line = json.dumps(
            {
                "dev_id": self._dev_id,
                "char_device": f"/dev/ublkc{self._dev_id}",
                "queues": info.nr_hw_queues,
                "depth": info.queue_depth,
                "max_io_buf_bytes": info.max_io_buf_bytes,
                "flags": int(info.flags),
                "params": await self._ctrl.get_params(self._dev_id),
                "attempt": 1,
            }
        )

    async def recover(self, pid: int) -> dict[str, float]:
        """Kill the server and bring the device back to LIVE."""
        self._round += 1
        tag = f"oracle-{self._dev_id}-{self._round}"
        self._ready.clear()
        pidfd = os.pidfd_open(pid)
        async with asyncio.timeout(RECOVERY_S):
            killed = time.monotonic()
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
            async with asyncio.TaskGroup() as both:
                server = both.create_task(self._start_server(tag))
                start = both.create_task(self._start_recovery())
            self._launcher.write_line(tag, self._line)
            await self._ctrl.end_user_recovery(self._dev_id, server.result(), timeout_s=RECOVERY_S)
            ended = time.monotonic()
        return {
            "killed": killed,
            "accepted": start.result(),
            "ended": ended,
            "pid": server.result(),
        }

    def tidy(self, pid: int) -> None:
        """Forget the former server; not part of what is measured."""
        self._launcher.how_ended(pid)
        self._launcher.keep_only({f"oracle-{self._dev_id}-{self._round}"})

    async def _start_server(self, tag: str) -> int:
        pid = await self._launcher.start(tag, Job("oracle", self._command))
        await self._ready.wait()
        return pid

    async def _start_recovery(self) -> float:
        """Send START until it is accepted, and return when that was."""
        while True:
            try:
                await self._ctrl.start_user_recovery(self._dev_id)
            except CtrlError as error:
                if error.errno != errno.EBUSY:
                    raise
            else:
                return time.monotonic()
            await asyncio.sleep(START_EVERY_S)

    def _heard(self, _tag: str) -> None:
        self._ready.set()


async def serve(oracle: Oracle, requests: asyncio.StreamReader) -> None:
    """Do what the driver of the benchmark says, until it hangs up."""
    await oracle.prepare()
    print(json.dumps({"prepared": True}), flush=True)
    while request := await requests.readline():
        pid = json.loads(request)["pid"]
        print(json.dumps(await oracle.recover(pid)), flush=True)
        oracle.tidy(pid)


async def run(dev_id: int, home: Path, command: tuple[str, ...]) -> None:
    requests = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(requests), sys.stdin
    )
    ring = AsyncRing()
    try:
        await serve(Oracle(UblkCtrl(ring), dev_id, command, home), requests)
    finally:
        ring.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.oracle")
    parser.add_argument("--dev-id", type=int, required=True)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    asyncio.run(run(options.dev_id, options.home, tuple(options.command)))


if __name__ == "__main__":
    main()
