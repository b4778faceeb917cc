"""The oracle: the fastest recovery by the same means, for ublkwatch to be compared with.

It knows more than any supervisor can: it kills the servers itself, so it has nothing to detect; it
has no second thoughts: no record to commit, no state to ask for, no failure to survive. It is a
running process that did all this before. From the kill on it starts each server (by ublkwatch's
own launcher) and sends START_USER_RECOVERY every millisecond, at the same time; the line goes out
when both are done, and END right behind it. bench/c/oracle.c does the same in C, and says what
comes on standard input and goes to standard output.
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
from typing import Any

from bench.lot import filled
from ublkwatch.async_ring import AsyncRing
from ublkwatch.care import Job
from ublkwatch.ctrl import CtrlError, UblkCtrl
from ublkwatch.launch import Launcher

RECOVERY_S = 300.0
START_EVERY_S = 0.001
MOST = 512  # commands under way


class Oracle:
    """Recovers its devices, as often as it is told to."""

    def __init__(self, ctrl: UblkCtrl, options: argparse.Namespace) -> None:
        self._ctrl = ctrl
        self._mode: str = options.mode
        self._command: tuple[str, ...] = tuple(options.command)
        self._launcher = Launcher(options.home, self._heard)
        self._turns = asyncio.Semaphore(options.width)
        self._ready: dict[str, asyncio.Event] = {}
        self._round = 0
        self._started: list[int] = []  # in this round
        self._killed: list[int] = []  # in this round, by us
        self.lines: dict[int, str] = {}

    async def recover(self, servers: dict[int, int]) -> dict[str, Any]:
        """Kill the servers of these devices, and bring the devices back to LIVE."""
        self._tidy()
        self._round += 1
        tags = {dev_id: f"oracle-{dev_id}-{self._round}" for dev_id in servers}
        self._ready = {tag: asyncio.Event() for tag in tags.values()}
        root = next(iter(servers))
        pidfds = [os.pidfd_open(pid) for pid in dict.fromkeys(servers.values())]
        async with asyncio.timeout(RECOVERY_S):
            killed = time.monotonic()
            for pidfd in pidfds:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                os.close(pidfd)
            async with asyncio.TaskGroup() as group:
                shared = None
                if self._mode == "group":
                    shared = group.create_task(self._server(root, tags[root]))
                tasks = {
                    dev_id: group.create_task(self._device(dev_id, tag, shared))
                    for dev_id, tag in tags.items()
                }
        return {"killed": killed, "devices": {n: task.result() for n, task in tasks.items()}}

    async def _device(
        self, dev_id: int, tag: str, shared: asyncio.Task[int] | None
    ) -> dict[str, float]:
        if self._mode == "delegated":
            async with self._turns:
                return {"pid": await self._launch(dev_id, tag)}
        async with asyncio.TaskGroup() as both:
            accepting = both.create_task(self._start_recovery(dev_id))
            pid = await (shared or self._server(dev_id, tag))
            ready = time.monotonic()
        if shared and not self._launcher.known(tag):
            self._launcher.join(tag, next(iter(self._ready)))
        await self._write(tag, self.lines[dev_id])
        line = time.monotonic()
        await self._ctrl.end_user_recovery(dev_id, pid, timeout_s=RECOVERY_S)
        ended = time.monotonic()
        return {
            "accepted": accepting.result(),
            "ready": ready,
            "line": line,
            "ended": ended,
            "pid": pid,
        }

    async def _write(self, tag: str, line: str) -> None:
        while True:
            try:
                self._launcher.write_line(tag, line)
            except BlockingIOError:  # others' lines fill the FIFO of their common server
                await asyncio.sleep(START_EVERY_S)
            else:
                return

    async def _server(self, dev_id: int, tag: str) -> int:
        """Start a server and wait until it is READY, which is the end of its turn."""
        async with self._turns:
            pid = await self._launch(dev_id, tag)
            await self._ready[tag].wait()
        return pid

    async def _launch(self, dev_id: int, tag: str) -> int:
        pid = await self._launcher.start(tag, Job("oracle", filled(self._command, dev_id)))
        self._started.append(pid)
        return pid

    async def _start_recovery(self, dev_id: int) -> float:
        """Send START until it is accepted, and return when that was."""
        while True:
            try:
                await self._ctrl.start_user_recovery(dev_id)
            except CtrlError as error:
                if error.errno != errno.EBUSY:
                    raise
            else:
                return time.monotonic()
            await asyncio.sleep(START_EVERY_S)

    def _heard(self, tag: str) -> None:
        if tag in self._ready:
            self._ready[tag].set()

    def _tidy(self) -> None:
        """Reap the servers of the round before the last, which the last one has killed."""
        for pid in self._killed:
            self._launcher.how_ended(pid)
        self._killed, self._started = self._started, []
        self._launcher.keep_only(set(self._ready))


async def serve(oracle: Oracle, requests: asyncio.StreamReader) -> None:
    """Do what the driver of the benchmark says, until it hangs up."""
    while request := (await requests.readline()).decode():
        word, _, rest = request.partition(" ")
        if word == "device":
            dev_id, _, line = rest.partition(" ")
            oracle.lines[int(dev_id)] = line.strip()
        else:
            pairs = (pair.split(":") for pair in rest.split())
            answer = await oracle.recover({int(dev_id): int(pid) for dev_id, pid in pairs})
            print(json.dumps(answer), flush=True)


async def run(options: argparse.Namespace) -> None:
    requests = asyncio.StreamReader(limit=1 << 20)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(requests), sys.stdin
    )
    ring = AsyncRing(MOST)
    ring.limit_workers(MOST)
    try:
        await serve(Oracle(UblkCtrl(ring), options), requests)
    finally:
        ring.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.oracle")
    parser.add_argument("mode", choices=("managed", "group", "delegated"))
    parser.add_argument("width", type=int, help="servers that are started at a time")
    parser.add_argument("home", type=Path)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
